"""What was written is looked at before it gets its name."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import w8a8
from tests.conftest import gpt2, llama, mixtral, opt
from w8a8.checkpoint import writer
from w8a8.checkpoint.verify import verify_structure, verify_values
from w8a8.errors import CheckpointError


def quantized(make=llama, scheme="w8a8"):
    model = make()
    w8a8.quantize(model, scheme)
    return model


def changed(directory, change):
    path = directory / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize("make", [llama, opt, gpt2, mixtral], ids=lambda make: make.__name__)
@pytest.mark.parametrize("shard", ["20KB", "1GB"])
def test_what_save_writes_is_what_the_model_holds(tmp_path, make, shard):
    model = quantized(make)
    w8a8.save(model, tmp_path / "out", max_shard_size=shard)
    verify_values(tmp_path / "out", model)
    with torch.no_grad():
        next(model.parameters()).view(-1)[0] += 1
    with pytest.raises(CheckpointError, match="is not what the model holds"):
        verify_values(tmp_path / "out", model)


NORM, WEIGHT = "model.norm.weight", "model.layers.0.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(NORM), "norm.weight was not written"),
        (lambda t: t.pop(WEIGHT + "_scale"), "up_proj.weight_scale was not written"),
        (lambda t: t.update({WEIGHT: t[WEIGHT].float()}), "float32 of shape .*, the model has torch.int8"),
        (lambda t: t.update({WEIGHT: t[WEIGHT][:-1].clone()}), "the model has torch.int8 of shape"),
        (lambda t: t.update(more=torch.ones(1)), "more was written, and the model has no such tensor"),
    ],
)
def test_a_wrong_structure_is_seen_without_the_values(tmp_path, change, message):
    w8a8.save(quantized(), tmp_path / "out")
    verify_structure(tmp_path / "out")
    changed(tmp_path / "out", change)
    with pytest.raises(CheckpointError, match=message):
        verify_structure(tmp_path / "out")


def test_an_index_that_does_not_fit_is_seen(tmp_path):
    w8a8.save(quantized(), tmp_path / "out", max_shard_size="20KB")
    path = tmp_path / "out" / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    del index["weight_map"][NORM]
    path.write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight is in the index or in the file, and not in both"):
        verify_structure(tmp_path / "out")


@pytest.mark.parametrize("name", [NORM, WEIGHT, WEIGHT + "_scale"])
def test_one_wrong_bit_keeps_the_directory_from_its_name(tmp_path, monkeypatch, name):
    model = quantized()
    real = writer.verify_values

    def flip(tensors):
        tensors[name].view(torch.uint8).view(-1)[3] ^= 1

    def after_a_bad_disk(directory, model):
        changed(directory, flip)
        real(directory, model)

    monkeypatch.setattr(writer, "verify_values", after_a_bad_disk)
    with pytest.raises(CheckpointError, match=f"{name} was written, and is not what the model holds"):
        w8a8.save(model, tmp_path / "out")
    assert not list(tmp_path.iterdir())
    w8a8.save(model, tmp_path / "out", verify=False)
