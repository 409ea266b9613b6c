"""One query of each of several sequences, over keys and values of its own: what many clients ask of attention at once.

What is kept are the `Codes` of `cached`, or keys and values as they came, (P, H, C, D): P sequences, H heads, room for
C tokens.  A row of `ranges`, int32, says for a query which of the sequences it looks at, and from which token to which.
So nobody pays for the longest, and nothing is copied.  The work is shared out by sequence, head and piece of the past.

Over codes it is to the bit what `cached.attend` gives each sequence alone.  Over floats all sums are float32, within
1e-5 of the largest magnitude of the values of what double precision gives; all instruction sets and any number of
threads give the same bits.
"""

import torch
from torch import Tensor

from w8a8.kernels.cached import MOST_DIMS, Codes, chosen, plain_append
from w8a8.kernels.compiled import library


def deal(codes: Codes, keys: Tensor, values: Tensor, where: Tensor) -> None:
    """Quantise tokens of several sequences into their places.

    Args:
        codes: Written to.
        keys, values: (1, H, T, D), any float dtype and strides.  Not modified.
        where: (T, 2) int32, of each token the sequence and its place there.
    """
    functions = library()
    if not isinstance(functions, str) and functions.cached_deal(codes, keys, values, where):
        return
    for token, (sequence, place) in enumerate(where.tolist()):
        own = chosen(codes, slice(sequence, sequence + 1))
        plain_append(own, keys[:, :, token, None], values[:, :, token, None], place)


def attend_each(
    q: Tensor,
    kept: Codes | tuple[Tensor, Tensor],
    ranges: Tensor,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor | None:
    """Attention of one query of each sequence.

    Args:
        q: (B, Hq, 1, D), where H divides Hq.
        kept: What it looks at; floats are of the dtype of q, with an inner stride of one.
        ranges: (B, 3) int32: sequence, first token, and the one behind the last.
        scale: Of the scores.
        softcap, sinks: As of `cached.Asked`.

    Returns:
        (B, Hq, Dv), contiguous, in the dtype of q.  None where the kernel cannot.
    """
    functions = library()
    if isinstance(functions, str) or q.shape[-1] > MOST_DIMS:
        return None
    found: Tensor | None = functions.cached_each(q, kept, ranges, scale, softcap, sinks)
    return found


def ranges_of(sequences: list[tuple[int, int, int]], device: torch.device) -> Tensor:
    """(sequence, start, end) of each query, as `attend_each` takes them."""
    return torch.tensor(sequences, dtype=torch.int32, device=device).view(-1, 3)
