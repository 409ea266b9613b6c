import subprocess
import sys
from pathlib import Path

import pytest

import w8a8


def run(code: str) -> str:
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize(
    "code",
    [
        "import w8a8",
        "from w8a8.cli import main",
        "import w8a8.cli.commands",
        "import w8a8.core.scheme, w8a8.errors, w8a8.demo.corpus",
    ],
)
def test_torch_is_not_imported_before_it_is_needed(code):
    heavy = "[m for m in ('torch', 'transformers', 'numpy', 'safetensors', 'accelerate') if m in sys.modules]"
    assert run(f"import sys\n{code}\nprint({heavy})") == "[]"


def test_help_imports_no_torch():
    code = (
        "import sys\nfrom w8a8.cli import main\nsys.argv = ['w8a8', '--help']\n"
        "try:\n    main()\nexcept SystemExit:\n    print('torch' in sys.modules)"
    )
    assert run(code).endswith("False")


def test_a_plain_model_needs_no_transformers_and_nothing_that_comes_with_it():
    code = """
import sys
for name in ("transformers", "tokenizers", "safetensors", "huggingface_hub", "accelerate", "yaml"):
    sys.modules[name] = None  # an import of it fails
import torch
from torch import nn
import w8a8
from w8a8.evaluation.outputs import compare_outputs

def made():
    torch.manual_seed(0)
    model = nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 16)).eval()
    with torch.no_grad():
        model[0].weight[5] = 5.0  # an outlier, so that smoothing is worth it
    return model

torch.manual_seed(1)
batches = [torch.randn(8, 32) for _ in range(4)]
results = [
    w8a8.quantize(made()),
    w8a8.quantize(made(), "w8a8-static", calibration=batches, smooth="searched"),
    w8a8.simulate(made(), "w8a8-o3", calibration=batches, smooth="none"),
]
for result in results:
    assert len(result.schemes) == 2, result.coverage
    assert compare_outputs(result.model, made(), batches).cosine.mean > 0.999
assert w8a8.outliers.inject_(made(), torch.rand(32) + 0.5, inputs=batches[0])
assert w8a8.smooth_(made(), batches, alpha=0.5).smoothed
assert results[0].uncalled() == [] and results[1].smooth.smoothed
again = w8a8.QuantLinear.from_float(nn.Linear(32, 8), "w8a8-asym")
assert again(batches[0]).shape == (8, 8)
print(w8a8.functional.__name__, w8a8.dataflow.observe.__name__)
"""
    assert run(code) == "w8a8.functional observe"


@pytest.mark.parametrize("name", w8a8.__all__)
def test_every_public_name_is_there(name):
    assert getattr(w8a8, name) is not None
    assert name in dir(w8a8)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'w8a8' has no attribute 'quantise'"):
        _ = w8a8.quantise


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no device that is always full")
def test_output_that_cannot_be_written_is_one_message():
    with Path("/dev/full").open("w") as full:
        command = [sys.executable, "-m", "w8a8", "--version"]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False, timeout=120)
    assert done.returncode == 2
    assert done.stderr == "w8a8: the output cannot be written, the disk is full; make room, and repeat\n"


def test_the_module_runs_as_a_command():
    command = [sys.executable, "-m", "w8a8", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout == f"w8a8 {w8a8.__version__}\n"
