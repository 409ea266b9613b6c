import copy
import json
from dataclasses import replace

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertModel

import w8a8
from tests import families
from tests.conftest import crossed, llama, mixtral, named, opt, relative_error
from tests.smoothing.conftest import parameters, unchanged
from w8a8.calibration.data import Calibration
from w8a8.dataflow.groups import Dataflow, Group, Reader, ScaledParameter, Source
from w8a8.dataflow.observing import observe
from w8a8.errors import CalibrationError, ModelError, PatternError, SchemeError
from w8a8.layers.linear import quant_linears
from w8a8.records.smoothing import Score
from w8a8.smoothing import smooth, smoother
from w8a8.smoothing.gate import Gate
from w8a8.smoothing.smooth import smooth_


@pytest.fixture
def data(tokens):
    return Calibration.of(tokens.repeat(3, 1), length=24)


def with_outliers(model):
    """A model whose norms make one channel 50 times larger, as if it had been trained to."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("norm.weight"):
                p[7] *= 50
    return model


def in_float64_throughout(monkeypatch):
    """Gemma and Cohere compute their gains in float32 whatever the model's dtype, and would hide what is asked here."""
    real = torch.Tensor.to

    def to(self, *args, **kwargs):
        args = tuple(torch.float64 if a is torch.float32 else a for a in args)
        return real(self, *args, **{k: torch.float64 if v is torch.float32 else v for k, v in kwargs.items()})

    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    monkeypatch.setattr(torch.Tensor, "to", to)


@pytest.mark.parametrize("name", families.FAMILIES)
def test_folding_all_groups_keeps_the_function_of_every_family(name, monkeypatch):
    model, inputs = families.build(name), families.inputs(name)
    in_float64_throughout(monkeypatch)
    flow = observe(model, inputs)
    assert flow.groups
    assert all(refusal.reason for refusal in flow.refused)
    gate = Gate(model, flow.groups, inputs)
    with torch.no_grad():
        before = model(**inputs).logits
    for group in flow.groups:
        scales = torch.empty(group.source.channels).uniform_(-2, 2).exp()
        smooth.fold_(model, group, torch.where(group.scalable, scales, 1.0))
        assert gate.change(group) < 1e-9
    with torch.no_grad():
        assert relative_error(model(**inputs).logits, before) < 1e-9


@crossed("name alpha", families.FAMILIES, ["searched", 0.5], ids=named)
def test_smoothing_keeps_the_function_of_every_family_or_says_why_not(name, alpha, monkeypatch):
    model, inputs = families.build(name), families.inputs(name)
    with torch.no_grad():
        with monkeypatch.context() as patched:
            in_float64_throughout(patched)
            before = model(**inputs).logits
        report = smooth_(model, [inputs], alpha=alpha, scheme="w8a8-static")
        with monkeypatch.context() as patched:
            in_float64_throughout(patched)
            after = model(**inputs).logits
    assert relative_error(after, before) < 1e-9
    searched_in_vain = [g for g in report.groups if g.reason == "no alpha has a smaller error than none"]
    assert report.smoothed or (alpha == "searched" and searched_in_vain)
    told = {group.reason for group in report.groups} - {None}
    assert told <= {
        "nothing that reads it will be quantised",
        "no alpha has a smaller error than none",
        "stacked experts read it, whose errors are not searched",
    }
    assert all(group.reason for group in report.refused)


@pytest.mark.parametrize("scheme", ["w8a8", "w8a8-tensor", "w8a8-static", "w8a8-o1"])
def test_no_group_gets_worse_and_outliers_get_better(scheme, data):
    report = smooth_(with_outliers(llama()), data, alpha="searched", scheme=scheme)
    assert all(group.error_after <= group.error_before for group in report.groups if group.error_before is not None)
    norms = [group for group in report.smoothed if "layernorm" in group.source]
    assert len(norms) == 4
    assert all(group.error_after < group.error_before / 2 for group in norms)


def test_smoothing_helps_the_quantised_model(data, tokens):
    model = with_outliers(llama())
    with torch.no_grad():
        expected = model(tokens).logits
        naive = w8a8.quantize(copy.deepcopy(model), "w8a8-static", calibration=data, smooth="none").model
        searched = w8a8.quantize(copy.deepcopy(model), "w8a8-static", calibration=data, smooth="searched").model
        assert relative_error(searched(tokens).logits, expected) < 0.7 * relative_error(naive(tokens).logits, expected)


def test_a_fixed_alpha_is_used_everywhere(data):
    report = smooth_(llama(), data, alpha=0.7)
    assert {group.alpha for group in report.groups if group.reason is None} == {0.7}
    assert report.alpha == 0.7


def test_the_report_is_json_and_a_table(data):
    report = smooth_(with_outliers(llama()), data, alpha="searched")
    told = json.loads(json.dumps(report.to_dict()))
    assert told["groups"][0]["source"] == "model.layers.0.input_layernorm"
    assert told["groups"][0]["readers"] == [f"model.layers.0.self_attn.{part}_proj" for part in "qkv"]
    text = str(report)
    assert "for w8a8, alpha searched, on 6 windows" in text
    assert "model.layers.1.mlp.up_proj -> down_proj" in text
    assert "more sources have no linear to be folded into" in text


def test_groups_whose_readers_stay_float_are_left(data):
    model = llama()
    before = parameters(model)
    report = smooth_(model, data, alpha=0.5, exclude=["*.mlp.*"])
    left = {group.source: group.reason for group in report.groups if group.alpha is None}
    assert left["model.layers.0.post_attention_layernorm"] == "nothing that reads it will be quantised"
    assert "model.norm" in left  # the head stays float
    for name in ("model.norm.weight", "lm_head.weight", "model.layers.0.mlp.up_proj.weight"):
        assert torch.equal(model.get_parameter(name), before[name])


def test_a_router_is_folded_along(tokens):
    model = mixtral()
    router = model.model.layers[0].mlp.gate.weight
    before = router.detach().clone()
    with torch.no_grad():
        expected = model(tokens).logits
        report = smooth_(model, [tokens], alpha=0.5)
        assert relative_error(model(tokens).logits, expected) < 1e-5
    told = {group.source: group for group in report.groups}
    reason = told["model.layers.0.post_attention_layernorm"].reason
    assert reason == "stacked experts read it, whose errors are not searched"
    assert torch.equal(router, before)


def test_experts_are_quantised_as_they_are_after_the_rest_is_smoothed(tokens):
    model = mixtral()
    stack = model.model.layers[0].mlp.experts.down_proj.detach().clone()
    result = w8a8.quantize(model, calibration=[tokens], smooth=0.5)
    assert {group.source for group in result.smooth.smoothed} == {
        "model.layers.0.input_layernorm",
        "model.layers.0.self_attn.v_proj",
    }
    layer = model.model.layers[0].mlp.experts.get_submodule("3.w2")
    alone = nn.Linear(40, 32, bias=False)
    alone.weight.data = stack[3]
    assert torch.equal(layer.dequantized_weight(), w8a8.QuantLinear.from_float(alone).dequantized_weight())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_models_are_smoothed_within_their_rounding(dtype, data, tokens):
    model = with_outliers(llama()).to(dtype)
    with torch.no_grad():
        expected = copy.deepcopy(model).double()(tokens).logits
        report = smooth_(model, data, alpha="searched")
        assert report.smoothed
        assert all(p.dtype is dtype for p in model.parameters())
        assert relative_error(model.double()(tokens).logits, expected) < 4 * torch.finfo(dtype).eps


def dead_relu():
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    with torch.no_grad():
        model[0].bias[2] = -1e4
        model[2].weight[:, 5] = 0
    return model


@pytest.mark.parametrize("alpha", ["auto", "searched", 0.0, 0.5, 1.0])
def test_dead_channels_are_not_divided_by(alpha):
    model = dead_relu()
    row, column = model[0].weight[2].clone(), model[2].weight[:, 2].clone()
    x = torch.randn(40, 6)
    expected = model(x)
    smooth_(model, [x], alpha=alpha)
    assert all(bool(torch.isfinite(p).all()) for p in model.parameters())
    assert torch.equal(model[0].weight[2], row)
    assert torch.equal(model[2].weight[:, 2], column)
    assert relative_error(model(x), expected) < 1e-6


class Residual(nn.Module):
    """The norm's output is read by a linear and by a sum."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.linear = nn.Linear(8, 8)

    def forward(self, x):
        y = self.norm(x)
        return y + self.linear(y)


def group_of(norm, linear, channels, block=""):
    return Group(
        Source(norm, "norm", (ScaledParameter(f"{norm}.weight", 0, 0.0), ScaledParameter(f"{norm}.bias", 0, 0.0)), 8),
        (Reader(f"{linear}.weight", 1, linear, channels),),
        block,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fault", ["wrong channel map", "residual reader", "missing reader", "wrong offset"])
def test_a_planted_wrong_pair_is_caught_and_rolled_back_to_the_bit(fault, dtype, monkeypatch):
    right = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8))
    groups = [group_of("0", "1", torch.arange(8))]
    if fault == "wrong channel map":
        model, groups = right, [group_of("0", "1", torch.arange(8).roll(1))]
    elif fault == "residual reader":
        model, groups = Residual(), [group_of("norm", "linear", torch.arange(8))]
    elif fault == "missing reader":
        model = nn.Module()
        model.norm, model.a, model.b = nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 8)
        model.forward = lambda x: model.a(model.norm(x)) * model.b(model.norm(x))
        groups = [group_of("norm", "a", torch.arange(8))]
    else:
        model = right
        source = Source("0", "norm", (ScaledParameter("0.weight", 0, 1.0),), 8)
        groups = [Group(source, groups[0].readers, "")]
    model.to(dtype)
    if fault == "missing reader":
        monkeypatch.setattr(
            type(model), "forward", lambda self, x: self.a(y := self.norm(x)) * self.b(y), raising=False
        )
        del model.forward
    before = parameters(model)
    monkeypatch.setattr(smoother, "observe", lambda *_: Dataflow(tuple(groups), (), ()))
    x = (torch.randn(32, 8) * torch.rand(8).mul(4).exp()).to(dtype)
    report = smooth_(model, [x], alpha=0.8)
    (told,) = report.groups
    assert told.alpha is None
    assert told.change > 1e-3
    assert "changed the block's float output by" in told.reason
    assert unchanged(model, before)
    assert report.change == 0.0


def test_a_wrong_pair_among_right_ones_leaves_the_others_smoothed(data, tokens, monkeypatch):
    model = llama()
    flow = observe(model, tokens)
    (first, *others) = flow.groups
    wrong = Group(first.source, first.readers[:1], first.block)
    monkeypatch.setattr(smoother, "observe", lambda *_: Dataflow((wrong, *others), (), ()))
    before = parameters(model)
    with torch.no_grad():
        expected = model(tokens).logits
        report = smooth_(model, data, alpha=0.5)
        assert relative_error(model(tokens).logits, expected) < 1e-5
    assert report.groups[0].reason.startswith("the fold changed the block's float output")
    assert len(report.smoothed) == len(report.groups) - 2  # and the head stays float
    for name in ("input_layernorm.weight", "self_attn.q_proj.weight", "self_attn.k_proj.weight"):
        assert torch.equal(model.get_parameter(f"model.layers.0.{name}"), before[f"model.layers.0.{name}"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("wrong", [{0}, {3}, {0, 2}, {1, 2, 3}])
def test_the_wrong_folds_of_a_block_are_found_and_the_right_ones_kept(wrong, dtype, data, tokens, monkeypatch):
    model = llama(num_hidden_layers=1).to(dtype)
    groups = observe(model, tokens).groups[:4]
    right = copy.deepcopy(model)
    monkeypatch.setattr(
        smoother, "observe", lambda *_: Dataflow(tuple(g for i, g in enumerate(groups) if i not in wrong), (), ())
    )
    smooth_(right, data, alpha=0.8)

    def mistaken(group):
        readers = tuple(replace(r, channels=r.channels.roll(1)) for r in group.readers)
        return Group(group.source, readers, group.block)

    given = tuple(mistaken(g) if i in wrong else g for i, g in enumerate(groups))
    monkeypatch.setattr(smoother, "observe", lambda *_: Dataflow(given, (), ()))
    report = smooth_(model, data, alpha=0.8)
    assert {i for i, group in enumerate(report.groups) if group.alpha is None} == wrong
    assert all("changed the block's float output" in report.groups[i].reason for i in wrong)
    assert all(report.groups[i].change > 1e-3 for i in wrong)
    assert unchanged(model, parameters(right))


def test_a_block_is_compared_once_for_all_its_folds(data, monkeypatch):
    calls, real = [], Gate.change
    monkeypatch.setattr(Gate, "change", lambda self, group: calls.append(self.block(group)) or real(self, group))
    report = smooth_(llama(), data, alpha=0.5)
    assert calls == ["model.layers.0", "model.layers.1"]
    changes = [group.change for group in report.smoothed]
    assert changes[:4] == changes[:1] * 4


def test_a_probe_that_leaves_a_matrix_unread_is_not_enough():
    model, seen = nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 4)), []

    class Routed(nn.Module):
        """A second reader of the norm's output, for many tokens only."""

        def __init__(self):
            super().__init__()
            self.norm, self.always, self.sometimes = nn.LayerNorm(6), nn.Linear(6, 4), nn.Linear(6, 4)

        def forward(self, x):
            y = self.norm(x)
            return self.always(y) + (self.sometimes(y) if len(x) > 4 else 0)

    def more(x):
        seen.append(x)
        return x

    few, many = torch.randn(3, 6), torch.randn(8, 6)
    assert len(smoother.observed(model, few, lambda: more(many)).groups) == 1
    assert not seen
    routed = Routed()
    assert observe(routed, few).missed == ("sometimes.weight",)
    (group,) = smoother.observed(routed, few, lambda: more(many)).groups
    assert {reader.module for reader in group.readers} == {"always", "sometimes"}
    assert len(seen) == 1


def test_a_model_that_changes_as_a_whole_is_an_error_and_is_put_back(data, monkeypatch):
    model = llama()
    before = parameters(model)
    monkeypatch.setattr(smoother.Gate, "whole_change", lambda self: 0.5)
    with pytest.raises(ModelError, match=r"changed the float output of LlamaForCausalLM by 5\.00e-01"):
        smooth_(model, data)
    assert unchanged(model, before)


@pytest.mark.parametrize("where", ["search", "change", "whole_change"])
def test_an_interrupt_leaves_every_bit(where, data, monkeypatch):
    model = llama()
    before = parameters(model)
    owner = smoother if where == "search" else smoother.Gate
    real, calls = getattr(owner, where), []

    def interrupted(*args, **kwargs):
        calls.append(args)
        if len(calls) == {"search": 4, "change": 2, "whole_change": 1}[where]:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(owner, where, interrupted)
    with pytest.raises(KeyboardInterrupt):
        smooth_(model, data, alpha=0.5)
    assert calls
    assert unchanged(model, before)
    assert all(not m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("call", range(1, 8))
def test_an_interrupt_of_the_contest_leaves_every_bit(call, data, monkeypatch):
    model = llama()
    before, modules = parameters(model), dict(model.named_modules())
    real, calls = smooth.Contest._outputs, []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 5 * call:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(smooth.Contest, "_outputs", interrupted)
    with pytest.raises(KeyboardInterrupt):
        smooth_(model, data)
    assert unchanged(model, before)
    assert dict(model.named_modules()) == modules


def test_auto_keeps_what_wins_on_the_whole_model(data, monkeypatch):
    scores = iter(
        [Score(1.0, 3.0), Score(1.0, 2.0), Score(1.0, 2.5), Score(9.0, 1.0), Score(1.2, 2.4), Score(1.0, 2.1)]
    )
    monkeypatch.setattr(smooth.Contest, "score", lambda self: next(scores))
    model, other = llama(), None
    other = copy.deepcopy(model)
    report = smooth_(model, data)
    assert list(report.scores) == ["none", "0.3", "0.5", "0.7", "0.85", "searched"]
    assert report.kept == "0.3"
    smooth_(other, data, alpha=0.3)
    assert unchanged(model, parameters(other))
    assert "0.3  1.00e+00     2.00000  kept" in str(report)


def test_auto_may_find_that_nothing_helps(data, monkeypatch):
    scores = iter([Score(1.0, 1.0), *[Score(1.0, 2.0)] * 5])
    monkeypatch.setattr(smooth.Contest, "score", lambda self: next(scores))
    model = llama()
    before = parameters(model)
    report = smooth_(model, data)
    assert report.kept == "none"
    assert not report.smoothed
    assert any("no smoothing" in group.reason for group in report.groups)
    assert report.change == 0.0
    assert unchanged(model, before)


def test_quantize_that_fails_after_smoothing_puts_the_weights_back(data, monkeypatch):
    model = llama()
    before, modules = parameters(model), dict(model.named_modules())

    def failing(*_, **__):
        assert not unchanged(model, before)
        raise KeyboardInterrupt

    monkeypatch.setattr(w8a8.QuantLinear, "from_float", failing)
    with pytest.raises(KeyboardInterrupt):
        w8a8.quantize(model, calibration=data, smooth=0.5)
    assert unchanged(model, before)
    assert dict(model.named_modules()) == modules


@pytest.mark.slow
def test_quantize_smooths_where_there_is_calibration_and_says_so(data):
    assert w8a8.quantize(llama()).smooth is None
    assert w8a8.quantize(llama(), calibration=data).smooth.alpha == "auto"
    assert w8a8.quantize(llama(), calibration=data, smooth="none").smooth is None
    assert w8a8.quantize(llama(), "w8a8-static", calibration=data, smooth=0.5).smooth.alpha == 0.5
    assert w8a8.simulate(llama(), "w8a16", calibration=data).smooth.scheme == "w8a16"


def test_static_scales_are_measured_on_the_smoothed_model(data, tokens):
    model = with_outliers(llama())
    w8a8.quantize(model, "w8a8-static", calibration=data, smooth="searched", exclude=["*.layers.1.*"])
    seen = []
    layer = model.model.layers[0].self_attn.q_proj
    layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].abs().max()))
    with torch.no_grad():
        model(tokens)
    assert float(layer.input_scale) == pytest.approx(float(seen[0]) / 127, rel=1e-6)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"alpha": 1.5}, SchemeError, r"alpha=1\.5 is not a number in 0\.\.1"),
        ({"alpha": "best"}, SchemeError, "alpha='best'"),
        ({"scheme": "w4a4"}, SchemeError, "unknown scheme"),
        ({"include": ["nothing"]}, PatternError, "matches none"),
        ({"rows": 0}, CalibrationError, "at least one token"),
    ],
)
def test_bad_requests_change_nothing(options, error, message, data):
    model = opt()
    before = parameters(model)
    with pytest.raises(error, match=message):
        smooth_(model, data, **options)
    assert unchanged(model, before)


def test_smoothing_without_data_is_refused():
    with pytest.raises(SchemeError, match=r"smooth=0\.5 was asked for, which needs calibration data"):
        w8a8.quantize(llama(), smooth=0.5)
    with pytest.raises(SchemeError, match="smooth='max' is unknown; use 'auto'"):
        w8a8.quantize(llama(), smooth="max")


@pytest.mark.slow
def test_the_same_data_gives_the_same_bits(data):
    one, other = llama(), None
    other = copy.deepcopy(one)
    smooth_(one, data, scheme="w8a8-static")
    smooth_(other, data, scheme="w8a8-static")
    assert unchanged(one, parameters(other))


def test_a_smoothed_checkpoint_loads_and_gives_the_same_logits(data, tokens, tmp_path):
    model = with_outliers(llama())
    w8a8.quantize(model, "w8a8-static", calibration=data, smooth="searched")
    w8a8.save(model, tmp_path / "int8")
    loaded = w8a8.load(tmp_path / "int8")
    assert next(quant_linears(loaded))[1].input_scale is not None
    norm = "model.layers.0.input_layernorm.weight"
    assert torch.equal(loaded.get_parameter(norm), model.get_parameter(norm))
    assert not torch.equal(loaded.get_parameter(norm), with_outliers(llama()).get_parameter(norm))
    with torch.no_grad():
        assert torch.equal(loaded(tokens).logits, model(tokens).logits)


def encoder(outlier=1.0, loud=1.0):
    """A model whose norms come after the sums; a channel of its values is so much larger, and is read as before.

    loud: How much what attention adds to a token counts beside the rest.
    """
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 256}
    model = BertModel(BertConfig(vocab_size=96, max_position_embeddings=64, **sizes), add_pooling_layer=False).eval()
    with torch.no_grad():
        for layer in model.encoder.layer:
            layer.attention.output.dense.weight.mul_(loud)
            layer.attention.self.value.weight.mul_(loud)
            layer.attention.self.value.weight[5] *= outlier
            layer.attention.output.dense.weight[:, 5] /= outlier
    return model


def test_no_contest_is_held_where_nothing_can_be_gained(data, monkeypatch):
    model = encoder()
    before, scored = parameters(model), []
    real = smooth.Contest.score
    monkeypatch.setattr(smooth.Contest, "score", lambda self, **more: scored.append(more) or real(self, **more))
    report = smooth_(model, data, scheme="w8a8-asym")
    helped = {f"encoder.layer.{i}.attention.output.dense" for i in range(2)}
    assert scored == [{}, {"spared": helped}]
    assert list(report.scores) == ["none", "left float"]
    assert report.kept == "none"
    assert unchanged(model, before)
    assert all("no smoothing" in group.reason for group in report.groups)


def test_a_contest_comes_to_the_same_where_something_can_be_gained(data, monkeypatch):
    model, other = (encoder(outlier=200.0, loud=4.0) for _ in range(2))
    report = smooth_(model, data)
    assert list(report.scores) == ["none", "left float", "0.3", "0.5", "0.7", "0.85", "searched"]
    assert report.scores["left float"].distance < 0.9 * report.scores["none"].distance
    assert report.kept not in ("none", "left float")
    monkeypatch.setattr(smooth.Contest, "asks_first", lambda self, helped: False)
    held = smooth_(other, data)
    assert held.kept == report.kept
    assert unchanged(model, parameters(other))
    assert held.scores == {name: score for name, score in report.scores.items() if name != "left float"}


def test_ways_that_fold_the_same_are_scored_once(data, monkeypatch):
    scored = []
    real = smooth.Contest.score
    monkeypatch.setattr(smooth.Contest, "score", lambda self, **more: scored.append(more) or real(self, **more))
    monkeypatch.setattr(smooth.Contest, "asks_first", lambda self, helped: False)
    report = smooth_(nn.Sequential(nn.Linear(8, 8), nn.Sigmoid(), nn.Linear(8, 3)), [torch.randn(9, 8)])
    assert not report.groups
    assert len(scored) == 1
    assert len(report.scores) == 6
    assert report.kept == "none"
