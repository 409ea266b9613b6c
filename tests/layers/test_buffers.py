import io
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.conftest import TOKEN, needs, relative_error
from w8a8.core.affine import QParams
from w8a8.core.packed import unpack_rows
from w8a8.core.scheme import (
    PerChannel,
    PerGroup,
    PerToken,
    QuantSpec,
    Scheme,
)
from w8a8.core.tokens import fake_quantize_tokens
from w8a8.errors import SchemeError
from w8a8.layers.linear import Mode, QuantLinear

pytestmark = pytest.mark.kernels


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
    assert q.codes.dtype is torch.int8
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
    assert torch.equal(unpack_rows(held["weight_packed"], 8, 9), q.codes)
    fresh = QuantLinear(9, 4, q.scheme, bias=torch.float32, simulated=simulated)
    fresh.load_state_dict(held)
    assert torch.equal(fresh.codes, q.codes)
    del held["weight_packed"], held["weight_shape"]
    fresh = QuantLinear(9, 4, q.scheme, bias=torch.float32, simulated=simulated)
    fresh.load_state_dict({**held, "weight": q.codes})  # as it was before words were written
    assert torch.equal(fresh.codes, q.codes)
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
    before = q.codes.clone()
    with pytest.raises(RuntimeError, match=message):
        q.load_state_dict(q.state_dict() | change)
    assert torch.equal(q.codes, before)


def test_a_float_state_dict_is_refused_instead_of_truncated():
    linear = nn.Linear(100, 33)
    q = QuantLinear.from_float(linear, "w8a8")
    before = q.codes.clone()
    with pytest.raises(RuntimeError, match=r"weight is torch.float32, this QuantLinear holds torch.int8"):
        q.load_state_dict(linear.state_dict(), strict=False)
    assert torch.equal(q.codes, before)


@pytest.mark.parametrize("scheme", ["w8a8", "w8a8-asym", "w8a8-o1", "w8a16"])
def test_a_layer_that_others_fill_holds_what_the_file_has_and_then_its_own(scheme):
    made = QuantLinear.from_float(nn.Linear(9, 4), scheme)
    layer = QuantLinear.in_place_of(nn.Linear(9, 4, device="meta"), made.scheme)
    empty = list(layer._buffers)
    layer.as_stored({"weight": torch.empty(4, 9, dtype=torch.int8, device="meta")})
    assert set(layer.state_dict()) == {"weight", "weight_scale", "bias"}
    assert isinstance(layer.weight, torch.Tensor)
    layer.weight, layer.weight_scale, layer.bias = made.codes, made.weight_scale, made.bias
    came = layer.arrived()
    assert list(layer._buffers) == empty
    assert layer.codes.is_meta
    assert layer.weight_scale.is_meta
    assert came.keys() == {"weight", "weight_scale"}
    for key, tensor in came.items():
        layer.take(key, tensor)
    assert not isinstance(layer.weight, torch.Tensor)
    assert set(layer.state_dict()) == set(made.state_dict())
    assert torch.equal(layer(torch.ones(2, 9)), made(torch.ones(2, 9)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_cast_of_the_model_leaves_the_grid_alone(dtype):
    model = nn.Sequential(QuantLinear.from_float(nn.Linear(100, 33), "w8a8"))
    before = {name: t.clone() for name, t in model.state_dict().items()}
    model.to(dtype)
    assert model[0].bias.dtype is dtype
    assert model[0].weight_scale.dtype is torch.float32
    assert torch.equal(model[0].weight_scale, before["0.weight_scale"])
    assert torch.equal(model[0].codes, before["0.weight"])
    model.half().float()
    assert torch.equal(model[0].weight_scale, before["0.weight_scale"])


def test_a_wide_simulated_weight_survives_a_cast():
    wide = Scheme(QuantSpec(12, PerChannel(), symmetric=False), QuantSpec(16, PerToken()))
    q = QuantLinear.from_float(nn.Linear(16, 8), wide, simulated=True)
    before = q.codes.clone()
    assert torch.equal(q.half().codes, before)


def test_moving_to_another_device_moves_everything():
    q = QuantLinear.from_float(nn.Linear(100, 33), "w8a8").to("meta")
    assert all(b.is_meta for b in q.buffers())
    assert q(torch.empty(2, 100, device="meta")).shape == (2, 33)


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


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="resident memory is read as Linux tells it")
@needs("native")
@pytest.mark.once
def test_codes_of_many_layers_are_in_memory_once():
    """The codes before packing go back to the system: malloc would leave a hole as large beside each layer."""

    def resident():
        (line,) = [x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("RssAnon:")]
        return 1024 * int(line.split()[1])

    linears = [nn.Linear(2048, 5632, bias=False, dtype=torch.bfloat16) for _ in range(10)]
    before = resident()
    layers = [QuantLinear.from_float(linear, kernel="native") for linear in linears]
    held = sum(layer.packed_weight.numel() for layer in layers)
    assert resident() - before < 1.4 * held
