import math

import pytest
import torch
from torch import nn

from tests.conftest import llama, mixtral
from w8a8.dataflow.observing import observe
from w8a8.errors import ModelError, W8A8Error
from w8a8.smoothing import gate as gate_module
from w8a8.smoothing.fold import fold_
from w8a8.smoothing.gate import TOLERANCE, Gate, closed_blocks, relative_change
from w8a8.smoothing.smooth import smooth_


def scales(group, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(group.source.channels, generator=generator) * 10 + 0.1


@pytest.fixture(params=["float64", "float32 in place"])
def precision(request, monkeypatch):
    if request.param != "float64":
        monkeypatch.setattr(gate_module, "COPY_BYTES", 0)
    return request.param


def test_right_folds_pass_in_float32_weights(tokens, precision):
    model = llama()
    groups = observe(model, tokens).groups
    gate = Gate(model, groups, tokens)
    for group in groups:
        assert gate.unrounded(group) is None
        fold_(model, group, scales(group))
        assert 0 < gate.change(group) < 1e-6 < gate.bound(group) == TOLERANCE
    assert gate.whole_change() < 2e-6 < gate.whole_bound()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_weights_are_asked_twice(dtype, tokens):
    model = llama().to(dtype)
    groups = observe(model, tokens).groups
    gate = Gate(model, groups, tokens)
    eps = torch.finfo(dtype).eps
    for group in groups:
        unrounded = gate.unrounded(group)
        unrounded.fold(group, scales(group))
        assert unrounded.change() < 1e-6
        fold_(model, group, scales(group))
        assert 0.05 * eps < gate.change(group) < 2 * eps < gate.bound(group) == 4 * eps
    assert gate.whole_change() < gate.whole_bound()


def test_a_wrong_fold_of_half_weights_is_seen_before_it_is_made(tokens):
    model = llama().to(torch.bfloat16)
    group = observe(model, tokens).groups[0]
    wrong = type(group)(group.source, group.readers[:2], group.block)
    nearly_one = 1 + scales(group) * 1e-3  # what rounds away in bfloat16 still counts
    unrounded = Gate(model, [wrong], tokens).unrounded(wrong)
    unrounded.fold(wrong, nearly_one)
    assert unrounded.change() > 1e-4


def test_folds_of_one_block_are_compared_with_what_it_was_before_any(tokens):
    model = llama()
    groups = observe(model, tokens).groups
    gate = Gate(model, groups, tokens)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.mul_(1.5)
    in_layer = [g for g in groups if "layers.0." in g.source.module]
    assert all(gate.change(group) > 1e-3 for group in in_layer)
    assert all(gate.change(group) == 0 for group in groups if "layers.1." in group.source.module)


def test_blocks_are_widened_until_no_group_crosses_them(tokens):
    model = llama()
    groups = observe(model, tokens).groups
    value = next(g for g in groups if g.source.module == "model.layers.1.self_attn.v_proj")
    assert value.block == "model.layers.1.self_attn"
    assert closed_blocks([value]) == ["model.layers.1.self_attn"]
    assert closed_blocks(groups)[groups.index(value)] == "model.layers.1"  # the norm before it scales what it reads


def test_nothing_is_left_behind(tokens):
    model = llama().train()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    use_cache = model.config.use_cache
    groups = observe(model, tokens).groups
    Gate(model, groups, {"input_ids": tokens}).change(groups[0])
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert all(module.training for module in model.modules())
    assert all(not m._forward_pre_hooks and not m._forward_hooks for m in model.modules())
    assert model.config.use_cache is use_cache
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_a_router_that_is_left_out_is_seen(tokens):
    model = mixtral()
    group = next(g for g in observe(model, tokens).groups if "post_attention" in g.source.module)
    readers = tuple(r for r in group.readers if "gate.weight" not in r.parameter)
    assert len(readers) < len(group.readers)
    wrong = type(group)(group.source, readers, group.block)
    gate = Gate(model, [wrong], tokens)
    fold_(model, wrong, scales(group))
    assert gate.change(wrong) > 1e-3


def test_a_block_that_did_not_run_cannot_be_checked(tokens):
    model = llama()
    groups = observe(model, tokens).groups
    model.spare = nn.Linear(3, 3)
    stray = type(groups[0])(groups[0].source, groups[0].readers, "spare")
    stray_only = Gate(model, groups, tokens)
    stray_only._blocks[id(stray)] = "spare"
    assert "did not run on the probe" in stray_only.why_not(stray)
    assert stray_only.why_not(groups[0]) is None


def test_a_model_without_a_float_output_is_refused():
    class Counter(nn.Module):
        def forward(self, x):
            return x.argmax(-1)

    with pytest.raises(ModelError, match="returns no float tensor"):
        Gate(Counter(), [], torch.randn(2, 3))


def test_the_relative_change_is_the_worst_of_the_outputs():
    a, b = torch.tensor([3.0, 4.0]), torch.tensor([1.0])
    assert relative_change([a, b], [a, b]) == 0.0
    assert relative_change([a, b], [a * 1.1, b * 1.01]) == pytest.approx(0.1)
    assert relative_change([a], [a, b]) == math.inf
    assert relative_change([a], [torch.tensor([3.0, math.nan])]) == math.inf
    assert relative_change([torch.zeros(2)], [torch.ones(2)]) == math.inf
    assert relative_change([torch.zeros(2)], [torch.zeros(2)]) == 0.0
    masked = torch.tensor([1.0, -math.inf])
    assert relative_change([masked], [masked.clone()]) == 0.0


def test_a_block_is_run_once_for_each_state_of_its_weights(tokens, monkeypatch):
    model, runs = llama(), []
    groups = observe(model, tokens).groups
    gate = Gate(model, groups, tokens)
    real = gate_module._run
    monkeypatch.setattr(gate_module, "_run", lambda *given: runs.append(given) or real(*given))
    group = groups[0]
    assert gate.change(group) == 0.0
    assert not runs
    fold_(model, group, scales(group))
    changes = [gate.change(group), gate.change(group)]
    assert len(runs) == 1
    assert changes[0] == changes[1] > 0
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.mul_(1.5)
    assert gate.change(group) > 1e-3
    assert len(runs) == 2


class _Block(nn.Module):
    """A norm and a layer that reads it, in a block that does something of its own besides."""

    def __init__(self):
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(8), nn.Linear(8, 8)
        self.seen = []

    def forward(self, x, kept=None):
        return self.linear(self.norm(x)) + self.own(x, kept)

    def own(self, x, kept):
        return torch.zeros_like(x)


class _Remembering(_Block):
    def own(self, x, kept):
        self.seen.append(x)
        return torch.stack(self.seen).sum(0)


class _Growing(_Block):
    def own(self, x, kept):
        self.seen.append(x)
        return torch.cat(self.seen)  # of another length each time: an error from the second call on


class _Drawing(_Block):
    def own(self, x, kept):
        return torch.rand_like(x)


class _Caching(_Block):
    """Whose caller gives it what grows, as transformers gives layers a cache."""

    def own(self, x, kept):
        kept.rows.append(x)
        return torch.stack(kept.rows).sum(0)


class _Kept:
    def __init__(self):
        self.rows = []


class _Whole(nn.Module):
    def __init__(self, block):
        super().__init__()
        self.first, self.block = nn.Linear(8, 8), block

    def forward(self, x):
        return self.block(self.first(x), _Kept())


@pytest.mark.parametrize("kind", [_Drawing, _Caching])
def test_a_block_that_draws_or_is_given_a_cache_is_compared_as_any_other(kind):
    model, x = _Whole(kind()).eval(), torch.randn(5, 8)
    (group,) = (g for g in observe(model, x).groups if g.source.module == "block.norm")
    gate = Gate(model, [group], x)
    assert gate.why_not(group) is None
    fold_(model, group, scales(group))
    assert gate.change(group) < 1e-6
    with torch.no_grad():
        model.block.norm.weight.mul_(2)
    assert gate.change(group) > gate.bound(group)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (_Remembering, "compared.*keeps state between calls"),
        pytest.param(_Growing, "called with.*RuntimeError", marks=pytest.mark.slow),
    ],
)
def test_a_block_that_keeps_state_refuses_its_folds_and_nothing_changes(kind, reason, precision):
    model, x = _Whole(kind()).eval(), torch.randn(5, 8)
    before = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(W8A8Error, match=f"cannot be {reason}"):
        smooth_(model, [x], alpha=0.5)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_the_state_of_a_block_whose_result_is_dropped_refuses_that_block_alone():
    class Beside(nn.Module):
        def __init__(self):
            super().__init__()
            self.block, self.norm, self.last = _Remembering(), nn.LayerNorm(8), nn.Linear(8, 3)

        def forward(self, x):
            self.block(x)
            return self.last(self.norm(x))

    report = smooth_(Beside().eval(), [torch.randn(5, 8)], alpha=0.5)
    told = {group.source: group for group in report.groups}
    assert told["norm"].alpha == 0.5
    assert "block does not return the same again for the same input" in told["block.norm"].reason
