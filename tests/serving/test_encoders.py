"""Encoders behind a port answer what they answer in Python."""

import base64
import concurrent.futures
import importlib
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from tests.sentences import SENTENCES
from tests.serving.conftest import serving

sentence_transformers = pytest.importorskip("sentence_transformers")

import w8a8  # noqa: E402
from w8a8.errors import ServingError  # noqa: E402
from w8a8.serving.start import Serving, application  # noqa: E402


def in_python(directory, kind):
    with w8a8.enabled():
        return kind(str(directory), device="cpu")


def close(found, expected):
    """By relative error: fused blocks add in another order, and that moves a code now and then."""
    assert np.linalg.norm(np.asarray(found) - np.asarray(expected)) < 0.02 * np.linalg.norm(expected)


def test_vectors_are_those_of_encode_by_texts_by_ids_and_in_base64(embedding, embedder_directory):
    model = in_python(embedder_directory, sentence_transformers.SentenceTransformer)
    expected = model.encode(SENTENCES)
    with embedding.openai() as client:  # its client asks for base64 where it is not told
        found = client.embeddings.create(model="embedder", input=SENTENCES)
        close([entry.embedding for entry in found.data], expected)
        floats = client.embeddings.create(model="embedder", input=SENTENCES[0], encoding_format="float")
        close(floats.data[0].embedding, expected[0])
        ids = model.tokenizer(SENTENCES)["input_ids"]
        close([e.embedding for e in client.embeddings.create(model="embedder", input=ids).data], expected)
        assert found.usage.prompt_tokens == sum(map(len, ids))
    raw = embedding.post("/v1/embeddings", {"input": SENTENCES[0], "encoding_format": "base64"}).json()
    close(np.frombuffer(base64.b64decode(raw["data"][0]["embedding"]), "<f4"), expected[0])


def test_a_part_of_a_normalised_vector_is_normalised_and_a_prompt_is_put_before(embedding, embedder_directory):
    model = in_python(embedder_directory, sentence_transformers.SentenceTransformer)
    answer = embedding.post("/v1/embeddings", {"input": SENTENCES[0], "dimensions": 5, "input_type": "query"}).json()
    part = model.encode_query(SENTENCES[0])[:5]
    close(answer["data"][0]["embedding"], part / np.linalg.norm(part))


def test_what_is_served_is_told_and_blocks_run_fused(embedding):
    assert [entry["id"] for entry in embedding.get("/v1/models").json()["data"]] == ["embedder"]
    assert embedding.get("/v1/models/embedder").json()["id"] == "embedder"
    assert embedding.get("/health").json() == {"status": "ok"}
    assert any("an embedder" in note and "/v1/embeddings" in note for note in embedding.told)
    assert any(note == "w8a8: 2 blocks run fused" for note in embedding.told), embedding.told


BAD = {
    "an empty object": ({}, "input is null"),
    "no texts": ({"input": []}, "a list: []"),
    "a number": ({"input": 5}, "a number: 5"),
    "texts and numbers": ({"input": ["a", 5]}, "input[1] is a number: 5"),
    "an id beyond the vocabulary": ({"input": [1, 10**6]}, "a token id below"),
    "a boolean for an id": ({"input": [[1, True]]}, "true or false"),
    "too long a text": ({"input": "cat " * 100}, "has 102 tokens, and the model reads 60"),
    "too many texts": ({"input": ["a"] * 2049}, "at most 2048"),
    "another model": ({"input": "a", "model": "gpt"}, "'gpt' is not served here"),
    "an unknown format": ({"input": "a", "encoding_format": "float64"}, "one of float, base64"),
    "no dimensions": ({"input": "a", "dimensions": 0}, "from 1 to 32"),
    "too many dimensions": ({"input": "a", "dimensions": 33}, "from 1 to 32"),
    "half a pair of surrogates": ({"input": "\ud800"}, "surrogates"),
    "a field that nobody reads": ({"input": "a", "colour": 1}, "colour, which is not known here"),
}


@pytest.mark.parametrize(("body", "reason"), BAD.values(), ids=BAD)
def test_a_bad_request_is_told_what_is_wrong(embedding, body, reason):
    answer = embedding.post("/v1/embeddings", body)
    assert answer.status_code in (400, 404)
    assert reason in answer.reason
    assert answer.json()["error"]["type"] == "invalid_request_error"


def test_a_text_is_cut_only_where_that_is_asked_for(embedding):
    answer = embedding.post("/v1/embeddings", {"input": "cat " * 100, "truncate": True})
    assert answer.status_code == 200


def test_other_paths_do_not_exist_here(embedding):
    answer = embedding.post("/v1/completions", {"prompt": "a"})
    assert answer.status_code == 404
    assert "/v1/embeddings" in answer.json()["error"]["message"]
    assert embedding.get("/v1/embeddings").status_code == 405


def test_sixty_four_clients_at_once_are_all_answered(embedding, embedder_directory):
    expected = in_python(embedder_directory, sentence_transformers.SentenceTransformer).encode(SENTENCES)
    with embedding.openai() as client, concurrent.futures.ThreadPoolExecutor(64) as threads:
        asked = [
            threads.submit(client.embeddings.create, model="embedder", input=SENTENCES[place % len(SENTENCES)])
            for place in range(128)
        ]
        for place, answer in enumerate(asked):
            close(answer.result(60).data[0].embedding, expected[place % len(SENTENCES)])


def test_documents_are_ranked_as_in_python(ranker_directory):
    model = in_python(ranker_directory, sentence_transformers.CrossEncoder)
    query, documents = SENTENCES[0], SENTENCES[1:]
    expected = model.predict([(query, document) for document in documents])
    with serving(ranker_directory) as server:
        asked = {"query": query, "documents": documents, "top_n": 3, "return_documents": True}
        found = server.post("/rerank", asked).json()["results"]
        theirs = server.post("/rerank", {"query": query, "texts": documents}).json()
        objects = server.post("/v2/rerank", {"query": query, "documents": [{"text": d} for d in documents]}).json()
        wrong = [
            server.post("/rerank", body)
            for body in ({}, {"query": query}, {"query": "", "documents": ["a"]}, {"query": query, "documents": [5]})
        ]
    order = np.argsort(-expected)
    assert len(found) == 3
    close([entry["relevance_score"] for entry in found], expected[order[:3]])
    assert [entry["document"]["text"] for entry in found] == [documents[entry["index"]] for entry in found]
    close([entry["score"] for entry in sorted(theirs, key=lambda e: e["index"])], expected)
    assert sorted(entry["index"] for entry in objects["results"]) == list(range(len(documents)))
    assert [answer.status_code for answer in wrong] == [400] * 4


def test_labels_are_those_of_the_model_for_texts_and_pairs(classifier_directory):
    known = AutoTokenizer.from_pretrained(classifier_directory)
    with w8a8.enabled():
        model = AutoModelForSequenceClassification.from_pretrained(classifier_directory).eval()
    with torch.no_grad():
        inputs = known(SENTENCES, padding=True, return_tensors="pt")
        expected = model(**inputs).logits.softmax(-1).numpy()
        pair = model(**known("snow", "sun", return_tensors="pt")).logits[0].numpy()
    with serving(classifier_directory) as server:
        found = server.post("/classify", {"inputs": SENTENCES}).json()
        single = server.post("/classify", {"inputs": SENTENCES[0]}).json()
        raw = server.post("/classify", {"inputs": [["snow", "sun"]], "raw_scores": True}).json()
        wrong = server.post("/classify", {"inputs": [["snow"]]})
    scores = [[{e["label"]: e["score"] for e in row}[f"LABEL_{i}"] for i in range(3)] for row in found]
    close(scores, expected)
    assert single[0]["score"] == max(entry["score"] for entry in single)
    close([{e["label"]: e["score"] for e in raw[0]}[f"LABEL_{i}"] for i in range(3)], pair)
    assert wrong.status_code == 400
    assert "a pair of texts" in wrong.json()["error"]["message"]


@pytest.mark.slow
def test_memory_stays_flat_over_two_thousand_requests(embedder_directory, monkeypatch):
    """Texts that never come twice, mistakes among them, over connections that end."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "bench"))
    (warm, after), failed = importlib.import_module("serve_memory").residents(embedder_directory, [1000, 3000])
    assert not failed
    assert after - warm < 8e6


@pytest.mark.parametrize(
    "asked", [{"kv": "int8"}, {"head": "int8"}, {"device": "cuda"}, {"dtype": "bfloat16", "clients": 2}]
)
def test_what_an_encoder_would_ignore_is_refused(embedder_directory, asked):
    name, value = next(iter(asked.items()))
    with pytest.raises(
        ServingError, match=f"{name}='{value}'.* is for a language model; .* is an encoder: leave it out"
    ):
        application(Serving(embedder_directory, **asked))
