"""Folds on trial: made in the model, compared together by the gate, and kept or undone to the bit."""

from dataclasses import replace

from torch import Tensor, nn

from w8a8.dataflow.groups import Group
from w8a8.smoothing.fold import Undo, fold_, touched
from w8a8.smoothing.gate import Gate, Unrounded
from w8a8.smoothing.report import GroupReport


class Trial:
    """Folds of groups of one block, to be compared together.

    folded: The groups.
    failure: Once compared: why they are wrong; None where the block's function is what it was.
    """

    def __init__(self, gate: Gate, originals: dict[int, tuple[nn.Parameter, Tensor]]) -> None:
        self.gate = gate
        self.folded: list[Group] = []
        self.failure: str | None = None
        self._originals = originals
        self._saved: dict[int, tuple[nn.Parameter, Tensor]] = {}
        self._unrounded: Unrounded | None = None
        self._change: float | None = None

    def fold(self, model: nn.Module, group: Group, scales: Tensor) -> None:
        """Fold one more.

        Raises:
            NonFiniteError: it leaves the range of the weights' dtype; it is not made.
        """
        if not self.folded:
            self._unrounded = self.gate.unrounded(group)
        for parameter in touched(model, group):  # before the fold, so that no interrupt can come between
            if id(parameter) not in self._saved:
                self._saved[id(parameter)] = (parameter, parameter.detach().clone())
            self._originals.setdefault(id(parameter), self._saved[id(parameter)])
        fold_(model, group, scales)
        self.folded.append(group)
        if self._unrounded is not None:
            self._unrounded.fold(group, scales)

    def compare(self) -> None:
        """Have the gate look at what the folds make together."""
        if not self.folded:
            return
        if self._unrounded is not None:
            self._compared(self._unrounded.change(), self.gate.tolerance, "before any rounding")
        if self.failure is None:
            one = self.folded[0]
            self._compared(self.gate.change(one), self.gate.bound(one), "in its weights' dtype")

    def _compared(self, change: float, bound: float, where: str) -> None:
        self._change = change
        if change > bound:
            self.failure = (
                f"the fold changed the block's float output by {change:.2e} (relative norm, {where}), over "
                f"{bound:.2e}, and was undone: something else reads the tensor, or it is not what it was taken for"
            )

    def told(self, group: Group, report: GroupReport) -> GroupReport:
        """The report of a group with what the gate saw of it."""
        if not any(group is folded for folded in self.folded):
            return report
        if self.failure is None:
            return replace(report, change=self._change)
        after = report.error_before
        return replace(report, alpha=None, error_after=after, change=self._change, reason=self.failure)

    def undo(self) -> None:
        """The weights as they were before these folds."""
        Undo(tuple(self._saved.values()))()
