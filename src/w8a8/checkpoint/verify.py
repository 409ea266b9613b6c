"""A directory that was just written, looked at as a reader would.

`verify_structure` reads config.json and the headers: every tensor that the quantised model has is in the files, once,
in its shape and dtype, and nothing else is.  `verify_values` compares the values as well, with the model that was
saved.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from w8a8.checkpoint.files import opened, read_quantization, tensor_files
from w8a8.checkpoint.headers import Entry, read_header
from w8a8.checkpoint.names import FileNames
from w8a8.checkpoint.skeleton import empty_model, not_saved
from w8a8.errors import CheckpointError


def verify_structure(directory: Path, like: Any = None) -> None:
    """Raise `CheckpointError` where the files do not hold what config.json says.

    Reads no values, so it takes milliseconds for a model of any size.

    Args:
        directory: What was written.
        like: The model that was; without it, the class is the one that config.json names.
    """
    model = empty_model(directory, read_quantization(directory), like=like, simulated=True)
    names = FileNames(model)
    found: dict[str, tuple[Path, Entry]] = {}
    for path, promised in tensor_files(directory).items():
        header = read_header(path)
        if promised is not None and promised != set(header):
            odd = min(promised ^ set(header))
            raise CheckpointError(f"{path}: {odd} is in the index or in the file, and not in both")
        found |= {names.in_model(name): (path, entry) for name, entry in header.items()}
    wanted = _once(model)
    for aliases, tensor in wanted:
        name = next((name for name in aliases if name in found), None)
        if name is None:
            raise CheckpointError(f"{directory}: {aliases[0]} was not written")
        path, entry = found[name]
        quantized = not tensor.is_floating_point()
        if entry.shape != tuple(tensor.shape) or (quantized and entry.dtype is not tensor.dtype):
            raise CheckpointError(
                f"{path}: {name} is {entry.dtype} of shape {entry.shape}, the model has {tensor.dtype} of shape "
                f"{tuple(tensor.shape)}"
            )
    extra = set(found) - {name for aliases, _ in wanted for name in aliases}
    if extra:
        raise CheckpointError(f"{directory}: {min(extra)} was written, and the model has no such tensor")


def verify_values(directory: Path, model: nn.Module) -> None:
    """Raise `CheckpointError` where the files do not hold the very values of a model.

    Costs a read of the files.

    Args:
        directory: What was written.
        model: Quantised.  Not modified.
    """
    verify_structure(directory, model)
    held, names = model.state_dict(), FileNames(model)
    for path, promised in tensor_files(directory).items():
        with opened(path, promised) as file:
            for name in file.keys():  # noqa: SIM118 - not a dict
                if not _same(file.get_tensor(name), held[names.in_model(name)]):
                    raise CheckpointError(f"{path}: {name} was written, and is not what the model holds")


def _same(written: Tensor, held: Tensor) -> bool:
    """Equal to the bit, NaNs and all."""
    held = held.detach().cpu().contiguous()
    return (
        written.dtype is held.dtype
        and written.shape == held.shape
        and torch.equal(written.reshape(-1).view(torch.uint8), held.reshape(-1).view(torch.uint8))
    )


def _once(model: nn.Module) -> list[tuple[list[str], Tensor]]:
    """Each tensor of the state dict with all its names: a tied one has several, and is written under one or more."""
    by_tensor: dict[int, tuple[list[str], Tensor]] = {}
    left_out = not_saved(model)
    for name, tensor in model.state_dict(keep_vars=True).items():
        if name in left_out:
            continue
        by_tensor.setdefault(id(tensor), ([], tensor))[0].append(name)
    return list(by_tensor.values())
