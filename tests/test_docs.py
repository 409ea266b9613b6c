"""The README and docs are true: their Python blocks run, their tables are those of bench/results."""

import importlib
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
sys.path.insert(0, str(ROOT / "bench"))


def blocks():
    for page in PAGES:
        for i, code in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)):
            yield pytest.param(code, id=f"{page.name}-{i}")


@pytest.mark.parametrize("code", list(blocks()))
def test_every_python_block_runs(code, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "block"}
    exec(compile(code, "block", "exec"), names)
    assert names["w8a8"].__name__ == "w8a8"
    capsys.readouterr()


def test_the_readme_shows_the_ten_line_example():
    (first, *_) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len([line for line in first.splitlines() if line.strip()]) <= 10
    assert all(name in first for name in ("w8a8.quantize", "w8a8.save", "w8a8.load", "coverage"))


def test_tables_are_the_benchs_results():
    report = importlib.import_module("report")
    assert len(report.TABLES) == 3
    for path, script in report.TABLES:
        assert report.table_of(script) in path.read_text(), script.__name__


def test_nothing_that_the_preflight_lets_pass_was_refused_by_vllm():
    peer = importlib.import_module("vllm_peer")
    records = importlib.import_module("machine").results_of("vllm_peer")[0]["records"]
    passed = [record for record in records if not record["refused"]]
    assert len(passed) > 40
    assert {peer.verdict(record) for record in passed} == {"runs", "no kernel in this build"}


def test_the_performance_page_is_made_from_the_results():
    report = importlib.import_module("report")
    assert report.page() == report.PAGE.read_text()


def test_a_table_of_the_readme_is_found_by_its_first_headings():
    report = importlib.import_module("report")
    other = "| x | z |\n|---|---|\n| 0 | 0 |\n"
    text = other + "a\n| x | y | w |\n|---|---|---|\n| 1 | 2 | 3 |\n\nb\n"
    assert report.with_table(text, "| x | y |\n|---|---|\n| 4 | 5 |\n| 6 | 7 |") == (
        other + "a\n| x | y |\n|---|---|\n| 4 | 5 |\n| 6 | 7 |\n\nb\n"
    )


def test_every_relative_link_leads_somewhere():
    for page in [*PAGES, ROOT / "CONTRIBUTING.md"]:
        for link in re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text()):
            assert (page.parent / link).exists(), f"{page.name}: {link}"
