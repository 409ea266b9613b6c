import math

import pytest
import torch

from w8a8.corpus import held_out_text
from w8a8.demo import SCHEMES, demo_model, run_demo
from w8a8.evaluation import encode, perplexity


@pytest.fixture(scope="module")
def report():
    steps = []
    result = run_demo(max_tokens=2048, progress=lambda *s: steps.append(s))
    assert [s[2] for s in steps] == list(SCHEMES)
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


def test_integer_and_simulated_perplexity_are_the_same_number(report):
    for row in report.rows[1:]:
        if row.scheme != "w8a16":
            assert row.perplexity == row.simulated_perplexity, row.scheme
        else:
            assert row.perplexity == pytest.approx(row.simulated_perplexity, rel=1e-5)


def test_int8_loses_little_and_finer_scales_lose_less(report):
    rows = {row.scheme: row for row in report.rows}
    assert abs(rows["w8a8"].perplexity / report.float_perplexity - 1) < 0.005
    assert rows["w8a8"].top1_agreement > 0.97
    assert rows["w8a8"].top1_agreement > rows["w8a8-o2"].top1_agreement


def test_the_files_are_smaller_and_the_sample_is_text(report):
    rows = {row.scheme: row for row in report.rows}
    assert rows["w8a8"].bytes < 0.75 * rows["float"].bytes
    assert all(row.decode_tok_per_s > 0 for row in report.rows)
    assert len(report.sample.split()) > 5
    assert report.tokens == 2048
    assert "modules quantised" in report.coverage
