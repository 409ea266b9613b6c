"""Which layers matter: what each quantised linear does to itself and to the model's predictions.

On a seeded sample of windows of a text, for every layer L of the scheme, with KL the mean over tokens, or texts, of
KL(float || model) in nats, by what a model of its kind tells (`answers`; of an embedder 1 - cosine):

    kl_alone(L)  = KL of the float model in which L alone is quantised
    kl_spared(L) = KL of the quantised model  -  KL of the quantised model in which L alone is float

The first is what L costs when nothing else is wrong, the second what sparing it would win; errors that cancel or add up
make them differ, and where the two orders of layers do not agree, that is told (`Rankings`).  Each figure is measured,
none is a Taylor expansion; `replay` makes that half a forward.  What was measured of a layer by itself is in `measure`.

The alternative, Hessian traces (HAWQ, arXiv:1905.03696), needs gradients and tells about small errors only.
"""

import math
from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from w8a8.analysis.errors import channels, measured_alone
from w8a8.analysis.replay import record, replay
from w8a8.analysis.sample import WINDOWS, draw, layers_for
from w8a8.calibration.data import Calibration
from w8a8.calibration.observers import Observer
from w8a8.core.progress import Progress, tell
from w8a8.core.scheme import AUTO
from w8a8.evaluation.text import Text
from w8a8.model.kinds import READS_TEXT, Asked
from w8a8.model.pretrained import Pretrained
from w8a8.model.selection import Schemes, assign, scheme_of, select
from w8a8.records.layers import TOP, LayerSensitivity, Rankings, Sensitivity

ASKED = Asked("the sensitivity of layers", READS_TEXT)


def sensitivity(
    model: Pretrained,
    text: Text | Tensor,
    scheme: Schemes = AUTO,
    *,
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
    windows: int = WINDOWS,
    seq_len: int | None = None,
    seed: int = 0,
    calibration: object = None,
    observer: str | Callable[[], Observer] = "absmax",
    before_smoothing: Mapping[str, Tensor] | None = None,
    progress: Progress | None = None,
) -> Sensitivity:
    """Measure what quantising each layer does to it and to the model's predictions.

    Args:
        model: Float, of transformers, and one that reads text.  Not modified.
        text: What `w8a8.evaluation.encode` makes, or of a causal language model (T,) token ids.
        scheme: Of any kind, by layer too, as for `w8a8.quantize`; what integers cannot run is simulated.
        include, exclude: As for `w8a8.quantize`.
        windows: How many are drawn from the text; all where it has fewer.
        seq_len: Tokens in a window, by default the model's context, at most 256, of an encoder 128.
        seed: Of the drawing.
        calibration, observer: For static schemes; by default the drawn windows are what scales are measured on.
        before_smoothing: What `channel_absmax` found before the model was smoothed, for the record.
        progress: Called as progress(done, total, layer).

    Raises:
        SchemeError, PatternError, NonFiniteError, CalibrationError: as `w8a8.quantize`.
        ModelError, TextError: as `w8a8.evaluation.perplexity`.
    """
    ASKED.check_model(model)
    _, schemes = assign(select(model, include, exclude), scheme_of(model, scheme))
    sample = draw(model, text, windows=windows, seq_len=seq_len, seed=seed)
    data = sample.calibration()
    layers = layers_for(model, schemes, data if calibration is None else Calibration.of(calibration), observer)
    errors, measures, ranges = measured_alone(model, layers, sample)
    names = list(layers)
    alone, spared = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0.0)
    total, replayed = 0.0, True
    for i, window in enumerate(sample.windows):
        exact = record(model, window, {})
        quantized = record(model, window, layers)
        total += exact.divergence(quantized.answer)
        replayed &= bool(exact.outputs) and bool(quantized.outputs)
        for done, name in enumerate(names, start=1):
            alone[name] += exact.divergence(replay(model, exact, {name: layers[name]}, [name]))
            others = {other: layer for other, layer in layers.items() if other != name}
            spared[name] += exact.divergence(replay(model, quantized, others, [name]))
            tell(progress, i * len(names) + done, len(sample.windows) * len(names), name)
    tokens = sample.scored
    found = tuple(
        LayerSensitivity(
            **vars(each), kl_alone=alone[each.name] / tokens, kl_spared=(total - spared[each.name]) / tokens
        )
        for each in errors
    )
    return Sensitivity(
        layers=found,
        rankings=rankings(found),
        channels=channels(ranges, before_smoothing),
        histograms=tuple(h for name, measure in measures.items() for h in measure.histograms(name)),
        kl_nats=total / tokens,
        tokens=tokens,
        windows=len(sample.windows),
        seq_len=sample.seq_len,
        seed=seed,
        replayed=replayed,
        measure=sample.told.value,
    )


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
