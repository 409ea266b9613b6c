"""The demo: the main job on a small model that is really trained and is shipped with the package.

The model is an OPT of about 1.5 million parameters, trained by scripts/train_demo_model.py on docstrings of
the Python standard library.  It is scored on docstrings of modules that were held out, read from the
interpreter at hand (`w8a8.corpus`), so no text is shipped.  For each scheme the model is quantised, saved,
loaded again, and the loaded one is measured against the float model.
"""

import copy
import statistics
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

from w8a8.checkpoint import load, save
from w8a8.convert import Progress
from w8a8.corpus import held_out_text
from w8a8.evaluation import compare, context_length, encode, perplexity
from w8a8.generation import continue_text
from w8a8.pipeline import OpenedModel, open_model, quantize, simulate

SCHEMES = ("w8a8", "w8a8-asym", "w8a8-tensor", "w8a8-o1", "w8a8-o2", "w8a16")
PROMPT = "Return a new"
_NEW_TOKENS = 48
_SPEED_RUNS = 3


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
    decode_tok_per_s: float


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


def demo_directory() -> Path:
    """The transformers directory of the shipped model, float16."""
    return Path(__file__).parent / "demo_model"


def demo_model() -> OpenedModel:
    """The shipped model in float32, with its tokenizer."""
    return open_model(demo_directory(), dtype="float32")


def run_demo(*, max_tokens: int | None = None, progress: Progress | None = None) -> DemoReport:
    """Quantise, save, load and measure the shipped model in every scheme of `SCHEMES`.

    Args:
        max_tokens: Score only the first so many held-out tokens.
        progress: Called after each scheme.

    Raises:
        TextError: the standard library's sources, which hold the text, are not there.
    """
    opened = demo_model()
    text = encode(opened.tokenizer, held_out_text()).first(max_tokens)
    length = context_length(opened.model)
    assert length is not None, "an OPT has a context"
    float_perplexity = perplexity(opened.model, text, seq_len=length).perplexity.mean
    rows = [
        DemoRow(
            "float",
            None,
            float_perplexity,
            1.0,
            (opened.directory / "model.safetensors").stat().st_size,
            _decode_speed(opened),
        )
    ]
    coverage = sample = ""
    for done, scheme in enumerate(SCHEMES, start=1):
        simulated = copy.deepcopy(opened.model)
        simulate(simulated, scheme)
        quantized = copy.deepcopy(opened.model)
        result = quantize(quantized, scheme)
        with tempfile.TemporaryDirectory(prefix="w8a8-demo-") as parent:
            directory = Path(parent) / scheme
            save(quantized.to(torch.float16), directory, opened.tokenizer)  # as the shipped file has it
            loaded = OpenedModel(load(directory).to(torch.float32), opened.tokenizer, directory, quantized=True)
            size = (directory / "model.safetensors").stat().st_size
            measured = compare(loaded.model, opened.model, text, seq_len=length)
            rows.append(
                DemoRow(
                    scheme,
                    perplexity(simulated, text, seq_len=length).perplexity.mean,
                    measured.model.perplexity.mean,
                    measured.top1_agreement.mean,
                    size,
                    _decode_speed(loaded),
                )
            )
            if not sample:
                coverage = str(result.coverage)
                sample = continue_text(loaded, PROMPT, max_new_tokens=_NEW_TOKENS).text
        if progress is not None:
            progress(done, len(SCHEMES), scheme)
    parameters = sum(p.numel() for p in opened.model.parameters())
    return DemoReport(
        parameters, text.ids.numel(), torch.get_num_threads(), float_perplexity, tuple(rows), coverage, PROMPT, sample
    )


def _decode_speed(opened: OpenedModel) -> float:
    """Tokens per second of greedy decoding, the median of a few runs."""
    continue_text(opened, PROMPT, max_new_tokens=4)  # warm
    runs = [continue_text(opened, PROMPT, max_new_tokens=_NEW_TOKENS) for _ in range(_SPEED_RUNS)]
    return statistics.median(run.tok_per_s for run in runs)
