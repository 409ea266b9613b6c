"""What is measured on, and with: a seeded sample of windows of a text, and the quantised layers.

A sample is bounded, whatever the text: the price of a measurement is a multiple of its forward.  Windows do not
overlap, and each is one forward; what a model is asked about one is in `answers`.  The first so many tokens of a text
would need no seed, and would be of one document.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from w8a8.analysis.answers import Told, Window, told_of
from w8a8.calibration.calibrate import grids_of_schemes
from w8a8.calibration.data import Calibration
from w8a8.calibration.observers import Observer
from w8a8.core.scheme import MAX_CODE_BITS, Scheme
from w8a8.errors import CalibrationError, ModelError
from w8a8.evaluation.text import Text, windows_for
from w8a8.layers.linear import QuantLinear
from w8a8.model.kinds import Kind, context_length, kind_of_model
from w8a8.model.pretrained import Pretrained
from w8a8.model.swapping import build

WINDOWS = 8
SEQ_LEN = 256
ENCODED = 128
"""Tokens in a window of an encoder, where nothing is said, beside its special tokens."""


@dataclass(frozen=True)
class Sample:
    """Windows of a text, and how many tokens each has of it."""

    windows: tuple[Window, ...]
    seq_len: int

    @property
    def scored(self) -> int:
        """Things that are told: tokens that are predicted, or texts."""
        return sum(window.scored for window in self.windows)

    @property
    def told(self) -> Told:
        """What the model tells of each."""
        return self.windows[0].told

    def calibration(self) -> Calibration:
        """The same windows, to measure ranges on."""
        return Calibration([{"input_ids": window.inputs} for window in self.windows], f"{len(self.windows)} windows")


def draw(
    model: Pretrained, text: Text | Tensor, *, windows: int = WINDOWS, seq_len: int | None = None, seed: int = 0
) -> Sample:
    """A seeded sample of a text's windows, in the order of the text.

    Args:
        model: Of a kind that reads text.
        text: What `encode` makes of one, with the special tokens that an encoder reads around a window; of token ids
            (T,) alone it reads none.

    Raises:
        CalibrationError: `windows` is not positive.
        ModelError, TextError: as `w8a8.evaluation.perplexity`; as `told_of`.
    """
    if windows < 1:
        raise CalibrationError(f"windows={windows} is out of range: at least 1; {WINDOWS} is the default")
    ids, frame, vectors = (text.ids, text.frame, text.vectors) if isinstance(text, Text) else (text, None, None)
    kind = Kind.TEXT if vectors is not None else kind_of_model(model)
    if kind not in (Kind.MASKED, Kind.TEXT):
        frame = None
    elif kind is Kind.MASKED and frame is None:
        raise ModelError(
            f"{type(model).__name__} is a masked language model, which is asked about masked tokens, and the text "
            "comes with no mask: give what `encode` makes of it with the model's own tokenizer"
        )
    most = ENCODED if kind in (Kind.MASKED, Kind.TEXT) else SEQ_LEN
    room = context_length(model)
    if room is not None and frame is not None:
        room -= len(frame)
    length = min(room or most, most) if seq_len is None else seq_len
    cut = [(start, end) for start, _, end in windows_for(model, ids, length, None, frame=frame)]
    cut = [(start, end) for start, end in cut if end - start == length] or cut[:1]
    told = told_of(model, ids[slice(*cut[0])]) if vectors is None else Told.VECTOR
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(cut), generator=generator, dtype=torch.int64, device="cpu")[:windows]
    drawn = (cut[i] for i in sorted(order.tolist()))
    return Sample(tuple(Window.of(ids[start:end], start, told, frame, vectors) for start, end in drawn), length)


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


def _simulated(scheme: Scheme) -> bool:
    runs = scheme.integer_executable or (scheme.weight_only and scheme.weights.bits <= MAX_CODE_BITS)
    return not runs
