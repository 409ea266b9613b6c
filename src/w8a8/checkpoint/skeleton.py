"""The model of a directory without its values: the class that config.json names, on the meta device.

The sizes in a config are believed only as far as the files bear them out (`check_size`): a model cannot have more
layers than its files have tensors, nor a shape that they do not have.  Modules are built on the meta device first,
where no size costs memory, and compared; then again with real buffers, as they hold values that no file has.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers.initialization import no_init_weights

from w8a8.checkpoint.architecture import LOADING_ERRORS
from w8a8.checkpoint.directory import Directory
from w8a8.checkpoint.files import CONFIG
from w8a8.checkpoint.headers import Entry
from w8a8.checkpoint.layout import QuantizationConfig
from w8a8.checkpoint.names import FileNames
from w8a8.core.affine import described
from w8a8.defaults import usual_defaults
from w8a8.errors import CheckpointError, SchemeError, noted
from w8a8.layers.buffers import QuantLayer
from w8a8.layers.linear import is_linear
from w8a8.model import ties
from w8a8.model.experts import Experts, unstacked, usual_names
from w8a8.model.obstacles import obstacles
from w8a8.model.pretrained import Pretrained
from w8a8.model.swapping import empty_layer, swap, swapped
from w8a8.model.tables import tables_of
from w8a8.model.usage import look

_COUNT = re.compile(r"(\w+_)?(layers?|experts|blocks|depth)")


def empty_model(directory: Directory, **options: Any) -> Pretrained:
    """The model of the directory without its values: parameters on the meta device, quantised layers in place.

    Args:
        options: `like`, a model whose class and whose config's class are taken instead of those that config.json
            names; others as for `QuantLinear`.

    Raises:
        CheckpointError: config.json names no architecture that transformers has, or targets that match nothing.
        SchemeError: a scheme that integers cannot run, and `simulated` is not asked for.
    """
    return empty_layers(directory, **options)[0]


def empty_layers(
    directory: Directory, *, like: Pretrained | None = None, **options: Any
) -> tuple[Pretrained, set[str]]:
    """`empty_model`, and the names of the layers whose weights the files have in words."""
    if directory.quantization is not None:
        check_counts(directory)
    if like is None:
        kind, config = directory.architecture
    else:  # it was written from this very config
        kind, config = type(like), type(like.config).from_pretrained(directory.path)
    try:
        with usual_defaults():  # buffers have values, whatever the device that models are made on
            # values of the parameters come from the files; those of the rest are filled in below
            with no_init_weights(), init_empty_weights(include_buffers=False):
                model = kind._from_config(config)  # in the dtype that the config states
            _fill_what_no_file_holds(model)
            _widen(model)
        model.tie_weights()
    except LOADING_ERRORS as error:
        raise CheckpointError(f"{directory.config_file}: {kind.__name__} cannot be made of it: {error}") from error
    if directory.quantization is None:
        return model, set()
    swap(model, as_stored(model, directory.entries))
    where = str(directory.config_file)
    return model, insert_quant_linears(model, directory.quantization, where, directory.entries, **options)


@torch.no_grad()
def _fill_what_no_file_holds(model: Pretrained) -> None:
    """Give what the model makes itself the values that it has after transformers' own loading.

    These are buffers that are not saved, and parameters that the class leaves out when it is (Marian's positions).  A
    class makes them where it initialises weights, which `from_pretrained` has done under the default dtype: positions
    that are computed in bfloat16 are others.  Weights on the meta device are said to be done, as random numbers for
    them take time even where they are not computed.
    """
    for name in not_saved(model):
        path, _, key = name.rpartition(".")
        module = model.get_submodule(path)
        held = module._parameters.get(key)
        if held is not None:
            module._parameters[key] = nn.Parameter(torch.zeros_like(held, device="cpu"), held.requires_grad)
    for module in model.modules():
        module.__dict__.pop("_is_hf_initialized", None)
    for parameter in model.parameters():
        parameter._is_hf_initialized = parameter.is_meta  # type: ignore[attr-defined]
    model.initialize_weights()
    for parameter in model.parameters():
        del parameter._is_hf_initialized  # type: ignore[attr-defined]


def _widen(model: Pretrained) -> None:
    """Have what the model's class keeps in float32 in that, as transformers' own loading does; buffers too."""
    stated = getattr(model.config, "dtype", None)
    plan = {} if stated is None else model._get_dtype_plan(stated)
    kept = {re.compile(pattern.replace("*", ".*")): dtype for pattern, dtype in plan.items()}
    for name, tensor in list(_tensors(model)):
        dtype = next((dtype for pattern, dtype in kept.items() if pattern.search(name)), tensor.dtype)
        if dtype is tensor.dtype or not tensor.is_floating_point():
            continue
        path, _, key = name.rpartition(".")
        module = model.get_submodule(path)
        if isinstance(tensor, nn.Parameter):
            module._parameters[key] = nn.Parameter(tensor.to(dtype), tensor.requires_grad)
        else:
            module._buffers[key] = tensor.to(dtype)


def not_saved(model: nn.Module) -> set[str]:
    """The tensors that the model's class leaves out of its files, since it makes them itself."""
    left_out = set(getattr(model, "_keys_to_ignore_on_save", None) or ())
    return {name for name, _ in _tensors(model) if name in left_out}


def by_tensor(model: nn.Module) -> list[tuple[list[str], torch.Tensor]]:
    """Each tensor of the state dict with all its names: a tied one has several."""
    found: dict[int, tuple[list[str], torch.Tensor]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        found.setdefault(id(tensor), ([], tensor))[0].append(name)
    return list(found.values())


def saved(model: nn.Module) -> list[tuple[list[str], torch.Tensor]]:
    """The same of what the model's class has in its files, each under one of its names or more."""
    left_out = not_saved(model)
    kept = [([name for name in names if name not in left_out], tensor) for names, tensor in by_tensor(model)]
    return [(names, tensor) for names, tensor in kept if names]


def _tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def as_stored(model: nn.Module, stored: Iterable[str]) -> dict[str, Experts]:
    """Experts with layers of their own for the places of stacks that the files have so, by name."""
    stored = list(stored)
    found, _ = unstacked(model, at_most=len(stored))
    if not found:
        return {}
    layers: dict[str, set[str]] = {}  # of EXPERTS.NUMBER.LAYER.TENSOR, by the first part
    with swapped(model, found):
        names = FileNames(model)
        for name in stored:
            experts, *rest = names.in_model(name).rsplit(".", 3)
            layers.setdefault(experts, set()).update(rest[1:2])
    for name, module in found.items():
        if name in layers and layers[name] == set(usual_names(module.stacked)) != set(module.names):
            found[name] = Experts(model.get_submodule(name))  # as llm-compressor writes Mixtral with transformers 5
    return {name: module for name, module in found.items() if name in layers}


def check_size(directory: Directory) -> None:
    """Raise `CheckpointError` where config.json and the headers of the files tell of different models.

    Takes no memory, whatever sizes are told.  A float model may have integers in its buffers only: transformers would
    convert the others without a word.
    """
    check_counts(directory)
    kind, config = directory.architecture
    try:
        with usual_defaults(), torch.device("meta"):
            model = kind._from_config(config)
    except LOADING_ERRORS as error:
        if "meta tensor" in str(error):  # a class that looks at values while it is made is compared later
            return
        raise CheckpointError(f"{directory.config_file}: {kind.__name__} cannot be made of it: {error}") from error
    if directory.quantization is None:
        _check_floats(model, directory.entries)
    for name, parameter in model.named_parameters():
        entry, wanted = directory.entries.get(name), tuple(parameter.shape)
        if entry is None:  # of another name in the files, or missing: told when they are read
            continue
        if entry.shape not in (wanted, wanted[::-1]):  # a quantised Conv1D is stored as a Linear
            raise CheckpointError(f"{entry.where} is {described(entry)}, expected shape {wanted} by {CONFIG}")


def check_counts(directory: Directory) -> None:
    """Raise `CheckpointError` where config.json tells of more layers, experts and so on than there can be.

    A model has no more of them than its files have tensors, or rows of one.  Asked before any of them is made.
    """
    most = max([len(directory.entries), *(size for entry in directory.entries.values() for size in entry.shape)])
    for key, value in _numbers(directory.config):
        limit = most if _COUNT.fullmatch(key) else 2**63 - 1
        if value > limit:
            where = directory.config_file
            raise CheckpointError(f"{where}: {key} is {value}, more than the files of this model can hold ({limit})")


def _check_floats(model: nn.Module, found: Mapping[str, Entry]) -> None:
    buffers, names = {name for name, _ in model.named_buffers()}, FileNames(model)
    for name, entry in found.items():
        place = names.in_model(name)
        if not (entry.dtype.is_floating_point or place in buffers or names.ignored(place)):
            raise CheckpointError(f"{entry.where} is {described(entry)}, expected float values")


def _numbers(value: object, key: str = "") -> Iterator[tuple[str, int]]:
    """Every integer in a JSON value, with its key."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _numbers(inner, name)
    elif isinstance(value, list):
        for inner in value:
            yield from _numbers(inner, key)
    elif isinstance(value, int):
        yield key, value


def insert_quant_linears(
    model: nn.Module,
    quantization: QuantizationConfig,
    where: str,
    stored: Iterable[str],
    *,
    of_another: bool = False,
    **options: Any,
) -> set[str]:
    """Put empty layers in the places of the linear layers and the tables that are quantised.

    Args:
        model: Float, on the meta device; changed.
        stored: The names of the tensors in the files, which may be those of the model's base, or of a task model.
        of_another: The files were written by a model of another class: layers of which they hold nothing stay float.
        options: As for `QuantLinear`.

    Returns:
        The names of the layers whose weights the files have in words.

    Raises:
        CheckpointError: the targets match no layer, or cannot be matched; or a table that has to stay float.
        SchemeError: a scheme that integers cannot run, and `simulated` is not asked for.
    """
    names, stored = FileNames(model), set(stored)
    held = names.layers_of(stored)
    # an expression may be meant for layers and match a table too, of which there is no scale
    tables = {name: table for name, table in tables_of(model).items() if f"{held.get(name)}.weight_scale" in stored}
    linears = {name: m for name, m in model.named_modules() if is_linear(m) or name in tables}
    classes = {
        name: [cls.__name__ for cls in type(m).__mro__ if issubclass(cls, nn.Module)] for name, m in linears.items()
    }
    in_files = {name: held.get(name, names.of_layer(name)) for name in linears}  # a tied head lies nowhere
    groups = quantization.groups_for(classes, where, in_files)
    if of_another:
        groups = {name: group for name, group in groups.items() if name in held}
    layers: dict[str, QuantLayer] = {}
    for name, group in groups.items():
        with noted(f"while loading {name}, quantised by {where}; simulated=True runs every scheme", SchemeError):
            layers[name] = empty_layer(model, name, group.scheme, **options)
    quantized = {name: table for name, table in tables.items() if name in groups}
    for name, why in obstacles(model, quantized, look(model)).items() if quantized else ():
        raise CheckpointError(
            f"{where}: {name} is quantised, and cannot be looked up in int8 here: {why}; transformers opens the "
            "directory, in float"
        )
    if not groups:
        raise CheckpointError(f"{where}: the targets of quantization_config match no linear layer and no table")
    swap(model, layers)
    ties.forget(model, groups)
    return {name for name, group in groups.items() if group.packed}
