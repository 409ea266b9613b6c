"""The groups of a model, smoothed in one way and then perhaps in another.

A group is searched, folded, and compared with what its block gave before, together with the other groups of its block;
where that fails all are undone and made again one by one.  Whatever was folded can be put back to the bit.
"""

import inspect
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from w8a8.calibration.calibrate import collect
from w8a8.calibration.data import Calibration
from w8a8.calibration.sampling import ROWS, Sample, Sampler
from w8a8.core.progress import Progress, tell
from w8a8.core.scheme import PerColumn, PerTensor, Scheme
from w8a8.dataflow.groups import Dataflow, Group
from w8a8.dataflow.observing import observe
from w8a8.errors import NonFiniteError
from w8a8.layers.linear import float_operands
from w8a8.model.inputs import ModelInputs, check_inputs, copied
from w8a8.records.smoothing import GroupReport
from w8a8.smoothing.alpha import Choice, Product, search
from w8a8.smoothing.fold import Undo, fold_
from w8a8.smoothing.gate import TOLERANCE, Gate, Unrounded
from w8a8.smoothing.way import Smoothing

PROBE_TOKENS = 128
"""Tokens in the probe that the gate runs, where it is token ids."""


class Smoother:
    """The groups of a model and what they read of the calibration, to smooth them in one way and then in another.

    Args:
        model: Float.  Run; changed by `smooth` alone.
        probe: What it is called with to be compared.
        sampled: Called once with names of modules in it, for what they read.
        schemes: Of each layer that will be quantised.  A group is smoothed for the scheme that most of its readers
            have.
        readers: Modules; only the groups that one of them reads are sampled and smoothed.  All of them by default.

    Attributes:
        flow: Every group of the model, and what cannot be folded.
        groups: Those that are smoothed.
        reports: What became of each in the last `smooth`.
        gate: Holds the outputs that blocks had at first.
    """

    def __init__(
        self,
        model: nn.Module,
        flow: Dataflow,
        probe: ModelInputs,
        sampled: Callable[[Sequence[str]], dict[str, Sample]],
        schemes: Mapping[str, Scheme],
        *,
        readers: Collection[str] | None = None,
        progress: Progress | None = None,
    ) -> None:
        self.model = model
        self.flow = flow
        self.groups = [
            group
            for group in flow.groups
            if readers is None or any(reader.module in readers for reader in group.readers)
        ]
        self._work = [_Work(model, group, schemes) for group in self.groups]
        self._samples = sampled(sorted({name for work in self._work for name in work.sampled}))
        self.gate = Gate(model, self.groups, probe)
        self._progress = progress
        self.reports: list[GroupReport] = []
        self._originals: dict[int, tuple[nn.Parameter, Tensor]] = {}

    @classmethod
    def of(
        cls,
        model: nn.Module,
        calibration: Calibration,
        schemes: Mapping[str, Scheme],
        *,
        readers: Collection[str] | None = None,
        rows: int = ROWS,
        seed: int = 0,
        progress: Progress | None = None,
    ) -> "Smoother":
        """Observe a model and sample what its groups read."""
        inputs = calibration.first(model)
        check_inputs(model, inputs)
        probe = cut(inputs)

        def sampled(names: Sequence[str]) -> dict[str, Sample]:
            return samples(model, calibration, names, rows=rows, seed=seed, progress=progress)

        flow = observed(model, probe, lambda: inputs)
        return cls(model, flow, probe, sampled, schemes, readers=readers, progress=progress)

    @property
    def helped(self) -> set[str]:
        """The quantised layers whose operands a fold scales, where the group can be folded at all."""
        return {
            name
            for work in self._work
            if self.gate.why_not(work.group) is None
            for name in ([reader.module for reader in work.readers] + [work.group.source.module] * work.source_counts)
        }

    def smooth(self, way: Smoothing, groups: Sequence[Group] | None = None) -> None:
        """Undo what was smoothed, then smooth every group.

        Args:
            way: With one alpha, the best of each group's own, or none, which measures the error.
            groups: Some of `groups`; all of them by default.

        What stops it, an interrupt too, leaves some groups folded: call `undo` then.
        """
        self.undo()
        chosen = [each for each in self._work if groups is None or any(each.group is group for group in groups)]
        together: dict[str, list[_Work]] = {}
        for work in chosen:
            together.setdefault(self.gate.block(work.group), []).append(work)
        told: dict[int, GroupReport] = {}
        for works in together.values():
            for work, report in zip(works, self._smooth_together(works, way), strict=True):
                told[id(work)] = report
                tell(self._progress, len(told), len(chosen), work.group.source.module)
        self.reports = [told[id(work)] for work in chosen]

    def _smooth_together(self, works: Sequence["_Work"], way: Smoothing) -> list[GroupReport]:
        """The groups of one block, which are compared together; where that fails, each alone."""
        trial = _Trial(self.gate, self._originals)
        reports = [_smooth_group(work, self._samples, trial, way) for work in works]
        trial.compare()
        if trial.failure is not None:
            trial.undo()
            if len(trial.folded) > 1:
                return [report for work in works for report in self._smooth_together([work], way)]
        return [trial.told(work.group, report) for work, report in zip(works, reports, strict=True)]

    def undo(self) -> None:
        """Put all weights back as they were, to the bit."""
        self.as_undo()()
        self.reports = []

    def as_undo(self) -> Undo:
        """What `undo` does to the weights, for later."""
        return Undo(tuple(self._originals.values()))


def observed(model: nn.Module, probe: ModelInputs, inputs: Callable[[], ModelInputs]) -> Dataflow:
    """The groups as a probe shows them, or all inputs where it does not reach every matrix."""
    flow = observe(model, _as_mapping(model, probe))
    if not flow.missed:
        return flow
    more = inputs()
    return flow if more is probe else observe(model, _as_mapping(model, more))


def samples(
    model: nn.Module,
    calibration: Calibration,
    names: Sequence[str],
    *,
    rows: int = ROWS,
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, Sample]:
    """What the named modules read in one pass over the data; a module that read nothing is left out."""
    samplers = {name: Sampler(rows, seed=seed) for name in names}
    collect(model, calibration, samplers, progress=progress)
    return {name: sampler.sample() for name, sampler in samplers.items() if sampler.tokens}


def _as_mapping(model: nn.Module, inputs: ModelInputs) -> Mapping[str, Any] | Tensor:
    """Inputs as `observe` takes them, which may write to their caches."""
    inputs = copied(inputs, lambda t: t)
    if isinstance(inputs, tuple):
        return inspect.signature(model.forward).bind(*inputs).arguments
    return inputs


def cut(inputs: ModelInputs) -> ModelInputs:
    """A probe of one sequence and few tokens, where the inputs are token ids alone."""
    if isinstance(inputs, dict) and set(inputs) <= {"input_ids", "attention_mask"}:
        return {key: value[:1, :PROBE_TOKENS] for key, value in inputs.items()}
    return inputs


class _Work:
    """A group, which of its linears count, and the scheme that most of them have; None where none counts."""

    def __init__(self, model: nn.Module, group: Group, schemes: Mapping[str, Scheme]) -> None:
        self.model = model
        self.group = group
        self.readers = [r for r in group.readers if r.module in schemes and r.parameter == f"{r.module}.weight"]
        counted = Counter(schemes[reader.module] for reader in self.readers).most_common(1)
        self.scheme = counted[0][0] if counted else None
        self.source_counts = _source_counts(model, group, schemes)
        self._of: dict[str, str] = {}  # readers of one channel map read one tensor: the first is asked for it
        for reader in self.readers:
            alike = (r for r in self.readers if torch.equal(r.channels, reader.channels))
            self._of[reader.module] = next(alike).module

    @property
    def sampled(self) -> set[str]:
        """The modules whose inputs are wanted."""
        return {*self._of.values(), *([self.group.source.module] if self.source_counts and self.readers else [])}

    def products(self, samples: dict[str, Sample]) -> list[Product]:
        """The matrices with their weights of now."""
        found = []
        for reader in self.readers:
            weight, _ = float_operands(self.model.get_submodule(reader.module))
            found.append(Product(samples[self._of[reader.module]], weight, reader.channels.cpu(), reads=True))
        if self.source_counts:
            source = self.group.source
            weight, _ = float_operands(self.model.get_submodule(source.module))
            every = torch.arange(source.channels, dtype=torch.int64, device="cpu")
            found.append(Product(samples[source.module], weight, every, reads=False))
        return found


def _source_counts(model: nn.Module, group: Group, schemes: Mapping[str, Scheme]) -> bool:
    """Whether the source's own quantisation is changed by a fold: its rows share scales."""
    source = group.source
    if source.kind != "linear" or source.module not in schemes:
        return False
    if not isinstance(schemes[source.module].weights.granularity, PerTensor | PerColumn):
        return False
    weight, _ = float_operands(model.get_submodule(source.module))
    return weight.shape[0] == source.channels


class _Trial:
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
        """Fold one more; `NonFiniteError` where it would leave the range of the weights' dtype, and is not made."""
        if not self.folded:
            self._unrounded = self.gate.unrounded(group)
        for parameter in map(
            model.get_parameter, group.parameters
        ):  # before the fold, so that no interrupt can come between
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
            self._compared(self._unrounded.change(), TOLERANCE, "before any rounding")
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


def _smooth_group(work: _Work, samples: dict[str, Sample], trial: _Trial, way: Smoothing) -> GroupReport:
    """Search and fold."""
    group = work.group

    def report(choice: Choice | None, reason: str | None) -> GroupReport:
        kept = None if choice is None or reason is not None else choice.alpha
        before = None if choice is None else choice.error_before
        after = before if choice is None or reason is not None else choice.error_after
        readers = tuple(dict.fromkeys(reader.module for reader in group.readers))
        return GroupReport(group.source.module, readers, kept, before, after, None, reason)

    if work.scheme is None:
        if any(work.model.get_parameter(reader.parameter).ndim == 3 for reader in group.readers):
            return report(None, "stacked experts read it, whose errors are not searched")
        return report(None, "nothing that reads it will be quantised")
    unseen = sorted(work.sampled - set(samples))
    if unseen:
        return report(None, f"{unseen[0]} read no token of the calibration data")
    reason = trial.gate.why_not(group)
    if reason is not None:
        return report(None, reason)
    choice = search(work.products(samples), group.source.channels, work.scheme, way.alphas, forced=way.forced)
    if not way.alphas:
        return report(choice, "nothing is better for the quantised model as a whole than no smoothing")
    if choice.scales is None:
        return report(choice, "no alpha has a smaller error than none")
    try:
        trial.fold(work.model, group, choice.scales)
    except NonFiniteError as error:
        return report(choice, str(error))
    return report(choice, None)
