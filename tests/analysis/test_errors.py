import copy

import pytest
import torch

import w8a8
from tests.analysis.conftest import TWO_BITS
from tests.conftest import llama, opt
from w8a8.analysis import layer_errors, sensitivity
from w8a8.errors import ModelError
from w8a8.layers.linear import quant_linears

IDS = torch.randint(0, 96, (200,), generator=torch.Generator().manual_seed(3))
DRAWN = {"windows": 2, "seq_len": 32, "seed": 1}


def pair(make, scheme="w8a8", **options):
    reference = make()
    return reference, w8a8.quantize(copy.deepcopy(reference), scheme, **options).model


@pytest.mark.parametrize("make", [llama, opt])
def test_the_figures_are_those_of_the_sensitivity(make):
    reference, model = pair(make, "w8a8-asym")
    found = layer_errors(reference, model, IDS, **DRAWN)
    whole = sensitivity(reference, IDS, "w8a8-asym", **DRAWN)
    for one, other in zip(found, whole.layers, strict=True):
        assert vars(one).items() <= vars(other).items()
        assert one.output_sqnr_db is not None


def test_a_planted_layer_has_the_worst_output():
    bad = "model.layers.1.mlp.up_proj"
    reference, model = pair(llama, {bad: TWO_BITS, "*": "w8a8"})
    found = layer_errors(reference, model, IDS, **DRAWN)
    worst = min(found, key=lambda layer: layer.output_sqnr_db)
    assert worst.name == bad
    assert worst.output_sqnr_db < min(layer.output_sqnr_db for layer in found if layer.name != bad) - 10


def test_layers_that_stayed_float_are_not_told():
    reference, model = pair(llama, exclude=["*down_proj"])
    names = [layer.name for layer in layer_errors(reference, model, IDS, **DRAWN)]
    assert names == [name for name, _ in quant_linears(model)]
    assert not any("down_proj" in name for name in names)


def test_a_smoothed_model_is_refused_since_its_layers_read_other_inputs():
    reference, model = pair(llama, calibration=IDS[None, :64], smooth=0.5)
    with pytest.raises(ModelError, match=r"layernorm\.weight is not what it is in the float model"):
        layer_errors(reference, model, IDS, **DRAWN)


def test_a_difference_of_dtype_alone_is_none():
    reference, model = pair(llama)
    assert layer_errors(reference.bfloat16(), model.bfloat16(), IDS, **DRAWN)
    assert layer_errors(reference.float(), model, IDS, **DRAWN)


def test_two_quantised_models_have_nothing_to_compare():
    _, model = pair(llama)
    with pytest.raises(ModelError, match="nothing to compare"):
        layer_errors(copy.deepcopy(model), model, IDS, **DRAWN)


def test_neither_model_is_changed():
    reference, model = pair(llama)
    before = [{name: value.clone() for name, value in m.state_dict().items()} for m in (reference, model)]
    layer_errors(reference, model, IDS, **DRAWN)
    for m, state in zip((reference, model), before, strict=True):
        assert all(torch.equal(value, state[name]) for name, value in m.state_dict().items())
        assert not any(module._forward_hooks for module in m.modules())
