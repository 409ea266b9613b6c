import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from w8a8.calibration.reservoir import Reservoir
from w8a8.errors import CalibrationError


def filled(batches, size, seed=0):
    reservoir = Reservoir(size, seed=seed)
    for batch in batches:
        reservoir.update(batch)
    return reservoir


@settings(deadline=None)
@given(m=st.integers(1, 200), size=st.integers(1, 40), cuts=st.lists(st.integers(0, 200), max_size=5))
def test_the_rows_are_distinct_tokens_and_the_same_for_any_batching(m, size, cuts):
    x = torch.stack([torch.arange(m), torch.arange(m) + 0.5], dim=-1)
    parts = filled(x.tensor_split(sorted(min(cut, m) for cut in cuts)), size)
    assert parts.tokens == m
    assert torch.equal(parts.rows, filled([x], size).rows)
    assert len(parts.rows) == min(size, m)
    assert torch.equal(parts.rows[:, 1], parts.rows[:, 0] + 0.5)
    assert len(parts.rows[:, 0].unique()) == len(parts.rows)


def test_every_token_is_kept_with_the_same_probability():
    """Each of 60 tokens is in 15 places of 60 in a quarter of the runs: binomial, 5 standard deviations."""
    runs, counts = 800, torch.zeros(60)
    x = torch.arange(60.0)[:, None]
    for seed in range(runs):
        counts[filled(x.split(11), 15, seed).rows[:, 0].long()] += 1
    assert bool(((counts / runs - 0.25).abs() < 5 * (0.25 * 0.75 / runs) ** 0.5).all())


def test_seeds_differ_and_repeat():
    x = torch.randn(500, 3)
    assert torch.equal(filled([x], 20, 1).rows, filled([x], 20, 1).rows)
    assert not torch.equal(filled([x], 20, 1).rows, filled([x], 20, 2).rows)


def test_reservoirs_of_one_seed_hold_the_same_tokens_at_every_layer():
    x = torch.randn(300, 4)
    a, b = filled(x.split(64), 32), filled((2 * x).split(64), 32)
    assert torch.equal(2 * a.rows, b.rows)


def test_leading_axes_are_tokens_and_the_dtype_is_kept():
    x = torch.randn(2, 30, 5).to(torch.bfloat16)
    rows = filled([x.transpose(0, 1)], 8).rows
    assert rows.dtype is torch.bfloat16
    assert rows.shape == (8, 5)


def test_rows_are_copies():
    x = torch.zeros(4, 2)
    reservoir = filled([x], 4)
    x.fill_(7.0)
    assert not reservoir.rows.any()


@pytest.mark.parametrize("first", [True, False])
def test_a_stream_may_pass_in_and_out_of_inference_mode(first):
    x = torch.randn(400, 3)
    reservoir = Reservoir(20)
    for part, inside in ((x[:100], first), (x[100:250], not first), (x[250:], first)):
        with torch.inference_mode(inside):
            reservoir.update(part.clone())
    assert torch.equal(reservoir.rows, filled([x], 20).rows)


def test_misuse_is_explained():
    with pytest.raises(CalibrationError, match="at least one token, found size=0"):
        Reservoir(0)
    reservoir = Reservoir(3)
    with pytest.raises(CalibrationError, match="has seen no token"):
        reservoir.rows  # noqa: B018
    reservoir.update(torch.ones(2, 4))
    with pytest.raises(CalibrationError, match="of 4 channels was given 5"):
        reservoir.update(torch.ones(2, 5))
