"""A choice says what becomes of each layer, takes experts apart while it is looked at, and is carried out at once."""

import copy

import pytest
import torch

import w8a8
from tests.conftest import llama, mixtral, opt
from w8a8.errors import ModelError, SchemeError
from w8a8.layers.linear import quant_linears
from w8a8.model.choice import Choice
from w8a8.model.experts import Experts, holds_experts, unstacked
from w8a8.model.swapping import build

STACKS = ["model.layers.0.mlp.experts", "model.layers.1.mlp.experts"]


def stacks(**options):
    model = mixtral(num_hidden_layers=2)
    return model, Choice.of(model, **options)


def test_a_choice_leaves_the_model_as_it_was():
    model = mixtral()
    before = dict(model.named_modules())
    Choice.of(model)
    assert dict(model.named_modules()) == before


def test_experts_lie_apart_within_the_block_and_stacked_after_it():
    model, choice = stacks()
    with choice.unstacked():
        assert all(isinstance(model.get_submodule(name), Experts) for name in STACKS)
        assert all(model.get_submodule(name) is not None for name in choice.schemes)
    assert not holds_experts(model)


def test_experts_lie_stacked_after_a_failure_too():
    model, choice = stacks()
    with pytest.raises(KeyboardInterrupt), choice.unstacked():
        raise KeyboardInterrupt
    assert not holds_experts(model)


def test_all_stacks_are_taken_where_a_layer_of_one_is_chosen_and_else_none():
    assert list(stacks(include=["*.0.mlp.experts.1.w2"])[1].taken) == STACKS
    _, without = stacks(exclude=["*.experts.*"])
    assert without.taken == {}
    assert list(without.experts) == STACKS


def test_layers_of_experts_are_not_outside():
    _, choice = stacks()
    assert choice.outside == tuple(f"model.layers.{i}.self_attn.{x}_proj" for i in range(2) for x in "qkvo")


def test_why_a_stack_stays_is_a_reason_beside_those_of_layers():
    few = mixtral(num_hidden_layers=2)
    assert Choice.of(few, stacks=unstacked(few, at_most=3)).experts == {}
    model = mixtral()
    model.model.layers[0].mlp.experts.register_forward_hook(lambda *_: None)
    reasons = Choice.of(model).selection.reasons
    assert "hooks" in reasons["model.layers.0.mlp.experts"]
    assert "output head" in reasons["lm_head"]


def test_what_is_enacted_is_what_quantize_makes(tokens):
    schemes = {"*.experts.*": "w8a16", "*": "w8a8"}
    model, choice = stacks(schemes=schemes, head="int8")
    wanted = w8a8.quantize(copy.deepcopy(model), schemes, head="int8").model
    with choice.unstacked():
        layers = build(model, choice.schemes)
    assert not list(quant_linears(model))
    choice.enact(layers)
    assert {name: layer.scheme for name, layer in quant_linears(model)} == choice.schemes
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, wanted(tokens).logits)


def test_enacting_unties():
    model = opt()
    choice = Choice.of(model, include=["*", "lm_head"])
    assert choice.selection.untied == {"lm_head": "model.decoder.embed_tokens"}
    choice.enact(build(model, choice.schemes))
    assert not model.config.tie_word_embeddings


def test_what_is_no_module_is_refused_with_every_head():
    for head in ("float", "int8"):
        with pytest.raises(ModelError, match=r"expected a torch\.nn\.Module, found str"):
            Choice.of("name", head=head)


def test_an_unknown_scheme_is_refused_and_the_stacks_are_put_back():
    model = mixtral()
    with pytest.raises(SchemeError, match="w8a9"):
        Choice.of(model, "w8a9")
    assert not holds_experts(model)


def test_a_choice_of_all_is_in_the_models_order():
    model = llama()
    assert list(Choice.of(model).schemes) == [n for n, _ in model.named_modules() if n.endswith("_proj")]


@pytest.mark.parametrize(
    "ask", [w8a8.quantize, w8a8.ledger, w8a8.unstack_experts_, w8a8.optimize, w8a8.restore, w8a8.fusions]
)
def test_what_is_no_module_is_refused_in_words(ask):
    with pytest.raises(ModelError, match=r"expected a torch\.nn\.Module, found int"):
        ask(3)
