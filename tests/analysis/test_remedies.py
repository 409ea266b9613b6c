import pytest
import torch

from tests.conftest import opt
from w8a8.analysis import remedies, sensitivity
from w8a8.scheme import PerChannel, PerToken, QuantSpec, Scheme

TWO_BITS = Scheme(QuantSpec(2, PerChannel()), QuantSpec(8, PerToken()))
IDS = torch.randint(0, 96, (400,), generator=torch.Generator().manual_seed(3))


def test_float_and_eight_bits_both_mend_a_layer_of_two_bits_by_what_sparing_it_wins():
    model, bad = opt(), "model.decoder.layers.1.fc1"
    schemes = {bad: TWO_BITS, "*": "w8a8"}
    found = sensitivity(model, IDS, schemes, windows=2, seq_len=32)
    made = remedies(model, IDS, found, schemes, count=2)
    assert {each.layer for each in made} == {layer.name for layer in found.worst(2)}
    gains = {each.remedy: each.gain_kl_nats for each in made if each.layer == bad}
    assert set(gains) == {"leave in float", "w8a8", "w8a8-asym", "w8a16"}
    assert gains["leave in float"] == pytest.approx(found.worst(1)[0].kl_spared, rel=1e-6)
    assert gains["w8a8"] == pytest.approx(gains["leave in float"], rel=0.05)
    assert [each.layer for each in made[:4]] == [bad] * 4
    assert [each.gain_kl_nats for each in made[:4]] == sorted(gains.values(), reverse=True)


def test_the_schemes_own_option_is_no_remedy():
    model = opt()
    found = sensitivity(model, IDS, windows=1, seq_len=32)
    made = remedies(model, IDS, found, count=1)
    assert "w8a8" not in {each.remedy for each in made}
    assert len(made) == 3
