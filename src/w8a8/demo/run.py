"""The demo: the main job on a small model that is really trained and is shipped with the package.

The model is an OPT of about 1.5 million parameters, trained by scripts/train_demo_model.py on docstrings of
the Python standard library.  It is scored on docstrings of modules that were held out, read from the
interpreter at hand (`w8a8.demo.corpus`), so no text is shipped.  For each scheme the model is quantised, saved,
loaded again, and the loaded one is measured against the float model.

A model so small says nothing about speed: its products take less time than what stands around them.  So what is timed
is one layer of a usual size, and where int8 is no faster there, a note says what may be the reason.
"""

import copy
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from w8a8 import kernels
from w8a8.checkpoint.opening import OpenedModel, open_model
from w8a8.checkpoint.writer import save
from w8a8.core.progress import Progress, tell
from w8a8.demo.corpus import held_out_text
from w8a8.evaluation import compare, context_length, encode, perplexity
from w8a8.evaluation.generation import continue_text
from w8a8.kernels import compiled, native
from w8a8.layers.linear import QuantLinear
from w8a8.pipeline import quantize, simulate

SCHEMES = ("w8a8", "w8a8-asym", "w8a8-tensor", "w8a8-o1", "w8a8-o2", "w8a16")
PROMPT = "Return a new"
_NEW_TOKENS = 48


@dataclass(frozen=True)
class DemoRow:
    """One scheme: the model that was quantised, saved, and loaded again.

    simulated_perplexity: Of the simulation; None for the float model.
    perplexity: Of the loaded model, in integers; of the float model in the first row.
    top1_agreement: Share of the tokens on which it agrees with the float model.
    bytes: The safetensors file.
    """

    scheme: str
    simulated_perplexity: float | None
    perplexity: float
    top1_agreement: float
    bytes: int


@dataclass(frozen=True)
class DemoReport:
    """Everything `w8a8 demo` shows.  `sample` was written by the integer model of the first scheme."""

    parameters: int
    tokens: int
    threads: int
    float_perplexity: float
    rows: tuple[DemoRow, ...]
    coverage: str
    prompt: str
    sample: str


@dataclass(frozen=True)
class LayerTime:
    """How long one call of one linear layer takes: float32, and w8a8 with float32 inputs; medians.

    rows: Tokens at once.
    kernel: What ran the integer layer.
    """

    rows: int
    float_ms: float
    int8_ms: float
    kernel: str


@dataclass(frozen=True)
class LayerSpeed:
    """One linear layer of `features` x `features`.  `note` says why int8 may be slower, where it is."""

    features: int
    threads: int
    times: tuple[LayerTime, ...]
    note: str | None


def demo_directory() -> Path:
    """The transformers directory of the shipped model, float16."""
    return Path(__file__).parents[1] / "demo_model"


def demo_model() -> OpenedModel:
    """The shipped model in float32, with its tokenizer."""
    return open_model(demo_directory(), dtype="float32")


def run_demo(
    *, max_tokens: int | None = None, progress: Progress | None = None, show: Callable[[DemoReport], None] | None = None
) -> DemoReport:
    """Quantise, save, load and measure the shipped model in every scheme of `SCHEMES`.

    Args:
        max_tokens: Score only the first so many held-out tokens.
        progress: Called before the float model is scored, and after each scheme.
        show: Called once, with what is known when the first scheme is done.

    Raises:
        TextError: the standard library's sources, which hold the text, are not there.
    """
    tell(progress, 0, len(SCHEMES), "float")
    opened = demo_model()
    text = encode(opened.tokenizer, held_out_text()).first(max_tokens)
    length = context_length(opened.model)
    assert length is not None, "an OPT has a context"
    float_perplexity = perplexity(opened.model, text, seq_len=length).perplexity.mean
    rows = [DemoRow("float", None, float_perplexity, 1.0, (opened.directory / "model.safetensors").stat().st_size)]
    coverage = sample = ""
    for done, scheme in enumerate(SCHEMES, start=1):
        simulated = copy.deepcopy(opened.model)
        simulate(simulated, scheme)
        result = quantize(copy.deepcopy(opened.model), scheme)
        with tempfile.TemporaryDirectory(prefix="w8a8-demo-") as parent:
            directory = Path(parent) / scheme
            save(result.model.to(torch.float16), directory, opened.tokenizer)  # as the shipped file has it
            loaded = open_model(directory, dtype="float32")
            size = (directory / "model.safetensors").stat().st_size
            measured = compare(loaded.model, opened.model, text, seq_len=length)
            expected = perplexity(simulated, text, seq_len=length).perplexity.mean
            found = measured.model.perplexity.mean
            rows.append(DemoRow(scheme, expected, found, measured.top1_agreement.mean, size))
            if not sample:
                coverage = str(result.coverage)
                sample = continue_text(loaded, PROMPT, max_new_tokens=_NEW_TOKENS).text
        tell(progress, done, len(SCHEMES), scheme)
        report = DemoReport(
            sum(p.numel() for p in opened.model.parameters()),
            text.ids.numel(),
            torch.get_num_threads(),
            float_perplexity,
            tuple(rows),
            coverage,
            PROMPT,
            sample,
        )
        if show is not None and done == 1:
            show(report)
    return report


@torch.inference_mode()
def time_layer(features: int = 4096, *, rows: tuple[int, ...] = (1, 128), rounds: int = 7) -> LayerSpeed:
    """Time one linear layer with random weights in float32 and as w8a8, call by call in turn.

    Args:
        rows: Tokens at once: one as in decoding, many as in reading a prompt.
        rounds: Of which the medians are told; one more comes before them.
    """
    linear = nn.Linear(features, features, dtype=torch.float32, device="cpu")
    layer = QuantLinear.from_float(linear)
    times = []
    for m in rows:
        x, before = torch.randn(m, features, dtype=torch.float32, device="cpu"), layer.kernel_calls()
        took = [(_ms(linear, x), _ms(layer, x)) for _ in range(rounds + 1)][1:]
        (kernel,) = (name for name, calls in layer.kernel_calls().items() if calls != before.get(name))
        float_ms, int8_ms = (statistics.median(column) for column in zip(*took, strict=True))
        times.append(LayerTime(m, float_ms, int8_ms, kernel))
    note = _why_slow(times[-1].kernel) if any(each.int8_ms >= each.float_ms for each in times) else None
    return LayerSpeed(features, torch.get_num_threads(), tuple(times), note)


def _ms(layer: nn.Module, x: torch.Tensor) -> float:
    began = time.perf_counter()
    layer(x)
    return 1e3 * (time.perf_counter() - began)


def _why_slow(kernel: str) -> str:
    """What may make int8 slower than float where this kernel runs."""
    native_name = native.NATIVE.name
    if kernel != native_name:
        missing = kernels.available()[native_name]
        why = f"{native_name} cannot run: {missing}" if missing else "W8A8_KERNEL in the environment prefers it"
        return f"int8 is slower here since the kernel is {kernel}; {why}"
    if compiled.instruction_set() == "portable":
        return "int8 is slower here since the kernel has no instructions for this processor and runs in plain C++"
    return (
        f"int8 was slower here, in {compiled.instruction_set()}: calls this short are disturbed by whatever else runs; "
        "`w8a8 bench MODEL` times whole models"
    )
