"""Keys and values in int8: how they lie, how they are written and read, and attention over them.

Per token and head, symmetric, by the contract of the package: the scale of a value is absmax / 127, in float32.  A key
is rotated before, as are the queries that look at it: H k and H q, where H is the Hadamard matrix, 1 and -1, over each
block of 2**b elements, the largest power of two that divides D.  H H = 2**b, so that nothing else changes:

    q k = (H q) (H k) / 2**b;  k = H (H k) / 2**b

What one channel has more than the others, which would set the scale of all, is then spread over them (QuaRot, Ashkboos
et al. 2024).  H is not normalised, so that the division is exact.  The scale of a key is absmax / n, n being whichever
of 127, 126, ... 112 leaves the least sum of squared errors: half of it with heads of eight elements, little less with
large ones.  Values stay as they are: rounding them costs next to nothing (bench/cache.py).

    key    codes (B, H, C / 16, P, 16, 2) int8, P = ceil(D / 2); scale (B, H, C)
    value  codes (B, H, C, V) int8, V = D rounded up to 16;      scale (B, H, C)

B sequences, H heads, room for C tokens.  Sixteen keys lie side by side, two elements of each together: what one
instruction multiplies and adds.  So the scores of sixteen keys come out of their sums side by side, and none of them
has to be added up across a register.  The sum over the tokens that the values take wants these as rows.

`attend` quantises the query by the contract too, to 16 bits: a score is an exact integer times three scales, and what
rounding the query adds is a thousandth of what rounding the keys does.  Softmax and the sum of values are float32.

    s = float32(sum(q16 k8)) * (q_scale * scale / 2**b) * k_scale;  s = cap * tanh(s / cap);  s = s + mask

The plain versions beside are the oracles, and what runs without a compiled kernel.  The kernel is within 4e-6 of the
largest magnitude of the values, plus what a score's last bits are worth: 4e-7 of the largest score, and 1e-6 of a cap.
All instruction sets, and any number of threads, give the same bits: sums go over the context in pieces of a fixed size.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from w8a8.core.affine import grid_of_range, round_to_codes, value_range
from w8a8.core.scheme import PerToken, QuantSpec
from w8a8.core.tokens import quantize_tokens
from w8a8.kernels.compiled import DTYPES, library

TILE = 16
"""Tokens whose keys lie side by side: rooms, and where codes are moved from, are multiples of it."""

STEPS = 16
"""Numbers of steps, 127 and so many below, of which a key has that which suits it best."""

_GRID = QuantSpec(granularity=PerToken())
_QUERY = QuantSpec(bits=16, granularity=PerToken())
MOST_DIMS = 512  # 32767 * 127 * 512 < 2**31


class Codes(NamedTuple):
    """Keys and values of one layer: what the docstring of this file says, and how wide they are."""

    key_codes: Tensor
    key_scale: Tensor
    value_codes: Tensor
    value_scale: Tensor
    key_dims: int
    value_dims: int

    @property
    def room(self) -> int:
        """C: how many tokens there is room for."""
        return self.key_scale.shape[2]


def empty(batch: int, heads: int, room: int, key_dims: int, value_dims: int, device: torch.device) -> Codes:
    """Room for tokens, with nothing written to it.

    Args:
        batch, heads: B and H.
        room: C, a multiple of `TILE`.
        key_dims, value_dims: Of a key and of a value.
    """
    assert room % TILE == 0
    pairs, values = -(-key_dims // 2), -(-value_dims // TILE) * TILE
    return Codes(
        torch.empty((batch, heads, room // TILE, pairs, TILE, 2), dtype=torch.int8, device=device),
        torch.empty((batch, heads, room), dtype=torch.float32, device=device),
        torch.empty((batch, heads, room, values), dtype=torch.int8, device=device),
        torch.empty((batch, heads, room), dtype=torch.float32, device=device),
        key_dims,
        value_dims,
    )


def append(codes: Codes, keys: Tensor, values: Tensor, at: int) -> None:
    """Quantise tokens into their places.

    Args:
        codes: Written to.
        keys: (B, H, T, D), any float dtype and strides.  Not modified.
        values: (B, H, T, D) likewise.
        at: The place of the first; all T have room.
    """
    assert at + keys.shape[2] <= codes.room
    functions = library()
    if isinstance(functions, str) or not functions.cached_append(codes, keys, values, at):
        plain_append(codes, keys, values, at)


def plain_append(codes: Codes, keys: Tensor, values: Tensor, at: int) -> None:
    """The oracle of `append`."""
    tokens = keys.shape[2]
    key_codes, key_scale = _quantized_keys(rotated(keys))
    value_codes, value_scale = _quantized(values)
    place = torch.arange(at, at + tokens, dtype=torch.long, device=keys.device)
    if codes.key_dims % 2:
        key_codes = torch.nn.functional.pad(key_codes, (0, 1))
    by_token = codes.key_codes.permute(2, 4, 0, 1, 3, 5)  # (C / 16, 16, B, H, P, 2)
    by_token[place // TILE, place % TILE] = key_codes.permute(2, 0, 1, 3).unflatten(-1, (-1, 2))
    codes.key_scale[:, :, at : at + tokens] = key_scale
    rows = codes.value_codes[:, :, at : at + tokens]
    rows[..., : codes.value_dims] = value_codes
    rows[..., codes.value_dims :] = 0
    codes.value_scale[:, :, at : at + tokens] = value_scale


def block_of(dims: int) -> int:
    """Of how many elements the blocks are in which keys are rotated: the largest power of two that divides them."""
    return dims & -dims


def rotated(x: Tensor) -> Tensor:
    """H x: (..., D) of any float dtype -> float32, with the additions in the kernel's order.

    Within `TILE` elements a sum over them one after the other, from there on sums and differences of what lies further
    apart.
    """
    block = block_of(x.shape[-1])
    near = min(block, TILE)
    signs = torch.ones((1, 1), dtype=torch.float32, device=x.device)
    while len(signs) < near:
        signs = torch.cat([torch.cat([signs, signs], 1), torch.cat([signs, -signs], 1)])
    parts = x.to(torch.float32).unflatten(-1, (x.shape[-1] // near, near))
    found = torch.zeros_like(parts)
    for element in range(near):
        found = found + parts[..., element, None] * signs[element]
    found = found.flatten(-2)
    apart = near
    while apart < block:
        a, b = found.unflatten(-1, (x.shape[-1] // (2 * apart), 2, apart)).unbind(-2)
        found = torch.stack((a + b, a - b), -2).flatten(-3)
        apart *= 2
    return found


def _quantized_keys(x: Tensor) -> tuple[Tensor, Tensor]:
    """As `_quantized`, (B, H, T, D) float32, with the scales that suit best."""
    codes, scale = _quantized(x)
    rows, top = x.reshape(-1, x.shape[-1]), x.abs().amax(-1).view(-1, 1)
    scaled = (top > 0) & top.isfinite()
    steps = torch.arange(127, 127 - STEPS, -1, dtype=torch.float32, device=x.device)
    inverse = steps / top.masked_fill(~scaled, 1.0)  # (M, STEPS)
    errors = torch.zeros_like(inverse)
    for element in rows.unbind(-1):  # one after the other, as the kernel adds
        off = element[:, None] * inverse
        off = off - torch.round(off)
        errors = errors + off * off
    errors = (errors * (1 / (steps * steps))).nan_to_num(torch.inf, torch.inf)
    first = torch.where(errors == errors.amin(-1, keepdim=True), steps, 0).amax(-1, keepdim=True)
    smallest = torch.finfo(torch.float32).smallest_normal
    best = (top / first).clamp_min(smallest).view_as(scale)
    scaled = scaled.view_as(scale)
    found = torch.clamp(torch.round(x / best[..., None]), -127, 127)
    return torch.where(scaled[..., None], found, codes).to(torch.int8), torch.where(scaled, best, scale)


def _quantized(x: Tensor) -> tuple[Tensor, Tensor]:
    """(B, H, T, D) -> codes of that shape and scales (B, H, T); zeros and NaN for a token that is not finite."""
    found = quantize_tokens(x.reshape(-1, x.shape[-1]), _GRID)
    codes = found.codes.masked_fill(found.scale.isnan(), 0)
    return codes.view(x.shape), found.scale.view(x.shape[:-1])


def keys_of(codes: Codes, start: int, end: int, dtype: torch.dtype) -> Tensor:
    """The keys of tokens start..end, dequantised: (B, H, T, D)."""
    return _read(codes, start, end, dtype, keys=True)


def values_of(codes: Codes, start: int, end: int, dtype: torch.dtype) -> Tensor:
    """The values of tokens start..end, dequantised: (B, H, T, D)."""
    return _read(codes, start, end, dtype, keys=False)


def _read(codes: Codes, start: int, end: int, dtype: torch.dtype, *, keys: bool) -> Tensor:
    functions = library()
    if not isinstance(functions, str) and dtype in DTYPES:
        dims = codes.key_dims if keys else codes.value_dims
        shape = (*codes.key_scale.shape[:2], end - start, dims)
        found = torch.empty(shape, dtype=dtype, device=codes.key_scale.device)
        if functions.cached_read(codes, start, keys, found):
            return found
    return (plain_keys if keys else plain_values)(codes, start, end, dtype)


def plain_keys(codes: Codes, start: int, end: int, dtype: torch.dtype) -> Tensor:
    """The oracle of `keys_of`."""
    turned = _key_codes(codes, start, end).to(torch.float32)
    scale = codes.key_scale[:, :, start:end, None] / block_of(codes.key_dims)
    return (rotated(turned) * scale).to(dtype)


def _key_codes(codes: Codes, start: int, end: int) -> Tensor:
    """(B, H, T, D) int8."""
    first, last = start // TILE, -(-end // TILE)
    tiles = codes.key_codes[:, :, first:last].permute(0, 1, 2, 4, 3, 5)  # (B, H, tiles, 16, P, 2)
    return tiles.flatten(-2).flatten(2, 3)[:, :, start - first * TILE : end - first * TILE, : codes.key_dims]


def plain_values(codes: Codes, start: int, end: int, dtype: torch.dtype) -> Tensor:
    """The oracle of `values_of`."""
    rows = codes.value_codes[:, :, start:end, : codes.value_dims]
    return (rows * codes.value_scale[:, :, start:end, None]).to(dtype)


def copied(codes: Codes, start: int, end: int, room: int) -> Codes:
    """The tokens start..end at the front of new room; start is a multiple of `TILE`."""
    batch, heads, _ = codes.key_scale.shape
    found = empty(batch, heads, room, codes.key_dims, codes.value_dims, codes.key_scale.device)
    first, last = start // TILE, -(-end // TILE)
    found.key_codes[:, :, : last - first] = codes.key_codes[:, :, first:last]
    for name in ("key_scale", "value_codes", "value_scale"):
        getattr(found, name)[:, :, : end - start] = getattr(codes, name)[:, :, start:end]
    return found


def chosen(codes: Codes, sequences: Tensor | slice) -> Codes:
    """Some of the sequences, each as often as it is named: indices (B,), or which of them; of a slice a view."""
    return codes._replace(
        key_codes=codes.key_codes[sequences],
        key_scale=codes.key_scale[sequences],
        value_codes=codes.value_codes[sequences],
        value_scale=codes.value_scale[sequences],
    )


class Asked(NamedTuple):
    """What is asked of attention, beside its operands.

    scale: Of the scores.
    mask: (B | 1, H | 1, T | 1, S), float32 to add to the scores, or whether a key is seen; or None.
    causal: Whether query i of T sees the keys 0..S - T + i only.
    softcap: What the scores are bent to stay below, or None.
    sinks: (H,) float32, scores of a key without a value, or None.
    """

    scale: float
    mask: Tensor | None = None
    causal: bool = False
    softcap: float | None = None
    sinks: Tensor | None = None


def attend(q: Tensor, codes: Codes, start: int, end: int, asked: Asked) -> Tensor | None:
    """Attention of a few queries over tokens start..end.

    Args:
        q: (B, Hq, T, D), where H divides Hq.
        codes: Of B sequences and H heads.
        start, end: S = end - start keys are looked at.
        asked: The rest.

    Returns:
        (B, T, Hq, Dv), contiguous, in the dtype of q; zeros for a query that sees no key.  None where the kernel
        cannot.
    """
    functions = library()
    if isinstance(functions, str) or q.shape[-1] > MOST_DIMS:
        return None
    found: Tensor | None = functions.cached_attend(q, codes, start, end, *asked)
    return found


def plain_attend(q: Tensor, codes: Codes, start: int, end: int, asked: Asked) -> Tensor:
    """The oracle of `attend`."""
    found = _query_codes(rotated(q).reshape(-1, q.shape[-1]))
    scores = _integer_scores(found[0].view(q.shape), codes, start, end)
    factor = (found[1] * (asked.scale / block_of(q.shape[-1]))).view(*q.shape[:-1], 1)
    shared = q.shape[1] // codes.key_scale.shape[1]
    by_key = codes.key_scale[:, :, start:end].repeat_interleave(shared, 1).unsqueeze(2)
    values = plain_values(codes, start, end, torch.float32)
    return weighed(scores.to(torch.float32) * factor * by_key, values, asked).to(q.dtype)


def _query_codes(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Codes of 16 bits, as float32, and scales (M, 1); NaN for a row that is not finite."""
    lo, hi = value_range(rows, (1,))
    bad = ~(lo.isfinite() & hi.isfinite())
    scale = grid_of_range(lo.masked_fill(bad, 0.0), hi.masked_fill(bad, 0.0), _QUERY).scale.masked_fill(bad, torch.nan)
    return round_to_codes(rows, scale, None, _QUERY), scale


def _integer_scores(q: Tensor, codes: Codes, start: int, end: int) -> Tensor:
    """(B, Hq, T, S) int64, exact."""
    keys = _key_codes(codes, start, end).to(torch.float64).repeat_interleave(q.shape[1] // codes.key_scale.shape[1], 1)
    return q.nan_to_num().to(torch.float64) @ keys.transpose(-1, -2)


def weighed(scores: Tensor, values: Tensor, asked: Asked) -> Tensor:
    """Values weighed by softmax: what comes after the scaled scores.

    Args:
        scores: (B, Hq, T, S) float32, scaled.
        values: (B, H, S, D) float32.
        asked: Its scale is not read.

    Returns:
        (B, T, Hq, D) float32, contiguous.
    """
    _, heads, queries, keys = scores.shape
    if asked.softcap is not None:
        scores = torch.tanh(scores / asked.softcap) * asked.softcap
    if asked.mask is not None:
        hidden = ~asked.mask if asked.mask.dtype == torch.bool else asked.mask.isneginf()
        scores = scores if asked.mask.dtype == torch.bool else scores + asked.mask
        scores = scores.masked_fill(hidden, -torch.inf)
    if asked.causal:
        seen = torch.ones(queries, keys, dtype=torch.bool, device=scores.device).tril(keys - queries)
        scores = scores.masked_fill(~seen, -torch.inf)
    top = scores.amax(-1, keepdim=True)
    if asked.sinks is not None:
        sinks = asked.sinks.to(torch.float32).view(1, -1, 1, 1)
        top = torch.maximum(top, sinks)
    top = top.masked_fill(top.isneginf(), 0.0)
    weights = torch.exp(scores - top)
    whole = weights.sum(-1, keepdim=True)
    if asked.sinks is not None:
        whole = whole + torch.exp(sinks - top)
    shared = values.repeat_interleave(heads // values.shape[1], 1)
    spoiled = ~shared.isfinite()
    if bool(spoiled.any()):  # what has no weight may be anything
        met = (weights > 0).to(torch.float32) @ spoiled.to(torch.float32) > 0
        found = (weights @ shared.masked_fill(spoiled, 0.0)).masked_fill(met, torch.nan)
    else:
        found = weights @ shared
    return (found / whole.masked_fill(whole == 0, 1.0)).transpose(1, 2).contiguous()
