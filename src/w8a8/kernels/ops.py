"""The one op: a linear layer in integers, declared once, whatever kernel runs it.

    w8a8::int8_linear(x, weight, ...) -> y

Its arithmetic is the contract (docs/design.md), which leaves no rounding open: every kernel returns the
same bits.  PyTorch sees one opaque op, so that `torch.compile(fullgraph=True)` passes over it; the kernel
is picked inside, when the input is known, by `w8a8.kernels.select`, and written into the ledger there.

Inference only: asking for a gradient is an error rather than a wrong number.
"""

from collections import Counter, defaultdict
from typing import Any

import torch
from torch import Tensor

from w8a8.errors import SchemeError
from w8a8.kernels import native
from w8a8.kernels.request import LinearRequest
from w8a8.kernels.select import select

_LIBRARY = torch.library.Library("w8a8", "DEF")
_LIBRARY.define(
    "int8_linear(Tensor x, Tensor weight, Tensor weight_scale, Tensor weight_sum, "
    "Tensor? weight_zero_point, Tensor? bias, Tensor? input_scale, Tensor? input_zero_point, int bits, bool per_token, "
    "bool symmetric, int in_features, str kernel, bool strict, int layer) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)

_IN_FEATURES = 7  # its place after weight_sum
_LEDGER: defaultdict[int, Counter[str]] = defaultdict(Counter)


def calls(layer: int) -> dict[str, int]:
    """How often each kernel ran for the layer of this number."""
    return dict(_LEDGER.get(layer, {}))


def count(layer: int, kernel: str) -> None:
    """Enter one call into the ledger."""
    _LEDGER[layer][kernel] += 1


def forget(layer: int) -> None:
    """Drop the layer's entries from the ledger."""
    _LEDGER.pop(layer, None)


def _int8_linear(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    weight_sum: Tensor,
    weight_zero_point: Tensor | None,
    bias: Tensor | None,
    input_scale: Tensor | None,
    input_zero_point: Tensor | None,
    bits: int,
    per_token: bool,
    symmetric: bool,
    in_features: int,
    kernel: str,
    strict: bool,
    layer: int,
) -> Tensor:
    check_input(x, weight_sum.shape[0], in_features)
    grid = (bits, per_token, symmetric)
    if native.takes(weight, kernel):
        found = native.below(x, weight, weight_scale, weight_sum, bias, input_scale, input_zero_point, *grid)
        if found is not None:
            count(layer, native.NATIVE.name)
            return found
    request = LinearRequest(
        x if x.ndim == 2 else x.reshape(x.shape[:-1].numel(), in_features),
        weight,
        weight_scale,
        weight_sum,
        weight_zero_point,
        bias,
        input_scale,
        input_zero_point,
        *grid,
    )
    if request.x.shape[0] == 0:
        return x.new_empty((*x.shape[:-1], request.out_features))
    chosen = select(kernel, request, strict=strict)
    y = chosen.linear(request)
    count(layer, chosen.name)
    return y if x.ndim == 2 else y.view(*x.shape[:-1], request.out_features)


def _fake(x: Tensor, weight: Tensor, weight_scale: Tensor, weight_sum: Tensor, *rest: Any) -> Tensor:
    check_input(x, weight_sum.shape[0], rest[_IN_FEATURES])
    return x.new_empty((*x.shape[:-1], weight_sum.shape[0]))


def check_input(x: Tensor, out_features: int, in_features: int) -> None:
    """Raise `SchemeError` where `x` is not float, or its last axis is not K."""
    if x.ndim == 0 or x.shape[-1] != in_features:
        raise SchemeError(
            f"the input has shape {tuple(x.shape)}, the weight (N, K) is ({out_features}, {in_features}): "
            f"the last axis of the input must be {in_features}"
        )
    if not x.is_floating_point():
        raise SchemeError(f"the input is {x.dtype}, a linear layer takes float tensors; convert it with .float()")


def _no_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """Nothing is kept for a backward that does not exist."""


def _no_gradient(ctx: Any, gradient: Tensor) -> Tensor:
    raise SchemeError(
        "a gradient was asked of an integer layer, which has none; run it under torch.no_grad(), "
        "or train the float model and quantise it afterwards"
    )


_LIBRARY.impl("int8_linear", _int8_linear, "CompositeExplicitAutograd")
torch.library.register_fake("w8a8::int8_linear", _fake, lib=_LIBRARY)
torch.library.register_autograd("w8a8::int8_linear", _no_gradient, setup_context=_no_setup, lib=_LIBRARY)

_op = torch.ops.w8a8.int8_linear.default


def int8_linear(x: Tensor, *operands: Any) -> Tensor:
    """Run the op: directly in eager inference, through PyTorch's dispatcher wherever that has something to do.

    The dispatcher takes about half as long again (bench/overhead.py).  It is needed where somebody looks on: under
    `torch.compile`, tracing and dispatch modes, for tensor subclasses, and to refuse a gradient.

    Args:
        x: (..., K), any float dtype and strides.
        operands: The rest of the schema, in its order.

    Returns:
        (..., N) in the dtype of `x`.
    """
    watched = (
        torch.compiler.is_compiling()
        or type(x) is not Tensor
        or (x.requires_grad and torch.is_grad_enabled())
        or torch._C._len_torch_dispatch_stack() > 0
        or torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
    )
    y: Tensor = _op(x, *operands) if watched else _int8_linear(x, *operands)
    return y
