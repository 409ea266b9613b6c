"""Load a compressed-tensors directory and run it in int8.

transformers decompresses such a directory to float.  Here the model is built without memory (parameters on
the meta device), its linear layers become empty `QuantLinear`, and the tensors are mapped from the files: the
weights are never float, and never copied but for the native kernel, which packs them as it reads them.

Everything is checked before it is used: the index points into the directory, the files are whole, each
tensor has the shape and dtype that the config promises, none is missing and none is left over.
"""

import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import init_empty_weights
from torch import Tensor, nn

from w8a8 import convert, kernels
from w8a8.checkpoint.describe import inscribe
from w8a8.checkpoint.files import CONFIG, GENERATION_CONFIG, opened, read_quantization, resolve, tensor_files
from w8a8.checkpoint.layout import QuantizationConfig
from w8a8.errors import CheckpointError, ModelError, SchemeError
from w8a8.linear import QuantLinear, is_conv1d, quant_linears
from w8a8.scheme import PerGroup, Scheme

_SCALES = ("weight_scale", "input_scale")
_DERIVED = (".weight_sum", ".packed_weight")
_ZERO_POINTS = ("weight_zero_point", "input_zero_point")


def load(
    source: str | os.PathLike[str],
    *,
    head: str = "float",
    simulated: bool = False,
    kernel: str = kernels.AUTO,
    strict: bool = False,
) -> Any:
    """A model from a compressed-tensors directory, running in int8.

    Args:
        source: A local directory, or the id of a repository on the Hugging Face hub.
        head: "int8" quantises the output head as it is loaded, in the scheme of the file's first group, whatever the
            file holds; a tied head becomes a copy of its own.  Where that scheme is static its activations are
            dynamic here, since the head's input was never measured.  "float" leaves it as the file has it.
        simulated, kernel, strict: As for `QuantLinear`.

    Returns:
        The transformers model of the directory's architecture, in evaluation mode.  Tensors are mapped from the
        files, which must stay; where the native kernel runs, it packs the int8 weights as it reads them, once.
        Float tensors have the dtype of the file.

    Raises:
        CheckpointError: the directory is missing, not quantised, torn or untruthful; file and tensor are
            named.
        ModelError: `head` is neither "float" nor "int8".
        SchemeError: a scheme that integers cannot run, and `simulated` is not asked for.
    """
    if head not in ("float", "int8"):
        raise ModelError(f"head={head!r} is unknown; use 'float' or 'int8'")
    directory = resolve(source)
    quantization = read_quantization(directory)
    if quantization is None:
        raise CheckpointError(
            f"{directory / CONFIG} has no quantization_config: this is a float model; "
            "load it with transformers and call w8a8.quantize"
        )
    files = tensor_files(directory)
    model = empty_model(directory, quantization, simulated=simulated, kernel=kernel, strict=strict)
    _fill(model, files)
    if head == "int8" and convert.heads(model):  # none where the file's own head is int8
        selection = convert.select(model, convert.heads(model))
        scheme = _measured_as_it_comes(quantization.groups[0].scheme)
        convert.swap(model, convert.build(model, selection, scheme, simulated=simulated, kernel=kernel, strict=strict))
        convert.untie(model, selection)
    model.config.__dict__.pop("quantization_config", None)
    inscribe(model)
    if (directory / GENERATION_CONFIG).exists():
        model.generation_config = transformers.GenerationConfig.from_pretrained(directory)
    return model.eval()


def _measured_as_it_comes(scheme: Scheme) -> Scheme:
    """The scheme with dynamic activations."""
    if scheme.activations is None:
        return scheme
    return replace(scheme, activations=replace(scheme.activations, dynamic=True))


def architecture(directory: Path) -> tuple[Any, Any]:
    """The model class that config.json names, and the config.

    Raises:
        CheckpointError: config.json is not one that transformers reads, or names no class that it has.
    """
    try:
        config = transformers.AutoConfig.from_pretrained(directory)
    except (ValueError, OSError, KeyError) as error:
        raise CheckpointError(f"{directory / CONFIG}: transformers cannot read it: {error}") from error
    names = config.architectures or []
    kind = next((getattr(transformers, name) for name in names if hasattr(transformers, name)), None)
    if kind is None:
        raise CheckpointError(
            f"{directory / CONFIG}: architectures is {names}, transformers {transformers.__version__} has none of them"
        )
    return kind, config


def empty_model(directory: Path, quantization: QuantizationConfig | None, **options: Any) -> Any:
    """The model of the directory without its values: parameters on the meta device, `QuantLinear` in place.

    Raises:
        CheckpointError: config.json names no architecture that transformers has, or targets that match nothing.
        SchemeError: a scheme that integers cannot run, and `simulated` is not asked for.
    """
    kind, config = architecture(directory)
    with init_empty_weights(include_buffers=False):
        model = kind._from_config(config)  # in the dtype that the config states
    model.tie_weights()
    if quantization is not None:
        insert_quant_linears(model, quantization, str(directory / CONFIG), **options)
    return model


def insert_quant_linears(model: nn.Module, quantization: QuantizationConfig, where: str, **options: Any) -> None:
    """Put empty `QuantLinear` in the places of the linear layers that are quantised.

    Args:
        model: Float, on the meta device; changed.
        quantization: What is quantised, and how.
        where: The file that says so, for messages.
        options: As for `QuantLinear`.

    Raises:
        CheckpointError: the targets match no layer.
        SchemeError: a scheme that integers cannot run, and `simulated` is not asked for.
    """
    found = 0
    for name, linear in list(model.named_modules()):
        conv1d = is_conv1d(linear)
        if not isinstance(linear, nn.Linear) and not conv1d:
            continue
        scheme = quantization.scheme_for(name, type(linear).__name__)
        if scheme is None:
            continue
        k, n = linear.weight.shape if conv1d else reversed(linear.weight.shape)
        bias = None if linear.bias is None else linear.bias.dtype
        try:
            layer = QuantLinear(k, n, scheme, bias=bias, device="meta", was_conv1d=conv1d, **options)
        except SchemeError as error:
            error.add_note(f"while loading {name}, quantised by {where}; simulated=True runs every scheme")
            raise
        parent, _, key = name.rpartition(".")
        setattr(model.get_submodule(parent), key, layer)
        found += 1
    if not found:
        raise CheckpointError(f"{where}: the targets of quantization_config match no linear layer")


def _fill(model: Any, files: dict[Path, set[str] | None]) -> None:
    """Map every tensor into its place, then see that none is missing."""
    modules = dict(model.named_modules())
    wanted = set(model.state_dict())
    seen: dict[str, Path] = {}
    for path, promised in files.items():
        with opened(path, promised) as file:
            for name in sorted(file.keys()):
                if name in seen:
                    raise CheckpointError(f"{path}: {name} is in {seen[name].name} too: two values for one tensor")
                seen[name] = path
                prefix, _, key = name.rpartition(".")
                tensor = file.get_tensor(name)
                if name in wanted:
                    _place(modules[prefix], key, tensor, f"{path}: {name}")
                else:
                    _check_superfluous(model, modules.get(prefix), key, tensor, f"{path}: {name}")
    model.tie_weights()
    tensors = [*model.named_parameters(), *model.named_buffers()]
    missing = [name for name, t in tensors if t.is_meta and not name.endswith(_DERIVED)]
    if missing:
        raise CheckpointError(
            f"{', '.join(str(path) for path in files)}: {len(missing)} tensors are missing: "
            + ", ".join(missing[:4])
            + (", ..." if len(missing) > 4 else "")
        )
    for _, layer in quant_linears(model):
        layer.set_codes(layer.weight)


def _place(module: nn.Module, key: str, tensor: Tensor, where: str) -> None:
    """Check one tensor of the file and put it into the model."""
    if isinstance(module, QuantLinear) and key != "bias":
        module._buffers[key] = checked_tensor(module, key, tensor, where)
        return
    want = getattr(module, key)
    if tensor.shape != want.shape or not tensor.is_floating_point():
        raise CheckpointError(f"{where} is {_describe(tensor)}, expected float values of shape {tuple(want.shape)}")
    if key in module._parameters:
        module._parameters[key] = nn.Parameter(tensor)
    else:
        module._buffers[key] = tensor


def checked_tensor(layer: QuantLinear, key: str, tensor: Tensor, where: str) -> Tensor:
    """A tensor of a quantised layer in the shape and dtype that the layer holds."""
    want = getattr(layer, key)
    if key == "weight":
        if tensor.dtype is not torch.int8 or tensor.shape != want.shape:
            raise CheckpointError(f"{where} is {_describe(tensor)}, expected int8 of shape {tuple(want.shape)}")
        return tensor
    # (N,) and (1, 1) are written too; groups have one order only
    loose = key.startswith("input") or not isinstance(layer.scheme.weights.granularity, PerGroup)
    if tensor.shape != want.shape and not (loose and tensor.numel() == want.numel()):
        raise CheckpointError(f"{where} is {_describe(tensor)}, expected shape {tuple(want.shape)}")
    if key in _ZERO_POINTS:
        if tensor.is_floating_point() or tensor.is_complex():
            raise CheckpointError(f"{where} is {_describe(tensor)}, expected an integer zero point")
        spec = layer.scheme.weights if key == "weight_zero_point" else layer.scheme.activations
        assert spec is not None, "activations without a grid have no zero point"
        if bool(((tensor < spec.qmin) | (tensor > spec.qmax)).any()):
            raise CheckpointError(f"{where} holds a zero point outside {spec.qmin}..{spec.qmax}")
        return tensor.to(torch.int32).reshape(want.shape)
    if not tensor.is_floating_point():
        raise CheckpointError(f"{where} is {_describe(tensor)}, expected a float scale")
    scale = tensor.to(torch.float32).reshape(want.shape)
    if not bool((torch.isfinite(scale) & (scale > 0)).all()):
        raise CheckpointError(f"{where} holds a scale that is not positive and finite")
    return scale


def _check_superfluous(model: nn.Module, module: nn.Module | None, key: str, tensor: Tensor, where: str) -> None:
    """Accept what changes nothing, refuse the rest."""
    if isinstance(module, QuantLinear) and key in _ZERO_POINTS:  # a symmetric layer's zeros, as older files have
        if bool(tensor.any()):
            raise CheckpointError(f"{where} is not zero, though {CONFIG} says that the layer is symmetric")
        return
    if key in (*_SCALES, *_ZERO_POINTS) and isinstance(module, nn.Linear):
        raise CheckpointError(f"{where} belongs to a layer that is float by {CONFIG}")
    ignored = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or []
    if key != "inv_freq" and not any(re.search(pattern, where) for pattern in ignored):
        raise CheckpointError(f"{where} has no place in {type(model).__name__}")


def _describe(t: Tensor) -> str:
    return f"{str(t.dtype).removeprefix('torch.')} of shape {tuple(t.shape)}"
