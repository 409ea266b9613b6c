"""The engine by itself: who is written for when, over what is kept as it came or in int8."""

import contextlib
import threading

import pytest
import torch
import transformers as t

from tests.conftest import needs
from tests.decoding.models import CAUSAL, causal
from tests.serving.conftest import TIMEOUT_S
from w8a8.decoding.models import set_cache
from w8a8.errors import ModelError
from w8a8.serving import packed, places
from w8a8.serving.engine import Engine, Ticket
from w8a8.serving.sampling import Sampling
from w8a8.serving.suits import bytes_per_token, set_packed

# a window; soft caps, and windows in turn; sinks; learnt positions; attention that is handed no options
FAST = ("mistral", "gemma2", "gpt_oss", "opt", "stablelm")
FAMILIES = [pytest.param(name, marks=[] if name in FAST else pytest.mark.slow) for name in CAUSAL]
WORDS = 90
WRITTEN = pytest.mark.not_under("meta", reason="transformers' `generate` makes its own tensors on the default device")


def prompt(count, seed=0):
    return [(7 * i * i + 3 * i + 5 * seed + 1) % WORDS + 3 for i in range(count)]


class Asked(Ticket):
    """A ticket that keeps what it is told."""

    def __init__(self, ids, most, *, every=True, order=None):
        self.ended, self.wrote, self.ending, self.began = threading.Event(), [], None, threading.Event()

        def tell(tokens, ending):
            self.wrote += tokens
            if self.wrote and not self.began.is_set():
                self.began.set()
                if order is not None:
                    order.append(self)
            if ending:
                self.ending = ending
                self.ended.set()

        super().__init__(ids, most, (), Sampling(), tell, every)


def answered(engine, tickets):
    for ticket in tickets:
        engine.ask(ticket)
    for ticket in tickets:
        assert ticket.ended.wait(TIMEOUT_S)
        assert ticket.error is None, ticket.error
    return [ticket.wrote for ticket in tickets]


@contextlib.contextmanager
def running(model, **how):
    engine = Engine(model, **how).start()
    try:
        yield engine
    finally:
        engine.close()


def alone(model, ids, most):
    """What the model writes by itself."""
    given = torch.tensor([ids])
    found = model.generate(given, attention_mask=torch.ones_like(given), max_new_tokens=most, do_sample=False)
    return found[0, len(ids) :].tolist()


@WRITTEN
@pytest.mark.parametrize("kind", ["float", "int8"])
@pytest.mark.parametrize("name", FAMILIES)
def test_each_of_several_clients_gets_what_the_model_writes_alone(name, kind):
    model = causal(name)
    asked = [(prompt(count, seed), 20) for seed, count in enumerate((3, 17, 9, 9, 1))]
    if kind == "int8":
        set_cache(model, "int8")
    wanted = [alone(model, ids, most) for ids, most in asked]
    set_cache(model, "dynamic")
    assert set_packed(model) is None
    with running(model, places=3, tokens=40, kind=kind, step_tokens=7) as engine:
        assert answered(engine, [Asked(ids, most) for ids, most in asked]) == wanted


@WRITTEN
def test_a_model_that_another_calls_within_its_step_has_no_part_in_it():
    """It wrote its keys over those of the model that called it."""
    model, other, seen = causal("llama"), causal("stablelm"), []
    wanted = alone(model, prompt(9), 6)
    assert set_packed(model) is None
    assert set_packed(other) is None

    def calls_another(*_):
        with pytest.raises(ModelError, match="this attention is the server's"):
            other(torch.tensor([[1] * 9]))
        seen.append(1)

    model.model.layers[1].register_forward_pre_hook(calls_another)
    with running(model, places=1, tokens=40) as engine:
        assert answered(engine, [Asked(prompt(9), 6)]) == [wanted]
    assert seen


@WRITTEN
@needs("native")
@pytest.mark.kernels
@pytest.mark.parametrize("kind", ["float", "int8"])
def test_tokens_of_many_are_attended_by_the_native_kernel_and_others_by_none(monkeypatch, kind):
    model, seen = causal("llama"), []
    assert set_packed(model) is None

    def told(q, *rest):
        found = kernel(q, *rest)
        seen.append((q.shape[0], found is not None))
        return found

    kernel = packed.attend_each
    monkeypatch.setattr(packed, "attend_each", told)
    with running(model, places=2, tokens=32, kind=kind) as engine:
        wanted = answered(engine, [Asked(prompt(5), 4), Asked(prompt(5), 4)])
    assert seen == [(2, True)] * 3 * 2, "two layers, and three tokens after the first"
    monkeypatch.setattr(packed, "attend_each", lambda *_: None)
    with running(model, places=2, tokens=32, kind=kind) as engine:
        assert answered(engine, [Asked(prompt(5), 4), Asked(prompt(5), 4)]) == wanted


@pytest.mark.parametrize("kind", ["float", "int8"])
def test_what_was_not_written_is_not_read(monkeypatch, kind):
    model = causal("mistral")
    assert set_packed(model) is None
    with running(model, places=2, tokens=40, kind=kind) as engine:
        wanted = answered(engine, [Asked(prompt(11), 9)])

    class Spoiled(places.KINDS[kind]):
        def __init__(self, *given):
            super().__init__(*given)
            held = self.held[:4] if kind == "int8" else self.held
            for tensor in held:
                tensor.fill_(torch.nan if tensor.is_floating_point() else -77)

    monkeypatch.setitem(places.KINDS, kind, Spoiled)
    with running(model, places=2, tokens=40, kind=kind) as engine:
        assert answered(engine, [Asked(prompt(11), 9)]) == wanted


def test_in_int8_a_token_takes_a_quarter_and_its_scales():
    model = causal("llama")
    assert set_packed(model) is None
    heads = 2 * 2 * 2  # of keys and values, in two layers
    assert bytes_per_token(model, "float") == heads * 8 * 4
    assert bytes_per_token(model, "int8") == heads // 2 * (8 + 4 + 16 + 4), "rows of values are of sixteen"


@WRITTEN
def test_a_text_ends_where_learnt_positions_do():
    model = t.OPTForCausalLM(
        t.OPTConfig(
            vocab_size=96,
            hidden_size=32,
            num_hidden_layers=1,
            num_attention_heads=4,
            ffn_dim=40,
            word_embed_proj_dim=32,
            max_position_embeddings=20,
            eos_token_id=None,
        )
    ).eval()
    wanted = alone(model, prompt(15), 5)
    assert set_packed(model) is None
    with running(model, places=1, tokens=20) as engine:
        ticket = Asked(prompt(15), 50)
        assert answered(engine, [ticket]) == [wanted]
        assert ticket.ending == "length"


def test_a_short_prompt_does_not_wait_for_a_long_one_nor_a_long_one_for_many_short_ones():
    model = causal("llama")
    assert set_packed(model) is None
    order = []
    with running(model, places=4, tokens=900, step_tokens=16) as engine:
        long = Asked(prompt(800), 1, order=order)
        short = [Asked(prompt(4, seed), 1, order=order) for seed in range(200)]
        answered(engine, [long, *short])
    assert order.index(long) > 0, "the first short one was answered before it"
    assert order[-1] is not long, "half of every step was for it"
    assert [ticket for ticket in order if ticket is not long] == short, "in the order in which they came"


def test_who_leaves_while_its_prompt_is_read_or_waits_gives_its_place_to_the_next():
    model = causal("llama")
    assert set_packed(model) is None
    with running(model, places=1, tokens=900, step_tokens=4) as engine:
        reading, waiting, last = (Asked(prompt(800, seed), 1) for seed in range(3))
        for ticket in (reading, waiting):
            engine.ask(ticket)
            ticket.leave()
        answered(engine, [last])
        assert not reading.wrote
        assert not waiting.wrote
