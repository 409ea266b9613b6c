"""The rows of a card are the figures of the comparison."""

import math
from dataclasses import replace

import torch

from tests.conftest import llama
from w8a8.evaluation import compare
from w8a8.evaluation.intervals import Estimate
from w8a8.evaluation.outputs import OutputComparison
from w8a8.evaluation.summary import summary


def test_a_comparison_of_predictions():
    model = llama()
    both = compare(model, model, torch.arange(3, 67), seq_len=16)
    told = summary(both, "text.txt")
    assert told.on.startswith("Against the float model, on text.txt: 60 tokens in 4 windows of 16, 16 apart; floats of")
    rows = {what: (value, interval) for what, value, interval in told.rows}
    e = both.model.perplexity
    assert rows["perplexity of this model"] == (f"{e.mean:.4f}", f"{e.low:.4f} to {e.high:.4f}")
    assert rows["KL(float, this), nats per token, mean"] == ("0.000000", "0.000000 to 0.000000")
    assert rows["share of tokens with the same most likely next one"][0] == "1.0000"
    assert told.says == f"Perplexity: {both.verdict}."


def test_a_bound_is_told_as_one_and_an_interval_of_one_window_is_none():
    model = llama()
    both = replace(compare(model, model, torch.arange(3, 19), seq_len=16), top_k=512)
    told = summary(both, "text.txt")
    assert any("at least: the 512 most likely tokens were kept" in what for what, _, _ in told.rows)
    assert math.isnan(both.model.perplexity.low)
    assert {interval for _, _, interval in told.rows} == {"none, of one window"}


def test_a_comparison_of_outputs():
    value = Estimate(0.25, 0.125, 0.5)
    both = OutputComparison("last_hidden_state", value, value, value, None, 40, 4)
    told = summary(both, "text.txt")
    assert told.rows[0] == ("norm of the difference / norm of the float output", "0.25000", "0.12500 to 0.50000")
    assert len(told.rows) == 3
    assert len(summary(replace(both, agreement=value), "text.txt").rows) == 4
