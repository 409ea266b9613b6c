"""A quantised part of a model is saved as what it is, by whichever `save_pretrained` it is saved."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCausalLM

import w8a8
from tests.conftest import contents, llama, logits, mixtral, opt, relative_error
from tests.model.test_ties import qwen2_vl
from w8a8.core.scheme import PerColumn, QuantSpec, Scheme
from w8a8.errors import ModelError, SchemeError
from w8a8.hf import enabled
from w8a8.layers.linear import quant_linears

PARTS = {
    "layers": lambda model: model.model.layers,
    "one layer": lambda model: model.model.layers[-1],
    "base": lambda model: model.model,
}


@pytest.mark.parametrize("part", PARTS.values(), ids=PARTS.keys())
@pytest.mark.parametrize("make", [llama, mixtral], ids=lambda make: make.__name__)
class TestAPartIsQuantisedAndTheWholeIsSaved:
    def test_by_transformers(self, tmp_path, tokens, make, part):
        model = make()
        w8a8.quantize(part(model))
        wanted = logits(model, tokens)
        model.save_pretrained(tmp_path)
        assert torch.equal(logits(w8a8.load(tmp_path), tokens), wanted)
        with enabled():
            assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path), tokens), wanted)

    def test_by_save(self, tmp_path, make, part):
        model = make()
        w8a8.quantize(part(model))
        model.save_pretrained(tmp_path / "theirs")
        w8a8.save(model, tmp_path / "ours")
        for name in ("config.json", "model.safetensors"):
            assert (tmp_path / "theirs" / name).read_bytes() == (tmp_path / "ours" / name).read_bytes()


def test_transformers_alone_reads_what_it_saved_of_a_part(tmp_path, tokens):
    model = llama()
    w8a8.quantize(model.model)
    model.save_pretrained(tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert relative_error(logits(theirs, tokens), logits(model, tokens)) < 0.05


def test_the_part_is_saved_by_itself(tmp_path, tokens):
    model = opt()
    w8a8.quantize(model.model)
    model.model.save_pretrained(tmp_path)
    with enabled(), torch.inference_mode():
        wanted = model.model(tokens).last_hidden_state
        assert torch.equal(AutoModel.from_pretrained(tmp_path)(tokens).last_hidden_state, wanted)


def test_the_description_of_a_part_does_not_stay_in_its_config(tmp_path):
    model = qwen2_vl()
    w8a8.quantize(model.model.language_model)
    ids = torch.arange(12)[None]
    with torch.inference_mode():
        wanted = model(input_ids=ids).logits
    for place, save in (("theirs", type(model).save_pretrained), ("ours", w8a8.save)):
        save(model, tmp_path / place)
        config = json.loads((tmp_path / place / "config.json").read_text())
        assert "quantization_config" not in config["text_config"]
        with torch.inference_mode():
            assert torch.equal(w8a8.load(tmp_path / place)(input_ids=ids).logits, wanted)


def test_a_layer_made_by_hand_is_described(tmp_path, tokens):
    model = llama()
    model.model.layers[0].mlp.up_proj = w8a8.QuantLinear.from_float(model.model.layers[0].mlp.up_proj)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(w8a8.load(tmp_path), tokens), logits(model, tokens))


def test_what_has_no_file_format_writes_no_weights(tmp_path):
    model = llama()
    w8a8.simulate(model.model, Scheme(QuantSpec(granularity=PerColumn()), None))
    with pytest.raises(SchemeError, match="have no place in a compressed-tensors file"):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.safetensors"))


def test_a_state_dict_by_itself_needs_no_description():
    model = llama()
    w8a8.quantize(model.model.layers)
    names = set(model.state_dict())
    assert {f"{name}.weight_scale" for name, _ in quant_linears(model)} <= names


def test_a_float_model_is_saved_as_ever(tmp_path):
    llama().save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    assert not any("scale" in name for name in load_file(tmp_path / "model.safetensors"))


class TestTheStateDictIsGiven:
    @pytest.mark.parametrize("part", [*PARTS.values(), lambda model: model], ids=[*PARTS, "all"])
    @pytest.mark.parametrize("scheme", ["w8a8", "w8a16"])
    def test_it_is_written_as_if_it_were_not(self, tmp_path, part, scheme):
        model = llama()
        w8a8.quantize(part(model), scheme)
        model.save_pretrained(tmp_path / "asked")
        model.save_pretrained(tmp_path / "given", state_dict=model.state_dict())
        model.save_pretrained(tmp_path / "another", state_dict=dict(model.state_dict()))
        assert contents(tmp_path / "given") == contents(tmp_path / "asked") == contents(tmp_path / "another")

    def test_what_is_loaded_computes_the_same(self, tmp_path, tokens):
        model = mixtral()
        w8a8.quantize(model.model.layers)
        model.save_pretrained(tmp_path, state_dict=model.state_dict())
        assert torch.equal(logits(w8a8.load(tmp_path), tokens), logits(model, tokens))

    def test_float_weights_in_it_are_refused_before_any_is_written(self, tmp_path):
        model, name = llama(), "model.layers.0.self_attn.q_proj.weight"
        given = {key: value.clone() for key, value in model.state_dict().items()}
        w8a8.quantize(model)
        with pytest.raises(ModelError, match=rf"{name} is float32 of shape \(64, 64\), and .* holds int8 of shape"):
            model.save_pretrained(tmp_path, state_dict=given)
        assert not list(tmp_path.glob("*.safetensors"))

    def test_a_scale_that_is_not_in_it_is_missed(self, tmp_path):
        model, name = llama(), "model.layers.1.self_attn.q_proj.weight_scale"
        w8a8.quantize(model)
        given = model.state_dict()
        del given[name]
        with pytest.raises(ModelError, match=f"{name} is missing"):
            model.save_pretrained(tmp_path, state_dict=given)

    def test_a_part_of_it_without_quantised_layers_is_written(self, tmp_path):
        model = llama()
        w8a8.quantize(model)
        model.save_pretrained(tmp_path, state_dict={"lm_head.weight": model.lm_head.weight})
        assert list(load_file(tmp_path / "model.safetensors")) == ["lm_head.weight"]
