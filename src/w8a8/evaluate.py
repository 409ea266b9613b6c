"""Perplexity, Kullback-Leibler divergence and agreement, each with an interval.

The text is tokenised without special tokens and cut into windows of `seq_len` tokens, `stride` apart
(`seq_len` by default: they do not overlap).  The first token of a window is not scored, nor is one that an
earlier window scored.  Every scored token weighs the same.  One window is one forward of batch 1, so that a
per-tensor scheme does not depend on how windows would be batched.

    perplexity = exp(mean of -log p(token | the tokens before it in its window))
    KL         = mean of sum_v p(v) (log p(v) - log q(v)),  p the reference, q the model, in nats
    agreement  = share of the tokens for which both have the same most likely token

Intervals are 95 % by the normal approximation, over windows: tokens of one window are not independent, so
the standard error is that of a ratio of sums, window by window (Cochran, Sampling Techniques, eq. 2.39).
The same windows are used for both models, so the difference between two models is measured far more
closely than either perplexity.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from w8a8.convert import Progress
from w8a8.errors import ModelError, TextError

_ROWS = 512  # rows of logits turned to float32 at a time
_Z95 = 1.959964  # the 97.5 % point of the normal distribution


@dataclass(frozen=True)
class Estimate:
    """A mean per token and its 95 % interval; `low` and `high` are NaN where there is only one window."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Evaluation:
    """How well a model predicts a text."""

    perplexity: Estimate
    loss_nats: Estimate
    tokens: int
    windows: int
    seq_len: int
    stride: int


@dataclass(frozen=True)
class Comparison:
    """A model against a reference on the same windows.

    loss_difference_nats: Model minus reference; `perplexity_ratio` is its exponential.
    """

    model: Evaluation
    reference: Evaluation
    loss_difference_nats: Estimate
    perplexity_ratio: Estimate
    kl_nats: Estimate
    top1_agreement: Estimate


def encode(tokenizer: Any, text: str) -> Tensor:
    """Token ids (T,) int64 of a text, without special tokens.

    Raises:
        ModelError: there is no tokenizer.
        TextError: fewer than two tokens.
    """
    if tokenizer is None:
        raise ModelError("the model's directory has no tokenizer, so a text cannot be read; save one beside it")
    ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], dtype=torch.int64)
    if ids.numel() < 2:
        raise TextError(f"the text has {ids.numel()} tokens; scoring needs two or more")
    return ids


def context_length(model: Any) -> int | None:
    """The longest sequence that the model has positions for, or None where its config does not say."""
    for name in ("max_position_embeddings", "n_positions"):
        value = getattr(model.config, name, None)
        if isinstance(value, int):
            return value
    return None


def perplexity(
    model: Any, ids: Tensor, *, seq_len: int, stride: int | None = None, progress: Progress | None = None
) -> Evaluation:
    """Score a text.

    Args:
        model: A causal language model in evaluation mode.  Not modified.
        ids: (T,) token ids.
        seq_len: Tokens in a window, at least 2.
        stride: Distance of the windows' starts, 1..seq_len; `seq_len` by default.
        progress: Called after each window.

    Raises:
        TextError: `ids` has fewer than two tokens.
        ModelError: seq_len or stride out of range, or the model's logits are not finite.
    """
    windows = _windows(model, ids, seq_len, stride)
    losses, counts = [], []
    for done, (start, first, end) in enumerate(windows, start=1):
        loss = _token_losses(_logits(model, ids[start:end], start)[first - start - 1 : -1], ids[first:end])
        losses.append(float(loss.sum()))
        counts.append(end - first)
        if progress is not None:
            progress(done, len(windows), "perplexity")
    return _evaluation(losses, counts, seq_len, stride)


def compare(
    model: Any,
    reference: Any,
    ids: Tensor,
    *,
    seq_len: int,
    stride: int | None = None,
    progress: Progress | None = None,
) -> Comparison:
    """Score a text with two models at once, and compare their predictions token by token.

    Args:
        model, reference: Causal language models over one vocabulary.  Not modified.
        ids, seq_len, stride, progress: As for `perplexity`.

    Raises:
        ModelError: as `perplexity`; the vocabularies differ.
        TextError: as `perplexity`.
    """
    windows = _windows(model, ids, seq_len, stride)
    _windows(reference, ids, seq_len, stride)
    sums: dict[str, list[float]] = {"model": [], "reference": [], "kl": [], "agree": []}
    counts = []
    for done, (start, first, end) in enumerate(windows, start=1):
        scored = slice(first - start - 1, -1)
        q = _logits(model, ids[start:end], start)[scored]
        p = _logits(reference, ids[start:end], start)[scored]
        if q.shape != p.shape:
            raise ModelError(f"vocabularies of {q.shape[1]} and {p.shape[1]} tokens cannot be compared")
        sums["model"].append(float(_token_losses(q, ids[first:end]).sum()))
        sums["reference"].append(float(_token_losses(p, ids[first:end]).sum()))
        sums["kl"].append(_kl(p, q))
        sums["agree"].append(float((q.argmax(-1) == p.argmax(-1)).sum()))
        counts.append(end - first)
        if progress is not None:
            progress(done, len(windows), "comparison")
    difference = _estimate([a - b for a, b in zip(sums["model"], sums["reference"], strict=True)], counts)
    return Comparison(
        _evaluation(sums["model"], counts, seq_len, stride),
        _evaluation(sums["reference"], counts, seq_len, stride),
        difference,
        _exp(difference),
        _estimate(sums["kl"], counts),
        _estimate(sums["agree"], counts),
    )


def windows(tokens: int, seq_len: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """(start, first scored, end) of each window over a text of so many tokens."""
    scored_to = 0
    for start in range(0, tokens, stride):
        end = min(start + seq_len, tokens)
        first = max(scored_to, start + 1)
        if first < end:
            yield start, first, end
        scored_to = end
        if end == tokens:
            return


def _windows(model: Any, ids: Tensor, seq_len: int, stride: int | None) -> list[tuple[int, int, int]]:
    limit = context_length(model)
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
    return list(windows(ids.numel(), seq_len, stride or seq_len))


@torch.inference_mode()
def _logits(model: Any, ids: Tensor, start: int) -> Tensor:
    """(T, V) for one window."""
    out = model(input_ids=ids[None].to(model.device), use_cache=False)
    if getattr(out, "logits", None) is None or out.logits.ndim != 3:
        raise ModelError(f"{type(model).__name__} predicts no tokens: only a causal language model can be scored")
    logits: Tensor = out.logits[0]
    if not bool(torch.isfinite(logits).all()):
        raise ModelError(
            f"the logits of the window at token {start} are not finite; "
            f"a model in {logits.dtype} may overflow, try float32 or bfloat16"
        )
    return logits


def _token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """-log p of each target, float64: (T, V), (T,) -> (T,)."""
    losses = [
        torch.nn.functional.cross_entropy(rows.to(torch.float32), wanted.to(rows.device), reduction="none")
        for rows, wanted in zip(logits.split(_ROWS), targets.split(_ROWS), strict=True)
    ]
    return torch.cat(losses).to(torch.float64)


def _kl(p: Tensor, q: Tensor) -> float:
    """The sum over rows of KL(p || q), from logits (T, V).  In float64: it is a difference of near equals."""
    total = 0.0
    for p_rows, q_rows in zip(p.split(_ROWS), q.split(_ROWS), strict=True):
        log_p, log_q = p_rows.to(torch.float64).log_softmax(-1), q_rows.to(torch.float64).log_softmax(-1)
        total += float((log_p.exp() * (log_p - log_q)).sum())
    return total


def _evaluation(losses: Sequence[float], counts: Sequence[int], seq_len: int, stride: int | None) -> Evaluation:
    loss = _estimate(losses, counts)
    return Evaluation(_exp(loss), loss, sum(counts), len(counts), seq_len, stride or seq_len)


def _estimate(sums: Sequence[float], counts: Sequence[int]) -> Estimate:
    """The mean per token of window sums, with its interval."""
    n, total = len(sums), sum(counts)
    mean = sum(sums) / total
    if n < 2:
        return Estimate(mean, math.nan, math.nan)
    spread = sum((s - mean * c) ** 2 for s, c in zip(sums, counts, strict=True))
    error = math.sqrt(spread * n / (n - 1)) / total
    return Estimate(mean, mean - _Z95 * error, mean + _Z95 * error)


def _exp(e: Estimate) -> Estimate:
    return Estimate(math.exp(e.mean), math.exp(e.low), math.exp(e.high))
