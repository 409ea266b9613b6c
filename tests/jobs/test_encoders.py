"""Two encoders judged on what they are for: by the command and by the call, on each layout of data."""

import importlib
import itertools
import json
import shutil
from pathlib import Path

import pytest
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Normalize, Transformer
from sentence_transformers.sentence_transformer.evaluation import (
    EmbeddingSimilarityEvaluator,
    InformationRetrievalEvaluator,
)
from sentence_transformers.sentence_transformer.modules import Pooling
from transformers import AutoModelForSequenceClassification

import w8a8
from tests.cli.test_commands import call  # noqa: F401 - a fixture
from tests.sentences import SENTENCES, bert, embedder, ranker, tokenizer, write
from w8a8.errors import ModelError, TextError
from w8a8.jobs.encoders import EncoderPair, judge_encoders
from w8a8.kernels.native import unavailable_because

PAIRS = [(a, b, number / 4) for number, (a, b) in enumerate(itertools.pairwise(SENTENCES))]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Float directories of an embedder, a reranker and a classifier, and beside each its int8 directory."""
    place = tmp_path_factory.mktemp("models")
    made = {"embedder": embedder(place, pooling="mean"), "ranker": ranker(place)}
    for name, model in made.items():
        model.save_pretrained(str(place / name))
        w8a8.quantize(model)
        w8a8.save(model, place / f"{name}-int8")
    write(place / "classifier", AutoModelForSequenceClassification, bert(num_labels=3))
    classifier = AutoModelForSequenceClassification.from_pretrained(place / "classifier")
    w8a8.quantize(classifier)
    w8a8.save(classifier, place / "classifier-int8", tokenizer())
    return place


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    place = tmp_path_factory.mktemp("data")
    (place / "texts.txt").write_text("\n".join(SENTENCES))
    rows = [{"sentence1": a, "sentence2": b, "score": score} for a, b, score in PAIRS]
    (place / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    labelled = [{"text": text, "label": ("LABEL_0", 1, "2")[n % 3]} for n, text in enumerate(SENTENCES)]
    (place / "labels.jsonl").write_text("\n".join(map(json.dumps, labelled)))
    (place / "beir" / "qrels").mkdir(parents=True)
    for file, texts in (("corpus", SENTENCES), ("queries", SENTENCES[:3])):
        rows = [{"_id": f"{file[0]}{n}", "text": text} for n, text in enumerate(texts)]
        (place / "beir" / f"{file}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    answers = "".join(f"q{n}\tc{n}\t1\n" for n in range(3))
    (place / "beir" / "qrels" / "test.tsv").write_text(f"query-id\tcorpus-id\tscore\n{answers}")
    return place


def judged(models, name, data, **more):
    return judge_encoders(EncoderPair(str(models / f"{name}-int8"), str(models / name), data, **more))


@pytest.mark.slow
def test_an_embedder_on_texts_pairs_and_what_is_to_be_found(models, data):
    told = judged(models, "embedder", data / "texts.txt")
    assert told.judged == "6 texts"
    assert told.alike is not None
    assert 0.99 < told.alike.cosine_p1.mean < told.alike.cosine.mean < 1
    (correlation,) = judged(models, "embedder", data / "pairs.jsonl").measures
    assert correlation.name == "Spearman's correlation"
    assert correlation.model.mean == pytest.approx(correlation.reference.mean + correlation.difference.mean)
    gain, recall = judged(models, "embedder", data / "beir", batch_size=2).measures
    assert recall.model.mean == 1.0  # of six
    assert 0 < gain.model.mean < 1  # queries have a prompt
    assert gain.difference.mean == pytest.approx(gain.model.mean - gain.reference.mean)


@pytest.mark.slow
def test_the_figures_are_those_of_sentence_transformers_own_evaluators(models, data):
    model = SentenceTransformer(str(models / "embedder"), device="cpu")
    (correlation,) = judged(models, "embedder", data / "pairs.jsonl").measures
    first, second, scores = zip(*PAIRS, strict=True)
    wanted = EmbeddingSimilarityEvaluator(list(first), list(second), list(scores), show_progress_bar=False)(model)
    assert correlation.reference.mean == pytest.approx(wanted["spearman_cosine"], rel=1e-6)
    gain, _ = judged(models, "embedder", data / "beir").measures
    corpus = {f"c{n}": text for n, text in enumerate(SENTENCES)}
    queries = {f"q{n}": text for n, text in enumerate(SENTENCES[:3])}
    answers = {f"q{n}": {f"c{n}"} for n in range(3)}
    wanted = InformationRetrievalEvaluator(queries, corpus, answers, show_progress_bar=False)(model)
    assert gain.reference.mean == pytest.approx(wanted["cosine_ndcg@10"], rel=1e-6)


@pytest.mark.slow
def test_a_reranker_on_pairs_and_a_classifier_on_labels(models, data):
    (correlation,) = judged(models, "ranker", data / "pairs.jsonl").measures
    assert -1 <= correlation.model.mean <= 1
    accuracy, f1 = judged(models, "classifier", data / "labels.jsonl", batch_size=4).measures
    assert accuracy.model.mean in [n / 6 for n in range(7)]
    assert 0 <= f1.reference.mean <= 1
    told = judged(models, "classifier", data / "texts.txt").alike
    assert told is not None
    assert told.rows == 6


def test_a_text_longer_than_a_classifier_has_places_for_is_cut(models, tmp_path):
    for name in ("classifier", "classifier-int8"):
        shutil.copytree(models / name, tmp_path / name)
        limitless = tokenizer()
        limitless.model_max_length = int(1e30)  # what transformers says where nobody does
        limitless.save_pretrained(tmp_path / name)
    rows = [{"text": " ".join(SENTENCES) * 40, "label": 0}, {"text": SENTENCES[0], "label": 1}]
    (tmp_path / "labels.jsonl").write_text("\n".join(map(json.dumps, rows)))
    accuracy, _ = judged(tmp_path, "classifier", tmp_path / "labels.jsonl").measures
    assert accuracy.model.mean in (0, 0.5, 1)


def test_what_is_judged_is_measured_in_integers(models, data, monkeypatch):
    seen = []
    forward = w8a8.QuantLinear.forward
    monkeypatch.setattr(w8a8.QuantLinear, "forward", lambda self, x: seen.append(self) or forward(self, x))
    judged(models, "embedder", data / "texts.txt", fuse=False)
    assert len({id(layer) for layer in seen}) == 13  # of the int8 model


@pytest.mark.kernels
@pytest.mark.skipif(unavailable_because() is not None, reason="there is no native kernel")
@pytest.mark.not_under("meta", reason="where a default device is set, blocks run as they are")
@pytest.mark.parametrize(
    ("name", "what"),
    [
        pytest.param("embedder", "texts.txt", marks=pytest.mark.slow),
        pytest.param("ranker", "pairs.jsonl", marks=pytest.mark.slow),
        ("classifier", "labels.jsonl"),
    ],
)
def test_what_is_judged_is_fused_where_it_was_not_refused_and_both_are_told(models, data, name, what):
    fused, plain = judged(models, name, data / what), judged(models, name, data / what, fuse=False)
    assert fused.fused == "2 blocks run fused"
    assert plain.fused == "not fused: it was not asked for"
    for ours, theirs in zip(fused.measures, plain.measures, strict=True):
        assert ours.model.mean == pytest.approx(theirs.model.mean, abs=0.05)
    if fused.alike is not None:
        assert plain.alike is not None
        assert fused.alike.cosine.mean == pytest.approx(plain.alike.cosine.mean, abs=1e-4)
    swapped = judge_encoders(EncoderPair(str(models / name), str(models / f"{name}-int8"), data / what))
    assert swapped.fused == "not fused: it has no integer layers"


@pytest.mark.parametrize(
    ("name", "what", "message"),
    [
        ("ranker", "texts.txt", "vectors of texts were asked for by the data, and .*ranker.* is a CrossEncoder"),
        ("ranker", "beir", "which document answers a query were asked for"),
        ("embedder", "labels.jsonl", "labels of texts were asked for by the data, and .* is a SentenceTransformer"),
        ("classifier", "pairs.jsonl", "scores of pairs were asked for by the data, and .* is a BertForSequence"),
    ],
)
def test_what_a_model_has_no_answer_to_is_told(models, data, name, what, message):
    with pytest.raises(ModelError, match=message):
        judged(models, name, data / what)


def test_a_label_that_the_model_does_not_know_is_told(models, tmp_path):
    (tmp_path / "labels.jsonl").write_text('{"text": "snow", "label": "LABEL_3"}')
    with pytest.raises(TextError, match=r"the label 'LABEL_3', which .* does not know: closest: LABEL_"):
        judged(models, "classifier", tmp_path / "labels.jsonl")


@pytest.mark.filterwarnings("ignore")
def test_the_command_tells_it(call, models, data):  # noqa: F811
    names = models / "embedder-int8", "--against", models / "embedder"
    code, out, err = call("eval", *names, "--data", data / "pairs.jsonl")
    assert code == 0, err
    assert "Spearman's correlation, model - reference" in out
    assert "not fused: it was not asked for." in call("eval", *names, "--data", data / "pairs.jsonl", "--no-fuse")[1]
    code, out, err = call("eval", *names, "--data", data / "texts.txt", "--json")
    assert code == 0, err
    assert 0.99 < json.loads(out)["alike"]["cosine"]["mean"] < 1


@pytest.mark.slow
@pytest.mark.kernels
@pytest.mark.filterwarnings("ignore")
def test_on_a_text_encoders_are_fused_too_and_it_is_told(call, models, data):  # noqa: F811
    names = models / "embedder-int8", "--against", models / "embedder"
    cosines = []
    for more, told in (([], "embedder-int8: 2 blocks run fused."), (["--no-fuse"], "not fused: it was not asked for.")):
        code, out, err = call("eval", *names, "--text", data / "texts.txt", "--json", *more)
        assert code == 0, err
        assert told in err
        cosines.append(json.loads(out)["cosine"]["mean"])
    assert cosines[0] == pytest.approx(cosines[1], abs=1e-4)


@pytest.mark.parametrize(
    ("more", "said"), [([], "no --against"), (["--against", "M", "--dtype", "bfloat16"], "--dtype")]
)
def test_what_is_not_heeded_is_refused(call, models, data, more, said):  # noqa: F811
    code, _, err = call("eval", models / "embedder-int8", "--data", data / "texts.txt", *more)
    assert code == 2
    assert f"and {said} was given" in " ".join(err.split())


LOST = 0.002
"""What a trained encoder may lose, as the interval says it: 0.2 %."""

SIZES = {"hidden": 64, "layers": 2, "steps": 250}


@pytest.fixture
def trained(monkeypatch):
    """The bench's encoders, which are trained in seconds."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "bench"))
    return importlib.import_module("trained")


def quantized_beside(model, directory, tokenizer=None):
    """Both directories: the float model's, and that of the default scheme."""
    model.save_pretrained(str(directory))
    if tokenizer is not None:
        tokenizer.save_pretrained(directory)
    w8a8.quantize(model)
    w8a8.save(model, directory.with_name(f"{directory.name}-int8"), tokenizer)


@pytest.mark.slow
def test_a_trained_embedder_loses_less_than_a_fifth_of_a_per_cent(trained, tmp_path):
    trained.embedder(**SIZES).save_pretrained(tmp_path / "bert")
    trained.tokenizer().save_pretrained(tmp_path / "bert")
    body = Transformer(str(tmp_path / "bert"))
    pooling = Pooling(body.get_embedding_dimension(), pooling_mode="mean")
    quantized_beside(SentenceTransformer(modules=[body, pooling, Normalize()], device="cpu"), tmp_path / "embedder")
    language = trained.Language(seed=1)
    pairs = [language.pair() for _ in range(3000)]
    others = [language.pair()[0] for _ in pairs]
    rows = [(a, b, 1) for a, b in pairs] + [(a, c, 0) for (a, _), c in zip(pairs, others, strict=True)]
    named = (dict(zip(("sentence1", "sentence2", "score"), row, strict=True)) for row in rows)
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, named)))
    (tmp_path / "beir" / "qrels").mkdir(parents=True)
    for file, side in (("queries", 0), ("corpus", 1)):
        lines = (json.dumps({"_id": str(n), "text": pair[side]}) for n, pair in enumerate(pairs))
        (tmp_path / "beir" / f"{file}.jsonl").write_text("\n".join(lines))
    answers = "".join(f"{n}\t{n}\t1\n" for n in range(len(pairs)))
    (tmp_path / "beir" / "qrels" / "test.tsv").write_text(f"query-id\tcorpus-id\tscore\n{answers}")
    (correlation,) = judged(tmp_path, "embedder", tmp_path / "pairs.jsonl").measures
    gain, recall = judged(tmp_path, "embedder", tmp_path / "beir").measures
    assert correlation.reference.mean > 0.8  # it has learned what it may lose
    assert 0.8 < gain.reference.mean < 1
    for measure in (correlation, gain, recall):
        assert measure.difference.low > -LOST, measure


@pytest.mark.slow
def test_a_trained_classifier_loses_less_than_a_fifth_of_a_per_cent(trained, tmp_path):
    quantized_beside(trained.classifier(**SIZES), tmp_path / "classifier", trained.tokenizer())
    language = trained.Language(seed=1)
    rows = [dict(zip(("text", "label"), language.labelled(), strict=True)) for _ in range(6000)]
    (tmp_path / "labels.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for measure in judged(tmp_path, "classifier", tmp_path / "labels.jsonl").measures:
        assert 0.7 < measure.reference.mean < 1
        assert measure.difference.low > -LOST, measure
