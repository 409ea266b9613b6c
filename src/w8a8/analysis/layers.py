"""Which layers matter: what each quantised linear does to itself and to the model's predictions.

On a seeded sample of windows of a text, for every layer L of the scheme, with KL the mean over tokens of
KL(float || model) in nats:

    kl_alone(L)  = KL of the float model in which L alone is quantised
    kl_spared(L) = KL of the quantised model  -  KL of the quantised model in which L alone is float

The first is what L costs when nothing else is wrong, the second what sparing it would win; errors that cancel or add up
make them differ, and where the two orders of layers do not agree, that is told (`Rankings`).  Each figure is measured,
none is a Taylor expansion; `replay` makes that half a forward.  What was measured of a layer by itself is in `measure`.

The alternative, Hessian traces (HAWQ, arXiv:1905.03696), needs gradients and tells about small errors only.
"""

import contextlib
import math
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from w8a8 import convert
from w8a8.analysis.measure import Histogram, LayerMeasure
from w8a8.analysis.replay import block_index, blocks_of, record, replay
from w8a8.analysis.sample import WINDOWS, divergence, draw, layers_for
from w8a8.calibration.calibrate import Calibration, collect
from w8a8.calibration.model_inputs import evaluating
from w8a8.calibration.observers import MinMax, Observer
from w8a8.convert import Progress, Schemes
from w8a8.evaluation.scores import logits_of
from w8a8.evaluation.text import Text
from w8a8.linear import float_operands
from w8a8.report.records import Channels, binned
from w8a8.scheme import PerChannel

TOP = 10


@dataclass(frozen=True)
class LayerSensitivity:
    """What was measured of one linear layer; None for what was not, or has no value (nothing lost: no SQNR).

    name: Dotted.  kind: its last part.  block: its depth; None outside of the blocks.
    group: The first of the layers with the same parent that read the same tensor as this one: q, k and v share one.
    shape: [N, K].
    scheme: Its preset's name, or the scheme in words.
    weight_sqnr_db, input_sqnr_db, output_sqnr_db, cosine, saturated_share: See `w8a8.analysis.measure`.
    dead_share: Of the input channels, those that were always zero.
    outlier_ratio: The input's largest channel absmax over the median one.
    kl_alone, kl_spared: Nats per token; see the module's docstring.
    """

    name: str
    kind: str
    block: int | None
    group: str
    shape: list[int]
    scheme: str
    weight_sqnr_db: float | None
    input_sqnr_db: float | None
    output_sqnr_db: float | None
    cosine: float | None
    saturated_share: float | None
    dead_share: float | None
    outlier_ratio: float | None
    kl_alone: float
    kl_spared: float


@dataclass(frozen=True)
class Rankings:
    """Layers by damage, the worst first; those that only one order has among its worst `top`; how alike the orders are.

    spearman: The rank correlation of the two orders; None for one layer.
    """

    kl_alone: list[str]
    kl_spared: list[str]
    disagree: list[str]
    top: int
    spearman: float | None

    @property
    def overlap(self) -> int:
        """How many layers are among the worst `top` of both."""
        return len({*self.kl_alone[: self.top]} & {*self.kl_spared[: self.top]})


@dataclass(frozen=True)
class Sensitivity:
    """The layers of a model, in its order, and what they were measured on.

    kl_nats: KL(float || quantised) with all of them quantised, per token.
    replayed: Whether forwards began at the changed block; False where that would not have been exact.
    """

    layers: tuple[LayerSensitivity, ...]
    rankings: Rankings
    channels: tuple[Channels, ...]
    histograms: tuple[Histogram, ...]
    kl_nats: float
    tokens: int
    windows: int
    seq_len: int
    seed: int
    replayed: bool

    def worst(self, count: int = TOP) -> list[LayerSensitivity]:
        """The layers that cost most when quantised alone, the worst first."""
        return sorted(self.layers, key=lambda layer: -layer.kl_alone)[:count]

    def to_dict(self) -> dict[str, Any]:
        """For JSON; `from_dict` reads it."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Sensitivity":
        """What `to_dict` gave, from JSON too."""
        parts = {
            "layers": tuple(LayerSensitivity(**layer) for layer in data["layers"]),
            "rankings": Rankings(**data["rankings"]),
            "channels": tuple(Channels(**channels) for channels in data["channels"]),
            "histograms": tuple(Histogram(**histogram) for histogram in data["histograms"]),
        }
        return cls(**{**data, **parts})

    def records(self) -> dict[str, Any]:
        """The parts of a page: layers, rankings, channels and histograms."""
        return {
            "layers": [{k: v for k, v in asdict(layer).items() if k != "group"} for layer in self.layers],
            "rankings": {k: v for k, v in asdict(self.rankings).items() if k not in ("top", "spearman")},
            "channels": [asdict(channels) for channels in self.channels],
            "histograms": [asdict(histogram) for histogram in self.histograms],
        }


def sensitivity(
    model: Any,
    text: Text | Tensor,
    scheme: Schemes = "w8a8",
    *,
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
    windows: int = WINDOWS,
    seq_len: int | None = None,
    seed: int = 0,
    calibration: Any = None,
    observer: str | Callable[[], Observer] = "absmax",
    before_smoothing: Mapping[str, Tensor] | None = None,
    progress: Progress | None = None,
) -> Sensitivity:
    """Measure what quantising each layer does to it and to the model's predictions.

    Args:
        model: A float causal language model.  Not modified.
        text: What `w8a8.evaluation.encode` makes, or (T,) token ids.
        scheme: Any scheme, by layer too, as for `w8a8.quantize`; what integers cannot run is simulated.
        include, exclude: As for `w8a8.quantize`.
        windows: How many are drawn from the text; all where it has fewer.
        seq_len: Tokens in a window, by default the model's context, at most 256.
        seed: Of the drawing.
        calibration, observer: For static schemes; by default the drawn windows are what scales are measured on.
        before_smoothing: What `channel_absmax` found before the model was smoothed, for the record.
        progress: Called as progress(done, total, layer).

    Raises:
        SchemeError, PatternError, NonFiniteError, CalibrationError: as `w8a8.quantize`.
        ModelError, TextError: as `w8a8.evaluation.perplexity`.
    """
    selection, schemes = convert.assign(convert.select(model, include, exclude), scheme)
    sample = draw(model, text, windows=windows, seq_len=seq_len, seed=seed)
    data = sample.calibration()
    layers = layers_for(
        model, selection, schemes, data if calibration is None else Calibration.of(calibration), observer
    )
    names = list(layers)
    ranges = _ranges(model, names, data)
    measures = {
        name: LayerMeasure(model.get_submodule(name), layers[name], *ranges[name]) for name in names if name in ranges
    }
    alone, spared = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0.0)
    groups = dict(zip(names, names, strict=True))
    total, replayed = 0.0, True
    for i, (start, ids) in enumerate(sample.windows):
        groups = observe_readers(model, ids, start, names, measures)
        exact = record(model, ids, start, {})
        quantized = record(model, ids, start, layers)
        total += divergence(exact, quantized.logits)
        replayed &= bool(exact.outputs) and bool(quantized.outputs)
        for done, name in enumerate(names, start=1):
            alone[name] += divergence(exact, replay(model, exact, {name: layers[name]}, [name]))
            others = {other: layer for other, layer in layers.items() if other != name}
            spared[name] += divergence(exact, replay(model, quantized, others, [name]))
            if progress is not None:
                progress(i * len(names) + done, len(sample.windows) * len(names), name)
    tokens = sample.scored
    blocks = blocks_of(model)
    found = tuple(
        LayerSensitivity(
            name=name,
            kind=name.rpartition(".")[2],
            block=block_index(blocks, name) if any(name.startswith(block + ".") for block in blocks) else None,
            group=groups[name],
            shape=list(float_operands(model.get_submodule(name))[0].shape),
            scheme=schemes[name].name,
            **_figures(measures.get(name), ranges.get(name)),
            kl_alone=alone[name] / tokens,
            kl_spared=(total - spared[name]) / tokens,
        )
        for name in names
    )
    return Sensitivity(
        layers=found,
        rankings=rankings(found),
        channels=_channels(ranges, before_smoothing),
        histograms=tuple(h for name, measure in measures.items() for h in measure.histograms(name)),
        kl_nats=total / tokens,
        tokens=tokens,
        windows=len(sample.windows),
        seq_len=sample.seq_len,
        seed=seed,
        replayed=replayed,
    )


def channel_absmax(model: Any, text: Text | Tensor, **options: Any) -> dict[str, Tensor]:
    """The largest magnitude of each input channel of each float linear, (K,), to compare with after smoothing.

    Args:
        model: Not modified.
        text: As for `sensitivity`.
        options: `windows`, `seq_len` and `seed`, as for `sensitivity`.
    """
    sample = draw(model, text, **options)
    found = _ranges(model, convert.select(model).chosen, sample.calibration())
    return {name: torch.maximum(-lo, hi) for name, (lo, hi) in found.items()}


def rankings(layers: Sequence[LayerSensitivity], top: int = TOP) -> Rankings:
    """The two orders, and where they do not agree."""
    alone = [layer.name for layer in sorted(layers, key=lambda layer: -layer.kl_alone)]
    spared = [layer.name for layer in sorted(layers, key=lambda layer: -layer.kl_spared)]
    top = min(top, math.ceil(len(layers) / 2))  # of few layers, all would be among the worst
    heads = {*alone[:top]} ^ {*spared[:top]}
    place = {name: rank for rank, name in enumerate(spared)}
    n = len(layers)
    squares = sum((rank - place[name]) ** 2 for rank, name in enumerate(alone))
    spearman = 1 - 6 * squares / (n * (n * n - 1)) if n > 1 else None
    return Rankings(alone, spared, [name for name in alone if name in heads], top, spearman)


def _ranges(model: nn.Module, names: Sequence[str], data: Calibration) -> dict[str, tuple[Tensor, Tensor]]:
    """The smallest and largest value of each input channel, (K,) each, of the layers that the data reaches."""
    found = collect(model, data, {name: MinMax(PerChannel()) for name in names})
    return {
        name: (observer.seen().lo.flatten(), observer.seen().hi.flatten())
        for name, observer in found.items()
        if observer.tokens
    }


def observe_readers(
    model: nn.Module,
    ids: Tensor,
    start: int,
    names: Sequence[str],
    measures: Mapping[str, LayerMeasure] | None = None,
) -> dict[str, str]:
    """Who reads the same tensor, seen in one float forward.

    Args:
        model: Not modified.
        ids: (T,) the window; start: where it begins in the text.
        names: Of the linear layers.
        measures: Fed with each layer's input and output, where given.

    Returns:
        For each layer the first one with the same parent that read the same tensor: often itself.
    """
    found = dict(zip(names, names, strict=True))
    readers: dict[tuple[str, int], tuple[weakref.ref[Tensor], str]] = {}

    def hook(name: str) -> Any:
        def see(module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
            x = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
            key = name.rpartition(".")[0], id(x)
            if key not in readers or readers[key][0]() is not x:  # the id may be a dead tensor's
                readers[key] = weakref.ref(x), name
            found[name] = readers[key][1]
            if measures is not None:
                measures[name].update(x, output)

        return see

    with contextlib.ExitStack() as stack:
        stack.enter_context(evaluating(model))
        for name in names:
            handle = model.get_submodule(name).register_forward_hook(hook(name), with_kwargs=True)
            stack.callback(handle.remove)
        logits_of(model, ids, start)
    return found


def _figures(measure: LayerMeasure | None, ranges: tuple[Tensor, Tensor] | None) -> dict[str, Any]:
    if measure is None or ranges is None:
        names = ("weight_sqnr_db", "input_sqnr_db", "output_sqnr_db", "cosine", "saturated_share")
        return dict.fromkeys((*names, "dead_share", "outlier_ratio"))
    absmax = torch.maximum(-ranges[0], ranges[1])
    live = absmax[absmax > 0]
    return {
        **measure.figures(),
        "dead_share": 1 - len(live) / len(absmax),
        "outlier_ratio": float(live.max() / live.median()) if len(live) else None,
    }


def _channels(ranges: Mapping[str, tuple[Tensor, Tensor]], before: Mapping[str, Tensor] | None) -> tuple[Channels, ...]:
    found = []
    for name, (lo, hi) in ranges.items():
        now = binned(torch.maximum(-lo, hi).tolist())
        if before is None or name not in before:
            found.append(Channels(name, now))
        else:
            found.append(Channels(name, binned(before[name].tolist()), now))
    return tuple(found)
