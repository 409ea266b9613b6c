import copy
import io
import math
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from w8a8.affine import QParams, fake_quantize, qparams, sqnr_db
from w8a8.errors import SchemeError
from w8a8.kernels import native
from w8a8.linear import Mode, QuantLinear, ledger
from w8a8.packed import unpack_rows
from w8a8.scheme import (
    PRESETS,
    Operand,
    PerChannel,
    PerColumn,
    PerGroup,
    PerTensor,
    PerToken,
    QuantSpec,
    Scheme,
)
from w8a8.tokens import fake_quantize_tokens

TOKEN = QuantSpec(granularity=PerToken())
EXECUTABLE = [name for name, p in PRESETS.items() if p.scheme.integer_executable]
SIMULATED_ONLY = [
    Scheme(QuantSpec(8, PerColumn()), TOKEN),
    Scheme(QuantSpec(8, PerColumn(), symmetric=False), QuantSpec(8, PerChannel(), symmetric=False)),
    Scheme(QuantSpec(4, PerTensor()), QuantSpec(4, PerChannel())),
    Scheme(QuantSpec(12, PerChannel(), symmetric=False), QuantSpec(16, PerToken())),
    Scheme(QuantSpec(10, PerChannel())),
]


def measured(name, x):
    """The grid of the input, where a preset wants it beforehand."""
    spec = PRESETS[name].scheme.activations
    return qparams(x, spec, Operand.ACTIVATION) if PRESETS[name].scheme.static else None


def relative_error(y, expected):
    return float((y - expected).detach().norm() / expected.detach().norm())


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_output_is_near_the_float_layers(name, dtype):
    linear = nn.Linear(256, 64).to(dtype)
    x = torch.randn(3, 7, 256).to(dtype)
    y = QuantLinear.from_float(linear, name, input_params=measured(name, x))(x)
    assert y.dtype is dtype
    assert relative_error(y.float(), linear(x).float()) < 0.02


@pytest.mark.parametrize("name", EXECUTABLE)
def test_simulated_is_the_integer_layer_bit_for_bit(name):
    linear = nn.Linear(100, 33)
    x = torch.randn(3, 7, 100)
    simulated = QuantLinear.from_float(linear, name, simulated=True, input_params=measured(name, x))
    assert simulated.mode is Mode.SIMULATED
    assert torch.equal(simulated(x), QuantLinear.from_float(linear, name, input_params=measured(name, x))(x))


@pytest.mark.parametrize("scheme", SIMULATED_ONLY, ids=str)
def test_other_schemes_are_fake_quantised_float_arithmetic(scheme):
    linear = nn.Linear(100, 33)
    x = torch.randn(2, 5, 100)
    q = QuantLinear.from_float(linear, scheme, simulated=True)
    w = fake_quantize(linear.weight, scheme.weights)
    values = x if scheme.activations is None else fake_quantize(x, scheme.activations, Operand.ACTIVATION)
    expected = nn.functional.linear(values, w, linear.bias)
    assert relative_error(q(x), expected) < 1e-6
    assert torch.equal(q.dequantized_weight(), w)


@pytest.mark.parametrize("scheme", SIMULATED_ONLY, ids=str)
def test_running_them_in_integers_is_an_error_that_says_why(scheme):
    if scheme.weight_only and scheme.weights.bits > 8:
        match = "activations stay float"
    else:
        match = "cannot run in integers: .*simulate"
    with pytest.raises(SchemeError, match=match):
        QuantLinear.from_float(nn.Linear(100, 33), scheme)


def test_weight_only_multiplies_the_dequantised_weight():
    linear = nn.Linear(100, 33)
    q = QuantLinear.from_float(linear, "w8a16")
    assert q.mode is Mode.WEIGHT_ONLY
    x = torch.randn(4, 100)
    assert torch.equal(
        q(x), nn.functional.linear(x, fake_quantize(linear.weight, PRESETS["w8a16"].scheme.weights), linear.bias)
    )


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_bad_token_spoils_only_itself_in_simulation_too(bad):
    q = QuantLinear.from_float(nn.Linear(100, 33), SIMULATED_ONLY[1], simulated=True)
    x = torch.randn(4, 100)
    expected = q(x[[0, 2, 3]])
    x[1, 5] = bad
    y = q(x)
    assert y[1].isnan().all()
    assert relative_error(y[[0, 2, 3]], expected) < 1e-6


def test_the_float_weight_is_neither_kept_nor_modified():
    linear = nn.Linear(64, 32)
    before = linear.weight.clone()
    q = QuantLinear.from_float(linear, "w8a8")
    assert torch.equal(linear.weight, before)
    assert list(q.parameters()) == []
    floats = [b for b in q.buffers() if b.is_floating_point()]
    assert sum(b.numel() for b in floats) == 32 + 32  # scales and bias
    linear.bias.data.zero_()
    assert q.bias.abs().sum() > 0


@pytest.mark.parametrize(
    ("scheme", "shapes"),
    [
        (Scheme.of("w8a8"), {"weight": (32, 64), "weight_scale": (32, 1), "bias": (32,)}),
        (Scheme.of("w8a8-o1"), {"weight": (32, 64), "weight_scale": (1,), "bias": (32,)}),
        (Scheme(QuantSpec(8, PerGroup(16)), TOKEN), {"weight": (32, 64), "weight_scale": (32, 4), "bias": (32,)}),
    ],
    ids=str,
)
def test_the_state_dict_has_the_names_and_shapes_of_the_file(scheme, shapes):
    q = QuantLinear.from_float(nn.Linear(64, 32), scheme)
    assert {name: tuple(t.shape) for name, t in q.state_dict().items()} == shapes
    assert q.weight.dtype is torch.int8
    assert q.weight_scale.dtype is torch.float32


def test_an_asymmetric_weight_has_zero_points_in_the_state_dict():
    q = QuantLinear.from_float(nn.Linear(64, 32), Scheme(QuantSpec(8, PerChannel(), symmetric=False), TOKEN))
    assert q.mode is Mode.INTEGER
    assert q.state_dict()["weight_zero_point"].dtype is torch.int32


@pytest.mark.parametrize("bias", [True, False])
def test_the_state_dict_survives_torch_save_with_weights_only(bias):
    q = QuantLinear.from_float(nn.Linear(100, 33, bias=bias), "w8a8-asym")
    file = io.BytesIO()
    torch.save(q.state_dict(), file)
    file.seek(0)
    fresh = QuantLinear.from_float(nn.Linear(100, 33, bias=bias), "w8a8-asym")
    x = torch.randn(4, 100)
    assert not torch.equal(fresh(x), q(x))
    fresh.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(fresh(x), q(x))


@pytest.mark.parametrize("granularity", [PerChannel(), PerGroup(3)], ids=str)
@pytest.mark.parametrize("simulated", [False, True])
def test_the_state_dict_of_a_weight_only_layer_has_words(granularity, simulated):
    q = QuantLinear.from_float(nn.Linear(9, 4), Scheme(QuantSpec(8, granularity)), simulated=simulated)
    held = q.state_dict()
    assert set(held) == {"weight_packed", "weight_shape", "weight_scale", "bias"}
    assert torch.equal(unpack_rows(held["weight_packed"], 8, 9), q.weight)
    fresh = QuantLinear(9, 4, q.scheme, bias=torch.float32, simulated=simulated)
    fresh.load_state_dict(held)
    assert torch.equal(fresh.weight, q.weight)
    del held["weight_packed"], held["weight_shape"]
    fresh = QuantLinear(9, 4, q.scheme, bias=torch.float32, simulated=simulated)
    fresh.load_state_dict({**held, "weight": q.weight})  # as it was before words were written
    assert torch.equal(fresh.weight, q.weight)
    with pytest.raises(RuntimeError, match=r"Missing key\(s\) in state_dict: \"weight\""):
        fresh.load_state_dict(held)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight_packed": torch.zeros(4, 2, dtype=torch.int32)}, r"expected int32 of shape \(4, 3\)"),
        ({"weight_packed": torch.zeros(4, 3)}, r"is torch\.float32 of shape \(4, 3\), expected int32"),
        ({"weight_shape": torch.tensor([4, 12])}, r"weight_shape is \[4, 12\], expected \[4, 9\]"),
    ],
)
def test_words_that_do_not_fit_change_nothing(change, message):
    q = QuantLinear.from_float(nn.Linear(9, 4), "w8a16")
    before = q.weight.clone()
    with pytest.raises(RuntimeError, match=message):
        q.load_state_dict(q.state_dict() | change)
    assert torch.equal(q.weight, before)


def test_a_float_state_dict_is_refused_instead_of_truncated():
    linear = nn.Linear(100, 33)
    q = QuantLinear.from_float(linear, "w8a8")
    before = q.weight.clone()
    with pytest.raises(RuntimeError, match=r"weight is torch.float32, this QuantLinear holds torch.int8"):
        q.load_state_dict(linear.state_dict(), strict=False)
    assert torch.equal(q.weight, before)


def test_a_copy_computes_the_same_and_has_its_own_page_in_the_ledger():
    q = QuantLinear.from_float(nn.Linear(100, 33), "w8a8")
    x = torch.randn(4, 100)
    y = q(x)
    other = copy.deepcopy(q)
    assert torch.equal(other(x), y)
    other(x)
    assert sum(q.kernel_calls().values()) == 1
    assert sum(other.kernel_calls().values()) == 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_cast_of_the_model_leaves_the_grid_alone(dtype):
    model = nn.Sequential(QuantLinear.from_float(nn.Linear(100, 33), "w8a8"))
    before = {name: t.clone() for name, t in model.state_dict().items()}
    model.to(dtype)
    assert model[0].bias.dtype is dtype
    assert model[0].weight_scale.dtype is torch.float32
    assert torch.equal(model[0].weight_scale, before["0.weight_scale"])
    assert torch.equal(model[0].weight, before["0.weight"])
    model.half().float()
    assert torch.equal(model[0].weight_scale, before["0.weight_scale"])


def test_a_wide_simulated_weight_survives_a_cast():
    q = QuantLinear.from_float(nn.Linear(16, 8), SIMULATED_ONLY[3], simulated=True)
    before = q.weight.clone()
    assert torch.equal(q.half().weight, before)


def test_moving_to_another_device_moves_everything():
    q = QuantLinear.from_float(nn.Linear(100, 33), "w8a8").to("meta")
    assert all(b.is_meta for b in q.buffers())
    assert q(torch.empty(2, 100, device="meta")).shape == (2, 33)


def test_the_layer_tells_scheme_and_kernel():
    linear = nn.Linear(100, 33)
    assert "bias=True, scheme=w8a8, kernel=native (auto)" in repr(QuantLinear.from_float(linear, "w8a8"))
    assert "scheme=w8a8, simulated" in repr(QuantLinear.from_float(linear, "w8a8", simulated=True))
    assert "kernel=reference" in repr(QuantLinear.from_float(linear, "w8a8", kernel="reference"))


def test_a_conv1d_is_transposed_once():
    conv = Conv1D(33, 100)
    nn.init.normal_(conv.bias)
    linear = nn.Linear(100, 33)
    linear.weight.data, linear.bias.data = conv.weight.data.t().contiguous(), conv.bias.data
    x = torch.randn(4, 100)
    q = QuantLinear.from_float(conv, "w8a8")
    assert q.weight.is_contiguous()
    assert q.weight.shape == (33, 100)
    same = QuantLinear.from_float(linear, "w8a8")
    assert torch.equal(q(x), same(x))
    assert q.weight_sqnr_db == pytest.approx(same.weight_sqnr_db, rel=1e-9)


@pytest.mark.parametrize("scheme", ["w8a8", "w8a8-asym", "w8a8-o1", "w8a16", *SIMULATED_ONLY], ids=str)
def test_a_layer_knows_what_its_weight_lost_until_it_takes_other_codes(scheme):
    linear = nn.Linear(100, 30)
    q = QuantLinear.from_float(linear, scheme, simulated=True)
    assert q.weight_sqnr_db == pytest.approx(sqnr_db(linear.weight.detach(), q.dequantized_weight()), rel=1e-9)
    assert copy.deepcopy(q).weight_sqnr_db == q.weight_sqnr_db
    q.load_state_dict(q.state_dict())
    assert q.weight_sqnr_db is None


def test_static_activations_need_their_grid():
    static = Scheme(QuantSpec(), QuantSpec(symmetric=False, dynamic=False))
    linear = nn.Linear(8, 4)
    with pytest.raises(SchemeError, match=r"give input_params=QParams\(scale, zero_point\)"):
        QuantLinear.from_float(linear, static)
    with pytest.raises(SchemeError, match="have 2 scales and no zero point"):
        QuantLinear.from_float(linear, static, input_params=QParams(torch.ones(2), None))
    with pytest.raises(SchemeError, match="not static"):
        QuantLinear.from_float(linear, "w8a8", input_params=QParams(torch.ones(1), None))
    with pytest.raises(SchemeError, match=r"the zero point 200, outside -128\.\.127"):
        QuantLinear.from_float(linear, static, input_params=QParams(torch.tensor(0.1), torch.tensor(200)))
    with pytest.raises(SchemeError, match="which is not positive and finite"):
        QuantLinear.from_float(linear, static, input_params=QParams(torch.tensor(-0.1), torch.tensor(0)))
    params = QParams(torch.tensor(0.1), torch.tensor(3))
    q = QuantLinear.from_float(linear, static, input_params=params)
    assert set(q.state_dict()) == {"weight", "weight_scale", "bias", "input_scale", "input_zero_point"}
    simulated = QuantLinear.from_float(linear, static, simulated=True, input_params=params)
    x = torch.randn(3, 8)
    assert torch.equal(simulated(x), q(x))
    wide = Scheme(QuantSpec(), QuantSpec(12, symmetric=False, dynamic=False))
    fixed = QuantLinear.from_float(linear, wide, simulated=True, input_params=params)
    grid = QParams(torch.tensor([0.1]), torch.tensor([3], dtype=torch.int32))
    expected = nn.functional.linear(
        fake_quantize_tokens(x, wide.activations, grid), fixed.dequantized_weight(), linear.bias
    )
    assert relative_error(fixed(x), expected) < 1e-6


def test_a_sum_that_could_overflow_is_refused():
    with pytest.raises(SchemeError, match="could overflow the int32 sum, which holds K < 133"):
        QuantLinear(133_153, 1, Scheme.of("w8a8"), bias=None, device="meta")
    assert QuantLinear(133_000, 1, Scheme.of("w8a8"), bias=None, device="meta").mode is Mode.INTEGER
    with pytest.raises(SchemeError, match="could overflow"):
        QuantLinear(70_000, 1, Scheme.of("w8a8-asym"), bias=None, device="meta")


def test_groups_must_divide_k():
    with pytest.raises(SchemeError, match="K=100 does not divide into groups of 64"):
        QuantLinear(100, 4, Scheme(QuantSpec(8, PerGroup(64)), TOKEN), bias=None)


def test_what_is_not_a_linear_layer_is_refused():
    with pytest.raises(SchemeError, match=r"expected nn\.Linear or transformers' Conv1D, found LayerNorm"):
        QuantLinear.from_float(nn.LayerNorm(8))
    with pytest.raises(SchemeError, match="no values yet; load the model first"):
        QuantLinear.from_float(nn.Linear(8, 8, device="meta"))
    with pytest.raises(SchemeError, match="the last axis of the input must be 8"):
        QuantLinear.from_float(nn.Linear(8, 8), "w8a8", simulated=True)(torch.randn(2, 9))


def test_the_ledger_of_a_model_names_its_integer_layers():
    linear = nn.Linear(16, 16)
    model = nn.Sequential(
        QuantLinear.from_float(linear, "w8a8", kernel="reference"),
        QuantLinear.from_float(linear, "w8a8", simulated=True),
    )
    model(torch.randn(2, 16))
    assert ledger(model) == {"0": {"reference": 1}}


def test_the_training_flag_is_carried_over():
    assert not QuantLinear.from_float(nn.Linear(4, 4).eval()).training
    assert QuantLinear.from_float(nn.Linear(4, 4)).training


@pytest.mark.parametrize("simulated", [True, False])
@pytest.mark.parametrize("name", ["w8a8", "w8a16"])
def test_an_integer_input_is_refused_instead_of_cut_to_integers(name, simulated):
    q = QuantLinear.from_float(nn.Linear(8, 4), name, simulated=simulated)
    with pytest.raises(SchemeError, match=r"the input is torch\.int64, a linear layer takes float tensors"):
        q(torch.ones(2, 8, dtype=torch.int64))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="resident memory is read as Linux tells it")
@pytest.mark.skipif(native.unavailable_because() is not None, reason="the native kernel is not here")
def test_codes_of_many_layers_are_in_memory_once():
    """The codes before packing go back to the system: malloc would leave a hole as large beside each layer."""

    def resident():
        (line,) = [x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("RssAnon:")]
        return 1024 * int(line.split()[1])

    linears = [nn.Linear(2048, 5632, bias=False, dtype=torch.bfloat16) for _ in range(10)]
    before = resident()
    layers = [QuantLinear.from_float(linear) for linear in linears]
    held = sum(layer.packed_weight.numel() for layer in layers)
    assert resident() - before < 1.4 * held
