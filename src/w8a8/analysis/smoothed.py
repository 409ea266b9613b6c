"""A smoothing group of a float model, smoothed and quantised for a trial, in a model that keeps its weights.

Whether a layer can be smoothed, how far, and with whom is decided as by `w8a8.smooth_(alpha="searched")`: the groups of
`dataflow`, the alpha of least error, the gate.  What the fold made of the group's parameters is kept beside what they
were, and is in the model only within `SmoothedGroup.folded`.  So a trial has the very numbers that smoothing this group
and quantising would give, readers that stay float and norms included.

Modules that divide their input by s, swapped in over an unfolded source, were the alternative: equal but for roundings,
without a copy of the parameters, and blind to what a fold does to a source that is quantised itself.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from w8a8.analysis.sample import layers_for
from w8a8.calibration.data import Calibration
from w8a8.calibration.observers import Observer
from w8a8.core.scheme import Scheme
from w8a8.dataflow.groups import Dataflow, Group
from w8a8.layers.linear import QuantLinear
from w8a8.smoothing.fold import Undo
from w8a8.smoothing.smoother import Smoother
from w8a8.smoothing.way import SEARCHED


@dataclass(frozen=True)
class SmoothedGroup:
    """One group.

    readers: The modules that read the tensor.
    alpha: How far it was smoothed.
    layers: Its quantised layers, the source too where it is one, made from the folded weights.
    changed: Every module whose weights the fold changes.
    """

    readers: tuple[str, ...]
    alpha: float
    layers: dict[str, QuantLinear]
    changed: tuple[str, ...]
    _fold: Undo
    _undo: Undo

    @contextlib.contextmanager
    def folded(self) -> Iterator[None]:
        """The model's float parameters of this group smoothed, for the length of a `with` block."""
        try:
            self._fold()
            yield
        finally:
            self._undo()


def smoothed_groups(
    model: nn.Module,
    names: Sequence[str],
    schemes: Mapping[str, Scheme],
    calibration: Calibration,
    observer: str | Callable[[], Observer] = "absmax",
) -> tuple[dict[str, SmoothedGroup], dict[str, str]]:
    """Smooth the group that each of some layers reads with, each alone.

    Args:
        model: Float.  Not modified: every fold is undone to the bit, whatever happens.
        names: The layers, of those in `schemes`.

    Returns:
        The smoothed group of each layer, one object for those of one group; and for the others why there is none.
    """
    smoother = Smoother.of(model, calibration, schemes, readers=names)
    found: dict[str, SmoothedGroup] = {}
    reasons = {name: _reason(smoother.flow, name) for name in names}
    for group in smoother.groups:
        readers = tuple(dict.fromkeys(reader.module for reader in group.readers))
        try:
            smoother.smooth(SEARCHED, [group])
            (report,) = smoother.reports
            if report.reason is not None or report.alpha is None:
                reasons |= {name: str(report.reason) for name in names if name in readers}
                continue
            undo = smoother.as_undo()
            changed = _owners(group)
            part = {name: scheme for name, scheme in schemes.items() if name in changed}
            smoothed = SmoothedGroup(
                readers,
                report.alpha,
                layers_for(model, part, calibration, observer),
                changed,
                Undo(tuple((parameter, parameter.detach().clone()) for parameter, _ in undo.saved)),
                undo,
            )
        finally:
            smoother.undo()
        found |= dict.fromkeys((name for name in names if name in readers), smoothed)
    return found, {name: reason for name, reason in reasons.items() if name not in found}


def _owners(group: Group) -> tuple[str, ...]:
    """The modules of the parameters that a fold changes."""
    parameters = [part.name for part in group.source.parameters] + [reader.parameter for reader in group.readers]
    return tuple(dict.fromkeys(name.rpartition(".")[0] for name in parameters))


def _reason(flow: Dataflow, name: str) -> str:
    """Why no group has this layer among its readers."""
    refusal = next((refusal for refusal in flow.refused if name in refusal.readers), None)
    if refusal is not None:
        return f"{refusal.source.module} cannot be folded: {refusal.reason}"
    if name in flow.unread:
        return "the forward that was observed did not reach it"
    return "what it reads is made by no norm and no linear layer whose channels could be divided"
