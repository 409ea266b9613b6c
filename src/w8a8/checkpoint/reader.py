"""Load a model's directory: compressed-tensors runs in int8, a float model is loaded as transformers does it.

transformers decompresses the former to float.  Here the model is built without memory (parameters on
the meta device), what is quantised in it becomes an empty `QuantLinear` or `QuantEmbedding`, and the tensors are mapped
from the files: the weights are never float, and are in memory once.  Where they are packed for the native kernel, this
is done one by one, each from a mapping of its own that is dropped before the next.

Everything is checked before it is used: the index points into the directory, the files are whole, each
tensor has the shape and dtype that the config promises, none is missing and none is left over.
"""

import logging
import os
from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from w8a8 import kernels
from w8a8.checkpoint.architecture import LOADING_ERRORS
from w8a8.checkpoint.describe import inscribe, inscription
from w8a8.checkpoint.directory import Directory
from w8a8.checkpoint.files import CONFIG, GENERATION_CONFIG, mapped, opened
from w8a8.checkpoint.names import FileNames
from w8a8.checkpoint.skeleton import check_size, empty_layers
from w8a8.core.affine import described
from w8a8.core.packed import SHAPE, WORDS, unpack_rows, words
from w8a8.core.scheme import PerGroup, PerTensor, Scheme
from w8a8.defaults import usual_defaults
from w8a8.errors import CheckpointError, ModelError, few
from w8a8.layers.buffers import QuantLayer, quant_layers
from w8a8.layers.embedding import share_codes
from w8a8.model.choice import Choice
from w8a8.model.pretrained import Pretrained
from w8a8.model.roles import Embeddings, Head
from w8a8.model.roles import heads as heads_of
from w8a8.model.swapping import build
from w8a8.model.tables import quantize_tables, tables_of

_LOG = logging.getLogger(__name__)
_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_SCALES = ("weight_scale", "input_scale")
_DERIVED = (".weight_sum", ".packed_weight")
_ZERO_POINTS = ("weight_zero_point", "input_zero_point")
_CODES = ("weight", WORDS)
QUANTIZED = (*_SCALES, *_ZERO_POINTS)
"""Beside a weight, what only a quantised layer has."""


def load(
    source: str | os.PathLike[str] | Directory,
    *,
    head: str = "float",
    embeddings: str = "float",
    simulated: bool = False,
    kernel: str = kernels.AUTO,
    strict: bool = False,
    trust_remote_code: bool = False,
) -> Pretrained:
    """A model from a directory: a compressed-tensors one runs in int8, a float one is a float model.

    Args:
        source: A local directory, or the id of a repository on the Hugging Face hub; or one that is open.
        head: "int8" quantises the output head as it is loaded, in the scheme of the file's first group, whatever the
            file holds; a tied head becomes a copy of its own.  Where that scheme is static its activations are
            dynamic here, since the head's input was never measured.  "float" leaves it as the file has it.
        embeddings: "int8" quantises the lookup tables that the file has in float, as `w8a8.quantize` does.
        simulated, kernel, strict: As for `QuantLinear`; a float model has none.
        trust_remote_code: Run Python code from the repository where transformers has no class for the model.  Never
            without it.

    Returns:
        The transformers model of the directory's architecture, in evaluation mode.  Tensors are mapped from the
        files, which must stay; where the native kernel runs, it packs the int8 weights as it reads them, once.
        Float tensors have the dtype of the file.

    Raises:
        CheckpointError: the directory is missing, torn, untruthful or needs code of its own; file and tensor are
            named.
        ModelError: `head` or `embeddings` is neither "float" nor "int8", or int8 for a float model or without a table.
        SchemeError: a scheme that integers cannot run, and `simulated` is not asked for.
    """
    wanted, tables = Head.of(head), Embeddings.of(embeddings)
    directory = Directory.of(source, trust_remote_code=trust_remote_code)
    if directory.quantization is None:
        for asked in (wanted, tables):
            if asked.value == Head.INT8.value:
                what = type(asked).__name__.lower()
                raise ModelError(
                    f"{what}='int8' was asked for, but {directory.path} holds a float model; quantise it first"
                )
        return load_float(directory)
    check_size(directory)
    with torch.inference_mode(False):  # where a model is loaded says nothing of where it is used
        model, packed = empty_layers(directory, simulated=simulated, kernel=kernel, strict=strict)
        _fill(model, directory, packed)
        share_codes(model)
        if wanted is Head.INT8:
            scheme = directory.quantization.groups[0].scheme
            quantize_heads(model, scheme, simulated=simulated, kernel=kernel, strict=strict)
        quantize_missing_tables(model, tables)
    model.config.__dict__.pop("quantization_config", None)
    inscribe(inscription(model))
    generation = directory.path / GENERATION_CONFIG
    if generation.exists():
        try:
            model.generation_config = transformers.GenerationConfig.from_pretrained(directory.path)
        except LOADING_ERRORS as error:
            raise CheckpointError(f"{generation}: transformers cannot read it: {error}") from error
    model.eval()
    return model


def load_float(directory: Directory, *, dtype: torch.dtype | str = "auto") -> Pretrained:
    """The float model of a directory, in evaluation mode, all of whose weights are in its safetensors files.

    Args:
        dtype: Of the result; "auto" is the file's.

    Raises:
        CheckpointError: the files are missing, torn or untruthful, or the model needs code of its own.
        ModelError: transformers cannot open it; weights are missing, left over, or of another shape.
    """
    check_size(directory)
    kind, _ = directory.architecture
    try:
        with torch.inference_mode(False), usual_defaults():
            loaded: Any = kind.from_pretrained(
                directory.path,
                dtype=dtype,
                use_safetensors=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # told of below, shorter
                trust_remote_code=directory.trust_remote_code,
            )
    except LOADING_ERRORS as error:
        raise ModelError(f"{directory.path}: transformers cannot open it: {error}") from error
    model: Pretrained
    model, told = loaded
    for key, what in (
        ("missing_keys", "are not in the files and would be random"),
        ("mismatched_keys", "have another shape in the files"),
        ("unexpected_keys", "are in the files and have no place"),
    ):
        keys = sorted(str(name) for name in told[key])
        if keys:
            raise ModelError(
                f"{directory.path}: {len(keys)} weights of {kind.__name__} {what}: {few(keys)}; copy it again"
            )
    names = FileNames(model)
    tell_unwanted(names.model, [name for name in directory.entries if names.unwanted(names.in_model(name))])
    model.eval()
    return model


def quantize_heads(model: nn.Module, scheme: Scheme, **options: Any) -> None:
    """Quantise the float heads of a model of which a file has the rest in int8; none where the file's own are.

    The scheme is the file's; where that is static, activations are measured as they come.  Options are `QuantLinear`'s.
    """
    if names := heads_of(model):
        if scheme.activations is not None:
            scheme = replace(scheme, activations=replace(scheme.activations, dynamic=True))
        choice = Choice.of(model, scheme, names)
        choice.enact(build(model, choice.schemes, **options))


def quantize_missing_tables(model: nn.Module, asked: Embeddings) -> None:
    """Quantise the float tables of a model of which a file has the rest in int8; none where all of them are.

    Raises:
        ModelError: there are float tables, and none of them can be int8.
    """
    if tables_of(model):
        quantize_tables(model, asked)


def _fill(model: Pretrained, directory: Directory, packed: set[str]) -> None:
    """Map every tensor into its place, then see that none is missing.

    Args:
        packed: The layers whose weights the files have in words.
    """
    modules = dict(model.named_modules())
    wanted = set(model.state_dict())
    stored = {name: stored_keys(layer, packed=name in packed) for name, layer in quant_layers(model)}
    names = FileNames(model)
    found = names.placed(directory.entries)
    unwanted: list[str] = []
    for path, of_file in groupby(found.items(), key=lambda each: each[1].file):
        with opened(path) as file:
            for name, entry in sorted(of_file, key=lambda each: each[1].name):
                prefix, _, key = name.rpartition(".")
                module = modules.get(prefix)
                if key in stored.get(prefix, ()):
                    read = mapped(entry) if key in _CODES else file.get_tensor(entry.name)
                    place_tensor(modules[prefix], key, read, entry.where, packed=prefix in packed)
                elif name in wanted and (prefix not in stored or key == "bias"):
                    _place(modules[prefix], key, file.get_tensor(entry.name), entry.where)
                else:
                    check_superfluous(names, module, name, file.get_tensor(entry.name), entry.where)
                    unwanted += [entry.name] if names.unwanted(name) else []
    tell_unwanted(names.model, unwanted)
    model.tie_weights(missing_keys=wanted - found.keys(), recompute_mapping=False)  # not what the files have twice
    tensors = [*model.named_parameters(), *model.named_buffers()]
    missing = [name for name, t in tensors if t.is_meta and not name.endswith(_DERIVED)]
    missing = [f"{name}_packed" if name.removesuffix(".weight") in packed else name for name in missing]
    if missing:
        raise CheckpointError(
            f"{', '.join(map(str, directory.files))}: {len(missing)} tensors are missing: {few(missing, 4)}"
        )


def tell_unwanted(model: str, tensors: Sequence[str]) -> None:
    """Say in the log which tensors of the files a model's class does without, if any."""
    if tensors:
        what = "tensor" if len(tensors) == 1 else "tensors"
        _LOG.warning("%s does without %d %s: %s", model, len(tensors), what, few(tensors, 4))


def stored_keys(layer: QuantLayer, *, packed: bool) -> set[str]:
    """What a file holds of an empty layer beside its bias, for `place_tensor`."""
    keys = set(layer.state_dict()) - {"bias", "weight", WORDS, SHAPE}
    return keys | ({WORDS, SHAPE} if packed else {"weight"})


def place_tensor(layer: QuantLayer, key: str, tensor: Tensor, where: str, *, packed: bool = False) -> None:
    """Check one tensor of a file and put it into its layer, which packs codes for the kernel or keeps them.

    Args:
        layer: A linear layer or a table, empty or filled in part; changed.
        key: One of `stored_keys`.
        tensor: On any device; kept where nothing has to be converted.

    Raises:
        CheckpointError: it is not what the layer holds, or makes no sense.
    """
    n, k, spec = layer.out_features, layer.in_features, layer.scheme.weights
    if packed and key == WORDS:
        _check_words(tensor, (n, words(k, spec.bits)), where)
        layer.take("weight", unpack_rows(tensor, spec.bits, k))
    elif packed and key == SHAPE:
        if tensor.is_floating_point() or tensor.tolist() != [n, k]:
            raise CheckpointError(f"{where} is {str(tensor.tolist())[:80]}, expected {[n, k]}")
    elif packed and key == "weight_zero_point" and not isinstance(spec.granularity, PerTensor):  # words run along N
        _check_words(tensor, (words(n, spec.bits), layer.weight_scale.shape[1]), where)
        codes = unpack_rows(tensor.t().contiguous(), spec.bits, n).t().contiguous()
        layer.take(key, _checked_tensor(layer, key, codes, where))
    else:
        layer.take(key, _checked_tensor(layer, key, tensor, where))


def _check_words(tensor: Tensor, shape: tuple[int, ...], where: str) -> None:
    if tensor.dtype is not torch.int32 or tensor.shape != shape:
        raise CheckpointError(f"{where} is {described(tensor)}, expected int32 of shape {shape}")


def _place(module: nn.Module, key: str, tensor: Tensor, where: str) -> None:
    """Check one tensor of the file and put it into the model: floats in the file's dtype, others in the model's."""
    want = getattr(module, key)
    floats = want.dtype in _FLOATS
    if tensor.shape != want.shape or not (tensor.dtype in _FLOATS if floats else tensor.dtype is want.dtype):
        kind = "float values" if floats else str(want.dtype).removeprefix("torch.")
        raise CheckpointError(f"{where} is {described(tensor)}, expected {kind} of shape {tuple(want.shape)}")
    if key in module._parameters:
        module._parameters[key] = nn.Parameter(tensor, requires_grad=want.requires_grad)
    else:
        module._buffers[key] = tensor


def _checked_tensor(layer: QuantLayer, key: str, tensor: Tensor, where: str) -> Tensor:
    """A tensor of a quantised layer in the shape and dtype that the layer holds."""
    want = getattr(layer, key)
    if key == "weight":
        if tensor.dtype is not torch.int8 or tensor.shape != want.shape:
            raise CheckpointError(f"{where} is {described(tensor)}, expected int8 of shape {tuple(want.shape)}")
        return tensor
    # (N,) and (1, 1) are written too; groups have one order only
    loose = key.startswith("input") or not isinstance(layer.scheme.weights.granularity, PerGroup)
    if tensor.shape != want.shape and not (loose and tensor.numel() == want.numel()):
        raise CheckpointError(f"{where} is {described(tensor)}, expected shape {tuple(want.shape)}")
    if key in _ZERO_POINTS:
        if tensor.is_floating_point() or tensor.is_complex():
            raise CheckpointError(f"{where} is {described(tensor)}, expected an integer zero point")
        spec = layer.scheme.weights if key == "weight_zero_point" else layer.scheme.activations
        assert spec is not None, "activations without a grid have no zero point"
        if bool(((tensor < spec.qmin) | (tensor > spec.qmax)).any()):
            raise CheckpointError(f"{where} holds a zero point outside {spec.qmin}..{spec.qmax}")
        return tensor.to(torch.int32).reshape(want.shape)
    if not tensor.is_floating_point():
        raise CheckpointError(f"{where} is {described(tensor)}, expected a float scale")
    scale = tensor.to(torch.float32).reshape(want.shape)
    if not bool((torch.isfinite(scale) & (scale > 0)).all()):
        raise CheckpointError(f"{where} holds a scale that is not positive and finite")
    return scale


def check_superfluous(names: FileNames, module: nn.Module | None, name: str, tensor: Tensor, where: str) -> None:
    """Raise `CheckpointError` where a tensor of the files that the model has no place for would change something.

    Args:
        module: Of the model, with the tensor's name up to the last dot, where it has one.
        name: Of the tensor, from `FileNames.in_model`.
        tensor: Looked at where it is a zero point.
    """
    key = name.rpartition(".")[2]
    if isinstance(module, QuantLayer) and key in _ZERO_POINTS:  # a symmetric layer's zeros, as older files have
        if bool(tensor.any()):
            raise CheckpointError(f"{where} is not zero, though {CONFIG} says that the layer is symmetric")
        return
    if key in QUANTIZED and isinstance(module, nn.Linear | nn.Embedding):
        raise CheckpointError(f"{where} belongs to a layer that is float by {CONFIG}")
    if not names.ignored(name):
        raise CheckpointError(f"{where} has no place in {names.model}")
