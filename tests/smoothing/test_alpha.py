import math
from dataclasses import replace
from functools import cached_property

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from w8a8.calibration.sampling import Sample
from w8a8.core.scheme import PerColumn, PerTensor, PerToken, QuantSpec, Scheme
from w8a8.errors import NonFiniteError, SchemeError
from w8a8.kernels.torch_cpu import int8_product
from w8a8.smoothing import alpha as alpha_module
from w8a8.smoothing.alpha import GRID, Product, centred, magnitudes, search, smooth_scales

positive = st.floats(1e-20, 1e20)
magnitude = st.just(0.0) | st.floats(0.0, 3e38)


def sample(rows):
    low, high = rows.amin(0), rows.amax(0)
    return Sample(rows, low, high, low[None], high[None])


def outliers(tokens=64, width=24):
    """Rows with one channel 60 times the others, and weights without."""
    rows = torch.randn(tokens, width)
    rows[:, 5] *= 60
    return Product(sample(rows), torch.randn(16, width), torch.arange(width), reads=True)


def test_the_formula_is_the_papers():
    activations, weights = torch.tensor([16.0, 1.0, 0.25]), torch.tensor([2.0, 4.0, 1.0])
    for alpha in (0.0, 0.3, 0.5, 1.0):
        expected = [a**alpha / w ** (1 - alpha) for a, w in zip(activations.tolist(), weights.tolist(), strict=True)]
        assert smooth_scales(activations, weights, alpha).tolist() == pytest.approx(expected, rel=1e-6)


@given(st.lists(st.tuples(magnitude, magnitude), min_size=1, max_size=20), st.floats(0, 1))
def test_scales_are_always_positive_and_finite(pairs, alpha):
    activations, weights = torch.tensor(pairs, dtype=torch.float64).t()
    scales = smooth_scales(activations, weights, alpha)
    assert scales.dtype is torch.float32
    assert bool((torch.isfinite(scales) & (scales > 0)).all())
    assert bool((scales[(activations == 0) | (weights == 0)] == 1).all())


@given(positive, positive)
def test_half_makes_both_sides_equally_hard(activation, weight):
    s = float(smooth_scales(torch.tensor([activation]), torch.tensor([weight]), 0.5))
    a, w = float(torch.tensor(activation)), float(torch.tensor(weight))
    assert a / s == pytest.approx(w * s, rel=1e-5)


@given(st.lists(st.tuples(positive, positive), min_size=2, max_size=10), st.floats(0, 1), st.integers(-20, 20))
def test_a_common_factor_of_the_activations_is_a_common_factor_of_the_scales(pairs, alpha, exponent):
    activations, weights = torch.tensor(pairs, dtype=torch.float64).t()
    one = smooth_scales(activations, weights, alpha).double()
    other = smooth_scales(activations * 2.0**exponent, weights, alpha).double()
    inside = (other < 1e37) & (one < 1e37) & (other > 1e-37) & (one > 1e-37)
    assert torch.allclose(other[inside], one[inside] * 2.0 ** (alpha * exponent), rtol=1e-5)


@pytest.mark.parametrize("alpha", [-0.1, 1.1, math.nan, "half", True, None])
def test_other_alphas_are_refused(alpha):
    with pytest.raises(SchemeError, match=r"is not a number in 0\.\.1"):
        smooth_scales(torch.ones(2), torch.ones(2), alpha)


def test_bad_magnitudes_are_refused_with_their_channel():
    with pytest.raises(NonFiniteError, match="channel 1 of the activations is nan"):
        smooth_scales(torch.tensor([1.0, math.nan]), torch.ones(2), 0.5)
    with pytest.raises(NonFiniteError, match=r"channel 0 of the weights is -1\.0"):
        smooth_scales(torch.ones(2), torch.tensor([-1.0, 1.0]), 0.5)
    with pytest.raises(SchemeError, match=r"found \(2,\) for the activations and \(3,\)"):
        smooth_scales(torch.ones(2), torch.ones(3), 0.5)


def test_dead_channels_sit_at_the_mean_of_the_live_ones():
    live = torch.tensor([True, False, True])
    assert centred(torch.tensor([0.01, 1.0, 0.04]), live).tolist() == pytest.approx([0.5, 1.0, 2.0])
    assert centred(torch.ones(2), torch.tensor([False, False])).tolist() == [1.0, 1.0]


@pytest.mark.parametrize(
    "scheme",
    [
        "w8a8",
        "w8a8-asym",
        "w8a8-tensor",
        "w8a8-o1",
        "w8a8-static",
    ],
)
def test_outliers_are_smoothed_and_the_error_falls(scheme):
    choice = search([outliers()], 24, Scheme.of(scheme))
    assert choice.alpha in GRID
    assert choice.error_after < choice.error_before / 2
    assert int(choice.scales.argmax()) == 5


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 1000), st.sampled_from(["w8a8", "w8a8-tensor", "w8a8-static", "w8a8-o1", "w8a16"]))
def test_a_searched_alpha_is_never_worse_than_none(seed, scheme):
    torch.manual_seed(seed)
    rows = torch.randn(9, 6) * torch.rand(6).exp()
    product = Product(sample(rows), torch.randn(4, 6), torch.arange(6), reads=True)
    choice = search([product], 6, Scheme.of(scheme))
    assert choice.error_after <= choice.error_before
    assert (choice.alpha is None) == (choice.error_after == choice.error_before)


def test_a_scheme_that_smoothing_cannot_help_is_left_alone():
    """With a scale per input column of the weights and float activations, a factor per column changes no code."""
    product = outliers()
    choice = search([product], 24, Scheme(QuantSpec(8, PerColumn())), alphas=(0.0,))
    assert choice.error_after == pytest.approx(choice.error_before, rel=0.1)
    exact = Product(sample(torch.zeros(4, 3)), torch.randn(2, 3), torch.arange(3), reads=True)
    assert search([exact], 3, Scheme.of("w8a8")).alpha is None


def test_a_forced_alpha_is_taken_even_where_it_is_worse():
    rows = torch.randn(32, 8)
    product = Product(sample(rows), torch.randn(4, 8) * torch.tensor([50.0, *[1.0] * 7]), torch.arange(8), reads=True)
    choice = search([product], 8, Scheme.of("w8a8"), (1.0,), forced=True)
    assert choice.alpha == 1.0
    assert choice.scales is not None


def test_a_source_of_shared_scales_takes_part():
    """Its rows are rescaled: what helps its reader may cost it more."""
    rows = torch.randn(64, 8)
    weight = torch.randn(6, 8)
    made = rows @ weight.t()
    made[:, 2] *= 200
    weight[2] *= 200
    reader = Product(sample(made), torch.randn(4, 6), torch.arange(6), reads=True)
    source = Product(sample(rows), weight, torch.arange(6), reads=False)
    scheme = Scheme(QuantSpec(4, PerTensor()), QuantSpec(8, PerToken()))
    alone, both = search([reader], 6, scheme), search([reader, source], 6, scheme)
    assert both.error_before > alone.error_before
    assert both.error_after < 0.7 * both.error_before  # levelling the rows is what a scale per tensor wants


def test_a_static_range_comes_from_all_the_calibration():
    product = outliers()
    wide = Sample(
        product.sample.rows,
        product.sample.low * 100,
        product.sample.high * 100,
        product.sample.call_low,
        product.sample.call_high,
    )
    scheme = Scheme.of("w8a8-static")
    narrow = search([product], 24, scheme).error_before
    assert search([Product(wide, product.weight, product.channels, reads=True)], 24, scheme).error_before > 10 * narrow


def test_a_dynamic_range_per_tensor_comes_from_calls():
    product = outliers()
    sampled = product.sample
    louder = Sample(sampled.rows, sampled.low, sampled.high, sampled.call_low * 10, sampled.call_high * 10)
    scheme = Scheme.of("w8a8-tensor")
    narrow = search([product], 24, scheme).error_before
    assert search([Product(louder, product.weight, product.channels, reads=True)], 24, scheme).error_before > 5 * narrow


def test_magnitudes_meet_in_the_sources_channels():
    rows = torch.tensor([[1.0, -4.0, 2.0, 9.0]])
    weight = torch.tensor([[0.5, 0.1, -3.0, 7.0]])
    product = Product(sample(rows), weight, torch.tensor([1, 0, 1, -1]), reads=True)
    activations, weights = magnitudes([product], 3)
    assert activations.tolist() == [4.0, 2.0, 0.0]
    assert weights.tolist() == pytest.approx([0.1, 3.0, 0.0])


def test_scales_are_judged_on_tokens_that_they_were_not_made_from():
    """A channel that is loud in one half only: levelled by its own maximum it looks harmless there."""
    quiet, loud = torch.randn(64, 8), torch.randn(64, 8)
    quiet[:, 3] *= 1e-4
    loud[:, 3] *= 1e2
    both = torch.cat([quiet, loud])
    halves = (sample(quiet), sample(loud))
    weight = torch.randn(4, 8)
    scheme = Scheme.of("w8a8-static")
    fooled = search([Product(sample(both), weight, torch.arange(8), reads=True)], 8, scheme, (0.0, 1.0))
    careful = search([Product(replace(sample(both), halves=halves), weight, torch.arange(8), reads=True)], 8, scheme)
    assert fooled.alpha == 1.0
    assert careful.error_before > 10 * fooled.error_before  # the clamped tokens of the loud half are seen
    assert careful.error_after <= careful.error_before


def test_scales_of_a_choice_come_from_the_whole_sample():
    one, other = torch.randn(32, 4), torch.randn(32, 4)
    other[:, 2] *= 30
    one[:, 2] *= 20
    whole = replace(sample(torch.cat([one, other])), halves=(sample(one), sample(other)))
    product = Product(whole, torch.ones(3, 4), torch.arange(4), reads=True)
    choice = search([product], 4, Scheme.of("w8a8-tensor"), (1.0,), forced=True)
    expected = whole.absmax.double()
    assert torch.allclose(choice.scales, expected / expected.log().mean().exp())


@pytest.mark.parametrize(("one_sided", "least"), [(False, 0.3), (True, 3.0)])
def test_a_quiet_channel_is_not_amplified_by_what_little_it_showed(one_sided, least):
    product = outliers()
    rows = product.sample.rows.abs() if one_sided else product.sample.rows.clone()
    rows[:, 7] *= 1e-4  # live, and hardly ever seen
    product = Product(sample(rows), torch.ones(16, 24), product.channels, reads=True)
    scheme = Scheme(QuantSpec(), QuantSpec(granularity=PerTensor()))
    found, paper = (search([product], 24, scheme, (0.8,), forced=forced).scales for forced in (False, True))
    maxima = product.sample.absmax
    typical = maxima.median()
    counted = maxima.clamp(min=least * float(typical))
    assert float(found[5] / found[7]) == pytest.approx(float(counted[5] / counted[7]) ** 0.8, rel=1e-4)
    assert float(paper[5] / paper[7]) == pytest.approx(float(maxima[5] / maxima[7]) ** 0.8, rel=1e-4)


@pytest.mark.parametrize("scheme", ["w8a8", "w8a8-tensor", "w8a8-static", "w8a8-asym", "w8a8-o1"])
def test_errors_in_integers_are_those_of_fake_quantised_operands(scheme, monkeypatch):
    calls, product = [], outliers(width=100)
    product = replace(product, sample=replace(product.sample, rows=product.sample.rows + 0.3))

    def counted(*codes):
        calls.append(codes)
        return int8_product(*codes)

    monkeypatch.setattr(alpha_module, "int8_product", counted)
    integer = search([product], 100, Scheme.of(scheme))
    assert len(calls) >= len(GRID)
    monkeypatch.setattr(alpha_module, "int8_product", lambda *_: None)  # as where it is not exact
    fake = search([product], 100, Scheme.of(scheme))
    assert integer.alpha == fake.alpha is not None
    assert integer.error_before == pytest.approx(fake.error_before, rel=1e-4)
    assert integer.error_after == pytest.approx(fake.error_after, rel=1e-4)


def test_the_whole_sample_is_multiplied_only_where_it_decides(monkeypatch):
    product, made = outliers(), []
    half = replace(product.sample, rows=product.sample.rows[:32])
    product = replace(product, sample=replace(product.sample, halves=(half, half)))
    real = alpha_module._Fold.exact.func
    counted = cached_property(lambda self: made.append(len(self.products[0].sample.rows)) or real(self))
    counted.__set_name__(alpha_module._Fold, "exact")
    monkeypatch.setattr(alpha_module._Fold, "exact", counted)
    search([product], 24, Scheme.of("w8a8-static"), (0.5,), forced=True)
    assert made == [32, 32]
    search([product], 24, Scheme.of("w8a8-static"))
    assert made == [32, 32, 32, 32, 64]
