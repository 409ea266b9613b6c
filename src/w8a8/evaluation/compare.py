"""Perplexity, bits per byte, Kullback-Leibler divergence and agreement, each with an interval.

The text is tokenised without special tokens and cut into windows of `seq_len` tokens, `stride` apart
(`seq_len` by default: they do not overlap).  The first token of a window is not scored, nor is one that an
earlier window scored.  Every scored token weighs the same.  One window is one forward of batch 1, so that a
per-tensor scheme does not depend on how windows would be batched.

    perplexity    = exp(mean of -log p(token | the tokens before it in its window))
    bits per byte = sum of -log2 p(token | ...) / UTF-8 bytes that the scored tokens stand for
    KL            = sum_v p(v) (log p(v) - log q(v)) of a token,  p the reference, q the model, in nats:
                    the mean, and the value that 99 % of the tokens do not exceed
    agreement     = share of the tokens for which both have the same most likely token

Intervals are 95 %, by the bootstrap over windows, paired where two models are compared (see `intervals`).

Speed comes with it: both models read each window in turn, so what disturbs the machine meets both.
"""

import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from w8a8.core.progress import Progress, tell
from w8a8.errors import ModelError
from w8a8.evaluation import scores
from w8a8.evaluation.intervals import Bootstrap, Estimate, verdict
from w8a8.evaluation.scores import token_kl, token_losses
from w8a8.evaluation.stored import Reference, stored_kl
from w8a8.evaluation.text import Text
from w8a8.model.pretrained import Pretrained


@dataclass(frozen=True)
class Evaluation:
    """How well a model predicts a text.

    bits_per_byte: None where the tokenizer does not tell bytes.
    pseudo: Of a masked language model, which was told the tokens on both sides.
    """

    perplexity: Estimate
    loss_nats: Estimate
    bits_per_byte: Estimate | None
    tokens: int
    windows: int
    seq_len: int
    stride: int
    pseudo: bool = False


@dataclass(frozen=True)
class Comparison:
    """A model against a reference on the same windows.

    loss_difference_nats: Model minus reference; `perplexity_ratio` is its exponential.
    kl_nats, kl_p99_nats: Of a token, the mean and the 99th percentile.
    top_k: The reference was stored with so many tokens each, so that KL is a lower bound; None: it was not stored.
    model_tok_per_s, reference_tok_per_s: Tokens read in a second, the median over the windows; None where stored.
    model_dtype, reference_dtype: That their floats were in, which speed depends on: float16 is slow on most CPUs.
    verdict: What the interval of `perplexity_ratio` says.
    """

    model: Evaluation
    reference: Evaluation
    loss_difference_nats: Estimate
    perplexity_ratio: Estimate
    kl_nats: Estimate
    kl_p99_nats: Estimate
    top1_agreement: Estimate
    top_k: int | None
    verdict: str
    model_tok_per_s: float
    reference_tok_per_s: float | None
    model_dtype: str
    reference_dtype: str | None


def perplexity(
    model: Pretrained,
    text: Text | Tensor,
    *,
    seq_len: int | None = None,
    stride: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Evaluation:
    """Score a text.

    Args:
        model: A causal language model in evaluation mode, or a masked one.  Not modified.
        text: What `encode` makes, or for a causal model (T,) token ids.
        seq_len: Tokens in a window, at least 2; by default the model's context, at most 2048, of a masked model 128.
        stride: Distance of the windows' starts, 1..seq_len; `seq_len` by default.
        seed: Of the bootstrap.
        progress: Called after each window.

    Raises:
        TextError: fewer than two tokens.
        ModelError: seq_len or stride out of range, or the model's logits are not finite; it is neither causal nor
            masked.
    """
    text = _text(text)
    seq_len = seq_len or scores.scoring_length(model, text)
    cut = scores.cut(model, text, seq_len, stride)
    losses = []
    for done, window in enumerate(cut, start=1):
        _, first, end = window
        logits = scores.predictions(model, text, window)
        losses.append(float(token_losses(logits, text.ids[first:end]).sum()))
        tell(progress, done, len(cut), "perplexity")
    pseudo = scores.is_masked(model)
    return _evaluation(losses, text, cut, seq_len, stride, Bootstrap(len(cut), seed=seed), pseudo=pseudo)


def compare(
    model: Pretrained,
    reference: Pretrained | Reference,
    text: Text | Tensor,
    *,
    seq_len: int,
    stride: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Comparison:
    """Score a text with two models, and compare their predictions token by token.

    Args:
        model: A causal or a masked language model.  Not modified.
        reference: Another one over the same vocabulary, or its stored predictions of the same windows.
        text, seq_len, stride, seed, progress: As for `perplexity`.

    Raises:
        ModelError: as `perplexity`; the vocabularies differ; the predictions are of another text or other windows.
        TextError: as `perplexity`.
    """
    text = _text(text)
    cut = scores.cut(model, text, seq_len, stride)
    if isinstance(reference, Reference):
        reference.check(text, seq_len, stride or seq_len)
    elif scores.cut(reference, text, seq_len, stride) != cut:
        raise ModelError(
            f"{type(model).__name__} and {type(reference).__name__} cannot be compared: one is a masked language "
            "model and one is not"
        )
    ours: list[float] = []
    theirs: list[float] = []
    agree: list[float] = []
    kl: list[NDArray[np.float32]] = []
    our_speed: list[float] = []
    their_speed: list[float] = []
    seen = 0
    for done, window in enumerate(cut, start=1):
        _, first, end = window
        q = _timed(model, text, window, our_speed)
        if isinstance(reference, Reference):
            rows = slice(seen, seen + end - first)
            _same_vocabulary(q.shape[1], reference.vocabulary)
            losses, best = reference.losses[rows], reference.best[rows].to(q.device)
            divergence = stored_kl(reference, rows, q)
        else:
            p = _timed(reference, text, window, their_speed)
            _same_vocabulary(q.shape[1], p.shape[1])
            losses, best, divergence = token_losses(p, text.ids[first:end]), p.argmax(-1), token_kl(p, q)
        ours.append(float(token_losses(q, text.ids[first:end]).sum()))
        theirs.append(float(losses.sum()))
        agree.append(float((q.argmax(-1) == best).sum()))
        kl.append(divergence.cpu().numpy().astype(np.float32))
        seen += end - first
        tell(progress, done, len(cut), "comparison")
    draw, counts = Bootstrap(len(cut), seed=seed), [end - first for _, first, end in cut]
    difference = draw.ratio([a - b for a, b in zip(ours, theirs, strict=True)], counts)
    top_k = None
    if isinstance(reference, Reference) and reference.top.shape[1] < reference.vocabulary:
        top_k = reference.top.shape[1]
    return Comparison(
        _evaluation(ours, text, cut, seq_len, stride, draw, pseudo=scores.is_masked(model)),
        _evaluation(theirs, text, cut, seq_len, stride, draw, pseudo=scores.is_masked(model)),
        difference,
        difference.exp(),
        draw.ratio([float(values.astype(np.float64).sum()) for values in kl], counts),
        draw.quantile(kl, 0.99),
        draw.ratio(agree, counts),
        top_k,
        verdict(difference.exp()),
        statistics.median(our_speed),
        statistics.median(their_speed) if their_speed else None,
        _dtype(model),
        None if isinstance(reference, Reference) else _dtype(reference),
    )


def _dtype(model: Pretrained) -> str:
    return str(model.dtype).removeprefix("torch.")


def _timed(model: Pretrained, text: Text, window: tuple[int, int, int], speed: list[float]) -> Tensor:
    """`predictions`, which waits for its result, and the tokens of the window that were told in a second."""
    began = time.perf_counter()
    logits = scores.predictions(model, text, window)
    speed.append((window[2] - window[0]) / (time.perf_counter() - began))
    return logits


def _text(text: Text | Tensor) -> Text:
    return text if isinstance(text, Text) else Text(text)


def _same_vocabulary(ours: int, theirs: int) -> None:
    if ours != theirs:
        raise ModelError(f"vocabularies of {ours} and {theirs} tokens cannot be compared")


def _evaluation(
    losses: Sequence[float],
    text: Text,
    cut: Sequence[tuple[int, int, int]],
    seq_len: int,
    stride: int | None,
    draw: Bootstrap,
    *,
    pseudo: bool,
) -> Evaluation:
    counts = [end - first for _, first, end in cut]
    loss = draw.ratio(losses, counts)
    bits = None
    if text.byte_ends is not None:
        read = [text.bytes_between(first, end) for _, first, end in cut]
        if sum(read):
            bits = draw.ratio([nats / math.log(2) for nats in losses], read)
    return Evaluation(loss.exp(), loss, bits, sum(counts), len(cut), seq_len, stride or seq_len, pseudo)
