import pytest
import torch
from torch import nn

from tests.conftest import llama, opt
from w8a8.core.scheme import PerGroup, QuantSpec, Scheme
from w8a8.errors import NonFiniteError, SchemeError
from w8a8.layers.linear import QuantLinear, quant_linears
from w8a8.model.choice import Choice
from w8a8.model.selection import select
from w8a8.model.swapping import build, swap, swapped

W8A8 = Scheme.of("w8a8")


def test_a_partly_quantised_model_can_be_quantised_further():
    model = llama()
    for pattern, scheme in (("*.mlp.*", "w8a8"), ("*.self_attn.*", "w8a8-asym")):
        swap(model, build(model, Choice.of(model, scheme, [pattern]).schemes))
    assert {layer.scheme.name for _, layer in quant_linears(model)} == {"w8a8", "w8a8-asym"}


def test_a_failure_half_way_leaves_the_model_and_names_the_layer():
    model = llama()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 7] = torch.nan
    with pytest.raises(NonFiniteError, match=r"nan at index \(3, 7\)") as caught:
        build(model, Choice.of(model).schemes)
    assert "while quantising model.layers.1.mlp.up_proj" in caught.value.explain()
    assert not list(quant_linears(model))


def test_groups_that_do_not_divide_name_the_layer():
    model = llama()
    with pytest.raises(SchemeError, match="K=100") as caught:
        build(model, Choice.of(model, Scheme(QuantSpec(8, PerGroup(64)), W8A8.activations)).schemes)
    assert "down_proj" in caught.value.explain()


def test_a_module_with_two_names_is_replaced_under_both():
    shared = nn.Linear(8, 8)
    model = nn.ModuleDict({"a": shared, "b": nn.ModuleDict({"c": shared})})
    found = select(model)
    assert found.chosen == ("a",)
    swap(model, build(model, dict.fromkeys(found.chosen, W8A8)))
    assert isinstance(model["a"], QuantLinear)
    assert model["b"]["c"] is model["a"]


def test_swapped_puts_everything_back_even_after_an_error():
    model = opt()
    before = dict(model.named_modules())
    layers = build(model, Choice.of(model).schemes)
    with pytest.raises(RuntimeError, match="inside"), swapped(model, layers):  # noqa: PT012
        assert len(list(quant_linears(model))) == 12
        raise RuntimeError("inside")
    assert dict(model.named_modules()) == before


def test_progress_is_told_layer_by_layer():
    model, steps = llama(), []
    build(model, Choice.of(model).schemes, progress=lambda *step: steps.append(step))
    assert steps[0] == (1, 14, "model.layers.0.self_attn.q_proj")
    assert steps[-1][:2] == (14, 14)
