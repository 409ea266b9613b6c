"""Servers in this process, on the loopback, of small models that are made here."""

import contextlib
import http.client
import json
import socket
import threading
from dataclasses import dataclass
from typing import Any

import openai
import pytest
import torch
import transformers as t
import uvicorn
from transformers import AutoModelForCausalLM, AutoTokenizer

import w8a8
from tests.sentences import bert, embedder, ranker, tokenizer, write
from w8a8.demo.run import demo_directory
from w8a8.serving.start import Serving, application

TIMEOUT_S = 60
"""Of any request: nothing hangs."""


@dataclass
class Answer:
    status_code: int
    content: bytes

    def json(self):
        return json.loads(self.content)

    @property
    def reason(self):
        error = self.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}, "as OpenAI's API has errors"
        return error["message"]


@dataclass
class Server:
    """A server that runs: its address, the engine of one that writes, and what was told when it began."""

    url: str
    engine: Any
    told: list[str]

    @property
    def port(self):
        return int(self.url.rpartition(":")[2])

    def ask(self, method, path, raw=None, kind="application/json"):
        """What a client gets that may send anything."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=TIMEOUT_S)
        try:
            connection.request(method, path, raw, {} if kind is None else {"Content-Type": kind})
            answer = connection.getresponse()
            return Answer(answer.status, answer.read())
        finally:
            connection.close()

    def post(self, path, body):
        return self.ask("POST", path, json.dumps(body).encode())

    def get(self, path):
        return self.ask("GET", path)

    def openai(self):
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", timeout=TIMEOUT_S, max_retries=0)


class Told(w8a8.Watcher):
    """Keeps what is told."""

    def __init__(self):
        self.notes = []

    def note(self, text):
        self.notes.append(text)


@contextlib.contextmanager
def serving(directory, **options):
    """A server in a thread of this process."""
    told = Told()
    app, close = application(Serving(directory, **options), watcher=told)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1))
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        try:
            while not server.started:
                assert thread.is_alive()
                thread.join(0.01)
            yield Server(f"http://127.0.0.1:{listener.getsockname()[1]}", getattr(close, "__self__", None), told.notes)
        finally:
            server.should_exit = True
            thread.join(TIMEOUT_S)
            close()
            assert not thread.is_alive()


@pytest.fixture(scope="session")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("served")


@pytest.fixture(scope="session")
def writer_directory(place):
    """The demo model in int8, with a chat template that puts messages one after another."""
    known = AutoTokenizer.from_pretrained(demo_directory())
    known.chat_template = (
        "{% for message in messages %}{% if message['role'] == 'nobody' %}{{ raise_exception('who is nobody?') }}"
        "{% endif %}{{ message['content'] }}{% endfor %}"
    )
    model = AutoModelForCausalLM.from_pretrained(demo_directory(), dtype="float32")
    w8a8.quantize(model)
    w8a8.save(model, place / "writer", known)
    return place / "writer"


@pytest.fixture(scope="session")
def writer(writer_directory):
    with serving(writer_directory) as server:
        yield server


@pytest.fixture(scope="session")
def embedder_directory(place):
    model = embedder(place)
    w8a8.quantize(model)
    w8a8.save(model, place / "embedder")
    return place / "embedder"


@pytest.fixture(scope="session")
def embedding(embedder_directory):
    with serving(embedder_directory) as server:
        yield server


@pytest.fixture(scope="session")
def ranker_directory(place):
    model = ranker(place)
    w8a8.quantize(model)
    w8a8.save(model, place / "ranker")
    return place / "ranker"


@pytest.fixture(scope="session")
def classifier_directory(place):
    torch.manual_seed(0)
    path = write(place / "float-classifier", t.AutoModelForSequenceClassification, bert(num_labels=3))
    model = t.AutoModelForSequenceClassification.from_pretrained(path)
    w8a8.quantize(model)
    w8a8.save(model, place / "classifier", tokenizer())
    return place / "classifier"
