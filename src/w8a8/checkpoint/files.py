"""The files of a model's directory: found, parsed, and checked to be whole.  Nothing is executed.

Tensors are seen through memory mappings.  `opened` gives a file of safetensors' own, one mapping for the whole file;
`mapped` gives one tensor a mapping of its own, which goes when the tensor goes.  That is what a weight needs that is
packed while loading: a mapping of the whole file would keep the pages of every weight resident beside the packed ones.
"""

import contextlib
import json
import mmap
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from w8a8.checkpoint.headers import Entry, read_header
from w8a8.checkpoint.layout import QuantizationConfig, from_json
from w8a8.errors import CheckpointError

CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_OTHER_WEIGHTS = (
    *(".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".ot", ".npz", ".gguf", ".ggml"),
    *(".onnx", ".onnx_data", ".onnx.data", ".tflite", ".mlmodel", ".index.json"),
)
WEIGHTS = (".safetensors", *_OTHER_WEIGHTS)
"""What the names of files with weights, and of their indices, end with."""
_MAX_NAME = 255  # bytes, on the file systems there are
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
MAX_JSON = 100 << 20
"""Bytes of a JSON file; the index of a model with a million tensors has about as many."""


def resolve(source: str | os.PathLike[str], *, trust_remote_code: bool = False) -> Path:
    """The local directory of a model: itself, or the hub's files, downloaded or from the cache.

    Args:
        source: A directory or a hub id.
        trust_remote_code: Have the repository's Python files too.

    Raises:
        CheckpointError: no such directory, and no such repository within reach.
    """
    path = Path(source)
    if path.is_dir():
        if not (path / CONFIG).is_file():
            raise CheckpointError(f"{path} has no {CONFIG}: it is not a model's directory")
        inside(path, path / CONFIG)
        return path
    if path.exists():
        raise CheckpointError(f"{path} is a file; a model is a directory or a hub id")
    others = [f"*{end}" for end in _OTHER_WEIGHTS if end != ".index.json"]
    unwanted = others if trust_remote_code else [*others, "*.py"]
    try:
        found = Path(snapshot_download(str(source), ignore_patterns=unwanted))
    except (HFValidationError, LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise CheckpointError(
            f"{source}: there is no such directory, and the hub did not give it ({type(error).__name__}: "
            f"{str(error).splitlines()[0]}); check the path or the id"
        ) from error
    return resolve(found)


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        CheckpointError: the file cannot be read, is absurdly large or deep, has a key twice, or holds something else.
    """
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


def read_quantization(directory: Path) -> QuantizationConfig | None:
    """What config.json says of the quantisation; None for a float model.

    Raises:
        CheckpointError: config.json is not readable, or describes something unknown here.
    """
    config = read_json(directory / CONFIG)
    data = config.get("quantization_config", config.get("compression_config"))  # the second is the older name
    if data is None:
        return None
    if not isinstance(data, dict):
        raise CheckpointError(f"{directory / CONFIG}: quantization_config is {data!r}, expected an object")
    return from_json(data, str(directory / CONFIG))


def tensor_files(directory: Path) -> dict[Path, set[str] | None]:
    """The safetensors files, each with the tensors that the index promises (None where there is no index).

    Raises:
        CheckpointError: there are none; the index is torn, points outside the directory or to nothing.
    """
    index = directory / INDEX
    if (directory / SINGLE).exists():  # before the index, as in transformers
        return {inside(directory, directory / SINGLE): None}
    if not index.exists():
        raise CheckpointError(
            f"{directory} has neither {SINGLE} nor {INDEX}: there are no weights to load" + _how_to_convert(directory)
        )
    inside(directory, index)
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise CheckpointError(f"{index}: weight_map is missing or not a map from tensor to file")
    promises: dict[Path, set[str]] = {}
    for tensor, file in weight_map.items():
        if Path(file).name != file or not file.endswith(".safetensors"):
            raise CheckpointError(f"{index}: {tensor} is said to be in {file!r}, which is not a file of this directory")
        if len(file) > _MAX_NAME or not (directory / file).is_file():
            raise CheckpointError(
                f"{index}: {tensor} is said to be in {file[:_MAX_NAME]}, which is missing; download it again"
            )
        promises.setdefault(directory / file, set()).add(tensor)
    for path in promises:
        inside(directory, path)
    return dict(promises)


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} is there twice")
    return found


def _how_to_convert(directory: Path) -> str:
    """What to do about a directory of pickles; empty where there are none."""
    pickles = sorted(path for path in directory.iterdir() if path.suffix in _PICKLES)
    if not pickles:
        return ""
    script = (
        "import torch, safetensors.torch as s; t = torch.load('IN', weights_only=True); "
        "s.save_file({k: v.clone().contiguous() for k, v in t.items()}, 'model.safetensors')"
    )
    return (
        f"; {pickles[0].name} is a pickle, which may hold code and is never read: convert it once, with "
        f'python -c "{script.replace("IN", pickles[0].name)}" in that directory, or with the hub\'s converter, '
        "https://huggingface.co/spaces/safetensors/convert"
    )


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


def mapped(path: Path, entry: Entry) -> Tensor:
    """One tensor in a mapping of its own.

    Args:
        path: The file.
        entry: From its `header`.

    Returns:
        The tensor, sharing pages with everybody who maps the file until it is written to.  When it is let go, so are
        the pages.
    """
    if not entry.bytes:
        return torch.empty(entry.shape, dtype=entry.dtype, device="cpu")
    start = entry.begin - entry.begin % mmap.ALLOCATIONGRANULARITY
    with path.open("rb") as file:
        pages = mmap.mmap(file.fileno(), entry.end - start, access=mmap.ACCESS_COPY, offset=start)
    octets = torch.frombuffer(pages, dtype=torch.uint8, offset=entry.begin - start)
    return octets.view(entry.dtype).view(entry.shape)


@contextlib.contextmanager
def opened(path: Path, promised: set[str] | None) -> Iterator[Any]:
    """A safetensors file; `get_tensor` maps, it does not copy.

    Raises:
        CheckpointError: the file is torn, or lacks a tensor that the index promises.
    """
    header(path, promised)
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            yield file
    except SafetensorError as error:
        raise CheckpointError(
            f"{path} is torn or not a safetensors file ({path.stat().st_size:,} bytes): {error}; copy it again"
        ) from error
