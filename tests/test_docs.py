"""The README and docs are true: their Python blocks and commands run, their tables are those of bench/results.

A block of Python runs by itself, in an empty folder, and a command of a how-to in a folder that holds what
docs/howto/index.md makes; the tutorial is gone through from its first block to its last.  A comment above a
block says where it is treated in another way:

    <!-- slow: why -->       it takes more than some seconds
    <!-- not run: why -->    it needs what is not here

What is slow, and every command, is run by `make docs-check`.
"""

import importlib
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import pytest

from w8a8.cli import main

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
TUTORIAL, PREPARES = DOCS / "tutorial.md", DOCS / "howto" / "index.md"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
sys.path.insert(0, str(ROOT / "bench"))


class Block(NamedTuple):
    language: str
    note: str  # slow, not run, or nothing
    code: str


def blocks(page):
    found = re.findall(r"(?:^<!-- (slow|not run): [^\n]* -->\n)?^```(\w*)\n(.*?)^```$", page.read_text(), re.M | re.S)
    return [Block(language, note, code) for note, language, code in found]


def marked(block):
    return [pytest.mark.slow] if block.note == "slow" else []


def programs():
    for page in PAGES:
        for i, block in enumerate(blocks(page)):
            if block.language == "python" and block.note != "not run" and page != TUTORIAL:
                name = f"{page.relative_to(ROOT)}-{i}"
                yield pytest.param(block.code, id=name, marks=marked(block))


def run_program(code):
    names = {"__name__": "block"}
    exec(compile(code, "block", "exec"), names)
    assert names["w8a8"].__name__ == "w8a8"


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")  # of torch's inductor
@pytest.mark.parametrize("code", list(programs()))
def test_every_python_block_runs(code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_program(code)


def lines(block):
    return [line for line in block.code.replace("\\\n", "").splitlines() if line]


def commands(page, *, all_of_them=False):
    """The lines that start a program: those of blocks that are run, or also those that are shown alone."""
    return [
        line
        for block in blocks(page)
        if block.language == "sh" or (all_of_them and not block.language)
        for line in lines(block)
        if all_of_them or block.note != "not run"
    ]


def test_every_command_that_is_shown_is_one_that_there_is():
    import typer.main

    from w8a8.cli.commands import app

    known = typer.main.get_command(app)
    shown = [line for page in PAGES for line in commands(page, all_of_them=True) if line.startswith("w8a8 ")]
    assert len(shown) > 30
    for line in shown:
        _, name, *arguments = shlex.split(line, comments=True)
        known.commands[name].make_context(name, arguments)  # raises at an option that is unknown


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A folder with what the how-tos take for granted."""
    folder, before = tmp_path_factory.mktemp("howto"), Path.cwd()
    (block,) = [block for block in blocks(PREPARES) if block.language == "python"]
    os.chdir(folder)
    try:
        run_program(block.code)
    finally:
        os.chdir(before)
    return folder


@pytest.fixture
def type_in(monkeypatch, capfd):
    """Run one line as a shell would; returns what it printed."""
    programs = Path(sys.executable).parent
    environment = {**os.environ, "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}"}

    def typed(line):
        if not line.startswith("w8a8 "):
            made = subprocess.run(["bash", "-c", line], capture_output=True, text=True, timeout=240, env=environment)
            assert made.returncode == 0, made.stderr
            return made.stdout
        monkeypatch.setattr(sys, "argv", shlex.split(line))
        with pytest.raises(SystemExit) as stopped:
            main()
        told = capfd.readouterr()
        assert not stopped.value.code, told.err
        return told.out

    return typed


@pytest.mark.slow
@pytest.mark.parametrize("line", [line for page in sorted((DOCS / "howto").glob("*.md")) for line in commands(page)])
def test_a_command_of_a_how_to_runs(line, prepared, tmp_path, monkeypatch, type_in):
    shutil.copytree(prepared, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    type_in(line)


def masked(text):
    """Lines without their numbers, their distances and the lines of tables, which differ from machine to machine."""
    plain = re.sub(r"[-+]?\d[\d.,]*(?:e[-+]\d+)?", "#", re.sub(r"[^\x00-\x7f]+", " ", text))
    return [" ".join(line.split()) for line in plain.splitlines() if line.split()]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("curl") is None, reason="no curl to ask the server with")
def test_the_tutorial_is_true_word_for_word(tmp_path, monkeypatch, type_in):
    monkeypatch.chdir(tmp_path)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    server, printed = None, ""
    try:
        for block in blocks(TUTORIAL):
            if block.language == "python":
                run_program(block.code)
            elif block.language == "text":
                expected = [line for line in masked(block.code) if line != "..."]
                assert [line for line in expected if line not in masked(printed)] == []
            else:
                printed = ""
                for line in (line.replace("8000", port) for line in lines(block)):
                    if line.startswith("w8a8 serve "):
                        asked = [sys.executable, "-m", *shlex.split(line)]
                        server = subprocess.Popen(asked, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
                        wait_for(server, int(port))
                    else:
                        printed += type_in(line)
    finally:
        if server is not None:
            server.terminate()
            server.wait(timeout=30)
    assert server is not None
    assert '"text"' in printed  # of the completion


def wait_for(server, port):
    for _ in range(240):
        assert server.poll() is None
        with socket.socket() as s:
            if s.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.5)
    raise AssertionError(f"nothing listens on {port}")


def test_the_readme_shows_the_ten_line_example():
    first = next(block.code for block in blocks(ROOT / "README.md") if block.language == "python")
    assert len([line for line in first.splitlines() if line.strip()]) <= 10
    assert all(name in first for name in ("w8a8.quantize", "w8a8.save", "w8a8.load", "coverage"))


def test_the_readme_is_one_screen_and_a_half():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def test_the_table_of_schemes_is_the_presets():
    from w8a8 import PRESETS, Scheme

    page = (DOCS / "reference/schemes.md").read_text()
    rows = re.findall(r"^\| `([\w-]+)` \| [^|]+ \| [^|]+ \| (\w+) \| \w+ \|$", page, re.M)
    assert rows == [(name, "integers" if Scheme.of(name).integer_executable else "float") for name in PRESETS]


def test_the_page_of_names_has_every_public_one():
    import w8a8

    shown = set(re.findall(r"^::: w8a8\.(\w+)", (DOCS / "reference/api.md").read_text(), re.M))
    elsewhere = {"PRESETS", "W8A8Error", "OBSERVERS", "affine", "dataflow", "kernels", "observers"}
    assert {name for name in w8a8.__all__ if name not in shown} == elsewhere


def test_the_page_of_errors_has_every_one():
    from w8a8 import errors

    shown = re.findall(r"^::: w8a8\.errors\.(\w+)$", (DOCS / "reference/errors.md").read_text(), re.M)
    family = [name for name, it in vars(errors).items() if isinstance(it, type) and issubclass(it, errors.W8A8Error)]
    assert sorted(shown) == sorted(family)


def test_tables_are_the_benchs_results():
    report = importlib.import_module("report")
    assert len(report.TABLES) == 4
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


def test_a_note_above_a_block_belongs_to_it(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("<!-- slow: many -->\n```python\na\n```\n\n```sh\nb\n```\n\n<!-- not run: c -->\n```sh\nc\n```\n")
    assert blocks(page) == [("python", "slow", "a\n"), ("sh", "", "b\n"), ("sh", "not run", "c\n")]
    assert commands(page) == ["b"]
