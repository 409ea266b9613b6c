"""Two models by name, compared on a text: their predictions token by token, or the outputs of what predicts none."""

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from w8a8 import evaluation
from w8a8.analysis import LayerErrors, layer_errors
from w8a8.calibration.sources import content_of
from w8a8.checkpoint.directory import Directory
from w8a8.checkpoint.embedder import Embedder, is_embedder
from w8a8.checkpoint.opening import Named, NamedModel, OpenedModel, open_model, open_tokenizer
from w8a8.core.plain import plain
from w8a8.errors import ModelError
from w8a8.evaluation import Comparison, Reference
from w8a8.evaluation.outputs import OutputComparison, compare_outputs
from w8a8.evaluation.scores import default_length, scoring_length
from w8a8.evaluation.text import Text, framed
from w8a8.jobs.measuring import fusing
from w8a8.jobs.watching import Watcher
from w8a8.model.choice import unstack_experts_
from w8a8.model.experts import holds_experts
from w8a8.model.kinds import PREDICTS_TOKENS, READS_TEXT, Asked
from w8a8.model.pretrained import Pretrained
from w8a8.streaming.resources import available_memory

ASKED = Asked("a comparison on a text", READS_TEXT)
_LAYERS_LENGTH = 256  # tokens in a window that layers are measured on
_OUTPUTS_LENGTH = 512


@dataclass(frozen=True)
class ModelPair:
    """Two models that a text tells apart.

    model: A directory or a hub id, or one that says how both are opened; "int8" of its head, and its cache, are not the
        reference's.
    against: The reference, a directory or a hub id.
    text: A file, or a data set on the hub.
    seq_len, stride: Of the windows; by default the model's context, at most 2048, and as far apart.
    max_tokens: Only the first so many.
    seed: Of the bootstrap.
    fuse: Whether what lies between the integer layers of encoders is fused (`w8a8.optimize`), where it can be.
    one_at_a_time: Never hold both in memory; chosen too where they do not fit.
    cache: A file for the reference's predictions: made, or used again.
    """

    model: Named
    against: str
    text: str
    seq_len: int | None = None
    stride: int | None = None
    max_tokens: int | None = None
    seed: int = 0
    fuse: bool = True
    one_at_a_time: bool = False
    cache: Path | None = None


@dataclass(frozen=True)
class Compared:
    """A comparison, and what each quantised layer does by itself, or why that was not measured."""

    both: Comparison | OutputComparison
    layers: tuple[LayerErrors, ...]
    why_not: str | None

    def to_dict(self) -> dict[str, object]:
        """For JSON."""
        return {**plain(self.both), "layers": plain(self.layers), "layers_not_measured": self.why_not}


def compare_models(pair: ModelPair, watcher: Watcher | None = None) -> Compared:
    """Compare two models on a text: what `w8a8 eval --against` does.

    Args:
        pair: What is asked for.
        watcher: Told how it goes; by default nobody.

    Raises:
        ModelError: one of the models does not read text, or they cannot be compared on it; the cache holds the
            predictions of another model, or of other windows.
        CheckpointError, TextError: a model or the text cannot be read.
    """
    watcher = watcher or Watcher()
    named = NamedModel.of(pair.model)
    both = named, replace(named, name=pair.against, head="float", kv="dynamic")
    model, against = (replace(each, name=each.directory) for each in both)
    kinds = {ASKED.check(*each.directory.architecture) for each in (model, against)}
    embedders = all(is_embedder(each.directory.path) for each in (model, against))
    compare = _predictions if kinds <= PREDICTS_TOKENS and not embedders else _outputs
    return compare(pair, model, against, watcher)


def check_text(directory: Directory, text: str) -> None:
    """Raise a `W8A8Error` before the work where a text cannot be read, or a model cannot be scored on it."""
    content = content_of(text)
    ASKED.check(*directory.architecture)
    evaluation.encode(open_tokenizer(directory), content)


def _predictions(pair: ModelPair, model: NamedModel, against: NamedModel, watcher: Watcher) -> Compared:
    """Both in memory where they fit, else one after the other."""
    content = content_of(pair.text)
    wider = 2 if model.dtype == "float32" else 1  # files of two bytes a weight, perhaps
    apart = pair.one_at_a_time or pair.cache is not None
    apart = apart or wider * (model.directory.bytes + against.directory.bytes) > 0.8 * available_memory()
    stored = _stored(pair, against, content, watcher) if apart else None
    opened = open_model(model)
    windows = _windows(pair, opened, content)
    reference: Any = open_model(against).model if stored is None else stored
    encoders = {_name(pair): opened.model} | ({pair.against: reference} if stored is None else {})
    with fusing(encoders, watcher, asked=pair.fuse), watcher.stage("comparing") as step:
        both = evaluation.compare(opened.model, reference, seed=pair.seed, progress=step, **windows)
    if apart:
        return Compared(both, (), "the models were in memory one at a time")
    if holds_experts(opened.model):
        unstack_experts_(reference)
    length = min(windows["seq_len"], _LAYERS_LENGTH)
    return _with_layers(both, reference, opened.model, windows["text"], seq_len=length, seed=pair.seed)


def _stored(pair: ModelPair, against: NamedModel, content: str, watcher: Watcher) -> Reference:
    """The reference's predictions, from the cache, or made and put there."""
    name = _fingerprint(against.directory, against.dtype)
    if pair.cache is not None and pair.cache.exists():
        reference = Reference.load(pair.cache)
        if reference.model != name:
            raise ModelError(
                f"{pair.cache} holds the predictions of another model than {pair.against} in {against.dtype}; "
                "remove it, or give another --cache"
            )
        return reference
    opened = open_model(against)
    nobody = Watcher()  # what is fused of the reference is not told
    with fusing({pair.against: opened.model}, nobody, asked=pair.fuse), watcher.stage("reference") as step:
        reference = evaluation.store(opened.model, name=name, progress=step, **_windows(pair, opened, content))
    if pair.cache is not None:
        reference.save(pair.cache)
    return reference


def _windows(pair: ModelPair, opened: OpenedModel, content: str) -> dict[str, Any]:
    text = evaluation.encode(opened.tokenizer, content).first(pair.max_tokens)
    return {"text": text, "seq_len": pair.seq_len or scoring_length(opened.model, text), "stride": pair.stride}


def _fingerprint(directory: Directory, dtype: str) -> str:
    """What a reference is told from another by: its config, the names, sizes and times of its files, the dtype."""
    found = hashlib.sha256(directory.config_file.read_bytes() + dtype.encode())
    for path in directory.promised:
        status = path.stat()
        found.update(f"{path.name} {status.st_size} {status.st_mtime_ns}".encode())
    return found.hexdigest()


def _name(pair: ModelPair) -> str:
    return str(NamedModel.of(pair.model).name)


def _outputs(pair: ModelPair, model: NamedModel, against: NamedModel, watcher: Watcher) -> Compared:
    """Run a text through two models in memory that read one and predict no tokens; of two embedders, to vectors."""
    content = content_of(pair.text)
    opened = open_model(model)
    other = open_model(against)
    encoded = evaluation.encode(opened.tokenizer, content).first(pair.max_tokens)
    room = default_length(opened.model) - (0 if encoded.frame is None else len(encoded.frame))
    length = pair.seq_len or min(room, _OUTPUTS_LENGTH)
    if length > room:
        raise ModelError(f"--seq-len {length} is out of range: 2..{room} for {_name(pair)}")
    batches = [{"input_ids": framed(ids, encoded.frame)[None]} for ids in encoded.ids.split(length)]
    models: list[nn.Module] = [opened.model, other.model]
    embedders = [Embedder(each.model, made) for each in (opened, other) if (made := each.behind) is not None]
    ours, theirs = embedders if len(embedders) == len(models) else models
    encoders = {_name(pair): opened.model, pair.against: other.model}
    with fusing(encoders, watcher, asked=pair.fuse), watcher.stage("comparing") as step:
        both = compare_outputs(ours, theirs, batches, seed=pair.seed, progress=step)
    return _with_layers(both, other.model, opened.model, encoded, seed=pair.seed)


def _with_layers(
    both: Comparison | OutputComparison, reference: Pretrained, model: Pretrained, text: Text, **options: Any
) -> Compared:
    """A comparison, and what each layer does by itself, or why that cannot be measured."""
    try:
        return Compared(both, layer_errors(reference, model, text, **options), None)
    except ModelError as error:
        return Compared(both, (), str(error))
