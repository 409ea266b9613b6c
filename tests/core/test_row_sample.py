import itertools
import math

import pytest
import torch

from w8a8.core.affine import dequantize, fake_quantize, quantize, sqnr_db
from w8a8.core.row_sample import ROWS, RowSample
from w8a8.core.scheme import PerChannel, PerColumn, PerGroup, PerTensor, QuantSpec


def sampled(weight, made):
    sample = RowSample(len(weight))
    sample.take(weight, made)
    return sample.sqnr_db


def by_hand(weight, values):
    """The definition, element by element in Python's float64, over the rows that are to be looked at."""
    step = math.ceil(len(weight) / ROWS)
    rows = range(0, len(weight), step if step % 2 else step + 1)
    exact, made = ([v for row in rows for v in t[row].double().tolist()] for t in (weight, values))
    signal = math.fsum(w * w for w in exact)
    noise = math.fsum((w - v) ** 2 for w, v in zip(exact, made, strict=True))
    return 10 * math.log10(signal / noise) if noise else math.inf


@pytest.mark.parametrize("shape", [(1, 100), (17, 20), (32, 4), (33, 12), (1000, 8), (70, 12_000)], ids=str)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("granularity", [PerChannel(), PerTensor(), PerColumn(), PerGroup(4)], ids=str)
def test_the_figure_is_the_one_computed_by_hand(granularity, symmetric, shape):
    weight = torch.randn(shape).to(torch.bfloat16)
    q = quantize(weight, QuantSpec(8, granularity, symmetric))
    assert sampled(weight, q) == pytest.approx(by_hand(weight, dequantize(q)), rel=1e-9)


def test_of_few_rows_it_is_the_sqnr_of_the_whole_weight():
    weight = torch.randn(ROWS, 33)
    q = quantize(weight, QuantSpec(8, PerChannel()))
    assert sampled(weight, q) == pytest.approx(sqnr_db(weight, dequantize(q)), rel=1e-9)


@pytest.mark.parametrize("piece", [1, 7, 64, 299, 300])
def test_pieces_of_a_weight_tell_what_the_whole_tells(piece):
    weight, spec = torch.randn(300, 20), QuantSpec(8, PerChannel(), symmetric=False)
    sample = RowSample(300)
    for part in weight.split(piece):
        sample.take(part, quantize(part, spec))
    assert sample.sqnr_db == pytest.approx(sampled(weight, quantize(weight, spec)), rel=1e-9)


def test_a_grid_wider_than_codes_is_told_by_its_values():
    weight = torch.randn(100, 33)
    values = fake_quantize(weight, QuantSpec(16, PerChannel()))
    assert sampled(weight, values) == pytest.approx(by_hand(weight, values), rel=1e-9)
    assert sampled(weight, values) > 80


@pytest.mark.parametrize("weight", [torch.zeros(5, 4), torch.arange(-127.0, 128)[None], torch.empty(0, 4)])
def test_what_loses_nothing_is_infinite(weight):
    assert sampled(weight, quantize(weight, QuantSpec(8, PerChannel()))) == math.inf


def test_neither_the_weight_nor_its_codes_are_modified():
    weight = torch.randn(100, 8)
    values = fake_quantize(weight, QuantSpec(16, PerChannel()))
    before = weight.clone(), values.clone()
    sampled(weight, values)
    assert torch.equal(weight, before[0])
    assert torch.equal(values, before[1])


def looked_at(rows):
    """The rows that a sample looks at: those whose loss shows."""
    weight, found = torch.ones(rows, 1), []
    for row in range(rows):
        values = weight.clone()
        values[row] = 0.0
        if sampled(weight, values) < math.inf:
            found.append(row)
    return found


def test_the_sample_is_bounded_and_spread_over_rows_and_over_places_in_heads():
    rows = looked_at(2048)
    assert len(rows) <= 64
    (gap,) = {b - a for a, b in itertools.pairwise(rows)}
    assert rows[0] < gap
    assert 2048 - rows[-1] <= gap
    assert len({row % 64 for row in rows}) == len(rows) > 30  # of heads of 64 rows
    assert looked_at(5) == [0, 1, 2, 3, 4]
    assert looked_at(65) == [*range(0, 65, 3)]
