"""Ways to damage a model's directory, drawn from a seeded generator, and what may come of it."""

import json
import os
import random
import shutil
import struct
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import w8a8
from w8a8.errors import W8A8Error

Draw = random.Random
CONFIG, INDEX = "config.json", "model.safetensors.index.json"
ABSURD = [
    None, True, -1, 0, 0.5, 1e308, 10**12, 2**62, 2**64, 10**40, "", "x", "../../etc/passwd", "/etc/passwd", "\u0000",
    [], {}, [[]], {"": {}}, ["re:(", 3], "int8",
]  # fmt: skip
"""What a field may be replaced with."""


def weights_of(directory: Path) -> list[Path]:
    """The safetensors files of a directory, in order."""
    return sorted(directory.glob("*.safetensors"))


def header_length(path: Path) -> int:
    """Bytes before the first tensor."""
    return 8 + int.from_bytes(path.read_bytes()[:8], "little")


def _other_bytes(path: Path, draw: Draw, length: int, *, most: int) -> None:
    """One to `most` bytes in the first `length` of a file are others."""
    data = bytearray(path.read_bytes())
    for _ in range(draw.randint(1, most)):
        data[draw.randrange(length)] = draw.randrange(256)
    path.write_bytes(bytes(data))


def _header_bytes(directory: Path, draw: Draw) -> None:
    path = draw.choice(weights_of(directory))
    _other_bytes(path, draw, header_length(path), most=3)


def _header_fields(directory: Path, draw: Draw) -> None:
    """One field of the header, which stays JSON."""
    path = draw.choice(weights_of(directory))
    data, start = path.read_bytes(), header_length(path)
    header = json.loads(data[8:start])
    name = draw.choice(sorted(header))
    kind = draw.randrange(6)
    if kind == 0:
        del header[name]
    elif kind == 1:
        header[name + draw.choice(["x", ".", "\u0000", "_scale"])] = header.pop(name)
    elif kind == 2:
        header[name] = draw.choice(ABSURD)
    elif isinstance(header[name], dict) and "shape" in header[name]:
        entry = header[name]
        if kind == 3:
            entry["dtype"] = draw.choice(["I32", "U8", "F64", "BOOL", "F8_E4M3", "Q4", "", "I8"])
        elif kind == 4:
            entry["shape"] = draw.choice(
                [[], [-1], entry["shape"][::-1], [2**62, 4], [*entry["shape"], 1], [10**30], [True]]
            )
        else:
            begin, end = entry["data_offsets"]
            entry["data_offsets"] = draw.choice(
                [[end, begin], [begin + 1, end + 1], [0, end], [begin, 2**63], [begin], [-4, 0]]
            )
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[start:])


def _length_field(directory: Path, draw: Draw) -> None:
    path = draw.choice(weights_of(directory))
    data = path.read_bytes()
    length = draw.choice([0, 1, 7, len(data), 2**32, 2**63, 2**64 - 1, header_length(path) - 9, draw.randrange(2**20)])
    path.write_bytes(struct.pack("<Q", length) + data[8:])


def _truncate(directory: Path, draw: Draw) -> None:
    path = draw.choice(sorted(p for p in directory.iterdir() if p.is_file()))
    data = path.read_bytes()
    path.write_bytes(data[: draw.randrange(len(data))] if draw.random() < 0.8 else data + bytes(draw.randrange(1, 64)))


def _json_bytes(directory: Path, draw: Draw) -> None:
    path = directory / INDEX
    _other_bytes(path, draw, path.stat().st_size, most=4)


def _index_fields(directory: Path, draw: Draw) -> None:
    index = json.loads((directory / INDEX).read_text())
    places = index["weight_map"]
    name, other = draw.choice(sorted(places)), draw.choice(sorted(places))
    kind = draw.randrange(4)
    if kind == 0:
        del places[name]
    elif kind == 1:
        places[name] = places[other]
    elif kind == 2:
        places[name] = draw.choice(
            [*ABSURD, "../x.safetensors", "a/b.safetensors", "x" * 300 + ".safetensors", "\ud800.safetensors"]
        )
    else:
        index["weight_map"] = draw.choice(ABSURD)
    (directory / INDEX).write_text(json.dumps(index))


def _swap(directory: Path, draw: Draw) -> None:
    first, second = draw.sample(weights_of(directory), 2)
    a, b = first.read_bytes(), second.read_bytes()
    first.write_bytes(b)
    second.write_bytes(a)


def _rename(directory: Path, draw: Draw) -> None:
    path = draw.choice(sorted(p for p in directory.iterdir() if p.is_file()))
    path.rename(directory / draw.choice(["pytorch_model.bin", "model.safetensors", "x.pt", CONFIG, INDEX, ".hidden"]))


def _links(directory: Path, draw: Draw) -> None:
    path = draw.choice(sorted(p for p in directory.iterdir() if p.is_file()))
    aim = draw.choice(["/etc/passwd", "/dev/zero", "..", path.name, "/proc/self/mem", str(directory.parent / "other")])
    path.unlink()
    os.symlink(aim, path)


def _config_fields(directory: Path, draw: Draw) -> None:
    """One value of config.json, at any depth."""
    config = json.loads((directory / CONFIG).read_text())
    place: Any = config
    while True:
        key = draw.choice(sorted(place) if isinstance(place, dict) else range(len(place)))
        inner = place[key]
        if not isinstance(inner, dict | list) or not inner or draw.random() < 0.15:
            break
        place = inner
    if draw.random() < 0.2 and isinstance(place, dict):
        del place[key]
    else:
        place[key] = draw.choice(ABSURD)
    (directory / CONFIG).write_text(json.dumps(config))


def _config_bytes(directory: Path, draw: Draw) -> None:
    path = directory / CONFIG
    _other_bytes(path, draw, path.stat().st_size, most=3)


KEEP_MEANING: dict[str, Callable[[Path, Draw], None]] = {
    "header bytes": _header_bytes,
    "header fields": _header_fields,
    "length field": _length_field,
    "truncation": _truncate,
    "index bytes": _json_bytes,
    "index fields": _index_fields,
    "swapped shards": _swap,
    "renamed files": _rename,
    "links": _links,
}
"""What is loaded after these is the original model, or nothing is."""

CHANGE_MEANING: dict[str, Callable[[Path, Draw], None]] = {
    "config fields": _config_fields,
    "config bytes": _config_bytes,
}
"""A config may come to describe another model, such as one with another rope_theta: that is loaded, or nothing is."""

MUTATIONS = KEEP_MEANING | CHANGE_MEANING


def outcome(original: Path, expected: dict[str, torch.Tensor], scratch: Path, mutation: str, draw: Draw) -> str:
    """Damage a copy of a directory, load it, and say what came of it.

    Args:
        original: The directory, which stays as it is.
        expected: The state dict of the model in it.
        scratch: Where the copy is made; what is there is removed.
        mutation: A key of `MUTATIONS`.
        draw: Where chances come from.

    Returns:
        "loaded", or the class of the `W8A8Error`.

    Raises:
        AssertionError: another model was loaded than the one that was saved.
        Exception: whatever else loading raised, which is a bug.
    """
    shutil.rmtree(scratch, ignore_errors=True)
    shutil.copytree(original, scratch)
    MUTATIONS[mutation](scratch, draw)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # sizes of zero make torch warn
            model = w8a8.load(scratch)
    except W8A8Error as error:
        return type(error).__name__
    if mutation in KEEP_MEANING:
        found = model.state_dict()
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    return "loaded"
