"""Each example runs as it is, and says what it is there to say."""

import runpy
import sys
from pathlib import Path

import pytest

from tests.conftest import every_third
from w8a8.demo import demo_directory

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
SAYS = {
    "bad_layer": ["dB", ": None, '*': 'w8a8'}: KL 0.0"],
    "encoder": ["classifier"],
    "larger_than_memory": ["36 layers run in integers, the first is model.decoder.layers.0.self_attn.k_proj"],
    "quantize": ["the logits are equal: True", "Return the number of"],
    "static": ["smooth=none: KL 0.0", "smooth=searched: KL 0.0"],
}


def test_every_example_is_run():
    assert {path.stem for path in EXAMPLES.glob("*.py")} == set(SAYS)


ARGUMENTS = {"static": [str(demo_directory()), str(ROOT / "README.md")]}
"""By default it reads all docstrings of the standard library, which takes long."""


@pytest.mark.parametrize("name", every_third(SAYS))
def test_an_example_runs(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *ARGUMENTS.get(name, [])])
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    told = capsys.readouterr().out
    assert [words for words in SAYS[name] if words not in told] == []
