import pytest
import torch

from w8a8.calibration.sampling import Sampler
from w8a8.errors import CalibrationError, NonFiniteError


def fed(inputs, **options):
    sampler = Sampler(**options)
    for x in inputs:
        sampler.update(x)
    return sampler


def is_in(row, rows):
    return bool((rows == row).all(-1).any())


def test_extremes_are_those_of_all_tokens_and_of_each_half():
    calls = [torch.randn(2, n, 4) for n in (3, 5, 1, 7, 2)]
    found = fed(calls, rows=8).sample()
    assert torch.equal(found.low, torch.cat([x.flatten(0, -2) for x in calls]).amin(0))
    assert torch.equal(found.high, torch.cat([x.flatten(0, -2) for x in calls]).amax(0))
    assert torch.equal(found.absmax, torch.cat([x.flatten(0, -2) for x in calls]).abs().amax(0))
    for half, part in enumerate(found.halves):
        mine = torch.cat([x.flatten(0, -2) for x in calls[half::2]])
        assert torch.equal(part.low, mine.amin(0))
        assert torch.equal(part.high, mine.amax(0))


def test_rows_are_bounded_and_each_half_has_its_own():
    calls = [torch.randn(20, 3) for _ in range(9)]
    found = fed(calls, rows=16).sample()
    assert found.rows.shape == (16, 3)
    assert sum(len(half.rows) for half in found.halves) == 16
    for half, part in enumerate(found.halves):
        assert all(is_in(row, torch.cat(calls[half::2])) for row in part.rows)
    everything = fed(calls, rows=1000).sample()
    assert everything.rows.shape == (180, 3)


def test_ranges_are_those_of_calls_and_each_half_has_its_own():
    calls = [torch.randn(2, n, 4) for n in (1, 5, 2, 7, 3, 4)]
    found = fed(calls, calls=4).sample()
    assert found.call_low.shape == found.call_high.shape == (4, 4)
    for half, part in enumerate(found.halves):
        assert all(is_in(row, torch.stack([x.amax((0, 1)) for x in calls[half::2]])) for row in part.call_high)
        assert all(is_in(row, torch.stack([x.amin((0, 1)) for x in calls[half::2]])) for row in part.call_low)
    assert sum(len(half.call_low) for half in found.halves) == 4


def test_a_single_call_is_halved_in_the_middle():
    x = torch.randn(9, 4)
    found = fed([x], rows=100).sample()
    assert torch.equal(found.call_high, x.amax(0)[None])
    one, other = found.halves
    assert len(one.rows) == 5
    assert all(is_in(row, x[5:]) for row in other.rows)
    assert torch.equal(one.call_high[0], x[:5].amax(0))
    assert torch.equal(other.low, x[5:].amin(0))


def test_one_token_has_no_halves():
    found = fed([torch.randn(1, 4)]).sample()
    assert found.halves is None
    assert found.rows.shape == (1, 4)


def test_nothing_seen_is_an_error_and_empty_calls_are_nothing():
    sampler = fed([torch.empty(0, 4)])
    assert sampler.tokens == sampler.calls == 0
    with pytest.raises(CalibrationError, match="no token has been seen"):
        sampler.sample()
    with pytest.raises(CalibrationError, match="at least one token"):
        Sampler(0)


def test_what_is_not_finite_is_an_error():
    with pytest.raises(NonFiniteError, match="nan"):
        fed([torch.tensor([[1.0, torch.nan]])])


def test_everything_is_float32_and_a_copy():
    x = torch.randn(6, 4).to(torch.bfloat16)
    found = fed([x, x]).sample()
    x.zero_()
    tensors = (found.rows, found.low, found.high, found.call_low, found.call_high, found.halves[0].rows)
    assert all(t.dtype is torch.float32 and bool(t.any()) for t in tensors)
