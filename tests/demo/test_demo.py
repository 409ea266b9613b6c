import math

import pytest
import torch
from torch import nn

from w8a8 import kernels
from w8a8.demo import run as demo
from w8a8.demo.corpus import held_out_text
from w8a8.demo.run import SCHEMES, demo_model, run_demo, time_layer
from w8a8.evaluation import encode, perplexity
from w8a8.layers.linear import QuantLinear


@pytest.fixture(scope="module")
def report():
    steps, shown = [], []
    result = run_demo(max_tokens=1024, progress=lambda *s: steps.append(s), show=shown.append)
    assert [s[2] for s in steps] == ["float", *SCHEMES]
    assert [first.rows for first in shown] == [result.rows[:2]]
    return result


def test_the_shipped_model_is_trained():
    opened = demo_model()
    ids = encode(opened.tokenizer, held_out_text()).ids
    counts = torch.bincount(ids, minlength=opened.model.config.vocab_size) + 1.0
    unigram = math.exp(-float((counts / counts.sum()).log()[ids].mean()))  # of the best unigram for this very text
    assert perplexity(opened.model, ids[:4096], seq_len=256).perplexity.mean < unigram / 4


def test_the_shipped_directory_is_small_and_its_tokenizer_is_lossless():
    opened = demo_model()
    assert sum(f.stat().st_size for f in opened.directory.iterdir()) < 5_000_000
    text = held_out_text()[:2000] + " ünïcödé ✓"
    assert opened.tokenizer.decode(opened.tokenizer(text, add_special_tokens=False)["input_ids"]) == text


@pytest.mark.slow
def test_integer_and_simulated_perplexity_are_the_same_number(report):
    for row in report.rows[1:]:
        if row.scheme != "w8a16":
            assert row.perplexity == row.simulated_perplexity, row.scheme
        else:
            assert row.perplexity == pytest.approx(row.simulated_perplexity, rel=1e-5)


@pytest.mark.slow
def test_int8_loses_little_and_finer_scales_lose_less(report):
    rows = {row.scheme: row for row in report.rows}
    assert abs(rows["w8a8"].perplexity / report.float_perplexity - 1) < 0.005
    assert rows["w8a8"].top1_agreement > 0.97
    assert rows["w8a8"].top1_agreement > rows["w8a8-o2"].top1_agreement


@pytest.mark.slow
def test_the_files_are_smaller_and_the_sample_is_text(report):
    rows = {row.scheme: row for row in report.rows}
    assert rows["w8a8"].bytes < 0.75 * rows["float"].bytes
    assert len(report.sample.split()) > 5
    assert report.tokens == 1024
    assert "modules quantised" in report.coverage


def test_a_layer_is_timed_in_turn_and_the_kernel_that_ran_is_told():
    found = time_layer(64, rows=(1, 5), rounds=3)
    assert [each.rows for each in found.times] == [1, 5]
    assert all(each.float_ms > 0 and each.int8_ms > 0 for each in found.times)
    assert {each.kernel for each in found.times} == {kernels.first_choice("auto")}


@pytest.mark.parametrize(
    ("int8_ms", "kernel", "why"),
    [
        (1.0, "native", None),
        (3.0, "native", "calls this short are disturbed"),
        (3.0, "portable", "no instructions for this processor"),
        (3.0, "torch_cpu", "the kernel is torch_cpu; native cannot run: not built"),
        (3.0, "reference", "the kernel is reference; W8A8_KERNEL in the environment prefers it"),
    ],
)
def test_int8_is_never_told_to_be_slower_without_a_reason(monkeypatch, int8_ms, kernel, why):
    monkeypatch.setattr(demo, "_ms", lambda layer, x: 2.0 if type(layer) is nn.Linear else int8_ms)
    ran = "native" if kernel == "portable" else kernel
    calls = iter([{}, {ran: 8}])
    monkeypatch.setattr(QuantLinear, "kernel_calls", lambda self: next(calls))
    monkeypatch.setattr(demo.compiled, "instruction_set", lambda: kernel)
    monkeypatch.setattr(demo.kernels, "available", lambda: {"native": "not built" if ran == "torch_cpu" else None})
    note = time_layer(64, rows=(2,), rounds=2).note
    assert note is None if why is None else why in note
