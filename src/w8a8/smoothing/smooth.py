"""Smoothing: move the difficulty of activations into weights, group by group, and keep the function.

    1. one forward of a probe shows the groups: a source and all that reads it      w8a8.dataflow
    2. one pass over the calibration data: extremes, a sample of tokens, ranges     w8a8.calibrate
    3. for each group in the order of the forward: the alpha of least error         w8a8.alpha
       its fold into the weights                                                    w8a8.fold
       and for each block, when its groups are folded: its output compared with what
       it was; beyond the bound all are undone, and made again one by one           w8a8.gate
    4. the same with one alpha for all groups, and without; the best is kept        w8a8.contest
    5. the whole model's float output compared with what it was

One pass is enough: a fold changes the tensor it is made for, by a factor that is known, and no other group's.  The
weights of a group are read when it is its turn, after the folds before it.

Where a fold alone fails its gate it is undone and the rest goes on.  Where the whole model fails at the end, everything
is undone and that is an error: each block kept its function and the model did not, so no single fold is to blame,
and quantising on without smoothing would hide it.

The price of putting back the very same bits is a copy of every folded parameter until the work is done: about the
size of the linear layers.  Samples are bounded: `rows` tokens for each group.
"""

import inspect
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from w8a8 import convert
from w8a8.calibration.calibrate import Calibration, collect
from w8a8.calibration.model_inputs import ModelInputs, check_inputs
from w8a8.calibration.sampling import ROWS, Sample, Sampler
from w8a8.convert import Progress
from w8a8.dataflow.groups import Dataflow, Group, Refusal, observe
from w8a8.errors import ModelError, NonFiniteError
from w8a8.linear import float_operands
from w8a8.scheme import PerColumn, PerTensor, Scheme
from w8a8.smoothing.alpha import GRID, Choice, Product, check_alpha, search, smooth_scales
from w8a8.smoothing.contest import CANDIDATES, Contest, Score, winner
from w8a8.smoothing.fold import Undo, fold_
from w8a8.smoothing.gate import Gate
from w8a8.smoothing.report import GroupReport, SmoothReport
from w8a8.smoothing.trial import Trial

__all__ = ["GroupReport", "SmoothReport", "fold_", "smooth_", "smooth_scales", "smooth_undoable"]

Alpha: TypeAlias = float | Literal["auto", "searched"]

PROBE_TOKENS = 128
"""Tokens in the probe that the gate runs, where it is token ids."""


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
        alpha: 0..1 for all groups; "searched": for each the best of `alpha.GRID`, or none; "auto": what is best
            for the quantised model as a whole of searched, some alphas for all, and none, see `contest`.
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
    if alpha not in ("auto", "searched"):
        check_alpha(alpha)
    inputs = calibration.first(model)
    check_inputs(model, inputs)
    probe = cut(inputs)

    def sampled(names: Sequence[str]) -> dict[str, Sample]:
        return samples(model, calibration, names, rows=rows, seed=seed, progress=progress)

    return smooth_observed(
        model,
        observed(model, probe, lambda: inputs),
        probe,
        sampled,
        alpha=alpha,
        scheme=scheme,
        chosen=frozenset(selection.chosen),
        description=calibration.description,
        contest=lambda: Contest(model, calibration, scheme, selection),
        progress=progress,
    )


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


def smooth_observed(
    model: nn.Module,
    flow: Dataflow,
    probe: ModelInputs,
    sampled: Callable[[Sequence[str]], dict[str, Sample]],
    *,
    alpha: Alpha,
    scheme: Scheme,
    chosen: frozenset[str],
    description: str,
    contest: Callable[[], Contest] | None = None,
    progress: Progress | None = None,
) -> tuple[SmoothReport, Undo]:
    """Smooth what was observed: a model, or a block of one as if it were all.

    Args:
        model: Changed in place if everything succeeds.
        flow: Its groups.
        probe: What it is called with to be compared.
        sampled: Called once with names of modules in it, for what they read.
        alpha: "auto" needs a `contest`.
        scheme, progress: As `smooth_`.
        chosen: The linears that will be quantised.
        description: Of the data.
        contest: Made after the sampling.

    Returns, Raises:
        As `smooth_`, and what takes it back.
    """
    work = [_Work(model, group, chosen, scheme) for group in flow.groups]
    seen = sampled(sorted({name for w in work for name in w.sampled}))
    run = _Run(model, work, seen, Gate(model, flow.groups, probe), progress)
    scores: dict[str, Score] = {}
    try:
        if alpha == "auto":
            assert contest is not None, "'auto' is decided by a contest"
            scores = _best(run, contest())
        else:
            run.smooth(alpha)
        change, bound = run.gate.whole_change(), run.gate.whole_bound()
        if change > bound:
            raise ModelError(
                f"smoothing changed the float output of {type(model).__name__} by {change:.2e} (relative norm on the "
                f"probe), over {bound:.2e}, though every block kept its own output within its bound; all weights are "
                "as they were: use smooth='none', or a model in float32"
            )
    except BaseException:
        run.undo()
        raise
    refused = tuple(_refused(refusal) for refusal in flow.refused)
    report = SmoothReport(scheme.name, alpha, description, tuple(run.reports), refused, change, bound, scores)
    return report, run.as_undo()


class _Run:
    """All the groups of a model, smoothed in one way and then perhaps in another."""

    def __init__(
        self,
        model: nn.Module,
        work: Sequence["_Work"],
        samples: dict[str, Sample],
        gate: Gate,
        progress: Progress | None,
    ) -> None:
        self.model = model
        self.work = work
        self.samples = samples
        self.gate = gate
        self.progress = progress
        self.reports: list[GroupReport] = []
        self._originals: dict[int, tuple[nn.Parameter, Tensor]] = {}

    def smooth(self, alpha: "Alpha | None") -> None:
        """Smooth every group with one alpha, the best of its own ("searched"), or not (None)."""
        self.undo()
        together: dict[str, list[_Work]] = {}
        for work in self.work:
            together.setdefault(self.gate.block(work.group), []).append(work)
        told: dict[int, GroupReport] = {}
        for works in together.values():
            for work, report in zip(works, self._smooth_together(works, alpha), strict=True):
                told[id(work)] = report
                if self.progress is not None:
                    self.progress(len(told), len(self.work), work.group.source.module)
        self.reports = [told[id(work)] for work in self.work]

    def _smooth_together(self, works: Sequence["_Work"], alpha: "Alpha | None") -> list[GroupReport]:
        """The groups of one block, which are compared together; where that fails, each alone."""
        trial = Trial(self.gate, self._originals)
        reports = [_smooth_group(work, self.samples, trial, alpha) for work in works]
        trial.compare()
        if trial.failure is not None:
            trial.undo()
            if len(trial.folded) > 1:
                return [report for work in works for report in self._smooth_together([work], alpha)]
        return [trial.told(work.group, report) for work, report in zip(works, reports, strict=True)]

    def undo(self) -> None:
        """All weights as they were, to the bit."""
        self.as_undo()()
        self.reports = []

    def as_undo(self) -> Undo:
        """What `undo` does to the weights, for later."""
        return Undo(tuple(self._originals.values()))


def _best(run: _Run, contest: Contest) -> dict[str, Score]:
    """Smooth in the way that wins, and tell all scores."""
    ways: dict[str, Alpha | None] = {"none": None, **{str(a): a for a in CANDIDATES}, "searched": "searched"}
    scores = {}
    for name, alpha in ways.items():
        run.smooth(alpha)
        scores[name] = contest.score()
    best = winner(scores)
    if best != name:
        run.smooth(ways[best])
    return scores


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


def _smooth_group(work: _Work, samples: dict[str, Sample], trial: Trial, alpha: Alpha | None) -> GroupReport:
    """Search and fold."""
    group = work.group

    def report(choice: Choice | None, reason: str | None) -> GroupReport:
        kept = None if choice is None or reason is not None else choice.alpha
        before = None if choice is None else choice.error_before
        after = before if choice is None or reason is not None else choice.error_after
        readers = tuple(dict.fromkeys(reader.module for reader in group.readers))
        return GroupReport(group.source.module, readers, kept, before, after, None, reason)

    if not work.readers:
        return report(None, "nothing that reads it will be quantised")
    unseen = sorted(work.sampled - set(samples))
    if unseen:
        return report(None, f"{unseen[0]} read no token of the calibration data")
    reason = trial.gate.why_not(group)
    if reason is not None:
        return report(None, reason)
    alphas = () if alpha is None else GRID if alpha == "searched" else (float(alpha),)
    choice = search(work.products(samples), group.source.channels, work.scheme, alphas, forced=alpha != "searched")
    if alpha is None:
        return report(choice, "nothing is better for the quantised model as a whole than no smoothing")
    if choice.scales is None:
        return report(choice, "no alpha has a smaller error than none")
    try:
        trial.fold(work.model, group, choice.scales)
    except NonFiniteError as error:
        return report(choice, str(error))
    return report(choice, None)


def _refused(refusal: Refusal) -> GroupReport:
    return GroupReport(refusal.source.module, refusal.readers, None, None, None, None, refusal.reason)


def _as_mapping(model: nn.Module, inputs: ModelInputs) -> Any:
    """Inputs as `observe` takes them."""
    if isinstance(inputs, tuple):
        return inspect.signature(model.forward).bind(*inputs).arguments
    return inputs


def cut(inputs: ModelInputs) -> ModelInputs:
    """A probe of one sequence and few tokens, where the inputs are token ids alone."""
    if isinstance(inputs, dict) and set(inputs) <= {"input_ids", "attention_mask"}:
        return {key: value[:1, :PROBE_TOKENS] for key, value in inputs.items()}
    return inputs
