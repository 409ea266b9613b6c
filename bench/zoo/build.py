"""A model of each type: which class stands for it, and values that are neutral nowhere."""

import functools
import math
from collections.abc import Iterator
from typing import Any

import torch
import transformers
from torch import nn
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, CONFIG_MAPPING_NAMES

from zoo.configs import quiet, tiny
from zoo.exceptions import CLASSES, CONFIGS

_KINDS = (
    *("SEQ_TO_SEQ_CAUSAL_LM", "IMAGE_TEXT_TO_TEXT", "SPEECH_SEQ_2_SEQ", "MASKED_LM", "CAUSAL_LM", "MULTIMODAL_LM"),
    *(
        "CTC",
        "RNNT",
        "TDT",
        "TEXT_TO_SPECTROGRAM",
        "TEXT_TO_WAVEFORM",
        "ZERO_SHOT_IMAGE_CLASSIFICATION",
        "IMAGE_CLASSIFICATION",
        "OBJECT_DETECTION",
    ),
    *(
        "UNIVERSAL_SEGMENTATION",
        "INSTANCE_SEGMENTATION",
        "SEMANTIC_SEGMENTATION",
        "DEPTH_ESTIMATION",
        "MASK_GENERATION",
    ),
    *("VIDEO_CLASSIFICATION", "AUDIO_CLASSIFICATION", "ZERO_SHOT_OBJECT_DETECTION"),
    *("VISUAL_QUESTION_ANSWERING", "DOCUMENT_QUESTION_ANSWERING", "TABLE_QUESTION_ANSWERING", "KEYPOINT_DETECTION"),
    *("KEYPOINT_MATCHING", "IMAGE_TO_IMAGE", "IMAGE_MATTING", "POSE_ESTIMATION", "NORMAL_ESTIMATION"),
    *("POINTMAP_ESTIMATION", "TIME_SERIES_PREDICTION", "TEXT_RECOGNITION", "TABLE_RECOGNITION", "RETRIEVAL"),
    *("CAUSAL_IMAGE_MODELING", "DECISION", "PRETRAINING", "SEQUENCE_CLASSIFICATION", "TOKEN_CLASSIFICATION"),
    *("QUESTION_ANSWERING", "TEXT_ENCODING", "BACKBONE", ""),
)
"""What a class is for; the first that a model type has stands for it."""
MOST_PARAMETERS = 12_000_000


@functools.cache
def types() -> dict[str, str]:
    """The name of the class of each model type that has one; parts of other models have none of their own."""
    found: dict[str, Any] = {}
    mappings = {}
    for kind in _KINDS:
        name = f"MODEL_FOR_{kind}_MAPPING_NAMES" if kind else "MODEL_MAPPING_NAMES"
        mappings[kind] = getattr(modeling_auto, name)
    seen: set[tuple[str, str]] = set()
    other_names = {name for name, cls in CONFIG_MAPPING.items() if cls.model_type != name}
    for model_type in sorted(CONFIG_MAPPING_NAMES, key=lambda name: (name in other_names, name)):
        for kind in _KINDS:
            names = CLASSES.get(model_type) or mappings[kind].get(model_type)
            if names is not None:
                name = names if isinstance(names, str) else names[0]
                key = (CONFIG_MAPPING_NAMES[model_type], name)
                if key not in seen:
                    seen.add(key)
                    found[model_type] = name
                break
    inner = set(_parts_of_others(found))
    return {
        model_type: name
        for model_type, name in found.items()
        if not (model_type in inner and mappings[""].get(model_type) in (name, None))
    }


def _parts_of_others(found: dict[str, Any]) -> Iterator[str]:
    """Model types that are a part of another's configuration."""
    for model_type in found:
        for part in getattr(CONFIG_MAPPING[model_type], "sub_configs", {}).values():
            kind = getattr(part, "model_type", None)
            if kind and kind != model_type:
                yield kind


def build(model_type: str) -> Any:
    """A small model in evaluation mode, always the same.

    Raises:
        whatever transformers raises.
    """
    with quiet():
        config = tiny(model_type, CONFIGS.get(model_type))
        cls = getattr(transformers, types()[model_type])
        with torch.device("meta"):
            size = sum(p.numel() for p in cls(config).parameters())
        if size > MOST_PARAMETERS:
            raise ValueError(f"the small configuration has {size:,} parameters")
        torch.manual_seed(0)
        model = cls(config)
        disturb_(model)
    return model.eval()


def disturb_(model: nn.Module) -> None:
    """Draw every matrix anew at a width that keeps activations near 1, and move what is 1 or 0 away from it."""
    generator = torch.Generator().manual_seed(1)
    filters = {id(m.weight) for m in model.modules() if isinstance(m, nn.modules.conv._ConvNd)}
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.is_floating_point():
                continue
            if parameter.ndim >= 2 and not bool((parameter == 1).all()):  # what begins at 1 is a scale, of any shape
                fan_in = max(1, parameter.numel() // max(1, parameter.shape[0]))
                if parameter.ndim == 3 and id(parameter) not in filters:  # a stack of experts
                    fan_in = parameter.shape[-1]
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / math.sqrt(fan_in))
            else:
                parameter.add_(torch.rand(parameter.shape, generator=generator) * 0.8 - 0.4)
        for module in model.modules():
            if isinstance(module, nn.Embedding) and module.padding_idx is not None:
                module.weight[module.padding_idx] = 0  # some classes make it so whenever they are loaded
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_var is not None:
                module.running_mean.add_(torch.rand(module.running_mean.shape, generator=generator) - 0.5)
                module.running_var.mul_(1 + torch.rand(module.running_var.shape, generator=generator))
        model.tie_weights()
