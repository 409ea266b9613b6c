"""Make docs/performance.md from bench/results/linear.json, model.json and calibration.json.

python bench/report.py
"""

import json
from pathlib import Path
from typing import Any

import calibration
import linear
import model

PAGE = Path(__file__).parents[1] / "docs" / "performance.md"

_HEAD = """# Performance

Made by `bench/report.py` from the results of `bench/linear.py`, `bench/model.py` and `bench/calibration.py`; nothing
here is written by hand.
A ratio is the peer's time divided by ours: above 1x, ours is faster. Medians of interleaved calls in one process.

"""


def page(layers: dict[str, Any], models: dict[str, Any], calibrated: dict[str, Any]) -> str:
    """The whole page."""
    return (
        _HEAD
        + "## One linear layer, float32 in and out, through `QuantLinear.forward`\n\n"
        + _where(layers)
        + "Geometric means of the ratios over the nine shapes, by rows. torch.ao's layers quantise activations per "
        "tensor, which is less work; torchao's per token; quanto's are calibrated; `torch_cpu` is our own fallback.\n\n"
        + linear.summary(layers)
        + "\n\nEvery cell. The ceiling is that of int8 products in registers from 16 rows up, and of a plain read of "
        "memory below; more than 100 % means that weights stayed in a cache.\n\n"
        + linear.table(layers)
        + "\n\n## A whole model in transformers, eager, random weights, tokens per second\n\n"
        + _where(models)
        + model.table(models)
        + "\n\n## Calibrating\n\n"
        + _where(calibrated)
        + f"One batch of {calibration.LENGTH} tokens through four layers of OPT-125m's widths, with statistics on the "
        "input of every linear layer; the ratio is the median over batches. The peak is what the process holds at most "
        "over what it held before, in a process of its own for each cell, two layers, batches of "
        f"{calibration.MEMORY_LENGTH} tokens.\n\n" + calibration.table(calibrated) + "\n"
    )


def _where(result: dict[str, Any]) -> str:
    machine = result["machine"]
    threads = machine["cores, and threads torch uses"].rpartition(" ")[2]
    return (
        f"{machine['processor']}, {machine['native kernel runs']}, {threads} threads, a shared and noisy machine; "
        f"torch {machine['torch']}, transformers {machine['transformers']}; {machine['date']}.\n\n"
    )


def main() -> None:
    results = [json.loads(path.read_text()) for path in (linear.RESULT, model.RESULT, calibration.RESULT)]
    PAGE.write_text(page(*results))
    print(f"wrote {PAGE}")


if __name__ == "__main__":
    main()
