"""The one op: a linear layer in integers, declared once, whatever kernel runs it.

    w8a8::int8_linear(x, weight, ...) -> y

Its arithmetic is the contract (docs/design.md), which leaves no rounding open: every kernel returns the
same bits.  PyTorch sees one opaque op, so that `torch.compile(fullgraph=True)` passes over it; the kernel
is picked inside, when the input is known, by `w8a8.kernels.select`, and written into the ledger there.

Inference only: asking for a derivative, in reverse or in forward mode, is an error rather than a wrong number.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from w8a8.defaults import without_autocast
from w8a8.errors import SchemeError
from w8a8.kernels import native
from w8a8.kernels.request import LinearRequest, describe
from w8a8.kernels.select import select

_LIBRARY = torch.library.Library("w8a8", "DEF")
_LIBRARY.define(
    "int8_linear(Tensor x, Tensor weight, Tensor weight_scale, Tensor weight_sum, "
    "Tensor? weight_zero_point, Tensor? bias, Tensor? input_scale, Tensor? input_zero_point, int bits, bool per_token, "
    "bool symmetric, int in_features, str kernel, bool strict, int layer) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)

_TENSORS = 8  # the first operands, of which some may be None
_OPERANDS = len(LinearRequest._fields)  # the schema has these, and then who is to run them
_NO_GRADIENT = (
    "a gradient was asked of an integer layer, which has none; run it under torch.no_grad(), or train the float model "
    "and quantise it afterwards; w8a8.simulate has the straight-through gradient"
)
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


def _int8_linear(request: LinearRequest, kernel: str, strict: bool, layer: int) -> Tensor:
    x = request.x
    if type(x) is not Tensor:  # a subclass that left the op to us: its values are its own memory
        x = x.as_subclass(Tensor)
    if native.takes(request.weight, kernel):
        found = native.below(x, request)  # it looks at its input itself: None where that is not what it takes
        if found is not None:
            count(layer, native.NATIVE.name)
            return found
    check_input(x, request.out_features, request.in_features)
    if x.device.type == "cpu" and x.numel() and x.data_ptr() == 0:  # torch's own operations would read there
        raise SchemeError(f"the input is {describe(x)}, and its storage has no bytes; fill it first")
    x = x.resolve_neg()  # of a conjugate's imaginary part the memory holds the negatives
    rows = x if x.ndim == 2 else x.reshape(x.shape[:-1].numel(), request.in_features)
    if rows.shape[0] == 0:
        return x.new_empty((*x.shape[:-1], request.out_features))
    if rows is not request.x:
        request = request._replace(x=rows)
    chosen = select(kernel, request, strict=strict)
    with without_autocast(x.device):
        y = chosen.linear(request)
    count(layer, chosen.name)
    return y if x.ndim == 2 else y.view(*x.shape[:-1], request.out_features)


def _fake(*given: Any) -> Tensor:
    request, *_ = _split(given)
    check_input(request.x, request.out_features, request.in_features)
    return request.x.new_empty((*request.x.shape[:-1], request.out_features))


def check_input(x: Tensor, out_features: int, in_features: int) -> None:
    """Raise `SchemeError` where `x` is not float, or its last axis is not K."""
    if x.ndim == 0 or x.shape[-1] != in_features:
        raise SchemeError(
            f"the input has shape {tuple(x.shape)}, the weight (N, K) is ({out_features}, {in_features}): "
            f"the last axis of the input must be {in_features}"
        )
    if x.layout is not torch.strided:
        raise SchemeError(
            f"the input is {describe(x)}, a linear layer takes dense tensors; convert it with .to_dense()"
        )
    if not x.is_floating_point():
        raise SchemeError(f"the input is {x.dtype}, a linear layer takes float tensors; convert it with .float()")


def _no_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """Nothing is kept for a backward that does not exist."""


def _no_gradient(ctx: Any, gradient: Tensor) -> Tensor:
    raise SchemeError(_NO_GRADIENT)


def _split(given: Sequence[Any]) -> tuple[LinearRequest, str, bool, int]:
    """What the schema has one after the other, as `int8_linear` takes it."""
    kernel, strict, layer = given[_OPERANDS:]
    return LinearRequest(*given[:_OPERANDS]), kernel, strict, layer


def _one_by_one(info: Any, in_dims: tuple[int | None, ...], *given: Any) -> tuple[Tensor, int]:
    """`torch.vmap`: the layer is called for each entry, whose tokens may share a scale with one another only."""
    outputs = []
    for i in range(info.batch_size):
        entry = [a if d is None else a.select(d, i) for a, d in zip(given, in_dims, strict=True)]
        outputs.append(int8_linear(*_split(entry)))
    return torch.stack(outputs), 0


_LIBRARY.impl("int8_linear", lambda *given: _int8_linear(*_split(given)), "CompositeExplicitAutograd")
torch.library.register_fake("w8a8::int8_linear", _fake, lib=_LIBRARY)
torch.library.register_autograd("w8a8::int8_linear", _no_gradient, setup_context=_no_setup, lib=_LIBRARY)
torch.library.register_vmap("w8a8::int8_linear", _one_by_one, lib=_LIBRARY)

_op: Callable[..., Tensor] = torch.ops.w8a8.int8_linear.default


def int8_linear(request: LinearRequest, kernel: str, strict: bool, layer: int) -> Tensor:
    """Run the op: directly in eager inference, through PyTorch's dispatcher wherever that has something to do.

    The dispatcher takes about half as long again (bench/overhead.py).  It is needed where somebody looks on: under
    `torch.compile`, tracing and dispatch modes, for subclasses and functorch's wrappers, and to refuse a gradient.

    Args:
        request: With x (..., K), any float dtype and strides.
        kernel, strict: The kernel that is asked for, and whether no other may run.
        layer: Its number in the ledger.

    Returns:
        (..., N) in the dtype of `x`.

    Raises:
        SchemeError: a derivative in forward mode, or by functorch's transforms, was asked for.  In reverse mode, where
            gradients are recorded unasked, `backward` raises it.
    """
    if torch.compiler.is_compiling():
        return _op(*request, kernel, strict, layer)
    tensors: list[Any] = [t for t in request[:_TENSORS] if t is not None]
    gradient = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    transformed = torch._C._functorch.peek_interpreter_stack() is not None
    if (gradient and transformed) or _has_tangent(tensors):
        raise SchemeError(_NO_GRADIENT)
    watched = (
        gradient
        or transformed
        or any(type(t) is not Tensor for t in tensors)
        or torch._C._len_torch_dispatch_stack() > 0
        or torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
    )
    if watched:
        return _op(*request, kernel, strict, layer)
    return _int8_linear(request, kernel, strict, layer)


def _has_tangent(tensors: list[Any]) -> bool:
    """Whether a derivative in forward mode goes with one of the operands: the op would drop it.

    Of what `torch.vmap` has wrapped, each entry is asked, in `_one_by_one`.
    """
    return forward_ad._current_level >= 0 and any(
        t.is_floating_point()
        and not torch._C._functorch.is_batchedtensor(t)
        and forward_ad.unpack_dual(t).tangent is not None
        for t in tensors
    )
