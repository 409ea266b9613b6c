import json

import pytest
from transformers import BertModel, ViTConfig, ViTModel, WhisperConfig, WhisperModel

import w8a8
from tests.conftest import mixtral, opt
from tests.sentences import bert
from w8a8 import kernels
from w8a8.core.plain import plain
from w8a8.demo.run import demo_directory
from w8a8.errors import CheckpointError, ModelError
from w8a8.jobs.inspection import fuse_model, inspect_model, observe_model
from w8a8.kernels.native import unavailable_because


def test_a_quantised_directory_tells_its_schemes_and_what_vllm_says(tmp_path):
    w8a8.quantize_directory(demo_directory(), tmp_path / "out", "w8a8-asym", include=["*.0.fc1"])
    found = inspect_model(tmp_path / "out")
    assert found.quantized
    assert [scheme.name for scheme in found.schemes] == ["w8a8-asym"]
    assert [module.name for module in found.coverage.quantized] == ["model.decoder.layers.0.fc1"]
    told = json.loads(json.dumps(plain(found.to_dict())))
    assert list(told)[:4] == ["directory", "quantized", "schemes", "vllm"]
    assert told["directory"] == str(tmp_path / "out")
    assert {"modules", "totals"} <= told.keys()


def test_of_a_float_one_it_tells_what_would_be_without_reading_a_weight(tmp_path):
    mixtral().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    found = inspect_model(tmp_path)
    assert (found.quantized, found.schemes, found.vllm) == (False, (), ())
    reasons = {module.name: module.reason for module in found.coverage.modules}
    assert reasons["model.layers.0.mlp.experts"] == "float now; `w8a8 quantize` takes it"
    assert "output head" in reasons["lm_head"]


def test_pairs_are_seen_in_a_forward(tmp_path):
    opt().save_pretrained(tmp_path)
    found = observe_model(tmp_path)
    assert found.groups
    with pytest.raises(CheckpointError):
        observe_model(tmp_path / "nothing")


@pytest.mark.slow
@pytest.mark.kernels
@pytest.mark.skipif(unavailable_because() is not None, reason="there is no native kernel")
@pytest.mark.skipif(kernels.first_choice("auto") != "native", reason="another kernel is preferred: nothing is packed")
@pytest.mark.not_under("meta", reason="where a default device is set, blocks run as they are")
def test_what_is_fused_is_seen_in_a_forward_of_a_float_directory_and_of_an_int8_one(tmp_path):
    model = BertModel(bert())
    model.save_pretrained(tmp_path / "float")
    w8a8.quantize(model)
    w8a8.save(model, tmp_path / "int8")
    for name in ("float", "int8"):
        found = fuse_model(tmp_path / name)
        assert (found.blocks, found.whole, found.refused) == (2, ("",), {})
        assert {"attention", "padding is left out, and its outputs are zero"} <= found.fused.keys()
    ViTModel(
        ViTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, image_size=32)
    ).save_pretrained(tmp_path / "vit")
    assert fuse_model(tmp_path / "vit").line == "2 blocks run fused"
    opt().save_pretrained(tmp_path / "opt")
    found = fuse_model(tmp_path / "opt")  # it keeps a cache
    assert found.unfused == 2
    assert all(found.refused.values())


@pytest.mark.kernels
@pytest.mark.skipif(unavailable_because() is not None, reason="there is no native kernel")
def test_a_model_of_sound_is_told_where_to_look_instead(tmp_path):
    sizes = {
        "d_model": 32,
        "encoder_layers": 1,
        "decoder_layers": 1,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
    }
    config = WhisperConfig(
        **sizes,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        vocab_size=60,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
    )
    WhisperModel(config).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"WhisperModel reads input_features.*print w8a8.fusions\(model\)"):
        fuse_model(tmp_path)
