"""What runs in one pass with a product, and between products, against plain PyTorch and exact arithmetic."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.kernels.test_door import WRONG, Interferes, K, X
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


_WIDTHS = (16, 16, 8, 8, 16, 16, 16, 16, 48)  # of the slots below: heads of 4, two to one of the keys


class _Block:
    """A block as a plan: x -> (attended, the sum with x and its norm in layers that read it)."""

    def __init__(self) -> None:
        self.first, (self.out,), (self.last,) = _linears(16, 16, 8, 8), _linears(16, 16), _linears(16, 48)
        self.norm = _norm(16)
        held = {"weight": self.norm.weight, "bias": self.norm.bias}
        self.steps = (
            (0, 0, -1, -1, -1, None, _told(self.first, *["identity"] * 3), (1, 2, 3)),
            (3, 1, 2, 3, 4, 2, 0, 0.5, False, 4),
            (0, 4, -1, -1, -1, None, _told([self.out], "identity"), (5,)),
            (0, 5, 0, 6, 7, ((held, "weight"), (held, "bias"), 1e-5, 16), _told([self.last], "gelu"), (8,)),
        )

    def run(self, x: Tensor, mask: Tensor, read: tuple[int, ...] | None = None) -> tuple[Tensor, ...] | None:
        return fused.run(_WIDTHS, self.steps, (x,), (mask,), (6, 8), read)

    def by_steps(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        q, k, v = (layer(x).unflatten(-1, (-1, 4)).transpose(1, 2) for layer in self.first)
        y = self.out(fused.attention(q, k, v, mask, 0.5, False).flatten(-2))
        total, _, last = fused.linears(y, _told([self.last], "gelu"), self.norm, x, wants_sum=True)
        return total, last


def _seen(*lengths: int) -> Tensor:
    return torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]


@pytest.mark.parametrize("axes", [2, 4])
def test_steps_in_one_call_have_the_bits_that_each_has_alone(axes):
    block, x = _Block(), torch.randn(3, 9, 16)
    seen = _seen(9, 4, 7)[:, None, None]
    seen = seen if axes == 4 else torch.rand(9, 9) < 0.7
    bias = torch.zeros_like(seen, dtype=torch.float32).masked_fill(~seen, torch.finfo(torch.float32).min)
    for mask in (seen, bias, seen.expand(3, 1, 9, 9)):
        for one, other in zip(block.run(x, mask), block.by_steps(x, mask), strict=True):
            assert torch.equal(one, other)


def test_padding_that_is_left_out_is_zero_and_what_is_left_is_computed_alone():
    block, x, seen = _Block(), torch.randn(3, 9, 16), _seen(9, 4, 7)
    seen[2] = torch.tensor([0, 1, 1, 0, 0, 1, 0, 1, 1])
    found = block.run(x, seen[:, None, None], ())
    for row in range(3):
        alone = block.by_steps(x[row : row + 1, seen[row]], None)
        assert all(torch.equal(y[row, seen[row]], other[0]) for y, other in zip(found, alone, strict=True))
    assert not any(y[~seen].any() for y in found)


def test_a_text_in_which_padding_is_read_is_computed_whole():
    block, x, seen = _Block(), torch.randn(3, 9, 16), _seen(9, 4, 2)
    (found, _), (whole, _) = block.run(x, seen[:, None, None], (-6,)), block.run(x, seen[:, None, None])
    assert torch.equal(found[1], torch.where(seen[1, :, None], whole[1], 0))  # the fourth token is one of its own
    assert torch.equal(found[2], whole[2])


def test_a_mask_that_says_more_than_who_is_padding_leaves_nobody_out():
    block, x = _Block(), torch.randn(2, 6, 16)
    for mask in (torch.rand(2, 1, 6, 6) < 0.5, torch.randn(2, 1, 1, 6), torch.zeros(2, 1, 1, 6, dtype=torch.bool)):
        assert all(torch.equal(a, b) for a, b in zip(block.run(x, mask, ()), block.run(x, mask), strict=True))


def _with(place: int, at: int, value: object) -> tuple[object, ...]:
    steps = list(_Block().steps)
    steps[place] = (*steps[place][:at], value, *steps[place][at + 1 :])
    return tuple(steps)


_STEPS = {
    "a slot that is none": _with(0, 1, 99),
    "a slot that nothing wrote": _with(0, 1, 4),
    "a slot of another width": _with(3, 2, 2),
    "a slot that is written twice": _with(2, 7, (1,)),
    "an input that is written": _with(3, 3, 0),
    "heads that do not divide": _with(1, 4, 5),
    "no heads": _with(1, 4, 0),
    "keys that heads cannot share": _with(1, 5, 3),
    "a mask that is none": _with(1, 6, 1),
    "a kind that is none": _with(0, 0, 7),
    "a sum of one": _with(3, 2, -1),
    "a norm of another width": _with(3, 5, (None, None, 1e-5, 48)),
    "a norm that is none": _with(3, 5, (1, 2)),
    "weights that nobody holds": _with(3, 5, (({}, "weight"), None, 1e-5, 16)),
    "layers without outputs": _with(0, 7, (1, 2)),
    "layers of another input": _with(2, 6, _told(_linears(8, 16), "identity")),
    "layers that are none": _with(0, 6, (1, 2, 3)),
    "nine layers": _with(0, 6, _told(_linears(16, *[8] * 9), *["identity"] * 9)),
    "one scale for all rows": _with(2, 6, _told(_linears(16, 16, scheme="w8a8-tensor"), "identity")),
    "a number too large": _with(0, 1, 2**80),
    "no number": _with(1, 7, "x"),
    "a step of more fields": ((*_Block().steps[0], 1), *_Block().steps[1:]),
    "layers in a step as long as an attention": ((*_Block().steps[0], 1, 1), *_Block().steps[1:]),
    "an attention of fewer fields": (_Block().steps[0], _Block().steps[1][:8], *_Block().steps[2:]),
    "a step of nothing": ((), *_Block().steps[1:]),
    "a step that is none": (None, *_Block().steps[1:]),
    "no steps": (),
}


@pytest.mark.parametrize("name", _STEPS)
def test_steps_that_make_no_sense_are_an_error_or_nothing(name):
    x, mask = torch.randn(2, 5, 16), torch.ones(5, 5, dtype=torch.bool)
    try:
        assert fused.run(_WIDTHS, _STEPS[name], (x,), (mask,), (6, 8), ()) is None
    except (TypeError, KeyError, OverflowError):
        return


_X = torch.randn(2, 5, 16)
_CALLS = {
    "a slot less": (_WIDTHS[:-1], (_X,), (6,), ()),
    "an input of another width": ((17, *_WIDTHS[1:]), (_X,), (6,), ()),
    "a slot beyond all memory": ((*_WIDTHS, 2**62), (_X,), (6,), ()),
    "no inputs": (_WIDTHS, (), (6,), ()),
    "more inputs than slots": (_WIDTHS, (_X,) * 10, (6,), ()),
    "an input that a step writes": (_WIDTHS, (_X, _X), (6,), ()),
    "an output twice": (_WIDTHS, (_X,), (6, 6), ()),
    "an input as output": (_WIDTHS, (_X,), (0,), ()),
    "an output before all": (_WIDTHS, (_X,), (-1,), ()),
    "an output by name": (_WIDTHS, (_X,), ("x",), ()),
    "a token behind all": (_WIDTHS, (_X,), (6,), (5,)),
    "a token before all": (_WIDTHS, (_X,), (6,), (-6,)),
    "a token by name": (_WIDTHS, (_X,), (6,), ("x",)),
    "a list": (_WIDTHS, [_X], (6,), ()),
}


@pytest.mark.parametrize("name", _CALLS)
def test_calls_of_a_plan_that_make_no_sense_are_an_error_or_nothing(name):
    widths, inputs, outputs, read = _CALLS[name]
    mask = torch.ones(5, 5, dtype=torch.bool)
    try:
        assert fused.run(widths, _Block().steps, inputs, (mask,), outputs, read) is None
    except TypeError:
        return


@pytest.mark.parametrize("kind", X | WRONG)
def test_a_plan_takes_tensors_of_its_own_shape_in_memory_or_none(kind):
    layers, x, tokens = _linears(K, 8), torch.randn(4, K), torch.randn(1, K, 16)
    given = (X | WRONG)[kind](x)
    rows = given.view(2, 2, K) if isinstance(given, Tensor) and _is_plain(given, x) else given
    product = ((0, 0, -1, -1, -1, None, _told(layers, "identity"), (1,)),)
    attention = ((3, 0, 0, 0, 1, 1, 0, 1.0, False, 1),)
    with torch.no_grad():
        found = fused.run((K, 8), product, (rows,), (), (1,), None)
        assert found is None or torch.allclose(found[0], layers[0](rows), rtol=1e-4, atol=1e-5)
        found = fused.run((16, 16), attention, (tokens,), (given,), (1,), None)
        if found is not None:
            heads = tokens[:, None]
            wanted = fused.plain_attention(heads, heads, heads, given, 1.0, False)
            assert torch.allclose(found[0], wanted[:, :, 0], rtol=1e-4, atol=1e-5)


def test_a_plan_looks_at_memory_after_the_last_code_of_others_ran():
    x, mask = torch.randn(2, 5, 16), torch.ones(5, 5, dtype=torch.bool)
    with Interferes(x, torch.empty(2, 5, 16)):
        assert _Block().run(x, mask) is None
