import json
import sys
import types
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

import w8a8
from w8a8.calibration.data import Calibration
from w8a8.calibration.sources import batched
from w8a8.errors import CalibrationError, TextError

TEXTS = ["Return a new list. " * 40, "Short.", "", "The second argument is a file. " * 20]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(Path(w8a8.__file__).parent / "demo_model")


def ids_of(calibration):
    return [batch["input_ids"] for batch in calibration.batches]


def tokens(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def contains(stream, window):
    return any(stream[i : i + len(window)] == window for i in range(len(stream) - len(window) + 1))


def test_a_text_file_is_cut_into_windows_that_do_not_overlap(tmp_path, tokenizer):
    path = tmp_path / "text.txt"
    path.write_text("".join(f"Item number {i} is here. " for i in range(60)))
    stream = torch.tensor(tokens(tokenizer, path.read_text()))
    whole = len(stream) // 16
    expected = {tuple(row) for row in stream[: whole * 16].view(whole, 16).tolist()}
    for source in (path, str(path)):
        windows = ids_of(Calibration.of(source, tokenizer, length=16))
        assert len(windows) == whole
        assert {tuple(window[0].tolist()) for window in windows} == expected
    few = ids_of(Calibration.of(path, tokenizer, length=16, samples=3, seed=5))
    assert len({tuple(window[0].tolist()) for window in few} & expected) == 3


def test_a_text_shorter_than_a_window_is_one_window(tmp_path, tokenizer):
    (tmp_path / "text.txt").write_text("Return a list.")
    (window,) = ids_of(Calibration.of(tmp_path / "text.txt", tokenizer))
    assert window[0].tolist() == tokens(tokenizer, "Return a list.")


def test_texts_give_one_window_each_and_are_never_filled_up(tokenizer):
    calibration = Calibration.of(TEXTS, tokenizer, length=24)
    windows = [window[0].tolist() for window in ids_of(calibration)]
    assert sorted(map(len, windows)) == [len(tokens(tokenizer, "Short.")), 24, 24]
    assert all(any(contains(tokens(tokenizer, text), window) for text in TEXTS) for window in windows)
    assert calibration.description.endswith("of 4 texts, seed 0")


@pytest.mark.parametrize("source", [["a", 1], [{"text": "a"}, {"content": "b"}]])
def test_what_is_no_text_among_texts_is_named(tokenizer, source):
    with pytest.raises(CalibrationError, match="text 1 of the calibration data is of type"):
        Calibration.of(source, tokenizer)


def test_texts_repeat_with_the_seed(tokenizer):
    drawn = [
        [window.tolist() for window in ids_of(Calibration.of(TEXTS, tokenizer, length=8, samples=2, seed=seed))]
        for seed in (1, 1, 2)
    ]
    assert drawn[0] == drawn[1] != drawn[2]


def test_lines_of_json_are_texts(tmp_path, tokenizer):
    path = tmp_path / "texts.jsonl"
    path.write_text("\n".join(json.dumps({"text": text, "id": 1}) for text in TEXTS) + "\n\n")
    assert all(
        torch.equal(a, b)
        for a, b in zip(
            ids_of(Calibration.of(path, tokenizer, length=8)),
            ids_of(Calibration.of([{"text": text} for text in TEXTS], tokenizer, length=8)),
            strict=True,
        )
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "a"}\n{"text":', "texts.jsonl, line 2 is not JSON"),
        ('{"texts": "a"}', r'line 1 has no string under "text": .*each line is \{"text"'),
        ('["a"]', "line 1 has no string"),
    ],
)
def test_a_bad_line_is_named(tmp_path, tokenizer, content, message):
    (tmp_path / "texts.jsonl").write_text(content)
    with pytest.raises(CalibrationError, match=message):
        Calibration.of(tmp_path / "texts.jsonl", tokenizer)


@pytest.mark.parametrize(
    ("name", "content", "error", "message"),
    [
        ("missing.txt", None, TextError, "missing.txt cannot be read as UTF-8 text"),
        ("latin.txt", b"\xff\xfe\xfd", TextError, "latin.txt cannot be read as UTF-8 text"),
        ("text.csv", b"a,b", CalibrationError, r"ends in '.csv': known are .txt"),
        ("empty.txt", b"", CalibrationError, r"token ids of shape \(0,\) cannot be used"),
        ("empty.jsonl", b"\n", TextError, "has 0 texts and no token in them"),
    ],
)
def test_a_file_that_cannot_be_used_is_named(tmp_path, tokenizer, name, content, error, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(error, match=message):
        Calibration.of(tmp_path / name, tokenizer)


def test_a_directory_is_no_calibration_file(tmp_path, tokenizer):
    with pytest.raises(TextError, match="cannot be read as UTF-8 text"):
        Calibration.of(tmp_path, tokenizer)


@pytest.fixture
def hub(monkeypatch):
    """A `datasets` package with one data set, which notes how it was asked."""
    asked = []

    class Rows(list):
        def shuffle(self, *, seed, buffer_size):
            asked.append(("shuffle", seed))
            return self

    def load_dataset(name, *, split, streaming):
        asked.append((name, split, streaming))
        if name == "nobody/nothing":
            raise FileNotFoundError("no such data set")
        return Rows({"content" if name == "other/column" else "text": text} for text in TEXTS)

    module = types.ModuleType("datasets")
    module.load_dataset = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", module)
    return asked


def test_a_name_that_is_no_file_is_a_data_set_of_the_hub(hub, tokenizer):
    calibration = Calibration.of("some/texts:validation", tokenizer, samples=2, length=8, seed=7)
    assert hub == [("some/texts", "validation", True), ("shuffle", 7)]
    assert len(calibration) == 2
    Calibration.of("some/texts", tokenizer)
    assert hub[2] == ("some/texts", "train", True)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nobody/nothing", "'nobody/nothing' is no file here, and the hub did not give it: no such data set"),
        ("other/column", "'other/column' has no \"text\"; it has content"),
    ],
)
def test_a_data_set_that_cannot_be_used_is_named(hub, tokenizer, name, message):
    with pytest.raises(CalibrationError, match=message):
        Calibration.of(name, tokenizer)


def test_without_datasets_the_way_out_is_told(monkeypatch, tokenizer):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(CalibrationError, match=r"package 'datasets', .*: pip install datasets, or give the path"):
        Calibration.of("some/texts", tokenizer)


def test_a_path_never_asks_the_hub(hub, tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text("Return a list.")
    Calibration.of(str(tmp_path / "a.txt"), tokenizer)
    assert hub == []


def test_batches_end_where_the_length_changes():
    windows = [torch.zeros(n, dtype=torch.int64) for n in (4, 4, 4, 3, 4)]
    assert [tuple(batch.shape) for batch in batched(windows, 2)] == [(2, 4), (1, 4), (1, 3), (1, 4)]
