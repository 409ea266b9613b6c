"""Whether a server's memory stays flat: its resident size while many clients ask it, requests after requests.

    python bench/serve_memory.py DIR [--warm 2000] [--requests 10000] [--every 1000] [--clients 16]

DIR is served by `w8a8 serve` in a process of its own.  Requests are of texts that never come twice, of 1 to 120 words,
one to four in a request; each tenth is a mistake, which is answered with 400, and after fifty a client opens a new
connection.  An embedder is asked for vectors, a language model for eight tokens.
"""

import argparse
import http.client
import json
import random
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from machine import describe_machine, keep, kept
from serve import running
from w8a8.checkpoint.beside import class_around

WORDS = [f"{first}{last}" for first in ("b", "c", "d", "f", "gr", "l") for last in ("at", "oat", "ird", "ish", "een")]
CONNECTION = 50
"""Requests over one connection."""

TIMEOUT_S = 120
"""Of a request."""


def request(draw: random.Random, number: int, *, embeds: bool) -> tuple[str, dict[str, Any], int]:
    """A path, a body, and the status that it is to be answered with."""
    texts = [" ".join(draw.choices(WORDS, k=draw.randint(1, 120))) for _ in range(draw.randint(1, 4))]
    bad = number % 10 == 9
    status = 400 if bad else 200
    if embeds:
        named = [f"{text} {number}" for text in texts]
        return "/v1/embeddings", {"input": 5 if bad else named, "truncate": True}, status
    return "/v1/completions", {"prompt": 5 if bad else texts[0][:200], "max_tokens": 8}, status


def ask(port: int, numbers: Sequence[int], failed: list[str], *, embeds: bool) -> None:
    """One client's requests, one after another; what is not answered as it is to be is told."""
    draw = random.Random(numbers[0])
    connection = http.client.HTTPConnection("localhost", port, timeout=TIMEOUT_S)
    for place, number in enumerate(numbers):
        if place % CONNECTION == 0:
            connection.close()  # and the next request opens it anew
        path, body, status = request(draw, number, embeds=embeds)
        try:
            connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
            answer = connection.getresponse()
            told = answer.read()
        except (OSError, http.client.HTTPException) as error:
            failed.append(repr(error))
            connection.close()
            continue
        if answer.status != status:
            failed.append(f"{answer.status}: {told[:200]!r}")
    connection.close()


def residents(directory: Path, marks: Sequence[int], *, clients: int = 16) -> tuple[list[int], list[str]]:
    """The resident bytes of a server when it has answered so many requests, and what was not answered as it is to be.

    Args:
        directory: Of an embedder or of a language model.
        marks: Counts of requests, ascending.
    """
    embeds = class_around(directory) == "SentenceTransformer"
    found: list[int] = []
    failed: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "w8a8", "serve", str(directory)]
        with running(command, Path(folder) / "log") as (address, server):
            port, done = int(address.rpartition(":")[2]), 0
            for mark in marks:
                numbers = range(done, mark)
                threads = [
                    threading.Thread(target=ask, args=(port, numbers[i::clients], failed), kwargs={"embeds": embeds})
                    for i in range(clients)
                ]
                for thread in threads:
                    thread.start()
                for thread in threads:
                    thread.join()
                done = mark
                found.append(server.memory_info().rss)
                sys.stdout.write(f"{mark} requests: {found[-1] / 1e6:.1f} MB\n")
                sys.stdout.flush()
    return found, failed


def main() -> None:
    """Measure, print and keep."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("directory", type=Path, metavar="DIR")
    parser.add_argument("--name", help="what it is called in the result; by default the name of its directory")
    parser.add_argument("--warm", type=int, default=2000)
    parser.add_argument("--requests", type=int, default=10000, help="after those")
    parser.add_argument("--every", type=int, default=1000)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--output", type=Path)
    asked = parser.parse_args()
    marks = [asked.warm, *range(asked.warm + asked.every, asked.warm + asked.requests + 1, asked.every)]
    began = time.perf_counter()
    found, failed = residents(asked.directory, marks, clients=asked.clients)
    row = {"marks": marks, "rss_bytes": found, "failed": len(failed), "seconds": time.perf_counter() - began}
    result: dict[str, Any] = {} if asked.output else kept("serve_memory")
    rows = result.get("rows", {}) | {asked.name or asked.directory.name: row}
    keep("serve_memory", {"machine": describe_machine(), "clients": asked.clients, "rows": rows}, asked.output)
    for told in failed[:5]:
        sys.stdout.write(f"failed: {told}\n")


if __name__ == "__main__":
    main()
