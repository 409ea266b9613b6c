"""A quantised layer is tied to nothing, whatever the model's class and its configs say."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
)

import w8a8
from tests.conftest import ONE_BLOCK, llama, logits, opt
from w8a8.directories import quantize_directory
from w8a8.hf import enabled

_TEXT = {**ONE_BLOCK, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def qwen2_vl():
    """The flag stands in the config of a part, too."""
    text = {**_TEXT, "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}, "tie_word_embeddings": True}
    vision = {"depth": 1, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "mlp_ratio": 2}
    ids = dict(zip(("image", "video", "vision_start", "vision_end"), range(90, 94), strict=True))
    ids = {f"{name}_token_id": number for name, number in ids.items()}
    config = Qwen2VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True, **ids)
    return Qwen2VLForConditionalGeneration(config).eval()


def bart():
    """Two embeddings hang on the same flag."""
    small = {f"{part}_{what}": n for part in ("encoder", "decoder") for what, n in _BART.items()}
    return BartForConditionalGeneration(
        BartConfig(vocab_size=96, d_model=32, max_position_embeddings=64, forced_eos_token_id=2, **small)
    ).eval()


_BART = {"layers": 1, "attention_heads": 4, "ffn_dim": 40}


def t5():
    """Its config knows no other value of the flag than True."""
    config = {"vocab_size": 96, "d_model": 32, "d_kv": 8, "d_ff": 40, "num_layers": 1, "num_heads": 4}
    return T5ForConditionalGeneration(T5Config(**config, decoder_start_token_id=0)).eval()


def bert():
    """The bias of its head is another module's."""
    config = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    return BertForMaskedLM(BertConfig(**config, intermediate_size=40, max_position_embeddings=64)).eval()


MODELS = {"qwen2_vl": qwen2_vl, "bart": bart, "t5": t5, "bert": bert, "opt": opt}


def outputs(model):
    ids = {"input_ids": torch.arange(12)[None]}
    if model.config.is_encoder_decoder:
        ids["decoder_input_ids"] = ids["input_ids"]
    with torch.inference_mode():
        return model(**ids).logits


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS.keys())
class TestATiedHeadInInt8:
    def test_it_is_saved_and_loaded_by_every_way(self, tmp_path, make):
        make().save_pretrained(tmp_path / "float")
        model = type(make()).from_pretrained(tmp_path / "float")
        wanted = outputs(w8a8.quantize(model, head="int8").model)
        w8a8.save(model, tmp_path / "int8")
        assert torch.equal(outputs(w8a8.load(tmp_path / "int8")), wanted)
        with enabled():
            assert torch.equal(outputs(type(model).from_pretrained(tmp_path / "int8")), wanted)
        quantize_directory(tmp_path / "float", tmp_path / "streamed", head="int8")
        for name in ("config.json", "model.safetensors"):
            assert (tmp_path / "streamed" / name).read_bytes() == (tmp_path / "int8" / name).read_bytes()

    def test_a_head_that_load_quantises_is_saved_and_loaded(self, tmp_path, make):
        w8a8.save(w8a8.quantize(make()).model, tmp_path / "float-head")
        model = w8a8.load(tmp_path / "float-head", head="int8")
        w8a8.save(model, tmp_path / "int8-head")
        assert torch.equal(outputs(w8a8.load(tmp_path / "int8-head")), outputs(model))

    def test_tying_again_leaves_it_alone(self, make):
        model = w8a8.quantize(make(), head="int8").model
        wanted = outputs(model)
        model.tie_weights()
        assert torch.equal(outputs(model), wanted)


def test_the_flag_becomes_false_where_nothing_else_hangs_on_it():
    flags = {make: w8a8.quantize(make(), head="int8").model.config for make in (qwen2_vl, bart)}
    assert flags[qwen2_vl].tie_word_embeddings is False
    assert flags[qwen2_vl].text_config.tie_word_embeddings is False
    assert flags[bart].tie_word_embeddings is True  # its embeddings are one


def test_a_head_that_the_files_bring_is_not_tied(tmp_path, tokens):
    model = w8a8.quantize(llama()).model
    wanted = logits(model, tokens)
    w8a8.save(model, tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tie_word_embeddings": True}))
    assert torch.equal(logits(w8a8.load(tmp_path / "model"), tokens), wanted)
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    tied = w8a8.load(tmp_path / "model")
    assert tied.lm_head.weight is tied.model.embed_tokens.weight  # the same twice
