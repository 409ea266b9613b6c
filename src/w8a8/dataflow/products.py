"""Where a scale per channel is taken back, made, or summed over: the rules of the operations along an axis.

A product contracted along the tagged axis with a parameter is a reader, and its other axis a new source.  Contracted
along an axis that the tags are constant along, with whatever it may be, the scale goes through: attention's
probabilities times its values, a sum over experts.  `commuting` has the elementwise rules, and the table of all.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from w8a8.dataflow.tracing import Call, Contraction, ParameterView, Role, Tags, tensors

_WORDS = {
    "_log_softmax": "log-softmax",
    "_softmax": "softmax",
    "convolution": "a convolution",
    "gelu": "GELU",
    "hardtanh": "a clamp",
    "index_add": "an indexed addition",
    "mish": "Mish",
    "native_group_norm": "a GroupNorm",
    "native_layer_norm": "a LayerNorm",
    "_fused_rms_norm": "an RMSNorm",
    "pow": "a power (of a norm or an activation function)",
    "sigmoid": "the sigmoid",
    "silu": "SiLU",
    "softplus": "softplus",
    "tanh": "tanh",
}
"""Operations that people know by another name."""


def blocked(call: Call) -> list[Tags]:
    """The operation does not commute: all channels it met are blocked."""
    what = _WORDS.get(call.name, f"the operation {call.name}")
    if call.trace.module in call.trace.quantized:
        what = "a quantised layer, whose weight cannot be rescaled (fold before quantising),"
    for tensor in tensors(call.args, call.kwargs):
        call.block(call.tags(tensor), f"{what} reads it")
    return nothing(call)


def nothing(call: Call) -> list[Tags]:
    """The result does not depend on the scale."""
    return [{} for _ in tensors(call.out)]


def along(out: Tensor, axis: int, channels: int) -> Tensor:
    """0 .. C - 1 along one axis (counted from the right) of a tensor like `out`."""
    shape = [1] * out.ndim
    shape[axis] = channels
    return torch.arange(channels, dtype=torch.int32, device=out.device).reshape(shape).expand(out.shape)


def constant(tags: Tensor, axes: Sequence[int]) -> bool:
    """Whether the tags are the same all along these axes."""
    first = tags
    for axis in axes:
        first = first.narrow(axis, 0, 1)
    return bool((tags == first).all())


def joined(call: Call, left: Tags, right: Tags) -> Tags:
    """The tags of a product: those of both factors, where no source is in both."""
    shape = call.out.shape
    out = {n: t.expand(shape) for n, t in (left | right).items()}
    for number in left.keys() & right.keys():
        a, b = left[number].expand(shape), right[number].expand(shape)
        both = (a >= 0) & (b >= 0)
        for tags in (a, b):
            call.block({number: torch.where(both, tags, -1)}, "it is multiplied by itself")
        out[number] = torch.where(both, -1, torch.maximum(a, b))
    return out


def reduced(call: Call) -> list[Tags]:
    """A sum, mean, largest or smallest value along axes that the tags are constant along."""
    x, out = call.args[0], call.out
    axes = call.argument(1, "dim")
    axes = list(range(x.ndim)) if axes is None or axes == [] else [axes] if isinstance(axes, int) else list(axes)
    results: Tags = {}
    for number, tags in call.tags(x).items():
        if constant(tags, axes):
            results[number] = tags.amax(axes).reshape(out.shape)
        else:
            call.block({number: tags}, f"the {call.name} over its channels is taken")
    return [results]


def layer_norm(call: Call) -> list[Tags]:
    """native_layer_norm(x, shape, weight, bias, eps) and _fused_rms_norm(x, shape, weight, eps): new channels."""
    x, shape, gain = call.args[:3]
    bias = call.args[3] if call.name == "native_layer_norm" else None
    call.block(call.tags(x), f"{_WORDS[call.name]} reads it")
    out = nothing(call)
    view = call.view(gain)
    if len(shape) != 1 or view is None or view.ndim != 1 or view.channel_axis is None:
        return out
    shift = call.view(bias)
    if bias is not None and (shift is None or shift.ndim != 1 or shift.channel_axis is None):
        return out
    call.use(gain)
    number = call.trace.source("norm", view, 0, gain.shape[0])
    if shift is not None:
        call.use(bias)
        call.trace.join(number, shift, 0)
    out[0] = {number: along(call.out[0], -1, gain.shape[0])}
    return out


def linear(call: Call) -> list[Tags]:
    """linear(x, weight, bias), where a backend keeps it as one operation."""
    x, weight, bias = call.argument(0, "input"), call.argument(1, "weight"), call.argument(2, "bias")
    view = call.view(weight)
    if view is None or weight.ndim != 2 or not _readable(view, -1) or call.view(x) is not None:
        return blocked(call)
    return [_read(call, x, -1, weight, view, -1, bias)]


def matrix_product(call: Call) -> list[Tags]:
    """mm and bmm, addmm and baddbmm: left @ right + bias, either of which may be a parameter."""
    bias, left, right = (None, *call.args[:2]) if call.name in ("mm", "bmm") else call.args[:3]
    ours, theirs = call.view(left), call.view(right)
    if theirs is not None and ours is None and _readable(theirs, -2):
        return [_read(call, left, -1, right, theirs, -2, bias)]
    if ours is not None and theirs is None and _readable(ours, -1):
        return [_read(call, right, -2, left, ours, -1, bias)]
    why = "the matrix product with another tensor (as of queries and keys) reads it"
    out = joined(call, _passed(call, left, -1, why), _passed(call, right, -2, why))
    if bias is not None and (out or call.tags(bias)):
        call.block(out | call.tags(bias), "it is added to a tensor that is not scaled with it")
        return [{}]
    return [out]


def experts_product(call: Call) -> list[Tags]:
    """_grouped_mm(rows sorted by expert, (E, K, N), offsets): (M, N)."""
    rows, stack = call.args[:2]
    view = call.view(stack)
    if rows.ndim != 2 or view is None or view.axes[0] != 0 or not _readable(view, -2) or len(tensors(call.args)) > 3:
        return blocked(call)
    return [_read(call, rows, -1, stack, view, -2, None)]


def _readable(view: ParameterView, axis: int) -> bool:
    return view.whole and view.axes[axis] is not None and view.offset == 0.0


def _passed(call: Call, x: Tensor, axis: int, why: str) -> Tags:
    """The tags that go through a product contracted along an axis of `x`: those that are constant along it."""
    passed: Tags = {}
    for number, tags in call.tags(x).items():
        if constant(tags, [axis]):
            passed[number] = tags.narrow(axis, 0, 1).expand(call.out.shape)
        else:
            call.block({number: tags}, why)
    return passed


def _read(
    call: Call, x: Tensor, x_axis: int, weight: Tensor, view: ParameterView, contracted: int, bias: Tensor | None
) -> Tags:
    """An activation times a parameter: the parameter reads it, and its rows are the channels of the result.

    Args:
        x: The activation, contracted along its axis `x_axis`, in whose place the other axis of `weight` comes.
        weight: The parameter, contracted along its axis `contracted` (-1 or -2), seen as `view` says.
    """
    call.use(weight)
    call.block(call.tags(bias), "it is added to a tensor that is not scaled with it (as a residual is)")
    columns = x.shape[x_axis]
    passed: Tags = {}
    channels: dict[int, Tensor] = {}
    for number, tags in call.tags(x).items():
        if columns > 1 and constant(tags, [x_axis]):
            passed[number] = tags.narrow(x_axis, 0, 1)
            continue
        lines = tags.movedim(x_axis, -1).reshape(-1, columns)
        same = (lines == lines[0]).all(0)
        call.block({number: lines[:, ~same]}, "the tokens that are read together carry different channels")
        channels[number] = lines.amax(0).long().cpu()  # of a mixed column a blocked channel, so that it counts as read
    free = -3 - contracted
    dim, rows = view.axes[contracted], view.axes[free]
    assert dim is not None
    call.trace.contractions.append(Contraction(call.trace.module, view.name, dim, channels))
    if passed and bias is not None:
        call.block(passed, "a bias is added to it")
        passed = {}
    out = {n: t.expand(call.out.shape) for n, t in passed.items()}
    if rows is None:
        call.trace.play(view.name, Role("read"))
        return out
    number = call.trace.source("linear", view, rows, weight.shape[free])
    if bias is not None:
        shift = call.view(bias)
        dim = None if shift is None or shift.channel_axis != -1 or x_axis != -1 else shift.axes[-1]
        if shift is None or dim is None or bias.shape[-1] != weight.shape[free]:
            every = torch.arange(call.trace.sources[number].channels, dtype=torch.int64, device="cpu")
            call.block({number: every}, "what is added to it is no bias")
            return out
        call.use(bias)
        call.trace.join(number, shift, dim)
    return {**out, number: along(call.out, x_axis, weight.shape[free])}


def attention(call: Call) -> list[Tags]:
    """The fused attention operations: probabilities (B, H, T, S) times values (B, H or fewer, S, D)."""
    queries, keys, values, *rest = call.args
    out = nothing(call)
    result = tensors(call.out)[0]
    for tensor in tensors(queries, keys, rest, call.kwargs):
        call.block(call.tags(tensor), "attention scores are made of it")
    for number, tags in call.tags(values).items():
        if values.ndim == 4 and constant(tags, [-2]):
            heads = tags.narrow(-2, 0, 1).repeat_interleave(result.shape[1] // values.shape[1], 1)
            out[0][number] = heads.expand(result.shape)
        else:
            call.block({number: tags}, "attention adds up different channels of it")
    return out
