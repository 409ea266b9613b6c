"""A text as token ids, with the bytes that each token stands for, cut into windows."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from w8a8.errors import ModelError, TextError
from w8a8.model.kinds import context_length
from w8a8.model.pretrained import Tokenizer


@dataclass(frozen=True)
class Frame:
    """What a masked language model reads around a window, and in the place of the token that it is to tell."""

    mask: int
    before: tuple[int, ...]
    after: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.before) + len(self.after)


def framed(ids: Tensor, frame: Frame | None) -> Tensor:
    """A window, (T,), with what is read around it."""
    return ids if frame is None else torch.cat([ids.new_tensor(frame.before), ids, ids.new_tensor(frame.after)])


@dataclass(frozen=True)
class Text:
    """A tokenised text.

    ids: (T,) int64.
    byte_ends: (T,) int64, how many UTF-8 bytes of the text end with each token; None where the tokenizer does not say.
    frame: None where the tokenizer has no token for a mask.
    vectors: What makes vectors (B, W) of the last states (B, T, C) of an embedder; None: it is none, or by the mean.
    """

    ids: Tensor
    byte_ends: Tensor | None = None
    frame: Frame | None = None
    vectors: Callable[[Tensor], Tensor] | None = None

    def first(self, tokens: int | None) -> "Text":
        """The first so many tokens."""
        ends = None if self.byte_ends is None else self.byte_ends[:tokens]
        return replace(self, ids=self.ids[:tokens], byte_ends=ends)

    def bytes_between(self, first: int, end: int) -> int:
        """How many bytes the tokens from `first` up to `end` stand for."""
        assert self.byte_ends is not None, "asked before"
        return int(self.byte_ends[end - 1]) - (int(self.byte_ends[first - 1]) if first else 0)


def encode(tokenizer: Tokenizer | None, text: str, vectors: Callable[[Tensor], Tensor] | None = None) -> Text:
    """A text, tokenised without special tokens, for a model of whose states vectors are made so, if any.

    Raises:
        ModelError: there is no tokenizer.
        TextError: fewer than two tokens.
    """
    if tokenizer is None:
        raise ModelError("the model's directory has no tokenizer, so a text cannot be read; save one beside it")
    offsets = bool(getattr(tokenizer, "is_fast", False))
    found = tokenizer(text, add_special_tokens=False, verbose=False, return_offsets_mapping=offsets)
    ids = torch.tensor(found["input_ids"], dtype=torch.int64, device="cpu")
    if ids.numel() < 2:
        raise TextError(f"the text has {ids.numel()} tokens; scoring needs two or more")
    ends = _byte_ends(text, found["offset_mapping"]) if offsets else None
    return Text(ids, ends, _frame(tokenizer, text[:64]), vectors)


def _frame(tokenizer: Tokenizer, text: str) -> Frame | None:
    """What the tokenizer puts around a text."""
    mask = getattr(tokenizer, "mask_token_id", None)
    if mask is None:
        return None
    plain, framed = (tokenizer(text, add_special_tokens=special)["input_ids"] for special in (False, True))
    starts = range(len(framed) - len(plain) + 1)
    start = next((start for start in starts if framed[start : start + len(plain)] == plain), None)
    if start is None:
        return Frame(int(mask), (), ())
    return Frame(int(mask), tuple(framed[:start]), tuple(framed[start + len(plain) :]))


def _byte_ends(text: str, offsets: list[tuple[int, int]]) -> Tensor:
    """UTF-8 bytes before the end of each token, from its end in characters."""
    ends, seen, at = [], 0, 0
    for _, end in offsets:
        seen += len(text[at:end].encode()) if end > at else 0
        at = max(at, end)
        ends.append(seen)
    return torch.tensor(ends, dtype=torch.int64, device="cpu")


def windows(tokens: int, seq_len: int, stride: int, *, unscored: int = 1) -> Iterator[tuple[int, int, int]]:
    """(start, first scored, end) of each window over a text of so many tokens, of which so many are not scored."""
    scored_to = 0
    for start in range(0, tokens, stride):
        end = min(start + seq_len, tokens)
        first = max(scored_to, start + unscored)
        if first < end:
            yield start, first, end
        scored_to = end
        if end == tokens:
            return


def windows_for(
    model: nn.Module, ids: Tensor, seq_len: int, stride: int | None, *, frame: Frame | None = None
) -> list[tuple[int, int, int]]:
    """The windows of a text that a model can score; with a frame every token of each is.

    Raises:
        ModelError: seq_len or stride out of range; ids that the model does not know.
        TextError: fewer than two tokens.
    """
    limit = context_length(model)
    if limit is not None and frame is not None:
        limit -= len(frame)
    if seq_len < 2 or (limit is not None and seq_len > limit):
        raise ModelError(f"seq_len={seq_len} is out of range: 2..{limit or ''} for this model")
    if stride is not None and not 1 <= stride <= seq_len:
        raise ModelError(f"stride={stride} is out of range: 1..seq_len={seq_len}")
    if ids.ndim != 1 or ids.numel() < 2:
        raise TextError(f"the text has {ids.numel()} tokens; scoring needs two or more")
    vocabulary, largest = getattr(model.config, "vocab_size", None), int(ids.max())
    if vocabulary is not None and largest >= vocabulary:
        raise ModelError(
            f"the text has the token id {largest}, {type(model).__name__} knows 0..{vocabulary - 1}: "
            "it was encoded with the tokenizer of another model"
        )
    return list(windows(ids.numel(), seq_len, stride or seq_len, unscored=1 if frame is None else 0))
