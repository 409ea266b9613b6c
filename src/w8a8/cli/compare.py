"""Two models side by side, as `eval --against` and `quantize --eval-text` tell them."""

import hashlib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from w8a8.cli.app import check_kind_of, content_of, open_named
from w8a8.cli.output import ERRORS, error_cells, megabytes, print_line, print_table, progress
from w8a8.core.plain import plain
from w8a8.errors import ModelError

DEFAULT_WINDOWS = {"seq_len": None, "stride": None, "max_tokens": None, "seed": 0}
"""How a text is scored where nothing is said."""


@dataclass(frozen=True)
class Compared:
    """A comparison, and what each quantised layer does by itself, or why that was not measured."""

    both: Any
    layers: tuple[Any, ...]
    why_not: str | None

    def told(self) -> dict[str, Any]:
        """For JSON."""
        return {**plain(self.both), "layers": plain(self.layers), "layers_not_measured": self.why_not}

    def show(self, model: str, against: str) -> None:
        """For people."""
        show_comparison(model, against, self)


@dataclass(frozen=True)
class ComparedOutputs:
    """A comparison of outputs, of models that predict no tokens."""

    both: Any
    why_not: str = "layers are measured of language models"

    def told(self) -> dict[str, Any]:
        """For JSON."""
        return {**plain(self.both), "layers": [], "layers_not_measured": self.why_not}

    def show(self, model: str, against: str) -> None:
        """For people."""
        both = self.both
        rows = [
            ("||model - reference|| / ||reference||", *_estimate(both.relative_error, 5)),
            ("cosine of a row with the reference's", *_estimate(both.cosine, 6)),
            ("of 99 % of the rows at least", *_estimate(both.cosine_p1, 6)),
            *([("same label", *_estimate(both.agreement, 4))] if both.agreement is not None else []),
            ("weights on disk", sizes(model, against), ""),
        ]
        title = f"{model} against {against}: {both.output}, {both.rows:,} rows in {both.batches} windows"
        print_table(title, ("measure", "value", "95 % interval"), rows)


def compare_named(
    model: str,
    against: str,
    text: str,
    options: dict[str, Any],
    places: dict[str, Any],
    *,
    head: str = "float",
    one_at_a_time: bool = False,
    cache: Path | None = None,
) -> Compared:
    """Score a model against a reference, both in memory where they fit, else one after the other."""
    from w8a8 import evaluation as scoring
    from w8a8.analysis import layer_errors
    from w8a8.checkpoint.directory import Directory
    from w8a8.model.choice import unstack_experts_
    from w8a8.model.experts import holds_experts
    from w8a8.streaming.resources import available_memory

    content = content_of(text)
    wider = 2 if places["dtype"] == "float32" else 1  # files of two bytes a weight, perhaps
    bytes_of = wider * sum(Directory.of(name).bytes for name in (model, against))
    name = _fingerprint(against, places["dtype"])
    apart = one_at_a_time or cache is not None or bytes_of > 0.8 * available_memory()
    reference: Any = None
    if apart and cache is not None and cache.exists():
        reference = scoring.Reference.load(cache)
        if reference.model != name:
            raise ModelError(
                f"{cache} holds the predictions of another model than {against} in {places['dtype']}; "
                "remove it, or give another --cache"
            )
    elif apart:
        opened = open_named(against, **places)
        windows = _cut(opened, content, options)
        with progress("reference") as step:
            reference = scoring.store(opened.model, name=name, progress=step, **windows)
        if cache is not None:
            reference.save(cache)
        del opened
    opened = open_named(model, head=head, **places)
    windows = _cut(opened, content, options)
    other = reference if apart else open_named(against, **places).model
    with progress("comparing") as step:
        both = scoring.compare(opened.model, other, seed=options["seed"], progress=step, **windows)
    if apart:
        return Compared(both, (), "the models were in memory one at a time")
    if holds_experts(opened.model):
        unstack_experts_(other)
    try:
        layers = layer_errors(other, opened.model, windows["text"], seq_len=_short(windows), seed=options["seed"])
    except ModelError as error:
        return Compared(both, (), str(error))
    return Compared(both, layers, None)


def compare_outputs_named(
    model: str, against: str, text: str, options: dict[str, Any], places: dict[str, Any], *, head: str = "float"
) -> ComparedOutputs:
    """Run a text through two models in memory that read one and predict no tokens, and compare their outputs."""
    import torch

    from w8a8.evaluation import encode
    from w8a8.evaluation.outputs import compare_outputs
    from w8a8.evaluation.scores import default_length

    content = content_of(text)
    opened, other = open_named(model, head=head, **places), open_named(against, **places)
    encoded = encode(opened.tokenizer, content).first(options["max_tokens"])
    frame = ((), ()) if encoded.frame is None else (encoded.frame.before, encoded.frame.after)
    room = default_length(opened.model) - sum(map(len, frame))
    length = options["seq_len"] or min(room, 512)
    if length > room:
        raise ModelError(f"--seq-len {length} is out of range: 2..{room} for {model}")
    before, after = (encoded.ids.new_tensor(part) for part in frame)
    batches = [{"input_ids": torch.cat([before, ids, after])[None]} for ids in encoded.ids.split(length)]
    with progress("comparing") as step:
        return ComparedOutputs(compare_outputs(opened.model, other.model, batches, seed=options["seed"], progress=step))


def check_text(model: str, text: str, *, trust_remote_code: bool = False) -> Any:
    """Raise a `W8A8Error` before the work where a text cannot be read, or a model cannot be scored on it.

    Returns:
        The kind of the model.
    """
    from w8a8.checkpoint.directory import Directory
    from w8a8.checkpoint.opening import open_tokenizer
    from w8a8.evaluation import encode
    from w8a8.model.kinds import READS_TEXT

    content = content_of(text)
    directory = Directory.of(model, trust_remote_code=trust_remote_code)
    kind = check_kind_of(directory, ("a comparison on a text", READS_TEXT))
    encode(open_tokenizer(directory), content)
    return kind


def _short(windows: dict[str, Any]) -> int:
    """Layers are measured on short windows."""
    return min(int(windows["seq_len"]), 256)


def show_comparison(model: str, against: str, found: Compared) -> None:
    """The headline: sizes, both models' figures, their difference, and what it says; then the worst layers."""
    both = found.both
    bound = "" if both.top_k is None else f", at least (top {both.top_k})"
    rows = [
        *evaluation_rows("model ", both.model),
        *evaluation_rows("reference ", both.reference),
        ("perplexity, model / reference", *_estimate(both.perplexity_ratio, 5)),
        (f"KL(reference || model), nats{bound}", *_estimate(both.kl_nats, 6)),
        (f"of 99 % of the tokens at most{bound}", *_estimate(both.kl_p99_nats, 6)),
        ("same most likely token", *_estimate(both.top1_agreement, 4)),
        ("weights on disk", sizes(model, against), ""),
        *_speed_rows(both),
    ]
    print_table(
        f"{model} against {against}: {windows_in_words(both.model)}", ("measure", "value", "95 % interval"), rows
    )
    print_line(f"Perplexity: {both.verdict}.")
    if found.why_not is not None:
        print_line(f"Layers were not measured: {found.why_not}.")
        return
    worst = sorted(found.layers, key=lambda layer: math.inf if (db := layer.output_sqnr_db) is None else db)[:10]
    predictions = "" if both.model.pseudo else "; `w8a8 sensitivity`: to the predictions"
    print_table(
        f"Layers by what they do to their own output, the worst first{predictions}",
        ("layer", "scheme", *ERRORS),
        [(layer.name, layer.scheme, *error_cells(layer)) for layer in worst],
    )


def _speed_rows(both: Any) -> list[tuple[str, str, str]]:
    speed, reference = both.model_tok_per_s, both.reference_tok_per_s
    rows = [(f"model reading, tokens/s, floats in {both.model_dtype}", f"{speed:.1f}", "")]
    if reference is not None:
        rows.append((f"reference reading, {both.reference_dtype}", f"{reference:.1f}", f"{speed / reference:.2f}x"))
    return rows


def _cut(opened: Any, content: str, options: dict[str, Any]) -> dict[str, Any]:
    from w8a8 import evaluation as scoring
    from w8a8.evaluation.scores import scoring_length

    text = scoring.encode(opened.tokenizer, content).first(options["max_tokens"])
    length = options["seq_len"] or scoring_length(opened.model, text)
    return {"text": text, "seq_len": length, "stride": options["stride"]}


def _fingerprint(model: str, dtype: str) -> str:
    """What a reference is told from another by: its config, the names, sizes and times of its files, the dtype."""
    from w8a8.checkpoint.directory import Directory

    directory = Directory.of(model)
    found = hashlib.sha256(directory.config_file.read_bytes() + dtype.encode())
    for path in directory.promised:
        status = path.stat()
        found.update(f"{path.name} {status.st_size} {status.st_mtime_ns}".encode())
    return found.hexdigest()


def sizes(model: str, against: str) -> str:
    """How large a model's files of weights are, and another's."""
    return f"{megabytes(_on_disk(model))} of {megabytes(_on_disk(against))}"


def _on_disk(model: str) -> int:
    from w8a8.checkpoint.directory import Directory

    return Directory.of(model).bytes


def windows_in_words(e: Any) -> str:
    return f"{e.tokens:,} tokens in {e.windows} windows of {e.seq_len}, {e.stride} apart"


def evaluation_rows(prefix: str, e: Any) -> list[tuple[str, str, str]]:
    name = "pseudo-perplexity" if e.pseudo else "perplexity"
    return [
        (f"{prefix}{name}", *_estimate(e.perplexity, 4)),
        (f"{prefix}loss, nats per token", *_estimate(e.loss_nats, 5)),
        *([(f"{prefix}bits per byte", *_estimate(e.bits_per_byte, 5))] if e.bits_per_byte is not None else []),
    ]


def _estimate(e: Any, digits: int) -> tuple[str, str]:
    return f"{e.mean:.{digits}f}", f"{e.low:.{digits}f} .. {e.high:.{digits}f}"
