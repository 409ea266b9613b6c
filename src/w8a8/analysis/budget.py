"""Mixed precision: a scheme for each layer, or float, under a budget of bytes or of perplexity.

Layers that vLLM fuses (q, k and v; gate and up; the experts of a layer) are a *group*, and have one scheme: those that
read the same tensor under the same parent, those of the names it fuses, and experts.  What an option costs a group is
measured: the KL(float || model) of the model in which this group alone has it.  Costs are added up, which holds while
they are small, and the choice is solved exactly (`knapsack`):

    budget of bytes        least KL,     bytes <= budget
    budget of perplexity   least bytes,  KL <= log(1 + percent / 100)

KL is what `answers` tells of a model of this kind.  Of an encoder that predicts no tokens the second is a bound of that
alone: 0.5 % is 0.005 nats, of an embedder 0.005 of the cosine.  Of others it takes KL for the loss in nats, which it is
in the mean for a model that is right about its text.  So the choice is then run, on windows that the costs were not
measured on where the text has more: where it loses too much after all, the bound is tightened in proportion and the
choice made again, `ROUNDS` times at most.

Of a smoothed model the costs are those of its folded weights, which is what is quantised; "float" is then the folded
model, whose function is the model's own up to the rounding that `SmoothReport.change` tells.

Bytes are those of all tensors of the model, a tied one once: what its file will hold.  They do not see speed: a
weight-only layer has the bytes of an integer one and less error, and multiplies in float, so it is an option only where
it is named.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass

from torch import Tensor, nn

from w8a8.analysis.answers import Told
from w8a8.analysis.errors import observe_readers
from w8a8.analysis.knapsack import GroupCosts, curve, milp_of_scipy, solve, total
from w8a8.analysis.replay import record, replay
from w8a8.analysis.sample import WINDOWS, Sample, draw, layers_for
from w8a8.calibration.data import Calibration
from w8a8.calibration.observers import Observer
from w8a8.checkpoint.vllm import FUSED
from w8a8.core.progress import Progress, tell
from w8a8.core.scheme import Scheme
from w8a8.errors import ModelError, SchemeError, few
from w8a8.evaluation.scores import token_losses
from w8a8.evaluation.text import Text
from w8a8.layers.buffers import QuantLayer
from w8a8.layers.embedding import TABLE, QuantEmbedding
from w8a8.model.experts import Experts
from w8a8.model.kinds import READS_TEXT, Asked
from w8a8.model.pretrained import Pretrained
from w8a8.model.roles import Embeddings
from w8a8.model.selection import Schemes, Selection, assign, select
from w8a8.model.swapping import swapped
from w8a8.model.tables import build_tables, choose_tables
from w8a8.records.layers import Choice

ASKED = Asked("--budget, which is spent on what a model tells of a text,", READS_TEXT)
OPTIONS = ("w8a8", "w8a8-asym")
ROUNDS = 4
FLOAT = "float"
_UNITS = {"": 1, "kb": 1e3, "mb": 1e6, "gb": 1e9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


@dataclass(frozen=True)
class Budget:
    """A limit: either the bytes of the model's tensors, or how many percent may be lost.

    Of perplexity, or where no tokens are predicted of what the model tells: see `w8a8.analysis.answers`.
    """

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
                f"budget={budget!r} is no budget: give bytes, '12MB' or '1.5GiB', or how much may be lost, "
                "of perplexity or an encoder's measure, '0.5%'"
            )
        if found[2] == "%":
            return cls(percent=float(found[1]))
        return cls(bytes=int(float(found[1]) * _UNITS[found[2]]))

    def __str__(self) -> str:
        if self.percent is not None:
            return f"at most {self.percent:g} % lost"
        return f"at most {self.bytes:,} bytes"


@dataclass(frozen=True)
class Allocation:
    """The choice, ready for `w8a8.quantize(model, allocation.schemes)`, and what it rests on.

    schemes: By layer; None is float.
    chosen: Bytes, predicted and measured KL.
    measure: What KL is of a model of this kind, in words.
    perplexity_ratio: Measured, quantised / float; None where no tokens are predicted.
    rounds: How often the choice was made: more than once where the measured perplexity was over the budget.
    curve: Other choices, by bytes.
    tokens: That the costs were measured on.  checked_tokens: that the choice was run on.
    """

    budget: Budget
    schemes: dict[str, Scheme | None]
    chosen: Choice
    float_bytes: int
    measure: str
    perplexity_ratio: float | None
    rounds: int
    groups: tuple[GroupCosts, ...]
    curve: tuple[Choice, ...]
    tokens: int
    checked_tokens: int

    def to_dict(self) -> dict[str, object]:
        """For JSON; schemes by their names."""
        schemes = {name: FLOAT if scheme is None else scheme.name for name, scheme in self.schemes.items()}
        return {**asdict(self), "schemes": schemes}

    def record(self) -> dict[str, object]:
        """The budget's part of a page."""
        points = sorted({*self.curve, self.chosen}, key=lambda choice: (choice.bytes, choice.predicted_kl_nats))
        return {
            "points": [asdict(point) for point in points],
            "chosen": points.index(self.chosen),
            "constraint": str(self.budget),
        }

    def __str__(self) -> str:
        left = [name for name, scheme in self.schemes.items() if scheme is None]
        ratio = self.perplexity_ratio
        kl, measured = self.chosen.predicted_kl_nats, self.chosen.measured_kl_nats
        return (
            f"Budget: {self.budget}.  {self.chosen.bytes:,} of {self.float_bytes:,} bytes, "
            f"{len(self.schemes) - len(left)} layers quantised, {len(left)} left float"
            + (f" ({few(left, 6)})" if left else "")
            + f".  {self.measure}: predicted {kl:.3e}, measured {measured:.3e}"
            + ("" if ratio is None else f"; perplexity {100 * (ratio - 1):+.3f} %")
            + f" on {self.checked_tokens:,} {'texts' if ratio is None else 'tokens'}; "
            + ("chosen once." if self.rounds == 1 else f"chosen {self.rounds} times, the bound tightened each time.")
        )


def allocate(
    model: Pretrained,
    text: Text | Tensor,
    budget: Budget | str | int,
    *,
    options: Sequence[Schemes] = OPTIONS,
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
    embeddings: Embeddings | str = Embeddings.FLOAT,
    windows: int = WINDOWS,
    seq_len: int | None = None,
    seed: int = 0,
    calibration: object = None,
    observer: str | Callable[[], Observer] = "absmax",
    progress: Progress | None = None,
) -> Allocation:
    """Choose a scheme, or float, for each layer.

    Args:
        model: Float, of transformers, and one that reads text; smoothed where that is wanted.  Not modified.
        text: What `w8a8.evaluation.encode` makes, or (T,) token ids.
        budget: See `Budget.of`.
        options: Schemes and presets to choose among; float is always one.  An option may differ from layer to layer: a
            mapping from patterns to schemes as for `w8a8.quantize`, of which None is no option beside float.
        include, exclude: The layers to choose for, as for `w8a8.quantize`; others stay float.
        embeddings: "int8" counts lookup tables as they then are, in bytes and in what is lost; there is no choice of
            them, so none may be tied to a layer of which there is.
        windows, seq_len, seed: Of the sample of the text, as for `w8a8.sensitivity`.
        calibration, observer: For static options, as `w8a8.quantize` will be given them.
        progress: Called as progress(done, total, layer).

    Raises:
        SchemeError: no such budget, or one that cannot be kept: the message says what can; an option is simulated only,
            is static without a calibration, or gives layers that move together several schemes.
        ModelError: scipy is not installed; no table can be int8, or one is tied to a layer; as `w8a8.sensitivity`.
        PatternError, NonFiniteError, CalibrationError, TextError: as `w8a8.sensitivity`.
    """
    ASKED.check_model(model)
    budget = Budget.of(budget)
    milp_of_scipy()
    selection = select(model, include, exclude)
    tables = _tables(model, embeddings, selection, exclude)
    offered = [assign(selection, option)[1] for option in options]
    _check_options(offered, calibrated=calibration is not None)
    sample = draw(model, text, windows=windows, seq_len=seq_len, seed=seed)
    together = _groups(model, sample, selection.chosen)
    choices = {group: _choices(group, offered) for group in together}
    data = sample.calibration() if calibration is None else Calibration.of(calibration)
    built: dict[str, dict[str, QuantLayer]] = {}
    for scheme in dict.fromkeys(scheme for option in offered for scheme in option.values()):
        names = [name for group in together if scheme in choices[group] for name in group]
        built[scheme.name] = {**layers_for(model, dict.fromkeys(names, scheme), data, observer)}
    if tables:
        choices[tuple(tables)] = (TABLE,)
        built[TABLE.name] = built.get(TABLE.name, {}) | tables
    sizes = {
        name: _size(model.get_submodule(name), without_weight=name in selection.untied) for name in selection.chosen
    }
    groups = _costs(model, sample, choices, built, sizes, progress)
    float_bytes = sum(parameter.nbytes for parameter in model.parameters())
    weights = {id(weight): weight.nbytes for weight in (model.get_parameter(f"{name}.weight") for name in tables)}
    fixed = float_bytes - sum(sizes.values()) - sum(weights.values())
    check = _check_sample(model, text, sample, windows, seed)
    allowed = math.inf if budget.percent is None else math.log1p(budget.percent / 100)
    bound = allowed
    for rounds in range(1, ROUNDS + 1):
        picked = solve(groups, fixed, limit=budget.bytes, kl_bound=None if budget.bytes is not None else bound)
        by_layer = {name: option for group, option in zip(groups, picked, strict=True) for name in group.layers}
        layers = {name: built[option][name] for name, option in by_layer.items() if option != FLOAT}
        measured_kl, loss = _measured(model, check, layers)
        lost = measured_kl if loss is None else loss
        if lost <= allowed:
            predicted = total(groups, picked, fixed)
            return Allocation(
                budget,
                {name: layers[name].scheme if name in layers else None for name in selection.chosen},
                Choice(predicted.bytes, predicted.predicted_kl_nats, measured_kl),
                float_bytes,
                sample.told.value,
                None if loss is None else math.exp(loss),
                rounds,
                groups,
                curve(groups, fixed),
                sample.scored,
                check.scored,
            )
        bound *= 0.8 * allowed / lost
    raise SchemeError(
        f"{budget} was asked for, and after {ROUNDS} choices, each more careful, "
        + (
            f"{sample.told.value} is still {lost:.3g}"
            if loss is None
            else f"the perplexity still rose by {100 * math.expm1(lost):.3g} %"
        )
        + "; allow more, give a longer text, or smooth the model first"
    )


def _groups(model: Pretrained, sample: Sample, names: Sequence[str]) -> tuple[tuple[str, ...], ...]:
    """Layers that have to have one scheme, in the model's order."""
    first = observe_readers(model, sample.windows[0], names)
    for shards in FUSED:
        by_parent: dict[str, list[str]] = {}
        for name in names:
            parent, _, last = name.rpartition(".")
            if last in shards:
                by_parent.setdefault(parent, []).append(name)
        for together in by_parent.values():
            leaders = {first[name] for name in together}
            first = {name: first[together[0]] if lead in leaders else lead for name, lead in first.items()}
    for stack in (f"{name}." for name, module in model.named_modules() if isinstance(module, Experts)):
        inside = [name for name in names if name.startswith(stack)]
        first |= dict.fromkeys(inside, first[inside[0]] if inside else "")
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(first[name], []).append(name)
    return tuple(map(tuple, found.values()))


def _tables(
    model: Pretrained, embeddings: Embeddings | str, selection: Selection, exclude: Sequence[str]
) -> dict[str, QuantEmbedding]:
    """The tables as they will be, whatever is chosen."""
    chosen = choose_tables(model, embeddings, selection.chosen, exclude)
    for name, others in chosen.tied.items():
        layer = next((other for other in others if other in selection.chosen), None)
        if layer is not None:
            raise ModelError(
                f"embeddings='int8' was asked for under a budget, and {name} is one tensor with {layer}, which the "
                f"budget may leave float: leave that out with exclude=[{layer!r}, {name!r}], or embeddings='float'"
            )
    return build_tables(model, chosen.schemes, {})


def _check_options(offered: Sequence[Mapping[str, Scheme]], *, calibrated: bool) -> None:
    """Raise `SchemeError` for what could be measured and not be quantised to."""
    for scheme in dict.fromkeys(scheme for option in offered for scheme in option.values()):
        if not scheme.integer_executable and not scheme.weight_only:
            raise SchemeError(f"the option {scheme.name} cannot run: {scheme.not_executable_because}")
        if not calibrated:
            scheme.check_without_data()


def _choices(group: tuple[str, ...], offered: Sequence[Mapping[str, Scheme]]) -> tuple[Scheme, ...]:
    """The schemes that layers which move together may have."""
    found: dict[Scheme, None] = {}
    for option in offered:
        schemes = {name: option.get(name) for name in group}
        if len(set(schemes.values())) > 1:
            told = ", ".join(f"{name}: {FLOAT if s is None else s.name}" for name, s in schemes.items())
            raise SchemeError(
                f"an option gives layers that move together, since they read one tensor or vLLM fuses them, several "
                f"schemes ({told}); give them one, or exclude them"
            )
        scheme = schemes[group[0]]
        if scheme is not None:
            found[scheme] = None
    return tuple(found)


def _costs(
    model: Pretrained,
    sample: Sample,
    choices: Mapping[tuple[str, ...], Sequence[Scheme]],
    built: Mapping[str, Mapping[str, QuantLayer]],
    sizes: Mapping[str, int],
    progress: Progress | None,
) -> tuple[GroupCosts, ...]:
    """What each choice of each group costs; `sizes` are those of the layers that may stay float."""
    options = {group: tuple(scheme.name for scheme in schemes) for group, schemes in choices.items()}
    totals = {(group, option): 0.0 for group in options for option in options[group]}
    total, done = len(sample.windows) * len(totals), 0
    for window in sample.windows:
        exact = record(model, window, {})
        for group, option in totals:
            layers = {name: built[option][name] for name in group}
            totals[group, option] += exact.divergence(replay(model, exact, layers, group))
            done += 1
            tell(progress, done, total, group[0])
    found = []
    for group, quantized in options.items():
        size = tuple(sum(_size(built[option][name]) for name in group) for option in quantized)
        kl = tuple(totals[group, option] / sample.scored for option in quantized)
        as_float = [sum(sizes[name] for name in group)] if group[0] in sizes else []
        found.append(
            GroupCosts(
                group, (*quantized, *(FLOAT for _ in as_float)), (*size, *as_float), (*kl, *(0.0 for _ in as_float))
            )
        )
    return tuple(found)


def _size(layer: nn.Module, *, without_weight: bool = False) -> int:
    """Bytes of a layer; a tied float weight is not its own: quantised it becomes a copy, and the float one stays."""
    return sum(t.nbytes for name, t in layer.state_dict().items() if not (without_weight and name == "weight"))


def _check_sample(model: Pretrained, text: Text | Tensor, sample: Sample, windows: int, seed: int) -> Sample:
    """Other windows of the same text; the same ones where it has no others."""
    used = {window.start for window in sample.windows}
    more = draw(model, text, windows=len(used) + 2 * windows, seq_len=sample.seq_len, seed=seed)
    others = tuple(window for window in more.windows if window.start not in used)
    return Sample(others, sample.seq_len) if others else sample


def _measured(model: Pretrained, sample: Sample, layers: Mapping[str, nn.Module]) -> tuple[float, float | None]:
    """KL and the difference of the losses, nats per token; None where no token is told."""
    kl = losses = 0.0
    for window in sample.windows:
        p = window.answer(model)
        with swapped(model, layers):
            q = window.answer(model)
        kl += window.divergence(p, q)
        if window.targets is not None:
            losses += float((token_losses(q, window.targets) - token_losses(p, window.targets)).sum())
    return kl / sample.scored, losses / sample.scored if sample.told in (Told.NEXT, Told.MASKED) else None
