"""What runs in one pass with a product, and between products, against plain PyTorch and exact arithmetic."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.kernels.test_door import WRONG, K, X
from w8a8.kernels import compiled, fused
from w8a8.kernels.native import unavailable_because
from w8a8.layers.linear import QuantLinear

pytestmark = [
    pytest.mark.kernels,
    pytest.mark.skipif(unavailable_because() is not None, reason="there is no native kernel"),
]
ACTIVATIONS = list(fused.ACTIVATIONS)


def _norm(k: int) -> fused.Norm:
    return fused.Norm(torch.randn(k), torch.randn(k), 1e-5)


def _linears(k: int, *sizes: int, scheme: str = "w8a8") -> list[QuantLinear]:
    return [QuantLinear.from_float(torch.nn.Linear(k, n), scheme, kernel="native") for n in sizes]


def _told(layers: list[QuantLinear], *activations: str) -> tuple[fused.Layer, ...]:
    return tuple(
        fused.layer_of(layer._buffers, layer._call, name) for layer, name in zip(layers, activations, strict=True)
    )


@pytest.mark.parametrize("scheme", ["w8a8", "w8a8-asym"])
@pytest.mark.parametrize(("rows", "k"), [((1,), 16), ((3, 5), 100), ((2, 40), 384)])
def test_the_codes_are_those_of_the_norm_that_is_returned(rows, k, scheme):
    layers, norm = _linears(k, 33, 64, scheme=scheme), _norm(k)
    x, add = torch.randn(*rows, k), torch.randn(*rows, k)
    total, normed, first, second = fused.linears(x, _told(layers, "identity", "identity"), norm, add, wants_sum=True)
    assert torch.equal(total, x + add)
    assert torch.equal(first, layers[0](normed))
    assert torch.equal(second, layers[1](normed))


def test_layers_that_share_an_input_give_what_each_gives_alone():
    layers, x = _linears(100, 7, 96, 1), torch.randn(4, 9, 100)
    _, _, *outputs = fused.linears(x, _told(layers, *["identity"] * 3))
    assert all(torch.equal(y, layer(x)) for y, layer in zip(outputs, layers, strict=True))


def test_layers_of_one_scale_for_all_rows_share_it_but_run_behind_no_norm():
    layers, x = _linears(64, 10, 20, scheme="w8a8-tensor"), torch.randn(9, 64)
    _, _, *outputs = fused.linears(x, _told(layers, "identity", "identity"))
    assert all(torch.equal(y, layer(x)) for y, layer in zip(outputs, layers, strict=True))
    assert fused.linears(x, _told(layers, "identity", "identity"), _norm(64)) is None


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_an_activation_is_within_a_millionth_of_its_input(name):
    (layer,), x = _linears(64, 100), torch.randn(50, 64) * 20
    _, _, y = fused.linears(x, _told([layer], name))
    before = layer(x).double()
    exact = fused.ACTIVATIONS[name](before)
    assert ((y - exact).abs() <= 1e-6 * before.abs()).all()


def test_an_activation_of_what_is_not_finite_is_pytorchs():
    (layer,) = _linears(8, 5)
    x = torch.randn(3, 8)
    x[1, 2] = torch.nan
    for name in ACTIVATIONS:
        _, _, y = fused.linears(x, _told([layer], name))
        assert y[1].isnan().all()
        assert y[[0, 2]].isfinite().all()


@pytest.mark.parametrize("k", [1, 7, 16, 100, 768])
@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_a_norm_is_that_of_double_precision(k, offset):
    x, add, norm = torch.randn(5, k) + offset, torch.randn(5, k), _norm(k)
    total, normed = fused.norm(x, norm, add, wants_sum=True)
    exact = F.layer_norm(total.double(), (k,), norm.weight.double(), norm.bias.double(), norm.eps)
    # what the subtraction of the mean loses grows with it
    spread = (total.double().var(-1, correction=0) + norm.eps).sqrt()
    far = float((total.double().mean(-1).abs() / spread).max())
    assert float((normed - exact).abs().max()) <= 1e-6 * (1 + far) * float(exact.abs().max())


def test_a_norm_without_weight_and_sum_is_a_norm():
    x = torch.randn(2, 3, 40)
    total, normed = fused.norm(x, fused.Norm(None, None, 1e-6))
    assert total is None
    assert float((normed - F.layer_norm(x, (40,), eps=1e-6)).abs().max()) < 4e-6


def _masks(b: int, h: int, t: int, s: int) -> dict[str, Tensor | None]:
    seen = torch.rand(b, 1, 1, s) < 0.6
    seen[..., 0] = True
    return {
        "none": None,
        "keys": seen,
        "keys of each query": seen.expand(b, 1, t, s),
        "minus infinity": torch.zeros(b, 1, 1, s).masked_fill(~seen, -torch.inf),
        "the lowest number": torch.zeros(b, 1, t, s).masked_fill(~seen, torch.finfo(torch.float32).min),
        "a bias": torch.randn(1, h, t, s),
        "two axes": torch.randn(t, s),
    }


@pytest.mark.parametrize("mask", _masks(1, 1, 1, 1))
@pytest.mark.parametrize(
    ("b", "h", "t", "s", "d"), [(2, 3, 7, 7, 32), (1, 2, 1, 19, 20), (2, 4, 33, 40, 64), (1, 1, 5, 3, 1)]
)
def test_attention_is_that_of_double_precision(b, h, t, s, d, mask):
    q, k, v = (torch.randn(b, n, h, d).transpose(1, 2) for n in (t, s, s))
    seen = _masks(b, h, t, s)[mask]
    y = fused.attention(q, k, v, seen, 0.3, causal=False)
    wide = seen.double() if seen is not None and seen.is_floating_point() else seen
    exact = fused.plain_attention(q.double(), k.double(), v.double(), wide, 0.3, causal=False)
    assert y.shape == (b, t, h, d)
    assert y.is_contiguous()
    assert float((y - exact).abs().max()) <= 4e-6 * float(v.abs().max())


def test_attention_that_is_causal_sees_no_later_key_and_heads_may_share_keys():
    q, k, v = torch.randn(2, 6, 20, 16), torch.randn(2, 2, 20, 16), torch.randn(2, 2, 20, 16)
    y = fused.attention(q, k, v, None, 0.25, causal=True)
    exact = fused.plain_attention(q.double(), k.double(), v.double(), None, 0.25, causal=True)
    assert float((y - exact).abs().max()) <= 4e-6 * float(v.abs().max())


def test_a_query_that_sees_no_key_gives_zeros():
    q, k, v = (torch.randn(1, 1, 3, 8) for _ in range(3))
    seen = torch.tensor([[True, True, False], [False, False, False], [True, False, True]])
    y = fused.attention(q, k, v, seen, 1.0, causal=False)[0, :, 0]
    assert torch.equal(y[1], torch.zeros(8))
    assert (y[[0, 2]] != 0).all()


def test_a_nan_reaches_every_query_that_sees_it_and_no_other_head():
    q, k, v = (torch.randn(1, 2, 3, 8) for _ in range(3))
    k[0, 0, 1, 0] = torch.nan
    y = fused.attention(q, k, v, None, 1.0, causal=False)[0]
    assert y[:, 0].isnan().all()
    assert y[:, 1].isfinite().all()


def test_every_instruction_set_gives_the_same_bits():
    here = [name for name, reason in compiled.instruction_sets().items() if reason is None]
    (layer,), norm = _linears(100, 50), _norm(100)
    x, add = torch.randn(9, 100), torch.randn(9, 100)
    q, k, v, mask = torch.randn(2, 2, 9, 20), torch.randn(2, 2, 11, 20), torch.randn(2, 2, 11, 20), torch.randn(9, 11)
    forced = compiled.instruction_set() if len(compiled.choices()) == 0 else None
    found = {}
    try:
        for name in here:
            compiled.use_instruction_set(name)
            parts = [fused.linears(x, _told([layer], each), norm, add) for each in ACTIVATIONS]
            found[name] = [*(t for part in parts for t in part[1:]), fused.attention(q, k, v, mask, 0.5, causal=False)]
    finally:
        compiled.use_instruction_set(forced)
    first, *others = found.values()
    assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))


def test_what_the_kernel_does_not_take_is_left_to_others():
    (layer,), norm, x = _linears(16, 8), _norm(16), torch.randn(4, 16)
    told = _told([layer], "identity")
    assert fused.linears(x.bfloat16(), told) is None
    assert fused.linears(x.t().contiguous().t(), told) is None
    assert fused.linears(torch.randn(4, 17), told) is None
    assert fused.linears(x, told, fused.Norm(torch.randn(15), None, 1e-5)) is None
    assert fused.linears(x, told, norm, torch.randn(3, 16)) is None
    assert fused.norm(x.double(), norm) is None
    q = torch.randn(1, 2, 3, 4)
    assert fused.attention(q, q[:, :1], q, None, 1.0, causal=False) is None
    assert fused.attention(q, q, q, torch.zeros(3, 4), 1.0, causal=False) is None
    assert fused.attention(q, q, q[..., :2], None, 1.0, causal=False) is None


@pytest.mark.filterwarnings("ignore:kernel 'native' cannot run")
@pytest.mark.parametrize("kind", X | WRONG)
def test_whatever_it_is_handed_the_door_gives_what_is_right_or_nothing(kind):
    """As test_door.py has it for the layer alone; that no foreign memory is read is seen by `make door`."""
    (layer,), norm, x = _linears(K, 8), _norm(K), torch.randn(4, K)
    given = (X | WRONG)[kind](x)
    heads = given.view(1, 2, 2, K) if isinstance(given, Tensor) and _is_plain(given, x) else given
    q = x.view(1, 2, 2, K)
    calls = [
        (lambda t: fused.linears(t, _told([layer], "gelu"), norm, None), lambda t: _gelu_of(layer, norm, t), given),
        (lambda t: fused.norm(x, norm, t), lambda t: _added(x, norm, t), given),
        (
            lambda t: fused.norm(x, fused.Norm(t, None, 1e-5)),
            lambda t: _added(x, fused.Norm(t, None, 1e-5), None),
            given,
        ),
        (lambda t: fused.attention(t, q, q, None, 1.0, False), lambda t: _attended(t, q, q), heads),
        (lambda t: fused.attention(q, t, t, None, 1.0, False), lambda t: _attended(q, t, t), heads),
        (
            lambda t: fused.attention(q, q, q, t, 1.0, False),
            lambda t: fused.plain_attention(q, q, q, t, 1.0, False),
            heads,
        ),
    ]
    with torch.no_grad():
        for run, right, tensor in calls:
            try:
                found = run(tensor)
            except (TypeError, ValueError, RuntimeError):
                continue
            if found is None:
                continue
            wanted = right(tensor)
            y = found if isinstance(found, Tensor) else found[-1]
            assert torch.allclose(y, wanted, rtol=1e-4, atol=1e-5)


def _is_plain(given: Tensor, x: Tensor) -> bool:
    return given.layout is torch.strided and given.shape == x.shape and given.is_contiguous()


def _added(x: Tensor, norm: fused.Norm, add: Tensor | None) -> Tensor:
    return fused.plain_norm(x, norm, None if add is None else add.reshape(x.shape))[1]


def _gelu_of(layer: QuantLinear, norm: fused.Norm, x: Tensor) -> Tensor:
    return F.gelu(layer(fused.plain_norm(x, norm)[1]))


def _attended(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return fused.plain_attention(q, k, v, None, 1.0, False)
