"""How far another attention may be from a model's own: as far as the model is from itself where it rounds otherwise.

Whoever exchanges attention compares logits.  Sums in another order are rounded to other numbers, and in 16 bits each
layer does that anew, so that deep or sharp models are far from themselves; a fixed distance refused these.  Nor is
one of transformers' ways of attention a measure for another: some models have only one, and of others one leaves out
what the other computes, such as a soft cap.  So the model is read twice with the attention that it has, once with some
elements of its embeddings moved by one rounding: whatever is rounded behind them is drawn anew.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from w8a8.model.kinds import input_config
from w8a8.model.pretrained import Pretrained

APART = 1e-2
"""How far logits may be in any case: the norm of the difference over the norm.  Sums in another order move a code of an
integer layer now and then."""

NOISE = 3.0
"""And how far by how far a model is from itself.  An attention that computes the same was at most 2.5 times that away,
with 2 and 24 layers of ten families, flat and sharp, in bfloat16 and float16, six seeds of each."""

_MOVED = 8  # one element in so many: their share of the whole is what rounding all of them brings


def texts_for(model: Pretrained) -> tuple[list[int], list[int]]:
    """Tokens to compare by: 8 and 13 of the model's."""
    words = int(getattr(input_config(model.config), "vocab_size", 2))
    first, second = ([(7 * i * i + 3 * i + seed) % words for i in range(count)] for seed, count in ((1, 8), (2, 13)))
    return first, second


def read(model: Pretrained, ids: list[int]) -> Tensor:
    """Logits of a text without a cache, (T, words) float64."""
    given = torch.tensor([ids], dtype=torch.long, device=model.device)
    found: Tensor = model(input_ids=given, use_cache=False).logits[0]
    return found.to(torch.float64)


def apart(ours: Tensor, theirs: Tensor) -> float:
    """The norm of the difference over the norm of theirs; NaN where one of them is."""
    a, b = ours.to(torch.float64), theirs.to(torch.float64)
    return float((a - b).norm() / b.norm())


def most_apart(model: Pretrained, texts: Sequence[list[int]], wanted: Sequence[Tensor]) -> float:
    """How far logits by another attention may be from the model's.

    Args:
        model: With its own attention.
        texts: What is read.
        wanted: The logits that it has of each.
    """
    moved = model.get_input_embeddings().register_forward_hook(_moved)
    try:
        noise = max(apart(read(model, ids), logits) for ids, logits in zip(texts, wanted, strict=True))
    finally:
        moved.remove()
    return max(APART, NOISE * noise)


def _moved(_: object, __: object, found: Tensor) -> Tensor:
    share = torch.zeros(found.numel(), dtype=found.dtype, device=found.device)
    share[::_MOVED] = torch.finfo(found.dtype).eps
    return found + found * share.view_as(found)
