"""What a model of any kind can be called with: several guesses, the first that the float model runs is taken.

What a forward takes shows in its signature and in the model's `main_input_name`; of what shape, in its configuration.
"""

import contextlib
import inspect
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from zoo.exceptions import INPUTS

BATCH, LENGTH = 2, 12
FIRST = 40
"""Of the ids that are drawn: smaller ones may have a meaning of their own."""


def seen(part: Any, *names: str, default: Any = None) -> Any:
    """The first of these that a configuration or a part of it has."""
    parts = [part, *(v for v in vars(part).values() if hasattr(v, "model_type"))]
    for name in names:
        for each in parts:
            value = vars(each).get(getattr(each, "attribute_map", {}).get(name, name))
            if value is not None:
                return value
    return default


Guess = Callable[[], dict[str, Tensor]]


def candidates(model: Any) -> Iterator[Guess]:
    """Guesses, the fullest first; making one may fail, as calling the model with it may."""
    given = INPUTS.get(model.config.model_type)
    if given is not None:
        yield partial(given, model)
    signature = inspect.signature(model.forward).parameters
    pictures = [_pictures(model, signature), *_other_pictures(model, signature)]
    for extra in (_everything, _required):
        for picture in pictures:
            for sound in _sounds(model, signature):
                yield partial(extra, model, signature, picture | sound)


def _random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(2))


def ids(model: Any, length: int = LENGTH, batch: int = BATCH) -> Tensor:
    """Ordinary tokens."""
    embedding = None
    with contextlib.suppress(NotImplementedError, AttributeError):
        embedding = model.get_input_embeddings()
    known = [seen(model.config, "vocab_size"), getattr(embedding, "num_embeddings", None)]
    vocabulary = min((n for n in known if n), default=99)
    first = FIRST if vocabulary > FIRST + 8 else 0
    return torch.randint(first, vocabulary, (batch, length), generator=torch.Generator().manual_seed(1))


def _pair(value: Any) -> tuple[int, int]:
    return (int(value[0]), int(value[-1])) if isinstance(value, list | tuple) else (int(value), int(value))


def _pictures(model: Any, signature: Any) -> dict[str, Tensor]:
    """Pixels as the forward takes them, with what belongs to them."""
    if "pixel_values" not in signature:
        return {}
    config = model.config
    vision = getattr(config, "vision_config", None) or config
    channels = seen(vision, "num_channels", "in_channels", "in_chans", default=3)
    channels = channels if isinstance(channels, int) else 3
    if "image_grid_thw" in signature:
        patch, temporal = seen(vision, "patch_size", default=8), seen(vision, "temporal_patch_size", default=1)
        grid = torch.tensor([[1, 4, 4]])
        return {"pixel_values": _random(16, channels * temporal * patch * patch), "image_grid_thw": grid}
    height, width = _pair(seen(vision, "image_size", "img_size", "input_size", default=64))
    return {"pixel_values": _random(BATCH, channels, height, width)}


def _other_pictures(model: Any, signature: Any) -> list[dict[str, Tensor]]:
    """Other shapes of pictures: larger, a video, several crops, none."""
    if "pixel_values" not in signature and "pixel_values_videos" not in signature:
        return [{}]
    config = model.config
    vision = getattr(config, "vision_config", None) or config
    channels = seen(vision, "num_channels", "in_channels", default=3)
    channels = channels if isinstance(channels, int) else 3
    height, width = _pair(seen(vision, "image_size", default=64))
    frames = seen(vision, "num_frames", "frames_per_clip", default=4)
    shapes: list[dict[str, Tensor]] = [
        {"pixel_values": _random(BATCH, frames, channels, height, width)},
        {"pixel_values": _random(BATCH, 1, channels, height, width)},
        {"pixel_values": _random(BATCH, 3, height, width)},
        {"pixel_values": _random(BATCH, channels, 64, 64)},
        {"pixel_values": _random(BATCH, channels, 224, 224)},
    ]
    if "pixel_values_videos" in signature:
        shapes.insert(0, {"pixel_values_videos": _random(BATCH, frames, channels, height, width)})
    return [*shapes, {}]


def _sounds(model: Any, signature: Any) -> list[dict[str, Tensor]]:
    """Features of sounds in each layout, or samples."""
    config = model.config
    found: list[dict[str, Tensor]] = []
    for name in ("input_features", "input_values", "audio_values"):
        if name not in signature:
            continue
        bins = seen(config, "num_mel_bins", "input_feat_per_channel", "feature_size", "n_mels", "input_dim", default=80)
        bins = bins if isinstance(bins, int) else 80
        places = seen(config, "max_source_positions", default=None)
        frames = seen(config, "max_length", "spectrogram_length", default=64)
        frames = frames if isinstance(frames, int) and frames <= 2048 else 64
        if places:
            found.append({name: _random(BATCH, bins, 2 * places)})
        if name != "input_features":
            found.append({name: _random(BATCH, 4000)})
            found.append({name: _random(BATCH, 1, 4000)})
        found.append({name: _random(BATCH, frames, bins)})
        found.append({name: _random(BATCH, bins, frames)})
        found.append({name: _random(BATCH, 1, frames, bins)})
    without = [{}] if "input_ids" in signature or not found else []
    return [*(_with_mask(each, signature) for each in found), *without]


def _with_mask(media: dict[str, Tensor], signature: Any) -> dict[str, Tensor]:
    """The features of a sound, and that all of them count."""
    ((_, sound),) = media.items()
    if sound.ndim == 3 and sound.shape[1] == 1:
        return media
    axis = -1 if sound.shape[-1] == sound.shape[-2:].numel() or sound.shape[-1] > sound.shape[-2] else -2
    for name in ("input_features_mask", "feature_attention_mask", "padding_mask"):
        if name in signature:
            media = {**media, name: torch.ones(BATCH, sound.shape[axis], dtype=torch.int64)}
    return media


def _everything(model: Any, signature: Any, media: dict[str, Tensor]) -> dict[str, Tensor]:
    """Text with places for the media, masks and what a decoder reads."""
    inputs = dict(media)
    if "input_ids" in signature:
        inputs["input_ids"] = _with_places(model, media)
        if "attention_mask" in signature:
            mask = torch.ones_like(inputs["input_ids"])
            mask[-1, -1] = 0
            inputs["attention_mask"] = mask
        token = seen(model.config, "image_token_id", "image_token_index", default=-1)
        places = (inputs["input_ids"] == token).to(torch.int64)
        if "mm_token_type_ids" in signature:
            inputs["mm_token_type_ids"] = places
        if "token_type_ids" in signature and media:
            inputs["token_type_ids"] = places
    if "decoder_input_ids" in signature:
        inputs["decoder_input_ids"] = ids(model, 5).flip(0)
    if "bbox" in signature:
        inputs["bbox"] = torch.tensor([2, 3, 9, 12]).expand(BATCH, LENGTH, 4).contiguous()
    return inputs | {k: v for k, v in _required(model, signature, {}).items() if k not in inputs}


def _required(model: Any, signature: Any, media: dict[str, Tensor]) -> dict[str, Tensor]:
    """What has no default, and the main input."""
    names = [
        n for n, p in signature.items() if p.default is inspect.Parameter.empty and p.kind is p.POSITIONAL_OR_KEYWORD
    ]
    inputs = dict(media)
    main = getattr(model, "main_input_name", "input_ids")
    for name in dict.fromkeys([*names, *([main] if isinstance(main, str) else main)]):
        if name in inputs or name not in signature or name.startswith("qformer"):
            continue
        if name.endswith("ids"):
            inputs[name] = ids(model)
        elif name.endswith("mask"):
            inputs[name] = torch.ones(BATCH, LENGTH, dtype=torch.int64)
    if "qformer_input_ids" in signature:
        inputs["qformer_input_ids"] = ids(model, 6)
        inputs["qformer_attention_mask"] = torch.ones_like(inputs["qformer_input_ids"])
    if "decoder_input_ids" in signature:
        inputs["decoder_input_ids"] = ids(model, 5).flip(0)
    return inputs


_FEATURES: dict[str, tuple[str, tuple[str, ...]]] = {
    "pixel_values": ("get_image_features", ("image_token_id", "image_token_index")),
    "pixel_values_videos": ("get_video_features", ("video_token_id", "video_token_index")),
    "input_features": ("get_audio_features", ("audio_token_id", "audio_token_index")),
    "input_values": ("get_audio_features", ("audio_token_id", "audio_token_index")),
}


def _with_places(model: Any, media: dict[str, Tensor]) -> Tensor:
    """Ids of which as many stand for a picture or a sound as the model makes features of it."""
    text = ids(model)
    for name, (method, tokens) in _FEATURES.items():
        make: Callable[..., Any] | None = getattr(model, method, None) or getattr(
            getattr(model, "model", None), method, None
        )
        token = seen(model.config, *tokens)
        if name not in media or make is None or token is None:
            continue
        takes = inspect.signature(make).parameters
        related = {k: v for k, v in media.items() if k == name or k in takes}
        with torch.no_grad():
            features = make(**related)
        rows = _rows(features)
        if len(media[name]) == BATCH and rows % BATCH == 0 and len(text) == BATCH:
            each = rows // BATCH
        else:  # one picture: one sentence
            text, each = text[:1], rows
        text = torch.cat([text[:, :4], torch.full((len(text), each), token), text[:, 4:]], dim=1)
    return text


def _rows(features: Any) -> int:
    """How many tokens features stand for."""
    features = getattr(features, "pooler_output", features) if not isinstance(features, Tensor) else features
    if isinstance(features, Tensor):
        return features.shape[:-1].numel()
    return sum(_rows(each) for each in features)


def called(model: nn.Module, inputs: dict[str, Tensor]) -> Any:
    """The model's output, from one state of the random numbers."""
    torch.manual_seed(0)
    with torch.no_grad():
        return model(**{k: v.clone() for k, v in inputs.items()})


def tensors(output: Any) -> list[Tensor]:
    """Every tensor of an output, in order; caches are not looked into."""
    if isinstance(output, Tensor):
        return [output]
    if isinstance(output, dict) or hasattr(output, "items"):
        return [t for value in output.values() for t in tensors(value)]
    if isinstance(output, list | tuple):
        return [t for value in output for t in tensors(value)]
    return []


def cast(inputs: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """The same with floats of this dtype."""
    return {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}
