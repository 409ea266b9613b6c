"""What is measured on, and with: a seeded sample of windows of a text, and the quantised layers.

A sample is bounded, whatever the text: the price of a measurement is a multiple of its forward.  Windows do not
overlap, and each is one forward of batch 1, as in `w8a8.evaluation`.  The first so many tokens of a text would
need no seed, and would be of one document.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from w8a8.analysis.replay import Recording
from w8a8.calibration.calibrate import grids_of_schemes
from w8a8.calibration.data import Calibration
from w8a8.calibration.observers import Observer
from w8a8.core.scheme import MAX_CODE_BITS, Scheme
from w8a8.errors import CalibrationError
from w8a8.evaluation.scores import token_kl
from w8a8.evaluation.text import Text, windows_for
from w8a8.layers.linear import QuantLinear
from w8a8.model.kinds import context_length
from w8a8.model.swapping import build

WINDOWS = 8
SEQ_LEN = 256


@dataclass(frozen=True)
class Sample:
    """Windows of a text: where each starts, and its ids."""

    windows: tuple[tuple[int, Tensor], ...]
    seq_len: int

    @property
    def scored(self) -> int:
        """Tokens that are predicted: of each window all but the first."""
        return sum(len(ids) - 1 for _, ids in self.windows)

    def calibration(self) -> Calibration:
        """The same windows, to measure ranges on."""
        return Calibration([{"input_ids": ids[None]} for _, ids in self.windows], f"{len(self.windows)} windows")


def draw(
    model: nn.Module, text: Text | Tensor, *, windows: int = WINDOWS, seq_len: int | None = None, seed: int = 0
) -> Sample:
    """A seeded sample of a text's windows, in the order of the text.

    Raises:
        CalibrationError: `windows` is not positive.
        ModelError, TextError: as `w8a8.evaluation.perplexity`.
    """
    if windows < 1:
        raise CalibrationError(f"windows={windows} is out of range: at least 1; {WINDOWS} is the default")
    ids = text.ids if isinstance(text, Text) else text
    length = min(context_length(model) or SEQ_LEN, SEQ_LEN) if seq_len is None else seq_len
    cut = [(start, end) for start, _, end in windows_for(model, ids, length, None)]
    cut = [(start, end) for start, end in cut if end - start == length] or cut[:1]
    order = torch.randperm(len(cut), generator=torch.Generator().manual_seed(seed), dtype=torch.int64, device="cpu")[
        :windows
    ]
    return Sample(tuple((cut[i][0], ids[slice(*cut[i])]) for i in sorted(order.tolist())), length)


def layers_for(
    model: nn.Module,
    schemes: Mapping[str, Scheme],
    calibration: Calibration,
    observer: str | Callable[[], Observer] = "absmax",
) -> dict[str, QuantLinear]:
    """A model's layers in their schemes, by name: in integers where they can run so, else simulated."""
    grids = grids_of_schemes(model, schemes, calibration, observer)
    layers: dict[str, QuantLinear] = {}
    for simulated in (False, True):
        part = {name: scheme for name, scheme in schemes.items() if _simulated(scheme) is simulated}
        layers |= build(model, part, simulated=simulated, input_params=grids)
    return {name: layers[name] for name in schemes}


def divergence(exact: Recording, logits: Tensor) -> float:
    """The sum over the window's predicted tokens of KL(float || model), nats."""
    return float(token_kl(exact.logits[:-1], logits[:-1]).to(torch.float64).sum())


def _simulated(scheme: Scheme) -> bool:
    runs = scheme.integer_executable or (scheme.weight_only and scheme.weights.bits <= MAX_CODE_BITS)
    return not runs
