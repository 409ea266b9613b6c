import math

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForMaskedLM, BertModel

from tests.conftest import llama, opt, relative_error
from w8a8.calibration.data import Calibration
from w8a8.core.scheme import Scheme
from w8a8.evaluation import perplexity
from w8a8.model.selection import select
from w8a8.pipeline import simulate
from w8a8.records.smoothing import Score
from w8a8.smoothing import contest
from w8a8.smoothing.contest import Contest, winner

SIZES = {"hidden_size": 32, "intermediate_size": 40}


def of(model, data, scheme="w8a8"):
    return Contest(model, Calibration.of(data), Scheme.of(scheme), select(model).chosen)


def test_the_winner_is_near_the_float_outputs_and_has_the_least_loss():
    scores = {"a": Score(1.0, 3.0), "b": Score(1.2, 2.5), "c": Score(1.3, 1.0), "d": Score(1.1, 2.5)}
    assert winner(scores) == "b"
    assert winner({"a": Score(1.0, None), "b": Score(0.9, None), "c": Score(0.9, None)}) == "b"
    assert winner({"a": Score(math.inf, math.inf), "b": Score(5.0, 9.0)}) == "b"


@pytest.mark.parametrize("scheme", ["w8a8", "w8a8-tensor"])
def test_the_loss_is_the_logarithm_of_the_perplexity(scheme, tokens):
    model = llama()
    score = of(model, list(tokens[:, None]), scheme).score()
    simulate(model, scheme)
    expected = perplexity(model, tokens.flatten(), seq_len=tokens.shape[1]).loss_nats.mean
    assert score.loss_nats == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("scheme", ["w8a8", "w8a8-static", "w8a16"])
def test_the_distance_is_that_of_the_logits_and_the_model_is_as_it_was(scheme, tokens):
    model = opt().train()
    modules = dict(model.named_modules())
    score = of(model, [tokens], scheme).score()
    assert dict(model.named_modules()) == modules
    assert model.training
    model.eval()
    with torch.no_grad():
        exact = model(tokens).logits
        simulate(model, scheme, calibration=[tokens], smooth="none")
        expected = relative_error(model(tokens).logits, exact)
    assert score.distance == pytest.approx(expected, rel=1e-5)


def test_padding_is_not_scored(tokens):
    model = llama()
    padded = torch.cat([tokens, torch.zeros(2, 5, dtype=torch.int64)], 1)
    mask = torch.cat([torch.ones_like(tokens), torch.zeros(2, 5, dtype=torch.int64)], 1)
    plain = of(model, [{"input_ids": tokens}]).score()
    masked = of(model, [{"input_ids": padded, "attention_mask": mask}]).score()
    assert masked.loss_nats == pytest.approx(plain.loss_nats, rel=1e-5)


def test_models_that_predict_no_next_token_have_no_loss(tokens):
    bert = BertForMaskedLM(
        BertConfig(vocab_size=96, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=40)
    ).eval()
    plain = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    for model, batch in ((bert, {"input_ids": tokens}), (plain, torch.randn(4, 8)), (plain, (torch.randn(4, 8),))):
        score = of(model, [batch]).score()
        assert score.loss_nats is None
        assert 0 < score.distance < 0.1


def test_few_batches_are_run(tokens, monkeypatch):
    monkeypatch.setattr(contest, "TOKENS", 3 * tokens.numel())
    monkeypatch.setattr(contest, "COMPARED_TOKENS", 1)
    found = of(llama(), [tokens] * 9)
    assert (len(found._scored), len(found._compared)) == (3, 1)


def test_a_loop_of_the_users_is_scored_on_its_first_call(tokens):
    score = of(llama(), lambda model: [model(input_ids=tokens) for _ in range(3)]).score()
    assert score.loss_nats is not None


class _WithPicture(nn.Module):
    """A causal language model that reads something before the tokens, and has logits for it too."""

    def __init__(self, more):
        super().__init__()
        self.inner, self.more = llama(), more
        self.config = self.inner.config

    def can_generate(self):
        return True

    def forward(self, input_ids):
        out = self.inner(torch.cat([torch.zeros_like(input_ids[:, : self.more]), input_ids], 1))
        return {"logits": out.logits}


def test_logits_that_do_not_stand_beside_the_ids_give_no_loss(tokens):
    assert of(_WithPicture(0), [{"input_ids": tokens}])._predicts
    score = of(_WithPicture(3), [{"input_ids": tokens}]).score()
    assert score.loss_nats is None
    assert 0 < score.distance < 0.1


def test_int32_ids_have_the_same_loss(tokens):
    model = llama()
    wide = of(model, [{"input_ids": tokens}]).score()
    assert of(model, [{"input_ids": tokens.to(torch.int32)}]).score() == wide


@pytest.mark.parametrize(("room", "times"), [(1 << 20, 1), (0, 3)])
def test_float_outputs_are_computed_once_where_there_is_room(tokens, monkeypatch, room, times):
    monkeypatch.setattr(contest, "KEPT_BYTES", room)
    model = BertModel(BertConfig(vocab_size=96, num_hidden_layers=1, num_attention_heads=2, **SIZES)).eval()
    found, calls, real = of(model, [tokens]), [], Contest._outputs
    monkeypatch.setattr(Contest, "_outputs", lambda self, batch: calls.append(batch) or real(self, batch))
    scores = [found.score() for _ in range(3)]
    assert len(calls) == 3 + times  # and of the quantised model each time
    assert len(set(scores)) == 1


def test_float_outputs_of_rounded_weights_are_those_of_now(tokens):
    model = BertModel(BertConfig(vocab_size=96, num_hidden_layers=1, num_attention_heads=2, **SIZES)).eval()
    assert of(model, [tokens])._keeps
    assert not of(model.to(torch.bfloat16), [tokens])._keeps


def test_it_is_asked_first_what_can_be_gained_where_few_weights_are_helped(tokens):
    bert = of(
        BertModel(BertConfig(vocab_size=96, num_hidden_layers=2, num_attention_heads=2, **SIZES)).eval(), [tokens]
    )
    assert bert.asks_first([])
    assert bert.asks_first(["encoder.layer.0.attention.output.dense"])
    assert not bert.asks_first(bert.chosen)
    causal = of(llama(), [tokens])
    assert not causal.asks_first(["model.layers.0.mlp.down_proj"])
