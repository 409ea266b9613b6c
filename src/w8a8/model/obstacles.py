"""Why a linear layer, or a table, cannot be replaced, however it is named.

A layer is taken where `QuantLinear` in its place leaves the model as it is but for the rounding: it is a linear layer
and nothing else, the model only calls it, and holds it where a swap reaches.  So it stays float where

- its `forward`, its class's or its own, does not compute x W^T + b, which is tried on a small copy;
- something is attached to it: hooks, parameters, buffers or children beside weight and bias, or a weight that is made
  of others at each call (weight_norm, spectral_norm, prune, a parametrization);
- the model's code reads more of it than a quantised layer has (`w8a8.model.usage`): its weight, most often;
- the model keeps it in float32 beside layers of 16 bits;
- the model also holds it in a tuple, a closure or a bound method (`w8a8.model.places`).

A table is taken where `QuantEmbedding` leaves it so, by the same rules; and not where it changes its own rows, or asks
for gradients by rows.

Whatever is decided here is decided before a layer is made.
"""

import copy
import re
from collections.abc import Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize

from w8a8.defaults import usual_defaults
from w8a8.layers.linear import has_hooks, not_plain
from w8a8.model.experts import OTHER_KIND
from w8a8.model.places import places
from w8a8.model.usage import Usage


def obstacles(model: nn.Module, linears: Mapping[str, nn.Module], usage: Usage) -> dict[str, str]:
    """Why layers of a model, with or without values, cannot be replaced, by name; the others are not in it."""
    kept = _kept_wide(model, linears)
    fixed = {id(place.module): place.name for place in places(model) if place.container is None}
    found = {}
    for name, linear in linears.items():
        if reason := _of_layer(linear):
            found[name] = reason
        elif name in usage.read:
            found[name] = f"it is not only called: {usage.read[name]}"
        elif name in kept:
            found[name] = (
                f"its model keeps it in float32 beside {kept[name]}, so what it returns must not be {kept[name]}"
            )
        elif id(linear) in fixed:
            found[name] = f"it is held in {fixed[id(linear)]} too, where no other can be put in its place"
    return found


def _kept_wide(model: nn.Module, linears: Mapping[str, nn.Module]) -> dict[str, str]:
    """The layers in float32 that the model's class keeps so (T5's `wo`), each with the dtype of the others.

    Such a layer's input is cast for it where its weight is seen to be float32.  A quantised one would return the narrow
    dtype of its input, and the sums that follow would be narrow too.
    """
    # past `linear.weight`, which may be made anew at each look
    held = {name: linear._parameters.get("weight") for name, linear in linears.items()}
    dtypes = {name: weight.dtype for name, weight in held.items() if weight is not None}
    halves = set(dtypes.values()) & {torch.float16, torch.bfloat16}
    plan = getattr(model, "_get_dtype_plan", None)
    if len(halves) != 1 or plan is None:
        return {}
    (half,) = halves
    patterns = [re.compile(each.replace("*", ".*")) for each in plan(half)]
    return {
        name: str(half).removeprefix("torch.")
        for name, dtype in dtypes.items()
        if dtype is torch.float32 and any(each.search(f"{name}.weight") for each in patterns)
    }


def _of_layer(linear: nn.Module) -> str | None:
    """What about the layer itself is in the way."""
    attached = next(_attached(linear), None)
    if attached is not None:
        return attached
    if isinstance(linear, nn.Embedding):
        if linear.max_norm is not None:
            return f"it rescales its own rows when they are looked up (max_norm={linear.max_norm})"
        if linear.sparse or linear.scale_grad_by_freq:
            return "it asks for gradients of a kind of their own (sparse, scale_grad_by_freq), and codes have none"
        if not linear.weight.numel():
            return "it is empty"
    if type(linear) in (nn.Linear, nn.Embedding) or not isinstance(linear, nn.Linear | nn.Embedding):
        return None
    with usual_defaults():  # a caller may be making models on the meta device
        why = _differs(linear)
    if why is None:
        return None
    kind = "Linear" if isinstance(linear, nn.Linear) else "Embedding"
    return f"{type(linear).__name__} is a subclass of nn.{kind} that {why}"


def _attached(linear: nn.Module) -> Iterator[str]:
    """What a swap would drop, or could not read."""
    why = not_plain(linear)
    if why is not None:
        yield why
    if parametrize.is_parametrized(linear):
        kinds = {type(each).__name__ for made in linear.parametrizations.values() for each in made}  # type: ignore[operator]
        yield (
            f"its weight is made anew at each call ({', '.join(sorted(kinds))}); "
            "torch.nn.utils.parametrize.remove_parametrizations makes it a plain one"
        )
    own = {*linear._parameters, *linear._buffers, *linear._modules}
    if not isinstance(linear._parameters.get("weight"), nn.Parameter):
        yield (
            f"its weight is made of {', '.join(sorted(own - {'bias'}))} at each call; torch.nn.utils.prune.remove, "
            "remove_weight_norm or remove_spectral_norm makes it a plain one"
        )
    if own - {"weight", "bias"}:
        yield f"it also has {', '.join(sorted(own - {'weight', 'bias'}))}, which a swap would drop"
    if has_hooks(linear) or hasattr(linear, "_hf_hook"):
        yield "it has hooks, which a swap would drop; remove them first"
    if "forward" in linear.__dict__:
        yield "it has a forward of its own, set on it and not on its class, which a swap would drop"


@torch.no_grad()
def _differs(linear: nn.Linear | nn.Embedding) -> str | None:
    """Why a subclass does something else than the class: nothing where its `forward` does the same in small."""
    if type(linear).__call__ is not nn.Module.__call__:
        return "is called in another way"
    small, draw = copy.copy(linear), torch.Generator().manual_seed(0)
    weight, bias = (torch.randn(shape, generator=draw, dtype=torch.float32, device="cpu") for shape in ((12, 8), (12,)))
    if isinstance(small, nn.Embedding):
        small.num_embeddings, small.embedding_dim, small.padding_idx = 12, 8, None
        small._parameters = {"weight": nn.Parameter(weight)}
        x = torch.randint(12, (2, 3), generator=draw, dtype=torch.int64, device="cpu")
        want = F.embedding(x, weight)
    else:
        small.in_features, small.out_features = 8, 12
        biased = None if small.bias is None else nn.Parameter(bias)
        small._parameters = {"weight": nn.Parameter(weight), "bias": biased}
        x = torch.randn(2, 3, 8, generator=draw, dtype=torch.float32, device="cpu")
        want = F.linear(x, weight, small.bias)
    try:
        found = small(x)
        same = bool((found - want).norm() <= 1e-5 * want.norm())  # float32, sums of 8
    except OTHER_KIND as error:
        return f"is called in another way ({type(error).__name__})"
    return None if same else "computes something else"
