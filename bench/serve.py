"""Texts written for many clients at once: `w8a8 serve` beside other servers of OpenAI's API.

    python bench/serve.py [--model tinyllama-1.1b] [--cells 1x64,8x64,32x64,64x64] [--prompt 128] [--servers ours,...]
                          [--directory KEPT] [--peers PYTHON]

Random weights in a model's shape, the tokenizer of the demo model, and no token that ends a text, so that each answer
has the length that was asked for.  The servers, each a process of its own and the only one at its time: `w8a8 serve` of
the int8 directory, as it is and with the output head and the cache in int8 too; `transformers serve` of the float one
in bfloat16, as it is and with its continuous batching; llama-cpp-python's server of a Q8_0 file of the same shape
(gguf_peer.py), which PYTHON has, or it is left out.

A cell is so many clients that ask for so many tokens, all at once, after one request of each server's own has warmed it
up.  What is told is tokens a second of all clients together, by the clock and, since others may use the machine, by the
processor time of the server, for which OMP_NUM_THREADS=1 leaves out the waiting of threads; and failed requests: an
error, or an answer of another length.  A cell that takes longer than --limit seconds is left out, and so are those of
more clients.  Cells are kept as they come; those that were measured before stay, unless they are measured again.
"""

import argparse
import asyncio
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import psutil

import gguf_peer
import w8a8
from machine import describe_machine, keep, kept
from model import MODELS
from w8a8.demo import demo_directory

PATIENCE_S = 600.0
CELL = ("model", "server", "clients", "new")

Row: TypeAlias = dict[str, str | int | float]


def save(name: str, directory: Path) -> None:
    """Write the float model, in bfloat16, with a tokenizer and no end of texts."""
    import torch
    from transformers import AutoTokenizer

    torch.manual_seed(0)
    model = MODELS[name]().to(torch.bfloat16)
    for config in (model.config, model.generation_config):
        config.eos_token_id = config.bos_token_id = config.pad_token_id = None
    model.save_pretrained(directory)
    AutoTokenizer.from_pretrained(demo_directory()).save_pretrained(directory)


def prepared(name: str, folder: Path, peers: str | None) -> None:
    """Write the files that the servers serve, where they are not there yet."""
    if not (folder / "int8").exists():
        save(name, folder / "float")
        w8a8.quantize_directory(folder / "float", folder / "int8")
    if peers is not None and not (folder / "q8_0.gguf").exists():
        gguf_peer.write_gguf(folder / "q8_0.gguf", MODELS[name]().config, demo_directory() / "tokenizer.json")


def servers(folder: Path, peers: str | None) -> dict[str, tuple[str, list[str], str]]:
    """What each is called in the table, its command without the port, and what it is asked for by name."""
    ours = [sys.executable, "-m", "w8a8", "serve", str(folder / "int8")]
    theirs = [sys.executable, "-m", "transformers.cli.transformers", "serve", str(folder / "float")]
    theirs += ["--device", "cpu", "--dtype", "bfloat16"]
    found = {
        "ours": ("w8a8 serve", ours, str(folder / "int8")),
        "int8": ("w8a8 serve --head int8 --kv int8", [*ours, "--head", "int8", "--kv", "int8"], str(folder / "int8")),
        "batching": (
            "transformers serve, bfloat16, continuous batching",
            [*theirs, "--continuous-batching"],
            str(folder / "float"),
        ),
        "transformers": ("transformers serve, bfloat16", theirs, str(folder / "float")),
    }
    if peers is not None:
        file = str(folder / "q8_0.gguf")
        command = [peers, "-m", "llama_cpp.server", "--model", file, "--n_ctx", "1024", "--verbose", "false"]
        threads = str(len(os.sched_getaffinity(0)))
        found["llama.cpp"] = (
            "llama-cpp-python's server, Q8_0",
            [*command, "--n_threads", threads, "--n_threads_batch", threads],
            "q8_0",
        )
    return found


@contextmanager
def running(command: list[str], log: Path) -> Iterator[tuple[str, psutil.Process]]:
    """The address of a server that answers, and its process.

    Raises:
        SystemExit: it ended, or does not answer in time.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = f"http://localhost:{port}"
    hub = log.parent / "hub"
    hub.mkdir(exist_ok=True)  # transformers' server cannot name its models where there is no cache of a hub
    environment = os.environ | {"HF_HUB_CACHE": str(hub)}
    with open(log, "w") as told:
        process = subprocess.Popen(
            [*command, "--port", str(port)], stdout=told, stderr=subprocess.STDOUT, env=environment
        )
    try:
        until = time.monotonic() + PATIENCE_S
        while not _answers(address):
            if process.poll() is not None or time.monotonic() > until:
                raise SystemExit(f"{' '.join(command)} did not start:\n{log.read_text()[-2000:]}")
            time.sleep(0.5)
        yield address, psutil.Process(process.pid)
    finally:
        process.terminate()
        process.wait(timeout=60)


def processor_s(process: psutil.Process) -> float:
    """Processor time that a server has taken, and those that it started."""
    times = [each.cpu_times() for each in (process, *process.children(recursive=True))]
    return float(sum(each.user + each.system for each in times))


def _answers(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"{address}/v1/models", timeout=5) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, TimeoutError, ConnectionError):
        return False


async def _at_once(address: str, name: str, prompts: list[str], new: int, limit: float) -> tuple[float, int]:
    """Seconds until all are answered, and how many were not; who waits longer than the limit goes away."""
    from openai import AsyncOpenAI, OpenAIError

    async def one(client: AsyncOpenAI, prompt: str) -> bool:
        try:
            made = await client.completions.create(model=name, prompt=prompt, max_tokens=new, temperature=0)
        except OpenAIError as error:
            sys.stderr.write(f"{error}\n")
            return False
        return made.usage is not None and made.usage.completion_tokens == new

    client = AsyncOpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=limit)
    began = time.perf_counter()
    good = await asyncio.gather(*(one(client, prompt) for prompt in prompts))
    seconds = time.perf_counter() - began
    await client.close()
    return seconds, good.count(False)


def prompts(count: int, tokens: int) -> list[str]:
    """Texts of about so many tokens, each another."""
    from transformers import AutoTokenizer

    from w8a8.demo.corpus import held_out_text

    tokenizer = AutoTokenizer.from_pretrained(demo_directory())
    text = held_out_text()
    starts = range(0, count * 31, 31)
    return [tokenizer.decode(tokenizer(text[start : start + 8 * tokens])["input_ids"][:tokens]) for start in starts]


def measure(asked: argparse.Namespace, name: str, folder: Path) -> Iterator[Row]:
    """The cells of each server as they come."""
    known = servers(folder, asked.peers)
    for short in asked.servers.split(",") if asked.servers else known:
        title, command, model = known[short]
        with running(command, folder / "log") as (address, process):
            asyncio.run(_at_once(address, model, prompts(1, asked.prompt), 4, PATIENCE_S))
            for clients, new in asked.cells:
                before = processor_s(process)
                seconds, failed = asyncio.run(
                    _at_once(address, model, prompts(clients, asked.prompt), new, asked.limit)
                )
                if seconds > asked.limit:
                    sys.stdout.write(f"{name}, {title}, {clients} x {new}: not within {asked.limit:.0f} s\n")
                    break
                rate = (clients - failed) * new / seconds
                computed = (clients - failed) * new / (processor_s(process) - before)
                told = f"{rate:.1f} tokens/s, {computed:.1f} a second of its processor time, {failed} failed"
                sys.stdout.write(f"{name}, {title}, {clients} x {new}: {told}\n")
                sys.stdout.flush()
                yield {
                    "model": name,
                    "server": title,
                    "clients": clients,
                    "new": new,
                    "rate": rate,
                    "by_processor": computed,
                    "failed": failed,
                }


def table(result: dict[str, Any]) -> str:
    """Markdown, a row for each model and server, a column for each count of clients and of tokens."""
    cells = sorted({(row["clients"], row["new"]) for row in result["rows"]})
    lines = ["| model | server | " + " | ".join(f"{count} x {new}" for count, new in cells) + " | failed |"]
    lines.append("|---|---|" + "---:|" * (len(cells) + 1))
    for model, server in dict.fromkeys((row["model"], row["server"]) for row in result["rows"]):
        rows = [row for row in result["rows"] if (row["model"], row["server"]) == (model, server)]
        rates = {(row["clients"], row["new"]): _rates(row) for row in rows}
        shown = [rates.get(cell, "") for cell in cells]
        lines.append("| " + " | ".join([model, server, *shown, str(sum(row["failed"] for row in rows))]) + " |")
    return "\n".join(lines)


def _rates(row: Row) -> str:
    """By the clock, and by the processor time where that was measured."""
    by_clock = f"{row['rate']:.1f}"
    return f"{by_clock}, {row['by_processor']:.1f}" if "by_processor" in row else by_clock


def _cells(text: str) -> list[tuple[int, int]]:
    found = [cell.split("x") for cell in text.split(",")]
    return [(int(clients), int(new)) for clients, new in found]


def main() -> None:
    """Measure, print and keep."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", default="tinyllama-1.1b", help=f"of {', '.join(MODELS)}, with commas between")
    parser.add_argument("--cells", default="1x64,8x64,32x64,64x64", type=_cells, help="clients x new tokens")
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--servers", help="some of them, by what `servers` calls them; by default all")
    parser.add_argument("--limit", type=float, default=240.0, help="seconds that a cell may take")
    parser.add_argument("--directory", type=Path, help="where the models are kept; by default nowhere")
    parser.add_argument("--peers", help="a Python that has llama_cpp with its server")
    parser.add_argument("--output", type=Path)
    asked = parser.parse_args()
    before = {} if asked.output else kept("serve")
    rows = list(before.get("rows", [])) if before.get("prompt") == asked.prompt else []
    with tempfile.TemporaryDirectory() as folder:
        for name in asked.model.split(","):
            own = (asked.directory or Path(folder)) / name
            own.mkdir(parents=True, exist_ok=True)
            prepared(name, own, asked.peers)
            for row in measure(asked, name, own):
                cell = [row[key] for key in CELL]
                rows = [other for other in rows if [other.get(key) for key in CELL] != cell] + [row]
                result = {"machine": describe_machine(), "prompt": asked.prompt, "rows": rows}
                keep("serve", result, asked.output)
    sys.stdout.write(f"{table(result)}\n{json.dumps(result['machine'])}\n")


if __name__ == "__main__":
    main()
