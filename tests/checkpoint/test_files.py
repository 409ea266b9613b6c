"""Tensors seen through mappings of their own."""

import json

import pytest
import torch

from w8a8.checkpoint.files import mapped
from w8a8.checkpoint.headers import read_header


@pytest.mark.parametrize("before", range(9))
def test_a_tensor_is_mapped_wherever_it_begins(tmp_path, before):
    values = torch.tensor([1.5, -2.25, 3.0], dtype=torch.float64)
    told = {
        "a": {"dtype": "I8", "shape": [before], "data_offsets": [0, before]},
        "b": {"dtype": "F64", "shape": [3], "data_offsets": [before, before + 24]},
    }
    text = json.dumps(told).encode()
    text += b" " * (-len(text) % 8)
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(range(before)) + values.numpy().tobytes())
    entries = read_header(path)
    assert torch.equal(mapped(entries["b"]), values)
    assert mapped(entries["a"]).tolist() == list(range(before))
