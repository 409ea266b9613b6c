import json
import math

import pytest
import torch
from torch import nn

import w8a8
from tests.conftest import MODELS, llama, mixtral, opt
from w8a8.model.coverage import coverage


@pytest.mark.kernels
@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.once] * (name != "opt")) for name in MODELS])
def test_every_parameter_is_counted_once_before_and_after(name):
    model = MODELS[name]()
    parameters = sum(p.numel() for p in model.parameters())
    before = coverage(model, {}).totals()["all"]
    assert before.parameters == parameters
    assert before.bytes == sum(p.numel() * p.element_size() for p in model.parameters())
    after = w8a8.quantize(model).coverage.totals()
    assert after["all"].parameters == parameters
    assert after["quantized"].parameters + after["float"].parameters == parameters
    assert after["all"].macs == before.macs
    assert after["all"].bytes < before.bytes


def test_shares_of_a_model_that_can_be_counted_by_hand():
    model = nn.Sequential(nn.Linear(8, 4), nn.LayerNorm(4), nn.Embedding(5, 4))
    found = w8a8.quantize(model, "w8a8", kernel="reference").coverage
    totals = found.totals()
    assert (totals["quantized"].parameters, totals["quantized"].macs) == (36, 32)
    assert totals["quantized"].bytes == 4 * 8 + 4 * 4 + 4 * 4 + 4 * 4  # codes, scales, sums, bias
    assert totals["float"].parameters == 8 + 20
    assert [m.reason for m in found.left] == ["a normalisation, elementwise", "a lookup table, no product"]
    assert "1 of 3 modules quantised: 56.2 % of the parameters, 100.0 % of the multiply-adds" in str(found)


def test_a_tied_head_counts_its_products_but_not_its_parameters():
    found = w8a8.quantize(opt()).coverage
    head = next(m for m in found.left if m.name == "lm_head")
    assert (head.parameters, head.macs) == (0, 96 * 48)
    assert "tied to model.decoder.embed_tokens" in head.reason


def test_stacked_experts_of_which_nothing_is_chosen_show_up_as_float():
    model = mixtral()
    found = w8a8.quantize(model, exclude=["*.experts.*"]).coverage
    experts = [m for m in found.left if m.reason.startswith("stacked experts")]
    assert len(experts) == 1
    three_d = [p for p in model.parameters() if p.ndim == 3]
    assert experts[0].parameters == sum(p.numel() for p in three_d) > 0
    assert experts[0].macs == experts[0].parameters // 2  # two experts of four see a token
    assert "stacked experts, of which no layer was chosen" in str(found)


def test_a_quantised_expert_counts_for_the_tokens_that_see_it():
    found = w8a8.quantize(mixtral(), exclude=["*.experts.3.*"]).coverage
    quantized = [m for m in found.quantized if ".experts." in m.name]
    left = [m for m in found.left if ".experts.3." in m.name]
    assert [len(quantized), len(left)] == [9, 3]
    assert all((m.parameters, m.macs) == (32 * 40, 32 * 40 // 2) for m in (*quantized, *left))
    assert {m.reason for m in left} == {"excluded by '*.experts.3.*'"}


def test_every_module_left_has_a_reason_and_every_quantised_one_a_scheme():
    found = w8a8.quantize(llama()).coverage
    assert all(m.reason and m.scheme is None for m in found.left)
    assert all(m.scheme == "w8a8" for m in found.quantized)
    assert {m.name for m in found.left if "head" in m.reason} == {"lm_head"}


def test_other_modules_say_what_they_are():
    model = nn.Sequential(nn.Conv1d(2, 2, 3), nn.Linear(4, 4))
    assert coverage(model, {}).left[0].reason == "a convolution"
    assert coverage(model, {}).left[1].reason == "not selected"
    assert "0 %" in str(coverage(nn.Sequential(nn.LayerNorm(3)), {}))


def test_plain_data_for_json():
    data = w8a8.quantize(llama()).coverage.to_dict()
    assert data["totals"]["all"]["modules"] == len(data["modules"])
    assert data["modules"][1]["kind"] == "QuantLinear"


def spoilt(model, name):
    """Give each row of a layer's weight an element 50 times as large as the others, which are of 0.02."""
    with torch.no_grad():
        model.get_submodule(name).weight[:, 0] = 1.0
    return model


@pytest.mark.parametrize("scheme", ["w8a8", "w8a8-asym", "w8a8-o1", "w8a16"])
def test_a_weight_with_an_outlier_in_each_row_is_the_worst(scheme):
    bad = "model.layers.1.mlp.up_proj"
    found = w8a8.quantize(spoilt(llama(), bad), scheme).coverage
    worst = found.worst_weights()
    assert worst[0].name == bad
    assert worst[0].weight_sqnr_db < worst[1].weight_sqnr_db - 4
    assert len(worst) == 10 < len(found.quantized)
    figures = [m.weight_sqnr_db for m in worst]
    assert figures == sorted(figures)
    assert found.worst_weights(100)[-1].weight_sqnr_db == max(m.weight_sqnr_db for m in found.quantized)


def test_one_bad_expert_of_many_is_the_worst():
    model = mixtral()
    with torch.no_grad():
        model.model.layers[0].mlp.experts.down_proj[2, :, 0] = 1.0
    assert w8a8.quantize(model).coverage.worst_weights(1)[0].name == "model.layers.0.mlp.experts.2.w2"


@pytest.mark.parametrize("name", MODELS)
def test_every_quantised_weight_is_measured_and_nothing_else(name):
    found = w8a8.quantize(MODELS[name]()).coverage
    assert all(35 < m.weight_sqnr_db < 50 for m in found.quantized)
    assert all(m.weight_sqnr_db is None for m in found.left)


def test_each_layer_of_a_mapping_is_measured_under_its_own_scheme():
    model = llama()
    alone = w8a8.quantize(llama_like(model), "w8a8-o1").coverage
    mixed = w8a8.quantize(llama_like(model), {"*.0.*": "w8a8-o1", "*": "w8a8"}).coverage
    for one, other in zip(alone.quantized, mixed.quantized, strict=True):
        assert (one.weight_sqnr_db == other.weight_sqnr_db) is (".0." in one.name)


def llama_like(model):
    """Another with the same weights."""
    other = llama()
    other.load_state_dict(model.state_dict())
    return other


def test_a_smoothed_weight_is_compared_with_its_codes_and_not_the_one_before(tokens):
    model = llama()
    smoothed = llama_like(model)
    w8a8.smooth_(smoothed, [tokens], alpha=0.9)
    wanted = w8a8.quantize(smoothed).coverage
    assert w8a8.quantize(llama_like(model), calibration=[tokens], smooth=0.9).coverage == wanted
    assert w8a8.quantize(model).coverage != wanted


def test_a_weight_that_loses_nothing_is_infinite_and_null_in_json():
    model = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 4))
    nn.init.eye_(model[0].weight)
    found = w8a8.quantize(model).coverage
    assert found.modules[0].weight_sqnr_db == math.inf
    assert [m.name for m in found.worst_weights()] == ["1", "0"]
    told = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert told["modules"][0]["weight_sqnr_db"] is None
    assert told["modules"][1]["weight_sqnr_db"] == found.modules[1].weight_sqnr_db


def test_what_was_loaded_was_not_measured(tmp_path):
    model = llama()
    made = w8a8.quantize(model).coverage
    w8a8.save(model, tmp_path / "out")
    found = coverage(w8a8.load(tmp_path / "out"), {})
    assert len(found.quantized) == len(made.quantized)
    assert all(m.weight_sqnr_db is None for m in found.modules)
    assert found.worst_weights() == ()
