"""What a model says of each token: a causal one from those before it, a masked one from both sides."""

import pytest
import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertLMHeadModel,
    RobertaConfig,
    RobertaForMaskedLM,
    XLNetConfig,
    XLNetLMHeadModel,
)

import w8a8
from tests.conftest import gpt2, llama, mixtral, opt
from w8a8.core.scheme import PerChannel, QuantSpec, Scheme
from w8a8.decoding.models import new_cache
from w8a8.errors import ModelError
from w8a8.evaluation import Text, compare, context_length, encode, perplexity, store
from w8a8.evaluation.scores import check_causal, logits_of
from w8a8.evaluation.text import Frame, windows

_SIZES = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
_BERT = {**_SIZES, "intermediate_size": 40, "max_position_embeddings": 64}
PER_CHANNEL = Scheme(QuantSpec(6), QuantSpec(6, PerChannel()))
FRAME = Frame(mask=3, before=(1,), after=(2, 2))


def bert(kind=BertForMaskedLM, **changes):
    model = kind(BertConfig(**_BERT, **changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5)  # so that what is attended to shows
    return model


def naive(model, ids, spans):
    """-log p of each token, masked alone in a copy of its window."""
    losses = []
    for start, first, end in spans:
        for t in range(first, end):
            window = torch.tensor([*FRAME.before, *ids[start:end].tolist(), *FRAME.after])
            window[t - start + 1] = FRAME.mask
            with torch.inference_mode():
                logits = model(window[None]).logits[0, t - start + 1].to(torch.float64)
            losses.append(float(torch.logsumexp(logits, 0) - logits[ids[t]]))
    return losses


@pytest.mark.parametrize(("tokens", "seq_len", "stride"), [(21, 21, None), (21, 9, None), (21, 9, 4), (2, 9, None)])
def test_the_pseudo_loss_is_that_of_every_token_masked_alone(tokens, seq_len, stride):
    model, ids = bert(), torch.randint(4, 96, (tokens,))
    found = perplexity(model, Text(ids, None, FRAME), seq_len=seq_len, stride=stride)
    losses = naive(model, ids, windows(tokens, seq_len, stride or seq_len, unscored=0))
    assert found.pseudo
    assert found.tokens == tokens == len(losses)
    assert found.loss_nats.mean == pytest.approx(sum(losses) / len(losses), rel=1e-5)


def test_bits_per_byte_count_the_first_token_too():
    ids, ends = torch.randint(4, 96, (5,)), torch.tensor([3, 4, 6, 7, 10])
    found = perplexity(bert(), Text(ids, ends, FRAME), seq_len=8)
    assert found.bits_per_byte.mean == pytest.approx(
        found.loss_nats.mean * 5 / 10 / torch.log(torch.tensor(2.0)).item()
    )


def test_masked_models_are_compared_and_stored_as_causal_ones_are():
    model, text = bert(), Text(torch.randint(4, 96, (30,)), None, FRAME)
    options = {"seq_len": 12}
    reference = bert()
    reference.load_state_dict(model.state_dict())
    w8a8.quantize(model)
    both = compare(model, reference, text, **options)
    assert both.model.pseudo
    assert both.model.tokens == 30
    assert both.reference.loss_nats == perplexity(reference, text, **options).loss_nats
    stored = compare(model, store(reference, text, **options), text, **options)
    assert stored.perplexity_ratio == both.perplexity_ratio
    assert 0 < both.kl_nats.mean < 0.1
    with pytest.raises(ModelError, match="one is a masked language model and one is not"):
        compare(model, llama(), text, **options)


def test_a_masked_model_wants_a_text_with_a_mask():
    with pytest.raises(ModelError, match=r"BertForMaskedLM is a masked.*comes with no mask: give what `encode`"):
        perplexity(bert(), torch.arange(4, 20), seq_len=8)


def test_the_frame_takes_its_places_of_the_context():
    text = Text(torch.randint(4, 96, (80,)), None, FRAME)
    assert perplexity(bert(), text, seq_len=61).windows == 2
    with pytest.raises(ModelError, match=r"seq_len=62 is out of range: 2\.\.61"):
        perplexity(bert(), text, seq_len=62)


def test_roberta_has_fewer_places_than_its_config_says():
    model = RobertaForMaskedLM(RobertaConfig(**_BERT, pad_token_id=1)).eval()
    assert context_length(model) == 62
    assert perplexity(model, Text(torch.randint(4, 96, (59,)), None, FRAME), seq_len=59).tokens == 59


class _Tokenizer:
    """Words are numbers; what stands around a text is its own."""

    is_fast, mask_token_id = False, 3

    def __call__(self, text, add_special_tokens, **_):
        ids = [int(word) for word in text.split()]
        return {"input_ids": [1, *ids, 2, 2] if add_special_tokens else ids}


def test_encode_finds_what_the_tokenizer_puts_around_a_text():
    text = encode(_Tokenizer(), "5 6 7 8 9 10")
    assert text.frame == FRAME
    assert text.ids.tolist() == [5, 6, 7, 8, 9, 10]
    assert text.first(3).frame == FRAME


def xlnet():
    return XLNetLMHeadModel(XLNetConfig(vocab_size=96, d_model=32, n_layer=2, n_head=4, d_inner=40)).eval()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("make", [lambda: bert(BertLMHeadModel), xlnet], ids=["bert", "xlnet"])
def test_what_sees_the_token_it_is_to_tell_has_no_perplexity(make):
    ids = torch.randint(4, 96, (30,))
    with pytest.raises(ModelError, match=r"depends on that token.*no causal language model; in Python"):
        perplexity(make(), ids, seq_len=16)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", [llama, opt, gpt2, mixtral, lambda: bert(BertLMHeadModel, is_decoder=True)])
def test_causal_models_are_taken_for_such(make, dtype):
    for ids in (torch.randint(4, 96, (16,)), torch.full((9,), 7), torch.zeros(2, dtype=torch.int64)):
        check_causal(make().to(dtype), ids)


@pytest.mark.parametrize("scheme", ["w8a8", "w8a8-tensor", "w8a16", PER_CHANNEL])
def test_quantised_causal_models_are_taken_for_such(scheme):
    check_causal(w8a8.simulate(llama(), scheme).model, torch.randint(4, 96, (16,)))


def test_one_pass_over_a_window_reads_the_cache_as_token_by_token_does():
    """To a tenth of what keeping keys and values in int8 changes at all."""
    model, ids = llama(), torch.arange(3, 43)
    exact = logits_of(model, ids, 0)
    w8a8.set_cache(model, "int8")
    at_once, cache = logits_of(model, ids, 0), new_cache(model)
    with torch.inference_mode():
        steps = [model(input_ids=token[None, None], past_key_values=cache).logits[0] for token in ids]
    one_by_one = torch.cat(steps)
    cost = (at_once - exact).norm()
    assert cost > 0
    assert (one_by_one - at_once).norm() < 0.1 * cost
