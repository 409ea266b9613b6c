import pytest
from torch import nn

import w8a8
from tests.conftest import MODELS, llama, mixtral, opt
from w8a8.coverage import coverage


@pytest.mark.parametrize("name", MODELS)
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
    found = w8a8.quantize(nn.Sequential(nn.Linear(8, 4), nn.LayerNorm(4), nn.Embedding(5, 4)), "w8a8").coverage
    totals = found.totals()
    assert (totals["quantized"].parameters, totals["quantized"].macs) == (36, 32)
    panel = 32 * 8  # 4 columns, padded to a panel
    assert totals["quantized"].bytes == panel + 4 * 4 + 4 * 4 + 4 * 4  # codes, scales, sums, bias
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
    experts = [m for m in found.left if "3-D expert" in m.reason]
    assert len(experts) == 1
    three_d = [p for p in model.parameters() if p.ndim == 3]
    assert experts[0].parameters == sum(p.numel() for p in three_d) > 0
    assert experts[0].macs == experts[0].parameters // 2  # two experts of four see a token
    assert "stacked 3-D expert parameters, of which no layer was chosen" in str(found)


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
    assert coverage(model, {}).left[0].reason == "not a linear layer"
    assert coverage(model, {}).left[1].reason == "not selected"
    assert "0 %" in str(coverage(nn.Sequential(nn.LayerNorm(3)), {}))


def test_plain_data_for_json():
    data = w8a8.quantize(llama()).coverage.to_dict()
    assert data["totals"]["all"]["modules"] == len(data["modules"])
    assert data["modules"][1]["kind"] == "QuantLinear"
