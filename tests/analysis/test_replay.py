import copy

import pytest
import torch
from torch import nn

from tests.conftest import MODELS, llama
from w8a8.analysis.answers import Window
from w8a8.analysis.replay import blocks_of, record, replay
from w8a8.evaluation.scores import logits_of
from w8a8.model.choice import Choice
from w8a8.model.swapping import build, swapped


@pytest.mark.parametrize("name", ["llama", "opt", "gpt2"])
def test_a_replay_gives_the_bits_of_a_whole_forward_for_every_layer(name, tokens):
    model, ids = MODELS[name](), tokens[0]
    layers = build(model, Choice.of(model).schemes)
    float_run, quantized_run = record(model, Window.of(ids, 0), {}), record(model, Window.of(ids, 0), layers)
    assert list(float_run.outputs) == list(quantized_run.outputs) == blocks_of(model)
    for changed, layer in layers.items():
        with swapped(model, {changed: layer}):
            whole = logits_of(model, ids, 0)[:-1]
        assert torch.equal(replay(model, float_run, {changed: layer}, [changed]), whole)
        others = {other: kept for other, kept in layers.items() if other != changed}
        with swapped(model, others):
            whole = logits_of(model, ids, 0)[:-1]
        assert torch.equal(replay(model, quantized_run, others, [changed]), whole)


def test_blocks_before_the_changed_one_do_not_run(tokens):
    model = llama(num_hidden_layers=3)
    found = record(model, Window.of(tokens[0], 0), {})
    ran = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(lambda *_, name=name: ran.append(name))
    replay(model, found, {}, ["model.layers.2.mlp.up_proj"])
    assert {name.split(".")[2] for name in ran if ".layers." in name} == {"2"}


def test_a_recording_leaves_the_model_as_it_was(tokens):
    model = llama().train()
    before = copy.deepcopy(model.state_dict())
    layers = build(model, Choice.of(model).schemes)
    replay(model, record(model, Window.of(tokens[0], 0), layers), layers, ["model.layers.1.mlp.up_proj"])
    assert model.training
    assert all(not m._forward_hooks and "forward" not in m.__dict__ for m in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("reader", ["model.layers.1", "model.norm"])
def test_a_forward_that_replaying_would_change_is_run_whole(reader, tokens):
    """The first block hands something on beside its output: to the last block, or to what follows the blocks."""
    model = llama()
    side = [0.0]
    plain = model.model.layers[0].forward

    def hands_on(*args, **kwargs):
        side[0] = 1.0
        return plain(*args, **kwargs)

    model.model.layers[0].forward = hands_on

    def reads(module, args, out):
        changed, side[0] = out * (1 + side[0]), 0.0
        return changed

    model.get_submodule(reader).register_forward_hook(reads)
    assert record(model, Window.of(tokens[0], 0), {}).outputs == {}
    assert model.model.layers[0].forward is hands_on


def test_a_block_that_runs_twice_is_not_replayed(tokens):
    model = llama()
    model.model.layers[1] = model.model.layers[0]
    assert record(model, Window.of(tokens[0], 0), {}).outputs == {}
