"""What kind of model this is, and so what can be asked of it: the one question at the door of every command.

And what scheme is usual for it, where none is asked for.

Told from the class and the config, before any weight is read: by what its `forward` takes, whether transformers can
have it generate, and for masked language models, which nothing else tells from other encoders, by transformers' own
mapping of them.  Whether what generates is causal is seen when it is scored (`evaluation.scores.check_causal`).
"""

import enum
import inspect
from collections.abc import Set
from dataclasses import dataclass
from typing import Any

from torch import nn

from w8a8.core.scheme import Scheme
from w8a8.errors import ModelError
from w8a8.model.pretrained import Config, Pretrained, Tokenizer, is_pretrained


class Kind(enum.Enum):
    """What a model reads and gives."""

    CAUSAL = "a causal language model"
    MASKED = "a masked language model"
    PAIRED = "an encoder-decoder"
    TEXT = "a model that reads text and predicts no tokens"
    VISION = "a model of pictures"
    SOUND = "a model of sound"
    OTHER = "a model that reads something else than text alone"


READS_TEXT = frozenset({Kind.CAUSAL, Kind.MASKED, Kind.TEXT})
"""Those that are called with token ids alone."""

PREDICTS_TOKENS = frozenset({Kind.CAUSAL, Kind.MASKED})
"""Those that a text can be scored with: by perplexity, or by pseudo-perplexity."""

ENCODERS = frozenset({Kind.MASKED, Kind.TEXT, Kind.VISION})
"""Those whose inputs are quantised with a zero point where nothing else is asked for.

Their feed-forward layers read what comes out of a GELU, which is one-sided: a grid that is not symmetric is nearly
twice as fine there, at nearly the same speed.  bench/encoder_schemes.py has what that is worth.
"""

_SOUNDS = ("input_values", "input_features")
_BESIDE = ("pixel_values", "bbox", "visual_feats", *_SOUNDS)
_WAYS = {
    Kind.CAUSAL: "`w8a8 eval MODEL --text FILE` scores it",
    Kind.MASKED: "`w8a8 eval MODEL --text FILE` gives its pseudo-perplexity",
    Kind.TEXT: "`w8a8 eval MODEL --text FILE --against FLOAT_MODEL` tells how far its outputs are from another's",
}
_IN_PYTHON = (
    "in Python, w8a8.evaluation.outputs.compare_outputs(model, float_model, batches) tells what quantising changed"
)


def kind_of(kind: type[Pretrained], config: Config) -> Kind:
    """What kind a model of this class and config is."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES as MASKED_NAMES

    taken = inspect.signature(kind.forward).parameters
    main = getattr(kind, "main_input_name", None)
    name = kind.__name__
    if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in taken:
        return Kind.PAIRED
    if main == "pixel_values":
        return Kind.VISION
    if main in _SOUNDS:
        return Kind.SOUND
    if main != "input_ids" or "input_ids" not in taken:
        return Kind.OTHER
    masked = name in MASKED_NAMES.values() or name.endswith("ForMaskedLM")
    if masked and not getattr(config, "is_decoder", False):
        return Kind.MASKED
    if kind.can_generate():
        return Kind.CAUSAL
    return Kind.OTHER if any(other in taken for other in _BESIDE) else Kind.TEXT


def kind_of_model(model: nn.Module) -> Kind | None:
    """The same of a model; None where it is none of transformers'."""
    return kind_of(type(model), model.config) if is_pretrained(model) else None


def usual_scheme(kinds: Set[Kind | None]) -> Scheme:
    """The scheme that is usual where models of these kinds are in one module; of none, or of others too, "w8a8"."""
    return Scheme.of("w8a8-asym" if kinds and kinds <= ENCODERS else "w8a8")


@dataclass(frozen=True)
class Asked:
    """Something that is asked of a model.

    what: As the subject of "... was asked for".
    kinds: The kinds of models that it can be asked of.
    """

    what: str
    kinds: Set[Kind] = frozenset({Kind.CAUSAL})

    def check(self, kind: type[Pretrained], config: Config) -> Kind:
        """Raise `ModelError` where models of this class and config cannot do it; else say what kind they are."""
        found = kind_of(kind, config)
        if found not in self.kinds:
            raise ModelError(
                f"{self.what} was asked for, and {kind.__name__} is {found.value}: that takes "
                f"{' or '.join(sorted(each.value for each in self.kinds))}; {way_out(found)}"
            )
        return found

    def check_model(self, model: nn.Module) -> None:
        """The same of a model, where it is one of transformers'."""
        if is_pretrained(model):
            self.check(type(model), model.config)


def check_served(kind: type[Pretrained], config: Config) -> None:
    """Raise `ModelError` where transformers' server has no answer of a model: it writes text, or what sound says."""
    from transformers.models.auto import modeling_auto as auto

    others = (auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES)
    if not any(kind.__name__ in names.values() for names in others):
        Asked("serving").check(kind, config)


def way_out(kind: Kind) -> str:
    """What can be asked of it to see what quantising lost."""
    return _WAYS.get(kind, _IN_PYTHON)


def input_config(config: Any) -> Any:
    """The part of a config that says of the token ids that a model is called with; itself where it has no such part.

    The ids of an encoder-decoder go to its encoder.  transformers' `get_text_config()` gives the decoder, and has no
    answer where both ends are of text; its `encoder=True` finds an encoder under one of two names, else it leaves out
    the one part of text that there is, or gives a copy.
    """
    for name in ("text_encoder", "encoder"):
        part = getattr(config, name, None)
        found = None if part is None else input_config(part)
        if hasattr(found, "vocab_size"):  # not an encoder of pictures
            return found
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def output_config(config: Any) -> Any:
    """The part of a config that says of the tokens that a model predicts; itself where it has no such part."""
    if input_config(config) is config:
        return config
    return config.get_text_config(decoder=True)


def context_length(model: nn.Module) -> int | None:
    """The longest sequence that the model has positions for, or None where its config does not say, or no limit."""
    for config in (model.config, input_config(model.config)):
        for name in ("max_position_embeddings", "n_positions"):
            value = getattr(config, name, None)
            if isinstance(value, int) and value > 0:  # XLNet's is -1: no limit
                return value - _skipped(model, value)
    return None


def window_of(tokenizer: Tokenizer, model: nn.Module) -> int | None:
    """The most tokens of a text that a model reads; None where neither it nor its tokenizer has a limit."""
    told = [tokenizer.model_max_length, context_length(model)]
    found = [value for value in told if value is not None and value < 1 << 30]  # the tokenizer's way to say: no limit
    return min(found) if found else None


def _skipped(model: nn.Module, positions: int) -> int:
    """How many of the places are for no token: RoBERTa's are counted from behind the number of its padding."""
    for name, module in getattr(model, "named_modules", tuple)():
        padding = getattr(module, "padding_idx", None)
        if name.endswith("position_embeddings") and padding is not None and module.num_embeddings == positions:
            return int(padding) + 1
    return 0
