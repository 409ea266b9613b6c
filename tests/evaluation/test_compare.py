import copy
import importlib
import math
from types import SimpleNamespace

import pytest
import torch

import w8a8
from tests.conftest import llama, opt
from w8a8.errors import ModelError, TextError
from w8a8.evaluation import Reference, Text, compare, context_length, encode, perplexity, store
from w8a8.evaluation.text import windows


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


def test_a_model_agrees_with_itself():
    model, ids = opt(), torch.randint(0, 96, (70,))
    same = compare(model, model, ids, seq_len=16)
    for estimate, value in (
        (same.kl_nats, 0.0),
        (same.kl_p99_nats, 0.0),
        (same.loss_difference_nats, 0.0),
        (same.top1_agreement, 1.0),
        (same.perplexity_ratio, 1.0),
    ):
        assert (estimate.low, estimate.mean, estimate.high) == (value,) * 3
    assert same.verdict == "indistinguishable at 95 %"


def test_a_comparison_measures_what_it_says():
    reference, ids = llama(), torch.randint(0, 96, (70,))
    model = w8a8.quantize(copy.deepcopy(reference)).model
    result = compare(model, reference, ids, seq_len=16, progress=lambda *_: None)
    spans = list(windows(70, 16, 16))
    difference = [a - b for a, b in zip(naive(model, ids, spans), naive(reference, ids, spans), strict=True)]
    assert result.loss_difference_nats.mean == pytest.approx(sum(difference) / len(difference), rel=1e-3)
    assert result.perplexity_ratio.mean == pytest.approx(math.exp(result.loss_difference_nats.mean), rel=1e-12)
    kl, agree, count = [], 0, 0
    for start, first, end in spans:
        with torch.inference_mode():
            q = model(ids[start:end][None]).logits[0].double().log_softmax(-1)[first - start - 1 : -1]
            p = reference(ids[start:end][None]).logits[0].double().log_softmax(-1)[first - start - 1 : -1]
        kl += (p.exp() * (p - q)).sum(-1).tolist()
        agree += int((p.argmax(-1) == q.argmax(-1)).sum())
        count += end - first
    assert result.kl_nats.mean == pytest.approx(sum(kl) / count, rel=1e-4)
    assert result.kl_p99_nats.mean == pytest.approx(sorted(kl)[math.ceil(0.99 * count) - 1], rel=1e-4)
    assert result.top1_agreement.mean == agree / count
    assert result.model.tokens == count


def test_speed_is_tokens_read_in_a_second_in_the_median(monkeypatch):
    model, ids = opt(), torch.randint(0, 96, (48,))
    seconds = iter([0.0, 5.0, 5.0, 6.0, 6.0, 8.0, 8.0, 10.0, 10.0, 14.0, 14.0, 18.0])  # first ours, then the reference
    module = importlib.import_module("w8a8.evaluation.compare")  # the package has a function of that name
    monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: next(seconds)))
    found = compare(model, model, ids, seq_len=16)
    assert found.model_tok_per_s == 16 / 4
    assert found.reference_tok_per_s == 16 / 2
    assert (found.model_dtype, found.reference_dtype) == ("float32", "float32")


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


def test_bits_per_byte_are_those_of_the_bytes_that_were_scored():
    from w8a8.demo.run import demo_model

    opened = demo_model()
    words = "Return the größte of two, or one, values. " * 8
    text = encode(opened.tokenizer, words)
    assert int(text.byte_ends[-1]) == len(words.encode())
    result = perplexity(opened.model, text, seq_len=32)
    spans = list(windows(text.ids.numel(), 32, 32))
    read = sum(int(text.byte_ends[end - 1] - text.byte_ends[first - 1]) for _, first, end in spans)
    assert result.bits_per_byte.mean == pytest.approx(
        result.loss_nats.mean * result.tokens / math.log(2) / read, rel=1e-9
    )
    assert perplexity(opened.model, text.ids, seq_len=32).bits_per_byte is None
    assert perplexity(opened.model, text.first(20), seq_len=32).tokens == 19


def test_models_that_have_nothing_in_common_are_far_apart_and_not_infinitely():
    from w8a8.evaluation.scores import token_kl

    p = torch.tensor([[50.0, -50.0, 0.0], [60.0, -60.0, 0.0], [0.1, 0.2, 0.3]])
    q = torch.tensor([[-50.0, 50.0, 0.0], [-60.0, 60.0, 0.0], [0.1, 0.2, 0.4]])
    log_p, log_q = p.double().log_softmax(-1), q.double().log_softmax(-1)
    exact = (log_p.exp() * (log_p - log_q)).sum(-1)
    assert token_kl(p, q).double().tolist() == pytest.approx(exact.tolist(), rel=1e-5)


class TestStored:
    def models(self):
        reference = llama()
        return w8a8.quantize(copy.deepcopy(reference)).model, reference, torch.randint(0, 96, (70,))

    @pytest.mark.parametrize("stride", [None, 5])
    def test_all_of_the_vocabulary_gives_what_two_models_give(self, tmp_path, stride):
        model, reference, ids = self.models()
        both = compare(model, reference, ids, seq_len=16, stride=stride)
        stored = store(reference, Text(ids), seq_len=16, stride=stride, top_k=96)
        stored.save(tmp_path / "cache" / "reference.safetensors")
        found = compare(
            model, Reference.load(tmp_path / "cache" / "reference.safetensors"), ids, seq_len=16, stride=stride
        )
        assert found.model == both.model
        assert found.reference == both.reference
        assert found.top1_agreement == both.top1_agreement
        assert found.loss_difference_nats == both.loss_difference_nats
        assert found.kl_nats.mean == pytest.approx(both.kl_nats.mean, rel=1e-3)
        assert found.top_k is None
        assert found.model_tok_per_s > 0
        assert found.reference_tok_per_s is None  # it was not run

    def test_a_part_of_it_gives_a_lower_bound_that_grows_with_it(self):
        model, reference, ids = self.models()
        exact = compare(model, reference, ids, seq_len=16).kl_nats.mean
        bounds = []
        for k in (1, 8, 32, 95):
            found = compare(model, store(reference, Text(ids), seq_len=16, top_k=k), ids, seq_len=16)
            assert found.top_k == k
            bounds.append(found.kl_nats.mean)
        assert bounds == sorted(bounds)
        assert 0 < bounds[0] < bounds[-1] <= exact * (1 + 1e-3)

    def test_other_windows_or_another_text_are_refused(self):
        model, reference, ids = self.models()
        stored = store(reference, Text(ids), seq_len=16)
        with pytest.raises(ModelError, match="windows of 16, 16 apart"):
            compare(model, stored, ids, seq_len=8)
        with pytest.raises(ModelError, match="store them again"):
            compare(model, stored, ids.flip(0), seq_len=16)

    def test_another_vocabulary_is_refused(self):
        _, reference, ids = self.models()
        stored = store(reference, Text(ids % 80), seq_len=16)
        with pytest.raises(ModelError, match="vocabularies of 80 and 96"):
            compare(llama(vocab_size=80), stored, ids % 80, seq_len=16)

    def test_a_file_of_something_else_is_refused(self, tmp_path):
        from safetensors.torch import save_file

        from w8a8.errors import CheckpointError

        save_file(
            {name: torch.ones(2) for name in ("losses", "best", "top", "log_p", "log_rest")}, tmp_path / "x.safetensors"
        )
        with pytest.raises(CheckpointError, match="holds no stored predictions"):
            Reference.load(tmp_path / "x.safetensors")
