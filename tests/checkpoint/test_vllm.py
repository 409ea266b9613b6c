"""What vLLM refuses is known before anything is quantised."""

import pytest
import torch

import w8a8
from tests.conftest import gpt2, llama, mixtral, opt, qwen3_moe
from w8a8 import PerChannel, PerGroup, PerTensor, PerToken, QuantSpec, Scheme
from w8a8.checkpoint.vllm import findings, foresee, foresee_as_it_is, schemes_of, shapes_of, transposed_of
from w8a8.layers.linear import quant_linears
from w8a8.model.choice import Choice

LAYER = "model.layers.0.self_attn.o_proj"
W, A = QuantSpec(granularity=PerChannel()), QuantSpec(granularity=PerToken())


def refused(found):
    return [finding.what for finding in found if finding.refused]


def wide(make=llama):
    """In widths that every kernel takes."""
    if make is opt:
        return opt(hidden_size=128, ffn_dim=256, word_embed_proj_dim=128)
    return make(hidden_size=128, intermediate_size=256, head_dim=32)


@pytest.mark.parametrize("name", ["w8a8", "w8a8-asym", "w8a8-o1", "w8a8-static", "w8a8-o3", "w8a16"])
def test_what_vllm_runs_has_no_finding(name):
    assert foresee(Choice.of(wide(), name)) == ()
    assert foresee(Choice.of(wide(opt), name)) == ()


@pytest.mark.parametrize(
    ("scheme", "what"),
    [
        (Scheme.of("w8a8-tensor"), "one activation scale per call"),
        (Scheme.of("w8a8-o2"), "one activation scale per call"),
        (Scheme(QuantSpec(8, PerTensor())), "weight-only int8 in the format int-quantized"),
        (Scheme(QuantSpec(8, PerChannel(), symmetric=False)), "weight-only int8 in the format int-quantized"),
        (Scheme(QuantSpec(4, PerGroup(32))), "weight-only int4 in the format int-quantized"),
        (Scheme(QuantSpec(8, PerGroup(16))), "groups of 16"),
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
    found = foresee(Choice.of(wide(), exclude=["*.0.self_attn.k_proj", "*.1.mlp.up_proj"]))
    assert refused(found) == ["layers that are one in vLLM are in part float"] * 2
    assert found[0].layers == tuple(f"model.layers.0.self_attn.{x}_proj" for x in "qkv")
    assert foresee(Choice.of(wide(), exclude=["*.self_attn.[qkv]_proj"])) == ()
    assert foresee(Choice.of(wide(opt), exclude=["*.fc1"])) == ()


def test_shards_of_two_schemes_are_refused():
    schemes = {f"a.{x}_proj": Scheme.of("w8a8") for x in "qkv"}
    schemes["a.k_proj"] = Scheme.of("w8a8-o1")
    assert refused(findings(schemes)) == ["layers that are one in vLLM have different schemes"]


def test_conv1d_is_refused_before_and_after():
    assert refused(foresee(Choice.of(gpt2()))) == ["quantised Conv1D"]
    model = gpt2()
    w8a8.quantize(model)
    assert refused(findings(schemes_of(model), transposed=transposed_of(model))) == ["quantised Conv1D"]


def test_an_int8_head_is_told_and_not_refused():
    (found,) = foresee(Choice.of(wide(), head="int8"))
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


def test_experts_that_stay_float_are_refused_where_files_on_the_hub_call_them_otherwise():
    stack = "model.layers.0.mlp.experts"
    for found in (foresee(Choice.of(mixtral(), exclude=["*.experts.*"])), foresee_as_it_is(without_experts(mixtral()))):
        assert [(f.refused, f.layers, f.what) for f in found] == [
            (True, (stack,), "experts that stay float, under transformers' names")
        ]
    assert (
        foresee(Choice.of(qwen3_moe(), exclude=["*.experts.*"])) == foresee_as_it_is(without_experts(qwen3_moe())) == ()
    )


def without_experts(model):
    w8a8.quantize(model, exclude=["*.experts.*"])
    return model


def test_a_model_without_values_is_enough():
    with torch.device("meta"):
        model = mixtral()
    assert refused(foresee(Choice.of(model))) == []


def of_shape(scheme, n, k, name=LAYER):
    return [(f.refused, f.what) for f in findings({name: Scheme.of(scheme)}, shapes={name: (n, k)})]


def test_shapes_that_cutlass_does_not_take_run_elsewhere_or_not_at_all():
    for n, k in ((64, 100), (100, 64)):
        assert of_shape("w8a8", n, k) == [(False, "a layer whose N or K is no multiple of 16")]
        assert of_shape("w8a8-asym", n, k) == [(True, "a layer whose N or K is no multiple of 16, with zero points")]
    assert of_shape("w8a8", 16, 48) == of_shape("w8a8-asym", 16, 48) == []


def test_shapes_that_marlin_does_not_take_are_filled_up_or_refused():
    assert of_shape("w8a16", 64, 128) == of_shape("w8a16", 128, 64) == []
    for n, k in ((64, 64), (96, 128), (128, 100)):
        assert of_shape("w8a16", n, k) == [(False, "weights that Marlin fills up with zeros")]
    assert of_shape("w8a16", 128, 102) == [(True, "a K that fills no whole words")]


def test_the_shape_of_shards_is_that_of_the_layer_that_they_are():
    schemes = {f"a.{x}_proj": Scheme.of("w8a8") for x in "qkv"}
    shapes = {"a.q_proj": (16, 32), "a.k_proj": (8, 32), "a.v_proj": (8, 32)}
    assert findings(schemes, shapes=shapes) == ()
    (found,) = findings(schemes, shapes=shapes | {"a.v_proj": (10, 32)})
    assert found.layers == tuple(schemes)


def test_the_rows_of_a_head_are_filled_up():
    assert [
        f.what for f in findings({"lm_head": Scheme.of("w8a8-asym")}, heads=["lm_head"], shapes={"lm_head": (97, 64)})
    ] == ["an int8 output head"]


def test_conv1d_has_the_shape_of_a_linear_layer():
    shapes = shapes_of(gpt2())
    assert shapes["transformer.h.0.attn.c_attn"] == (144, 48)
    model = gpt2()
    w8a8.quantize(model)
    assert shapes_of(model) == shapes


def test_a_directory_is_judged_by_the_format_that_it_has():
    model = w8a8.quantize(wide(), "w8a16").model
    names = {name for name, _ in quant_linears(model)}
    assert foresee_as_it_is(model) == foresee_as_it_is(model, names) == ()
    (found,) = foresee_as_it_is(model, set())
    assert found.refused
    assert found.what == "weight-only int8 in the format int-quantized"
    assert set(found.layers) == names


@pytest.mark.parametrize(
    ("weights", "what"),
    [
        (QuantSpec(4, PerGroup(128)), None),
        (QuantSpec(4, PerChannel(), symmetric=False), None),
        (QuantSpec(8, PerTensor()), "weight-only with one scale"),
        (QuantSpec(8, PerChannel(), symmetric=False), "weight-only int8 with zero points"),
        (QuantSpec(2, PerChannel()), "weight-only int2"),
        (QuantSpec(4, PerGroup(16)), "groups of 16"),
    ],
    ids=str,
)
def test_words_of_others_are_judged_too(weights, what):
    found = findings({LAYER: Scheme(weights)}, packed={LAYER})
    assert [f.what for f in found if f.refused] == ([] if what is None else [what])


def test_weight_only_experts_want_a_width_for_marlin():
    shapes = {"m.experts.0.gate_proj": (96, 128), "m.experts.0.up_proj": (96, 128), "m.experts.0.down_proj": (128, 96)}
    schemes = dict.fromkeys(shapes, Scheme.of("w8a16"))
    assert findings(schemes, shapes=shapes) == ()
    narrow = {name: tuple(64 if size == 128 else size for size in shape) for name, shape in shapes.items()}
    (found,) = findings(schemes, shapes=narrow)
    assert found.refused
    assert found.layers == tuple(shapes)


def test_static_per_tensor_activations_run():
    assert findings({LAYER: Scheme(W, QuantSpec(granularity=PerTensor(), dynamic=False, symmetric=False))}) == ()
