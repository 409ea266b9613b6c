"""Whether a model can be run packed: seen by running it so, beside the model as it is.

No list of names can tell: models of one type differ by their config, and code of a repository by anything.  Two
sequences are read in pieces, in one batch, and their logits must be those that the model gives each of them alone.
What cannot be seen on few tokens is asked of the modules: a rotary table that follows the longest sequence of a batch.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from w8a8.checkpoint.architecture import OTHERS_ERRORS
from w8a8.defaults import usual_defaults
from w8a8.model.kinds import input_config
from w8a8.model.pretrained import Pretrained
from w8a8.serving.engine import forward
from w8a8.serving.packed import NAME, Piece, Step
from w8a8.serving.places import Places

APART = 1e-2
"""How far the logits may be from those of the model as it is: the norm of the difference over the norm.  Attention adds
in another order, and that moves a code of an integer layer now and then."""

NOISE = 3.0
"""And how far where sums are rounded to 16 bits, in every layer anew: times what lies between transformers' own two
ways of attention.  What computes something else is further away than deep models in bfloat16 bring that."""

_FOLLOWING = ("dynamic", "longrope")
"""Kinds of rotary tables that are made anew for the longest sequence of a batch."""


def set_packed(model: Pretrained) -> str | None:
    """Give a model the attention of `packed`, where it computes what it did.

    Args:
        model: A causal language model of transformers; as it was where it does not suit.

    Returns:
        Why it does not suit; None where it does.
    """
    for name, module in model.named_modules():
        if str(getattr(module, "rope_type", "")) in _FOLLOWING:
            return f"{name} has a rotary table that follows the longest sequence of a batch"
    before = model.config._attn_implementation
    try:
        with usual_defaults(), torch.inference_mode():
            why = _differs(model)
    except OTHERS_ERRORS as error:
        why = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    if why is not None:
        model.set_attn_implementation(before)
    return why


def bytes_per_token(model: Pretrained, kind: str) -> int:
    """What keys and values of a token take, seen by writing some.

    Args:
        model: With the attention of `packed`.
        kind: How they are kept.
    """
    store = Places(1, 2, kind)
    with usual_defaults(), torch.inference_mode():
        forward(model, [0, 0], Step.of(store, [Piece(0, 0, 2, 0)], model.device), [])
    return store.bytes_per_token()


def _differs(model: Pretrained) -> str | None:
    words = int(getattr(input_config(model.config), "vocab_size", 2))
    first, second = ([(7 * i * i + 3 * i + seed) % words for i in range(count)] for seed, count in ((1, 8), (2, 13)))
    alone = [_alone(model, ids) for ids in (first, second)]
    most = max(APART, NOISE * _noise(model, (first, second), alone))
    model.set_attn_implementation(NAME)
    store = Places(3, 16)
    read = [Piece(0, 0, 7, 0), Piece(2, 7, 6, 0)]
    forward(model, first[:7] + second[:6], Step.of(store, read, model.device), [])
    if not store.layers():
        return "its attention cannot be exchanged"
    rest = [Piece(0, 0, 1, 7), Piece(2, 1, 6, 6)]
    step = Step.of(store, rest, model.device)
    together = forward(model, first[7:] + second[6:12], step, [0, 6])
    last = Step.of(store, [Piece(2, 0, 1, 12)], model.device)
    ends = [together[0], forward(model, second[12:], last, [0])[0]]
    apart = max(_apart(ours, theirs) for ours, theirs in zip(ends, alone, strict=True))
    if not apart <= most:  # NaN too
        return f"its logits are {apart:.2g} from those of the model as it is, where {most:.2g} is allowed"
    return None


def _noise(model: Pretrained, texts: Sequence[list[int]], alone: Sequence[Tensor]) -> float:
    """How far a model is from itself where its attention adds in another order; 0 where it has but one."""
    own = model.config._attn_implementation
    if own == "eager" and not model._supports_sdpa:
        return 0.0
    model.set_attn_implementation("sdpa" if own == "eager" else "eager")
    return max(_apart(_alone(model, ids), logits) for ids, logits in zip(texts, alone, strict=True))


def _alone(model: Pretrained, ids: list[int]) -> Tensor:
    given = torch.tensor([ids], dtype=torch.long, device=model.device)
    found: Tensor = model(input_ids=given, use_cache=False).logits[0, -1]
    return found


def _apart(ours: Tensor, theirs: Tensor) -> float:
    a, b = ours.double(), theirs.double()
    return float((a - b).norm() / b.norm())
