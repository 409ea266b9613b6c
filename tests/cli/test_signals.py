"""A command that is told to end by a signal: nothing half done is left, and the signal is what ended it."""

import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import transformers as t

from tests.sentences import bert, write

ROOT = Path(__file__).parents[2]
WAITS = """
import os, pathlib, signal, sys, time
from w8a8.cli import main
from w8a8.cli.commands import app

signal.signal(signal.SIGHUP, getattr(signal, sys.argv.pop(1)))

@app.command()
def wait(part: pathlib.Path):
    try:
        part.touch()
        if os.environ.get("ENDS_A_CHILD"):
            there, here = os.pipe()
            child = os.fork()
            if not child:
                os.write(here, b".")  # a signal that comes while Python forks is lost
                time.sleep(60)
                os._exit(0)  # whatever is behind is the parent's
            os.read(there, 1)
            os.kill(child, signal.SIGTERM)
            print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
        print("begun", flush=True)
        time.sleep(60 if sys.stdin.read(1) else 0)
    finally:
        part.unlink()

main()
"""
EMBEDS = """
import sys
from w8a8.embedding import vectors
add = vectors.Rows.add
def waits(self, found):
    add(self, found)
    self._file.flush()
    print("begun", flush=True)
    sys.stdin.read()
vectors.Rows.add = waits
from w8a8.cli import main
main()
"""


def started(code, *arguments, says=("begun",)):
    pipe = subprocess.PIPE
    command = [sys.executable, "-c", code, *map(str, arguments)]
    process = subprocess.Popen(command, cwd=ROOT, stdin=pipe, stdout=pipe, stderr=pipe, text=True)
    for line in says:
        assert process.stdout.readline() == f"{line}\n"
    return process


@pytest.mark.skipif(sys.platform == "win32", reason="there are no such signals")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_command_that_is_told_to_end_undoes_what_it_began(number, tmp_path):
    process = started(WAITS, "SIG_DFL", "wait", tmp_path / "part")
    assert list(tmp_path.iterdir())
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (-number, "")
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(sys.platform == "win32", reason="there are no such signals")
def test_a_signal_that_is_ignored_stays_so(tmp_path):
    process = started(WAITS, "SIG_IGN", "wait", tmp_path / "part")
    process.send_signal(signal.SIGHUP)
    process.communicate(timeout=60)
    assert process.returncode == 0


@pytest.mark.skipif(sys.platform == "win32", reason="there are no such signals")
def test_a_child_of_fork_is_ended_by_the_signal_and_undoes_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("ENDS_A_CHILD", "1")
    process = started(WAITS, "SIG_DFL", "wait", tmp_path / "part", says=(-signal.SIGTERM, "begun"))
    assert (tmp_path / "part").exists()
    process.communicate(timeout=60)
    assert process.returncode == 0


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="there are no such signals")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_nothing_is_left_of_vectors_whose_writing_was_ended(number, tmp_path):
    model = write(tmp_path / "plain", t.AutoModel, bert())
    (tmp_path / "texts.txt").write_text("snow\nwind")
    np.save(tmp_path / "vectors.npy", np.zeros(3, np.float32))
    before = {path.name for path in tmp_path.iterdir()}
    options = ("--text", tmp_path / "texts.txt", "-o", tmp_path / "vectors.npy", "--overwrite")
    process = started(EMBEDS, "embed", model, *options)
    assert {path.suffix for path in tmp_path.iterdir() if path.name not in before} == {".part"}
    process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode == -number
    assert {path.name for path in tmp_path.iterdir()} == before
    assert np.load(tmp_path / "vectors.npy").shape == (3,)
