"""A directory that was just written, looked at as a reader would.

`verify_structure` reads config.json and the headers: every tensor that the quantised model has is in the files, once,
in its shape and dtype, and nothing else is.  `verify_values` compares the values as well, with the model that was
saved.
"""

from pathlib import Path

import torch
from torch import Tensor

from w8a8.checkpoint.directory import Directory
from w8a8.checkpoint.files import mapped
from w8a8.checkpoint.names import FileNames
from w8a8.checkpoint.skeleton import empty_model, saved
from w8a8.errors import CheckpointError
from w8a8.model.pretrained import Pretrained


def verify_structure(directory: Path | Directory, like: Pretrained | None = None) -> None:
    """Raise `CheckpointError` where the files do not hold what config.json says.

    Reads no values, so it takes milliseconds for a model of any size.

    Args:
        like: The model that was; without it, the class is the one that config.json names.
    """
    written = Directory.of(directory)
    for path, promised in written.promised.items():
        odd = set() if promised is None else promised ^ written.files[path].keys()
        if odd:
            raise CheckpointError(f"{path}: {min(odd)} is in the index or in the file, and not in both")
    model = empty_model(written, like=like, simulated=True)
    found = FileNames(model).placed(written.entries)
    wanted = saved(model)
    for aliases, tensor in wanted:
        name = next((name for name in aliases if name in found), None)
        if name is None:
            raise CheckpointError(f"{written.path}: {aliases[0]} was not written")
        entry = found[name]
        quantized = not tensor.is_floating_point()
        if entry.shape != tuple(tensor.shape) or (quantized and entry.dtype is not tensor.dtype):
            raise CheckpointError(
                f"{entry.file}: {name} is {entry.dtype} of shape {entry.shape}, the model has {tensor.dtype} of shape "
                f"{tuple(tensor.shape)}"
            )
    extra = set(found) - {name for aliases, _ in wanted for name in aliases}
    if extra:
        raise CheckpointError(f"{written.path}: {min(extra)} was written, and the model has no such tensor")


def verify_values(directory: Path, model: Pretrained) -> None:
    """Raise `CheckpointError` where the files, which are read, do not hold the very values of a model."""
    written = Directory.of(directory)
    verify_structure(written, model)
    held = model.state_dict()
    for name, entry in FileNames(model).placed(written.entries).items():
        if not _same(mapped(entry), held[name]):
            raise CheckpointError(f"{entry.where} was written, and is not what the model holds")


def _same(written: Tensor, held: Tensor) -> bool:
    """Equal to the bit, NaNs and all."""
    held = held.detach().cpu().contiguous()
    return (
        written.dtype is held.dtype
        and written.shape == held.shape
        and torch.equal(written.reshape(-1).view(torch.uint8), held.reshape(-1).view(torch.uint8))
    )
