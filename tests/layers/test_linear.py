import copy
import math

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from tests.conftest import TOKEN, relative_error
from w8a8 import kernels
from w8a8.core.affine import fake_quantize, qparams, sqnr_db
from w8a8.core.scheme import (
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
from w8a8.errors import SchemeError
from w8a8.layers.linear import Mode, QuantLinear, ledger

pytestmark = pytest.mark.kernels
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


@pytest.mark.parametrize("simulated", [True, False])
@pytest.mark.parametrize("cast", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scheme", [*PRESETS, *SIMULATED_ONLY], ids=str)
def test_autocast_changes_nothing_in_a_quantised_layer(scheme, dtype, cast, simulated):
    linear, x = nn.Linear(600, 33), torch.randn(3, 7, 600).to(dtype)
    grid = measured(scheme, x) if scheme in PRESETS else None
    layer = QuantLinear.from_float(linear, scheme, simulated=simulated or scheme in SIMULATED_ONLY, input_params=grid)
    want = layer(x)
    with torch.autocast("cpu", cast):
        y = layer(x)
    assert y.dtype is dtype
    assert torch.equal(y, want)


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


def test_a_copy_computes_the_same_and_has_its_own_page_in_the_ledger():
    q = QuantLinear.from_float(nn.Linear(100, 33), "w8a8")
    x = torch.randn(4, 100)
    y = q(x)
    other = copy.deepcopy(q)
    assert torch.equal(other(x), y)
    other(x)
    assert sum(q.kernel_calls().values()) == 1
    assert sum(other.kernel_calls().values()) == 2


def test_the_layer_tells_scheme_and_kernel():
    linear = nn.Linear(100, 33)
    first = kernels.first_choice("auto")
    assert f"bias=True, scheme=w8a8, kernel={first} (auto)" in repr(QuantLinear.from_float(linear, "w8a8"))
    assert "scheme=w8a8, simulated" in repr(QuantLinear.from_float(linear, "w8a8", simulated=True))
    assert "kernel=reference" in repr(QuantLinear.from_float(linear, "w8a8", kernel="reference"))


@pytest.mark.kernels
@pytest.mark.parametrize("why", ["zero points", "groups", "a sum as long as int32 holds"])
def test_a_layer_that_native_does_not_run_tells_the_kernel_that_ran(why):
    weights = {"zero points": QuantSpec(8, PerChannel(), symmetric=False), "groups": QuantSpec(8, PerGroup(16))}
    scheme = Scheme(weights.get(why, QuantSpec(8, PerChannel())), QuantSpec(8, PerToken()))
    q = QuantLinear.from_float(nn.Linear(133_144 if why.startswith("a sum") else 64, 2, bias=False), scheme)
    q(torch.randn(1, q.in_features))
    ((ran, _),) = q.kernel_calls().items()
    assert ran != "native"
    assert f"kernel={ran} (auto)" in repr(q)


def test_a_conv1d_is_transposed_once():
    conv = Conv1D(33, 100)
    nn.init.normal_(conv.bias)
    linear = nn.Linear(100, 33)
    linear.weight.data, linear.bias.data = conv.weight.data.t().contiguous(), conv.bias.data
    x = torch.randn(4, 100)
    q = QuantLinear.from_float(conv, "w8a8")
    assert q.codes.is_contiguous()
    assert q.codes.shape == (33, 100)
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


def test_a_sum_that_could_overflow_is_refused():
    with pytest.raises(SchemeError, match="could overflow the int32 sum, which holds K up to 133144"):
        QuantLinear(133_145, 1, Scheme.of("w8a8"), bias=None, device="meta")
    assert QuantLinear(133_144, 1, Scheme.of("w8a8"), bias=None, device="meta").mode is Mode.INTEGER
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
