"""Two models side by side, as `eval --against` and `quantize --eval-text` tell them."""

import math
from typing import TYPE_CHECKING

from w8a8.cli.output import ERRORS, error_cells, print_line, print_table
from w8a8.records.coverage import megabytes

if TYPE_CHECKING:
    from w8a8.evaluation import Comparison, Estimate, Evaluation
    from w8a8.evaluation.outputs import OutputComparison
    from w8a8.jobs.comparison import Compared
    from w8a8.jobs.encoders import Judgement


def show_compared(model: str, against: str, found: "Compared") -> None:
    from w8a8.evaluation.outputs import OutputComparison

    if isinstance(found.both, OutputComparison):
        _show_outputs(model, against, found.both)
    else:
        _show_predictions(model, against, found.both)
    _show_layers(found)


def _show_outputs(model: str, against: str, both: "OutputComparison") -> None:
    rows = [
        ("||model - reference|| / ||reference||", *_estimate(both.relative_error, 5)),
        ("cosine of a row with the reference's", *_estimate(both.cosine, 6)),
        ("of 99 % of the rows at least", *_estimate(both.cosine_p1, 6)),
        *([("same label", *_estimate(both.agreement, 4))] if both.agreement is not None else []),
        ("weights on disk", sizes(model, against), ""),
    ]
    title = f"{model} against {against}: {both.output}, {both.rows:,} rows in {both.batches} windows"
    print_table(title, ("measure", "value", "95 % interval"), rows)


def _show_predictions(model: str, against: str, both: "Comparison") -> None:
    """The headline: sizes, both models' figures, their difference, and what it says."""
    bound = "" if both.top_k is None else f", at least (top {both.top_k})"
    rows = [
        *evaluation_rows("model ", both.model),
        *evaluation_rows("reference ", both.reference),
        ("perplexity, model / reference", *_estimate(both.perplexity_ratio, 5)),
        (f"KL(reference || model), nats{bound}", *_estimate(both.kl_nats, 6)),
        (f"of 99 % of the tokens at most{bound}", *_estimate(both.kl_p99_nats, 6)),
        ("same most likely token", *_estimate(both.top1_agreement, 4)),
        ("weights on disk", sizes(model, against), ""),
        (f"model reading, tokens/s, floats in {both.model_dtype}", f"{both.model_tok_per_s:.1f}", ""),
    ]
    if both.reference_tok_per_s is not None:
        rate, times = both.reference_tok_per_s, both.model_tok_per_s / both.reference_tok_per_s
        rows.append((f"reference reading, {both.reference_dtype}", f"{rate:.1f}", f"{times:.2f}x"))
    print_table(
        f"{model} against {against}: {windows_in_words(both.model)}", ("measure", "value", "95 % interval"), rows
    )
    print_line(f"Perplexity: {both.verdict}.")


def _show_layers(found: "Compared") -> None:
    """The layers that do most to their own output, or why they were not measured."""
    if found.why_not is not None:
        print_line(f"Layers were not measured: {found.why_not}.")
        return
    worst = sorted(found.layers, key=lambda layer: math.inf if (db := layer.output_sqnr_db) is None else db)[:10]
    print_table(
        "Layers by what they do to their own output, the worst first; `w8a8 sensitivity`: to what the model tells",
        ("layer", "scheme", *ERRORS),
        [(layer.name, layer.scheme, *error_cells(layer)) for layer in worst],
    )


def show_judged(model: str, against: str, found: "Judgement") -> None:
    rows = []
    if found.alike is not None:
        rows += [
            ("cosine of a vector with the reference's", *_estimate(found.alike.cosine, 6)),
            ("of 99 % of the vectors at least", *_estimate(found.alike.cosine_p1, 6)),
        ]
    for measure in found.measures:
        rows += [
            (f"model {measure.name}", *_estimate(measure.model, 4)),
            (f"reference {measure.name}", *_estimate(measure.reference, 4)),
            (f"{measure.name}, model - reference", *_estimate(measure.difference, 4)),
        ]
    rows.append(("weights on disk", sizes(model, against), ""))
    print_table(f"{model} against {against}: {found.judged}", ("measure", "value", "95 % interval"), rows)
    for measure in found.measures:
        print_line(f"{measure.name}: {measure.verdict}.")


def sizes(model: str, against: str) -> str:
    """How large a model's files of weights are, and another's."""
    from w8a8.checkpoint.directory import Directory

    return " of ".join(megabytes(Directory.of(name).bytes) for name in (model, against))


def windows_in_words(e: "Evaluation") -> str:
    return f"{e.tokens:,} tokens in {e.windows} windows of {e.seq_len}, {e.stride} apart"


def evaluation_rows(prefix: str, e: "Evaluation") -> list[tuple[str, str, str]]:
    name = "pseudo-perplexity" if e.pseudo else "perplexity"
    return [
        (f"{prefix}{name}", *_estimate(e.perplexity, 4)),
        (f"{prefix}loss, nats per token", *_estimate(e.loss_nats, 5)),
        *([(f"{prefix}bits per byte", *_estimate(e.bits_per_byte, 5))] if e.bits_per_byte is not None else []),
    ]


def _estimate(e: "Estimate", digits: int) -> tuple[str, str]:
    return f"{e.mean:.{digits}f}", f"{e.low:.{digits}f} .. {e.high:.{digits}f}"
