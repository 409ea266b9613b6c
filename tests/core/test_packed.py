"""Codes in int32 words, against compressed-tensors' own packing, and directories that have them."""

import json

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from compressed_tensors.quantization import QuantizationScheme
from safetensors.torch import load_file, save_file

import w8a8
from tests.conftest import every_third, llama
from w8a8.core.packed import as_words, in_words, pack_rows, unpack_rows, words
from w8a8.core.scheme import PRESETS, PerChannel, PerGroup, PerTensor, PerToken, QuantSpec, Scheme
from w8a8.errors import CheckpointError
from w8a8.layers.linear import Mode, quant_linears

SCHEMES = [
    Scheme(QuantSpec(bits, granularity, symmetric), activations)
    for bits in (8, 4)
    for granularity in (PerChannel(), PerTensor(), PerGroup(4))
    for symmetric in (True, False)
    for activations in (None, QuantSpec(8, PerToken()))
]


@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize("k", [1, 3, 4, 8, 15, 16, 33, 100])
def test_words_of_compressed_tensors_are_unpacked(bits, k):
    codes = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (5, k), dtype=torch.int8)
    packed = pack_to_int32(codes, bits)
    assert packed.shape == (5, words(k, bits))
    found = unpack_rows(packed, bits, k)
    assert torch.equal(found, codes)
    assert found.is_contiguous()


@pytest.mark.parametrize("k", [1, 3, 4, 8, 15, 16, 33, 100])
def test_words_are_those_of_compressed_tensors(k):
    codes = torch.randint(-128, 128, (5, k), dtype=torch.int8)
    assert torch.equal(pack_rows(codes), pack_to_int32(codes, 8))
    assert torch.equal(pack_rows(codes.t().contiguous().t()), pack_to_int32(codes, 8))
    stored = as_words(codes)
    assert torch.equal(stored["weight_packed"], pack_to_int32(codes, 8))
    assert stored["weight_shape"].dtype is torch.int64
    assert stored["weight_shape"].tolist() == [5, k]
    assert as_words(codes.to("meta"))["weight_packed"].shape == (5, words(k, 8))


def test_what_vllm_reads_in_words_is_written_in_words():
    written = [scheme for scheme in SCHEMES if in_words(scheme)]
    assert written == [Scheme(QuantSpec(8, PerChannel())), Scheme(QuantSpec(8, PerGroup(4)))]
    assert [name for name, preset in PRESETS.items() if in_words(preset.scheme)] == ["w8a16"]


def packed_directory(path, scheme):
    """What compressed-tensors would have written of one of our models, and the model."""
    model = w8a8.quantize(llama(), scheme).model
    w8a8.save(model, path)
    tensors, bits = load_file(path / "model.safetensors"), scheme.weights.bits
    for name, layer in quant_linears(model):
        codes = layer.codes
        tensors.pop(f"{name}.weight", None)
        tensors[f"{name}.weight_packed"] = pack_to_int32(codes, bits).contiguous()
        tensors[f"{name}.weight_shape"] = torch.tensor(codes.shape)
        if not scheme.weights.symmetric:
            zero_point = tensors[f"{name}.weight_zero_point"].to(torch.int8)
            if not isinstance(scheme.weights.granularity, PerTensor):
                zero_point = pack_to_int32(zero_point, bits, packed_dim=0).contiguous()
            tensors[f"{name}.weight_zero_point"] = zero_point
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((path / "config.json").read_text())
    quantization = config["quantization_config"]
    quantization["format"] = quantization["config_groups"]["group_0"]["format"] = "pack-quantized"
    (path / "config.json").write_text(json.dumps(config))
    return model


@pytest.mark.parametrize("scheme", every_third(SCHEMES), ids=str)
def test_packed_directories_run_with_the_same_bits(tmp_path, scheme):
    model = packed_directory(tmp_path / "d", scheme)
    loaded = w8a8.load(tmp_path / "d")
    ids = torch.randint(0, 96, (2, 8))
    modes = {layer.mode for _, layer in quant_linears(loaded)}
    assert modes == {Mode.WEIGHT_ONLY if scheme.weight_only else Mode.INTEGER}
    for (_, a), (_, b) in zip(quant_linears(loaded), quant_linears(model), strict=True):
        assert torch.equal(a.codes, b.codes)
    with torch.inference_mode():
        assert torch.equal(loaded(ids).logits, model(ids).logits)


@pytest.mark.parametrize("scheme", [s for s in SCHEMES if s.weight_only], ids=str)
def test_compressed_tensors_reads_the_same_weights_from_them(tmp_path, scheme):
    """By its decompressor: transformers 5.23 expects packed zero points in another shape and refuses them."""
    packed_directory(tmp_path / "d", scheme)
    loaded = w8a8.load(tmp_path / "d")
    config = json.loads((tmp_path / "d/config.json").read_text())["quantization_config"]
    theirs = QuantizationScheme(**config["config_groups"]["group_0"])
    tensors = load_file(tmp_path / "d/model.safetensors")
    for name, layer in quant_linears(loaded):
        state = {key.rpartition(".")[2]: value for key, value in tensors.items() if key.startswith(f"{name}.")}
        weight = PackedQuantizationCompressor.decompress(state, theirs)["weight"]
        assert torch.equal(weight, layer.dequantized_weight())


LAYER = "model.layers.0.mlp.down_proj"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(f"{LAYER}.weight_packed"), f"1 tensors are missing: {LAYER}.weight_packed"),
        (
            lambda t: t.update({f"{LAYER}.weight_packed": torch.zeros(64, 3, dtype=torch.int32)}),
            r"weight_packed is int32 of shape \(64, 3\), expected int32 of shape \(64, 25\)",
        ),
        (
            lambda t: t.update({f"{LAYER}.weight_shape": torch.tensor([64, 99])}),
            r"weight_shape is \[64, 99\], expected \[64, 100\]",
        ),
        (
            lambda t: t.update({f"{LAYER}.weight": torch.zeros(64, 100, dtype=torch.int8)}),
            f"{LAYER}.weight has no place",
        ),
        (
            lambda t: t.update({f"{LAYER}.weight_zero_point": torch.zeros(64, 1, dtype=torch.int32)}),
            r"weight_zero_point is int32 of shape \(64, 1\), expected int32 of shape \(16, 1\)",
        ),
    ],
)
def test_words_that_do_not_fit_are_named(tmp_path, change, message):
    packed_directory(tmp_path / "d", Scheme(QuantSpec(8, PerChannel(), symmetric=False)))
    tensors = load_file(tmp_path / "d/model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "d/model.safetensors")
    with pytest.raises(CheckpointError, match=message):
        w8a8.load(tmp_path / "d")
