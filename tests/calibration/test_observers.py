import itertools
import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from w8a8.calibration.observers import MSE, OBSERVERS, AbsMax, MinMax, Percentile, observer_of
from w8a8.calibration.summaries import CHANNEL_MANTISSA_BITS, MANTISSA_BITS, OCTAVES
from w8a8.core.affine import fake_quantize, qparams
from w8a8.core.scheme import Operand, PerChannel, PerTensor, PerToken, QuantSpec
from w8a8.errors import CalibrationError, NonFiniteError, SchemeError

GRANULARITIES = [PerTensor(), PerChannel()]
RESOLUTION = {PerTensor(): 2.0**-MANTISSA_BITS, PerChannel(): 2.0**-CHANNEL_MANTISSA_BITS}


@st.composite
def streams(draw):
    """Activations (M, K) with channels of very different size, and where to cut them into batches."""
    m, k = draw(st.integers(1, 60)), draw(st.integers(1, 5))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    octaves = draw(st.sampled_from([0.0, 6.0, 30.0]))
    sizes = torch.exp2(octaves * torch.randn(k, generator=generator).clamp(-3, 3))  # finite, whatever is drawn
    x = torch.randn(m, k, generator=generator) * sizes
    if draw(st.booleans()):
        x = x.relu()
    if draw(st.booleans()):
        x[:, 0] = 0.0
    cuts = sorted(draw(st.lists(st.integers(0, m), max_size=4)))
    return x, list(x.tensor_split(cuts))


def observed(observer, batches):
    for batch in batches:
        observer.update(batch)
    return observer


def values(x, granularity):
    """(C, n): the values that share a range."""
    return x.reshape(1, -1) if granularity == PerTensor() else x.reshape(-1, x.shape[-1]).t()


def specs(name, granularity, bits=8):
    symmetric = QuantSpec(bits, granularity, dynamic=False)
    return [symmetric] if name == "absmax" else [symmetric, QuantSpec(bits, granularity, symmetric=False)]


def equal(a, b):
    zero_points = (a.zero_point is None and b.zero_point is None) or torch.equal(a.zero_point, b.zero_point)
    return torch.equal(a.scale, b.scale) and zero_points


# --- the contract, over the registry


@pytest.mark.parametrize("granularity", GRANULARITIES, ids=str)
@pytest.mark.parametrize("name", OBSERVERS)
@settings(deadline=None, max_examples=5)
@given(stream=streams())
def test_any_batching_gives_the_same_grid(name, granularity, stream):
    x, batches = stream
    whole, parts = observed(OBSERVERS[name](granularity), [x]), observed(OBSERVERS[name](granularity), batches)
    assert whole.tokens == parts.tokens == len(x)
    assert torch.equal(whole.absmax, parts.absmax)
    for spec in specs(name, granularity):
        assert equal(whole.params(spec), parts.params(spec))


@pytest.mark.parametrize("granularity", GRANULARITIES, ids=str)
@pytest.mark.parametrize("name", OBSERVERS)
@settings(deadline=None, max_examples=5)
@given(stream=streams(), bits=st.sampled_from([2, 4, 8]))
def test_the_grid_never_reaches_beyond_the_data(name, granularity, stream, bits):
    x, batches = stream
    for spec in specs(name, granularity, bits):
        found = observed(OBSERVERS[name](granularity), batches).params(spec)
        full = qparams(x, spec, Operand.ACTIVATION)
        assert found.scale.shape == full.scale.shape
        assert found.scale.dtype is torch.float32
        assert bool((found.scale > 0).all())
        assert bool((found.scale <= full.scale).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("granularity", GRANULARITIES, ids=str)
@pytest.mark.parametrize("name", OBSERVERS)
def test_every_float_dtype_and_stride_is_observed_by_its_values(name, granularity, dtype):
    x = torch.randn(17, 100).to(dtype)
    spec = QuantSpec(8, granularity)
    found = observed(OBSERVERS[name](granularity), [x.t().contiguous().t(), x[None, :5]]).params(spec)
    again = observed(OBSERVERS[name](granularity), [x.to(torch.float32), x[:5].to(torch.float32)]).params(spec)
    assert equal(found, again)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("granularity", GRANULARITIES, ids=str)
@pytest.mark.parametrize("name", OBSERVERS)
def test_what_is_not_finite_is_refused_with_its_index_and_forgotten(name, granularity, bad):
    observer = observed(OBSERVERS[name](granularity), [torch.ones(3, 4)])
    x = torch.ones(2, 3, 4)
    x[1, 2, 3] = bad
    with pytest.raises(NonFiniteError, match=r"at index \(1, 2, 3\)"):
        observer.update(x)
    assert observer.tokens == 3
    assert observer.absmax.tolist() == [1.0] * len(observer.absmax)


@pytest.mark.parametrize("name", OBSERVERS)
def test_a_dead_channel_has_the_scale_one(name):
    x = torch.randn(40, 3)
    x[:, 1] = 0.0
    channel = observed(OBSERVERS[name](PerChannel()), x.split(7))
    for spec in specs(name, PerChannel()):
        scale = channel.params(spec).scale
        assert scale[0, 1] == 1.0
        assert bool((scale[0, [0, 2]] < 1.0).all())
    tensor = observed(OBSERVERS[name](), [torch.zeros(5, 3)])
    for spec in specs(name, PerTensor()):
        assert tensor.params(spec).scale.tolist() == [[1.0]]


@pytest.mark.parametrize("granularity", GRANULARITIES, ids=str)
@pytest.mark.parametrize("name", OBSERVERS)
def test_a_channel_that_wakes_up_late_is_seen(name, granularity):
    x = torch.zeros(50, 2)
    x[-1] = torch.tensor([3.0, -40.0])
    one_by_one = observed(OBSERVERS[name](granularity), x.split(1))
    assert equal(
        one_by_one.params(QuantSpec(8, granularity)),
        observed(OBSERVERS[name](granularity), [x]).params(QuantSpec(8, granularity)),
    )
    assert one_by_one.absmax.tolist() == ([3.0, 40.0] if granularity == PerChannel() else [40.0])


@pytest.mark.parametrize("granularity", GRANULARITIES, ids=str)
@pytest.mark.parametrize("name", OBSERVERS)
def test_what_is_kept_does_not_grow(name, granularity):
    def size(observer):
        seen = observer.seen()
        return sum(getattr(seen, field).numel() for field in ("counts", "lo", "hi") if hasattr(seen, field))

    observer = observed(OBSERVERS[name](granularity), [torch.randn(4, 10)])
    once = size(observer)
    assert size(observed(observer, [1e3 * torch.randn(64, 10) for _ in range(20)])) == once


@pytest.mark.parametrize("name", OBSERVERS)
def test_the_input_is_left_as_it_is(name):
    x = torch.randn(9, 10)
    before = x.clone()
    observed(OBSERVERS[name](), [x])
    assert torch.equal(x, before)


@pytest.mark.parametrize("name", OBSERVERS)
def test_misuse_is_explained(name):
    observer = OBSERVERS[name](PerChannel())
    with pytest.raises(CalibrationError, match="no token has been seen"):
        observer.params(QuantSpec(granularity=PerChannel()))
    observer.update(torch.empty(0, 3))
    with pytest.raises(CalibrationError, match="no token has been seen"):
        observer.absmax  # noqa: B018
    observer.update(torch.ones(2, 3))
    with pytest.raises(CalibrationError, match="has seen 3 channels was given 4"):
        observer.update(torch.ones(2, 4))
    with pytest.raises(SchemeError, match="this observer is per channel"):
        observer.params(QuantSpec(granularity=PerTensor()))
    with pytest.raises(SchemeError, match=r"expected an activation .* of floats to observe, found int64"):
        observer.update(torch.ones(2, 3, dtype=torch.int64))
    with pytest.raises(SchemeError, match=r"use PerTensor\(\) or PerChannel\(\)"):
        OBSERVERS[name](PerToken())


def test_an_unknown_observer_lists_the_known_and_the_closest():
    with pytest.raises(CalibrationError, match=r"unknown observer 'minimax' \(closest: minmax.*observers: absmax, "):
        observer_of("minimax")
    assert observer_of(Percentile) is Percentile


# --- each by its own property


@settings(deadline=None)
@given(stream=streams())
def test_absmax_is_the_largest_magnitude_of_all_data(stream):
    x, batches = stream
    for granularity in GRANULARITIES:
        found = observed(AbsMax(granularity), batches)
        assert torch.equal(found.absmax, values(x, granularity).abs().amax(-1))
        spec = QuantSpec(8, granularity)
        assert equal(found.params(spec), qparams(x, spec, Operand.ACTIVATION))


def test_absmax_has_no_zero_point_and_says_what_has():
    with pytest.raises(SchemeError, match=r"'absmax' has no zero point .* use 'minmax'"):
        observed(AbsMax(), [torch.ones(1, 1)]).params(QuantSpec(symmetric=False))


@settings(deadline=None)
@given(stream=streams())
def test_minmax_gives_the_grid_that_all_data_would(stream):
    x, batches = stream
    for granularity in GRANULARITIES:
        for spec in specs("minmax", granularity):
            assert equal(observed(MinMax(granularity), batches).params(spec), qparams(x, spec, Operand.ACTIVATION))


def exact_percentile(v, p):
    """The ceil(p / 100 * n)-th smallest of each row."""
    return v.sort(-1).values[:, math.ceil(Fraction(repr(p)) / 100 * v.shape[-1]) - 1]


def within(found, exact, absmax, resolution):
    """The stated bound; a half unit in the last place for the division by the number of steps, and back."""
    slack = 1 + 1e-6
    ceiling = (1 + resolution) * torch.maximum(exact, absmax * 2.0**-OCTAVES)
    return bool(((found * slack >= exact) & (found <= ceiling * slack) & (found <= absmax * slack)).all())


@settings(deadline=None, max_examples=30)
@given(stream=streams(), p=st.sampled_from([50.1, 75.0, 90, 99.0, 99.9, 100.0]))
def test_the_percentile_is_within_its_bound(stream, p):
    x, batches = stream
    for granularity in GRANULARITIES:
        v = values(x, granularity)
        absmax = v.abs().amax(-1)
        observer = observed(Percentile(granularity, p=p), batches)
        alive = absmax > 0
        bound = observer.params(QuantSpec(8, granularity)).scale[0] * 127
        assert within(bound[alive], exact_percentile(v.abs(), p)[alive], absmax[alive], RESOLUTION[granularity])
        lo, hi = observer._range(QuantSpec(8, granularity, symmetric=False))
        assert within(hi, exact_percentile(v, p).clamp(min=0), absmax, RESOLUTION[granularity])
        assert within(-lo, exact_percentile(-v, p).clamp(min=0), absmax, RESOLUTION[granularity])


@settings(deadline=None, max_examples=30)
@given(stream=streams())
def test_the_percentile_grows_with_p(stream):
    _, batches = stream
    for granularity in GRANULARITIES:
        ranges = [
            observed(Percentile(granularity, p=p), batches)._range(QuantSpec(8, granularity))[1]
            for p in (50.5, 60.0, 99.0, 99.99, 100.0)
        ]
        assert all(bool((a <= b).all()) for a, b in itertools.pairwise(ranges))


def test_the_hundredth_percentile_is_absmax():
    x = torch.randn(30, 5)
    assert equal(observed(Percentile(p=100.0), [x]).params(QuantSpec()), observed(AbsMax(), [x]).params(QuantSpec()))


@pytest.mark.parametrize("p", [50, 0, 100.01, math.nan])
def test_a_percentile_out_of_range_is_refused(p):
    with pytest.raises(SchemeError, match="out of range: over 50 and at most 100"):
        Percentile(p=p)


def root_mean_squares(x, spec, params):
    """Of the error of quantising, one for each range."""
    error = fake_quantize(x, spec, Operand.ACTIVATION, params=params).to(torch.float64) - x.to(torch.float64)
    return values(error, spec.granularity).square().mean(-1).sqrt()


@pytest.mark.slow
@settings(deadline=None, max_examples=20)
@given(stream=streams(), bits=st.sampled_from([2, 3, 4, 6, 8]))
def test_mse_is_never_worse_than_the_full_range_beyond_its_bound(stream, bits):
    x, batches = stream
    for granularity in GRANULARITIES:
        for spec in specs("mse", granularity, bits):
            found = root_mean_squares(x, spec, observed(MSE(granularity), batches).params(spec))
            full = root_mean_squares(x, spec, qparams(x, spec, Operand.ACTIVATION))
            v = values(x, granularity).to(torch.float64)
            misjudged = RESOLUTION[granularity] * v.square().mean(-1).sqrt() + v.abs().amax(-1) * 2.0**-OCTAVES
            assert bool((found <= (full + 2 * misjudged) * (1 + 1e-6)).all())


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_mse_finds_the_best_clip_of_a_normal_distribution(bits, symmetric):
    """Against a fine search with the true errors."""
    x = torch.randn(400, 200)
    spec = QuantSpec(bits, symmetric=symmetric)
    found = root_mean_squares(x, spec, observed(MSE(), x.split(90)).params(spec))
    clips = [x.clamp(-c, c) for c in torch.linspace(1.0, 6.0, 60)]
    best = min(root_mean_squares(x, spec, qparams(clip, spec, Operand.ACTIVATION)) for clip in clips)
    assert float(found) <= 1.02 * float(best)


def test_mse_clips_at_few_bits_and_keeps_an_outlier_at_many():
    x = torch.randn(100, 100)
    x[3, 5] = 12.0
    full = [qparams(x, QuantSpec(bits), Operand.ACTIVATION).scale for bits in (3, 16)]
    found = [observed(MSE(), [x]).params(QuantSpec(bits)).scale for bits in (3, 16)]
    assert float(found[0]) < 0.5 * float(full[0])
    assert float(found[1]) == float(full[1])
