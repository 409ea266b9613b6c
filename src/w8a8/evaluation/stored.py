"""What a comparison needs of the reference's predictions, stored, so that two models need not be in memory at once.

Of each scored token: the log-probability of the target, the most likely token, and the k most likely tokens with
their log-probabilities; the rest of the vocabulary is one number, its probability.  The divergence is then measured
between distributions over k + 1 outcomes, the k tokens and "another one", which is never more than the true one
(merging outcomes cannot increase a divergence: Cover and Thomas, Elements of Information Theory, theorem 2.8.1
applied to a partition), and equal to it for k = V.  Perplexity and agreement are exact.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from w8a8.checkpoint.files import header, opened
from w8a8.core.progress import Progress, tell
from w8a8.errors import CheckpointError, ModelError
from w8a8.evaluation.scores import ROWS, cut, predictions, token_losses
from w8a8.evaluation.text import Text
from w8a8.model.pretrained import Pretrained

TOP_K = 512
_TENSORS = ("losses", "best", "top", "log_p", "log_rest")


@dataclass(frozen=True)
class Reference:
    """A model's predictions of a text.

    losses: (S,) float64, nats of each scored token.
    best: (S,) int64, the most likely token.
    top: (S, k) int32 and log_p: (S, k) float32, the most likely tokens and their log-probabilities.
    log_rest: (S,) float32, the log-probability of all other tokens together.
    model: What the predictions are of: a fingerprint of the reference's files, or any other name of it.
    vocabulary, seq_len, stride: What it was made with.
    text: The SHA-256 of the token ids.
    """

    losses: Tensor
    best: Tensor
    top: Tensor
    log_p: Tensor
    log_rest: Tensor
    vocabulary: int
    seq_len: int
    stride: int
    text: str
    model: str = ""

    def check(self, text: Text, seq_len: int, stride: int) -> None:
        """Raise `ModelError` where this was made from another text or other windows."""
        asked = (_hash(text.ids), seq_len, stride)
        if asked != (self.text, self.seq_len, self.stride):
            raise ModelError(
                f"the stored predictions are of windows of {self.seq_len}, {self.stride} apart, of text "
                f"{self.text[:12]}, and {seq_len}, {stride}, {asked[0][:12]} was asked for; store them again"
            )

    def save(self, path: Path) -> None:
        """Write one safetensors file."""
        from safetensors.torch import save_file

        tensors = {name: getattr(self, name).contiguous() for name in _TENSORS}
        told = {name: str(getattr(self, name)) for name in ("vocabulary", "seq_len", "stride", "text", "model")}
        path.parent.mkdir(parents=True, exist_ok=True)
        growing = path.with_name(f".{path.name}.growing")
        save_file(tensors, growing, metadata=told)
        growing.rename(path)

    @classmethod
    def load(cls, path: Path) -> "Reference":
        """Read what `save` wrote.

        Raises:
            CheckpointError: the file is torn, or holds something else.
        """
        header(path, set(_TENSORS))
        with opened(path) as file:
            told = file.metadata() or {}
            try:
                sizes: dict[str, Any] = {name: int(told[name]) for name in ("vocabulary", "seq_len", "stride")}
            except (KeyError, ValueError) as error:
                raise CheckpointError(f"{path} holds no stored predictions: {error}") from error
            tensors = {name: file.get_tensor(name).clone() for name in _TENSORS}
        return cls(**{**tensors, **sizes, "text": told.get("text", ""), "model": told.get("model", "")})


def store(
    reference: Pretrained,
    text: Text,
    *,
    seq_len: int,
    stride: int | None = None,
    top_k: int = TOP_K,
    name: str = "",
    progress: Progress | None = None,
) -> Reference:
    """Score a text with a reference, and keep what comparisons need.

    Args:
        reference: A causal or a masked language model in evaluation mode.  Not modified.
        text, seq_len, stride, progress: As for `perplexity`.
        top_k: How many tokens' probabilities are kept for each position.
        name: Kept as `Reference.model`.

    Raises:
        ModelError, TextError: as `perplexity`.
    """
    windows = cut(reference, text, seq_len, stride)
    parts: list[tuple[Tensor, ...]] = []
    for done, window in enumerate(windows, start=1):
        _, first, end = window
        logits = predictions(reference, text, window)
        for rows, targets in zip(logits.split(ROWS), text.ids[first:end].split(ROWS), strict=True):
            values, places = rows.to(torch.float64).log_softmax(-1).sort(dim=-1, descending=True)
            log_p, log_rest = values[:, :top_k], values[:, top_k:].logsumexp(-1)  # -inf where nothing is left
            likely = places[:, :top_k].to(torch.int32), log_p.to(torch.float32), log_rest.to(torch.float32)
            parts.append(tuple(t.cpu() for t in (token_losses(rows, targets), rows.argmax(-1), *likely)))
        tell(progress, done, len(windows), "reference")
    tensors = dict(zip(_TENSORS, map(torch.cat, zip(*parts, strict=True)), strict=True))
    vocabulary, stride, text_hash = logits.shape[1], stride or seq_len, _hash(text.ids)
    return Reference(**tensors, vocabulary=vocabulary, seq_len=seq_len, stride=stride, text=text_hash, model=name)


def stored_kl(reference: Reference, rows: slice, q: Tensor) -> Tensor:
    """The divergence of each row over k + 1 outcomes, float64, from (T, V) logits of the model."""
    whole = q.to(torch.float64).log_softmax(-1)
    top = reference.top[rows].to(q.device, torch.int64)
    log_p, log_q = reference.log_p[rows].to(q.device, torch.float64), whole.gather(1, top)
    if top.shape[1] < q.shape[1]:
        others = whole.scatter(1, top, -torch.inf).logsumexp(-1)
        rest = reference.log_rest[rows].to(q.device, torch.float64)
        log_p, log_q = torch.cat([log_p, rest[:, None]], dim=1), torch.cat([log_q, others[:, None]], dim=1)
    # sum p d, and sum q - sum p = 0 added, so that terms are positive and the rounding of log_p cancels: see `scores`
    d = log_p - log_q
    return (log_p.exp() * (torch.expm1(-d) + d)).sum(-1)


def _hash(ids: Tensor) -> str:
    return hashlib.sha256(ids.to(torch.int64).cpu().numpy().tobytes()).hexdigest()
