"""What is measured of models by their names: a perplexity, a study, the sensitivity of layers, speed.

What is asked of a model is held against its kind before a weight is read (`w8a8.checkpoint.opening`).
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from w8a8.analysis import Sensitivity, layers, sensitivity
from w8a8.analysis import study as studies
from w8a8.calibration.sources import content_of
from w8a8.checkpoint.opening import Named, NamedModel, OpenedModel, open_model
from w8a8.core.scheme import AUTO, Scheme
from w8a8.evaluation import Evaluation, Text, encode, perplexity, scores, speed
from w8a8.fusing.models import fusions_in_words, optimize_where_possible
from w8a8.jobs.watching import Watcher
from w8a8.model.choice import unstack_experts_
from w8a8.model.kinds import Asked
from w8a8.model.pretrained import Pretrained
from w8a8.pipeline import quantize


def score_model(
    model: Named,
    text: str,
    *,
    max_tokens: int | None = None,
    fuse: bool = True,
    watcher: Watcher | None = None,
    **options: Any,
) -> Evaluation:
    """The perplexity of a text, or the pseudo-perplexity: what `w8a8 eval` measures of one model.

    Args:
        model: Causal, or masked.
        text: A file, or a data set on the hub.
        max_tokens: Only the first so many.
        fuse: Whether what lies between the layers of a masked model is fused (`w8a8.optimize`), where it can be.
        watcher: Told how it goes, and what of a masked model was fused.
        options: As for `w8a8.evaluation.perplexity`.

    Raises:
        ModelError: it is of another kind; as `open_model` and `w8a8.evaluation.perplexity`.
        CheckpointError, TextError: the model or the text cannot be read.
    """
    opened, encoded = _with_text(model, scores.ASKED, text)
    watcher, models = watcher or Watcher(), {str(NamedModel.of(model).name): opened.model}
    with fusing(models, watcher, asked=fuse), watcher.stage("scoring") as step:
        return perplexity(opened.model, encoded.first(max_tokens), progress=step, **options)


def study_model(
    model: Named, text: str, *, max_tokens: int | None = None, watcher: Watcher | None = None, **options: Any
) -> studies.Study:
    """Every granularity of weights and activations, simulated: what `w8a8 study` measures.

    Args:
        model: Float and causal.
        text, max_tokens, watcher: As for `score_model`.
        options: As for `w8a8.study`.

    Raises:
        Others: as `score_model` and `w8a8.study`.
    """
    opened, encoded = _with_text(model, studies.ASKED, text)
    with (watcher or Watcher()).stage("studying") as step:
        return studies.study(opened.model, encoded.first(max_tokens).ids, progress=step, **options)


def rank_layers(
    model: Named, text: str, scheme: Scheme | str = AUTO, *, watcher: Watcher | None = None, **options: Any
) -> Sensitivity:
    """What quantising each layer does, those of experts too: what `w8a8 sensitivity` measures.

    Args:
        model: Float, and one that reads text.
        text, watcher: As for `score_model`.
        scheme, options: As for `w8a8.sensitivity`.

    Raises:
        Others: as `score_model` and `w8a8.sensitivity`.
    """
    if scheme != AUTO:
        scheme = Scheme.of(scheme)
    opened, encoded = _with_text(model, layers.ASKED, text)
    encoded = replace(encoded, vectors=opened.behind)
    unstack_experts_(opened.model)
    with (watcher or Watcher()).stage("measuring") as step:
        return sensitivity(opened.model, encoded, scheme, progress=step, **options)


def time_models(
    model: Named,
    against: Sequence[str] = (),
    *,
    scheme: Scheme | str = "w8a8",
    fuse: bool = True,
    watcher: Watcher | None = None,
    **options: Any,
) -> dict[str, speed.Speed]:
    """How fast models read and write, in turns, by their names: what `w8a8 bench` measures.

    Args:
        model: Causal, as are the others; or encoders, all of them of text, of pictures or of sound.
        against: Others, opened as this one is; they come first.
        scheme: What a float model with nothing to be against is quantised in, to be timed beside itself.
        fuse: Whether what lies between the integer layers of encoders is fused (`w8a8.optimize`), where it can be.
        watcher, options: As for `score_model`, and for `w8a8.evaluation.speed.measure_speed`.

    Raises:
        SchemeError: the scheme has static activation scales, or as `w8a8.quantize`.
        Others: as `score_model` and `w8a8.evaluation.speed.measure_speed`.
    """
    wanted, named = Scheme.of(scheme), NamedModel.of(model)
    wanted.check_without_data(
        "take a dynamic scheme, or save the model with `w8a8 quantize --calib FILE` and name both, the float one as "
        "--against"
    )
    models: dict[str, Pretrained] = {}
    caches: dict[str, str] = {}
    watcher = watcher or Watcher()
    for name in dict.fromkeys((*against, str(named.name))):
        each = replace(named, name=name)
        is_float = each.directory.quantization is None
        if is_float:
            each = replace(each, head="float")
        opened = open_model(each, speed.ASKED)
        models[name], caches[name] = opened.model, opened.kv
        if is_float and not against:
            other = f"{name} in {wanted.name}"
            models[other], caches[other] = open_model(each).model, opened.kv
            quantize(models[other], wanted, head=named.head)
        if opened.kv_why is not None and not speed.only_reads(opened.model):
            watcher.note(f"{name} keeps keys and values as transformers does: {opened.kv_why}")
    with watcher.stage("timing") as step:
        encoders = {name: each for name, each in models.items() if speed.only_reads(each)}
        whys = {name: optimize_where_possible(each) if fuse else "not asked for" for name, each in encoders.items()}
        found = speed.measure_speed(models, progress=step, **options)
    told = {name: fusions_in_words(models[name], why) for name, why in whys.items()}
    return {name: replace(each, fused=told.get(name), kv=caches[name]) for name, each in found.items()}


@contextlib.contextmanager
def fusing(models: Mapping[str, Pretrained], watcher: Watcher, *, asked: bool) -> Iterator[None]:
    """Fuse what lies between the layers of encoders (`w8a8.optimize`), and tell after the work what was fused.

    Args:
        models: By the names that they are told by; other models stay as they are.
        watcher: Told at the end of the `with` block.
        asked: Whether to; else that is the reason that is told.
    """
    encoders = {name: each for name, each in models.items() if speed.only_reads(each)}
    no = "it was not asked for"
    whys = {name: optimize_where_possible(each) if asked else no for name, each in encoders.items()}
    yield
    for name, why in whys.items():
        watcher.note(f"{name}: {fusions_in_words(encoders[name], why)}.")


def _with_text(model: Named, asked: Asked, text: str) -> tuple[OpenedModel, Text]:
    """The model and the text, which is read first."""
    content = content_of(text)
    opened = open_model(model, asked)
    return opened, encode(opened.tokenizer, content)
