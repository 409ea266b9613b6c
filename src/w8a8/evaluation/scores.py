"""Logits of one window, and what is read from them, in as few passes as it takes.

KL(p || q) = sum_v p(v) (log p(v) - log q(v)) is a small difference of large numbers.  With d(v) the difference of the
logits and m = sum_v p(v) d(v) it is log(sum_v p(v) exp(m - d(v))), and since p(v) (d(v) - m) sums to zero also

    log1p(sum_v p(v) (expm1(-u(v)) + u(v))),    u = d - m

whose terms are small and positive, so that float32 is exact enough (tests compare it with float64).
"""

from typing import Any

import torch
from torch import Tensor

from w8a8.errors import ModelError

ROWS = 512  # rows of logits turned to float32 at a time


@torch.inference_mode()
def logits_of(model: Any, ids: Tensor, start: int) -> Tensor:
    """(T, V) for one window.

    Args:
        model: A causal language model.  Not modified.
        ids: (T,) the window.
        start: Where it begins in the text, for messages.

    Raises:
        ModelError: the model predicts no tokens, or its logits are not finite.
    """
    out = model(input_ids=ids[None].to(model.device), use_cache=False)
    if getattr(out, "logits", None) is None or out.logits.ndim != 3:
        raise ModelError(f"{type(model).__name__} predicts no tokens: only a causal language model can be scored")
    logits: Tensor = out.logits[0]
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
