import copy

import pytest
import torch

import w8a8
from tests.analysis.conftest import TWO_BITS
from tests.conftest import every_third, gpt2, llama, opt
from w8a8.analysis import remedies, sensitivity, smoothed
from w8a8.analysis.remedy import GROUPED, LEAVE, SMOOTH
from w8a8.analysis.sample import draw, layers_for
from w8a8.calibration.data import Calibration
from w8a8.core.scheme import Scheme
from w8a8.evaluation.scores import token_kl
from w8a8.layers.linear import quant_linears
from w8a8.model.selection import select

IDS = torch.randint(0, 96, (400,), generator=torch.Generator().manual_seed(3))
SHORT = {"windows": 2, "seq_len": 32}
READERS = [f"model.layers.1.self_attn.{kind}_proj" for kind in "qkv"]


def with_outliers(factor=60.0):
    """A Llama whose second attention alone reads two loud channels; its float function is the plain one's."""
    model = llama()
    gain, attention = model.model.layers[1].input_layernorm.weight, model.model.layers[1].self_attn
    with torch.no_grad():
        for channel, loud in ((3, factor), (40, factor / 2)):
            gain[channel] *= loud
            for reader in (attention.q_proj, attention.k_proj, attention.v_proj):
                reader.weight[:, channel] /= loud
    return model


def kl_of(model, quantized, windows):
    """KL(float || quantised), nats per token, by whole forwards."""
    total, tokens = 0.0, 0
    with torch.no_grad():
        for ids in (window.ids for window in windows):
            p, q = (each(ids[None]).logits[0, :-1] for each in (model, quantized))
            total += float(token_kl(p, q).double().sum())
            tokens += len(p)
    return total / tokens


def by_remedy(made, name):
    return {each.remedy: each for each in made if each.layer == name}


def test_float_and_eight_bits_both_mend_a_layer_of_two_bits_by_what_sparing_it_wins():
    model, bad = opt(), "model.decoder.layers.1.fc1"
    schemes = {bad: TWO_BITS, "*": "w8a8"}
    found = sensitivity(model, IDS, schemes, **SHORT)
    made = remedies(model, IDS, found, schemes, count=2)
    assert {each.layer for each in made} == {layer.name for layer in found.worst(2)}
    gains = {remedy: each.gain_kl_nats for remedy, each in by_remedy(made, bad).items()}
    assert set(gains) == {LEAVE, SMOOTH, "w8a8", "w8a8-asym", "w8a16"}
    assert gains[LEAVE] == pytest.approx(found.worst(1)[0].kl_spared, rel=1e-6)
    assert gains["w8a8"] == pytest.approx(gains[LEAVE], rel=0.05)
    assert [each.layer for each in made[:5]] == [bad] * 5
    assert [each.gain_kl_nats for each in made[:5]] == sorted(gains.values(), reverse=True)


def test_smoothing_helps_most_below_float_where_the_input_has_outliers_by_what_smoothing_the_model_shows():
    model = with_outliers()
    found = sensitivity(model, IDS, **SHORT)
    worst = found.worst(1)[0]
    assert worst.name in READERS
    assert worst.outlier_ratio > 10
    made = by_remedy(remedies(model, IDS, found, count=1), worst.name)
    best = max((each for each in made.values() if each.remedy != LEAVE), key=lambda each: each.gain_kl_nats)
    assert best.remedy == SMOOTH
    assert best.gain_kl_nats > 0
    assert best.note.startswith("alpha ")
    assert all(reader.rpartition(".")[2] in best.note for reader in READERS if reader != worst.name)

    windows = draw(model, IDS, **SHORT)
    smooth = copy.deepcopy(model)
    report = w8a8.smooth_(smooth, windows.calibration(), alpha="searched", include=READERS)
    assert [group.source for group in report.smoothed] == ["model.layers.1.input_layernorm"]
    w8a8.quantize(smooth)
    by_hand = found.kl_nats - kl_of(model, smooth, windows.windows)
    assert best.gain_kl_nats == pytest.approx(by_hand, rel=1e-3)


@pytest.mark.slow
def test_layers_of_one_group_have_one_gain_from_smoothing():
    model = with_outliers()
    found = sensitivity(model, IDS, **SHORT)
    made = remedies(model, IDS, found, count=len(found.layers))
    gains = {each.gain_kl_nats for each in made if each.remedy == SMOOTH and each.layer in READERS}
    assert len(gains) == 1


def test_a_quantised_source_is_quantised_anew():
    model = llama()
    schemes = dict.fromkeys(select(model).chosen, Scheme.of("w8a8-o1"))
    source, reader = "model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj"
    with torch.no_grad():
        model.get_submodule(source).weight[7] *= 50.0
        model.get_submodule(reader).weight[:, 7] /= 50.0
    data = draw(model, IDS, **SHORT).calibration()
    found, reasons = smoothed.smoothed_groups(model, [reader], schemes, data)
    assert reasons == {}
    assert set(found[reader].layers) == {source, reader}
    plain = layers_for(model, schemes, data)
    assert float(found[reader].layers[source].weight_scale) < float(plain[source].weight_scale) / 4


def test_what_cannot_be_folded_has_no_gain_from_smoothing_and_says_why():
    model = gpt2()
    found = sensitivity(model, IDS, **SHORT)
    made = remedies(model, IDS, found, count=len(found.layers))
    (behind,) = (each for each in made if each.remedy == SMOOTH and each.layer == "transformer.h.0.mlp.c_proj")
    assert behind.gain_kl_nats is None
    assert "transformer.h.0.mlp.c_fc cannot be folded: " in behind.note


@pytest.mark.parametrize("fails_at", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_the_weights_are_back_to_the_bit_whatever_happens(monkeypatch, fails_at):
    model = with_outliers()
    before = copy.deepcopy(model.state_dict())
    found = sensitivity(model, IDS, **SHORT)
    remedies(model, IDS, found, count=3)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    calls = []

    def interrupted(*arguments, **options):
        calls.append(arguments)
        if len(calls) == fails_at:
            raise KeyboardInterrupt
        return layers_for(*arguments, **options)

    monkeypatch.setattr(smoothed, "layers_for", interrupted)
    with pytest.raises(KeyboardInterrupt):
        remedies(model, IDS, found, count=len(found.layers))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not list(quant_linears(model))


def test_the_schemes_own_option_is_no_remedy():
    model = opt()
    found = sensitivity(model, IDS, windows=1, seq_len=32)
    made = remedies(model, IDS, found, count=1)
    assert "w8a8" not in {each.remedy for each in made}
    assert len(made) == 4


@pytest.mark.parametrize("scheme", every_third(["w8a8-o1", "w8a8-o2", "w8a8-o3", "w8a8-tensor", "w8a8-static"]))
def test_layers_with_a_scale_per_tensor_are_offered_one_per_channel_and_token(scheme):
    model = with_outliers()
    found = sensitivity(model, IDS, scheme, **SHORT)
    made = remedies(model, IDS, found, scheme, count=1)
    assert {each.remedy for each in made} == {LEAVE, SMOOTH, "w8a8", "w8a8-asym", GROUPED.name, "w8a16"}
    assert by_remedy(made, made[0].layer)["w8a8"].gain_kl_nats > 0


def test_groups_along_k_are_offered_where_k_divides():
    model = llama(intermediate_size=96)
    with torch.no_grad():  # rows whose one huge weight meets a dead channel
        model.model.layers[0].mlp.down_proj.weight[:, 7] = 30.0
        model.model.layers[0].mlp.up_proj.weight[7] = 0.0
    found = sensitivity(model, IDS, **SHORT)
    assert found.worst(1)[0].name == "model.layers.0.mlp.down_proj"
    made = by_remedy(remedies(model, IDS, found, count=1), "model.layers.0.mlp.down_proj")
    assert made[GROUPED.name].gain_kl_nats > 0.5 * made[LEAVE].gain_kl_nats
    assert GROUPED.name not in by_remedy(remedies(llama(), IDS, found, count=1), "model.layers.0.mlp.down_proj")


def test_a_static_remedy_is_measured_with_the_calibration_that_was_given():
    model = with_outliers()
    data = Calibration.of(IDS[None, 200:232])
    found = sensitivity(model, IDS, calibration=data, **SHORT)
    options = {"count": 1, "options": ["w8a8-static"]}
    made = remedies(model, IDS, found, calibration=data, **options)
    name = made[0].layer
    windows = draw(model, IDS, **SHORT).windows
    quantized = copy.deepcopy(model)
    w8a8.quantize(quantized, {name: "w8a8-static", "*": "w8a8"}, calibration=data, smooth="none")
    gain = by_remedy(made, name)["w8a8-static"].gain_kl_nats
    assert gain == pytest.approx(found.kl_nats - kl_of(model, quantized, windows), rel=1e-3)
    assert by_remedy(remedies(model, IDS, found, **options), name)["w8a8-static"].gain_kl_nats != gain
