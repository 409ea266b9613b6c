"""Expressions from other people's files: matched as `re` matches, and never longer than they are allowed to."""

import io
import json
import re
import sys

import pytest

import w8a8
from tests.checkpoint.test_hostile import TINY
from tests.conftest import llama
from w8a8.checkpoint import expressions, matcher
from w8a8.checkpoint.expressions import MAX_EXPRESSIONS, matching
from w8a8.errors import CheckpointError
from w8a8.layers.linear import quant_linears

NAMES = ["lm_head", "model.layers.0.self_attn.q_proj", "model.layers.10.mlp.gate_up_proj", "", "\ud800"]
ORDINARY = [
    ".*_proj$",
    "lm_head",
    "head",
    r"model\.layers\.\d+\.(?!mlp)",
    "(.)(.).*\\2\\1",
    "(?i)LM_",
    "",
    "\ud800",
    "a{e}",
]
EXPONENTIAL = r".*\.(a|aa)+$"
SLOW_TO_COMPILE = ["(?i)" + "[\0-\U0010ffff]" * 198 + str(i) for i in range(60)]
"""Each takes most of a second."""
LONG = "layers." + "a" * 60 + "!"


def test_they_match_as_re_matches():
    found = matching(ORDINARY, NAMES, "config.json")
    assert found == {e: {name for name in NAMES if re.match(e, name)} for e in ORDINARY}
    assert all(found[e] for e in ORDINARY if e not in ("head", "a{e}", "(.)(.).*\\2\\1"))


def test_nothing_to_match_starts_nothing(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    assert matching([], NAMES, "config.json") == {}
    with pytest.raises(CheckpointError, match="'/nowhere/python' cannot be started: No such file"):
        matching(["a"], NAMES, "config.json")


@pytest.mark.parametrize(
    "bad", [[EXPONENTIAL], [r".*\.(a|a)*$"], SLOW_TO_COMPILE], ids=["(a|aa)+", "(a|a)*", "compile"]
)
def test_one_that_would_take_for_ever_is_an_error_that_names_it(monkeypatch, bad):
    monkeypatch.setattr(expressions, "LIMIT_S", 1)
    shown = {expressions._shown(e) for e in bad}  # one text: they differ at their ends, which are not shown
    with pytest.raises(CheckpointError) as caught:
        matching(["lm_head", *bad, ".*"], [*NAMES, LONG], "DIR/config.json")
    assert str(caught.value).startswith(f"DIR/config.json: {shown.pop()} took more than 1 s with 6 module")
    assert not shown
    assert "name the layers themselves in its quantization_config, or" in str(caught.value)


def test_the_time_is_that_of_all_names_and_expressions(monkeypatch):
    """Each takes some milliseconds per name: cubic, not exponential."""
    monkeypatch.setattr(expressions, "LIMIT_S", 1)
    slow = [f".*.*.*{i}" for i in range(100, 200)]
    with pytest.raises(CheckpointError, match=r"'re:\.\*\.\*\.\*1\d\d' took more than 1 s with 100 module names"):
        matching(slow, ["a" * 300 + str(i) for i in range(100)], "config.json")


def test_the_program_ends_by_itself_where_nobody_waits(monkeypatch):
    run = expressions.subprocess.run
    monkeypatch.setattr(expressions.subprocess, "run", lambda *args, timeout, **options: run(*args, **options))
    monkeypatch.setattr(expressions, "LIMIT_S", 0)  # the program's own limit is a second more
    with pytest.raises(
        CheckpointError, match=r"cannot be matched: the process was ended by signal \d+; name the layers"
    ):
        matching([EXPONENTIAL], [LONG], "config.json")


@pytest.mark.parametrize("bad", ["(", "[", "a{2,1}", "(" * 498 + ")" * 498, "(?P<a>", "\\g"])
def test_what_is_no_expression_is_told(bad):
    with pytest.raises(
        CheckpointError, match=f"config.json: {re.escape(expressions._shown(bad))} is not a regular expression: "
    ):
        matching(["lm_head", bad], NAMES, "config.json")


def test_a_program_that_fails_is_told_with_its_last_line(monkeypatch, tmp_path):
    (tmp_path / "fails.py").write_text("raise MemoryError('no room')")
    monkeypatch.setattr(expressions, "_PROGRAM", tmp_path / "fails.py")
    with pytest.raises(CheckpointError, match=r"'re:a' cannot be matched: MemoryError: no room; name the layers"):
        matching(["a"], NAMES, "config.json")


def test_there_is_a_limit_to_their_length_and_number():
    with pytest.raises(
        CheckpointError, match=r"config.json: 're:a{80}\.\.\.' has 1,001 characters, the limit is 1,000"
    ):
        matching(["a" * 1001], NAMES, "config.json")
    with pytest.raises(CheckpointError, match="1001 regular expressions in quantization_config, the limit is 1000"):
        matching([str(i) for i in range(MAX_EXPRESSIONS + 1)], NAMES, "config.json")


def test_the_program_answers_line_by_line():
    out = io.StringIO()
    matcher.answer(io.StringIO(json.dumps({"expressions": ["a", "(", "b?"], "names": ["ab", "b"]})), out)
    first, second, third = map(json.loads, out.getvalue().splitlines())
    assert (first, third) == ("10", "11")
    assert "unterminated subpattern" in second["error"]


@pytest.mark.parametrize("place", ["targets", "ignore"])
def test_a_directory_is_loaded_with_expressions_and_refused_with_bad_ones(tmp_path, monkeypatch, place):
    w8a8.save(w8a8.quantize(llama(**TINY)).model, tmp_path / "d")
    path = tmp_path / "d" / "config.json"

    def with_expression(expression):
        config = json.loads(path.read_text())
        described = config["quantization_config"]
        (described["config_groups"]["group_0"] if place == "targets" else described)[place] = [expression]
        path.write_text(json.dumps(config))

    with_expression({"targets": "re:model", "ignore": "re:lm_(head)+$"}[place])
    assert len(list(quant_linears(w8a8.load(tmp_path / "d")))) == 7
    monkeypatch.setattr(expressions, "LIMIT_S", 1)
    with_expression(r"re:model((\w)|(\w)|(\w)|\.)*!")  # three ways to read every letter of a name
    with pytest.raises(CheckpointError, match=r"config\.json: 're:model.*' took more than 1 s with 8 module names"):
        w8a8.load(tmp_path / "d")
