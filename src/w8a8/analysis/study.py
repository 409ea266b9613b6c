"""The notebook's experiment made real: every granularity, symmetry and width on a real model and text.

Each cell of the grid is a scheme.  All cells are simulated on the same windows of text, and two things are
measured: the perplexity, and the mean over the linear layers of the SQNR of the layer's output, where each
layer is fed with what it gets in the float model (the first window of the text).  SQNR separates cells that
the perplexity of a short text cannot.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from w8a8.core.affine import sqnr_db
from w8a8.core.progress import Progress, tell
from w8a8.core.scheme import Granularity, PerChannel, PerColumn, PerTensor, PerToken, QuantSpec, Scheme
from w8a8.errors import SchemeError
from w8a8.evaluation import Evaluation, perplexity
from w8a8.evaluation.scores import default_length
from w8a8.model.inputs import watched
from w8a8.model.kinds import Asked
from w8a8.model.pretrained import Pretrained
from w8a8.model.selection import select
from w8a8.model.swapping import build, swapped

ASKED = Asked("a study of perplexities")
_WEIGHTS: tuple[Granularity, ...] = (PerTensor(), PerChannel(), PerColumn())
_ACTIVATIONS: tuple[Granularity, ...] = (PerTensor(), PerToken(), PerChannel())


@dataclass(frozen=True)
class Cell:
    """One scheme of the grid and what it costs.

    executable: Whether integers can run it; `perplexity` is then the integer model's too, to the bit.
    """

    scheme: Scheme
    bits: int
    perplexity: float
    sqnr_db: float
    executable: bool


@dataclass(frozen=True)
class Study:
    """The grid, in the order of its making, and the float model beside it."""

    float_model: Evaluation
    cells: tuple[Cell, ...]

    @property
    def best_executable(self) -> Cell:
        """The cell of lowest perplexity among those that integers can run."""
        return min((c for c in self.cells if c.executable), key=lambda c: c.perplexity)


def grid(bits: Sequence[int] = (8, 6, 4)) -> Iterator[Scheme]:
    """Weights {tensor, channel, column} x {sym, asym} x activations {tensor, token, channel} x {sym, asym}, each width.

    Both operands have the same width.
    """
    for width, wg, ws, ag, asym in itertools.product(bits, _WEIGHTS, (True, False), _ACTIVATIONS, (True, False)):
        yield Scheme(QuantSpec(width, wg, ws), QuantSpec(width, ag, asym))


def study(
    model: Pretrained,
    ids: Tensor,
    *,
    seq_len: int | None = None,
    bits: Sequence[int] = (8, 6, 4),
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
    progress: Progress | None = None,
) -> Study:
    """Measure every cell of the grid.

    Args:
        model: A float causal language model; changed during the call and put back.
        ids: (T,) token ids of the text.
        seq_len: Tokens in a window; by default the model's context, at most 2048.
        bits: Widths, each 2..16; where none is at most 8, no cell is executable.
        include, exclude: As for `w8a8.quantize`.
        progress: Called after each cell.

    Raises:
        SchemeError: a width out of range, or no executable cell; and as `w8a8.quantize`.
        ModelError, TextError: as `w8a8.evaluation.perplexity`.
    """
    ASKED.check_model(model)
    schemes = list(grid(bits))
    if not any(scheme.integer_executable for scheme in schemes):
        raise SchemeError(f"bits={tuple(bits)} leaves no cell that integers can run; include a width of at most 8")
    chosen = select(model, include, exclude).chosen
    seq_len = seq_len or default_length(model)
    float_model = perplexity(model, ids, seq_len=seq_len)
    inputs = _layer_inputs(model, chosen, ids[:seq_len])
    cells = []
    for done, scheme in enumerate(schemes, start=1):
        layers = build(model, dict.fromkeys(chosen, scheme), simulated=True)
        with torch.inference_mode():
            sqnrs_db = [sqnr_db(model.get_submodule(name)(x), layers[name](x)) for name, x in inputs.items()]
        sqnr = sum(sqnrs_db) / len(sqnrs_db)
        with swapped(model, layers):
            measured = perplexity(model, ids, seq_len=seq_len)
        cells.append(Cell(scheme, scheme.weights.bits, measured.perplexity.mean, sqnr, scheme.integer_executable))
        tell(progress, done, len(schemes), str(scheme))
    return Study(float_model, tuple(cells))


def _layer_inputs(model: Pretrained, names: Sequence[str], ids: Tensor) -> dict[str, Tensor]:
    """What each layer is fed in one forward of the float model; nothing where that does not reach it."""
    inputs: dict[str, Tensor] = {}

    def keep(name: str, args: tuple[Tensor, ...], kwargs: object) -> None:
        inputs[name] = args[0].detach()

    with watched(model, names, keep, after=False), torch.inference_mode():
        model(input_ids=ids[None].to(model.device), use_cache=False)
    return inputs
