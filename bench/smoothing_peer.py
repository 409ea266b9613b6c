"""Smoothing beside llm-compressor's SmoothQuantModifier: the same model, the same batches, one process each.

    python bench/smoothing_peer.py            measure, and write bench/results/MACHINE/smoothing_peer.json
    python bench/smoothing_peer.py --show     print the table of the results that are there

It needs llm-compressor, which pins older versions of transformers and compressed-tensors than w8a8's tests use, and so
an environment of its own: `make bench-smoothing-peer` makes one.

Two models: the small Llama with the outliers of OPT-1.3b injected (semi-synthetic, see `w8a8.outliers`), and a random
tiny Gemma-3 whose norm weights are drawn, which has four norms in a block and stores their weights less one.  Each
tool, in a process of its own, smooths (alpha 0.5; ours also searched) and quantises to W8A8, weights per channel and
activations per token.  Told are: how far smoothing alone changed the float logits (relative norm), the perplexity
after quantising, the seconds of both steps, and the peak memory above what the process had before.
"""

import argparse
import json
import math
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, Gemma3ForCausalLM, Gemma3TextConfig

import w8a8
from machine import describe_machine, keep, results_of
from w8a8.calibration.data import Calibration

ROOT = Path(__file__).parents[1]
DATA = ROOT.parent / "shared" / "data"
ALPHA, POWER, LENGTH = 0.5, 1.5, 256


def ours(alpha: float | str) -> tuple[Callable[..., None], Callable[..., None]]:
    """Smooth, and quantise, with w8a8."""

    def smooth(model: Any, windows: Tensor) -> None:
        w8a8.smooth_(model, Calibration.of(windows, samples=len(windows)), alpha=alpha)

    def quantise(model: Any, windows: Tensor) -> None:
        w8a8.quantize(model, "w8a8")

    return smooth, quantise


def llmcompressor() -> tuple[Callable[..., None], Callable[..., None]]:
    """The same with llm-compressor."""
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from tokenizers import Tokenizer, models
    from torch.utils.data import DataLoader
    from transformers import PreTrainedTokenizerFast

    try:
        from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier
    except ImportError:  # where it was up to 0.9
        from llmcompressor.modifiers.smoothquant import SmoothQuantModifier

    words = Tokenizer(models.WordLevel({f"t{i}": i for i in range(512)}, unk_token="t0"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="t0", pad_token="t0")  # oneshot wants one

    def smooth(model: Any, windows: Tensor) -> None:
        rows = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in windows]
        oneshot(
            model=model,
            processor=tokenizer,
            dataset=DataLoader(rows, batch_size=1),
            recipe=SmoothQuantModifier(smoothing_strength=ALPHA),
            num_calibration_samples=len(rows),
            max_seq_length=LENGTH,
        )

    def quantise(model: Any, windows: Tensor) -> None:
        oneshot(model=model, recipe=QuantizationModifier(targets="Linear", scheme="W8A8", ignore=["lm_head"]))

    return smooth, quantise


TOOLS: dict[str, Callable[[], tuple[Callable[..., None], Callable[..., None]]]] = {
    "w8a8, searched": lambda: ours("auto"),
    f"w8a8, alpha {ALPHA}": lambda: ours(ALPHA),
    f"llm-compressor, alpha {ALPHA}": llmcompressor,
}


@torch.no_grad()
def logits(model: Any, windows: Tensor) -> Tensor:
    return torch.cat([model(row[None], use_cache=False).logits for row in windows]).to(torch.float64)


def nats(scores: Tensor, windows: Tensor) -> float:
    """Mean loss per token."""
    flat, targets = scores[:, :-1].flatten(0, 1), windows[:, 1:].flatten()
    return float(torch.nn.functional.cross_entropy(flat, targets))


def peak_bytes() -> int:
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def child(tool: str, directory: Path, output: Path) -> None:
    """One tool on one model; a failure of the tool is a result."""
    data = load_file(directory / "windows.safetensors")
    calibration, held_out = data["calibration"], data["held_out"]
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    smooth, quantise = TOOLS[tool]()
    before = logits(model, held_out)
    record: dict[str, Any] = {"tool": tool, "float_perplexity": math.exp(nats(before, held_out))}
    memory, start = peak_bytes(), time.perf_counter()
    try:
        smooth(model, calibration)
        record["smooth_seconds"] = time.perf_counter() - start
        after = logits(model, held_out)
        record["float_change"] = float((after - before).norm() / before.norm())
        start = time.perf_counter()
        quantise(model, calibration)
        record["quantise_seconds"] = time.perf_counter() - start
        record["peak_bytes"] = peak_bytes() - memory
        record["perplexity"] = math.exp(nats(logits(model, held_out), held_out))
    except (ValueError, RuntimeError, KeyError, TypeError, AttributeError) as error:  # what tools raise on a model
        record["failed"] = f"{type(error).__name__}: {error}"[:300]
    output.write_text(json.dumps(record))


def make_llama(directory: Path, arguments: argparse.Namespace) -> str:
    """The trained Llama, with outliers, and windows of its text."""
    from w8a8 import outliers
    from w8a8.checkpoint.opening import open_model
    from w8a8.evaluation import encode

    opened = open_model(arguments.model, dtype="float32")
    ids = encode(opened.tokenizer, Path(arguments.text).read_text(encoding="utf-8")).ids
    outliers.inject_(opened.model, arguments.profile, power=POWER)
    opened.model.save_pretrained(directory)
    save_windows(directory, ids[: 64 * LENGTH], ids[ids.numel() // 3 :][: 64 * LENGTH])
    return "stories260K with outliers (semi-synthetic)"


def make_gemma(directory: Path, arguments: argparse.Namespace) -> str:
    """A random Gemma-3; its perplexity means nothing, the change of its float logits does."""
    config = Gemma3TextConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=512,
    )
    model = Gemma3ForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.normal_(0.0, 0.3)  # stored less one
    model.save_pretrained(directory)
    save_windows(directory, *torch.randint(0, 512, (2, 16 * LENGTH)))
    return "random Gemma-3"


def save_windows(directory: Path, calibration: Tensor, held_out: Tensor) -> None:
    windows = {"calibration": calibration.view(-1, LENGTH), "held_out": held_out.view(-1, LENGTH)}
    save_file({name: ids.contiguous() for name, ids in windows.items()}, directory / "windows.safetensors")


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    records = []
    for make in (make_llama, make_gemma):
        with tempfile.TemporaryDirectory() as name:
            directory = Path(name)
            about = make(directory, arguments)
            for tool in TOOLS:
                output = directory / "record.json"
                command = [sys.executable, __file__, "--child", tool, name, str(output)]
                done = subprocess.run(command, capture_output=True, text=True, check=False)  # tools talk a lot
                if done.returncode:
                    raise SystemExit(f"{tool} stopped on {about}:\n{done.stderr[-3000:]}")
                records.append({"model": about, **json.loads(output.read_text())})
                print(row(records[-1]), flush=True)
    versions = {
        package: metadata.version(package) for package in ("llmcompressor", "compressed-tensors", "transformers")
    }
    return {"machine": describe_machine() | versions, "alpha": ALPHA, "records": records}


def row(record: dict[str, Any]) -> str:
    """One line of the table."""
    if "failed" in record:
        cells = [f"failed: {record['failed']}", "", "", "", ""]
    else:
        cells = [
            f"{record['float_change']:.1e}",
            f"{record['float_perplexity']:.4g}",
            f"{record['perplexity']:.4g}",
            f"{record['smooth_seconds'] + record['quantise_seconds']:.1f}",
            f"{record['peak_bytes'] / 2**20:.0f}",
        ]
    return "| " + " | ".join([record["model"], record["tool"], *cells]) + " |"


def table(result: dict[str, Any]) -> str:
    """All records as Markdown."""
    head = ["model", "tool", "float logits changed by", "float perplexity", "W8A8 perplexity", "seconds", "peak MiB"]
    lines = ["| " + " | ".join(head) + " |", "|---|---|" + "---:|" * (len(head) - 2)]
    return "\n".join([*lines, *map(row, result["records"])])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--show", action="store_true")
    parser.add_argument("--child", nargs=3, metavar=("TOOL", "DIRECTORY", "OUTPUT"), help=argparse.SUPPRESS)
    parser.add_argument("--model", default=DATA / "stories260K-hf", help="a small causal language model, float")
    parser.add_argument("--text", default=DATA / "tinystories_val.txt", help="its text")
    parser.add_argument("--profile", default=DATA / "act-absmax" / "opt-1.3b.absmax.pile512.safetensors")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.manual_seed(0)
    torch.set_num_threads(1)  # the models are tiny
    if arguments.child:
        tool, directory, output = arguments.child
        child(tool, Path(directory), Path(output))
        return
    if arguments.show:
        result = results_of("smoothing_peer")[0]
    else:
        result = measure(arguments)
        keep("smoothing_peer", result)
    print("\n" + table(result))


if __name__ == "__main__":
    main()
