"""Codes that lie side by side in int32 words: the `pack-quantized` format of compressed-tensors.

    word j of a row = sum_i (code[j * per + i] + 2**(b-1)) * 2**(b * i),   per = 32 / b codes to a word

`weight_packed` is int32 (N, ceil(K / per)), `weight_shape` is (N, K).  Zero points lie in words along N instead, int32
(ceil(N / per), G); a single one for a whole tensor is not packed.  The words are little-endian in the file, so that its
bytes are the codes of 8 bits, shifted; they are unpacked from bytes, once, while loading.  Where K fills no whole word,
the last one of a row ends in zero bits.

`in_words` says which schemes are written so.  In memory codes are int8 whatever the file has: words that stay mapped
would be unpacked at each call.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from w8a8.core.scheme import PerChannel, PerGroup, Scheme

WORDS, SHAPE = "weight_packed", "weight_shape"
"""What a layer's file has instead of `weight`."""


def in_words(scheme: Scheme) -> bool:
    """Whether the codes of a scheme are written in words: 8 bits, symmetric, per channel or group, weight-only.

    vLLM reads weight-only codes in no other format.  What it has no kernel for, and codes with zero points, which
    transformers 5.23 does not load from words, are written as int8.
    """
    weights = scheme.weights
    fits = weights.bits == 8 and weights.symmetric and isinstance(weights.granularity, PerChannel | PerGroup)
    return scheme.weight_only and fits


def as_words(codes: Tensor) -> dict[str, Tensor]:
    """What a file has of a weight with these codes, (N, K) int8, not modified, on any device; by name."""
    return {WORDS: pack_rows(codes), SHAPE: torch.tensor(codes.shape, device=codes.device, dtype=torch.int64)}


def pack_rows(codes: Tensor) -> Tensor:
    """Codes of 8 bits, four to a word: (rows, K) int8, not modified -> (rows, ceil(K / 4)) int32."""
    octets = codes.contiguous().view(torch.uint8).bitwise_xor(128)  # code + 128
    rest = -codes.shape[1] % 4
    return (F.pad(octets, (0, rest)) if rest else octets).view(torch.int32)


def unpack_rows(packed: Tensor, bits: int, k: int) -> Tensor:
    """The codes of each row.

    Args:
        packed: (N, ceil(K * bits / 32)) int32, contiguous.  Not modified.
        bits: 8, 4 or 2.

    Returns:
        (N, K) int8, new.
    """
    octets = packed.view(torch.uint8)
    mask, offset = 2**bits - 1, 2 ** (bits - 1)
    if bits == 8:
        return octets[:, :k].bitwise_xor(offset).view(torch.int8)  # code + 128 as uint8, less 128
    codes = torch.empty((*octets.shape, 8 // bits), dtype=torch.int8, device=packed.device)
    for i in range(8 // bits):
        codes[..., i] = (octets >> (bits * i)).bitwise_and_(mask).view(torch.int8) - offset
    return codes.view(packed.shape[0], -1)[:, :k].contiguous()


def words(count: int, bits: int) -> int:
    """How many int32 hold so many codes."""
    return -(-count * bits // 32)
