"""Attention over keys and values as they lie in int8: `attn_implementation="w8a8"` of transformers.

    model.set_attn_implementation("w8a8"); model.generate(**inputs, past_key_values=w8a8.Int8Cache(model.config))

`w8a8.set_cache(model, "int8")` is both.  A few queries over an `Int8Cache` run in the native kernel
(`w8a8.kernels.cached`), with the model's mask or window, grouped heads, soft cap and sinks.  Everything else is what it
was: PyTorch's attention, over floats; where a soft cap or sinks keep that from it, the plain PyTorch version of the
kernel in float32.  Where a few queries could not run by codes, a warning says why, once.
"""

import warnings
from functools import cache as once
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from w8a8.decoding.handed import kept_of
from w8a8.errors import ModelError
from w8a8.kernels.cached import Asked, attend, weighed
from w8a8.kernels.compiled import unavailable_because

NAME = "w8a8"
ROWS = 64
"""Queries of a sequence that are few.  On a core with AVX-512 VNNI the kernel takes from a third to nine tenths of
PyTorch's time over floats for 1 to 64 of them, with the floats still to be made for PyTorch's, and at 256 up to 1.3
times as long."""

_PIECE = 256  # queries at once of the plain version: (heads, 256, S) float32 scores
_AXES = 4


def attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """The attention of a layer; as transformers calls it.

    Args:
        module: The layer.
        query: (B, Hq, T, D).
        key: (B, H, S, D), where H divides Hq, from an `Int8Cache` or anywhere.
        value: Likewise.
        attention_mask: (B | 1, Hq | 1, T, S), whether a key is seen, or what is added to the scores; or None.
        dropout: Of the weights.
        scaling: Of the scores; by default the root of D, inverse.
        is_causal: Whether a token sees those before it only, where there is no mask; by default what the layer says.
        softcap: What the scores are bent to stay below.
        s_aux: (Hq,) scores of a key without a value, the sinks.
        position_bias: Added to the scores.
        others: What PyTorch's attention is handed by transformers beside.

    Returns:
        (B, T, Hq, D), and no weights.
    """
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    causal = bool(causal) and attention_mask is None and query.shape[2] > 1
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    kept = kept_of(key, value)
    if kept is not None:
        kept.seen()
        if kept.only:
            why = _not_by_codes(query, key, causal=causal, dropout=dropout)
            if why is None:
                mask = _added(attention_mask, position_bias)
                sinks = None if s_aux is None else s_aux.detach().to(torch.float32).contiguous()
                asked = Asked(scale, mask, causal, softcap, sinks)
                found = attend(query, kept.codes, kept.start, kept.end, asked)
                if found is not None:
                    return found, None
                why = f"it does not take queries {tuple(query.shape)} in {query.dtype} on {query.device} over them"
            _warn_once(why)
            key, value = kept.floats()
    if softcap is None and s_aux is None:
        if _may_be_grouped(query, key, attention_mask, position_bias):
            return _grouped(query, key, value, attention_mask, dropout, scale), None
        if position_bias is not None:
            others["position_bias"] = position_bias
        others |= {"dropout": dropout, "scaling": scaling, "is_causal": is_causal}
        found, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **others)
        return found, None
    if dropout:
        raise ModelError(
            f"attention {NAME!r} was asked for a soft cap or sinks with dropout {dropout}, which it does not have; "
            'call model.eval(), or train with model.set_attn_implementation("eager")'
        )
    return plain(query, key, value, Asked(scale, _added(attention_mask, position_bias), causal, softcap, s_aux)), None


def _may_be_grouped(query: Tensor, key: Tensor, mask: Tensor | None, bias: Tensor | None) -> bool:
    """Whether a token is looked at by itself, with a mask and heads that share keys."""
    return query.shape[2] == 1 and query.shape[1] > key.shape[1] and mask is not None and bias is None


def _grouped(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float, scale: float) -> Tensor:
    """PyTorch's attention of one token, in which heads that share keys are so many queries of one head.

    transformers does so too, save where torch.compile traces it: there keys and values of all the past are written out
    once for each head that shares them, and a graph of TinyLlama's shape was slower at batch 8 than no graph.
    """
    batch, heads, _, dims = query.shape
    shape = (batch, key.shape[1], heads // key.shape[1])
    if mask is not None and mask.shape[1] > 1:
        mask = mask.reshape(mask.shape[0], *shape[1:], mask.shape[3])
    found = F.scaled_dot_product_attention(
        query.reshape(*shape, dims), key, value, attn_mask=mask, dropout_p=dropout, scale=scale
    )
    return found.reshape(batch, 1, heads, value.shape[3])


def _not_by_codes(query: Tensor, key: Tensor, *, causal: bool, dropout: float) -> str | None:
    """Why the kernel is not asked."""
    why = unavailable_because()
    if why is not None:
        return f"the native kernel is not there: {why}"
    if dropout:
        return "it has no dropout, and the model is in training"
    if query.requires_grad and torch.is_grad_enabled():
        return "it has no gradient, and one is recorded; use torch.inference_mode()"
    if causal and query.shape[2] != key.shape[2]:
        return "the model says of no query which keys it sees"
    return None


def _added(mask: Tensor | None, bias: Tensor | None) -> Tensor | None:
    """The mask as `Asked` has it, with what is added by position."""
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.to(torch.float32)
    if bias is None:
        return mask
    bias = bias.to(torch.float32)
    if mask is None:
        return bias
    return torch.where(mask, bias, -torch.inf) if mask.dtype == torch.bool else mask + bias


def plain(query: Tensor, key: Tensor, value: Tensor, asked: Asked) -> Tensor:
    """In float32, some rows at a time."""
    shared = query.shape[1] // key.shape[1]
    keys, values = (x.to(torch.float32) for x in (key, value))
    keys = keys.repeat_interleave(shared, 1)
    found = []
    for first in range(0, query.shape[2], _PIECE):
        rows = query[:, :, first : first + _PIECE].to(torch.float32)
        last = first + rows.shape[2] if asked.causal else keys.shape[2]  # as PyTorch's: query i sees the keys 0..i
        mask = asked.mask
        if mask is not None and mask.shape[2] > 1:
            mask = mask[:, :, first : first + _PIECE]
        scores = rows @ keys[:, :, :last].transpose(-1, -2) * asked.scale
        found.append(weighed(scores, values[:, :, :last], asked._replace(mask=mask)))
    return torch.cat(found, 1).to(query.dtype)


@once
def _warn_once(why: str) -> None:
    warnings.warn(
        f"attention over keys and values in int8 cannot run ({why}); they are dequantised for PyTorch's", stacklevel=2
    )


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
