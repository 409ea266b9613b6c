"""The files of a model's directory: parsed, and checked to be whole.  Nothing is executed.

Tensors are seen through memory mappings.  `opened` gives a file of safetensors' own, one mapping for the whole file;
`mapped` gives one tensor a mapping of its own, which goes when the tensor goes.  That is what a weight needs that is
packed while loading: a mapping of the whole file would keep the pages of every weight resident beside the packed ones.
"""

import contextlib
import json
import mmap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from w8a8.checkpoint.headers import Entry, read_header, twice
from w8a8.errors import CheckpointError

CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
WEIGHTS = (
    *(".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".ot", ".npz", ".gguf", ".ggml"),
    *(".onnx", ".onnx_data", ".onnx.data", ".tflite", ".mlmodel", ".index.json"),
)
"""What the names of files with weights, and of their indices, end with."""
MAX_JSON = 100 << 20
"""Bytes of a JSON file; the index of a model with a million tensors has about as many."""


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; `CheckpointError` where it cannot be read, is absurdly large, or has a key twice."""
    try:
        size = path.stat().st_size
        if size > MAX_JSON:
            raise ValueError(f"it has {size:,} bytes, the limit is {MAX_JSON:,}")
        data = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_each_once)
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} holds a {type(data).__name__}, expected an object")
    return data


def _each_once(pairs: list[tuple[str, object]]) -> dict[str, object]:
    if name := twice(pairs):
        raise ValueError(f"{name!r} is there twice")
    return dict(pairs)


def inside(directory: Path, path: Path) -> Path:
    """The path, which does not lead out of the directory; of a hub's snapshot not out of its repository's folder.

    Raises:
        CheckpointError: it does.
    """
    root, real = directory.resolve(), path.resolve()
    if root.parent.name == "snapshots":  # its files are links to ../../blobs
        root = root.parent.parent
    if not real.is_relative_to(root):
        raise CheckpointError(
            f"{path} is a link to {real}, outside {root}: it is not followed; put the file itself there"
        )
    return path


def header(path: Path, promised: set[str] | None) -> dict[str, Entry]:
    """The tensors of a file by name.

    Raises:
        CheckpointError: the file is torn or untruthful, or lacks a tensor that the index promises.
    """
    entries = read_header(path)
    missing = (promised or set()) - set(entries)
    if missing:
        raise CheckpointError(f"{path}: {min(missing)} is missing, though the index says it is here")
    return entries


def mapped(entry: Entry) -> Tensor:
    """One tensor in a mapping of its own.

    Returns:
        The tensor, sharing pages with everybody who maps the file until it is written to.  When it is let go, so are
        the pages.
    """
    if not entry.bytes:
        return torch.empty(entry.shape, dtype=entry.dtype, device="cpu")
    start = entry.begin - entry.begin % mmap.ALLOCATIONGRANULARITY
    with entry.file.open("rb") as file:
        pages = mmap.mmap(file.fileno(), entry.end - start, access=mmap.ACCESS_COPY, offset=start)
    octets = torch.frombuffer(pages, dtype=torch.uint8, offset=entry.begin - start)
    if entry.begin % entry.dtype.itemsize:  # a file may put a tensor anywhere
        octets = octets.clone()
    return octets.view(entry.dtype).view(entry.shape)


@contextlib.contextmanager
def opened(path: Path) -> Iterator[Any]:
    """A file whose header was judged, mapped by safetensors; `CheckpointError` where that refuses it all the same."""
    from safetensors import SafetensorError, safe_open  # what opens no files needs no library for them

    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            yield file
    except SafetensorError as error:
        raise CheckpointError(
            f"{path} is torn or not a safetensors file ({path.stat().st_size:,} bytes): {error}; copy it again"
        ) from error
