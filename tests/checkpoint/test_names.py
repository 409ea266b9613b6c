"""The names that files have: transformers' own renamings, there and back."""

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers.core_model_loading import WeightRenaming

import w8a8
from tests.conftest import llama, mixtral, phimoe, qwen3_moe
from w8a8.checkpoint.names import FileNames, remember
from w8a8.convert import swap
from w8a8.experts import unstacked


def apart(model):
    swap(model, unstacked(model)[0])
    return model


def test_mixtrals_files_call_its_parts_otherwise():
    names = FileNames(apart(mixtral()))
    pairs = {
        "model.layers.0.mlp.experts.3.w1.weight_scale": "model.layers.0.block_sparse_moe.experts.3.w1.weight_scale",
        "model.layers.0.mlp.gate.weight": "model.layers.0.block_sparse_moe.gate.weight",
        "model.layers.0.self_attn.q_proj.weight": "model.layers.0.self_attn.q_proj.weight",
    }
    assert {name: names.in_file(name) for name in pairs} == pairs
    assert {names.in_model(name): name for name in pairs.values()} == pairs
    assert names.of_layer("model.layers.0.mlp.experts.3.w1") == "model.layers.0.block_sparse_moe.experts.3.w1"


@pytest.mark.parametrize("make", [mixtral, qwen3_moe, phimoe], ids=lambda make: make.__name__)
def test_the_names_are_those_that_transformers_writes_a_float_model_with(tmp_path, make):
    model = make()
    model.save_pretrained(tmp_path)
    names = FileNames(apart(model))
    assert {names.in_file(name) for name in model.state_dict()} == set(load_file(tmp_path / "model.safetensors"))


@pytest.mark.parametrize("make", [mixtral, qwen3_moe, llama], ids=lambda make: make.__name__)
def test_every_other_model_keeps_its_names(make):
    names = FileNames(make())  # stacked, or without experts
    assert names.renamings == []
    assert all(names.in_file(name) == name == names.in_model(name) for name in make().state_dict())


def test_what_cannot_be_taken_back_is_not_renamed(monkeypatch):
    lossy = [WeightRenaming(r"\.(mlp|norm)\.", r".other.")]
    monkeypatch.setattr("w8a8.checkpoint.names.get_model_conversion_mapping", lambda *_, **__: lossy)
    assert FileNames(apart(mixtral())).renamings == []


def test_transformers_saves_what_we_do(tmp_path):
    model = w8a8.quantize(mixtral()).model
    remember(model)
    model.save_pretrained(tmp_path / "theirs")
    w8a8.save(model, tmp_path / "ours")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "theirs" / name).read_bytes() == (tmp_path / "ours" / name).read_bytes()
    ids = torch.arange(12)[None]
    assert torch.equal(w8a8.load(tmp_path / "theirs")(ids).logits, model(ids).logits)


@pytest.mark.parametrize("scheme", ["w8a8", "w8a16"])
@pytest.mark.parametrize("make", [llama, mixtral])
def test_no_weight_is_unpacked_for_the_sake_of_its_name(monkeypatch, make, scheme):
    model = w8a8.quantize(make(), scheme).model

    def state_dict(*args, **options):
        raise AssertionError("this has the values of all layers, in the file's form: the model a second time")

    monkeypatch.setattr(nn.Module, "state_dict", state_dict)
    expected = "block_sparse_moe.gate.weight" if make is mixtral else "mlp.gate.weight"
    assert FileNames(model).in_file("model.layers.0.mlp.gate.weight") == f"model.layers.0.{expected}"
