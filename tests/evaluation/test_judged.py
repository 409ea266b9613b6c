"""Files that encoders are judged on: each layout is read, and a line that does not fit is named."""

import pytest

from w8a8.errors import TextError
from w8a8.evaluation.judged import Labelled, Retrieval, ScoredPairs, Texts, read_judged


@pytest.mark.parametrize(
    ("name", "text", "wanted"),
    [
        ("d.txt", "a b\n\nc\n", Texts(("a b", "c"))),
        ("d.jsonl", '{"text": "a"}\n', Texts(("a",))),
        ("d.jsonl", '{"text": "a", "label": 1}\n{"text": "b", "label": "x"}\n', Labelled(("a", "b"), ("1", "x"))),
        ("d.tsv", 'score\tsentence1\tsentence2\n0.5\ta "b\tc\n', ScoredPairs((('a "b', "c"),), (0.5,))),
        ("d.jsonl", '{"sentence1": "a", "sentence2": "b", "score": 4}\n', ScoredPairs((("a", "b"),), (4.0,))),
    ],
    ids=["lines", "texts", "labels", "sts.tsv", "sts.jsonl"],
)
def test_each_layout_is_read(tmp_path, name, text, wanted):
    (tmp_path / name).write_text(text)
    assert read_judged(tmp_path / name) == wanted


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "qrels").mkdir()
    (tmp_path / "corpus.jsonl").write_text('{"_id": "d1", "title": "T", "text": "one"}\n{"_id": "d2", "text": "two"}\n')
    (tmp_path / "queries.jsonl").write_text('{"_id": "q1", "text": "which"}\n{"_id": "q2", "text": "unasked"}\n')
    (tmp_path / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\nq1\td2\t1\nq1\td1\t0\n")
    return tmp_path


def test_a_folder_is_read_as_beir_lays_it_out(folder):
    assert read_judged(folder) == Retrieval({"d1": "T one", "d2": "two"}, {"q1": "which"}, {"q1": {"d2": 1.0}})


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("d.csv", "a", r"ends in '\.csv': known are \.txt"),
        ("d.txt", "\n", "is empty"),
        ("d.jsonl", "", "is empty"),
        ("d.jsonl", "{", "line 1 is not JSON"),
        ("d.jsonl", "[1]", "line 1 holds a list, expected an object"),
        ("d.jsonl", '{"words": "a"}', "has the columns words: give sentence1"),
        ("d.jsonl", '{"text": "a"}\n{"text": null}', "line 2: text is None"),
        ("d.tsv", "sentence1\tsentence2\tscore\na\tb\tmuch\n", "line 2: the score is 'much', expected a number"),
        ("d.tsv", "sentence1\tsentence2\tscore\na\tb\n", "line 2: score is None"),
    ],
)
def test_what_does_not_fit_is_told_with_its_line(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(TextError, match=message):
        read_judged(tmp_path / name)


def test_a_folder_that_is_none_is_told(folder):
    (folder / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\nq1\td3\t1\n")
    with pytest.raises(TextError, match=r"line 2: 'd3' is not in corpus\.jsonl \(closest: d"):
        read_judged(folder)
    (folder / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\nq1\td1\t0\n")
    with pytest.raises(TextError, match="2 documents and 0 queries with an answer"):
        read_judged(folder)
    (folder / "qrels" / "test.tsv").unlink()
    with pytest.raises(TextError, match=r"has none of qrels/test\.tsv"):
        read_judged(folder)
    (folder / "corpus.jsonl").unlink()
    with pytest.raises(TextError, match="cannot be read"):
        read_judged(folder)
