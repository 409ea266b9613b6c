"""Texts come from a file one after another, and what is none is told with its line."""

import json
import os

import pytest

from w8a8.embedding.texts import Line, count_texts, each_text, pieces
from w8a8.errors import TextError


def test_a_text_is_a_line_and_a_blank_one_is_a_text(tmp_path):
    path = tmp_path / "texts.txt"
    path.write_text("one\n\nthree \r\nsnow\u2028falls")
    assert list(each_text(path)) == [Line(1, "one"), Line(2, ""), Line(3, "three "), Line(4, "snow\u2028falls")]
    assert count_texts(path) == 4


def test_a_text_is_what_an_object_or_a_row_calls_so(tmp_path):
    rows = [{"_id": 3, "text": "a\nb"}, {"text": ""}]
    (tmp_path / "texts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "texts.tsv").write_text('id\ttext\n7\ta "b\n8\tc\n')
    assert [line.text for line in each_text(tmp_path / "texts.jsonl")] == ["a\nb", ""]
    assert list(each_text(tmp_path / "texts.tsv")) == [Line(2, 'a "b'), Line(3, "c")]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("texts.txt", b"", "holds none"),
        ("texts.txt", b"a\n\xff\n", "cannot be read"),
        ("texts.jsonl", b'{"text": "a"}\n{"body": "b"}', 'line 2 has no "text", known: body'),
        ("texts.jsonl", b'{"text": 5}', "line 1: text is 5, expected a text"),
        ("texts.jsonl", b"{", "line 1 is not JSON"),
        ("texts.tsv", b"id\ttext\n7\n", "line 2: text is None"),
        ("texts.csv", b"text\n", "ends in '.csv'"),
    ],
)
def test_what_is_no_text_is_told(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(TextError, match=message):
        count_texts(tmp_path / name)


def test_what_cannot_be_read_twice_is_told(tmp_path):
    os.mkfifo(tmp_path / "texts.txt")
    for path in (tmp_path / "texts.txt", tmp_path, tmp_path / "none.txt"):
        with pytest.raises(TextError, match="is no file"):
            count_texts(path)


def test_pieces_have_so_many_texts_or_characters_at_most():
    lines = [Line(number, "x" * size) for number, size in enumerate([1, 1, 1, 5, 9, 2, 2])]
    found = [[len(line.text) for line in piece] for piece in pieces(iter(lines), most=2, characters=6)]
    assert found == [[1, 1], [1, 5], [9], [2, 2]]
