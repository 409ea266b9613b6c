"""What was measured of single layers: errors, effects on the predictions, and what would help."""

import itertools
from dataclasses import asdict, dataclass, field

from w8a8.core.plain import Json

TOP = 10
"""How many layers are named as the worst."""

MAX_COLUMNS = 128  # of a heat map: more are narrower than a pixel on a phone


@dataclass(frozen=True)
class LayerErrors:
    """What was measured of one linear layer; None for what was not, or has no value (nothing lost: no SQNR).

    name: Dotted.  kind: its last part.  block: its depth; None outside of the blocks.
    group: The first of the layers with the same parent that read the same tensor as this one: q, k and v share one.
    shape: [N, K].
    scheme: Its preset's name, or the scheme in words.
    weight_sqnr_db, input_sqnr_db, output_sqnr_db, cosine, saturated_share: See `w8a8.analysis.measure`.
    dead_share: Of the input channels, those that were always zero.
    outlier_ratio: The input's largest channel absmax over the median one.
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


@dataclass(frozen=True)
class LayerSensitivity(LayerErrors):
    """The same, and what the layer does to the predictions.

    kl_alone, kl_spared: Nats per token, or per text; see `w8a8.analysis.layers`.
    """

    kl_alone: float
    kl_spared: float


@dataclass(frozen=True)
class Rankings:
    """Layers by damage, the worst first; those that only one order has among its worst `top`; how alike the orders are.

    spearman: The rank correlation of the two orders; None for one layer.
    """

    kl_alone: list[str]
    kl_spared: list[str]
    disagree: list[str] = field(default_factory=list)
    top: int = TOP
    spearman: float | None = None

    @property
    def overlap(self) -> int:
        """How many layers are among the worst `top` of both."""
        return len({*self.kl_alone[: self.top]} & {*self.kl_spared[: self.top]})


@dataclass(frozen=True)
class Channels:
    """Absmax of a layer's input channels, at most `MAX_COLUMNS`; `after` smoothing, or None."""

    layer: str
    before: list[float]
    after: list[float] | None = None


@dataclass(frozen=True)
class Histogram:
    """A tensor's values and the grid that rounds them.

    what: "weight" or "input".
    edges: Bin edges, ascending, one more than `counts`.
    scale, zero_point, qmin, qmax: The grid: (q - zero_point) * scale for q in qmin..qmax; the loosest one where there
        are several.  qmin is -qmax where it is not given.
    """

    layer: str
    what: str
    edges: list[float]
    counts: list[int]
    scale: float
    qmax: int
    qmin: int | None = None
    zero_point: int = 0


@dataclass(frozen=True)
class Sensitivity:
    """The layers of a model, in its order, and what they were measured on.

    kl_nats: KL(float || quantised) with all of them quantised, per token or per text.
    tokens: How many of these there are.
    replayed: Whether forwards began at the changed block; False where that would not have been exact.
    measure: What KL is of a model of this kind, in words: see `w8a8.analysis.answers`.
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
    measure: str = "KL(float || quantised), nats per token"

    def worst(self, count: int = TOP) -> list[LayerSensitivity]:
        """The layers that cost most when quantised alone, the worst first."""
        return sorted(self.layers, key=lambda layer: -layer.kl_alone)[:count]

    def to_dict(self) -> dict[str, object]:
        """For JSON; `from_dict` reads it."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Json) -> "Sensitivity":
        """What `to_dict` gave, from JSON too."""
        parts = {
            "layers": tuple(LayerSensitivity(**layer) for layer in data["layers"]),
            "rankings": Rankings(**data["rankings"]),
            "channels": tuple(Channels(**channels) for channels in data["channels"]),
            "histograms": tuple(Histogram(**histogram) for histogram in data["histograms"]),
        }
        return cls(**{**data, **parts})

    def records(self) -> dict[str, object]:
        """The parts of a page: layers, rankings, channels and histograms."""
        return {
            "layers": [{k: v for k, v in asdict(layer).items() if k != "group"} for layer in self.layers],
            "rankings": {k: v for k, v in asdict(self.rankings).items() if k not in ("top", "spearman")},
            "channels": [asdict(channels) for channels in self.channels],
            "histograms": [asdict(histogram) for histogram in self.histograms],
        }


@dataclass(frozen=True)
class Remedy:
    """What would help a layer.

    gain_kl_nats: The measured fall of the model's KL, nats; negative: it would harm; None: it cannot be done.
    note: How it was done, or why it cannot be.
    """

    layer: str
    remedy: str
    gain_kl_nats: float | None = None
    note: str | None = None


@dataclass(frozen=True)
class Choice:
    """One way to spend bytes; `measured_kl_nats` is None where only the sum of the layers' costs is known."""

    bytes: int
    predicted_kl_nats: float
    measured_kl_nats: float | None = None


def binned(absmax: list[float], columns: int = MAX_COLUMNS) -> list[float]:
    """At most so many columns: the largest of each run of neighbours, so that no outlier is averaged away."""
    if len(absmax) <= columns:
        return list(absmax)
    cuts = [i * len(absmax) // columns for i in range(columns + 1)]
    return [max(absmax[a:b]) for a, b in itertools.pairwise(cuts)]
