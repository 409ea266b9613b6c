"""What each operation does to a positive scale per channel: the rules of `tracing`, one literal table.

For x' = x / s with s > 0, element by element:

- moving or copying elements moves the tags: the operation itself is applied to them;
- relu, leaky_relu, abs and neg commute with s; so do products and quotients with what carries no tag, and where both
  factors carry different sources the product carries both;
- a sum, a mean, a largest or smallest value along an axis commutes where the tags are constant along it, and so does
  a matrix product contracted along such an axis (attention's probabilities times its values);
- a sum of two tensors commutes where both carry the same tags; adding a parameter along the channels makes it a part
  of the source, a bias;
- a product with a parameter contracted along the channels takes the scale back: a reader;
- whatever asks for a shape or a sign only does not see the scale.

Every other operation blocks the channels it meets.  A missing rule therefore loses a pair and never breaks a model.
"""

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from w8a8.dataflow.products import (
    along,
    attention,
    blocked,
    experts_product,
    joined,
    layer_norm,
    linear,
    matrix_product,
    nothing,
    reduced,
)
from w8a8.dataflow.tracing import Call, ParameterView, Rule, Tags, tensors


def _metadata(call: Call) -> list[Tags]:
    """A shape and a dtype are asked for, no value."""
    for tensor in tensors(call.args, call.kwargs):
        call.use(tensor)
    return nothing(call)


def _unary(call: Call) -> list[Tags]:
    return [call.tags(call.args[0])]


def _moved(call: Call) -> list[Tags]:
    """The operation moves elements: it is applied to the tags of each source."""
    copied = call.view(call.args[0])
    if copied is not None and copied.whole:
        _copy_parameter(call, copied)
    floats = [t for t in tensors(call.args, call.kwargs) if t.is_floating_point() or t.is_complex()]
    per_tensor = {id(t): call.tags(t) for t in floats}
    results: list[Tags] = [{} for _ in tensors(call.out)]
    for number in {n for tags in per_tensor.values() for n in tags}:

        def channels(value: Any, number: int = number) -> Any:
            if isinstance(value, list | tuple):
                return type(value)(channels(v) for v in value)
            if id(value) not in per_tensor:
                return value
            found = per_tensor[id(value)].get(number)
            return torch.full_like(value, -1, dtype=torch.int32) if found is None else found.clone()

        moved = call.func(*channels(call.args), **{k: channels(v) for k, v in call.kwargs.items()})
        for tags, result in zip(results, tensors(moved), strict=True):
            tags[number] = result
    return results


def _copy_parameter(call: Call, view: ParameterView) -> None:
    """A parameter is copied or gathered from: the copy is known as the parameter."""
    parameter, axes = call.args[0], view.axes
    if call.name in ("index", "index_select"):
        picks = call.args[1] if call.name == "index" else [call.args[2]]
        if call.name == "index_select" and call.args[1] != 0:
            return
        pick = picks[0] if len(picks) == 1 else None
        if pick is None or pick.dtype is torch.bool or view.ndim == 1 or axes[0] not in (None, 0):
            return
        axes = (*(None for _ in pick.shape), *axes[1:])
    elif call.name != "clone":
        return
    call.use(parameter)
    call.trace.record(call.out, replace(view, axes=axes))


def _cast(call: Call) -> list[Tags]:
    """`.to(dtype)`: floats of 16 bits and more stay what they are, up to rounding."""
    if not call.out.is_floating_point() or call.out.itemsize < 2:
        return blocked(call)
    view = call.view(call.args[0])
    if view is not None and view.whole:
        call.use(call.args[0])
        call.trace.record(call.out, view)
    return [call.tags(call.args[0])]


def _copy_into(call: Call) -> list[Tags]:
    """`copy_`: the target has the source's tags."""
    if not call.out.is_floating_point():
        return blocked(call)
    return [{n: tags.expand(call.out.shape) for n, tags in call.tags(call.args[1]).items()}]


def _filled(call: Call) -> list[Tags]:
    """`fill_` and `zero_`: what was there is not read."""
    value = call.argument(1, "value")
    call.block(call.tags(value), "it is written over other values")
    return nothing(call)


def _padded(call: Call) -> list[Tags]:
    """What is padded with carries no tag."""
    pad = call.args[1]
    return [{n: torch.constant_pad_nd(tags, pad, -1) for n, tags in call.tags(call.args[0]).items()}]


def _index_put(call: Call) -> list[Tags]:
    return blocked(call) if call.argument(3, "accumulate", False) else _moved(call)


def _masked_fill(call: Call) -> list[Tags]:
    """0 and the infinities are what they were after any positive scale; other values stand beside tagged ones."""
    tags = {n: t.expand(call.out.shape) for n, t in call.tags(call.args[0]).items()}
    return [tags] if _scale_free(call.args[2]) else blocked(call)


def _where(call: Call) -> list[Tags]:
    _, yes, no = call.args
    for kept, other in ((yes, no), (no, yes)):
        if isinstance(other, Tensor) and other.numel() == 1 and not call.tags(other) and _scale_free(other):
            return [{n: t.expand(call.out.shape) for n, t in call.tags(kept).items()}]
    return _moved(call)


def _product(call: Call) -> list[Tags]:
    left, right = call.args[0], call.args[1]
    for x, gain in ((left, right), (right, left)):
        view = call.view(gain)
        if view is None or view.ndim != 1 or view.channel_axis is None or call.view(x) is not None:
            continue
        if not isinstance(x, Tensor) or x.ndim == 0:
            continue
        axis, channels = view.channel_axis, gain.shape[view.channel_axis]
        call.use(gain)
        number = call.trace.source("norm", view, 0, channels)
        tags = {n: t.expand(call.out.shape) for n, t in call.tags(x).items()}
        if number in tags:
            call.block({number: tags.pop(number)}, "it is multiplied by the same parameter twice")
            return [tags]
        return [{**tags, number: along(call.out, axis, channels)}]
    return [joined(call, call.tags(left), call.tags(right))]


def _quotient(call: Call) -> list[Tags]:
    if call.argument(2, "rounding_mode") is not None:
        return blocked(call)
    call.block(call.tags(call.args[1]), "something is divided by it")
    return [{n: t.expand(call.out.shape) for n, t in call.tags(call.args[0]).items()}]


def _sum_of_two(call: Call) -> list[Tags]:
    """add and sub."""
    left, right = call.args[0], call.args[1]
    if _shift_parameter(call, left, right):
        return nothing(call)
    for x, bias in ((left, right), (right, left)):
        joint = _with_bias(call, x, bias)
        if joint is not None:
            return [joint]
    a, b = call.tags(left), call.tags(right)
    out: Tags = {}
    for number in a.keys() | b.keys():
        ours, theirs = (
            tags[number].expand(call.out.shape) if number in tags else torch.full_like(call.out, -1, dtype=torch.int32)
            for tags in (a, b)
        )
        differ = ours != theirs
        both = number in a and number in b
        what = (
            "different channels of it are added to one another (as rotary embeddings do)"
            if both
            else "it is added to a tensor that is not scaled with it (as a residual is)"
        )
        if not isinstance(left, Tensor) or not isinstance(right, Tensor):
            what = "a constant is added to it"
        for tags in (ours, theirs):
            call.block({number: torch.where(differ, tags, -1)}, what)
        out[number] = torch.where(differ, -1, ours)
    return [out]


def _shift_parameter(call: Call, left: Any, right: Any) -> bool:
    """`parameter + 1`, as norms that store weight - 1 have it: the result is known as the parameter, shifted."""
    for parameter, number in ((left, right), (right, left)):
        view = call.view(parameter)
        if view is None or not view.whole or isinstance(number, Tensor) or call.mutated:
            continue
        if call.name != "add" or call.kwargs.get("alpha", 1) != 1:
            continue
        call.use(parameter)
        call.trace.record(call.out, replace(view, offset=view.offset + float(number)))
        return True
    return False


def _with_bias(call: Call, x: Any, bias: Any) -> Tags | None:
    """The tags of `x` plus a parameter that runs along the channels of the last source in it; None if it does not."""
    view, tags = call.view(bias), call.tags(x)
    if view is None or view.channel_axis is None or not tags or call.out.shape != x.shape:
        return None
    number = max(tags)
    channels = bias.shape[view.channel_axis]
    if channels != call.trace.sources[number].channels:
        return None
    if not torch.equal(tags[number], along(call.out, view.channel_axis, channels)):
        return None
    axis = view.axes[view.channel_axis]
    assert axis is not None
    call.use(bias)
    call.trace.join(number, view, axis)
    for other in tags.keys() - {number}:
        call.block({other: tags[other]}, "a bias is added to it")
    return {number: tags[number]}


def _scale_free(value: Tensor | float) -> bool:
    """0, an infinity or NaN: a positive scale leaves it as it is."""
    number = float(value)
    return number == 0.0 or not math.isfinite(number)


RULES: dict[str, Rule] = {
    # elementwise, and commuting with a positive scale
    **dict.fromkeys(("relu", "leaky_relu", "abs", "neg", "tril", "triu"), _unary),
    "mul": _product,
    "div": _quotient,
    "add": _sum_of_two,
    "sub": _sum_of_two,
    "masked_fill": _masked_fill,
    "where": _where,
    # moving
    "_to_copy": _cast,
    "copy": _copy_into,
    "fill": _filled,
    "zero": _filled,
    "constant_pad_nd": _padded,
    "index_put": _index_put,
    **dict.fromkeys(
        ("cat", "clone", "flip", "gather", "index", "index_copy", "index_select", "repeat", "roll"), _moved
    ),
    **dict.fromkeys(("select_scatter", "slice_scatter", "split_with_sizes_copy", "stack"), _moved),
    # along an axis
    **dict.fromkeys(("sum", "mean", "amax", "amin"), reduced),
    **dict.fromkeys(("mm", "bmm", "addmm", "baddbmm"), matrix_product),
    **dict.fromkeys(("_grouped_mm", "transformers::grouped_mm_fallback"), experts_product),
    "linear": linear,
    **dict.fromkeys(("native_layer_norm", "_fused_rms_norm"), layer_norm),
    **dict.fromkeys(("_scaled_dot_product_attention_math", "_scaled_dot_product_cudnn_attention"), attention),
    **dict.fromkeys(("_scaled_dot_product_efficient_attention", "_scaled_dot_product_flash_attention"), attention),
    "_scaled_dot_product_flash_attention_for_cpu": attention,
    "_scaled_dot_product_fused_attention_overrideable": attention,
    # the sign is asked for, which a positive scale leaves
    **dict.fromkeys(("isfinite", "isinf", "isnan", "sgn", "sign"), nothing),
    **dict.fromkeys(("new_empty", "new_empty_strided", "new_full", "new_ones", "new_zeros"), _metadata),
    **dict.fromkeys(("empty_like", "full_like", "ones_like", "rand_like", "randn_like", "zeros_like"), _metadata),
}
"""By the name of an operation; `blocked` is the rule of every other one."""
