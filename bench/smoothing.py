"""What smoothing saves: perplexity float, naive, and smoothed with fixed alphas and with the searched one.

python bench/smoothing.py            measure, and write bench/results/MACHINE/smoothing.json
python bench/smoothing.py --show     print the tables of the results that are there

Two models.  The first is a small Llama that gets the activation outliers of OPT-1.3b (`w8a8.outliers`, power 1.5), so
its results are semi-synthetic.  The second is the OPT that is shipped with w8a8, without such outliers: smoothing must
do it no harm.  Calibration and evaluation text are disjoint.  8 bits run in integers, 6 and 4 bits are simulated.
"""

import argparse
import copy
import multiprocessing
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import w8a8
from machine import describe_machine, keep, results_of
from w8a8 import PerChannel, PerTensor, PerToken, QuantSpec, Scheme, outliers
from w8a8.calibration.data import Calibration
from w8a8.checkpoint.opening import open_model
from w8a8.core.plain import plain
from w8a8.demo import corpus
from w8a8.demo.run import demo_directory
from w8a8.evaluation import encode, perplexity

ROOT = Path(__file__).parents[1]
DATA = ROOT.parent / "shared" / "data"

FIXED = (0.3, 0.5, 0.7, 0.85)
BITS = (8, 6, 4)
POWER = 1.5
WINDOW = 256


@dataclass(frozen=True)
class Case:
    """A float model, what to calibrate it on, and what to score it on."""

    name: str
    model: Any
    calibration: Calibration
    ids: Tensor
    outliers: float | None

    def perplexity(self, model: Any) -> float:
        """On the evaluation text."""
        return perplexity(model, self.ids, seq_len=WINDOW).perplexity.mean


def schemes() -> Iterator[tuple[str, int, Scheme]]:
    """Name, width and scheme of each row."""
    for bits in BITS:
        weights = QuantSpec(bits, PerChannel())
        yield "w8a8", bits, Scheme(weights, QuantSpec(bits, PerToken()))
        yield "w8a8-tensor", bits, Scheme(weights, QuantSpec(bits, PerTensor()))
        yield "w8a8-static", bits, Scheme(weights, QuantSpec(bits, PerTensor(), dynamic=False))


def injected_case(arguments: argparse.Namespace) -> Case:
    """The small Llama with outliers."""
    opened = open_model(arguments.model, dtype="float32")
    ids = encode(opened.tokenizer, Path(arguments.text).read_text(encoding="utf-8")).ids
    middle = ids.numel() // 3  # the last fifth of tinystories_val.txt is another kind of text: perplexity 8, not 4
    done = outliers.inject_(opened.model, arguments.profile, power=POWER)
    calibration = Calibration.of(ids[:middle], samples=arguments.samples, length=WINDOW)
    largest = max(injection.largest for injection in done)
    return Case("semi-synthetic", opened.model, calibration, ids[middle:][: arguments.tokens], largest)


def demo_case(arguments: argparse.Namespace) -> Case:
    """The shipped OPT as it is."""
    opened = open_model(demo_directory(), dtype="float32")
    training = encode(opened.tokenizer, corpus.training_text()).ids
    calibration = Calibration.of(training, samples=arguments.samples, length=WINDOW)
    ids = encode(opened.tokenizer, corpus.held_out_text()).ids[: arguments.tokens]
    return Case("demo OPT", opened.model, calibration, ids, None)


def quantised(case: Case, model: Any, scheme: Scheme, bits: int, smooth: str) -> dict[str, Any]:
    """Perplexity of a copy of a float model, quantised."""
    convert: Callable[..., Any] = w8a8.quantize if bits == 8 else w8a8.simulate
    start = time.perf_counter()
    result = convert(copy.deepcopy(model), scheme, calibration=case.calibration, smooth=smooth)
    seconds = time.perf_counter() - start
    told: dict[str, Any] = {"perplexity": case.perplexity(result.model), "seconds": seconds}
    if result.smooth is not None:
        report = result.smooth
        told |= {"kept": report.kept, "float_change": report.change}
        told |= {"scores": plain(report.scores), "alphas": {g.source: g.alpha for g in report.groups}}
    return told


def measure_case(case: Case) -> dict[str, Any]:
    """All rows of one model.  A fixed alpha does not ask for the scheme, so its model is smoothed once."""
    fixed = {}
    for alpha in FIXED:
        fixed[str(alpha)] = copy.deepcopy(case.model)
        w8a8.smooth_(fixed[str(alpha)], case.calibration, alpha=alpha)
    rows = []
    for name, bits, scheme in schemes():
        row = {"scheme": name, "bits": bits, "naive": quantised(case, case.model, scheme, bits, "none")}
        row |= {"fixed": {alpha: quantised(case, model, scheme, bits, "none") for alpha, model in fixed.items()}}
        row |= {way: quantised(case, case.model, scheme, bits, way) for way in ("searched", "auto")}
        rows.append(row)
        print(_row(row, 0.0), flush=True)
    return {
        "name": case.name,
        "outliers": case.outliers,
        "calibration": case.calibration.description.partition(" of ")[0].rstrip(","),
        "tokens": case.ids.numel(),
        "window": WINDOW,
        "float": case.perplexity(case.model),
        "rows": rows,
    }


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Both models, a process with one thread for each."""
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
        cases = list(pool.map(_measured, (injected_case, demo_case), (arguments, arguments)))
    return {"machine": describe_machine(), "power": POWER, "cases": cases}


def _measured(make: Callable[[argparse.Namespace], Case], arguments: argparse.Namespace) -> dict[str, Any]:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    return measure_case(make(arguments))


def recovery(row: dict[str, Any], exact: float) -> float:
    """The share of the perplexity lost by naive quantisation that auto gives back."""
    naive, auto = row["naive"]["perplexity"], row["auto"]["perplexity"]
    return float((naive - auto) / (naive - exact))


def against_best(row: dict[str, Any]) -> float:
    """Perplexity of auto relative to the best fixed alpha, minus 1."""
    return float(row["auto"]["perplexity"] / min(f["perplexity"] for f in row["fixed"].values()) - 1)


def table(case: dict[str, Any]) -> str:
    """One model's rows as Markdown."""
    head = ["scheme", "bits", "naive", *(f"alpha {alpha}" for alpha in FIXED), "searched", "auto", "(kept)"]
    head += ["auto / best fixed", "recovered"]
    lines = ["| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1)]
    return "\n".join([*lines, *(_row(row, case["float"]) for row in case["rows"])])


def _row(row: dict[str, Any], exact: float) -> str:
    figures = [row["naive"], *row["fixed"].values(), row["searched"], row["auto"]]
    cells = [row["scheme"], str(row["bits"]), *(_perplexity(f["perplexity"]) for f in figures)]
    lost = row["naive"]["perplexity"] / exact - 1 if exact else 0.0
    cells.append(row["auto"]["kept"])
    cells.append(f"{100 * against_best(row):+.2f} %")
    cells.append(f"{100 * recovery(row, exact):.1f} %" if lost > 0.01 else "")
    return "| " + " | ".join(cells) + " |"


def _perplexity(value: float) -> str:
    return f"{value:.4f}" if value < 100 else f"{value:.4g}"


def tables(result: dict[str, Any]) -> str:
    """Everything, with what has to be said about it."""
    parts = []
    for case in result["cases"]:
        about = "as it is"
        if case["outliers"] is not None:
            about = (
                f"with the profile of OPT-1.3b injected into its norms (power {result['power']}, largest factor "
                f"{case['outliers']:.0f}): these results are semi-synthetic"
            )
        parts.append(
            f"{case['name']}: {about}. Float perplexity {case['float']:.4f} on {case['tokens']:,} tokens; "
            f"calibrated on {case['calibration']}.\n\n{table(case)}"
        )
    return "\n\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--show", action="store_true")
    parser.add_argument("--model", default=DATA / "stories260K-hf", help="a small causal language model, float")
    parser.add_argument("--text", default=DATA / "tinystories_val.txt", help="its text")
    parser.add_argument("--profile", default=DATA / "act-absmax" / "opt-1.3b.absmax.pile512.safetensors")
    parser.add_argument("--samples", type=int, default=192, help="windows to calibrate on")
    parser.add_argument("--tokens", type=int, default=61440, help="tokens to score")
    arguments = parser.parse_args()
    if arguments.show:
        result = results_of("smoothing")[0]
    else:
        result = measure(arguments)
        keep("smoothing", result)
    print(tables(result))


if __name__ == "__main__":
    main()
