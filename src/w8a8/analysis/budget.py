"""Mixed precision: a scheme for each layer, or float, under a budget of bytes or of perplexity.

Layers that vLLM fuses (q, k and v; gate and up) are a *group*, and have one scheme: those that read the same tensor
under the same parent, and those of the names it fuses.  What an option costs a group is measured: the KL(float ||
model) of the model in which this group alone has it.  Costs are added up, which holds while they are small, and the
choice is a multiple-choice knapsack, solved exactly by scipy's `milp` (HiGHS):

    budget of bytes        least KL,     bytes <= budget
    budget of perplexity   least bytes,  KL <= log(1 + percent / 100)

The second takes KL for the loss in nats, which it is in the mean for a model that is right about its text.  So the
choice is then run, on windows that the costs were not measured on where the text has more: where the perplexity is
over the budget after all, the bound is tightened in proportion and the choice made again, `ROUNDS` times at most.

Bytes are those of all tensors of the model, a tied one once: what its file will hold.  They do not see speed: a
weight-only layer has the bytes of an integer one and less error, and multiplies in float, so it is an option only where
it is named.  A greedy choice by KL per byte was the alternative without scipy; it misses budgets by up to a group.
"""

import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor, nn

from w8a8 import convert
from w8a8.analysis.errors import observe_readers
from w8a8.analysis.replay import record, replay
from w8a8.analysis.sample import WINDOWS, Sample, divergence, draw, layers_for
from w8a8.checkpoint.vllm import FUSED
from w8a8.convert import Progress, swapped
from w8a8.errors import ModelError, SchemeError
from w8a8.evaluation.scores import logits_of, token_kl, token_losses
from w8a8.evaluation.text import Text
from w8a8.linear import QuantLinear
from w8a8.report.records import Choice
from w8a8.scheme import Scheme

OPTIONS = ("w8a8", "w8a8-asym")
ROUNDS = 4
CURVE = 9
FLOAT = "float"
_UNITS = {"": 1, "kb": 1e3, "mb": 1e6, "gb": 1e9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


@dataclass(frozen=True)
class Budget:
    """A limit: either the bytes of the model's tensors, or how many percent of perplexity may be lost."""

    bytes: int | None = None
    percent: float | None = None

    @classmethod
    def of(cls, budget: "Budget | str | int") -> "Budget":
        """A budget, or one that is written: "12MB", "1.5 GiB", "0.5%", a number of bytes.

        Raises:
            SchemeError: it is written in another way, or not positive.
        """
        if isinstance(budget, Budget):
            return budget
        found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]*|%)", str(budget).strip().lower())
        if found is None or float(found[1]) <= 0 or found[2] not in (*_UNITS, "%"):
            raise SchemeError(
                f"budget={budget!r} is no budget: give bytes, '12MB' or '1.5GiB', or how much perplexity may be "
                "lost, '0.5%'"
            )
        if found[2] == "%":
            return cls(percent=float(found[1]))
        return cls(bytes=int(float(found[1]) * _UNITS[found[2]]))

    def __str__(self) -> str:
        if self.percent is not None:
            return f"at most {self.percent:g} % of perplexity lost"
        return f"at most {self.bytes:,} bytes"


@dataclass(frozen=True)
class GroupCosts:
    """Layers that move together, and what each option costs them; the last option is "float".

    bytes: Of the group's tensors.  kl_nats: Per token, with this group alone quantised.
    """

    layers: tuple[str, ...]
    options: tuple[str, ...]
    bytes: tuple[int, ...]
    kl_nats: tuple[float, ...]


@dataclass(frozen=True)
class Allocation:
    """The choice, ready for `w8a8.quantize(model, allocation.schemes)`, and what it rests on.

    schemes: By layer; None is float.
    chosen: Bytes, predicted and measured KL.
    perplexity_ratio: Measured, quantised / float.
    rounds: How often the choice was made: more than once where the measured perplexity was over the budget.
    curve: Other choices, by bytes.
    tokens: That the costs were measured on.  checked_tokens: that the choice was run on.
    """

    budget: Budget
    schemes: dict[str, Scheme | None]
    chosen: Choice
    float_bytes: int
    perplexity_ratio: float
    rounds: int
    groups: tuple[GroupCosts, ...]
    curve: tuple[Choice, ...]
    tokens: int
    checked_tokens: int

    def to_dict(self) -> dict[str, Any]:
        """For JSON; schemes by their names."""
        schemes = {name: FLOAT if scheme is None else scheme.name for name, scheme in self.schemes.items()}
        return {**asdict(self), "schemes": schemes}

    def record(self) -> dict[str, Any]:
        """The budget's part of a page."""
        points = sorted({*self.curve, self.chosen}, key=lambda choice: (choice.bytes, choice.predicted_kl_nats))
        return {
            "points": [asdict(point) for point in points],
            "chosen": points.index(self.chosen),
            "constraint": str(self.budget),
        }

    def __str__(self) -> str:
        left = [name for name, scheme in self.schemes.items() if scheme is None]
        kl, measured = self.chosen.predicted_kl_nats, self.chosen.measured_kl_nats
        return (
            f"Budget: {self.budget}.  {self.chosen.bytes:,} of {self.float_bytes:,} bytes, "
            f"{len(self.schemes) - len(left)} layers quantised, {len(left)} left float"
            + (f" ({', '.join(left[:6])}{', ...' if len(left) > 6 else ''})" if left else "")
            + f".  KL predicted {kl:.3e}, measured {measured:.3e} nats per token; perplexity "
            f"{100 * (self.perplexity_ratio - 1):+.3f} % on {self.checked_tokens:,} tokens; "
            + ("chosen once." if self.rounds == 1 else f"chosen {self.rounds} times, the bound tightened each time.")
        )


def allocate(
    model: Any,
    text: Text | Tensor,
    budget: Budget | str | int,
    *,
    options: Sequence[Scheme | str] = OPTIONS,
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
    windows: int = WINDOWS,
    seq_len: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Allocation:
    """Choose a scheme, or float, for each layer.

    Args:
        model: A float causal language model.  Not modified.
        text: What `w8a8.evaluation.encode` makes, or (T,) token ids.
        budget: See `Budget.of`.
        options: Schemes and presets to choose among; float is always one.
        include, exclude: The layers to choose for, as for `w8a8.quantize`; others stay float.
        windows, seq_len, seed: Of the sample of the text, as for `w8a8.sensitivity`.
        progress: Called as progress(done, total, layer).

    Raises:
        SchemeError: no such budget, or one that cannot be kept: the message says what can; an option is simulated only.
        ModelError: scipy is not installed; and as `w8a8.sensitivity`.
        PatternError, NonFiniteError, TextError: as `w8a8.sensitivity`.
    """
    budget = Budget.of(budget)
    _milp()
    selection = convert.select(model, include, exclude)
    sample = draw(model, text, windows=windows, seq_len=seq_len, seed=seed)
    built = {}
    for scheme in map(Scheme.of, options):
        if not scheme.integer_executable and not scheme.weight_only:
            raise SchemeError(f"the option {scheme.name} cannot run: {scheme.not_executable_because}")
        schemes = dict.fromkeys(selection.chosen, scheme)
        built[scheme.name] = layers_for(model, selection, schemes, sample.calibration())
    groups = _costs(model, sample, _groups(model, sample, selection.chosen), built, selection.untied, progress)
    float_bytes = sum(t.numel() * t.element_size() for t in {id(p): p for p in model.parameters()}.values())
    fixed = float_bytes - sum(group.bytes[-1] for group in groups)
    check = _check_sample(model, text, sample, windows, seed)
    allowed = math.inf if budget.percent is None else math.log1p(budget.percent / 100)
    bound = allowed
    for rounds in range(1, ROUNDS + 1):
        picked = solve(groups, fixed, limit=budget.bytes, kl_bound=None if budget.bytes is not None else bound)
        by_layer = {name: option for group, option in zip(groups, picked, strict=True) for name in group.layers}
        layers = {name: built[option][name] for name, option in by_layer.items() if option != FLOAT}
        measured_kl, log_ratio = _measured(model, check, layers)
        if log_ratio <= allowed:
            predicted = _total(groups, picked, fixed)
            return Allocation(
                budget,
                {name: layers[name].scheme if name in layers else None for name in selection.chosen},
                Choice(predicted.bytes, predicted.predicted_kl_nats, measured_kl),
                float_bytes,
                math.exp(log_ratio),
                rounds,
                groups,
                _curve(groups, fixed),
                sample.scored,
                check.scored,
            )
        bound *= 0.8 * allowed / log_ratio
    raise SchemeError(
        f"{budget} was asked for, and after {ROUNDS} choices, each more careful, the perplexity still rose by "
        f"{100 * math.expm1(log_ratio):.3g} %; allow more, give a longer text, or smooth the model first"
    )


def solve(
    groups: Sequence[GroupCosts], fixed: int = 0, *, limit: int | None = None, kl_bound: float | None = None
) -> tuple[str, ...]:
    """The option of each group: the least KL in so many bytes, or the fewest bytes of so little KL.

    Args:
        groups: With their costs.
        fixed: Bytes beside those of the groups.
        limit: Of all bytes; or
        kl_bound: nats per token.

    Raises:
        SchemeError: no choice keeps to the limit; the message says which bytes can be reached.
        ModelError: scipy is not installed.
    """
    import numpy as np

    milp, bounds, linear_constraint = _milp()
    sizes = np.array([size for group in groups for size in group.bytes], dtype=np.float64)
    costs = np.array([max(0.0, kl) for group in groups for kl in group.kl_nats])
    one_each = np.zeros((len(groups), len(sizes)))
    at = 0
    for index, group in enumerate(groups):
        one_each[index, at : at + len(group.options)] = 1
        at += len(group.options)
    if limit is not None:
        least = fixed + sum(min(group.bytes) for group in groups)
        if limit < least:
            raise SchemeError(
                f"a budget of {limit:,} bytes cannot be kept: with every layer as small as it gets the model has "
                f"{least:,}, {fixed:,} of them in tensors that are not to be quantised; allow that, or include more"
            )
        row, most = sizes, float(limit - fixed)
        objective = costs / max(float(costs.max()), 1e-30)
    else:
        assert kl_bound is not None, "one of the two limits"
        row, most = costs, kl_bound
        # of choices of equal bytes the one of least KL
        objective = sizes / sizes.sum() + 1e-6 * costs / max(float(costs.sum()), 1e-30)
    scale = max(most, float(row.max()), 1e-30)  # the solver's tolerance is absolute
    found = milp(
        objective,
        constraints=[
            linear_constraint(one_each, 1, 1),
            linear_constraint(row[None] / scale, -np.inf, most / scale),
        ],
        integrality=np.ones(len(sizes)),
        bounds=bounds(0, 1),
        options={"mip_rel_gap": 0.0},
    )
    if found.x is None:
        raise SchemeError(f"no choice keeps to the budget: {found.message}")
    picked, at = [], 0
    for group in groups:
        picked.append(group.options[int(np.argmax(found.x[at : at + len(group.options)]))])
        at += len(group.options)
    return tuple(picked)


def _total(groups: Sequence[GroupCosts], picked: Sequence[str], fixed: int) -> Choice:
    places = [group.options.index(option) for group, option in zip(groups, picked, strict=True)]
    size = fixed + sum(group.bytes[i] for group, i in zip(groups, places, strict=True))
    return Choice(size, sum(group.kl_nats[i] for group, i in zip(groups, places, strict=True)))


def _curve(groups: Sequence[GroupCosts], fixed: int) -> tuple[Choice, ...]:
    """Choices between the smallest and the float model, at evenly spaced limits."""
    least = sum(min(group.bytes) for group in groups)
    most = sum(group.bytes[-1] for group in groups)
    limits = [fixed + least + (most - least) * i // (CURVE - 1) for i in range(CURVE)]
    return tuple(_total(groups, solve(groups, fixed, limit=limit), fixed) for limit in limits)


def _groups(model: nn.Module, sample: Sample, names: Sequence[str]) -> tuple[tuple[str, ...], ...]:
    """Layers that have to have one scheme, in the model's order."""
    start, ids = sample.windows[0]
    first = observe_readers(model, ids, start, names)
    for shards in FUSED:
        by_parent: dict[str, list[str]] = {}
        for name in names:
            parent, _, last = name.rpartition(".")
            if last in shards:
                by_parent.setdefault(parent, []).append(name)
        for together in by_parent.values():
            leaders = {first[name] for name in together}
            first = {name: first[together[0]] if lead in leaders else lead for name, lead in first.items()}
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(first[name], []).append(name)
    return tuple(map(tuple, found.values()))


def _costs(
    model: nn.Module,
    sample: Sample,
    groups: Sequence[tuple[str, ...]],
    built: Mapping[str, Mapping[str, QuantLinear]],
    tied: Collection[str],
    progress: Progress | None,
) -> tuple[GroupCosts, ...]:
    totals = {(group, option): 0.0 for group in groups for option in built}
    total, done = len(sample.windows) * len(totals), 0
    for start, ids in sample.windows:
        exact = record(model, ids, start, {})
        for group, option in totals:
            layers = {name: built[option][name] for name in group}
            totals[group, option] += divergence(exact, replay(model, exact, layers, group))
            done += 1
            if progress is not None:
                progress(done, total, group[0])
    return tuple(
        GroupCosts(
            group,
            (*built, FLOAT),
            (
                *(sum(_size(built[option][name]) for name in group) for option in built),
                sum(_size(model.get_submodule(name), without_weight=name in tied) for name in group),
            ),
            (*(totals[group, option] / sample.scored for option in built), 0.0),
        )
        for group in groups
    )


def _size(layer: nn.Module, *, without_weight: bool = False) -> int:
    """Bytes of a layer; a tied float weight is not its own: quantised it becomes a copy, and the float one stays."""
    return sum(
        t.numel() * t.element_size()
        for name, t in layer.state_dict().items()
        if not (without_weight and name == "weight")
    )


def _check_sample(model: Any, text: Text | Tensor, sample: Sample, windows: int, seed: int) -> Sample:
    """Other windows of the same text; the same ones where it has no others."""
    used = {start for start, _ in sample.windows}
    more = draw(model, text, windows=len(used) + 2 * windows, seq_len=sample.seq_len, seed=seed)
    others = tuple((start, ids) for start, ids in more.windows if start not in used)
    return Sample(others, sample.seq_len) if others else sample


def _measured(model: nn.Module, sample: Sample, layers: Mapping[str, nn.Module]) -> tuple[float, float]:
    """KL and the difference of the losses, nats per token."""
    kl = losses = 0.0
    for start, ids in sample.windows:
        p = logits_of(model, ids, start)[:-1]
        with swapped(model, layers):
            q = logits_of(model, ids, start)[:-1]
        kl += float(token_kl(p, q).double().sum())
        losses += float((token_losses(q, ids[1:]) - token_losses(p, ids[1:])).sum())
    return kl / sample.scored, losses / sample.scored


def _milp() -> tuple[Any, Any, Any]:
    try:
        from scipy.optimize import Bounds, LinearConstraint, milp
    except ImportError as error:
        raise ModelError(
            f"a budget was asked for, which scipy's milp keeps, and scipy cannot be imported: {error}; "
            "pip install 'w8a8[budget]'"
        ) from error
    return milp, Bounds, LinearConstraint
