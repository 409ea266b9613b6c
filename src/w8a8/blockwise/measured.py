"""What is measured on one block while it is in memory: how to smooth it, and the grids of what its layers read."""

from collections.abc import Callable, Sequence

from torch import Tensor

from w8a8.blockwise.blocks import BlockWalk
from w8a8.blockwise.request import Request
from w8a8.calibration.calibrate import static_grids
from w8a8.calibration.data import Calibration
from w8a8.calibration.sampling import Sample
from w8a8.core.affine import QParams
from w8a8.report.smoothed import SmoothReport
from w8a8.smoothing.smooth import smooth_observed
from w8a8.smoothing.smoother import cut, observed, samples
from w8a8.smoothing.way import NONE


def smooth_block(
    walk: BlockWalk,
    number: int,
    request: Request,
    chosen: Sequence[str],
    data: Calibration,
    enters: Callable[[int], Tensor] | None,
) -> SmoothReport:
    """Smooth a block as if it were all.

    It is called alone, with what the model calls it with on some tokens of the first batch: to see its groups, and to
    compare.  The samples come from the calls of the model, as in calibration of the whole.

    Args:
        walk: With the block's parameters loaded, which are changed.
        number: Of the block.
        request: What is asked; something about smoothing.
        chosen: The linears that will be quantised, by their names in the model.
        data: All batches, as the block sees them.
        enters: What enters there, by the number of the batch; None before the first block.

    Returns:
        By names within the block.
    """
    assert request.smoothing != NONE, "smoothing was asked for"
    block, prefix = walk.blocks[number], walk.prefix(number)
    first = None if enters is None else enters(0)
    inputs = request.calibration.batches[0]
    probe = walk.arguments(number, cut(inputs), first)

    def sampled(names: Sequence[str]) -> dict[str, Sample]:
        with walk.only(number, None):
            found = samples(walk.model, data, [prefix + name for name in names])
        return {name.removeprefix(prefix): sample for name, sample in found.items()}

    return smooth_observed(
        block,
        observed(block, probe, lambda: walk.arguments(number, inputs, first)),
        probe,
        sampled,
        way=request.smoothing,
        scheme=request.scheme,
        chosen=frozenset(name.removeprefix(prefix) for name in chosen),
        description=data.description,
    )[0]


def block_grids(walk: BlockWalk, names: Sequence[str], request: Request, data: Calibration) -> dict[str, QParams]:
    """The static grids of what these layers read, by their names in the model."""
    activations = request.scheme.activations
    assert activations is not None, "a static scheme has activations"
    return static_grids(walk.model, names, activations, data, request.observer)
