"""What would help the worst layers, each remedy measured in the quantised model.

For a layer L of a quantised model, a remedy is another scheme for L alone, float for L alone, or smoothing, which is
of all that reads one tensor: the group of L is smoothed (`smoothed`) and keeps its schemes.  Its gain is

    KL(float || quantised)  -  KL(float || quantised, with the remedy)      in nats per token.

Measured on the windows that the sensitivity was, with the same replays.  Schemes that are L's own, or do not fit it,
are left out.  Where L has no group that could be smoothed, the remedy has no gain, and its note says why.
"""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from w8a8.analysis.replay import record, replay
from w8a8.analysis.sample import draw, layers_for
from w8a8.analysis.smoothed import SmoothedGroup, smoothed_groups
from w8a8.calibration.data import Calibration
from w8a8.calibration.observers import Observer
from w8a8.core.progress import Progress, tell
from w8a8.core.scheme import AUTO, PerGroup, PerToken, QuantSpec, Scheme
from w8a8.evaluation.text import Text
from w8a8.layers.linear import float_operands
from w8a8.model.pretrained import Pretrained
from w8a8.model.selection import Schemes, assign, scheme_of, select
from w8a8.records.layers import Remedy, Sensitivity

GROUPED = Scheme(QuantSpec(granularity=PerGroup(32)), QuantSpec(granularity=PerToken()))
REMEDIES = ("w8a8", "w8a8-asym", GROUPED, "w8a16")
"""Finer grids in this order: per channel and token, with a zero point, weights in groups as Q8_0 has them, none for the
input."""

LEAVE = "leave in float"
SMOOTH = "smoothing"


@dataclass(frozen=True)
class _Trial:
    """One model to measure: its quantised layers, what of them is not as in the quantised model, and a fold."""

    layers: Mapping[str, nn.Module]
    changed: tuple[str, ...]
    group: SmoothedGroup | None = None

    def folded(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext() if self.group is None else self.group.folded()


def remedies(
    model: Pretrained,
    text: Text | Tensor,
    found: Sensitivity,
    scheme: Schemes = AUTO,
    *,
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
    count: int = 5,
    options: Sequence[Scheme | str] = REMEDIES,
    calibration: object = None,
    observer: str | Callable[[], Observer] = "absmax",
    progress: Progress | None = None,
) -> tuple[Remedy, ...]:
    """For each of the worst layers, every remedy, the best first, and last what cannot be done.

    Args:
        model, text, scheme, include, exclude, calibration, observer: As they were for `found`; the model is not
            modified.  Smoothing is searched on the calibration too, on the windows where there is none.
        found: The sensitivity; its windows are drawn again.
        count: How many layers.
        options: Schemes to try; float and smoothing are always tried.
        progress: Called as progress(done, total, remedy).

    Raises:
        W8A8Error: as `w8a8.sensitivity` and `w8a8.smooth_`.
    """
    _, schemes = assign(select(model, include, exclude), scheme_of(model, scheme))
    sample = draw(model, text, windows=found.windows, seq_len=found.seq_len, seed=found.seed)
    data = sample.calibration() if calibration is None else Calibration.of(calibration)
    layers = layers_for(model, schemes, data, observer)
    worst = [layer.name for layer in found.worst(count)]
    trials: dict[tuple[str, str], _Trial] = {}
    for name in worst:
        others = {other: layer for other, layer in layers.items() if other != name}
        trials[name, LEAVE] = _Trial(others, (name,))
    for option in map(Scheme.of, options):
        fitting = [name for name in worst if option != schemes[name] and _fits(option, model.get_submodule(name))]
        if fitting:
            made = layers_for(model, dict.fromkeys(fitting, option), data, observer)
            trials |= {(name, option.name): _Trial(layers | {name: made[name]}, (name,)) for name in fitting}
    groups, reasons = smoothed_groups(model, worst, schemes, data, observer)
    trials |= {(name, SMOOTH): _Trial(layers | g.layers, g.changed, g) for name, g in groups.items()}
    costs: dict[tuple[str, str], float] = dict.fromkeys(trials, 0.0)
    total, done = 0.0, 0
    for window in sample.windows:
        exact, quantized = record(model, window, {}), record(model, window, layers)
        total += exact.divergence(quantized.answer)
        once: dict[int, float] = {}  # layers of one group share its trial
        for key, trial in trials.items():
            same = id(trial if trial.group is None else trial.group)
            if same not in once:
                with trial.folded():
                    once[same] = exact.divergence(replay(model, quantized, trial.layers, trial.changed))
            costs[key] += once[same]
            done += 1
            tell(progress, done, len(trials) * len(sample.windows), f"{key[0]}: {key[1]}")
    measured = [
        Remedy(name, remedy, (total - cost) / sample.scored, _how(trials[name, remedy], name))
        for (name, remedy), cost in costs.items()
    ]
    measured.sort(key=lambda each: -(each.gain_kl_nats or 0.0))
    impossible = [Remedy(name, SMOOTH, None, reason) for name, reason in reasons.items()]
    return tuple(sorted([*measured, *impossible], key=lambda each: worst.index(each.layer)))


def _fits(scheme: Scheme, linear: nn.Module) -> bool:
    """Whether the layer's K divides into the scheme's groups."""
    granularity = scheme.weights.granularity
    return not isinstance(granularity, PerGroup) or float_operands(linear)[0].shape[1] % granularity.size == 0


def _how(trial: _Trial, name: str) -> str | None:
    """With which alpha a group is smoothed, and with whom."""
    if trial.group is None:
        return None
    parent = name.rpartition(".")[0] + "."
    others = ", ".join(reader.removeprefix(parent) for reader in trial.group.readers if reader != name)
    return f"alpha {trial.group.alpha:.2f}" + (f", together with {others}" if others else "")
