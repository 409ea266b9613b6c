"""What the native kernel does in one pass with a product, and between products, each beside its plain PyTorch version.

    linears     LayerNorm of a sum, quantising, the products of all layers that read the result, an activation of each
    norm        a sum and its LayerNorm
    attention   softmax(scale q k^T + mask) v

The plain versions are the oracles, and what runs where the kernel cannot: on other dtypes and devices, on tensors that
are not plain memory, without a compiled kernel.  What goes into a product is quantised by the contract: the codes are
those of the norm's output, as it is returned.  In float, the kernel is within these of exact arithmetic on the same
operands (tests/kernels/test_fused.py), as PyTorch's own operations are: a norm within 1e-6 (1 + |mean| / deviation) of
the largest magnitude of its output, an activation within 1e-6 of |x|, attention within 4e-6 of the largest magnitude of
v.  All instruction sets give the same bits.

Nobody here looks whether PyTorch's dispatcher has something to do: who calls has seen to that (`w8a8.fusing.blocks`).
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional as F

from w8a8.kernels.compiled import library
from w8a8.kernels.native import Call

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda x: x,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
}
"""By the names that the fusions have, in the order of enum w8a8_activation."""


class Norm(NamedTuple):
    """A LayerNorm over the last axis: weight and bias (K,) or None."""

    weight: Tensor | None
    bias: Tensor | None
    eps: float


Layer = tuple[Mapping[str, Tensor | None], int, int, int, int, int, int]
"""A layer's buffers, its `Call`, and the place of its activation in `ACTIVATIONS`."""


def layer_of(buffers: Mapping[str, Tensor | None], call: Call, activation: str) -> Layer:
    """What `linears` is told of a layer; the buffers are read at each call."""
    return (buffers, *call, list(ACTIVATIONS).index(activation))


Outputs = tuple[Tensor | None, ...]
"""The sum, the norm's output, and then the output of each layer; None for what was not asked for."""


def linears(
    x: Tensor,
    layers: tuple[Layer, ...],
    norm: Norm | None = None,
    add: Tensor | None = None,
    *,
    wants_sum: bool = False,
) -> Outputs | None:
    """The outputs of layers that read one input, in one pass with what stands before and behind them.

    Args:
        x: (..., K) float32.
        layers: From `layer_of`, at most eight, on one grid.
        norm: What is done to `x`, or to `x + add`, first.
        add: As x, or None.
        wants_sum: Whether `x + add` is read by somebody else.

    Returns:
        None where the kernel cannot.
    """
    functions = library()
    before = None if norm is None else (add, *norm, wants_sum)
    found: Outputs | None = None if isinstance(functions, str) else functions.fused(x, before, layers)
    return found


def norm(x: Tensor, norm: Norm, add: Tensor | None = None, *, wants_sum: bool = False) -> Outputs | None:
    """The sum, if it is wanted, and the LayerNorm of it; None where the kernel cannot."""
    functions = library()
    found: Outputs | None = None if isinstance(functions, str) else functions.normalize(x, (add, *norm, wants_sum))
    return found


def plain_norm(x: Tensor, norm: Norm, add: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The oracle of `norm`."""
    total = x if add is None else x + add
    return total, F.layer_norm(total, x.shape[-1:], norm.weight, norm.bias, norm.eps)


def plain_linears(
    x: Tensor,
    layers: Sequence[Callable[[Tensor], Tensor]],
    activations: Sequence[str],
    norm: Norm | None = None,
    add: Tensor | None = None,
) -> Outputs:
    """The oracle of `linears`, by the layers themselves."""
    total, normed = (None, x) if norm is None else plain_norm(x, norm, add)
    outputs = (ACTIVATIONS[name](layer(normed)) for layer, name in zip(layers, activations, strict=True))
    return total, normed, *outputs


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, causal: bool) -> Tensor | None:
    """Attention by heads.

    Args:
        q: (B, H, T, D) float32, any strides but the innermost.
        k, v: (B, Hk, S, D), where Hk divides H.
        mask: (B | 1, H | 1, T | 1, S), float32 to add to the scaled scores, or whether a key is seen; or None.
        scale: Of the scores.
        causal: Whether query i sees the keys 0..i only.

    Returns:
        (B, T, H, D), contiguous.  A query that sees no key gives zeros.  None where the kernel cannot.
    """
    functions = library()
    found: Tensor | None = None if isinstance(functions, str) else functions.attend(q, k, v, mask, scale, causal)
    return found


def run(
    widths: tuple[int, ...],
    steps: tuple[tuple[object, ...], ...],
    inputs: tuple[Tensor, ...],
    masks: tuple[Tensor, ...],
    outputs: tuple[int, ...],
    read: tuple[int, ...] | None,
) -> tuple[Tensor, ...] | None:
    """Many of the above in one call (`w8a8.fusing.plan`).

    Args:
        widths: K of every slot, a matrix of a row per token.
        steps: As csrc/python_plan.cpp has them.
        inputs: (B, T, K) float32, contiguous: the first slots.
        masks: (B | 1, 1, T | 1, T), as for `attention`.
        outputs: The slots that are returned.
        read: None, or: tokens that no query sees are left out, save in sequences in which one of these is such.

    Returns:
        (B, T, K) for each output, zero in rows that were left out.  None where the kernel cannot.
    """
    functions = library()
    if isinstance(functions, str):
        return None
    found: tuple[Tensor, ...] | None = functions.run(widths, steps, inputs, masks, outputs, read)
    return found


def plain_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, causal: bool) -> Tensor:
    """The oracle of `attention`."""
    grouped = q.shape[1] != k.shape[1]
    y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, scale=scale, enable_gqa=grouped)
    return y.transpose(1, 2)


def dispatcher_is_needed() -> bool:
    """Whether somebody looks on, or wants a forward derivative: all then goes through the dispatcher of PyTorch."""
    return (
        torch.compiler.is_compiling()  # first: dynamo sees that it is true, and looks at nothing behind it
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._len_torch_function_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
        or torch.is_autocast_enabled("cpu")
        or forward_ad._current_level >= 0
    )
