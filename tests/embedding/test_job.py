"""Texts of a file become rows of a file: those of the model, in the order of the lines, in bounded memory."""

import random
import tracemalloc

import numpy as np
import pytest
from sentence_transformers import SentenceTransformer

import w8a8
from tests.sentences import SENTENCES, WORDS
from w8a8.embedding import job
from w8a8.embedding.job import Embedding, batches, embed_texts
from w8a8.errors import ModelError, OutputError, TextError
from w8a8.kernels import compiled


class Told(w8a8.Watcher):
    def __init__(self):
        self.notes = []

    def note(self, text):
        self.notes.append(text)


@pytest.fixture
def texts(tmp_path):
    """More texts than a piece has, of many lengths, and one that the model cuts."""
    draw = random.Random(0)
    found = [" ".join(draw.choices(WORDS, k=draw.randrange(30))) for _ in range(40)] + ["snow " * 90, *SENTENCES]
    (tmp_path / "texts.txt").write_text("\n".join(found))
    return found


def asked(encoders, name, tmp_path, **more):
    return Embedding(str(encoders / name), tmp_path / "texts.txt", tmp_path / "vectors.npy", **more)


def encoded(directory, texts, **more):
    with w8a8.enabled():
        return SentenceTransformer(str(directory), device="cpu").encode(texts, **more)


def apart(found, wanted):
    return np.linalg.norm(found - wanted) / np.linalg.norm(wanted)


@pytest.mark.parametrize("name", ["embedder", "embedder-int8"])
@pytest.mark.parametrize("fuse", [True, False])
def test_a_row_is_what_sentence_transformers_makes_of_the_line(encoders, texts, tmp_path, monkeypatch, name, fuse):
    monkeypatch.setattr(job, "PIECE", 16)
    told = Told()
    done = embed_texts(asked(encoders, name, tmp_path, batch_tokens=200, fuse=fuse), told)
    found = np.load(tmp_path / "vectors.npy")
    assert found.shape == (done.texts, done.width) == (len(texts), 32)
    integers = name == "embedder-int8"
    runs_fused = fuse and integers and compiled.unavailable_because() is None
    assert apart(found, encoded(encoders / name, texts)) < (0.02 if runs_fused else 1e-5)
    assert (done.not_fused is None) == runs_fused
    assert done.cut == 1
    assert done.tokens == sum(min(len(text.split()) + 2, 60) for text in texts)
    assert done.seconds > 0
    assert done.to_dict()["texts_per_s"] == done.texts_per_s
    assert len(told.notes) == 2
    assert ("w8a8: 2 blocks run fused" in told.notes) == runs_fused


def test_a_prompt_is_put_before_each_text(encoders, texts, tmp_path):
    embed_texts(asked(encoders, "embedder", tmp_path, prompt="query"))
    wanted = encoded(encoders / "embedder", texts, prompt_name="query")
    assert apart(np.load(tmp_path / "vectors.npy"), wanted) < 1e-5
    for name, message in (("embedder", "none of that name, closest: query"), ("plain", "is no directory of sentence")):
        with pytest.raises(ModelError, match=message):
            embed_texts(asked(encoders, name, tmp_path, prompt="quer", overwrite=True))


@pytest.mark.parametrize("name", ["plain", "plain-int8", "masked"])
def test_how_a_plain_encoder_becomes_an_embedder_is_told(encoders, texts, tmp_path, name):
    told = Told()
    done = embed_texts(asked(encoders, name, tmp_path), told)
    assert np.isfinite(np.load(done.output)).all()
    assert any("the mean of the last states of BertModel, not normalised" in note for note in told.notes)


def test_texts_in_the_thousands_take_the_memory_of_a_piece(encoders, tmp_path, monkeypatch):
    monkeypatch.setattr(job, "PIECE", 256)
    pooled, said = job._opened(job.Directory.of(encoders / "plain"), None)
    monkeypatch.setattr(job, "_opened", lambda directory, prompt: (pooled, said))
    monkeypatch.setattr(type(pooled), "run", lambda self, kind, contents: [np.ones(self.width)] * len(contents))
    peaks = []
    for count in (512, 4096):
        (tmp_path / "texts.txt").write_text("the cat sits on the old stone\n" * count)
        tracemalloc.start()
        done = embed_texts(asked(encoders, "plain", tmp_path, overwrite=True))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert done.texts == count
    assert peaks[1] < 1.2 * peaks[0]


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_what_stops_it_leaves_no_file(encoders, texts, tmp_path, monkeypatch, error):
    run, calls = job.Pooled.run, []

    def stopped(self, kind, contents):
        calls.append(contents)
        if len(calls) > 4:
            raise error
        return run(self, kind, contents)

    monkeypatch.setattr(job.Pooled, "run", stopped)
    with pytest.raises(error):
        embed_texts(asked(encoders, "plain", tmp_path, batch_tokens=100))
    assert [path.name for path in tmp_path.iterdir()] == ["texts.txt"]


def test_a_vector_that_is_not_finite_is_told_with_its_line(encoders, texts, tmp_path, monkeypatch):
    run = job.Pooled.run

    def odd(self, kind, contents):
        found = run(self, kind, contents)
        return [vector * np.nan if text == "snow" else vector for text, vector in zip(contents, found, strict=True)]

    monkeypatch.setattr(job.Pooled, "run", odd)
    with pytest.raises(ModelError, match=r"texts\.txt, line 44: the model's vector of it is not finite"):
        embed_texts(asked(encoders, "plain", tmp_path))


@pytest.mark.parametrize("later", [["a"], ["a", "b", "c", "d"]])
def test_a_file_that_is_written_to_meanwhile_is_told(encoders, tmp_path, monkeypatch, later):
    (tmp_path / "texts.txt").write_text("a\nb")
    opened = job._opened

    def changed(directory, prompt):
        (tmp_path / "texts.txt").write_text("\n".join(later))
        return opened(directory, prompt)

    monkeypatch.setattr(job, "_opened", changed)
    with pytest.raises(TextError, match="had 2 texts when it was counted"):
        embed_texts(asked(encoders, "plain", tmp_path))
    assert not (tmp_path / "vectors.npy").exists()


def test_what_cannot_be_done_is_told_before_a_model_is_opened(encoders, texts, tmp_path, monkeypatch):
    with pytest.raises(ModelError, match="is a CrossEncoder of sentence-transformers, which gives scores"):
        embed_texts(asked(encoders, "ranker", tmp_path))
    monkeypatch.setattr(job, "_opened", None)
    with pytest.raises(OutputError, match="no folder"):
        embed_texts(Embedding(str(encoders / "plain"), tmp_path / "texts.txt", tmp_path / "none" / "vectors.npy"))
    with pytest.raises(TextError, match="is no file"):
        embed_texts(Embedding(str(encoders / "plain"), tmp_path / "none.txt", tmp_path / "vectors.npy"))
    with pytest.raises(ModelError, match="batch_tokens=0 is out of range"):
        embed_texts(asked(encoders, "plain", tmp_path, batch_tokens=0))


def test_batches_hold_so_many_padded_tokens_the_longest_first():
    draw = random.Random(1)
    tokens = [draw.randrange(1, 70) for _ in range(200)]
    found = list(batches(tokens, 64))
    assert sorted(place for batch in found for place in batch) == list(range(200))
    longest = [max(tokens[place] for place in batch) for batch in found]
    assert longest == sorted(longest, reverse=True)
    assert all(len(batch) * most <= 64 or len(batch) == 1 for batch, most in zip(found, longest, strict=True))
