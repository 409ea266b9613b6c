"""The class of a model, named by config.json and found in transformers, and its config.

Nothing of a repository is executed unless it is asked for: where transformers has no class for a model and its config
names code of its own (`auto_map`), that is an error.  Where transformers does have a class it is taken, whatever code
lies beside it.
"""

from collections.abc import Iterator
from pathlib import Path

import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import CONFIG_MAPPING
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.models.auto import modeling_auto

from w8a8.checkpoint.files import CONFIG
from w8a8.core.plain import Json
from w8a8.errors import OTHERS_ERRORS, CheckpointError
from w8a8.model.pretrained import Config, Pretrained

LOADING_ERRORS = (*OTHERS_ERRORS, SafetensorError, StrictDataclassError)
"""What transformers raises over a config or files that make no sense."""


def architecture(directory: Path, stated: Json, *, trust_remote_code: bool = False) -> tuple[type[Pretrained], Config]:
    """The model class that config.json names, and the config.

    Args:
        trust_remote_code: Import the classes that `auto_map` names from Python files of the directory, where
            transformers has none of its own.

    Raises:
        CheckpointError: config.json is not one that transformers reads, names no class that it has, or needs code of
            the repository.
    """
    own = stated.get("auto_map")
    if own and not trust_remote_code and stated.get("model_type") not in CONFIG_MAPPING:
        raise CheckpointError(
            f"{directory / CONFIG}: transformers {transformers.__version__} has no model_type "
            f"{stated.get('model_type')!r}; the repository brings code of its own ({str(own)[:200]}), which is not "
            "run: read that code, then allow it with trust_remote_code=True (--trust-remote-code)"
        )
    try:
        config = transformers.AutoConfig.from_pretrained(directory, trust_remote_code=trust_remote_code)
    except LOADING_ERRORS as error:
        raise CheckpointError(f"{directory / CONFIG}: transformers cannot read it: {error}") from error
    names = config.architectures or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise CheckpointError(f"{directory / CONFIG}: architectures is {names!r}, expected a list of names")
    found = (getattr(transformers, name, None) for name in names)
    kind = next((c for c in found if isinstance(c, type) and issubclass(c, transformers.PreTrainedModel)), None)
    if kind is None:
        kind = next((c for c in _registered(config) if c.__name__ in names), None)
    if kind is None and trust_remote_code and isinstance(own, dict):
        reference = own.get("AutoModelForCausalLM") or own.get("AutoModel")
        if isinstance(reference, str):
            kind = get_class_from_dynamic_module(reference, directory)
    if kind is None:
        raise CheckpointError(
            f"{directory / CONFIG}: architectures is {names}, transformers {transformers.__version__} has none of them"
        )
    return kind, config


def without_head(kind: type[Pretrained], config: Config) -> type[Pretrained]:
    """The class that transformers has for the states of such a model alone; itself where there is no other.

    An embedder's config.json often names the class that the model was trained as (all-mpnet-base-v2: MPNetForMaskedLM),
    whose head its files do not have: sentence-transformers takes this one.
    """
    for names in (modeling_auto.MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES, modeling_auto.MODEL_MAPPING_NAMES):
        name = names.get(config.model_type)
        found = getattr(transformers, name, None) if isinstance(name, str) else None
        if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel):
            return found
    return kind


def _registered(config: Config) -> Iterator[type[Pretrained]]:
    """The classes of models that a caller has registered with transformers' Auto classes for a config."""
    for auto in vars(modeling_auto).values():
        own = getattr(getattr(auto, "_model_mapping", None), "_extra_content", {})
        kinds = own.get(type(config), ())
        yield from kinds if isinstance(kinds, tuple) else (kinds,)
