"""The equation, against a slow version written straight from the contract in Python's own numbers."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from w8a8.core.affine import (
    QParams,
    QTensor,
    dequantize,
    fake_quantize,
    l2_error,
    qparams,
    quantize,
    sqnr_db,
)
from w8a8.core.scheme import Operand, PerChannel, PerColumn, PerGroup, PerTensor, PerToken, QuantSpec
from w8a8.errors import NonFiniteError, SchemeError

W, A = Operand.WEIGHT, Operand.ACTIVATION
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
EVERY = [
    (W, PerTensor()),
    (W, PerChannel()),
    (W, PerColumn()),
    (W, PerGroup(4)),
    (A, PerTensor()),
    (A, PerToken()),
    (A, PerChannel()),
]
TINY = np.finfo(np.float32).tiny


def oracle(values, bits, symmetric):
    """Scale, zero point and codes of one group of float32 values: the contract, number by number."""
    f32 = np.float32
    values = [f32(v) for v in values]
    qmax = 2 ** (bits - 1) - 1
    lo = min([*values, f32(0)]) if not symmetric else f32(0)
    hi = max([*values, f32(0)]) if not symmetric else max([abs(v) for v in values], default=f32(0))
    width, steps = (hi - lo), (qmax if symmetric else 2**bits - 1)
    scale = f32(1) if width == 0 else max(f32(width) / f32(steps), TINY)
    if symmetric:
        return scale, None, [max(-qmax, min(qmax, _rint(v, scale))) for v in values]
    qmin = -(2 ** (bits - 1))
    zero_point = int(np.clip(np.rint(f32(qmin) - f32(lo) / scale), qmin, qmax))
    return scale, zero_point, [max(qmin, min(qmax, _rint(v, scale) + zero_point)) for v in values]


def _rint(value, scale):
    """Half to even of the float32 quotient; Python's round of an exact fraction is half to even."""
    return round(Fraction(float(np.float32(value) / np.float32(scale))))


def groups_of(shape, operand, granularity):
    """Index lists of the elements that share a scale, in the order of the flattened scale."""
    index = np.arange(math.prod(shape)).reshape(shape)
    match granularity:
        case PerTensor():
            return [index.ravel()]
        case PerToken():
            return list(index.reshape(-1, shape[-1]))
        case PerColumn():
            return list(index.reshape(-1, shape[-1]).T)
        case PerGroup(size):
            return list(index.reshape(-1, size))
    rows = index.reshape(-1, shape[-1])
    return list(rows) if operand is W else list(rows.T)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("operand", "granularity"), EVERY, ids=str)
def test_scales_zero_points_and_codes_are_those_of_the_contract(operand, granularity, symmetric, dtype):
    shape = (6, 12) if operand is W else (2, 3, 12)
    x = (torch.randn(shape) * 3 + 0.5).to(dtype)
    for bits in range(2, 9):
        spec = QuantSpec(bits, granularity, symmetric)
        q = quantize(x, spec, operand)
        assert q.codes.dtype is torch.int8
        flat, codes = x.to(torch.float32).flatten().numpy(), q.codes.flatten().numpy()
        for g, members in enumerate(groups_of(shape, operand, granularity)):
            scale, zero_point, expected = oracle(flat[members], bits, symmetric)
            assert q.scale.flatten()[g].item() == scale
            assert (q.zero_point is None) == symmetric
            if zero_point is not None:
                assert q.zero_point.flatten()[g].item() == zero_point
            assert codes[members].tolist() == expected


@settings(max_examples=150, deadline=None)
@given(
    values=st.lists(st.floats(-(2.0**126), 2.0**126, width=32), min_size=1, max_size=9),
    bits=st.integers(2, 8),
    symmetric=st.booleans(),
)
def test_any_floats_agree_with_the_oracle(values, bits, symmetric):
    spec = QuantSpec(bits, PerToken(), symmetric)
    q = quantize(torch.tensor([values]), spec, A)
    scale, zero_point, codes = oracle(values, bits, symmetric)
    assert q.codes[0].tolist() == codes
    assert q.scale.item() == scale
    assert zero_point is None or q.zero_point.item() == zero_point


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 10**6), bits=st.integers(2, 16), symmetric=st.booleans(), exponent=st.integers(-90, 90))
def test_error_is_at_most_half_a_scale_and_rounding_again_changes_nothing(seed, bits, symmetric, exponent):
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(seed)) * 2.0**exponent
    spec = QuantSpec(bits, PerChannel(), symmetric)
    params = qparams(x, spec)
    y = fake_quantize(x, spec, params=params)
    slack = 0.5 * (1 + 2 ** (bits - 21))  # the float32 rounding of codes * scale, at most 2**(bits-1) * scale * 2**-24
    if not symmetric:
        slack += 0.5  # at the ends of the range, where the zero point's own rounding is felt
    assert ((x - y).abs() <= slack * params.scale).all()
    assert torch.equal(fake_quantize(y, spec, params=params), y)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), exponent=st.integers(-100, 100), symmetric=st.booleans())
def test_codes_do_not_change_under_powers_of_two(seed, exponent, symmetric):
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(seed))
    spec = QuantSpec(8, PerChannel(), symmetric)
    assert torch.equal(quantize(x * 2.0**exponent, spec).codes, quantize(x, spec).codes)


def test_asymmetric_range_is_widened_to_hold_zero():
    spec = QuantSpec(8, PerTensor(), symmetric=False)
    params = qparams(torch.tensor([[3.0, 5.0]]), spec)
    assert params.scale.item() == np.float32(5) / np.float32(255)
    assert params.zero_point.item() == -128
    negative = qparams(torch.tensor([[-3.0, -5.0]]), spec)
    assert negative.zero_point.item() == 127
    assert fake_quantize(torch.tensor([[0.0, 5.0]]), spec)[0, 0].item() == 0.0


@pytest.mark.parametrize("symmetric", [True, False])
def test_nothing_to_scale_gives_scale_one_and_the_zero_point(symmetric):
    q = quantize(torch.zeros(3, 4), QuantSpec(8, PerChannel(), symmetric))
    assert (q.scale == 1).all()
    assert (q.codes == (0 if symmetric else -128)).all()
    assert (dequantize(q) == 0).all()


def test_a_subnormal_quotient_becomes_the_smallest_normal():
    q = quantize(torch.tensor([[1e-40, 0.0]]), QuantSpec(8, PerTensor()))
    assert q.scale.item() == TINY
    assert q.codes.tolist() == [[0, 0]]


def test_the_code_minus_128_is_never_produced_symmetrically():
    x = torch.randn(64, 64)
    assert quantize(x, QuantSpec(8, PerChannel())).codes.min() >= -127


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("operand", "granularity"), EVERY, ids=str)
def test_any_strides_give_the_same_as_a_contiguous_copy(operand, granularity, symmetric):
    base = torch.randn(24, 20)
    spec = QuantSpec(8, granularity, symmetric)
    for x in (base.t(), base[::2, 1:13], base.flip(0)[:, :12]):
        q, same = quantize(x, spec, operand), quantize(x.contiguous(), spec, operand)
        assert torch.equal(q.codes, same.codes)
        assert torch.equal(q.scale, same.scale)
        assert torch.equal(fake_quantize(x, spec, operand), dequantize(same))


@pytest.mark.parametrize("shape", [(12,), (1, 12), (5, 12), (2, 3, 12), (2, 1, 3, 12)])
@pytest.mark.parametrize("granularity", [PerTensor(), PerToken(), PerChannel()], ids=str)
def test_activations_of_any_leading_shape_are_tokens_by_channels(shape, granularity):
    x = torch.randn(shape)
    spec = QuantSpec(8, granularity, symmetric=False)
    y = fake_quantize(x, spec, A)
    assert y.shape == x.shape
    assert torch.equal(y.reshape(-1, 12), fake_quantize(x.reshape(-1, 12), spec, A))


@pytest.mark.parametrize("shape", [(0, 8), (3, 0), (0, 0)])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("operand", "granularity"), EVERY, ids=str)
def test_empty_tensors_stay_empty(operand, granularity, symmetric, shape):
    x = torch.empty(shape)
    spec = QuantSpec(8, granularity, symmetric)
    q = quantize(x, spec, operand)
    assert q.codes.shape == x.shape
    assert fake_quantize(x, spec, operand).shape == x.shape


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_the_input_is_not_modified_unless_asked(dtype):
    x = torch.randn(8, 8).to(dtype)
    before = x.clone()
    spec = QuantSpec(4, PerChannel())
    quantize(x, spec)
    y = fake_quantize(x, spec)
    assert torch.equal(x, before)
    assert y.dtype is dtype
    assert fake_quantize(x, spec, inplace=True) is x
    assert torch.equal(x, y)


def test_out_may_be_a_strided_view_or_the_input():
    x = torch.randn(8, 6)
    spec = QuantSpec(8, PerColumn())
    expected = fake_quantize(x, spec)
    out = torch.empty(6, 8).t()
    assert fake_quantize(x, spec, out=out) is out
    assert torch.equal(out, expected)
    assert fake_quantize(x, spec, out=x) is x
    assert torch.equal(x, expected)


@pytest.mark.parametrize(
    "operand_granularity", [(W, PerTensor()), (W, PerChannel()), (W, PerColumn()), (W, PerGroup(64))], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_in_place_keeps_no_full_size_temporary(operand_granularity, dtype):
    operand, granularity = operand_granularity
    x = torch.randn(4096, 4096).to(dtype)
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        fake_quantize(x, QuantSpec(8, granularity, symmetric=False), operand, inplace=True)
    largest = max(event.cpu_memory_usage for event in profiler.events())
    assert 0 < largest < x.numel() * x.element_size() / 4


def test_big_tensors_are_rounded_in_blocks_with_the_same_result():
    x = torch.randn(3, 1_500_000)
    for operand, granularity in EVERY:
        spec = QuantSpec(8, granularity, symmetric=False)
        params = qparams(x, spec, operand)
        head = fake_quantize(x, spec, operand, params=params)
        scale, zero_point = params.scale, params.zero_point
        if isinstance(granularity, PerGroup):
            scale, zero_point = (t.repeat_interleave(granularity.size, 1) for t in (scale, zero_point))
        expected = ((torch.round(x / scale) + zero_point).clamp(-128, 127) - zero_point) * scale
        assert torch.equal(head, expected)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(("operand", "granularity"), EVERY, ids=str)
def test_a_value_that_is_not_finite_is_named_with_its_index(operand, granularity, bad):
    x = torch.ones(4, 8)
    x[2, 5] = x[3, 1] = bad
    before = x.clone()
    with pytest.raises(NonFiniteError, match=r"at index \(2, 5\) of float32 of shape \(4, 8\) \(2 of 32"):
        fake_quantize(x, QuantSpec(8, granularity), operand, inplace=True)
    assert torch.equal(x.nan_to_num(7.0), before.nan_to_num(7.0))


def test_float64_beyond_float32_is_not_finite():
    with pytest.raises(NonFiniteError, match=r"1e\+300 at index \(0, 1\)"):
        quantize(torch.tensor([[0.0, 1e300]], dtype=torch.float64), QuantSpec())


def test_a_range_wider_than_float32_says_so():
    with pytest.raises(NonFiniteError, match="wider than float32"):
        quantize(torch.tensor([[-3e38, 3e38]]), QuantSpec(symmetric=False))


def test_a_given_grid_clamps_and_must_fit():
    spec = QuantSpec(8, PerTensor())
    params = QParams(torch.tensor([[0.5]]), None)
    assert quantize(torch.tensor([[100.0, -100.0, 1.0]]), spec, params=params).codes.tolist() == [[127, -127, 2]]
    with pytest.raises(SchemeError, match=r"scale of shape \(2, 1\) without a zero point do not fit"):
        quantize(torch.ones(3, 3), spec, params=QParams(torch.ones(2, 1), None))
    with pytest.raises(SchemeError, match="with a zero point do not fit"):
        quantize(torch.ones(3, 3), spec, params=QParams(torch.ones(1, 1), torch.zeros(1, 1, dtype=torch.int32)))
    with pytest.raises(SchemeError, match="zero_point has shape"):
        quantize(
            torch.ones(3, 3),
            QuantSpec(8, PerTensor(), symmetric=False),
            params=QParams(torch.ones(1, 1), torch.zeros(3, dtype=torch.int32)),
        )
    with pytest.raises(NonFiniteError, match=r"index \(0, 0\)"):
        quantize(torch.tensor([[math.nan]]), spec, params=params)


@pytest.mark.parametrize(
    ("x", "operand", "granularity", "message"),
    [
        (torch.ones(2, 3, 4), W, PerChannel(), r"a weight is \(N, K\), found float32 of shape \(2, 3, 4\)"),
        (torch.ones(2, 3), W, PerGroup(2), "K=3 does not divide into groups of 2; the nearest size that does is 1"),
        (torch.tensor(1.0), A, PerTensor(), "found a scalar"),
        (torch.ones(2, 3, dtype=torch.int32), W, PerChannel(), "expected a float tensor to quantise, found int32"),
        (torch.ones(2, 3), W, PerToken(), "a weight has no tokens"),
    ],
)
def test_shapes_and_dtypes_that_do_not_fit_are_refused(x, operand, granularity, message):
    with pytest.raises(SchemeError, match=message):
        qparams(x, QuantSpec(8, granularity), operand)


def test_codes_wider_than_8_bits_are_refused_and_simulated():
    x = torch.randn(4, 4)
    with pytest.raises(SchemeError, match="9-bit codes do not fit int8"):
        quantize(x, QuantSpec(9))
    errors = [l2_error(x, fake_quantize(x, QuantSpec(bits))) for bits in (8, 12, 16)]
    assert errors[0] > 10 * errors[1] > 100 * errors[2] > 0


def test_out_must_agree_with_the_input():
    x = torch.randn(4, 4)
    with pytest.raises(SchemeError, match="must agree in shape, dtype and device"):
        fake_quantize(x, QuantSpec(), out=torch.empty(4, 4, dtype=torch.float16))
    with pytest.raises(SchemeError, match="give one of the two"):
        fake_quantize(x, QuantSpec(), inplace=True, out=torch.empty(4, 4))


def test_dequantize_takes_every_form_of_scale():
    codes = torch.tensor([[1, -2, 3, 4]], dtype=torch.int8)
    grouped = QTensor(codes, torch.tensor([[1.0, 10.0]]), torch.tensor([[0, 1]], dtype=torch.int32))
    assert dequantize(grouped).tolist() == [[1.0, -2.0, 20.0, 30.0]]
    whole = QTensor(codes, torch.tensor([0.5]), None)
    assert dequantize(whole, dtype=torch.bfloat16).tolist() == [[0.5, -1.0, 1.5, 2.0]]


def test_distances_are_what_they_say():
    x, y = torch.tensor([3.0, 4.0]), torch.tensor([0.0, 0.0])
    assert l2_error(x, y) == 5.0
    assert sqnr_db(x, x * 0.9) == pytest.approx(20.0, rel=1e-6)
    assert sqnr_db(x, x) == math.inf
    with pytest.raises(SchemeError, match="one shape"):
        l2_error(x, torch.ones(3))
    with pytest.raises(SchemeError, match="one shape"):
        sqnr_db(x, torch.ones(3))


def test_parameters_that_require_gradients_can_be_quantised_in_place():
    p = torch.nn.Parameter(torch.randn(4, 4))
    expected = fake_quantize(p.detach(), QuantSpec())
    assert torch.equal(fake_quantize(p, QuantSpec(), inplace=True), expected)
    assert p.requires_grad
