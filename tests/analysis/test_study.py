import pytest
import torch

from tests.conftest import llama
from w8a8.analysis.study import grid, study
from w8a8.core.scheme import PerChannel, PerColumn, PerTensor, PerToken
from w8a8.demo.corpus import held_out_text
from w8a8.demo.run import demo_model
from w8a8.errors import SchemeError
from w8a8.evaluation import encode, perplexity
from w8a8.layers.linear import quant_linears
from w8a8.pipeline import quantize


def test_the_grid_is_the_notebooks_experiment():
    schemes = list(grid())
    assert len(schemes) == len(set(schemes)) == 3 * 2 * 3 * 2 * 3
    assert sum(scheme.integer_executable for scheme in schemes) == 2 * 2 * 2 * 2 * 3


HALF = ["*.layers.[0-2].*"]


@pytest.fixture(scope="module")
def measured():
    """The first half of the shipped model at 6 and 4 bits, where the differences are large."""
    torch.manual_seed(0)
    opened = demo_model()
    ids = encode(opened.tokenizer, held_out_text()).ids[:128]
    return opened.model, ids, study(opened.model, ids, seq_len=64, bits=(6, 4), include=HALF)


def cell(result, bits, weights, activations, *, symmetric=True):
    (found,) = [
        c
        for c in result.cells
        if c.bits == bits
        and isinstance(c.scheme.weights.granularity, weights)
        and isinstance(c.scheme.activations.granularity, activations)
        and c.scheme.weights.symmetric == c.scheme.activations.symmetric == symmetric
    ]
    return found


@pytest.mark.slow
@pytest.mark.parametrize("bits", [6, 4])
@pytest.mark.parametrize("symmetric", [True, False])
def test_finer_granularity_is_better_as_theory_says(measured, bits, symmetric):
    _, _, result = measured

    def at(weights, activations):
        return cell(result, bits, weights, activations, symmetric=symmetric)

    assert at(PerChannel, PerToken).sqnr_db > at(PerTensor, PerToken).sqnr_db
    assert at(PerChannel, PerToken).sqnr_db > at(PerChannel, PerTensor).sqnr_db
    assert at(PerColumn, PerToken).sqnr_db > at(PerTensor, PerToken).sqnr_db
    assert at(PerChannel, PerChannel).sqnr_db > at(PerChannel, PerTensor).sqnr_db
    if bits == 4:  # at 6 bits the perplexities of so short a text are too close
        assert at(PerChannel, PerToken).perplexity < at(PerTensor, PerTensor).perplexity


@pytest.mark.slow
def test_two_bits_more_are_about_twelve_decibels(measured):
    _, _, result = measured
    gain = cell(result, 6, PerChannel, PerToken).sqnr_db - cell(result, 4, PerChannel, PerToken).sqnr_db
    assert 10 < gain < 15  # 20 log10(31 / 7) = 12.9


@pytest.mark.slow
def test_the_best_executable_cell_is_executable_and_best(measured):
    _, _, result = measured
    best = result.best_executable
    assert best.executable
    assert best.perplexity == min(c.perplexity for c in result.cells if c.executable)
    assert [c.executable for c in result.cells] == [c.scheme.integer_executable for c in result.cells]


@pytest.mark.slow
def test_the_model_is_put_back_and_an_executable_cell_is_the_integer_model(measured):
    model, ids, result = measured
    assert not list(quant_linears(model))
    assert perplexity(model, ids, seq_len=64).perplexity.mean == result.float_model.perplexity.mean
    wanted = cell(result, 6, PerChannel, PerToken)
    quantized = quantize(demo_model().model, wanted.scheme, include=HALF).model
    assert perplexity(quantized, ids, seq_len=64).perplexity.mean == wanted.perplexity


def test_progress_is_told_and_no_hook_is_left():
    model, steps = llama(), []
    study(model, torch.randint(0, 96, (32,)), seq_len=16, bits=(8,), progress=lambda *s: steps.append(s))
    assert [s[:2] for s in steps] == [(i, 36) for i in range(1, 37)]
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_widths_that_leave_nothing_executable_are_refused():
    with pytest.raises(SchemeError, match=r"bits=\(12, 16\) leaves no cell that integers can run"):
        study(llama(), torch.randint(0, 96, (32,)), seq_len=16, bits=(12, 16))
