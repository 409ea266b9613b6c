"""What follows the model of an embedder: its vectors are those of `encode`, whatever stands in modules.json."""

import json

import pytest
import torch
import transformers as t
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Dense, Normalize, Transformer
from sentence_transformers.sentence_transformer.modules import LayerNorm, Pooling
from torch import nn

import w8a8
from tests.sentences import CONFIGS, SENTENCES, ranker, tokenizer, write
from w8a8.analysis.sample import draw
from w8a8.checkpoint.embedder import Embedder, open_behind
from w8a8.checkpoint.opening import open_model
from w8a8.errors import CheckpointError, ModelError
from w8a8.evaluation import encode
from w8a8.jobs.comparison import ModelPair, compare_models
from w8a8.jobs.measuring import rank_layers

BEHIND = {
    "pooling alone": lambda: [Pooling(32, "mean")],
    "two poolings": lambda: [Pooling(32, ("cls", "max")), Normalize()],
    "dense and norms": lambda: [
        Pooling(32, "cls"),
        Dense(32, 24),
        LayerNorm(24),
        Dense(24, 16, bias=False, activation_function=nn.Identity()),
        Normalize(),
    ],
    "dense before the pooling": lambda: [
        Dense(32, 8, module_input_name="token_embeddings"),
        Pooling(8, "weightedmean"),
    ],
}


def embedder(place, behind, config=None):
    """A directory whose modules make vectors so."""
    write(place / "model", t.AutoModel, config or CONFIGS["bert"]())
    torch.manual_seed(1)
    modules = [Transformer(str(place / "model")), *BEHIND[behind]()]
    SentenceTransformer(modules=modules, device="cpu").save_pretrained(str(place / "embedder"))
    return place / "embedder"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A directory with dense layers and norms behind the pooling."""
    return embedder(tmp_path_factory.mktemp("made"), "dense and norms")


@pytest.mark.parametrize("behind", BEHIND)
def test_a_texts_vector_is_what_the_embedder_encodes(tmp_path, behind):
    directory = embedder(tmp_path, behind)
    opened = open_model(directory)
    window = draw(opened.model, encode(opened.tokenizer, SENTENCES[1], opened.behind), windows=1).windows[0]
    wanted = SentenceTransformer(str(directory), device="cpu").encode([SENTENCES[1]], convert_to_tensor=True)
    torch.testing.assert_close(window.answer(opened.model), wanted, rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        found = Embedder(opened.model, opened.behind)(input_ids=window.inputs)["vectors"]
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_layers_and_outputs_of_an_embedder_are_measured_by_its_vectors(made, tmp_path):
    (tmp_path / "text.txt").write_text(" ".join(SENTENCES * 3))
    text = str(tmp_path / "text.txt")
    found = rank_layers(str(made), text, "w8a8", windows=1, seq_len=12)
    assert found.tokens == 1
    ids = encode(tokenizer(), " ".join(SENTENCES * 3)).ids
    whole = SentenceTransformer(str(made), device="cpu")
    window = draw(whole[0].model, encode(tokenizer(), " ".join(SENTENCES * 3)), windows=1, seq_len=12).windows[0]
    asked = {"input_ids": window.inputs, "attention_mask": torch.ones_like(window.inputs)}
    with torch.no_grad():
        exact = whole(dict(asked))["sentence_embedding"].double()
        w8a8.quantize(whole[0].model, "w8a8")
        quantized = whole(dict(asked))["sentence_embedding"].double()
    assert found.kl_nats == pytest.approx(float(1 - torch.cosine_similarity(exact, quantized)), rel=1e-3)
    w8a8.save(whole, tmp_path / "int8")
    both = compare_models(ModelPair(str(tmp_path / "int8"), str(made), text, seq_len=12, fuse=False)).both
    assert both.output == "vectors"
    assert both.rows == both.batches == -(-len(ids) // 12)


def test_what_is_no_embedder_has_nothing_behind(tmp_path):
    write(tmp_path / "model", t.AutoModel, CONFIGS["bert"]())
    ranker(tmp_path).save_pretrained(str(tmp_path / "ranker"))
    assert open_behind(tmp_path / "model") is open_behind(tmp_path / "ranker") is None


@pytest.mark.parametrize(
    ("kind", "error", "message"),
    [
        ("mine.Pooling", ModelError, "mine.Pooling behind the model, which is none of sentence-transformers"),
        ("sentence_transformers.models.Poolin", CheckpointError, "cannot open its Poolin"),
        ("sentence_transformers.models.WeightedLayerPooling", CheckpointError, "cannot open its WeightedLayerPooling"),
    ],
)
def test_a_module_that_cannot_be_opened_is_an_error_with_its_name(tmp_path, kind, error, message):
    (tmp_path / "modules.json").write_text(json.dumps([{"path": "", "type": ""}, {"path": "1_Pooling", "type": kind}]))
    with pytest.raises(error, match=message):
        open_behind(tmp_path)


def test_what_does_not_fit_the_model_is_told(made):
    behind = open_behind(made)
    with pytest.raises(ModelError, match=r"Dense was to make a vector of last states of width 20, and cannot"):
        behind(torch.zeros(1, 3, 20))
    behind.parts = behind.parts[:0]
    with pytest.raises(ModelError, match="its modules make token_embeddings, attention_mask"):
        behind(torch.zeros(1, 3, 32))
