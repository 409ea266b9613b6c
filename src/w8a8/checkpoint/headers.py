"""The header of a safetensors file, read and judged before anything is mapped.

A file is eight bytes, little-endian, the length of the header; the header, a JSON object from tensor names to dtype,
shape and the two ends of its bytes; and the bytes, counted from the header's end (github.com/huggingface/safetensors,
"Format").  The library that maps the files checks the same things in its own way.  This check stands before it so
that every file is refused with the tensor and the reason named, and so that offsets can be used to read tensors
directly.

Refused: a header that is longer than the file or than `MAX_HEADER`, that is not JSON, or names a tensor twice; names of
more than `MAX_NAME` characters; dtypes unknown here; shapes that are not lists of non-negative integers; bytes that are
not as many as dtype and shape say; tensors that overlap, leave holes, or reach beyond the file.
Sizes are Python's integers: no product overflows.
"""

import itertools
import json
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, TypeAlias, TypeGuard

import torch

from w8a8.errors import CheckpointError

Told: TypeAlias = tuple[str, torch.dtype, tuple[int, ...]]
"""Name, dtype and shape of a tensor."""
MAX_HEADER = 100 << 20
"""Bytes; the same limit as the library's."""
MAX_NAME = 1000
"""Characters of a tensor's name, with which transformers matches expressions of its own."""

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
_METADATA = "__metadata__"
_FIRST = (
    *("U64", "I64", "F64", "C64", "F32", "U32", "I32", "BF16", "F16", "U16"),
    *("I16", "F8_E5M2FNUZ", "F8_E4M3FNUZ", "F8_E8M0", "F8_E4M3", "F8_E5M2", "I8", "U8", "BOOL"),
)
"""Of the names, as the library (0.8) orders the tensors that it writes."""


@dataclass(frozen=True)
class Entry:
    """One tensor of a file.

    begin, end: Positions in the file, in bytes.
    file: Not in the representation: a header reads alike wherever its file lies, and so does a job's fingerprint.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int
    file: Path = field(repr=False)

    @property
    def bytes(self) -> int:
        """What it takes in the file."""
        return self.end - self.begin

    @property
    def where(self) -> str:
        """File and name, for messages."""
        return f"{self.file}: {self.name}"


def each_once(found: Iterable[tuple[str, Entry]]) -> dict[str, Entry]:
    """Tensors of several files by the names that they are found under; `CheckpointError` where two have one name."""
    entries: dict[str, Entry] = {}
    for name, entry in found:
        other = entries.setdefault(name, entry)
        if other is not entry:
            raise CheckpointError(f"{entry.where} is in {other.file.name} too: two values for one tensor")
    return entries


def read_header(path: Path) -> dict[str, Entry]:
    """The tensors of a file by name, in the order of their bytes.

    Raises:
        CheckpointError: the file cannot be read, or its header is not true; file, tensor and reason are named.
    """
    try:
        with path.open("rb") as file:
            text, start = _text(file, path)
            size = os.fstat(file.fileno()).st_size
    except OSError as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    entries = [_entry(name, told, start, path) for name, told in _parsed(text, path).items() if name != _METADATA]
    entries.sort(key=lambda e: (e.begin, e.end))
    _check_places(entries, start, size, path)
    return {entry.name: entry for entry in entries}


def in_order(tensors: Iterable[Told]) -> list[Told]:
    """Tensors in the order in which the library (0.8) writes a file: by dtype, the widest first, and by name."""
    return sorted(tensors, key=lambda tensor: (_FIRST.index(NAMES[tensor[1]]), tensor[0]))


def header_of(tensors: list[Told], path: Path) -> tuple[bytes, dict[str, Entry]]:
    """The first bytes of the file that is to hold these tensors in this order, and where each lies.

    The header is padded with spaces so that the tensors begin at a multiple of eight.
    """
    sizes = [math.prod(shape) * dtype.itemsize for _, dtype, shape in tensors]
    ends = list(itertools.accumulate(sizes, initial=0))
    told: dict[str, object] = {_METADATA: {"format": "pt"}}
    for (name, dtype, shape), offsets in zip(tensors, itertools.pairwise(ends), strict=True):
        told[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": offsets}
    text = json.dumps(told, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    places = zip(tensors, itertools.pairwise(ends), strict=True)
    entries = {name: Entry(name, dtype, shape, start + a, start + b, path) for (name, dtype, shape), (a, b) in places}
    return len(text).to_bytes(8, "little") + text, entries


def _text(file: BinaryIO, path: Path) -> tuple[bytes, int]:
    """The header's bytes, and where the tensors begin."""
    size = os.fstat(file.fileno()).st_size
    first = file.read(8)
    if len(first) < 8:
        raise CheckpointError(f"{path} is torn: it has {size} bytes, a safetensors file has at least 8; copy it again")
    length = int.from_bytes(first, "little")
    if length > MAX_HEADER or 8 + length > size:
        raise CheckpointError(
            f"{path} is torn or not a safetensors file: its header is said to have {length:,} bytes, the file has "
            f"{size:,} (the limit is {MAX_HEADER:,}); copy it again"
        )
    text = file.read(length)
    if len(text) < length:
        raise CheckpointError(f"{path} is torn: its header ends after {len(text):,} of {length:,} bytes; copy it again")
    return text, 8 + length


def _parsed(text: bytes, path: Path) -> dict[str, object]:
    def once(pairs: list[tuple[str, object]]) -> dict[str, object]:
        if name := twice(pairs):
            raise CheckpointError(f"{path}: the header has {name!r} twice")
        return dict(pairs)

    try:
        told = json.loads(text.decode("utf-8"), object_pairs_hook=once)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not a safetensors file: its header is not JSON: {error}") from error
    if not isinstance(told, dict):
        raise CheckpointError(f"{path} is not a safetensors file: its header is a {type(told).__name__}, not an object")
    return told


def twice(pairs: list[tuple[str, object]]) -> str | None:
    """The first name that a JSON object has more than once, if it has one."""
    names = [name for name, _ in pairs]
    return next((name for name in names if names.count(name) > 1), None) if len(set(names)) < len(names) else None


def _entry(name: str, told: object, start: int, path: Path) -> Entry:
    if len(name) > MAX_NAME:
        raise CheckpointError(
            f"{path}: a tensor's name has {len(name):,} characters, {name[:40]!r}...; the limit is {MAX_NAME:,}"
        )
    if not isinstance(told, dict) or set(told) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{path}: {name}: the header has {str(told)[:80]!r}, not dtype, shape and data_offsets")
    dtype, shape, offsets = told["dtype"], told["shape"], told["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise CheckpointError(f"{path}: {name} has dtype {dtype!r}, known here: {', '.join(DTYPES)}")
    if not _counts(shape):
        raise CheckpointError(f"{path}: {name} has shape {str(shape)[:80]}, not a list of sizes")
    if not _counts(offsets) or len(offsets) != 2:
        raise CheckpointError(f"{path}: {name} has data_offsets {str(offsets)[:80]}, not two positions")
    wanted = math.prod(shape) * DTYPES[dtype].itemsize
    if offsets[1] - offsets[0] != wanted:
        raise CheckpointError(
            f"{path}: {name} is {dtype} of shape {shape}, which takes {wanted:,} bytes, and has "
            f"{offsets[1] - offsets[0]:,}; copy the file again"
        )
    return Entry(name, DTYPES[dtype], tuple(shape), start + offsets[0], start + offsets[1], path)


def _counts(value: object) -> TypeGuard[list[int]]:
    """Whether this is a list of non-negative integers of a size that files have."""
    return isinstance(value, list) and all(type(v) is int and 0 <= v < 1 << 63 for v in value)


def _check_places(entries: list[Entry], start: int, size: int, path: Path) -> None:
    position = start
    for entry in entries:
        if entry.begin != position:
            what = "overlaps the tensor before it" if entry.begin < position else "leaves a hole before it"
            raise CheckpointError(
                f"{path}: {entry.name} begins at byte {entry.begin:,}, not at {position:,}: it {what}"
            )
        position = entry.end
    if position != size:
        raise CheckpointError(
            f"{path} is torn or not a safetensors file: its header describes {position:,} bytes, it has {size:,}; "
            "copy it again"
        )
