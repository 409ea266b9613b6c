"""What vLLM refuses is known before anything is quantised."""

import pytest
import torch

import w8a8
from tests.conftest import gpt2, llama, mixtral, opt
from w8a8 import PerChannel, PerGroup, PerTensor, PerToken, QuantSpec, Scheme
from w8a8.checkpoint.vllm import findings, foresee_as_it_is, schemes_of, transposed_of
from w8a8.pipeline import foresee

LAYER = "model.layers.0.self_attn.o_proj"
W, A = QuantSpec(granularity=PerChannel()), QuantSpec(granularity=PerToken())


def refused(found):
    return [finding.what for finding in found if finding.refused]


@pytest.mark.parametrize("name", ["w8a8", "w8a8-asym", "w8a8-o1", "w8a8-static", "w8a8-o3"])
def test_what_vllm_runs_has_no_finding(name):
    assert foresee(llama(), name) == ()


@pytest.mark.parametrize(
    ("scheme", "what"),
    [
        (Scheme.of("w8a8-tensor"), "one activation scale per call"),
        (Scheme.of("w8a8-o2"), "one activation scale per call"),
        (Scheme.of("w8a16"), "weight-only int8"),
        (Scheme(QuantSpec(4, PerChannel()), A), "4-bit weights"),
        (Scheme(QuantSpec(8, PerChannel(), symmetric=False), A), "weights with a zero point"),
        (Scheme(QuantSpec(8, PerGroup(4)), A), "weights per group"),
    ],
)
def test_what_vllm_does_not_run_is_refused_with_a_way_out(scheme, what):
    (found,) = findings({LAYER: scheme})
    assert found.refused
    assert found.what.startswith(what)
    assert found.layers == (LAYER,)
    assert "use " in found.instead
    assert LAYER in str(found)


def test_shards_of_one_layer_are_alike():
    found = foresee(llama(), exclude=["*.0.self_attn.k_proj", "*.1.mlp.up_proj"])
    assert refused(found) == ["layers that are one in vLLM have different schemes"] * 2
    assert found[0].layers == tuple(f"model.layers.0.self_attn.{x}_proj" for x in "qkv")
    assert foresee(llama(), exclude=["*.self_attn.[qkv]_proj"]) == ()
    assert foresee(opt(), exclude=["*.fc1"]) == ()


def test_shards_of_two_schemes_are_refused():
    schemes = {f"a.{x}_proj": Scheme.of("w8a8") for x in "qkv"}
    schemes["a.k_proj"] = Scheme.of("w8a8-o1")
    assert refused(findings(schemes)) == ["layers that are one in vLLM have different schemes"]


def test_conv1d_is_refused_before_and_after():
    assert refused(foresee(gpt2())) == ["quantised Conv1D"]
    model = gpt2()
    w8a8.quantize(model)
    assert refused(findings(schemes_of(model), transposed=transposed_of(model))) == ["quantised Conv1D"]


def test_an_int8_head_is_told_and_not_refused():
    (found,) = foresee(llama(), head="int8")
    assert not found.refused
    assert found.layers == ("lm_head",)


def test_a_quantised_model_is_looked_at_as_it_is():
    model = llama()
    w8a8.quantize(model, "w8a8-tensor", head="int8")
    found = foresee_as_it_is(model)
    assert [(finding.refused, finding.layers[-1]) for finding in found] == [(True, "lm_head"), (False, "lm_head")]


def test_experts_run_in_one_scheme_and_routers_float():
    layer = "model.layers.0.mlp"
    experts = {f"{layer}.experts.{i}.{x}_proj": Scheme.of("w8a8") for i in range(2) for x in ("gate", "up", "down")}
    assert findings(experts) == ()
    static = dict.fromkeys(experts, Scheme.of("w8a8-static"))
    assert refused(findings(static)) == ["experts that are not per channel with symmetric per-token activations"]
    for router in (f"{layer}.gate", "model.layers.0.block_sparse_moe.router.layer", f"{layer}.shared_expert_gate"):
        assert refused(findings({router: Scheme.of("w8a8")})) == ["a quantised router"]
    some = {**experts, f"{layer}.experts.1.down_proj": None}
    assert refused(findings(some)) == ["experts of one layer have different schemes"]


def test_a_model_without_values_is_enough():
    with torch.device("meta"):
        model = mixtral()
    assert foresee(model) == ()


def test_static_per_tensor_activations_run():
    assert findings({LAYER: Scheme(W, QuantSpec(granularity=PerTensor(), dynamic=False, symmetric=False))}) == ()
