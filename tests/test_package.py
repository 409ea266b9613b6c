import subprocess
import sys
from pathlib import Path

import pytest

import w8a8


def run(code: str) -> str:
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout.strip()


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
