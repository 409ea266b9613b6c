"""What files hold of quantised layers comes into them, or is refused, as by `w8a8.load`."""

import pytest
import torch
from safetensors.torch import load_file, save_file

import w8a8
from tests.conftest import llama, mixtral
from tests.hf.conftest import IDS, opened, quantized
from w8a8 import hf
from w8a8.demo.run import demo_directory
from w8a8.errors import CheckpointError


def test_scales_in_the_shapes_and_dtypes_of_others_are_taken_as_load_takes_them(tmp_path):
    w8a8.save(w8a8.quantize(llama()).model, tmp_path / "d")
    path = tmp_path / "d" / "model.safetensors"
    tensors = load_file(path)
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[f"{name}_scale"] = tensors[f"{name}_scale"].flatten().to(torch.bfloat16)
    tensors[f"{name}_zero_point"] = torch.zeros(100, 1, dtype=torch.int8)  # as older files have it
    save_file(tensors, path, metadata={"format": "pt"})
    w8a8.enable()
    assert torch.equal(opened(tmp_path / "d")(IDS).logits, w8a8.load(tmp_path / "d")(IDS).logits)
    tensors[f"{name}_zero_point"][3] = 1
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"model\.safetensors: .*up_proj\.weight_zero_point is not zero"):
        opened(tmp_path / "d")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("weight", torch.zeros(100, 64, dtype=torch.float16), r"float16 of shape \(100, 64\), expected int8"),
        (
            "weight",
            torch.zeros(100, 63, dtype=torch.int8),
            r"int8 of shape \(100, 63\), expected .*shape \(100, 64\)",
        ),
        ("weight_scale", torch.full((100, 1), torch.nan), "a scale that is not positive and finite"),
        ("weight_scale", torch.ones(100, 1, dtype=torch.int32), "expected a float scale"),
    ],
)
def test_what_load_refuses_is_refused(tmp_path, key, value, message):
    w8a8.save(w8a8.quantize(llama()).model, tmp_path / "d")
    path = tmp_path / "d" / "model.safetensors"
    save_file(load_file(path) | {f"model.layers.0.mlp.up_proj.{key}": value}, path, metadata={"format": "pt"})
    for opens in (w8a8.load, opened):
        w8a8.enable()
        with pytest.raises(CheckpointError, match=rf"model\.safetensors: .*up_proj\.{key} .*{message}"):
            opens(tmp_path / "d")


@pytest.mark.parametrize("key", ["weight", "bias", "weight_g_idx"])
def test_what_a_layer_has_no_place_for_is_refused(tmp_path, key):
    w8a8.save(w8a8.quantize(mixtral(), "w8a16").model, tmp_path / "d")
    path = tmp_path / "d" / "model.safetensors"
    name = f"model.layers.0.block_sparse_moe.experts.1.w2.{key}"
    save_file(load_file(path) | {name: torch.ones(32, 40)}, path, metadata={"format": "pt"})
    for opens in (w8a8.load, opened):
        w8a8.enable()
        with pytest.raises(CheckpointError, match=rf"model\.safetensors: {name} has no place in Mixtral"):
            opens(tmp_path / "d")


@pytest.mark.parametrize("scheme", ["w8a8", "w8a16"])
def test_two_names_in_the_files_for_one_tensor_are_refused(tmp_path, scheme):
    w8a8.save(w8a8.quantize(mixtral(), scheme).model, tmp_path / "d")
    path = tmp_path / "d" / "model.safetensors"
    tensors = load_file(path)
    inside = "model.layers.0.block_sparse_moe.experts.0.w1."
    twice = {name.replace("block_sparse_moe", "mlp"): t + 1 for name, t in tensors.items() if inside in name}
    save_file(tensors | twice, path, metadata={"format": "pt"})
    for opens in (w8a8.load, opened):
        w8a8.enable()
        with pytest.raises(CheckpointError, match=r"is in model\.safetensors too: two values for one tensor"):
            opens(tmp_path / "d")


def test_values_without_files_are_refused(tmp_path):
    model = w8a8.quantize(llama()).model
    w8a8.enable()
    with pytest.raises(CheckpointError, match="filled from safetensors files, and none are given: load a directory"):
        type(model).from_pretrained(None, config=model.config, state_dict=model.state_dict())


def test_a_missing_scale_is_not_made_up(tmp_path):
    w8a8.save(quantized(demo_directory()), tmp_path / "saved")
    path = tmp_path / "saved" / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.decoder.layers.0.fc1.weight_scale"]
    save_file(tensors, path, metadata={"format": "pt"})
    w8a8.enable()
    with pytest.raises(CheckpointError, match=r"layers\.0\.fc1\.weight_scale is missing"):
        opened(tmp_path / "saved")


def test_a_layer_that_was_lost_is_missed(tmp_path):
    directory = tmp_path / "model"
    w8a8.save(w8a8.quantize(llama()).model, directory)
    path = directory / "model.safetensors"
    kept = {name: t for name, t in load_file(path).items() if not name.startswith("model.layers.1.mlp.up_proj")}
    save_file(kept, path, {"format": "pt"})
    hf.enable()
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.up_proj\.weight is missing"):
        opened(directory)
