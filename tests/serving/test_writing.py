"""A language model behind a port: many clients, their mistakes, their leaving, and a step that fails."""

import concurrent.futures
import http.client
import json
import time

import pytest
from transformers import AutoTokenizer

import w8a8
from tests.serving.conftest import TIMEOUT_S, serving
from w8a8.demo.run import demo_directory
from w8a8.errors import ModelError, ServingError
from w8a8.serving import engine as engines
from w8a8.serving.start import Serving, application

PROMPTS = ["Return the", "Open a file", "Raise an", "The number of items in the list", "A"]
NEW = 12


@pytest.fixture(scope="module")
def expected(writer_directory):
    """What the model writes by itself, greedily."""
    known, model = AutoTokenizer.from_pretrained(writer_directory), w8a8.load(writer_directory)
    found = {}
    for prompt in PROMPTS:
        ids = known(prompt, return_tensors="pt")
        wrote = model.generate(**ids, max_new_tokens=NEW, do_sample=False)[0, ids["input_ids"].shape[1] :]
        found[prompt] = known.decode(wrote, skip_special_tokens=True)
    return found


def test_the_model_writes_for_several_at_once(writer):
    assert any("writes for up to 64 clients at once, 256 tokens each" in note for note in writer.told), writer.told


def test_sixty_four_clients_get_what_the_model_writes_for_each_alone(writer, expected):
    with writer.openai() as client, concurrent.futures.ThreadPoolExecutor(64) as threads:
        asked = [
            (prompt, threads.submit(client.completions.create, model="writer", prompt=prompt, max_tokens=NEW))
            for prompt in PROMPTS * 13
        ]
        found = [(prompt, answer.result(TIMEOUT_S).choices[0].text) for prompt, answer in asked]
    assert len(found) >= 64
    assert found == [(prompt, expected[prompt]) for prompt, _ in asked]


def test_a_completion_and_a_chat_are_streamed(writer, expected):
    with writer.openai() as client:
        told = client.completions.create(model="writer", prompt=PROMPTS[0], max_tokens=NEW, stream=True)
        assert "".join(chunk.choices[0].text for chunk in told) == expected[PROMPTS[0]]
        messages = [{"role": "user", "content": PROMPTS[0]}]
        told = client.chat.completions.create(model="writer", messages=messages, max_tokens=NEW, stream=True)
        parts = [chunk.choices[0].delta.content or "" for chunk in told if chunk.choices]
        assert "".join(parts) == expected[PROMPTS[0]]
        answer = client.responses.create(model="writer", input=PROMPTS[0], max_output_tokens=NEW)
        assert answer.output_text == expected[PROMPTS[0]]


def test_a_text_ends_before_a_stop_streamed_or_not(writer, expected):
    whole = expected[PROMPTS[0]]
    stop = whole[len(whole) // 2 : len(whole) // 2 + 3]
    before = whole[: whole.index(stop)]
    asked = {"model": "writer", "prompt": PROMPTS[0], "max_tokens": NEW, "stop": [stop]}
    with writer.openai() as client:
        answer = client.completions.create(**asked).choices[0]
        assert (answer.text, answer.finish_reason) == (before, "stop")
        assert "".join(chunk.choices[0].text for chunk in client.completions.create(**asked, stream=True)) == before


@pytest.mark.parametrize("stream", [False, True])
def test_a_text_that_is_ended_by_its_last_token_was_not_cut_off(writer, expected, stream):
    known = AutoTokenizer.from_pretrained(demo_directory())
    stop = known.decode(known(PROMPTS[0] + expected[PROMPTS[0]])["input_ids"][-1:])
    asked = {"model": "writer", "prompt": PROMPTS[0], "max_tokens": NEW}
    with writer.openai() as client:
        for stops, reason in (([stop], "stop"), ([], "length")):
            answer = client.completions.create(**asked, stop=stops, stream=stream)
            found = (
                [chunk.choices[0].finish_reason for chunk in answer][-1] if stream else answer.choices[0].finish_reason
            )
            assert found == reason


def test_a_server_that_is_stopped_ends_what_it_cannot_finish_with_a_reason(writer_directory, monkeypatch):
    own = engines.forward

    def slow(*given):
        time.sleep(0.1)
        return own(*given)

    with concurrent.futures.ThreadPoolExecutor(6) as threads:
        with serving(writer_directory, clients=2) as server:
            monkeypatch.setattr(engines, "forward", slow)
            asked = [{"prompt": "A", "max_tokens": 250, "stream": i % 2 == 0} for i in range(6)]
            answers = [threads.submit(server.post, COMPLETION, body) for body in asked]
            while sum(server.engine.busy) < len(asked):
                time.sleep(0.01)
        for body, answer in zip(asked, answers, strict=True):
            found = answer.result(TIMEOUT_S)
            if body["stream"]:
                event = found.content.decode().strip().rpartition("data: ")[2]
                assert json.loads(event)["error"]["code"] == "stopped"
            else:
                assert (found.status_code, found.json()["error"]["code"]) == (503, "stopped")


def test_each_request_is_drawn_by_its_own_seed_and_temperature(writer, expected):
    hot = {"prompt": PROMPTS[0], "max_tokens": NEW, "temperature": 1.5}

    def text(**more):
        return writer.post("/v1/completions", {**hot, **more}).json()["choices"][0]["text"]

    with concurrent.futures.ThreadPoolExecutor(8) as threads:
        same = list(threads.map(lambda seed: text(seed=seed), [7] * 4 + [8] * 4))
        cold = threads.submit(text, temperature=0).result()
    assert len(set(same[:4])) == len(set(same[4:])) == 1
    assert same[0] != same[4]
    assert cold == expected[PROMPTS[0]] == text(top_k=1) == text(top_p=0)


COMPLETION, CHAT = "/v1/completions", "/v1/chat/completions"
SAID = [{"role": "user", "content": "a"}]
BAD = {
    "an empty object": (COMPLETION, {}, 400, "there is no prompt"),
    "no prompt": (COMPLETION, {"max_tokens": 3}, 400, "there is no prompt"),
    "an empty prompt list": (COMPLETION, {"prompt": []}, 400, "expected a text"),
    "a prompt beyond the context": (COMPLETION, {"prompt": "word " * 600}, 400, "at the most; shorten it"),
    "more than there is room for": (COMPLETION, {"prompt": "a", "max_tokens": 300}, 400, "max_tokens is 300"),
    "a negative count": (COMPLETION, {"prompt": "a", "max_tokens": -5}, 400, "max_tokens is a number: -5"),
    "a hot temperature": (COMPLETION, {"prompt": "a", "temperature": "hot"}, 400, 'a text: "hot"'),
    "a wrong stream": (COMPLETION, {"prompt": "a", "stream": "yes"}, 400, "true or false"),
    "another model": (COMPLETION, {"prompt": "a", "model": "gpt-4"}, 404, "'gpt-4' is not served here"),
    "several answers": (COMPLETION, {"prompt": "a", "n": 2}, 400, "n is a number: 2, which is not done here"),
    "an empty stop": (COMPLETION, {"prompt": "a", "stop": ""}, 400, "an empty text"),
    "a bias for no token": (COMPLETION, {"prompt": "a", "logit_bias": {"x": 1}}, 400, "token ids below"),
    "a bias for a number of 5,000 digits": (
        COMPLETION,
        {"prompt": "a", "logit_bias": {"9" * 5000: 1}},
        400,
        "token ids",
    ),
    "a bias that is a list": (COMPLETION, {"prompt": "a", "logit_bias": [1]}, 400, "an object of token ids"),
    "seventeen stops": (COMPLETION, {"prompt": "a", "stop": ["x"] * 17}, 400, "at most 16 texts"),
    "a seed beyond 64 bits": (COMPLETION, {"prompt": "a", "seed": 2**70}, 400, "seed is a number"),
    "a call that is none": (
        *(CHAT, {"messages": [{"role": "assistant", "tool_calls": [{"function": {"arguments": "1"}}]}]}),
        *(400, "the JSON of an object"),
    ),
    "an input of numbers": ("/v1/responses", {"input": [1]}, 400, "input[0] is a number: 1"),
    "a whole generation_config": (COMPLETION, {"prompt": "a", "generation_config": "{}"}, 400, "not known here"),
    "half a pair of surrogates": (COMPLETION, {"prompt": "\ud800"}, 400, "surrogates"),
    "no messages": (CHAT, {}, 400, "messages is null"),
    "a message that is a text": (CHAT, {"messages": ["a"]}, 400, "messages[0] is a text"),
    "a picture": (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "reads text alone"),
    "what the template refuses": (CHAT, {"messages": [{"role": "nobody", "content": "a"}]}, 400, "who is nobody?"),
    "tools that are none": (CHAT, {"messages": SAID, "tools": "all"}, 400, "a list of objects"),
    "no input": ("/v1/responses", {}, 400, "input is null"),
}


@pytest.mark.parametrize(("path", "body", "status", "reason"), BAD.values(), ids=BAD)
def test_a_bad_request_is_told_what_is_wrong(writer, path, body, status, reason):
    answer = writer.post(path, body)
    assert (answer.status_code, answer.json()["error"]["type"]) == (status, "invalid_request_error")
    assert reason in answer.reason


RAW = {
    "nothing": (b"", "application/json", 400, "empty"),
    "broken JSON": (b'{"prompt": ', "application/json", 400, "not JSON"),
    "a list": (b"[1]", "application/json", 400, "send an object"),
    "deep JSON": (b"[" * 100_000, "application/json", 400, "not JSON"),
    "no UTF-8": (b'{"prompt": "\xff"}', "application/json", 400, "not JSON"),
    "not a number": (b'{"prompt": "a", "temperature": NaN}', "application/json", 400, "temperature is"),
    "a form": (b"prompt=a", "application/x-www-form-urlencoded", 415, "Content-Type: application/json"),
}


@pytest.mark.parametrize(("raw", "kind", "status", "reason"), RAW.values(), ids=RAW)
def test_a_body_that_is_no_object_is_refused(writer, raw, kind, status, reason):
    answer = writer.ask("POST", COMPLETION, raw, kind)
    assert answer.status_code == status
    assert reason in answer.reason


def test_what_unloads_the_model_is_not_there_and_what_is_served_is_told(writer):
    assert writer.post("/reset", {}).status_code == 404
    assert [entry["id"] for entry in writer.get("/v1/models").json()["data"]] == ["writer"]
    assert writer.get("/health").status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_frees_its_place(writer, stream):
    engine = writer.engine
    connection = http.client.HTTPConnection("127.0.0.1", writer.port, timeout=TIMEOUT_S)
    body = {"prompt": "A", "max_tokens": 250, "stream": stream, "logit_bias": {}, "temperature": 1.0, "seed": 1}
    connection.request("POST", COMPLETION, json.dumps(body), {"Content-Type": "application/json"})
    until = time.monotonic() + TIMEOUT_S
    while engine.busy == (0, 0):
        assert time.monotonic() < until
    ticket = engine._active[0].ticket if engine._active else None
    connection.close()
    while engine.busy != (0, 0):
        assert time.monotonic() < until
        time.sleep(0.001)
    assert ticket is None or ticket.left, "it was ended, and did not end by itself"


def test_a_step_that_fails_is_told_and_the_next_request_is_answered(writer, expected, monkeypatch):
    engine, own = writer.engine, engines.forward
    before = engine.restarts

    def fails(*_):
        monkeypatch.setattr(engines, "forward", own)
        raise RuntimeError("a fault of the test")

    monkeypatch.setattr(engines, "forward", fails)
    answer = writer.post(COMPLETION, {"prompt": PROMPTS[0], "max_tokens": NEW})
    assert answer.status_code == 503
    assert "a fault of the test" in answer.reason
    again = writer.post(COMPLETION, {"prompt": PROMPTS[0], "max_tokens": NEW}).json()
    assert again["choices"][0]["text"] == expected[PROMPTS[0]]
    assert engine.restarts == before + 1


@pytest.mark.parametrize("batching", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_keys_and_values_in_int8_write_what_generate_does_with_them(writer_directory, batching):
    known, model = AutoTokenizer.from_pretrained(writer_directory), w8a8.load(writer_directory)
    w8a8.set_cache(model, "int8")
    with serving(writer_directory, kv="int8", batching=batching) as server:
        assert (server.engine is not None) is batching
        for prompt in PROMPTS:
            ids = known(prompt, return_tensors="pt")
            wrote = model.generate(**ids, max_new_tokens=NEW, do_sample=False)[0, ids["input_ids"].shape[1] :]
            found = server.post(COMPLETION, {"prompt": prompt, "max_tokens": NEW}).json()
            assert found["choices"][0]["text"] == known.decode(wrote, skip_special_tokens=True)


def test_an_unknown_way_to_keep_keys_and_values_is_refused_before_anything_is_read(writer_directory):
    with pytest.raises(ModelError, match="unknown kind of cache 'int4'"):
        application(Serving(writer_directory, kv="int4"))


def test_a_model_that_does_not_suit_writes_for_one_after_another(writer_directory, expected):
    with serving(writer_directory, batching=False) as server:
        found = server.post(COMPLETION, {"prompt": PROMPTS[0], "max_tokens": NEW}).json()
        assert found["choices"][0]["text"] == expected[PROMPTS[0]]
        assert server.post(COMPLETION, {}).status_code == 400
        assert any("one client after another: it was not asked for" in note for note in server.told)


def test_what_a_language_model_would_ignore_is_refused(writer_directory):
    with pytest.raises(ServingError, match=r"fuse=False was asked for, and is for an encoder"):
        application(Serving(writer_directory, fuse=False))
