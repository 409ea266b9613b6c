"""The gradient of a simulated layer beside one that is written out by hand."""

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad

import w8a8
from tests.conftest import llama
from w8a8.core.affine import QParams
from w8a8.core.scheme import PRESETS, PerChannel, PerColumn, PerGroup, PerTensor, PerToken, QuantSpec, Scheme
from w8a8.layers.linear import Mode, QuantLinear

pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning"),
    pytest.mark.not_under("inference", reason="inference mode has no gradients"),
]
# torch's own forward mode

SCHEMES = [
    *(preset.scheme for preset in PRESETS.values()),
    Scheme(QuantSpec(8, PerColumn()), QuantSpec(8, PerToken())),
    Scheme(QuantSpec(4, PerGroup(20)), QuantSpec(4, PerChannel(), symmetric=False)),
    Scheme(QuantSpec(12, PerChannel()), QuantSpec(16, PerToken())),
    Scheme(QuantSpec(8, PerChannel()), QuantSpec(4, PerTensor(), symmetric=False, dynamic=False)),
]
SCALE = 0.3  # of static grids: four bits end at 4.5 or less, so that some of a normal sample's triple is clamped


def simulated(scheme, *, bias=True, dtype=torch.float32):
    zero_point = None if scheme.activations is None or scheme.activations.symmetric else torch.tensor([2]).int()
    params = QParams(torch.tensor([SCALE]), zero_point) if scheme.static else None
    return QuantLinear.from_float(
        nn.Linear(100, 33, bias=bias, dtype=dtype), scheme, simulated=True, input_params=params
    )


def by_hand(q, x, gradient):
    """dL/dx of y = x W~^T + b, nothing where a static grid clamps."""
    of_x = torch.einsum("...n,nk->...k", gradient, q.dequantized_weight())
    spec = q.scheme.activations
    if q.scheme.static:
        zero = 0 if q.input_zero_point is None else int(q.input_zero_point)
        codes = torch.round(x / SCALE) + zero
        of_x = torch.where((codes >= -(2 ** (spec.bits - 1))) & (codes <= 2 ** (spec.bits - 1) - 1), of_x, 0.0)
    return of_x


@pytest.mark.parametrize("shape", [(100,), (5, 100), (2, 3, 100)], ids=str)
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_in_reverse_mode_it_is_the_one_by_hand(scheme, shape):
    q = simulated(scheme)
    x = (3 * torch.randn(shape)).requires_grad_()
    q.bias.requires_grad_()
    with torch.no_grad():
        expected = q(x)
    y = q(x)
    assert torch.equal(y, expected)
    gradient = torch.randn_like(y)
    y.backward(gradient)
    torch.testing.assert_close(x.grad, by_hand(q, x.detach(), gradient), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(q.bias.grad, gradient.reshape(-1, 33).sum(0), rtol=1e-5, atol=1e-5)


def test_autocast_changes_no_derivative():
    q = simulated(Scheme.of("w8a8"))
    q.bias.requires_grad_()
    x = torch.randn(5, 100, requires_grad=True)
    gradient, tangent = torch.randn(5, 33), torch.randn(5, 100)
    want = torch.autograd.grad(q(x), (x, q.bias), gradient)
    _, forward = torch.func.jvp(q, (x,), (tangent,))
    with torch.autocast("cpu", torch.bfloat16):
        found = torch.autograd.grad(q(x), (x, q.bias), gradient)
        _, forward_found = torch.func.jvp(q, (x,), (tangent,))
    assert torch.equal(found[0], want[0])
    assert torch.equal(found[1], want[1])
    assert torch.equal(forward_found, forward)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_in_forward_mode_it_is_the_one_by_hand(scheme):
    q, x, tangent, gradient = simulated(scheme), 3 * torch.randn(5, 100), torch.randn(5, 100), torch.randn(5, 33)
    of_bias = torch.randn(33)
    expected, bias = q(x), q.bias
    with forward_ad.dual_level():
        q.bias = forward_ad.make_dual(bias, of_bias)
        y, found = forward_ad.unpack_dual(q(forward_ad.make_dual(x, tangent)))
        q.bias = bias
    assert torch.equal(y, expected)
    # <J t, g> = <t, J^T g>
    by = (by_hand(q, x, gradient) * tangent).sum() + (gradient.sum(0) * of_bias).sum()
    torch.testing.assert_close((found * gradient).sum(), by, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("name", ["w8a8", "w8a8-tensor", "w8a8-static", "w8a16"])
def test_functorchs_ways_agree(name):
    scheme = PRESETS[name].scheme
    q, x, gradient = simulated(scheme, bias=name != "w8a8"), 3 * torch.randn(5, 100), torch.randn(5, 33)
    by = by_hand(q, x, gradient)
    found = torch.func.grad(lambda v: (q(v) * gradient).sum())(x)
    torch.testing.assert_close(found, by, rtol=1e-5, atol=1e-5)
    y, tangent = torch.func.jvp(q, (x,), (x,))
    assert torch.equal(y, q(x))
    torch.testing.assert_close((tangent * gradient).sum(), (by * x).sum(), rtol=1e-4, atol=1e-3)


def test_a_static_grid_passes_nothing_where_it_clamps():
    q = simulated(Scheme(QuantSpec(8, PerChannel()), QuantSpec(4, PerTensor(), dynamic=False)))
    x = torch.zeros(1, 100)
    x[0, :4] = torch.tensor([-8.4, -8.6, 7.4, 7.6]) * SCALE  # codes -8, -9, 7, 8 before the clamp
    x.requires_grad_()
    q(x).sum().backward()
    column = q.dequantized_weight().sum(0)
    assert (x.grad[0, [1, 3]] == 0).all()
    torch.testing.assert_close(x.grad[0, [0, 2, 5]], column[[0, 2, 5]], rtol=1e-5, atol=1e-5)


def test_a_second_derivative_is_that_of_a_linear_layer():
    q, x = simulated(PRESETS["w8a8"].scheme), torch.randn(3, 100, requires_grad=True)
    (of_x,) = torch.autograd.grad(q(x).square().sum(), x, create_graph=True)
    (again,) = torch.autograd.grad(of_x.square().sum(), x)
    w = q.dequantized_weight()
    torch.testing.assert_close(again, 2 * (2 * of_x.detach() @ w.t() @ w), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_derivatives_have_the_dtype_of_what_they_are_of(dtype):
    q, x = simulated(PRESETS["w8a8"].scheme, dtype=dtype), torch.randn(3, 100, dtype=dtype, requires_grad=True)
    q.bias.requires_grad_()
    q(x).sum().backward()
    assert x.grad.dtype is dtype
    assert q.bias.grad.dtype is dtype
    expected = by_hand(q, x.detach(), torch.ones(3, 33)).to(dtype)
    torch.testing.assert_close(x.grad, expected, rtol=0.01, atol=0.01)


@pytest.mark.parametrize("simulated", [True, False])
def test_a_weight_only_layer_has_the_gradients_of_its_product(simulated):
    q = QuantLinear.from_float(nn.Linear(100, 33), "w8a16", simulated=simulated)
    assert q.mode is (Mode.SIMULATED if simulated else Mode.WEIGHT_ONLY)
    x, gradient = torch.randn(5, 100, requires_grad=True), torch.randn(5, 33)
    q(x).backward(gradient)
    torch.testing.assert_close(x.grad, by_hand(q, x.detach(), gradient), rtol=1e-5, atol=1e-5)
    _, tangent = torch.func.jvp(q, (x.detach(),), (x.detach(),))
    torch.testing.assert_close(tangent, x.detach() @ q.dequantized_weight().t(), rtol=1e-4, atol=1e-4)


def test_a_bad_token_spoils_no_others_gradient():
    q, x = simulated(PRESETS["w8a8"].scheme), torch.randn(3, 100)
    x[1, 5] = torch.nan
    x.requires_grad_()
    y = q(x)
    y[[0, 2]].sum().backward()
    torch.testing.assert_close(x.grad[[0, 2]], by_hand(q, x.detach(), torch.ones(3, 33))[[0, 2]], rtol=1e-5, atol=1e-5)


def test_a_simulated_model_passes_gradients_to_its_embedding():
    model = llama()
    w8a8.simulate(model, "w8a8")
    model(torch.randint(0, 96, (1, 8)), use_cache=False).logits.square().sum().backward()
    of_embedding = model.get_input_embeddings().weight.grad
    assert of_embedding is not None
    assert float(of_embedding.norm()) > 0
