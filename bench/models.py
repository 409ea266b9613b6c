"""Try every model type of transformers that can be built here, small and random, with all that this package does.

python bench/models.py [--jobs 2] [--only TYPE ...] [--failing]

Each type has a process of its own, forked from one that has imported what all need, and a minute.  A row says by which
source of this package it was made, and is kept where that is the one at hand: the same call goes on where it was
stopped.  --failing tries no others than those that did not pass.
"""

import argparse
import functools
import hashlib
import json
import multiprocessing
import os
import resource
import signal
import time
import warnings
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"

import torch
import transformers

import w8a8
from machine import describe_machine
from zoo.build import types
from zoo.page import page
from zoo.trials import UNTRIED, failures, row_of, tried

RESULT = Path(__file__).parent / "results" / "models.json"
PAGE = Path(__file__).parents[1] / "docs" / "models.md"
SECONDS = 60
"""Of processor time that one model type may take; on a busy machine it may wait ten times as long."""

WARM = ("llama", "t5", "vit", "whisper")
"""Tried before the first process is forked."""


def sweep(wanted: list[str], known: dict[str, Any], jobs: int) -> None:
    """Try these types, and write what came of it after each."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for model_type in WARM:  # else each process would import the same things, which takes longer than the trial
            row_of(model_type)
    fork = multiprocessing.get_context("fork")
    waiting, running = list(reversed(wanted)), {}
    while waiting or running:
        while waiting and len(running) < jobs:
            model_type = waiting.pop()
            ours, theirs = fork.Pipe(duplex=False)
            process = fork.Process(target=_child, args=(model_type, theirs))
            process.start()
            theirs.close()
            running[ours] = model_type, process, time.monotonic() + 10 * SECONDS
        patience = min(end for _, _, end in running.values()) - time.monotonic()
        done = wait(list(running), timeout=max(0.0, patience))
        for ours, (model_type, process, end) in list(running.items()):
            if ours not in done and time.monotonic() < end:
                continue
            row = _answer(ours) if ours in done else {"died": f"not done within {10 * SECONDS} s"}
            process.kill() if row is None or ours not in done else None
            process.join()
            if row is None:
                row = {"died": f"the process ended with {_ending(process.exitcode)}"}
            del running[ours]
            known[model_type] = {"cls": types()[model_type], "source": source(), **row}
            _write(known)
            print(f"{len(known):4} {model_type}: {_short(known[model_type])}", flush=True)


def _child(model_type: str, out: Any) -> None:
    silent = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silent, 1)
    os.dup2(silent, 2)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    out.send(row_of(model_type))
    out.close()


def _answer(ours: Any) -> dict[str, Any] | None:
    try:
        return dict(ours.recv())
    except EOFError:
        return None


def _ending(code: int | None) -> str:
    return signal.Signals(-code).name if code is not None and code < 0 else f"status {code}"


def _short(row: dict[str, Any]) -> str:
    told = {k: row[k] for k in UNTRIED if k in row}
    return str(told or failures(row) or "passes")


def _write(known: dict[str, Any]) -> None:
    head = (
        {"machine": describe_machine()}
        if not RESULT.exists()
        else {"machine": json.loads(RESULT.read_text())["machine"]}
    )
    partial = RESULT.with_suffix(".partial")
    partial.write_text(json.dumps({**head, "models": dict(sorted(known.items()))}, indent=1) + "\n")
    partial.replace(RESULT)


@functools.cache
def source() -> str:
    """A digest of this package as it is imported, to tell rows of another by."""
    digest = hashlib.sha256()
    for path in sorted(Path(w8a8.__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def main() -> None:
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--only", nargs="+")
    parser.add_argument("--failing", action="store_true")
    asked = parser.parse_args()
    transformers.logging.set_verbosity(50)
    transformers.utils.logging.disable_progress_bar()
    known = json.loads(RESULT.read_text())["models"] if RESULT.exists() else {}
    known = {name: row for name, row in known.items() if name in types()}
    old = [name for name in types() if known.get(name, {}).get("source") != source()]
    passing = {name for name, row in known.items() if tried(row) and not failures(row)}
    wanted = [
        name
        for name in sorted(old, key=lambda name: (name in passing, name in known, name))
        if name not in passing or not asked.failing
    ]
    sweep(asked.only or wanted, known, asked.jobs)
    PAGE.write_text(page(json.loads(RESULT.read_text())))


if __name__ == "__main__":
    main()
