"""Our directories read by the real compressed-tensors, inside transformers: codes and scales, exactly."""

import json

import pytest
import torch
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, apply_quantization_config
from compressed_tensors.quantization.lifecycle.forward import fake_quantize as library_fake_quantize
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

import w8a8
from tests.conftest import THEIRS, crossed, llama, mixtral, named, opt, qwen2_moe, qwen3_moe, relative_error
from w8a8 import PRESETS, PerChannel, PerGroup, PerTensor, PerToken, QuantSpec, Scheme
from w8a8.checkpoint.layout import check_writable
from w8a8.checkpoint.names import FileNames
from w8a8.core.affine import QParams
from w8a8.core.tokens import fake_quantize_tokens
from w8a8.directories import quantize_directory
from w8a8.errors import CheckpointError
from w8a8.layers.linear import quant_linears
from w8a8.model.experts import unstacked
from w8a8.model.swapping import swap

IDS = torch.randint(0, 96, (4, 32), generator=torch.Generator().manual_seed(0))
SCHEMES = {name: preset.scheme for name, preset in PRESETS.items()} | {
    "group": Scheme(QuantSpec(granularity=PerGroup(4)), QuantSpec(granularity=PerToken())),
    "weight-only groups": Scheme(QuantSpec(granularity=PerGroup(4))),
    "weight-only, zero points": Scheme(QuantSpec(granularity=PerChannel(), symmetric=False)),
    "weight-only, one scale": Scheme(QuantSpec()),
    "four bits": Scheme(QuantSpec(4, PerChannel()), QuantSpec(granularity=PerToken())),
}


def decompressed(directory):
    """The model as transformers and compressed-tensors make it: float weights from our codes."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    with torch.no_grad():
        model(IDS)  # the library decompresses at the first forward
    return model


def check(directory, model):
    theirs = decompressed(directory)
    layers = dict(quant_linears(model))
    assert layers
    for name, layer in layers.items():
        found = theirs.get_submodule(name)
        assert torch.equal(found.weight.detach(), layer.dequantized_weight())
        for key in ("input_scale", "input_zero_point"):
            if getattr(layer, key) is not None:
                assert torch.equal(
                    getattr(found, key).view(-1).to(torch.float64), getattr(layer, key).to(torch.float64)
                )
    for name, parameter in model.named_parameters():
        if name.rpartition(".")[0] not in layers:
            assert torch.equal(theirs.get_parameter(name), parameter)


@pytest.mark.filterwarnings("ignore")
@crossed("make name", [llama, opt], list(SCHEMES), ids=named)
def test_weights_and_scales_are_what_the_library_reads(tmp_path, make, name):
    check_writable(SCHEMES[name])
    model = make()
    w8a8.quantize(model, SCHEMES[name], calibration=IDS if SCHEMES[name].static else None, smooth="none")
    w8a8.save(model, tmp_path / "out")
    check(tmp_path / "out", model)


@pytest.mark.filterwarnings("ignore")
def test_a_streamed_directory_is_what_the_library_reads(tmp_path):
    llama().save_pretrained(tmp_path / "source")
    quantize_directory(tmp_path / "source", tmp_path / "out", shard_bytes=20_000)
    check(tmp_path / "out", w8a8.load(tmp_path / "out"))


MIXED = {"*.self_attn.*": "w8a8-asym", "*.up_proj": SCHEMES["weight-only groups"], "*": "w8a16"}


@pytest.mark.parametrize(
    "scheme", [SCHEMES["w8a16"], SCHEMES["weight-only groups"], MIXED], ids=["channel", "group", "mixed"]
)
@pytest.mark.parametrize("width", [100, 102])
def test_words_hold_our_codes_and_scales(tmp_path, scheme, width):
    """Unpacked by the library itself; 102 codes fill no whole number of words."""
    model = llama(intermediate_size=width)
    if width % 4 and scheme is not SCHEMES["w8a16"]:
        scheme = {"*.down_proj": "w8a16", **(scheme if isinstance(scheme, dict) else {"*": scheme})}
    w8a8.quantize(model, scheme)
    w8a8.save(model, tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    packed = 0
    for name, layer in quant_linears(model):
        assert torch.equal(tensors[f"{name}.weight_scale"], layer.weight_scale)
        if layer.scheme.activations is not None:
            assert torch.equal(tensors[f"{name}.weight"], layer.codes)
            continue
        shape = torch.Size(tensors[f"{name}.weight_shape"].tolist())
        assert torch.equal(unpack_from_int32(tensors[f"{name}.weight_packed"], 8, shape), layer.codes)
        assert f"{name}.weight" not in tensors
        packed += 1
    assert packed
    loaded = w8a8.load(tmp_path / "out")
    for (name, a), (other, b) in zip(model.state_dict().items(), loaded.state_dict().items(), strict=True):
        assert name == other
        assert torch.equal(a, b)
    with torch.inference_mode():
        assert torch.equal(loaded(IDS).logits, model(IDS).logits)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("width", [100, 102])
def test_logits_of_weight_only_and_mixed_models_are_those_of_transformers(tmp_path, width):
    """Within float rounding: it multiplies the same weights in float32.

    With activations that are quantised, the last place of a sum turns a code now and then: 2e-7 in most runs.
    """
    ways = (("w8a16", "w8a16", 1e-6), ("mixed", {"*.self_attn.*": "w8a8-asym", "*": "w8a16"}, 0.01))
    for name, scheme, bound in ways:
        model = llama(intermediate_size=width)
        w8a8.quantize(model, scheme)
        w8a8.save(model, tmp_path / name)
        check(tmp_path / name, model)
        written = json.loads((tmp_path / name / "config.json").read_text())["quantization_config"]
        assert written["format"] == ("pack-quantized" if name == "w8a16" else "mixed-precision")
        with torch.inference_mode():
            theirs, ours = decompressed(tmp_path / name)(IDS).logits, model(IDS).logits
        assert relative_error(theirs, ours) < bound


def test_int8_directories_of_weight_only_models_still_load(tmp_path):
    """As they were written before words were: the format is what the file says, not what would be written."""
    model = llama()
    w8a8.quantize(model, "w8a16")
    w8a8.save(model, tmp_path / "out")
    path = tmp_path / "out" / "model.safetensors"
    tensors = {name: t for name, t in load_file(path).items() if not name.endswith(("_packed", "_shape"))}
    tensors |= {f"{name}.weight": layer.codes for name, layer in quant_linears(model)}
    save_file(tensors, path, metadata={"format": "pt"})
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    quantization = config["quantization_config"]
    quantization["format"] = quantization["config_groups"]["group_0"]["format"] = "int-quantized"
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    loaded = w8a8.load(tmp_path / "out")
    with torch.inference_mode():
        assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    name = next(name for name, _ in quant_linears(model))
    save_file(tensors | {f"{name}.weight_packed": torch.zeros(64, 16, dtype=torch.int32)}, path)
    with pytest.raises(CheckpointError, match=r"weight_packed has no place in LlamaForCausalLM"):
        w8a8.load(tmp_path / "out")
    save_file(tensors, path, metadata={"format": "pt"})
    w8a8.save(w8a8.load(tmp_path / "out"), tmp_path / "again")
    assert f"{name}.weight_packed" in load_file(tmp_path / "again" / "model.safetensors")


@pytest.mark.parametrize("bits", [4, 8])
def test_a_static_symmetric_grid_saturates_where_the_librarys_does(bits):
    x, scale = torch.linspace(-40, 40, 2001)[None], torch.tensor([40 / 2**bits])  # twice as far as the grid goes
    args = QuantizationArgs(num_bits=bits, symmetric=True, strategy="tensor", dynamic=False)
    theirs = library_fake_quantize(x, scale, torch.zeros(1, dtype=torch.int8), args)
    assert theirs.min() == -(2 ** (bits - 1)) * scale
    spec = QuantSpec(bits, PerTensor(), dynamic=False)
    assert torch.equal(fake_quantize_tokens(x, spec, QParams(scale, None)), theirs)


def library_reads(directory, make):
    """A float model with experts as linear layers, whose weights and scales compressed-tensors made of a directory."""
    model = make()
    swap(model, unstacked(model)[0])
    names = FileNames(model)
    config = json.loads((directory / "config.json").read_text())["quantization_config"]
    for part in (*config["config_groups"].values(), config):  # the library is asked for the files' names
        key = "targets" if "targets" in part else "ignore"
        part[key] = [names.in_model(f"{target}.weight").removesuffix(".weight") for target in part[key]]
    compressor = ModelCompressor.from_compression_config(CompressedTensorsConfig(**config))
    apply_quantization_config(model, QuantizationConfig.model_validate(config))
    compressor.compress_model(model)
    held = load_file(directory / "model.safetensors")
    model.load_state_dict({names.in_model(name): tensor for name, tensor in held.items()})
    compressor.decompress_model(model)
    return model


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("make", [mixtral, qwen3_moe, qwen2_moe], ids=lambda make: make.__name__)
@pytest.mark.parametrize("scheme", ["w8a8", "w8a8-asym", "w8a8-static"])
def test_experts_are_what_the_library_reads(tmp_path, make, scheme):
    model = make()
    w8a8.quantize(model, scheme, calibration=IDS if scheme == "w8a8-static" else None, smooth="none")
    w8a8.save(model, tmp_path / "out")
    theirs = library_reads(tmp_path / "out", make)
    layers = dict(quant_linears(model))
    assert sum(".experts." in name for name in layers) == 12 * model.config.num_hidden_layers
    for name, layer in layers.items():
        found = theirs.get_submodule(name)
        assert torch.equal(found.weight.detach(), layer.dequantized_weight())
        if layer.input_scale is not None:
            assert torch.equal(found.input_scale.view(-1), layer.input_scale.view(-1))
    for name, parameter in model.named_parameters():
        assert torch.equal(theirs.get_parameter(name), parameter)


@pytest.mark.parametrize("make", [mixtral, qwen3_moe], ids=lambda make: make.__name__)
def test_transformers_alone_refuses_quantised_experts(tmp_path, make):
    """It stacks what compressed-tensors has not decompressed; `w8a8.enable` and `w8a8.load` run them."""
    w8a8.save(w8a8.quantize(make()).model, tmp_path / "out")
    with pytest.raises(RuntimeError, match="issues during automatic conversion of the weights"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_transformers_alone_does_not_load_llm_compressors_experts_either():
    """An error, or random experts where the layers have other names than it expects."""
    with pytest.raises(RuntimeError, match="issues during automatic conversion of the weights"):
        AutoModelForCausalLM.from_pretrained(THEIRS / "qwen3-moe-w8a8")
    _, told = AutoModelForCausalLM.from_pretrained(THEIRS / "mixtral-w8a8", output_loading_info=True)
    assert "model.layers.0.mlp.experts.down_proj" in told["missing_keys"]


@pytest.mark.parametrize("name", SCHEMES)
def test_no_key_is_written_that_the_library_does_not_know(tmp_path, name):
    model = llama()
    w8a8.quantize(model, SCHEMES[name], calibration=IDS if SCHEMES[name].static else None, smooth="none")
    w8a8.save(model, tmp_path / "out")
    written = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    known = QuantizationConfig.model_validate(written).model_dump(mode="json")
    assert written.keys() <= known.keys()
    for group, held in written["config_groups"].items():
        assert held.keys() <= known["config_groups"][group].keys()
        for operand in ("weights", "input_activations"):
            if held[operand] is not None:
                assert held[operand].items() <= known["config_groups"][group][operand].items()
