"""The one place where records are assembled from what the rest of the package returns.

It takes plain data (`Coverage.to_dict()`, `SmoothReport.to_dict()`, a `Comparison` as `core.plain.plain` gives it), so
it needs no torch, and works as well on a result that was read back from a file.
"""

from collections.abc import Mapping, Sequence

from w8a8.core.plain import Json
from w8a8.report.records import SCHEMA, check


def collect(
    *,
    model: str,
    scheme: str,
    verdict: str | None = None,
    bytes_before: int | None = None,
    bytes_after: int | None = None,
    coverage: Json | None = None,
    smooth: Json | None = None,
    comparison: Json | None = None,
    headline: Mapping[str, object] | None = None,
    layers: Sequence[Mapping[str, object]] = (),
    reproduce: Mapping[str, object] | None = None,
    **parts: object,
) -> dict[str, object]:
    """Records of one quantised model.

    Args:
        model, scheme: Their names.
        verdict: A sentence; made from the comparison where it is None.
        bytes_before, bytes_after: Of the model; after is the coverage's total where it is None.
        coverage: `Coverage.to_dict()`.
        smooth: `SmoothReport.to_dict()`.
        comparison: `plain(evaluation.Comparison)`, or of its outputs: the quantised model against the float one.
        headline: More fields of `records.Headline`, which go before what follows from the other arguments.
        layers: Fields of `records.Layer`.
        reproduce: Fields of `records.Reproduce`.
        parts: Other parts by their name in `records.Records`: rankings, channels, histograms, budget, remedies.

    Returns:
        Plain data that follows the schema, for `report` or a JSON file.

    Raises:
        ReportError: a part does not follow the schema.
    """
    found: dict[str, object] = {
        "model": model,
        "scheme": scheme,
        "bytes_before": bytes_before,
        "bytes_after": bytes_after,
    }
    if coverage is not None and bytes_after is None:
        found["bytes_after"] = coverage["totals"]["all"]["bytes"]
    if comparison is not None and "relative_error" in comparison:
        found |= {
            "output_error": comparison["relative_error"],
            "output_cosine": comparison["cosine"],
            "output_cosine_p1": comparison["cosine_p1"],
            "same_label": comparison["agreement"],
        }
    elif comparison is not None:
        found |= {
            "perplexity_float": comparison["reference"]["perplexity"],
            "perplexity_quantized": comparison["model"]["perplexity"],
            "bits_per_byte_float": comparison["reference"]["bits_per_byte"],
            "bits_per_byte_quantized": comparison["model"]["bits_per_byte"],
            "kl_mean_nats": comparison["kl_nats"],
            "kl_p99_nats": comparison["kl_p99_nats"],
            "top1_agreement": comparison["top1_agreement"],
            "tok_per_s_before": comparison["reference_tok_per_s"],
            "tok_per_s_after": comparison["model_tok_per_s"],
            "dtype_before": comparison["reference_dtype"],
            "dtype_after": comparison["model_dtype"],
        }
    found["verdict"] = verdict or verdict_of(comparison)
    records: dict[str, object] = {
        "schema": SCHEMA,
        "headline": found | dict(headline or {}),
        "layers": [dict(layer) for layer in layers],
        "reproduce": dict(reproduce or {}),
        **parts,
    }
    if coverage is not None:
        records["coverage"] = dict(coverage)
    if smooth is not None:
        records["smoothing"] = {"kept": smooth["kept"], "groups": [dict(group) for group in smooth["groups"]]}
    check(records)
    return records


def verdict_of(comparison: Json | None) -> str:
    if comparison is None:
        return "Quality was not measured."
    if "relative_error" in comparison:
        return f"{comparison['output']}: a cosine of {comparison['cosine']['mean']:.6f} with the float model's."
    return f"Perplexity: {comparison['verdict']}."
