from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import BertModel

import w8a8
from tests.conftest import llama, opt
from tests.sentences import bert
from w8a8.errors import ModelError
from w8a8.evaluation import speed
from w8a8.evaluation.speed import measure_speed


def test_each_model_in_turn_reads_the_prompt_and_writes_token_by_token():
    calls = []

    def noted(name, model):
        def see(module, args, kwargs):
            calls.append((name, tuple(kwargs["input_ids"].shape)))

        model.register_forward_pre_hook(see, with_kwargs=True)
        return model

    models = {"float": noted("float", llama()), "int8": noted("int8", w8a8.quantize(llama()).model)}
    found = measure_speed(models, prompt=8, new=2, batch=3, seconds=0.0)
    turn = lambda name: [(name, (3, 8)), (name, (3, 1)), (name, (3, 1))]  # noqa: E731
    assert calls == [*turn("float"), *turn("int8")] * 4  # one round is thrown away, three are timed
    assert {name: each.rounds for name, each in found.items()} == {"float": 3, "int8": 3}
    assert all(rate.low <= rate.median <= rate.high for each in found.values() for rate in (each.reading, each.writing))


def test_rates_are_tokens_of_all_sequences_by_seconds(monkeypatch):
    steps = [2.0, 0.0, 4.0, 0.0]  # reading, between, writing, between
    clock = SimpleNamespace(now=0.0, calls=0)

    def tick():
        clock.now += steps[clock.calls % 4 - 1] if clock.calls else 0.0
        clock.calls += 1
        return clock.now

    monkeypatch.setattr(speed, "time", SimpleNamespace(perf_counter=tick))
    (found,) = measure_speed({"m": opt()}, prompt=8, new=4, batch=2, seconds=0.0).values()
    assert found.reading.median == 2 * 8 / 2.0
    assert found.writing.median == 2 * 4 / 4.0


def test_writing_goes_on_from_what_was_read():
    """The tokens that are fed are the model's own greedy continuation of the prompt."""
    model, fed = opt(), []
    model.register_forward_pre_hook(lambda module, args, kwargs: fed.append(kwargs["input_ids"]), with_kwargs=True)
    measure_speed({"m": model}, prompt=6, new=3, seconds=0.0)
    ids = torch.cat(fed[:4], 1)
    with torch.inference_mode():
        best = model(input_ids=ids).logits[0].argmax(-1)
    assert ids[0, 6:].tolist() == best[5:8].tolist()


def test_a_prompt_that_leaves_no_room_is_refused():
    limit = opt().config.max_position_embeddings
    with pytest.raises(ModelError, match=f"m has a context of {limit}.*--prompt"):
        measure_speed({"m": opt()}, prompt=limit, new=1)
    with pytest.raises(ModelError, match="at least one of each"):
        measure_speed({"m": opt()}, prompt=4, new=0)


def test_the_default_prompt_is_what_the_shortest_context_has_room_for():
    seen = []
    model = opt()
    model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    measure_speed({"m": model, "longer": llama()}, new=5, seconds=0.0)
    assert max(seen) == model.config.max_position_embeddings - 5


def test_a_context_without_room_for_what_is_written_is_told_with_a_prompt_that_could_be():
    with pytest.raises(ModelError, match="a prompt of 1 tokens and 32 new ones were asked for, and float has a con"):
        measure_speed({"float": llama(max_position_embeddings=16)}, new=32)


def test_a_model_without_a_cache_is_told():
    class Plain(nn.Module):
        device = torch.device("cpu")
        config = SimpleNamespace(max_position_embeddings=32)

        def get_input_embeddings(self):
            return nn.Embedding(7, 4)

        def forward(self, input_ids, use_cache):
            return SimpleNamespace(logits=torch.zeros(*input_ids.shape, 7))

    with pytest.raises(ModelError, match=r"plain \(Plain\) gives no logits, or keeps no cache"):
        measure_speed({"plain": Plain()}, prompt=4, new=1)


def test_writing_after_a_context_goes_on_from_it_in_every_round():
    model, calls = opt(), []

    def see(module, args, kwargs):
        kept = kwargs.get("past_key_values")
        calls.append((kwargs["input_ids"].shape[1], 0 if kept is None else kept.get_seq_length()))

    w8a8.set_cache(model, "block")  # which runs a token
    model.register_forward_pre_hook(see, with_kwargs=True)
    measure_speed({"m": model}, prompt=4, context=20, new=2, seconds=0.0)
    first = [(4, 0), (1, 4), (1, 5)]  # before there is a context, a round that is thrown away
    assert calls == [*first, (20, 0), *[(4, 0), (1, 20), (1, 21)] * 3]


def test_a_context_that_leaves_no_room_is_refused():
    with pytest.raises(ModelError, match=r"--context, --new"):
        measure_speed({"m": opt()}, prompt=4, context=opt().config.max_position_embeddings, new=1)


def test_encoders_are_timed_reading_without_padding():
    calls = []
    models = {"one": BertModel(bert()).eval(), "other": BertModel(bert()).eval()}
    for name, model in models.items():
        see = lambda module, args, kwargs, name=name: calls.append((name, kwargs["attention_mask"].shape))  # noqa: E731
        model.register_forward_pre_hook(see, with_kwargs=True)
    found = measure_speed(models, prompt=8, batch=3, seconds=0.0)
    assert calls == [("one", (3, 8)), ("other", (3, 8))] * 4
    assert all(each.writing is None and each.reading.median > 0 for each in found.values())


def test_an_encoder_is_timed_with_no_model_that_writes_and_after_no_context():
    encoder = BertModel(bert()).eval()
    with pytest.raises(ModelError, match="encoder reads and writes nothing, and was to be timed with m: time encoders"):
        measure_speed({"m": opt(), "encoder": encoder})
    with pytest.raises(ModelError, match="with a context to write after"):
        measure_speed({"encoder": encoder}, context=4)
