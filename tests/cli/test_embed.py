"""`w8a8 embed`: what it prints, and what it says where it cannot."""

import json

import numpy as np
import transformers as t

from tests.cli.test_commands import call  # noqa: F401 - a fixture
from tests.sentences import SENTENCES, bert, write


def test_the_command_writes_vectors_and_tells_how_fast(call, tmp_path):  # noqa: F811
    model = write(tmp_path / "plain", t.AutoModel, bert())
    (tmp_path / "texts.txt").write_text("\n".join([*SENTENCES, "snow " * 90]))
    options = ("embed", model, "--text", tmp_path / "texts.txt", "-o", tmp_path / "vectors.npy")
    code, out, err = call(*options)
    assert code == 0, err
    assert "vectors.npy: 7 vectors of 32 numbers in " in out
    assert "tokens/s" in out
    assert "the mean of the last states of BertModel" in err
    assert "1 of 7 texts were longer than the model reads, and were cut" in err
    assert np.load(tmp_path / "vectors.npy").shape == (7, 32)
    code, out, err = call(*options)
    assert (code, out) == (2, "")
    assert "--overwrite" in err
    code, out, err = call(*options, "--overwrite", "--json")
    assert code == 0, err
    told = json.loads(out)
    assert (told["texts"], told["width"], told["cut"]) == (7, 32, 1)
