"""Codes that lie side by side in int32 words: the `pack-quantized` format of compressed-tensors.

    word j of a row = sum_i (code[j * per + i] + 2**(b-1)) * 2**(b * i),   per = 32 / b codes to a word

`weight_packed` is int32 (N, ceil(K / per)), `weight_shape` is (N, K).  Zero points lie in words along N instead, int32
(ceil(N / per), G); a single one for a whole tensor is not packed.  The words are little-endian in the file, so that its
bytes are the codes of 8 bits, shifted; they are unpacked from bytes, once, while loading.
"""

import torch
from torch import Tensor


def unpack_rows(packed: Tensor, bits: int, k: int) -> Tensor:
    """The codes of each row.

    Args:
        packed: (N, ceil(K * bits / 32)) int32, contiguous.  Not modified.
        bits: 8, 4 or 2.
        k: K.

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
