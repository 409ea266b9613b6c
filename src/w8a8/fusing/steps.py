"""What a fused graph runs in the place of several operations: the native pass, or the plain operations without it."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from torch import Tensor, nn

from w8a8 import kernels
from w8a8.kernels import fused
from w8a8.layers.linear import QuantLinear

Run: TypeAlias = Callable[..., list[Tensor | None]]
"""The function of a graph: from the tensors among the arguments to its outputs."""

Place: TypeAlias = tuple[Mapping[str, Tensor | None], str]
"""Something that the block holds: the parameters or buffers of a module, and its name there."""


@dataclass
class Told:
    """What was fused in one block, and what was not: how often."""

    fused: Counter[str] = field(default_factory=Counter)
    left: Counter[str] = field(default_factory=Counter)


def item(found: Sequence[Tensor | None], place: int) -> Tensor | None:
    """One of the outputs of a step."""
    return found[place]


class NormOf:
    """A LayerNorm as the block holds it: its parameters are looked up at each call."""

    def __init__(self, weight: Place | None, bias: Place | None, eps: float):
        self.weight, self.bias, self.eps = weight, bias, eps

    def now(self) -> fused.Norm:
        weight = None if self.weight is None else self.weight[0][self.weight[1]]
        bias = None if self.bias is None else self.bias[0][self.bias[1]]
        return fused.Norm(weight, bias, self.eps)


class Linears:
    """Layers that read one input: (x, add) -> (sum, norm, outputs...)."""

    __name__ = "linears"

    def __init__(
        self, layers: list[QuantLinear], activations: list[str], norm: NormOf | None = None, *, wants_sum: bool = False
    ) -> None:
        self.layers, self.activations, self.norm, self.wants_sum = layers, activations, norm, wants_sum
        self.native = tuple(
            fused.layer_of(layer._buffers, layer._call, name) for layer, name in zip(layers, activations, strict=True)
        )
        self.numbers = [layer._number for layer in layers]

    def __call__(self, x: Tensor, add: Tensor | None = None) -> fused.Outputs:
        norm = None if self.norm is None else self.norm.now()
        found = fused.linears(x, self.native, norm, add, wants_sum=self.wants_sum)
        if found is None:
            return fused.plain_linears(x, self.layers, self.activations, norm, add)
        for number in self.numbers:
            kernels.count(number, kernels.native.NATIVE.name)
        return found


class NormStep:
    """A norm that no layer reads alone: (x, add) -> (sum, norm)."""

    __name__ = "norm"

    def __init__(self, norm: NormOf, *, wants_sum: bool = False) -> None:
        self.norm, self.wants_sum = norm, wants_sum

    def __call__(self, x: Tensor, add: Tensor | None = None) -> fused.Outputs:
        norm = self.norm.now()
        found = fused.norm(x, norm, add, wants_sum=self.wants_sum)
        return fused.plain_norm(x, norm, add) if found is None else found


class Attention:
    """Attention by heads: (q, k, v, mask) -> (B, T, H, D)."""

    __name__ = "attention"

    def __init__(self, scale: float, *, causal: bool) -> None:
        self.scale, self.causal = scale, causal

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        found = fused.attention(q, k, v, mask, self.scale, self.causal)
        return fused.plain_attention(q, k, v, mask, self.scale, self.causal) if found is None else found


class Layer:
    """A quantised layer by itself, as the model calls it."""

    __name__ = "layer"

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer

    def __call__(self, x: Tensor) -> Tensor:
        found: Tensor = self.layer(x)
        return found


class Held:
    """Something that the block holds, looked up at each call."""

    __name__ = "held"

    def __init__(self, place: Place) -> None:
        self.place = place

    def __call__(self) -> Tensor | None:
        return self.place[0][self.place[1]]
