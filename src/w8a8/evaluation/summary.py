"""What a comparison comes to, in the rows that a model card has."""

import math

from w8a8.checkpoint.card import Measured
from w8a8.evaluation.compare import Comparison
from w8a8.evaluation.intervals import Estimate
from w8a8.evaluation.outputs import OutputComparison


def summary(both: Comparison | OutputComparison, text: str) -> Measured:
    """The figures of a quantised model against the float one, on a text of this name."""
    return _of_outputs(both, text) if isinstance(both, OutputComparison) else _of_predictions(both, text)


def _of_predictions(both: Comparison, text: str) -> Measured:
    scored = both.model
    name = "pseudo-perplexity" if scored.pseudo else "perplexity"
    bound = "" if both.top_k is None else f", at least: the {both.top_k} most likely tokens were kept"
    dtypes = f"floats of this model in {both.model_dtype}"
    if both.reference_dtype is not None:
        dtypes += f", of the float model in {both.reference_dtype}"
    on = (
        f"Against the float model, on {text}: {scored.tokens:,} tokens in {scored.windows:,} windows of "
        f"{scored.seq_len}, {scored.stride} apart; {dtypes}. Intervals are by the bootstrap over windows."
    )
    rows = [
        _row(f"{name} of the float model", both.reference.perplexity, 4),
        _row(f"{name} of this model", scored.perplexity, 4),
        _row(f"ratio of the two: {name}, this / float", both.perplexity_ratio, 5),
        _row(f"KL(float, this), nats per token, mean{bound}", both.kl_nats, 6),
        _row(f"KL(float, this) of 99 % of the tokens at most{bound}", both.kl_p99_nats, 6),
        _row("share of tokens with the same most likely next one", both.top1_agreement, 4),
    ]
    return Measured(on, tuple(rows), f"Perplexity: {both.verdict}.")


def _of_outputs(both: OutputComparison, text: str) -> Measured:
    on = (
        f"Against the float model, on {text}: {both.output}, {both.rows:,} rows in {both.batches:,} batches. Intervals "
        "are by the bootstrap over batches."
    )
    rows = [
        _row("norm of the difference / norm of the float output", both.relative_error, 5),
        _row("cosine of a row with the float one, mean", both.cosine, 6),
        _row("cosine of 99 % of the rows at least", both.cosine_p1, 6),
    ]
    if both.agreement is not None:
        rows.append(_row("share of rows with the same label", both.agreement, 4))
    return Measured(on, tuple(rows))


def _row(what: str, value: Estimate, digits: int) -> tuple[str, str, str]:
    alone = math.isnan(value.low)
    interval = "none, of one window" if alone else f"{value.low:.{digits}f} to {value.high:.{digits}f}"
    return what, f"{value.mean:.{digits}f}", interval
