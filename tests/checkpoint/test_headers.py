"""The header of a safetensors file: what is true is read, what is not is named."""

import json
import re

import pytest
import torch
from safetensors.torch import save_file

from w8a8.checkpoint.headers import DTYPES, MAX_HEADER, header_of, read_header
from w8a8.errors import CheckpointError

BYTES = 4 * 6


def entry(dtype="F32", shape=(2, 3), offsets=(0, BYTES)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def write(path, header, data=bytes(BYTES)):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def test_every_dtype_and_shape_is_read_where_the_library_wrote_it(tmp_path):
    tensors = {
        f"t.{name}": torch.arange(6).reshape(2, 3).to(dtype)
        for name, dtype in DTYPES.items()
        if name not in ("C64", "U64", "U32", "U16")
    }
    tensors |= {"scalar": torch.tensor(1.5), "empty": torch.zeros(0, 4)}
    save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt"})
    data = (tmp_path / "x.safetensors").read_bytes()
    found = read_header(tmp_path / "x.safetensors")
    assert set(found) == set(tensors)
    for name, tensor in tensors.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tuple(tensor.shape))
        if tensor.numel():
            values = torch.frombuffer(bytearray(data[found[name].begin : found[name].end]), dtype=tensor.dtype)
            assert torch.equal(values.view(torch.uint8), tensor.flatten().view(torch.uint8))


def test_a_header_of_ours_is_read_by_the_library(tmp_path):
    wanted = {"b": torch.randn(3, 5), "a": torch.arange(7, dtype=torch.int8), "c": torch.randn(2).to(torch.bfloat16)}
    path = tmp_path / "x.safetensors"
    text, entries = header_of([(name, t.dtype, tuple(t.shape)) for name, t in wanted.items()], path)
    data = b"".join(t.view(torch.uint8).numpy().tobytes() for t in wanted.values())
    path.write_bytes(text + data)
    assert read_header(path) == entries
    assert min(e.begin for e in entries.values()) % 8 == 0
    from safetensors.torch import load_file

    found = load_file(path)
    assert set(found) == set(wanted)
    assert all(torch.equal(found[name], t) for name, t in wanted.items())


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"{", "not JSON"),
        (b"\xff\xfe", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"[]", "a list, not an object"),
        (b'{"a": 1, "a": 2}', "'a' twice"),
        (b'{"t": {"dtype": "F32", "dtype": "I8", "shape": [6], "data_offsets": [0, 24]}}', "'dtype' twice"),
        ({"t" * 1001: entry()}, "a tensor's name has 1,001 characters, 't{40}'"),
        ({"t": 3}, "t: the header has '3'"),
        ({"t": {"dtype": "F32"}}, "not dtype, shape and data_offsets"),
        ({"t": entry("F33")}, "dtype 'F33'"),
        ({"t": entry(["F32"])}, "dtype \\['F32'\\]"),
        ({"t": entry(shape=(-2, 3))}, "shape \\[-2, 3\\]"),
        ({"t": entry(shape=(2.0, 3))}, "shape \\[2.0, 3\\]"),
        ({"t": entry(shape=(True, 6))}, "shape \\[True, 6\\]"),
        ({"t": entry(shape=(2**62, 2**62, 4))}, "takes 340,282,366,920,938,463,463,374,607,431,768,211,456 bytes"),
        ({"t": entry(shape=(2**64,))}, "not a list of sizes"),
        ({"t": entry(offsets=(0,))}, "not two positions"),
        ({"t": entry(offsets=(24, 0))}, "takes 24 bytes, and has -24"),
        ({"t": entry(shape=(2, 2))}, "takes 16 bytes, and has 24"),
        ({"t": entry(offsets=(8, 32))}, "leaves a hole"),
        ({"s": entry(), "t": entry()}, "overlaps"),
        ({"t": entry(shape=(1, 3), offsets=(0, 12))}, "describes 79 bytes, it has 91|is torn"),
        ({"t": entry(shape=(4, 3), offsets=(0, 48))}, "is torn"),
    ],
)
def test_what_is_not_true_is_named(tmp_path, header, message):
    with pytest.raises(CheckpointError, match=message):
        read_header(write(tmp_path / "x.safetensors", header))


@pytest.mark.parametrize(
    "data", [b"", b"abc", (9).to_bytes(8, "little") + b"{}", (2**63).to_bytes(8, "little") + b"{}"]
)
def test_a_torn_file_is_named(tmp_path, data):
    path = tmp_path / "x.safetensors"
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=f"{re.escape(str(path))} is torn"):
        read_header(path)


def test_a_header_of_absurd_size_is_not_read(tmp_path):
    path = tmp_path / "x.safetensors"
    with path.open("wb") as file:
        file.write((MAX_HEADER + 1).to_bytes(8, "little"))
        file.truncate(MAX_HEADER + 100)  # sparse
    with pytest.raises(CheckpointError, match="limit is 104,857,600"):
        read_header(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"x\.safetensors cannot be read: No such file"):
        read_header(tmp_path / "x.safetensors")
