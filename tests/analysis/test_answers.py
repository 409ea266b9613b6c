"""What encoders are asked: by hand, in whole forwards, for each kind of model."""

import math
from dataclasses import replace

import pytest
import torch
import transformers as t

import w8a8
from tests.analysis.conftest import TWO_BITS
from tests.sentences import SENTENCES, bert, tokenizer, xlm_roberta
from w8a8.analysis import Budget, allocate, sensitivity
from w8a8.analysis.answers import MASKS, Told, Window
from w8a8.analysis.errors import layer_errors
from w8a8.analysis.sample import draw
from w8a8.errors import ModelError
from w8a8.evaluation import encode

KINDS = {
    "masked": (t.BertForMaskedLM, {}, Told.MASKED),
    "vector": (t.BertModel, {}, Told.VECTOR),
    "label": (t.BertForSequenceClassification, {"num_labels": 3}, Told.LABEL),
    "labels": (
        t.BertForSequenceClassification,
        {"num_labels": 3, "problem_type": "multi_label_classification"},
        Told.LABELS,
    ),
    "score": (t.BertForSequenceClassification, {"num_labels": 1}, Told.LABELS),
    "labels of tokens": (t.BertForTokenClassification, {"num_labels": 5}, Told.LABEL),
}
SHORT = {"windows": 2, "seq_len": 12}
BAD = "encoder.layer.1.output.dense"


@pytest.fixture(scope="module")
def text():
    return encode(tokenizer(), " ".join(SENTENCES * 3))


def made(kind):
    torch.manual_seed(0)
    model_class, more, _ = KINDS[kind]
    model = model_class(bert(**more)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(3)
    return model


def by_hand(kind, model, quantized, window):
    """The distance of two models on a window, from what transformers' classes return."""
    special = tokenizer()
    framed = torch.tensor([[special.cls_token_id, *window.ids.tolist(), special.sep_token_id]])
    with torch.no_grad():
        if kind == "masked":
            total = 0.0
            for place in (int(m) for m in window.masks):
                copy = framed.clone()
                copy[0, place] = special.mask_token_id
                p, q = (m(input_ids=copy).logits[0, place].double().log_softmax(-1) for m in (model, quantized))
                total += float((p.exp() * (p - q)).sum())
            return total
        if kind == "vector":
            a, b = (m(input_ids=framed).last_hidden_state[0].double().mean(0) for m in (model, quantized))
            return float(1 - torch.cosine_similarity(a, b, dim=0))
        p, q = (m(input_ids=framed).logits.double().flatten(0, -2) for m in (model, quantized))
        if kind in ("labels", "score"):
            p, q = p.sigmoid(), q.sigmoid()
            return float((p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).sum())
        p, q = p.log_softmax(-1), q.log_softmax(-1)
        return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.mark.parametrize("kind", KINDS)
def test_a_layers_cost_is_what_whole_forwards_give_by_hand(kind, text):
    model, told = made(kind), KINDS[kind][2]
    bad = BAD if kind == "vector" else f"bert.{BAD}"
    found = sensitivity(model, text, {bad: TWO_BITS, "*": "w8a8-asym"}, **SHORT)
    windows = draw(model, text, **SHORT).windows
    assert {window.told for window in windows} == {told}
    assert found.measure == told.value
    assert found.replayed
    assert found.tokens == (2 * MASKS if kind == "masked" else 2)
    whole, alone = made(kind), made(kind)
    w8a8.quantize(whole, {bad: TWO_BITS, "*": "w8a8-asym"})
    w8a8.quantize(alone, {bad: TWO_BITS})
    for quantized, measured in (
        (whole, found.kl_nats),
        (alone, next(x for x in found.layers if x.name == bad).kl_alone),
    ):
        wanted = sum(by_hand(kind, model, quantized, window) for window in windows) / found.tokens
        assert measured == pytest.approx(wanted, rel=1e-3)
    assert found.worst(1)[0].name == bad
    assert found.rankings.kl_spared[0] == bad


def test_masks_are_spread_over_a_window_and_few_tokens_have_one_each():
    frame = encode(tokenizer(), SENTENCES[0]).frame
    ids = torch.arange(10, 50)
    window = Window.of(ids, 7, Told.MASKED, frame)
    assert window.inputs.shape == (MASKS, 42)
    assert window.targets.tolist() == [12, 17, 22, 27, 32, 37, 42, 47]
    assert (window.inputs == frame.mask).nonzero()[:, 1].tolist() == window.masks.tolist()
    assert Window.of(ids[:3], 0, Told.MASKED, frame).targets.tolist() == [10, 11, 12]


def test_a_text_of_no_embedder_is_the_mean_of_its_last_states(text):
    model = made("vector")
    window = draw(model, text, **SHORT).windows[0]
    with torch.no_grad():
        states = model(input_ids=window.inputs).last_hidden_state
    torch.testing.assert_close(window.answer(model), states.mean(1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["vector", "masked", "label"])
def test_an_embedder_is_asked_for_vectors_whatever_stands_on_its_model(kind, text):
    model = made(kind)
    asked = replace(text, vectors=lambda states: states[:, 0] * 2)
    sample = draw(model, asked, **SHORT)
    assert sample.told is Told.VECTOR
    with torch.no_grad():
        states = model.base_model(input_ids=sample.windows[0].inputs).last_hidden_state
    assert torch.equal(sample.windows[0].answer(model), states[:, 0] * 2)


@pytest.mark.parametrize("kind", ["masked", "vector", "label"])
def test_a_budget_spares_the_bad_layer_of_an_encoder(kind, text):
    model = made(kind)
    bad = BAD if kind == "vector" else f"bert.{BAD}"
    schemes = {bad: TWO_BITS, "*": "w8a8-asym"}
    cost = sensitivity(model, text, schemes, **SHORT).worst(1)[0].kl_alone
    found = allocate(model, text, Budget(percent=100 * math.expm1(cost / 2)), options=[schemes], **SHORT)
    assert found.schemes[bad] is None
    assert sum(scheme is not None for scheme in found.schemes.values()) > len(found.schemes) // 2
    assert found.measure == KINDS[kind][2].value
    assert found.measure in str(found)
    if kind == "masked":
        assert math.log(found.perplexity_ratio) <= cost / 2
    else:
        assert found.perplexity_ratio is None
        assert found.chosen.measured_kl_nats <= cost / 2


def test_layers_of_encoders_have_errors_of_their_own(text):
    model = made("vector")
    quantized = made("vector")
    w8a8.quantize(quantized)
    found = layer_errors(model, quantized, text, **SHORT)
    assert len(found) == 13
    assert all(layer.output_sqnr_db > 20 for layer in found if layer.output_sqnr_db is not None)
    q = next(layer for layer in found if layer.name.endswith("0.attention.self.value"))
    assert q.group == "encoder.layer.0.attention.self.query"


def test_what_an_encoder_cannot_be_asked_is_told(text):
    with pytest.raises(ModelError, match=r"BertForMaskedLM is a masked language model, .* comes with no mask"):
        sensitivity(made("masked"), text.ids, **SHORT)
    torch.manual_seed(0)
    with pytest.raises(ModelError, match="gives start_logits, end_logits: neither labels nor states"):
        sensitivity(t.BertForQuestionAnswering(bert()).eval(), text, **SHORT)
    broken = made("vector")
    with torch.no_grad():
        broken.encoder.layer[1].output.LayerNorm.bias[3] = torch.nan
    with pytest.raises(ModelError, match=r"says of the window at token .* is not finite"):
        draw(broken, text, **SHORT).windows[0].answer(broken)


def test_a_window_of_an_encoder_is_as_long_as_it_has_places_for(text):
    torch.manual_seed(0)
    longest = t.XLMRobertaModel(xlm_roberta()).eval()  # of its 64 places two are no token's, and two are special
    assert draw(longest, text).seq_len == 61
    assert draw(longest, text).windows[0].inputs.shape == (1, 63)
