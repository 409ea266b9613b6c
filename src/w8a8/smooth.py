"""Smoothing: move the difficulty of activations into weights, group by group, and keep the function.

    1. one forward of a probe shows the groups: a source and all that reads it      w8a8.dataflow
    2. one pass over the calibration data: extremes, a sample of tokens, ranges     w8a8.calibrate
    3. for each group in the order of the forward: the alpha of least error         w8a8.alpha
       its fold into the weights                                                    w8a8.fold
       the output of its block compared with what it was; beyond the bound, undone  w8a8.gate
    4. the whole model's output compared

One pass is enough: a fold changes the tensor it is made for, by a factor that is known, and no other group's.  The
weights of a group are read when it is its turn, after the folds before it.

Where a fold fails its gate it is undone and the rest goes on.  Where the whole model fails at the end, everything
is undone and that is an error: each block kept its function and the model did not, so no single fold is to blame,
and quantising on without smoothing would hide it.

The price of putting back the very same bits is a copy of every folded parameter until the work is done: about the
size of the linear layers.  Samples are bounded: `rows` tokens for each group.
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from w8a8 import convert
from w8a8.alpha import GRID, CallRanges, Choice, Product, Sample, check_alpha, search, smooth_scales
from w8a8.calibrate import Calibration, collect
from w8a8.convert import Progress
from w8a8.dataflow import Group, Refusal, observe
from w8a8.errors import ModelError, NonFiniteError
from w8a8.fold import Undo, fold_
from w8a8.gate import Gate
from w8a8.linear import float_operands
from w8a8.model_inputs import ModelInputs, check_inputs
from w8a8.observers import MinMax
from w8a8.reservoir import Reservoir
from w8a8.scheme import PerChannel, PerColumn, PerTensor, Scheme

__all__ = ["GroupReport", "SmoothReport", "fold_", "smooth_", "smooth_scales", "smooth_undoable"]

_Reporter: TypeAlias = "Callable[[Choice | None, float | None, str | None], GroupReport]"

Alpha: TypeAlias = float | Literal["auto"]

ROWS = 512
"""Tokens in the sample of a group."""

PROBE_TOKENS = 128
"""Tokens in the probe that the gate runs, where it is token ids."""


@dataclass(frozen=True)
class GroupReport:
    """What became of one source.

    source: The module that makes the tensor.
    readers: The modules that read it.
    alpha: How far it was smoothed; None: not at all.
    error_before, error_after: Relative output errors of its quantised linears under the scheme on the sample, summed
        (see `w8a8.alpha`); None where they were not measured.
    change: The relative change of the block's float output, as the gate saw it; None where nothing was folded.
    reason: Why it was not smoothed; None where it was.
    """

    source: str
    readers: tuple[str, ...]
    alpha: float | None
    error_before: float | None
    error_after: float | None
    change: float | None
    reason: str | None


@dataclass(frozen=True)
class SmoothReport:
    """What smoothing did to a model.

    scheme: The name of the scheme it was meant for.
    alpha: As asked: a number, or "auto".
    calibration: What was calibrated on.
    groups: Every group, in the order of the forward.
    refused: Sources that cannot be folded, each with its reason.
    change: The relative change of the model's float output on the probe.
    bound: What it may have been.
    """

    scheme: str
    alpha: Alpha
    calibration: str
    groups: tuple[GroupReport, ...]
    refused: tuple[GroupReport, ...]
    change: float
    bound: float

    @property
    def smoothed(self) -> tuple[GroupReport, ...]:
        """The groups that were folded."""
        return tuple(group for group in self.groups if group.reason is None)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    def __str__(self) -> str:
        lines = [
            f"Smoothed {len(self.smoothed)} of {len(self.groups)} groups for {self.scheme}, alpha {self.alpha}, on "
            f"{self.calibration}; the float output changed by {self.change:.1e} (relative, bound {self.bound:.1e}).",
        ]
        if self.groups:
            lines.append(f"{'alpha':>6} {'error was':>10} {'is':>9} {'change':>9}  source -> readers")
        for g in self.groups:
            alpha = "none" if g.alpha is None else f"{g.alpha:.2f}"
            why = "" if g.reason is None else f": {g.reason}"
            lines.append(
                f"{alpha:>6} {_figure(g.error_before):>10} {_figure(g.error_after):>9} {_figure(g.change):>9}  "
                f"{g.source} -> {_short(g.readers, g.source)}{why}"
            )
        read = [g for g in self.refused if g.readers]
        lines += [f"  cannot be folded: {g.source} -> {_short(g.readers, g.source)}: {g.reason}" for g in read]
        if len(self.refused) > len(read):
            lines.append(
                f"  {len(self.refused) - len(read)} more sources have no linear to be folded into: "
                "`w8a8 inspect MODEL --pairs` has the reasons"
            )
        return "\n".join(lines)


def smooth_(
    model: nn.Module,
    calibration: Any,
    *,
    alpha: Alpha = "auto",
    scheme: Scheme | str = "w8a8",
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
        alpha: 0..1 for all groups, or "auto": for each the best of `w8a8.alpha.GRID`, or none.
        scheme: What the model will be quantised to.
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
    return smooth_undoable(
        model,
        Calibration.of(calibration),
        alpha=alpha,
        scheme=Scheme.of(scheme),
        selection=convert.select(model, include, exclude),
        rows=rows,
        seed=seed,
        progress=progress,
    )[0]


def smooth_undoable(
    model: nn.Module,
    calibration: Calibration,
    *,
    alpha: Alpha,
    scheme: Scheme,
    selection: convert.Selection,
    rows: int = ROWS,
    seed: int = 0,
    progress: Progress | None = None,
) -> tuple[SmoothReport, Undo]:
    """`smooth_`, and what takes it back: for a caller that has more to do, and may fail."""
    if alpha != "auto":
        check_alpha(alpha)
    chosen = frozenset(selection.chosen)
    inputs = calibration.first(model)
    check_inputs(model, inputs)
    flow = observe(model, _as_mapping(model, inputs))
    work = [_Work(model, group, chosen, scheme) for group in flow.groups]
    wanted = {name for w in work for name in w.sampled}
    statistics = {
        name: (MinMax(PerChannel()), Reservoir(rows, seed=seed), CallRanges(seed=seed)) for name in sorted(wanted)
    }
    collect(model, calibration, statistics, progress=progress)
    samples = {name: _sample(*found) for name, found in statistics.items() if found[0].tokens}
    del statistics
    gate = Gate(model, flow.groups, _cut(inputs))
    originals: dict[int, tuple[nn.Parameter, Tensor]] = {}
    reports = []
    try:
        for done, w in enumerate(work, start=1):
            reports.append(_smooth_group(w, samples, gate, alpha, originals))
            if progress is not None:
                progress(done, len(work), w.group.source.module)
        change, bound = gate.whole_change(), gate.whole_bound()
        if change > bound:
            raise ModelError(
                f"smoothing changed the float output of {type(model).__name__} by {change:.2e} (relative norm on the "
                f"probe), over {bound:.2e}, though every block kept its own output within its bound; all weights are "
                "as they were: use smooth='none', or a model in float32"
            )
    except BaseException:
        _undo(originals)()
        raise
    refused = tuple(_refused(refusal) for refusal in flow.refused)
    report = SmoothReport(scheme.name, alpha, calibration.description, tuple(reports), refused, change, bound)
    return report, _undo(originals)


class _Work:
    """A group, and which of its linears count."""

    def __init__(self, model: nn.Module, group: Group, chosen: frozenset[str], scheme: Scheme) -> None:
        self.model = model
        self.group = group
        self.scheme = scheme
        self.readers = [r for r in group.readers if r.module in chosen and r.parameter == f"{r.module}.weight"]
        self.source_counts = _source_counts(model, group, chosen, scheme)
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
            found.append(Product(samples[source.module], weight, torch.arange(source.channels), reads=False))
        return found


def _source_counts(model: nn.Module, group: Group, chosen: frozenset[str], scheme: Scheme) -> bool:
    """Whether the source's own quantisation is changed by a fold: its rows share scales."""
    source = group.source
    shared = isinstance(scheme.weights.granularity, PerTensor | PerColumn)
    if source.kind != "linear" or source.module not in chosen or not shared:
        return False
    weight, _ = float_operands(model.get_submodule(source.module))
    return weight.shape[0] == source.channels


def _smooth_group(
    work: _Work, samples: dict[str, Sample], gate: Gate, alpha: Alpha, originals: dict[int, tuple[nn.Parameter, Tensor]]
) -> GroupReport:
    """Search, fold, compare, and undo where the function changed."""
    group = work.group

    def report(choice: Choice | None, change: float | None, reason: str | None) -> GroupReport:
        kept = None if choice is None or reason is not None else choice.alpha
        before = None if choice is None else choice.error_before
        after = before if choice is None or reason is not None else choice.error_after
        readers = tuple(dict.fromkeys(reader.module for reader in group.readers))
        return GroupReport(group.source.module, readers, kept, before, after, change, reason)

    if not work.readers:
        return report(None, None, "nothing that reads it will be quantised")
    unseen = sorted(work.sampled - set(samples))
    if unseen:
        return report(None, None, f"{unseen[0]} read no token of the calibration data")
    reason = gate.why_not(group)
    if reason is not None:
        return report(None, None, reason)
    choice = search(
        work.products(samples),
        group.source.channels,
        work.scheme,
        GRID if alpha == "auto" else (alpha,),
        forced=alpha != "auto",
    )
    if choice.scales is None:
        return report(choice, None, "no alpha has a smaller error than none")
    return _fold_checked(work, choice, gate, originals, report)


def _fold_checked(
    work: _Work, choice: Choice, gate: Gate, originals: dict[int, tuple[nn.Parameter, Tensor]], report: _Reporter
) -> GroupReport:
    group = work.group
    assert choice.scales is not None, "there is something to fold"
    unrounded = gate.unrounded_change(group, choice.scales)
    if unrounded is not None and unrounded > gate.tolerance:
        return report(choice, unrounded, _broken(unrounded, gate.tolerance, "before any rounding"))
    try:
        undo = fold_(work.model, group, choice.scales)
    except NonFiniteError as error:
        return report(choice, None, str(error))
    kept = False
    try:
        change, bound = gate.change(group), gate.bound(group)
        kept = change <= bound
    finally:
        if not kept:
            undo()
    if not kept:
        return report(choice, change, _broken(change, bound, "in its weights' dtype"))
    for parameter, copy in undo.saved:
        originals.setdefault(id(parameter), (parameter, copy))
    return report(choice, change, None)


def _broken(change: float, bound: float, where: str) -> str:
    return (
        f"the fold changed the block's float output by {change:.2e} (relative norm, {where}), over {bound:.2e}, and "
        "was undone: something else reads the tensor, or it is not what it was taken for"
    )


def _undo(originals: dict[int, tuple[nn.Parameter, Tensor]]) -> Undo:
    return Undo(tuple(originals.values()))


def _refused(refusal: Refusal) -> GroupReport:
    return GroupReport(refusal.source.module, refusal.readers, None, None, None, None, refusal.reason)


def _sample(extremes: MinMax, tokens: Reservoir, calls: CallRanges) -> Sample:
    seen = extremes.seen()
    low, high = calls.range
    return Sample(tokens.rows.to(torch.float32), seen.lo, seen.hi, low, high)


def _as_mapping(model: nn.Module, inputs: ModelInputs) -> Any:
    """Inputs as `observe` takes them."""
    if isinstance(inputs, tuple):
        return inspect.signature(model.forward).bind(*inputs).arguments
    return inputs


def _cut(inputs: ModelInputs) -> ModelInputs:
    """A probe of one sequence and few tokens, where the inputs are token ids alone."""
    if isinstance(inputs, dict) and set(inputs) <= {"input_ids", "attention_mask"}:
        return {key: value[:1, :PROBE_TOKENS] for key, value in inputs.items()}
    return inputs


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.2e}"


def _short(readers: Sequence[str], source: str) -> str:
    """Readers without the path they share with the source."""
    shared = source.rpartition(".")[0]
    names = [name[len(shared) + 1 :] if shared and name.startswith(shared + ".") else name for name in readers]
    return ", ".join(names[:4]) + (f", ... ({len(names)})" if len(names) > 4 else "")
