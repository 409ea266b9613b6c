"""A model by its name, float or quantised."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertModel

import w8a8
from tests.conftest import llama
from w8a8.checkpoint.opening import open_model
from w8a8.errors import CheckpointError, ModelError
from w8a8.evaluation import perplexity
from w8a8.layers.linear import quant_linears


@pytest.fixture
def saved(tmp_path):
    model = llama()
    model.save_pretrained(tmp_path / "float")
    w8a8.save(w8a8.quantize(model).model, tmp_path / "int8")
    return tmp_path


def test_opening_tells_float_and_quantised_apart(saved):
    assert not open_model(saved / "float").quantized
    opened = open_model(str(saved / "int8"), dtype="bfloat16")
    assert opened.quantized
    assert opened.tokenizer is None
    assert opened.model.model.norm.weight.dtype is torch.bfloat16
    assert next(quant_linears(opened.model))[1].weight_scale.dtype is torch.float32
    assert open_model(saved / "float", dtype="float16").model.dtype is torch.float16


def test_opening_badly_is_explained(saved):
    with pytest.raises(ModelError, match="unknown dtype 'int8'; use one of auto, float32"):
        open_model(saved / "float", dtype="int8")
    with pytest.raises(ModelError, match="device 'nowhere' cannot be used"):
        open_model(saved / "float", device="nowhere")
    (saved / "float" / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"neither model\.safetensors nor"):
        open_model(saved / "float")
    with pytest.raises(CheckpointError, match="there is no such directory, and the hub did not give it"):
        open_model("nobody/nothing")


def test_a_file_that_lacks_weights_is_not_filled_with_random_ones(saved):
    path = saved / "float" / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.norm.weight"], tensors["lm_head.weight"]
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"2 weights of LlamaForCausalLM are not in the files .* lm_head.weight"):
        open_model(saved / "float")


def test_a_model_is_opened_in_the_class_that_its_config_names(tmp_path):
    config = BertConfig(vocab_size=50, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)
    BertModel(config).save_pretrained(tmp_path / "bert")
    opened = open_model(tmp_path / "bert")
    assert type(opened.model) is BertModel
    w8a8.quantize(opened.model)
    w8a8.save(opened.model, tmp_path / "out")
    ids = torch.arange(10)[None]
    loaded = w8a8.load(tmp_path / "out")
    with torch.inference_mode():
        assert torch.equal(loaded(ids).last_hidden_state, opened.model(ids).last_hidden_state)
    with pytest.raises(ModelError, match="BertModel is a model that reads text and predicts no tokens"):
        perplexity(loaded, ids[0], seq_len=8)


def test_torn_float_files_and_tokenizers_are_named(saved):
    path = saved / "float" / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is torn or not a safetensors file"):
        open_model(saved / "float")
    path.write_bytes(whole)
    (saved / "float" / "tokenizer.json").write_text('{"version": ')
    with pytest.raises(ModelError, match="float: transformers cannot read its tokenizer"):
        open_model(saved / "float")
