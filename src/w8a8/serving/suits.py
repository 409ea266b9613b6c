"""Whether a model can be run packed: seen by running it so, beside the model as it is.

No list of names can tell: models of one type differ by their config, and code of a repository by anything.  Two
sequences are read in pieces, in one batch, and their logits must be those that the model gives each of them alone.
What cannot be seen on few tokens is asked of the modules: a rotary table that follows the longest sequence of a batch.
"""

import torch
from transformers import DynamicCache

from w8a8.decoding.likeness import apart, most_apart, read, texts_for
from w8a8.defaults import usual_defaults
from w8a8.errors import OTHERS_ERRORS
from w8a8.model.pretrained import Pretrained
from w8a8.serving.engine import forward
from w8a8.serving.packed import NAME, Piece, Step
from w8a8.serving.places import Places

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
    first, second = texts = texts_for(model)
    alone = [read(model, ids) for ids in texts]
    most = most_apart(model, texts, alone)
    model.set_attn_implementation(NAME)
    store = Places(3, 16)
    pieces = [Piece(0, 0, 7, 0), Piece(2, 7, 6, 0)]
    read_first = Step.of(store, pieces, model.device)
    forward(model, first[:7] + second[:6], read_first, [])
    if not store.layers():
        return "its attention cannot be exchanged"
    why = _hidden_window(model, read_first.windows)
    if why is not None:
        return why
    rest = [Piece(0, 0, 1, 7), Piece(2, 1, 6, 6)]
    step = Step.of(store, rest, model.device)
    together = forward(model, first[7:] + second[6:12], step, [0, 6])
    last = Step.of(store, [Piece(2, 0, 1, 12)], model.device)
    ends = [together[0], forward(model, second[12:], last, [0])[0]]
    found = max(apart(ours, theirs[-1]) for ours, theirs in zip(ends, alone, strict=True))
    if not found <= most:  # NaN too
        return f"its logits are {found:.2g} from those of the model as it is, where {most:.2g} is allowed"
    return None


def _hidden_window(model: Pretrained, told: dict[int, int | None]) -> str | None:
    """Which layer sees only some of the past, and does not tell its attention so; None where none does.

    Of such a window, or of chunks, only a mask knows, and on few tokens it hides nothing.
    """
    for place, layer in enumerate(DynamicCache(config=model.config).layers):
        if getattr(layer, "is_sliding", False) and place in told and told[place] is None:
            return f"layer {place} sees no more than a window of the past, which its attention is not told"
    return None
