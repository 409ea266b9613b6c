"""The request: which numbers share a scale, how wide the grid is, and whether integers can run it.

A `Scheme` says what is wanted of every linear layer: one `QuantSpec` for the weight, one for the
activation (or none: the activation stays float).  A granularity is a small type that carries only what it
needs, so that a group size without groups cannot be written down.

Legend of shapes, here and everywhere: M tokens, N out_features, K in_features, G groups along K.

    operand              granularity    who shares a scale             shape of the scale
    weight (N, K)        PerTensor      all                            (1, 1)
                         PerChannel     one output row                 (N, 1)
                         PerColumn      one input column               (1, K)
                         PerGroup(s)    s neighbours along K           (N, G)
    activation (..., K)  PerTensor      all tokens and channels        (1, ..., 1)
                         PerToken       one token                      (..., 1)
                         PerChannel     one input channel, all tokens  (1, ..., K)

The presets are a literal dictionary, `PRESETS`.  Strings are looked up in it by `Scheme.of` and mean
nothing anywhere else.
"""

import enum
from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

from w8a8.errors import SchemeError, closest


class Operand(enum.Enum):
    """Which side of the product a tensor is on: the same word, per channel, reduces other axes."""

    WEIGHT = "weight"
    ACTIVATION = "activation"


@dataclass(frozen=True)
class PerTensor:
    """One scale for the whole tensor."""

    def __str__(self) -> str:
        return "tensor"


@dataclass(frozen=True)
class PerChannel:
    """Weights: one scale per output row.  Activations: one per input channel, over all tokens."""

    def __str__(self) -> str:
        return "channel"


@dataclass(frozen=True)
class PerColumn:
    """Weights only: one scale per input column."""

    def __str__(self) -> str:
        return "column"


@dataclass(frozen=True)
class PerToken:
    """Activations only: one scale per token."""

    def __str__(self) -> str:
        return "token"


@dataclass(frozen=True)
class PerGroup:
    """Weights only: one scale per `size` neighbours along K.

    Raises:
        SchemeError: `size` is not a positive integer.
    """

    size: int

    def __post_init__(self) -> None:
        if not _is_int(self.size) or self.size < 1:
            raise SchemeError(f"PerGroup needs a positive integer size, found {self.size!r}; 128 is common")

    def __str__(self) -> str:
        return f"group{self.size}"


Granularity: TypeAlias = PerTensor | PerChannel | PerColumn | PerToken | PerGroup

_ALLOWED: dict[Operand, tuple[type, ...]] = {
    Operand.WEIGHT: (PerTensor, PerChannel, PerColumn, PerGroup),
    Operand.ACTIVATION: (PerTensor, PerToken, PerChannel),
}
_INSTEAD = {
    (Operand.WEIGHT, PerToken): "a weight has no tokens: use PerChannel (one scale per output row)",
    (Operand.ACTIVATION, PerColumn): "a column of an activation is a channel: use PerChannel",
    (Operand.ACTIVATION, PerGroup): "groups are for weights: use PerToken",
}

MAX_BITS = 16  # the widest grid that can be simulated
_WAY_OUT = "give calibration= (--calib FILE), or take a dynamic scheme; `w8a8 schemes` lists them"
MAX_CODE_BITS = 8  # the widest grid whose codes fit int8
CODE_REACH = 128  # of any int8: what a weight made elsewhere may hold, -2**(bits-1) among it


@dataclass(frozen=True)
class QuantSpec:
    """How one operand is put on an integer grid.

    Args:
        bits: Width of the grid, 2..16.  Codes exist (as int8) up to 8; wider grids are simulated only.
        granularity: Which elements share a scale.
        symmetric: Absmax scale without a zero point; else the range [min, max], widened to hold zero.
        dynamic: The scale is computed from each tensor as it comes.  A static one (False) is measured
            beforehand on calibration data and stored.  Weights are quantised once either way.

    Raises:
        SchemeError: `bits` is not an integer in 2..16, or `granularity` is not one of the five types.
    """

    bits: int = 8
    granularity: Granularity = PerTensor()
    symmetric: bool = True
    dynamic: bool = True

    def __post_init__(self) -> None:
        if not _is_int(self.bits) or not 2 <= self.bits <= MAX_BITS:
            raise SchemeError(
                f"bits={self.bits!r} is out of range: integer codes have 2..{MAX_CODE_BITS} bits, simulation "
                f"goes up to {MAX_BITS}; use bits=8 unless you study other widths"
            )
        if not isinstance(self.granularity, PerTensor | PerChannel | PerColumn | PerToken | PerGroup):
            raise SchemeError(
                f"granularity={self.granularity!r} is not a granularity; use an instance of PerTensor, "
                "PerChannel, PerColumn, PerToken or PerGroup, for example PerChannel()"
            )

    @property
    def qmin(self) -> int:
        """The lowest code.

        A scale that is taken from the tensor itself never makes -2**(bits-1) on a symmetric grid.  One that was
        measured beforehand meets values beyond it, and saturates there as everybody's kernels do.
        """
        return -self.qmax if self.symmetric and self.dynamic else -(2 ** (self.bits - 1))

    @property
    def qmax(self) -> int:
        """The highest code: 2**(bits-1) - 1."""
        return int(2 ** (self.bits - 1)) - 1

    @property
    def reach(self) -> int:
        """The largest |code - zero_point| that can occur."""
        return max(self.qmax, -self.qmin) if self.symmetric else self.qmax - self.qmin

    def check(self, operand: Operand) -> None:
        """Raise `SchemeError` where the granularity makes no sense for the operand."""
        if not isinstance(self.granularity, _ALLOWED[operand]):
            allowed = ", ".join(kind.__name__ for kind in _ALLOWED[operand])
            why = _INSTEAD[operand, type(self.granularity)]
            raise SchemeError(f"{self.granularity!r} does not fit an {operand.value}: {why} (it can have {allowed})")

    def __str__(self) -> str:
        parts = [f"int{self.bits}", str(self.granularity), "sym" if self.symmetric else "asym"]
        return " ".join(parts if self.dynamic else [*parts, "static"])


@dataclass(frozen=True)
class Scheme:
    """What is wanted of every linear layer.

    Args:
        weights: The grid of the weight.
        activations: The grid of the input, or None: the input stays float (weight-only).

    Raises:
        SchemeError: a granularity does not fit its operand.

    Example:
        >>> Scheme.of("w8a8").integer_executable
        True
        >>> Scheme(QuantSpec(granularity=PerColumn()), QuantSpec(granularity=PerToken())).integer_executable
        False
    """

    weights: QuantSpec
    activations: QuantSpec | None = None

    def __post_init__(self) -> None:
        self.weights.check(Operand.WEIGHT)
        if self.activations is not None:
            self.activations.check(Operand.ACTIVATION)
        if self.measured is not None and not isinstance(self.measured.granularity, PerTensor):
            raise SchemeError(
                f"static activations {self.measured.granularity!r} are unknown: a scale that is fixed beforehand is "
                "one per tensor; use PerTensor() or dynamic=True"
            )

    @classmethod
    def of(cls, scheme: "Scheme | str") -> "Scheme":
        """The scheme itself, or the preset of that name.

        Raises:
            SchemeError: no preset has this name; the message lists them.
        """
        if isinstance(scheme, Scheme):
            return scheme
        if not isinstance(scheme, str) or scheme not in PRESETS:
            raise SchemeError(
                f"unknown scheme {scheme!r} ({closest(str(scheme), PRESETS)}); presets: {', '.join(PRESETS)}; "
                "anything else is written as Scheme(weights=QuantSpec(...), activations=QuantSpec(...))"
            )
        return PRESETS[scheme].scheme

    @property
    def name(self) -> str:
        """The preset's name, or the description of a scheme that is none."""
        return next((name for name, preset in PRESETS.items() if preset.scheme == self), str(self))

    @cached_property
    def not_executable_because(self) -> str | None:
        """Why the product cannot be computed in integers, with the way out; None where it can."""
        weights, activations = self.weights, self.activations
        if activations is None:
            return (
                "the activations stay float, so there are no integers to multiply; "
                "the weights are stored as int8 and multiplied in float"
            )
        varies_along_k = "a scale that varies along K cannot leave the integer sum"
        if isinstance(weights.granularity, PerColumn):
            return f"per-column weights: {varies_along_k}; use PerChannel() for the weights, or simulate"
        if isinstance(activations.granularity, PerChannel):
            return f"per-channel activations: {varies_along_k}; use PerToken() for the activations, or simulate"
        widest = max(weights.bits, activations.bits)
        if widest > MAX_CODE_BITS:
            return f"{widest} bits do not fit int8 codes; use {MAX_CODE_BITS} bits or fewer, or simulate"
        return None

    @property
    def integer_executable(self) -> bool:
        """Whether the product can be computed in integers; `not_executable_because` tells why not."""
        return self.not_executable_because is None

    @property
    def measured(self) -> QuantSpec | None:
        """The grid of the activations where its scale is measured beforehand, which takes calibration data."""
        return None if self.activations is None or self.activations.dynamic else self.activations

    @property
    def static(self) -> bool:
        """Whether there is such a grid."""
        return self.measured is not None

    def check_without_data(self, way_out: str = _WAY_OUT) -> None:
        """Raise `SchemeError` where its static scales cannot be had without calibration data."""
        if self.static:
            raise SchemeError(
                f"the scheme {self.name} has static activation scales, and there is no calibration data to measure "
                f"them on: {way_out}"
            )

    @property
    def weight_only(self) -> bool:
        """Whether the activations stay float: int8 weights, float product."""
        return self.activations is None

    def __str__(self) -> str:
        activations = "float" if self.activations is None else str(self.activations)
        return f"weights {self.weights}, activations {activations}"


@dataclass(frozen=True)
class Preset:
    """A named scheme and what it is for."""

    scheme: Scheme
    about: str


def largest_k(activation_reach: int, weight_reach: int) -> int:
    """The longest sum that surely fits in int32, of products of codes that reach this far from their zero points."""
    return (2**31 - 1) // (activation_reach * weight_reach)


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


_W_CHANNEL = QuantSpec(granularity=PerChannel())
_W_TENSOR = QuantSpec(granularity=PerTensor())
_A_TOKEN = QuantSpec(granularity=PerToken())
_A_TENSOR = QuantSpec(granularity=PerTensor())
_A_STATIC = QuantSpec(granularity=PerTensor(), dynamic=False)

AUTO = "auto"
"""Where a scheme is asked for of a model: the preset that is usual for what the model is (`w8a8.model.kinds`)."""

PRESETS: dict[str, Preset] = {
    "w8a8": Preset(Scheme(_W_CHANNEL, _A_TOKEN), "usual for language models, and what vLLM calls W8A8"),
    "w8a8-asym": Preset(
        Scheme(_W_CHANNEL, QuantSpec(granularity=PerToken(), symmetric=False)),
        "activations with a zero point: usual for encoders; for one-sided inputs, as after ReLU or GELU",
    ),
    "w8a8-tensor": Preset(Scheme(_W_CHANNEL, _A_TENSOR), "one activation scale per call"),
    "w8a8-o1": Preset(Scheme(_W_TENSOR, _A_TOKEN), "SmoothQuant O1 (Table 2): weights per tensor"),
    "w8a8-o2": Preset(Scheme(_W_TENSOR, _A_TENSOR), "SmoothQuant O2 (Table 2): both per tensor, dynamic"),
    "w8a8-static": Preset(Scheme(_W_CHANNEL, _A_STATIC), "activation scales measured beforehand, on calibration data"),
    "w8a8-o3": Preset(Scheme(_W_TENSOR, _A_STATIC), "SmoothQuant O3 (Table 2): both per tensor, static"),
    "w8a16": Preset(Scheme(_W_CHANNEL, None), "weight-only: int8 in memory, products in float"),
}
