"""Texts written for many clients at once: `w8a8 serve` beside transformers' own server.

    python bench/serve.py [--model tinyllama-1.1b] [--clients 1,8,32,64] [--prompt 128] [--new 64]

Random weights in a model's shape, the tokenizer of the demo model, and no token that ends a text, so that each answer
has the length that was asked for.  The servers, each a process of its own and the only one at its time: `w8a8 serve` of
the int8 directory; `transformers serve` of the float one in bfloat16, as it is and with its continuous batching.  Each
count of clients sends its requests at once, twice, and the first time, which warms up, does not count.  What is told is
tokens a second of all clients together, and failed requests: an error, or an answer of another length.
"""

import argparse
import asyncio
import json
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
from typing import Any

import w8a8
from machine import describe_machine, keep
from model import MODELS
from w8a8.demo import demo_directory

PATIENCE_S = 600.0


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


def servers(float_directory: Path, int8_directory: Path) -> dict[str, tuple[list[str], str]]:
    """The command of each, without its port, and what it is asked for by name."""
    theirs = [sys.executable, "-m", "transformers.cli.transformers", "serve", str(float_directory)]
    theirs += ["--device", "cpu", "--dtype", "bfloat16"]
    return {
        "w8a8 serve": ([sys.executable, "-m", "w8a8", "serve", str(int8_directory)], str(int8_directory)),
        "transformers serve, bfloat16": (theirs, str(float_directory)),
        "the same with continuous batching": ([*theirs, "--continuous-batching"], str(float_directory)),
    }


@contextmanager
def running(command: list[str], log: Path) -> Iterator[str]:
    """The address of a server that answers.

    Raises:
        SystemExit: it ended, or does not answer in time.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = f"http://localhost:{port}"
    with open(log, "w") as told:
        process = subprocess.Popen([*command, "--port", str(port)], stdout=told, stderr=subprocess.STDOUT)
    try:
        until = time.monotonic() + PATIENCE_S
        while not _answers(address):
            if process.poll() is not None or time.monotonic() > until:
                raise SystemExit(f"{' '.join(command)} did not start:\n{log.read_text()[-2000:]}")
            time.sleep(0.5)
        yield address
    finally:
        process.terminate()
        process.wait(timeout=60)


def _answers(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"{address}/health", timeout=5) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, TimeoutError, ConnectionError):
        return False


async def _at_once(address: str, name: str, prompts: list[str], new: int) -> tuple[float, int]:
    """Seconds until all are answered, and how many were not."""
    from openai import AsyncOpenAI, OpenAIError

    async def one(client: AsyncOpenAI, prompt: str) -> bool:
        try:
            made = await client.completions.create(model=name, prompt=prompt, max_tokens=new, temperature=0)
        except OpenAIError as error:
            sys.stderr.write(f"{error}\n")
            return False
        return made.usage is not None and made.usage.completion_tokens == new

    client = AsyncOpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=PATIENCE_S)
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


def measure(name: str, counts: list[int], prompt: int, new: int) -> list[dict[str, Any]]:
    """A row for each server and count of clients."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        float_directory, int8_directory = Path(folder) / "float", Path(folder) / "int8"
        save(name, float_directory)
        w8a8.quantize_directory(float_directory, int8_directory)
        for server, (command, model) in servers(float_directory, int8_directory).items():
            with running(command, Path(folder) / "log") as address:
                for count in counts:
                    texts = prompts(count, prompt)
                    asyncio.run(_at_once(address, model, texts, new))
                    seconds, failed = asyncio.run(_at_once(address, model, texts, new))
                    rate = (count - failed) * new / seconds
                    rows.append({"model": name, "server": server, "clients": count, "rate": rate, "failed": failed})
                    sys.stdout.write(f"{name}, {server}, {count}: {rate:.0f} tokens/s, {failed} failed\n")
                    sys.stdout.flush()
    return rows


def table(result: dict[str, Any]) -> str:
    """Markdown, a row for each model and server."""
    counts = sorted({row["clients"] for row in result["rows"]})
    lines = ["| model | server | " + " | ".join(f"{count} clients" for count in counts) + " | failed |"]
    lines.append("|---|---|" + "---:|" * (len(counts) + 1))
    for model, server in dict.fromkeys((row["model"], row["server"]) for row in result["rows"]):
        rows = [row for row in result["rows"] if (row["model"], row["server"]) == (model, server)]
        rates = {row["clients"]: f"{row['rate']:.0f}" for row in rows}
        cells = [model, server, *(rates.get(count, "") for count in counts), str(sum(row["failed"] for row in rows))]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Measure, print and keep."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", default="tinyllama-1.1b", help=f"of {', '.join(MODELS)}, with commas between")
    parser.add_argument("--clients", default="1,8,32,64")
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--output", type=Path)
    asked = parser.parse_args()
    counts = [int(count) for count in asked.clients.split(",")]
    rows = [row for name in asked.model.split(",") for row in measure(name, counts, asked.prompt, asked.new)]
    result = {"machine": describe_machine(), "prompt": asked.prompt, "new": asked.new, "rows": rows}
    keep("serve", result, asked.output)
    sys.stdout.write(f"{table(result)}\n{json.dumps(result['machine'])}\n")


if __name__ == "__main__":
    main()
