import json
import math

import pytest
import torch
from torch.nn import functional as F

import w8a8
from tests.analysis.conftest import TWO_BITS
from tests.conftest import llama, opt
from w8a8.analysis.errors import channel_absmax
from w8a8.analysis.layers import rankings, sensitivity
from w8a8.analysis.sample import draw
from w8a8.core.scheme import PerChannel, QuantSpec
from w8a8.demo.corpus import held_out_text
from w8a8.demo.run import demo_model
from w8a8.errors import CalibrationError, PatternError
from w8a8.evaluation import encode
from w8a8.layers.linear import quant_linears
from w8a8.model.choice import Choice
from w8a8.model.swapping import build, swapped
from w8a8.records.layers import Channels, Sensitivity

IDS = torch.randint(0, 96, (400,), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def measured():
    torch.manual_seed(0)
    model = llama()
    return model, sensitivity(model, IDS, windows=2, seq_len=32)


def layer(found, name):
    return next(each for each in found.layers if each.name == name)


def test_a_planted_layer_of_the_demo_is_worst_in_both_orders():
    opened = demo_model()
    bad = "model.decoder.layers.3.fc2"
    text = encode(opened.tokenizer, held_out_text())
    found = sensitivity(opened.model, text, {bad: TWO_BITS, "*": "w8a8"}, windows=1, seq_len=64)
    assert found.rankings.kl_alone[0] == found.rankings.kl_spared[0] == bad
    assert found.worst(1)[0].name == bad
    assert bad not in found.rankings.disagree


def test_a_planted_layer_of_a_llama_with_outliers_is_worst_in_both_orders():
    model = llama()
    profile = torch.ones(64)
    profile[[3, 40]] = torch.tensor([20.0, 60.0])
    w8a8.outliers.inject_(model, profile)
    bad = "model.layers.1.mlp.up_proj"
    found = sensitivity(model, IDS, {bad: TWO_BITS, "*": "w8a8"}, windows=2, seq_len=32)
    assert found.rankings.kl_alone[0] == found.rankings.kl_spared[0] == bad
    assert layer(found, "model.layers.0.self_attn.q_proj").outlier_ratio > 10


def test_the_divergences_are_those_of_whole_models_in_float64(measured):
    model, found = measured
    name = "model.layers.0.mlp.down_proj"
    windows = draw(model, IDS, windows=2, seq_len=32).windows
    layers = build(model, Choice.of(model).schemes)

    def kl(swapped_in):
        total = 0.0
        for ids in (window.ids for window in windows):
            with torch.no_grad():
                p = model(ids[None]).logits[0, :-1].double().log_softmax(-1)
                with swapped(model, swapped_in):
                    q = model(ids[None]).logits[0, :-1].double().log_softmax(-1)
            total += float(F.kl_div(q, p, log_target=True, reduction="sum"))
        return total / found.tokens

    spared = {key: value for key, value in layers.items() if key != name}
    assert found.kl_nats == pytest.approx(kl(layers), rel=1e-3)
    assert layer(found, name).kl_alone == pytest.approx(kl({name: layers[name]}), rel=1e-3)
    assert layer(found, name).kl_spared == pytest.approx(kl(layers) - kl(spared), rel=1e-2)


def test_every_layer_is_there_with_its_block_and_the_layers_that_read_the_same(measured):
    _, found = measured
    assert [each.name for each in found.layers] == list(Choice.of(llama()).schemes)
    assert {each.block for each in found.layers} == {0, 1}
    attention = "model.layers.1.self_attn."
    groups = {each.name: each.group for each in found.layers}
    assert {groups[attention + kind] for kind in ("q_proj", "k_proj", "v_proj")} == {attention + "q_proj"}
    assert groups[attention + "o_proj"] == attention + "o_proj"
    assert groups["model.layers.1.mlp.up_proj"] == groups["model.layers.1.mlp.gate_proj"]
    assert found.replayed


def test_sqnrs_are_those_of_the_equation(measured):
    model, found = measured
    name = "model.layers.0.self_attn.q_proj"
    linear, each = model.get_submodule(name), layer(found, name)
    weight = linear.weight.detach()
    rounded = w8a8.fake_quantize(weight, QuantSpec(8, PerChannel()))
    assert each.weight_sqnr_db == pytest.approx(w8a8.sqnr_db(weight, rounded))
    assert 30 < each.output_sqnr_db < 60
    assert 30 < each.input_sqnr_db < 60
    assert each.cosine == pytest.approx(1, abs=1e-3)


def test_dead_channels_and_outliers_are_counted():
    model = llama()
    with torch.no_grad():
        gain = model.model.layers[0].input_layernorm.weight
        gain.fill_(1.0)
        gain[:16] = 0.0
        gain[20] = 100.0
    found = layer(sensitivity(model, IDS, windows=1, seq_len=32), "model.layers.0.self_attn.q_proj")
    assert found.dead_share == 0.25
    assert found.outlier_ratio > 50


def test_a_static_grid_that_is_too_narrow_saturates_and_a_dynamic_one_does_not(measured):
    model, dynamic = measured
    ninety = lambda: w8a8.Percentile(p=90.0)  # noqa: E731
    narrow = sensitivity(model, IDS, "w8a8-static", windows=2, seq_len=32, observer=ninety)
    name = "model.layers.1.mlp.down_proj"
    assert layer(narrow, name).saturated_share == pytest.approx(0.1, rel=0.1)
    assert layer(dynamic, name).saturated_share < 0.005


def test_zeros_behind_a_relu_are_not_saturated():
    found = sensitivity(opt(), IDS, "w8a8-asym", windows=2, seq_len=32)
    assert layer(found, "model.decoder.layers.0.fc2").saturated_share < 0.05


def test_weight_only_layers_have_no_input_grid():
    found = sensitivity(llama(), IDS, "w8a16", windows=1, seq_len=32)
    assert {each.input_sqnr_db for each in found.layers} == {None}
    assert {each.saturated_share for each in found.layers} == {None}
    assert {h.what for h in found.histograms} == {"weight"}


def test_histograms_hold_every_value_and_their_grid_reaches_all(measured):
    model, found = measured
    for h in found.histograms:
        linear = model.get_submodule(h.layer)
        assert sum(h.counts) == (linear.weight.numel() if h.what == "weight" else 2 * 32 * linear.in_features)
        assert len(h.counts) == 64
        assert h.edges == sorted(set(h.edges))
        assert max(abs(h.edges[0]), abs(h.edges[-1])) <= h.scale * h.qmax * (1 + 1e-6)
    assert len(found.histograms) == 2 * len(found.layers)


def test_it_survives_json(measured):
    _, found = measured
    assert Sensitivity.from_dict(json.loads(json.dumps(found.to_dict()))) == found


def test_the_model_is_not_changed_and_a_seed_gives_the_same_numbers():
    model = llama()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    options = {"windows": 2, "seq_len": 32, "seed": 5}
    assert sensitivity(model, IDS, **options) == sensitivity(model, IDS, **options)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not list(quant_linears(model))
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())


def test_absmax_before_smoothing_stands_beside_that_after():
    model = llama(hidden_size=256)
    before = channel_absmax(model, IDS, windows=1, seq_len=32)
    w8a8.smooth_(model, w8a8.Calibration.of(IDS[None, :64]), alpha=0.5)
    found = sensitivity(model, IDS, windows=1, seq_len=32, before_smoothing=before)
    rows = {each.layer: each for each in found.channels}
    row = rows["model.layers.0.self_attn.q_proj"]
    assert len(row.before) == len(row.after) == 128
    assert max(row.before) == pytest.approx(float(before[row.layer].max()))
    assert row.before != row.after


def test_the_orders_agree_where_the_figures_do_and_say_where_not(measured):
    _, found = measured
    layers = found.layers[:4]
    same = rankings([w(each, kl) for each, kl in zip(layers, [4.0, 3.0, 2.0, 1.0], strict=True)])
    assert (same.spearman, same.disagree, same.overlap) == (1.0, [], 2)
    turned = rankings([w(each, kl, 5 - kl) for each, kl in zip(layers, [4.0, 3.0, 2.0, 1.0], strict=True)])
    assert (turned.spearman, turned.overlap) == (-1.0, 0)
    assert set(turned.disagree) == {each.name for each in layers}


def w(each, alone, spared=None):
    values = {**each.__dict__, "kl_alone": alone, "kl_spared": alone if spared is None else spared}
    return type(each)(**values)


def test_progress_counts_every_layer_of_every_window():
    steps = []
    found = sensitivity(llama(), IDS, windows=2, seq_len=32, progress=lambda *step: steps.append(step))
    total = 2 * len(found.layers)
    assert [done for done, _, _ in steps] == list(range(1, total + 1))
    assert {whole for _, whole, _ in steps} == {total}


def test_mistakes_are_told():
    with pytest.raises(CalibrationError, match="windows=0"):
        sensitivity(llama(), IDS, windows=0)
    with pytest.raises(PatternError, match="matches none of the 14 layers"):
        sensitivity(llama(), IDS, {"nowhere": "w8a8"})


def test_records_have_the_keys_of_a_page(measured):
    _, found = measured
    assert set(found.records()) == {"layers", "rankings", "channels", "histograms"}
    assert set(found.records()["rankings"]) == {"kl_alone", "kl_spared", "disagree"}
    assert "group" not in found.records()["layers"][0]
    assert math.isfinite(found.kl_nats)
    assert isinstance(found.channels[0], Channels)
