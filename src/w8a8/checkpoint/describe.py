"""What a quantised model says of itself in config.json.

A model that was quantised here carries the description in its config, so that transformers' own `save_pretrained`
writes it too: int8 weights without it would be read as float.
"""

import copy
import json
import os
import re
from collections.abc import Collection
from pathlib import Path

import torch
from torch import nn

from w8a8.checkpoint.headers import NAMES
from w8a8.checkpoint.layout import Group, QuantizationConfig, check_writable, to_json
from w8a8.checkpoint.names import FileNames, remember
from w8a8.core.packed import in_words
from w8a8.core.scheme import Scheme
from w8a8.errors import ModelError
from w8a8.layers.buffers import QuantLayer, quant_layers
from w8a8.layers.embedding import QuantEmbedding
from w8a8.layers.linear import Mode, is_linear, quant_linears
from w8a8.layers.saving import Saving
from w8a8.model.experts import Experts, stack_names
from w8a8.model.pretrained import Pretrained, is_pretrained


def describe(model: nn.Module) -> QuantizationConfig:
    """The groups and the ignored layers of a model.

    Where every plain linear layer has one scheme the target is "Linear", as other tools write it; with
    several schemes, and for layers that were a `Conv1D`, layers are listed by name: the files' name, where
    it differs from the model's.  Three are listed for vLLM, in which they are other things than in transformers: the
    quantised head, which is no "Linear" there; the router beside experts, which is one; and stacked experts that stay
    float, by an expression, as it asks for each expert's layers.  Tables are a group of their own, of the target
    "Embedding", in which those that are left out are classes that are derived from it too.

    Raises:
        ModelError: not a transformers model, or nothing in it is quantised.
        SchemeError: the file format has no word for a scheme.
    """
    if not is_pretrained(model):
        raise ModelError(f"expected a transformers model with a config, found {type(model).__name__}")
    names = FileNames(model)
    by_scheme: dict[Scheme, list[str]] = {}
    was_conv1d = False
    for name, layer in quant_linears(model):
        check_writable(layer.scheme)
        by_scheme.setdefault(layer.scheme, []).append(names.of_layer(name))
        was_conv1d |= layer.was_conv1d
    tables: dict[Scheme, list[str]] = {}
    for name, table in quant_layers(model):
        if isinstance(table, QuantEmbedding):
            check_writable(table.scheme)
            tables.setdefault(table.scheme, []).append(names.of_layer(name))
    if not by_scheme and not tables:
        raise ModelError(f"nothing in this {type(model).__name__} is quantised: call w8a8.quantize first")
    stacked = [name for name in stack_names(model) if not any(quant_linears(model.get_submodule(name)))]
    routers = _routers(model, stacked)
    left = tuple(names.of_layer(name) for name, m in model.named_modules() if is_linear(m) or name in routers)
    left += tuple(f"re:{re.escape(name)}\\..*" for name in stacked)
    if len(by_scheme) == 1 and not was_conv1d:
        head = getattr(model, "get_output_embeddings", lambda: None)()
        heads = [names.of_layer(name) for name, layer in quant_linears(model) if layer is head]
        by_scheme = {scheme: ["Linear", *heads] for scheme in by_scheme}
    groups = [Group(tuple(targets), scheme, in_words(scheme)) for scheme, targets in by_scheme.items()]
    if len(tables) == 1:
        tables = {scheme: ["Embedding"] for scheme in tables}
        left += tuple(names.of_layer(name) for name, m in model.named_modules() if isinstance(m, nn.Embedding))
    groups += [Group(tuple(targets), scheme) for scheme, targets in tables.items()]
    return QuantizationConfig(tuple(groups), left)


def check_storable(model: nn.Module) -> None:
    """Raise `ModelError` where a tensor that `save_pretrained` would write is none that the files can have.

    That is told by its dtype and its layout; the library would tell it when parts of the model are written already,
    and without the tensor's name.
    """
    left_out = getattr(model, "_keys_to_ignore_on_save", None) or ()
    for prefix, module in model.named_modules():
        if isinstance(module, QuantLayer):  # its tensors are those of the format
            continue
        buffers = {key: held for key, held in module._buffers.items() if key not in module._non_persistent_buffers_set}
        for key, held in (module._parameters | buffers).items():
            name = f"{prefix}.{key}".strip(".")
            if held is None or name in left_out or (held.dtype in NAMES and held.layout is torch.strided):
                continue
            kind, layout = (str(each).removeprefix("torch.") for each in (held.dtype, held.layout))
            raise ModelError(
                f"{type(model).__name__} is to be saved, and its {name} is {kind} ({layout}), for which safetensors "
                f"has no word (it has strided {', '.join(sorted(str(dtype).removeprefix('torch.') for dtype in NAMES))}"
                "); convert it, or register the buffer with persistent=False, which leaves it out of the files"
            )


def config_of(model: Pretrained, dtype: torch.dtype) -> dict[str, object]:
    """The config.json that transformers' `save_pretrained` would write for a model, without saving it."""
    config = copy.deepcopy(model.config)
    config.dtype = str(dtype).removeprefix("torch.")
    config.architectures = [type(model).__name__]
    return _without_descriptions(json.loads(config.to_json_string(use_diff=True)))


def _routers(model: nn.Module, stacked: Collection[str]) -> set[str]:
    """The modules beside experts that hold a matrix of their own and are not linear layers."""
    found = set()
    experts = {name for name, module in model.named_modules() if isinstance(module, Experts) or name in stacked}
    parents = {name.rpartition(".")[0] for name in experts}
    for parent, module in model.named_modules():
        if parent in parents:
            for name, child in module.named_children():
                weight = getattr(child, "weight", None)
                if isinstance(weight, nn.Parameter) and weight.ndim == 2:
                    found.add(f"{parent}.{name}" if parent else name)
    return found


def inscription(model: nn.Module) -> list[tuple[Pretrained, dict[str, object]]]:
    """What the configs of the transformers models that this is, or holds, are to say: each model with its description.

    A model with a simulated layer is not described: what it computes is not what its files would.

    Raises:
        SchemeError: the file format has no word for a scheme.
    """
    found = []
    for part in transformers_models(model):
        simulated = any(layer.mode is Mode.SIMULATED for _, layer in quant_linears(part))
        if any(quant_layers(part)) and not simulated:
            found.append((part, to_json(describe(part))))
    return found


def inscribe(inscribed: list[tuple[Pretrained, dict[str, object]]]) -> None:
    """Put the descriptions into the models' configs, which are changed."""
    for part, told in inscribed:
        part.config.quantization_config = told
        remember(part)


def transformers_models(model: nn.Module) -> list[Pretrained]:
    """The model itself, where it is one of transformers; else those that it holds and that are in no other of them."""
    if is_pretrained(model):  # not by a `config`: modules around a model hand out that of the model
        return [model]
    return [found for child in model.children() for found in transformers_models(child)]


def write_description(model: Pretrained, directory: str | os.PathLike[str]) -> None:
    """Have the config.json of a directory say what is quantised in the model that was, or is being, saved there.

    The model's own config is not modified, the names that its files get may be.
    """
    told = to_json(describe(model))
    check_storable(model)
    remember(model)
    path = Path(directory) / "config.json"
    config = _without_descriptions(json.loads(path.read_text(encoding="utf-8"))) | {"quantization_config": told}
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _without_descriptions(config: dict[str, object]) -> dict[str, object]:
    """Neither its own nor that of a part, which was quantised before it had this place."""
    inner = {key: _without_descriptions(value) if isinstance(value, dict) else value for key, value in config.items()}
    return {key: value for key, value in inner.items() if key != "quantization_config"}


Saving.describe = staticmethod(write_description)
