"""What a model of each kind is asked about a window of a text, and how far two answers are apart: in nats.

    causal        the token after each                    KL(float || model), a token
    masked        `MASKS` of its tokens, each masked in   the same, of the pseudo-perplexity
                  a copy of its own
    with labels   the labels that its head gives          KL of their probabilities, a text (of labels of tokens, the
                                                          mean); by a sigmoid each, where they do not exclude another
    other         a vector: of the last states            1 - cosine, a text

The last is a KL as well: of two normal distributions of unit variance, around the two vectors scaled to length one.
Of an embedder it is the vector that its directory makes of them, pooling and dense layers included; else their mean.

A masked model is asked about a few tokens of a window only: each costs a forward of the whole, and a sweep over layers
runs every window twice for each of them.
"""

import enum
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from w8a8.errors import ModelError
from w8a8.evaluation.scores import batch_logits, logits_of, token_kl
from w8a8.evaluation.text import Frame, framed
from w8a8.model.kinds import Kind, kind_of_model
from w8a8.model.pretrained import Pretrained

MASKS = 8
"""Tokens of a window that a masked model is asked about."""


class Told(enum.Enum):
    """What a model tells of a window, in the words in which its distance from the float model's answer is told."""

    NEXT = "KL(float || quantised), nats per token"
    MASKED = "KL(float || quantised) of masked tokens, nats per token"
    LABEL = "KL(float || quantised) of the label, nats per text"
    LABELS = "KL(float || quantised) of each label by itself, summed, nats per text"
    VECTOR = "1 - cosine of the vector with the float model's, per text"


@dataclass(frozen=True)
class Window:
    """A window of a text, as a model of one kind is asked about it.

    start: Where it begins in the text.
    ids: (T,) its tokens.
    told: What the model tells.
    inputs: (B, T') what it is called with: special tokens around, and in each copy a mask.
    masks: (B,) where that is; None where there is none.
    targets: (S,) the tokens that are told; None where none are.
    vectors: What makes a vector of the last states; None: the mean.
    """

    start: int
    ids: Tensor
    told: Told
    inputs: Tensor
    masks: Tensor | None = None
    targets: Tensor | None = None
    vectors: Callable[[Tensor], Tensor] | None = None

    @classmethod
    def of(
        cls,
        ids: Tensor,
        start: int,
        told: Told = Told.NEXT,
        frame: Frame | None = None,
        vectors: Callable[[Tensor], Tensor] | None = None,
    ) -> "Window":
        """The question about the tokens (T,) that begin there."""
        if told is Told.NEXT:
            return cls(start, ids, told, ids[None], targets=ids[1:])
        whole = framed(ids, frame)
        if told is not Told.MASKED:
            return cls(start, ids, told, whole[None], vectors=vectors)
        assert frame is not None, "seen when the text was cut"
        count = min(MASKS, len(ids))
        places = ids.new_tensor([(2 * i + 1) * len(ids) // (2 * count) for i in range(count)])  # evenly, none at an end
        masks = places + len(frame.before)
        copies = whole.repeat(count, 1)
        copies[torch.arange(count, dtype=torch.int64, device=ids.device), masks] = frame.mask
        return cls(start, ids, told, copies, masks, ids[places])

    @property
    def scored(self) -> int:
        """How many things are told: tokens, or the one text."""
        return 1 if self.targets is None else len(self.targets)

    def answer(self, model: Pretrained) -> Tensor:
        """What a model says: (S, V) logits of tokens, (R, L) of labels, or a vector (1, C).

        Raises:
            ModelError: it does not say that, or what it says is not finite.
        """
        if self.told is Told.NEXT:
            return logits_of(model, self.ids, self.start)[:-1]
        if self.masks is not None:
            copies = torch.arange(len(self.masks), dtype=torch.int64, device=self.masks.device)
            return batch_logits(model, self.inputs, self.start)[copies, self.masks]
        answer = _labels_or_states(model, self.inputs, base=self.vectors is not None)[1]
        if not bool(torch.isfinite(answer).all()):
            raise ModelError(
                f"what {type(model).__name__} says of the window at token {self.start} is not finite; a model in "
                f"{answer.dtype} may overflow, try float32 or bfloat16"
            )
        if self.told is not Told.VECTOR:
            return answer
        return self.vectors(answer[None]) if self.vectors is not None else answer.float().mean(0)[None]

    def divergence(self, exact: Tensor, other: Tensor) -> float:
        """How far an answer is from the float model's, nats, summed over what is told."""
        if self.told is Told.VECTOR:
            a, b = (answer.to(torch.float64) for answer in (exact, other))
            return max(0.0, float(1 - nn.functional.cosine_similarity(a, b, dim=-1)))
        rows = len(exact)
        if self.told is Told.LABELS:  # of each label: that it is, and that it is not
            exact, other = (torch.stack([z, torch.zeros_like(z)], -1).flatten(0, 1) for z in (exact, other))
        total = float(token_kl(exact, other).to(torch.float64).sum())
        return total if self.targets is not None else total / rows


def told_of(model: Pretrained, ids: Tensor) -> Told:
    """What a model tells of a text, seen by showing it some tokens (T,).

    Raises:
        ModelError: neither tokens nor labels nor states.
    """
    kind = kind_of_model(model)
    if kind is not Kind.TEXT:
        return Told.MASKED if kind is Kind.MASKED else Told.NEXT
    labels, _ = _labels_or_states(model, ids[None])
    if not labels:
        return Told.VECTOR
    config = model.config
    return Told.LABELS if config.num_labels == 1 or config.problem_type == "multi_label_classification" else Told.LABEL


@torch.inference_mode()
def _labels_or_states(model: Pretrained, inputs: Tensor, *, base: bool = False) -> tuple[bool, Tensor]:
    """Whether a model of text, or its base, gives logits of labels, and these (R, L), or its last states (T, C)."""
    out = (model.base_model if base else model)(input_ids=inputs.to(model.device))
    for name in ("logits", "last_hidden_state", "pooler_output"):
        found = getattr(out, name, None)
        if isinstance(found, Tensor) and found.ndim >= 2:
            return name == "logits", found.flatten(0, -2)
    raise ModelError(
        f"{type(model).__name__} was to be asked about a text, and gives {', '.join(out)}: neither labels nor states"
    )
