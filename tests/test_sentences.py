"""sentence-transformers, unmodified: embedders and rerankers in one line, saved whole, and back, bit for bit."""

import json
import shutil

import numpy as np
import pytest
import torch
from sentence_transformers import CrossEncoder, SentenceTransformer
from sentence_transformers.sentence_transformer.modules import CNN, Pooling
from torch import nn
from transformers import (
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    pipeline,
)

import w8a8
from tests.checkpoint.test_beside import tree
from tests.cli.test_commands import call  # noqa: F401 - a fixture
from tests.conftest import crossed, every_third, needs, relative_error
from tests.sentences import CONFIGS, SENTENCES, bert, embedder, ranker, tokenizer, write
from w8a8 import W8A8Config
from w8a8.errors import ModelError
from w8a8.layers.linear import quant_linears

MODELS = {
    "bert-cls": {"name": "bert", "pooling": "cls"},
    "bert-mean-dense": {"name": "bert", "pooling": "mean", "dense": True},
    "mpnet": {"name": "mpnet", "pooling": "mean"},
    "xlm_roberta": {"name": "xlm_roberta", "pooling": "mean"},
    "modernbert-dense": {"name": "modernbert", "pooling": "cls", "dense": True},
    "qwen3": {"name": "qwen3", "pooling": "lasttoken"},
}
PAIRS = [(SENTENCES[0], text) for text in SENTENCES[1:]]
WAYS = {
    "streamed": [],
    "in memory": ["--no-stream"],
    "calibrated": ["--calib", "TEXT", "--calib-samples", "2", "--calib-length", "16", "--scheme", "w8a8-static"],
    "block by block": [
        "--stream",
        "--calib",
        "TEXT",
        "--calib-samples",
        "2",
        "--calib-length",
        "16",
        "--smooth",
        "0.5",
    ],
}


@pytest.fixture(scope="module")
def floats(tmp_path_factory):
    """The directories of the float embedders, and one of a reranker."""
    place = tmp_path_factory.mktemp("floats")
    for name, options in MODELS.items():
        embedder(place, **options).save_pretrained(str(place / name))
    ranker(place).save_pretrained(str(place / "ranker"))
    return place


def opened(directory, **options):
    return SentenceTransformer(str(directory), device="cpu", **options)


def embedded(model):
    """Of a padded batch, with the prompt of queries."""
    return model.encode(SENTENCES, prompt_name="query")


def cosines(a, b):
    return (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)


@pytest.fixture(params=every_third(MODELS))
def directory(request, floats):
    return floats / request.param


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bert-cls", "qwen3"])
def test_tables_in_int8_are_saved_whole_and_read_back_in_every_way(floats, tmp_path, name):
    model = opened(floats / name)
    exact = embedded(model)
    w8a8.quantize(model, embeddings="int8")
    wanted = embedded(model)
    w8a8.save(model, tmp_path / "out")
    w8a8.quantize_directory(floats / name, tmp_path / "streamed", embeddings="int8")
    config = {"quantization_config": W8A8Config(embeddings="int8")}
    found = [opened(floats / name, model_kwargs=config)]
    with w8a8.enabled():
        found += [opened(tmp_path / place) for place in ("out", "streamed")]
    assert all(np.array_equal(embedded(each), wanted) for each in found)
    assert all(any(isinstance(module, w8a8.QuantEmbedding) for module in each.modules()) for each in found)
    assert cosines(wanted, exact).min() > 0.99


@pytest.mark.parametrize(
    ("name", "kind", "base"),
    [
        ("mpnet", "MPNetForMaskedLM", "MPNetModel"),  # as all-mpnet-base-v2 says
        pytest.param("qwen3", "Qwen3ForCausalLM", "Qwen3Model", marks=pytest.mark.slow),
        pytest.param("bert-cls", "BertForSequenceClassification", "BertModel", marks=pytest.mark.slow),
    ],
)
def test_an_embedder_whose_config_names_a_head_that_its_files_do_not_have_is_quantised(
    floats, tmp_path, name, kind, base
):
    shutil.copytree(floats / name, tmp_path / "float")
    config = json.loads((tmp_path / "float" / "config.json").read_text()) | {"tie_word_embeddings": True}
    (tmp_path / "float" / "config.json").write_text(json.dumps(config | {"architectures": [kind]}))
    w8a8.quantize_directory(tmp_path / "float", tmp_path / "out", embeddings="int8")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["architectures"] == [base]
    model = opened(floats / name)
    w8a8.quantize(model, embeddings="int8")
    with w8a8.enabled():
        assert np.array_equal(embedded(opened(tmp_path / "out")), embedded(model))


@pytest.mark.slow
def test_an_embedder_whose_files_have_a_head_is_quantised_with_it(floats, tmp_path):
    shutil.copytree(floats / "bert-cls", tmp_path / "float")
    write(tmp_path / "float", AutoModelForMaskedLM, bert())
    w8a8.quantize_directory(tmp_path / "float", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["architectures"] == ["BertForMaskedLM"]
    exact = embedded(opened(tmp_path / "float"))
    with w8a8.enabled():
        assert (cosines(embedded(opened(tmp_path / "out")), exact) > 0.99).all()


class TestAnEmbedder:
    def test_it_is_quantised_saved_by_either_and_read_again(self, directory, tmp_path):
        model = opened(directory)
        wanted = embedded(model)
        result = w8a8.quantize(model)
        found = embedded(model)
        assert (cosines(found, wanted) > 0.99).all()
        assert not np.array_equal(found, wanted)
        w8a8.save(model, tmp_path / "ours", covered=result.coverage)
        model.save_pretrained(str(tmp_path / "theirs"))
        for place in ("ours", "theirs"):
            with w8a8.enabled():
                again = opened(tmp_path / place)
            assert [name for name, _ in quant_linears(again)] == [name for name, _ in quant_linears(model)]
            assert np.array_equal(embedded(again), found)

    def test_it_is_quantised_while_it_is_loaded(self, directory):
        model = opened(directory)
        w8a8.quantize(model)
        loaded = opened(directory, model_kwargs={"quantization_config": W8A8Config()})
        assert np.array_equal(embedded(loaded), embedded(model))

    @pytest.mark.kernels
    @needs("native")
    def test_it_is_fused_as_the_model_in_it_is(self, floats):
        whole, part = opened(floats / "bert-cls"), opened(floats / "bert-cls")
        w8a8.quantize(whole, fuse=True)
        w8a8.quantize(part[0].model, fuse=True)
        assert np.array_equal(embedded(whole), embedded(part))
        told, wanted = w8a8.fusions(whole), w8a8.fusions(part[0].model)
        assert (told.blocks, told.fused, told.refused, len(told.whole)) == (2, wanted.fused, {}, len(wanted.whole))

    @pytest.mark.kernels
    @needs("native")
    def test_what_reads_padding_behind_the_model_gets_it(self, floats):
        """A convolution over tokens: it saw zeros."""
        body = opened(floats / "bert-cls")
        width = body[0].get_embedding_dimension()
        model = SentenceTransformer(
            modules=[body[0], CNN(width, width, [3]), Pooling(width, pooling_mode="mean")], device="cpu"
        )
        w8a8.quantize(model)
        plain = model.encode(SENTENCES)
        w8a8.optimize(model)
        assert relative_error(torch.from_numpy(model.encode(SENTENCES)), torch.from_numpy(plain)) < 2e-2
        assert "padding is left out, and its outputs are zero" not in w8a8.fusions(model).fused

    def test_the_model_in_it_may_be_given_by_itself(self, directory):
        whole, part = opened(directory), opened(directory)
        w8a8.quantize(whole)
        w8a8.quantize(part[0].model)
        assert np.array_equal(embedded(part), embedded(whole))


@pytest.mark.filterwarnings("ignore")
@crossed("way name", list(WAYS), ["bert-mean-dense", "modernbert-dense", "qwen3"])
def test_the_command_keeps_the_whole_directory(call, floats, tmp_path, name, way):  # noqa: F811
    (tmp_path / "text.txt").write_text(" ".join(SENTENCES) * 40)
    options = [str(tmp_path / "text.txt") if part == "TEXT" else part for part in WAYS[way]]
    code, _, err = call("quantize", floats / name, "-o", tmp_path / "out", *options)
    assert code == 0, err
    before, after = tree(floats / name), tree(tmp_path / "out")
    kept = {path for path in before if path not in ("README.md", "config.json", "model.safetensors")}
    assert {"modules.json", "config_sentence_transformers.json", "1_Pooling/config.json"} <= kept
    assert {path: before[path] for path in kept} == {path: after.get(path) for path in kept}
    with w8a8.enabled():
        model = opened(tmp_path / "out")
    assert list(quant_linears(model))
    assert (cosines(embedded(model), embedded(opened(floats / name))) > 0.98).all()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("way", WAYS)
def test_every_way_takes_the_scheme_that_is_usual_for_encoders_and_says_so(call, floats, tmp_path, way):  # noqa: F811
    (tmp_path / "text.txt").write_text(" ".join(SENTENCES) * 40)
    options = [str(tmp_path / "text.txt") if part == "TEXT" else part for part in WAYS[way]]
    if "--scheme" in options:
        options[-1] = "auto"
    code, out, err = call("quantize", floats / "bert-cls", "-o", tmp_path / "out", *options)
    assert code == 0, err
    assert "Scheme: w8a8-asym, which is usual for a model that reads text and predicts no tokens; --scheme" in out
    with w8a8.enabled():
        saved = opened(tmp_path / "out")
    whole, loaded = (
        opened(floats / "bert-cls"),
        opened(floats / "bert-cls", model_kwargs={"quantization_config": W8A8Config()}),
    )
    assert w8a8.quantize(whole).scheme.name == "w8a8-asym"
    for model in (saved, whole, loaded):
        assert {layer.scheme.name for _, layer in quant_linears(model)} == {"w8a8-asym"}


class TestWhatFollowsTheModel:
    """A dense layer is in a folder of its own, which no config.json tells of."""

    def test_it_stays_float_and_that_is_told(self, floats):
        told = w8a8.quantize(opened(floats / "bert-mean-dense")).coverage.left
        (dense,) = [module for module in told if module.kind == "Linear"]
        assert dense.name == "2.linear"
        assert dense.reason == (
            "it lies outside of the model in this SentenceTransformer, and in files that alone is int8; "
            "'2.linear' in include, by its name, quantises it"
        )

    def test_by_its_name_it_is_quantised_and_not_saved(self, floats, tmp_path):
        model = opened(floats / "bert-mean-dense")
        w8a8.quantize(model, include=["*", "2.linear"])
        assert "2.linear" in dict(quant_linears(model))
        with pytest.raises(
            ModelError, match=r"2\.linear in it is quantised and lies outside of its BertModel.*exclude=\['2\.linear'\]"
        ):
            w8a8.save(model, tmp_path / "out")
        assert not (tmp_path / "out").exists()

    def test_in_a_module_that_does_not_save_itself_nothing_stays_float_for_it(self, floats):
        model = nn.Sequential(opened(floats / "bert-cls")[0].model, nn.Linear(32, 8))
        w8a8.quantize(model)
        assert "1" in dict(quant_linears(model))


class TestAReranker:
    def test_it_is_quantised_saved_by_either_and_read_again(self, floats, tmp_path):
        model = CrossEncoder(str(floats / "ranker"), device="cpu")
        wanted = model.predict(PAIRS)
        w8a8.quantize(model)
        found = model.predict(PAIRS)
        assert "classifier" in {name.rpartition(".")[2] for name, _ in quant_linears(model)}
        assert 0 < np.abs(found - wanted).max() < 0.02
        w8a8.save(model, tmp_path / "ours")
        model.save_pretrained(str(tmp_path / "theirs"))
        for place in ("ours", "theirs"):
            with w8a8.enabled():
                again = CrossEncoder(str(tmp_path / place), device="cpu")
            assert np.array_equal(again.predict(PAIRS), found)
        loading = {"quantization_config": W8A8Config()}
        again = CrossEncoder(str(floats / "ranker"), device="cpu", model_kwargs=loading)
        assert np.array_equal(again.predict(PAIRS), found)

    @pytest.mark.filterwarnings("ignore")
    @pytest.mark.parametrize("way", ["streamed", "in memory"])
    def test_the_command_keeps_it(self, call, floats, tmp_path, way):  # noqa: F811
        code, _, err = call("quantize", floats / "ranker", "-o", tmp_path / "out", *WAYS[way])
        assert code == 0, err
        model = CrossEncoder(str(floats / "ranker"), device="cpu")
        w8a8.quantize(model)
        with w8a8.enabled():
            again = CrossEncoder(str(tmp_path / "out"), device="cpu")
        assert np.array_equal(again.predict(PAIRS), model.predict(PAIRS))


PIPELINES = {
    "text-classification": AutoModelForSequenceClassification,
    "token-classification": AutoModelForTokenClassification,
    "fill-mask": AutoModelForMaskedLM,
    "feature-extraction": AutoModelForMaskedLM,
}


@crossed("task name", list(PIPELINES), ["bert", "modernbert"])
def test_pipelines_run_directories(tmp_path, name, task):
    auto = PIPELINES[task]
    write(tmp_path / "float", auto, CONFIGS[name]())
    model = auto.from_pretrained(tmp_path / "float")
    w8a8.quantize(model)
    w8a8.save(model, tmp_path / "int8", tokenizer())
    text = "the [MASK] sits on the old stone" if task == "fill-mask" else SENTENCES[0]
    with w8a8.enabled():
        runs = pipeline(task, str(tmp_path / "int8"), device="cpu")
    assert list(quant_linears(runs.model))
    wanted = pipeline(task, model if task != "feature-extraction" else model.base_model, tokenizer=tokenizer())
    assert runs(text) == wanted(text)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_classifier_comes_back_with_its_own_layers(tmp_path, name):
    write(tmp_path / "float", AutoModelForSequenceClassification, CONFIGS[name](num_labels=3))
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "float")
    w8a8.quantize(model)
    w8a8.save(model, tmp_path / "int8")
    with w8a8.enabled():
        again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "int8")
    ids = tokenizer()(SENTENCES[1], return_tensors="pt").input_ids
    with torch.inference_mode():
        assert torch.equal(again(ids).logits, model(ids).logits)
    assert {name.split(".")[0] for name, _ in quant_linears(again)} & {"classifier", "score"}


@pytest.mark.filterwarnings("ignore")
def test_old_files_with_a_table_of_positions_stream(call, tmp_path):  # noqa: F811
    from safetensors.torch import load_file, save_file

    write(tmp_path / "float", AutoModelForSequenceClassification, bert())
    path = tmp_path / "float" / "model.safetensors"
    held = load_file(path)
    save_file(held | {"bert.embeddings.position_ids": torch.arange(64)[None]}, path, metadata={"format": "pt"})
    code, _, err = call("quantize", tmp_path / "float", "-o", tmp_path / "out", "--stream")
    assert code == 0, err
    assert "position_ids" not in "".join(load_file(tmp_path / "out" / "model.safetensors"))


def test_the_card_says_how_it_is_run(floats, tmp_path):
    model = opened(floats / "bert-cls")
    w8a8.quantize(model)
    w8a8.save(model, tmp_path / "out")
    text = (tmp_path / "out" / "README.md").read_text()
    assert 'SentenceTransformer("path/to/this/directory")' in text
    assert "library_name: sentence-transformers" in text
    assert json.loads((tmp_path / "out" / "config_sentence_transformers.json").read_text())["prompts"]["query"]
