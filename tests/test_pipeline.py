import copy

import pytest
import torch
from torch import nn

import w8a8
from tests.conftest import MODELS, gpt2, llama, mixtral, opt, relative_error
from w8a8.core.scheme import PerChannel, PerColumn, PerToken, QuantSpec, Scheme
from w8a8.errors import KernelError, ModelError, NonFiniteError, PatternError, SchemeError
from w8a8.layers.linear import Mode, quant_linears


@pytest.mark.parametrize("name", MODELS)
def test_a_quantised_model_stays_near_the_float_one(name, tokens):
    model = MODELS[name]()
    with torch.inference_mode():
        expected = model(tokens).logits
        result = w8a8.quantize(model)
        assert result.model is model
        assert relative_error(model(tokens).logits, expected) < 0.03
    assert all(sum(kernels.values()) == 1 for kernels in result.ledger().values())
    assert list(result.ledger()) == [name for name, _ in quant_linears(model)]


@pytest.mark.kernels
@pytest.mark.parametrize("scheme", ["w8a8", "w8a8-asym", "w8a8-tensor", "w8a8-o1", "w8a8-o2"])
def test_simulated_and_integer_logits_are_the_same_bits(scheme, tokens):
    model = opt()
    simulated = w8a8.simulate(copy.deepcopy(model), scheme).model
    integer = w8a8.quantize(model, scheme).model
    with torch.inference_mode():
        assert torch.equal(simulated(tokens).logits, integer(tokens).logits)


@pytest.mark.kernels
def test_all_kernels_give_the_same_logits(tokens):
    model = llama()
    logits = []
    for kernel in (name for name, reason in w8a8.kernels.available().items() if reason is None):
        result = w8a8.quantize(copy.deepcopy(model), kernel=kernel, strict=True)
        with torch.inference_mode():
            logits.append(result.model(tokens).logits)
        assert {k for kernels in result.ledger().values() for k in kernels} == {kernel}
    assert all(torch.equal(logits[0], other) for other in logits[1:])


@pytest.mark.kernels
def test_generation_with_a_cache_works_in_integers(tokens):
    model = w8a8.quantize(llama()).model
    out = model.generate(tokens, max_new_tokens=5, do_sample=False, pad_token_id=0)
    assert out.shape == (2, 29)


def test_a_bfloat16_model_keeps_its_dtype(tokens):
    model = w8a8.quantize(llama().to(torch.bfloat16)).model
    with torch.inference_mode():
        assert model(tokens).logits.dtype is torch.bfloat16


def test_an_untied_head_is_told_and_the_config_follows(tokens):
    model = opt()
    with torch.inference_mode():
        expected = model(tokens).logits
    embedding = model.model.decoder.embed_tokens.weight
    before = embedding.clone()
    result = w8a8.quantize(model, include=["*", "lm_head"])
    assert result.untied == {"lm_head": "model.decoder.embed_tokens"}
    assert model.config.tie_word_embeddings is False
    assert torch.equal(embedding, before)
    with torch.inference_mode():
        assert relative_error(model(tokens).logits, expected) < 0.03


def test_a_tied_head_that_was_not_named_stays_tied():
    model = opt()
    w8a8.quantize(model)
    assert model.lm_head.weight is model.model.decoder.embed_tokens.weight
    assert model.config.tie_word_embeddings is True


def test_schemes_that_cannot_run_are_refused_with_the_way_out():
    model = llama()
    column = Scheme(QuantSpec(8, PerColumn()), QuantSpec(8, PerToken()))
    with pytest.raises(SchemeError, match=r"per-column weights: .* use PerChannel\(\) for the weights, or simulate"):
        w8a8.quantize(model, column)
    channel = Scheme(QuantSpec(8, PerChannel()), QuantSpec(8, PerChannel()))
    with pytest.raises(SchemeError, match=r"per-channel activations: .* use PerToken\(\)"):
        w8a8.quantize(model, channel)
    assert not list(quant_linears(model))
    assert w8a8.simulate(model, column).scheme is column


def test_weight_only_is_not_integer_but_runs():
    result = w8a8.quantize(gpt2(), "w8a16")
    assert {layer.mode for _, layer in quant_linears(result.model)} == {Mode.WEIGHT_ONLY}
    assert result.ledger() == {}


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"scheme": "w4a4"}, SchemeError),
        ({"include": ["nothing"]}, PatternError),
        ({"exclude": ["nothing"]}, PatternError),
        ({"kernel": "cuda"}, KernelError),
    ],
)
def test_bad_requests_change_nothing(options, error):
    model = llama()
    before = dict(model.named_modules())
    with pytest.raises(error):
        w8a8.quantize(model, **options)
    assert dict(model.named_modules()) == before


def test_a_bad_weight_in_the_last_layer_changes_nothing():
    model = opt()
    with torch.no_grad():
        model.model.decoder.layers[-1].fc2.weight[0, 0] = float("inf")
    before = dict(model.named_modules())
    with pytest.raises(NonFiniteError, match=r"inf at index \(0, 0\)"):
        w8a8.quantize(model)
    assert dict(model.named_modules()) == before


def test_any_module_with_linears_can_be_quantised():
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    x = torch.randn(5, 8)
    expected = model(x).detach()
    w8a8.quantize(model)
    assert relative_error(model(x), expected) < 0.03


def test_what_is_no_module_is_refused():
    with pytest.raises(ModelError, match=r"expected a torch\.nn\.Module, found str: load the model first"):
        w8a8.quantize("facebook/opt-125m")


def test_a_mapping_gives_each_layer_the_scheme_of_its_first_pattern(tokens):
    model = opt()
    result = w8a8.quantize(model, {"*.layers.0.fc2": None, "*.fc2": "w8a8-asym", "*.fc1": "w8a16", "*_proj": "w8a8"})
    schemes = {name: layer.scheme.name for name, layer in quant_linears(model)}
    assert schemes == {name: scheme.name for name, scheme in result.schemes.items()}
    assert "model.decoder.layers.0.fc2" not in schemes
    assert schemes["model.decoder.layers.1.fc2"] == "w8a8-asym"
    assert schemes["model.decoder.layers.1.fc1"] == "w8a16"
    assert result.scheme.name == "w8a8"
    reasons = {module.name: module.reason for module in result.coverage.modules if module.scheme is None}
    assert "'*.layers.0.fc2'" in reasons["model.decoder.layers.0.fc2"]


def test_layers_that_no_pattern_of_a_mapping_matches_stay_float():
    model = opt()
    result = w8a8.quantize(model, {"*.fc1": "w8a8"})
    assert set(result.schemes) == {"model.decoder.layers.0.fc1", "model.decoder.layers.1.fc1"}
    assert {name for name, _ in quant_linears(model)} == set(result.schemes)


def test_a_mapping_with_static_layers_measures_those_only(tokens):
    model = llama()
    w8a8.quantize(model, {"*.mlp.*": "w8a8-static", "*": "w8a8"}, calibration=tokens, smooth="none")
    static = {name for name, layer in quant_linears(model) if layer.input_scale is not None}
    assert static == {name for name, _ in quant_linears(model) if ".mlp." in name}


def test_a_mapping_survives_saving_and_loading(tmp_path, tokens):
    model = llama()
    w8a8.quantize(model, {"*.mlp.*": None, "*.o_proj": "w8a8-asym", "*": "w8a8"})
    w8a8.save(model, tmp_path / "out")
    loaded = w8a8.load(tmp_path / "out")
    schemes = [{name: layer.scheme for name, layer in quant_linears(each)} for each in (model, loaded)]
    assert schemes[0] == schemes[1]
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)


def test_wrong_mappings_are_refused_and_change_nothing():
    model = llama()
    with pytest.raises(PatternError, match=r"'\*.fc1' matches none"):
        w8a8.quantize(model, {"*.fc1": "w8a8", "*": "w8a8"})
    with pytest.raises(SchemeError, match="leave all 14 layers float"):
        w8a8.quantize(model, {"*": None})
    with pytest.raises(SchemeError, match="unknown scheme"):
        w8a8.quantize(model, {"*": "w8a7"})
    assert not list(quant_linears(model))


@pytest.mark.parametrize("failing", ["coverage", "inscription"])
def test_what_cannot_be_told_is_found_out_before_the_model_is_changed(failing, monkeypatch):
    def fails(*_):
        raise IndexError(failing)

    monkeypatch.setattr(f"w8a8.pipeline.{failing}", fails)
    model = mixtral()
    before = {name: id(module) for name, module in model.named_modules()}
    with pytest.raises(IndexError, match=failing):
        w8a8.quantize(model)
    assert {name: id(module) for name, module in model.named_modules()} == before
    assert not hasattr(model.config, "quantization_config")
