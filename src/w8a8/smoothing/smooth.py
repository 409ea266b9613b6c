"""Smoothing: move the difficulty of activations into weights, group by group, and keep the function.

    1. one forward of a probe shows the groups: a source and all that reads it      `dataflow`
    2. one pass over the calibration data: extremes, a sample of tokens, ranges     `calibrate`
    3. for each group in the order of the forward: the alpha of least error         `alpha`
       its fold into the weights                                                    `fold`
       and for each block, when its groups are folded: its output compared with what
       it was; beyond the bound all are undone, and made again one by one           `gate`
    4. the same with one alpha for all groups, and without; the best is kept        `contest`
    5. the whole model's float output compared with what it was

One pass is enough: a fold changes the tensor it is made for, by a factor that is known, and no other group's.  The
weights of a group are read when it is its turn, after the folds before it.

Where a fold alone fails its gate it is undone and the rest goes on.  Where the whole model fails at the end, everything
is undone and that is an error: each block kept its function and the model did not, so no single fold is to blame,
and quantising on without smoothing would hide it.

The price of putting back the very same bits is a copy of every folded parameter until the work is done: about the
size of the linear layers.  Samples are bounded: `rows` tokens for each group.
"""

from collections.abc import Callable, Sequence

from torch import nn

from w8a8.calibration.data import Calibration
from w8a8.calibration.sampling import ROWS
from w8a8.core.progress import Progress
from w8a8.core.scheme import AUTO as USUAL
from w8a8.core.scheme import Scheme
from w8a8.errors import ModelError
from w8a8.model.selection import select, usual_of
from w8a8.records.smoothing import GroupReport, Score, SmoothReport
from w8a8.smoothing.alpha import check_alpha, smooth_scales
from w8a8.smoothing.contest import CANDIDATES, GAIN, SPARED, Contest, winner
from w8a8.smoothing.fold import Undo, fold_
from w8a8.smoothing.smoother import Smoother
from w8a8.smoothing.way import AUTO, NONE, SEARCHED, Smoothing

__all__ = ["GroupReport", "SmoothReport", "fold_", "smooth_", "smooth_scales", "smooth_undoable"]


def smooth_(
    model: nn.Module,
    calibration: object,
    *,
    alpha: float | str = "auto",
    scheme: Scheme | str = USUAL,
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
    rows: int = ROWS,
    seed: int = 0,
    progress: Progress | None = None,
) -> SmoothReport:
    """Smooth the float weights of a model in place, for a scheme to come; its function stays.

    Args:
        model: A float model; changed only if everything succeeds.  An exception of any kind, an interrupt too, leaves
            every parameter with the bits it had.
        calibration: A `Calibration`, or what `Calibration.of` makes one from without a tokenizer.
        alpha: 0..1 for all groups; "searched": for each the best of `alpha.GRID`, or none; "auto": what is best
            for the quantised model as a whole of searched, some alphas for all, and none, see `contest`.
        scheme: What the model will be quantised to; "auto" is what is usual for it.
        include, exclude: As `w8a8.quantize` will be told: errors are those of layers that will be quantised.  Others
            that read the same tensor, a router or the head, are folded along.
        rows: Tokens in the sample of each group.
        seed: Of the sample.
        progress: Called as progress(done, total, name).

    Returns:
        What was done to each group, and why not to others.

    Raises:
        SchemeError: unknown scheme, alpha out of range, nothing to quantise.
        CalibrationError: the data cannot be used.
        PatternError: a pattern matches no linear layer.
        NonFiniteError: an activation or a weight is not finite.
        ModelError: the folds together change the model's output by more than the bound.
    """
    if alpha not in (AUTO.told, SEARCHED.told):
        check_alpha(alpha)
    data, way = Calibration.of(calibration), Smoothing.of(alpha)
    scheme = Scheme.of(usual_of(model) if scheme == USUAL else scheme)
    chosen = select(model, include, exclude).chosen
    return smooth_undoable(model, data, way, scheme, chosen, rows, seed, progress)[0]


def smooth_undoable(
    model: nn.Module,
    calibration: Calibration,
    way: Smoothing,
    scheme: Scheme,
    chosen: Sequence[str],
    rows: int = ROWS,
    seed: int = 0,
    progress: Progress | None = None,
) -> tuple[SmoothReport, Undo]:
    """`smooth_`, and what takes it back: for a caller that has more to do, and may fail."""
    schemes = dict.fromkeys(chosen, scheme)
    smoother = Smoother.of(model, calibration, schemes, rows=rows, seed=seed, progress=progress)
    return smooth_observed(
        smoother, way, scheme, calibration.description, lambda: Contest(model, calibration, scheme, chosen)
    )


def smooth_observed(
    smoother: Smoother, way: Smoothing, scheme: Scheme, description: str, contest: Callable[[], Contest] | None = None
) -> tuple[SmoothReport, Undo]:
    """Smooth what was observed: a model, or a block of one as if it were all; changed in place if everything succeeds.

    Args:
        way: `AUTO` needs a `contest`.
        contest: Made after the sampling.

    Returns, Raises:
        As `smooth_`, and what takes it back.
    """
    gate = smoother.gate
    scores: dict[str, Score] = {}
    kept = None
    try:
        if way == AUTO:
            assert contest is not None, "'auto' is decided by a contest"
            scores, kept = _best(smoother, contest())
        else:
            smoother.smooth(way)
        change, bound = gate.whole_change(), gate.whole_bound()
        if change > bound:
            raise ModelError(
                f"smoothing changed the float output of {type(smoother.model).__name__} by {change:.2e} (relative norm "
                f"on the probe), over {bound:.2e}, though every block kept its own output within its bound; all "
                "weights are as they were: use smooth='none', or a model in float32"
            )
    except BaseException:
        smoother.undo()
        raise
    refused = tuple(
        GroupReport(each.source.module, each.readers, None, None, None, None, each.reason)
        for each in smoother.flow.refused
    )
    groups = tuple(smoother.reports)
    report = SmoothReport(scheme.name, way.told, description, groups, refused, change, bound, scores, kept)
    return report, smoother.as_undo()


def _best(smoother: Smoother, contest: Contest) -> tuple[dict[str, Score], str]:
    """Smooth in the way that wins, and tell all scores and which it was."""
    ways = {str(way.told): way for way in (NONE, *map(Smoothing.of, CANDIDATES), SEARCHED)}
    name = str(NONE.told)
    smoother.smooth(NONE)
    scores = {name: contest.score()}
    helped = smoother.helped
    if contest.asks_first(helped):
        scores[SPARED] = contest.score(spared=helped) if helped else scores[name]
        if scores[SPARED].distance > GAIN * scores[name].distance:
            return scores, name
    seen = {_folded(smoother): scores[name]}
    for name in list(ways)[1:]:
        smoother.smooth(ways[name])
        folded = _folded(smoother)
        if folded not in seen:
            seen[folded] = contest.score()
        scores[name] = seen[folded]
    best = winner({name: scores[name] for name in ways})
    if best != name:
        smoother.smooth(ways[best])
    return scores, best


def _folded(smoother: Smoother) -> tuple[float | None, ...]:
    """How far each group is smoothed at the moment."""
    return tuple(report.alpha for report in smoother.reports)
