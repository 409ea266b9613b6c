"""What would help the worst layers, each remedy measured in the quantised model.

For a layer L of a quantised model, a remedy is another scheme for L alone, or float; its gain is

    KL(float || quantised)  -  KL(float || quantised, with L so)      in nats per token.

Measured on the windows that the sensitivity was, with the same replays.  Schemes that are L's own, or that cannot run,
are left out.  Smoothing is no remedy of one layer: it changes all that read one tensor; `w8a8.smooth_` measures it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from w8a8 import convert
from w8a8.analysis.layers import Sensitivity
from w8a8.analysis.replay import record, replay
from w8a8.analysis.sample import divergence, draw, layers_for
from w8a8.convert import Schemes
from w8a8.evaluation.text import Text
from w8a8.scheme import Scheme

REMEDIES = ("w8a8", "w8a8-asym", "w8a16")
LEAVE = "leave in float"


@dataclass(frozen=True)
class Remedy:
    """What would help a layer, and the measured fall of the model's KL, nats per token; negative: it would harm."""

    layer: str
    remedy: str
    gain_kl_nats: float


def remedies(
    model: Any,
    text: Text | Tensor,
    found: Sensitivity,
    scheme: Schemes = "w8a8",
    *,
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
    count: int = 5,
    options: Sequence[Scheme | str] = REMEDIES,
) -> tuple[Remedy, ...]:
    """For each of the worst layers, every remedy, the best first.

    Args:
        model, text, scheme, include, exclude: As they were for `found`; the model is not modified.
        found: The sensitivity; its windows are drawn again.
        count: How many layers.
        options: Schemes to try; float is always tried.

    Raises:
        W8A8Error: as `w8a8.sensitivity`.
    """
    selection, schemes = convert.assign(convert.select(model, include, exclude), scheme)
    sample = draw(model, text, windows=found.windows, seq_len=found.seq_len, seed=found.seed)
    data = sample.calibration()
    layers = layers_for(model, selection, schemes, data)
    trials: list[tuple[str, str, dict[str, Any]]] = []
    for worst in found.worst(count):
        name = worst.name
        others = {other: layer for other, layer in layers.items() if other != name}
        trials.append((name, LEAVE, others))
        for option in map(Scheme.of, options):
            if option != schemes[name]:
                one, given = convert.assign(convert.select(model, [name]), option)
                trials.append((name, option.name, others | layers_for(model, one, given, data)))
    total, costs = 0.0, [0.0] * len(trials)
    for start, ids in sample.windows:
        exact, quantized = record(model, ids, start, {}), record(model, ids, start, layers)
        total += divergence(exact, quantized.logits)
        for i, (name, _, changed) in enumerate(trials):
            costs[i] += divergence(exact, replay(model, quantized, changed, [name]))
    made = [
        Remedy(name, remedy, (total - cost) / sample.scored)
        for (name, remedy, _), cost in zip(trials, costs, strict=True)
    ]
    rank = {layer.name: i for i, layer in enumerate(found.worst(count))}
    return tuple(sorted(made, key=lambda each: (rank[each.layer], -each.gain_kl_nats)))
