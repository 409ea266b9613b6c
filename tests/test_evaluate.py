import copy
import math

import pytest
import torch

import w8a8
from tests.conftest import llama, opt
from w8a8.errors import ModelError, TextError
from w8a8.evaluate import compare, context_length, encode, perplexity, windows


def naive(model, ids, spans):
    """-log p of each scored token, one at a time in float64."""
    losses = []
    for start, first, end in spans:
        with torch.inference_mode():
            logits = model(ids[start:end][None]).logits[0].to(torch.float64)
        losses += [
            float(torch.logsumexp(logits[t - start - 1], 0) - logits[t - start - 1, ids[t]]) for t in range(first, end)
        ]
    return losses


@pytest.mark.parametrize(
    ("tokens", "seq_len", "stride", "expected"),
    [
        (10, 4, 4, [(0, 1, 4), (4, 5, 8), (8, 9, 10)]),
        (9, 4, 4, [(0, 1, 4), (4, 5, 8)]),  # a last window of one token scores nothing
        (8, 4, 2, [(0, 1, 4), (2, 4, 6), (4, 6, 8)]),
        (3, 8, 8, [(0, 1, 3)]),
        (5, 4, 1, [(0, 1, 4), (1, 4, 5)]),
    ],
)
def test_windows_are_those_that_help_states(tokens, seq_len, stride, expected):
    assert list(windows(tokens, seq_len, stride)) == expected


def test_no_token_is_scored_twice_and_only_first_ones_are_left_out():
    for stride in (1, 3, 8):
        scored = [t for _, first, end in windows(50, 8, stride) for t in range(first, end)]
        assert len(scored) == len(set(scored))
        assert len(scored) == (50 - 7 if stride == 8 else 49)


@pytest.mark.parametrize("stride", [None, 5])
def test_perplexity_is_token_weighted_over_the_windows(stride):
    model, ids = llama(), torch.randint(0, 96, (70,))
    result = perplexity(model, ids, seq_len=16, stride=stride)
    losses = naive(model, ids, windows(70, 16, stride or 16))
    assert result.tokens == len(losses)
    assert result.loss_nats.mean == pytest.approx(sum(losses) / len(losses), rel=1e-6)
    assert result.perplexity.mean == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-6)
    assert result.perplexity.low < result.perplexity.mean < result.perplexity.high


def test_one_window_has_no_interval():
    result = perplexity(llama(), torch.randint(0, 96, (10,)), seq_len=16)
    assert result.windows == 1
    assert math.isnan(result.perplexity.low)


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    generator = torch.Generator().manual_seed(3)
    from w8a8.evaluate import _estimate

    hits = 0
    for _ in range(400):
        counts = torch.randint(5, 20, (60,), generator=generator).tolist()
        means = 2.0 + torch.randn(60, generator=generator) * 0.5  # windows differ, mean 2 nats per token
        estimate = _estimate([float(m) * c for m, c in zip(means, counts, strict=True)], counts)
        hits += estimate.low <= 2.0 <= estimate.high
    assert 0.90 < hits / 400 < 0.98


def test_a_model_agrees_with_itself():
    model, ids = opt(), torch.randint(0, 96, (70,))
    same = compare(model, model, ids, seq_len=16)
    assert same.kl_nats.mean == 0.0
    assert same.top1_agreement.mean == 1.0
    assert same.perplexity_ratio.mean == 1.0


def test_a_comparison_measures_what_it_says():
    reference, ids = llama(), torch.randint(0, 96, (70,))
    model = w8a8.quantize(copy.deepcopy(reference)).model
    result = compare(model, reference, ids, seq_len=16, progress=lambda *_: None)
    spans = list(windows(70, 16, 16))
    difference = [a - b for a, b in zip(naive(model, ids, spans), naive(reference, ids, spans), strict=True)]
    assert result.loss_difference_nats.mean == pytest.approx(sum(difference) / len(difference), rel=1e-3)
    assert result.perplexity_ratio.mean == pytest.approx(math.exp(result.loss_difference_nats.mean), rel=1e-12)
    kl, agree, count = 0.0, 0, 0
    for start, first, end in spans:
        with torch.inference_mode():
            q = model(ids[start:end][None]).logits[0].double().log_softmax(-1)[first - start - 1 : -1]
            p = reference(ids[start:end][None]).logits[0].double().log_softmax(-1)[first - start - 1 : -1]
        kl += float((p.exp() * (p - q)).sum())
        agree += int((p.argmax(-1) == q.argmax(-1)).sum())
        count += end - first
    assert result.kl_nats.mean == pytest.approx(kl / count, rel=1e-3)
    assert result.top1_agreement.mean == agree / count
    assert result.model.tokens == count


def test_vocabularies_must_agree():
    with pytest.raises(ModelError, match="vocabularies of 96 and 80"):
        compare(llama(), llama(vocab_size=80), torch.randint(0, 80, (20,)), seq_len=16)


def test_token_ids_of_another_vocabulary_are_refused():
    with pytest.raises(ModelError, match=r"token id 95, LlamaForCausalLM knows 0\.\.79"):
        compare(llama(), llama(vocab_size=80), torch.tensor([1, 95, 3]), seq_len=16)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seq_len": 1}, r"seq_len=1 is out of range: 2..64"),
        ({"seq_len": 65}, r"seq_len=65 is out of range"),
        ({"seq_len": 16, "stride": 17}, r"stride=17 is out of range: 1..seq_len=16"),
        ({"seq_len": 16, "stride": 0}, r"stride=0 is out of range"),
    ],
)
def test_lengths_out_of_range_are_refused(options, message):
    with pytest.raises(ModelError, match=message):
        perplexity(llama(), torch.randint(0, 96, (20,)), **options)


def test_a_text_of_one_token_is_refused():
    with pytest.raises(TextError, match="the text has 1 tokens"):
        perplexity(llama(), torch.tensor([3]), seq_len=4)


def test_logits_that_are_not_finite_are_an_error_not_a_number():
    model = llama()
    with torch.no_grad():
        model.lm_head.weight[3] = torch.nan
    with pytest.raises(ModelError, match="logits of the window at token 0 are not finite"):
        perplexity(model, torch.randint(0, 96, (20,)), seq_len=16)


def test_encoding_needs_a_tokenizer_and_a_text():
    with pytest.raises(ModelError, match="has no tokenizer"):
        encode(None, "text")
    with pytest.raises(TextError, match="0 tokens"):
        encode(lambda text, **_: {"input_ids": []}, "")


def test_the_context_is_read_from_the_config():
    assert context_length(llama()) == 64
    model = llama()
    model.config = type("Config", (), {})()
    assert context_length(model) is None
