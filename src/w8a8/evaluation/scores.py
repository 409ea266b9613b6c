"""Logits of one window, and what is read from them, in as few passes as it takes.

KL(p || q) = sum_v p(v) (log p(v) - log q(v)) is a small difference of large numbers.  With d(v) the difference of the
logits and m = sum_v p(v) d(v) it is log(sum_v p(v) exp(m - d(v))), and since p(v) (d(v) - m) sums to zero also

    log1p(sum_v p(v) (expm1(-u(v)) + u(v))),    u = d - m

whose terms are small and positive, so that float32 is exact enough (tests compare it with float64).

A causal language model tells each token from those before it, in one forward.  A masked one sees both sides, so each
token is masked in its turn, in a copy of the window of its own, with the tokenizer's special tokens around:
pseudo-perplexity (Salazar et al. 2020, arXiv:1910.14659).  Whether a model is causal is seen, not believed
(`check_causal`): BERT with the head of a decoder generates, and is not.
"""

from typing import Any

import torch
from torch import Tensor, nn

from w8a8.core.scheme import PerToken
from w8a8.errors import ModelError
from w8a8.evaluation.text import Frame, Text, framed, windows_for
from w8a8.layers.linear import quant_linears
from w8a8.model.kinds import PREDICTS_TOKENS, Asked, Kind, context_length, kind_of_model, way_out
from w8a8.model.pretrained import Pretrained

ASKED = Asked("a perplexity", PREDICTS_TOKENS)
ROWS = 512  # rows of logits turned to float32 at a time
COPIES = 8  # of a window, each with another token masked, in one forward
_LOOK = 16  # tokens that causality is seen on


def cut(model: Pretrained, text: Text, seq_len: int, stride: int | None) -> list[tuple[int, int, int]]:
    """The windows of a text that a model can be scored on: start, first scored, end.

    Raises:
        ModelError: the model predicts no tokens; seq_len or stride out of range; ids that the model does not know; a
            masked model and a text without a mask; a model that sees the token that it is to tell.
        TextError: fewer than two tokens.
    """
    ASKED.check_model(model)
    frame = text.frame if is_masked(model) else None
    found = windows_for(model, text.ids, seq_len, stride, frame=frame)
    if not is_masked(model):
        check_causal(model, text.ids[:_LOOK])
    elif frame is None:
        raise ModelError(
            f"{type(model).__name__} is a masked language model, which is scored by masking each token, and the text "
            "comes with no mask: give what `encode` makes of it with the model's own tokenizer"
        )
    return found


def is_masked(model: nn.Module) -> bool:
    """Whether a model is scored by pseudo-perplexity."""
    return kind_of_model(model) is Kind.MASKED


def default_length(model: nn.Module) -> int:
    """Tokens in a window where nothing is said: the model's context, at most 2048."""
    return min(context_length(model) or 2048, 2048)


def scoring_length(model: nn.Module, text: Text) -> int:
    """Tokens in a window that a text is scored in: of a masked model, which reads it once for each token, few."""
    longest = default_length(model)
    if not is_masked(model):
        return longest
    return min(longest - (0 if text.frame is None else len(text.frame)), 128)


def predictions(model: Pretrained, text: Text, window: tuple[int, int, int]) -> Tensor:
    """(S, V) logits for each scored token of a window of `cut`; `ModelError` as `logits_of`."""
    start, first, end = window
    if is_masked(model):
        assert text.frame is not None, "seen when the text was cut"
        return _masked_logits(model, text.ids[start:end], text.frame, first - start, start)
    return logits_of(model, text.ids[start:end], start)[first - start - 1 : -1]


@torch.inference_mode()
def check_causal(model: Pretrained, ids: Tensor) -> None:
    """Raise `ModelError` where what a model says of a token depends on that token.

    Args:
        model: Run twice, on ids that differ in the last one.  Not modified.
        ids: (T,) the beginning of a text.
    """
    spread = (layer.scheme.activations for _, layer in quant_linears(model))
    if any(spec is not None and spec.dynamic and not isinstance(spec.granularity, PerToken) for spec in spread):
        return  # tokens share scales: each has a little of the last
    other = ids.clone()
    other[-1] = next((int(token) for token in ids.unique() if token != ids[-1]), int(ids[-1] == 0))
    here, there = (logits_of(model, each, 0)[: len(ids) - 1].to(torch.float32) for each in (ids, other))
    change = float((here - there).norm() / here.norm().clamp(min=torch.finfo(torch.float32).tiny))
    if change > max(1e-4, 4 * torch.finfo(model.dtype).eps):  # sums in another order, where experts are called
        kind = kind_of_model(model)
        raise ModelError(
            f"the perplexity of {type(model).__name__} was asked for, and what it says of a token depends on that "
            f"token (its logits change by {change:.1e} with what comes after them), so it is no causal language model"
            + ("" if kind is None else f"; {way_out(Kind.OTHER)}")
        )


def _masked_logits(model: Pretrained, ids: Tensor, frame: Frame, first: int, start: int) -> Tensor:
    """(S, V): of each token from `first` on what the model says of it, masked."""
    whole, found = framed(ids, frame), []
    scored = torch.arange(first, len(ids), dtype=torch.int64, device=ids.device)
    for places in scored.add(len(frame.before)).split(COPIES):
        copies = whole.repeat(len(places), 1)
        numbers = torch.arange(len(places), dtype=torch.int64, device=ids.device)
        copies[numbers, places] = frame.mask
        found.append(batch_logits(model, copies, start)[numbers, places])
    return torch.cat(found)


def logits_of(model: Pretrained, ids: Tensor, start: int) -> Tensor:
    """(T, V) for one window, (T,); `ModelError` where the model predicts no tokens, or its logits are not finite."""
    return batch_logits(model, ids[None], start)[0]


@torch.inference_mode()
def batch_logits(model: Pretrained, ids: Tensor, start: int) -> Tensor:
    """(B, T, V) for copies of one window; `ModelError` as `logits_of`.

    What a cache gives attention is what it keeps, also of the tokens that have just come (`w8a8.decoding.layers`), so
    that one pass over a window reads keys and values as writing it token by token would.
    """
    from w8a8.decoding.models import new_cache  # with transformers, without which a plain model is measured

    cache = new_cache(model)
    takes: dict[str, Any] = {"use_cache": False} if cache is None else {"use_cache": True, "past_key_values": cache}
    if is_masked(model):
        takes = {}
    out = model(input_ids=ids.to(model.device), **takes)
    if getattr(out, "logits", None) is None or out.logits.ndim != 3:
        raise ModelError(f"{type(model).__name__} predicts no tokens: only a causal language model can be scored")
    logits: Tensor = out.logits
    ends = torch.stack(logits.aminmax())  # one pass, and a NaN is both
    if not bool(torch.isfinite(ends).all()):
        raise ModelError(
            f"the logits of the window at token {start} are not finite; "
            f"a model in {logits.dtype} may overflow, try float32 or bfloat16"
        )
    return logits


def token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """-log p of each target, float64: (T, V), (T,) -> (T,)."""
    losses = [
        torch.nn.functional.cross_entropy(rows.to(torch.float32), wanted.to(rows.device), reduction="none")
        for rows, wanted in zip(logits.split(ROWS), targets.split(ROWS), strict=True)
    ]
    return torch.cat(losses).to(torch.float64)


def token_kl(p: Tensor, q: Tensor) -> Tensor:
    """KL(p || q) of each row, float32, from logits: (T, V), (T, V) -> (T,)."""
    found = []
    for p_rows, q_rows in zip(p.split(ROWS), q.split(ROWS), strict=True):
        weights = p_rows.to(torch.float32).softmax(-1)
        u = p_rows.to(torch.float32) - q_rows.to(torch.float32)
        u -= torch.linalg.vecdot(weights, u)[:, None]
        kl = torch.log1p(torch.linalg.vecdot(weights, torch.expm1(-u).add_(u))).clamp_(min=0)
        far = ~torch.isfinite(kl)  # exp overflows where the models have nothing in common: no small difference there
        if bool(far.any()):
            log_p, log_q = (rows[far].to(torch.float64).log_softmax(-1) for rows in (p_rows, q_rows))
            kl[far] = (log_p.exp() * (log_p - log_q)).sum(-1).to(torch.float32)
        found.append(kl)
    return torch.cat(found)
