"""Make docs/performance.md, and the tables of the README and of docs/explanation/evidence.md, from bench/results/.

python bench/report.py
"""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import account
import allocator
import blocks
import cache
import calibration
import contexts
import demo
import embed
import encoders
import evaluation
import experts
import layout
import linear
import loading
import model
import overhead
import sensitivity
import serve
import smoothing
import smoothing_peer
import streaming
import together
import vllm_peer
from machine import results_of

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "performance.md"
TABLES = (
    (ROOT / "README.md", demo),
    (ROOT / "README.md", model),
    (ROOT / "docs" / "explanation" / "evidence.md", vllm_peer),
    (ROOT / "docs" / "howto" / "long-contexts.md", cache),
)
"""Pages written by hand, and whose table is in each."""
_HEAD = """# Performance

Made by `bench/report.py` from bench/results/, where the scripts of bench/ put what they measured, each machine in a
folder of its own; nothing here is written by hand. A table is of the machine that stands above it. A ratio is the
peer's time divided by ours: above 1x, ours is faster. Medians of interleaved calls in one process, llama.cpp's
excepted, which has its own.

"""


def page() -> str:
    """The whole page: section by section what was measured, machine by machine, the newest first."""
    return _HEAD + "\n".join(
        "\n".join([f"## {title}\n", *(_where(result) + section(result) for result in results_of(script))])
        for script, title, section in SECTIONS
    )


def _layers(result: dict[str, Any]) -> str:
    return (
        "Geometric means of the ratios over the nine shapes, by rows. torch.ao's layers quantise activations per "
        "tensor, which is less work; torchao's per token; quanto's are calibrated; `torch_cpu` is our own fallback. "
        "torchao compiled is torch.compile with freezing and max-autotune, a graph for each cell. At the ceiling: how "
        "many times as fast as the best int8 peer a kernel would be that took no longer than the product alone, or the "
        "read of the weights alone, whichever is longer, at 100 % of what this machine does.\n\n"
        + linear.summary(result)
        + "\n\nEvery cell. The ceiling is that of int8 products in registers from 16 rows up, and of a plain read of "
        "memory below; more than 100 % means that weights stayed in a cache.\n\n" + linear.table(result) + "\n"
    )


def _models(result: dict[str, Any]) -> str:
    notes = {
        "torchao compiled": "Compiled models run transformers' StaticCache of 320 tokens under torch.compile, with "
        "freezing and max-autotune, in one graph.",
        model.LLAMA_CPP: "llama.cpp has no OPT: its column there is GPT-2's architecture with the same matrices. Its "
        "cache is float16.",
    }
    notes = {name: note for name, note in notes.items() if name in result["variants"]}
    ours = next(name for name in (*model.CACHED, "ours, int8 head") if name in result["variants"])
    return (
        "Eager and with transformers' growing cache where nothing else is said; all after a prompt of 256 tokens, all "
        "with as many tokens in the cache. "
        + " ".join(notes.values()).strip()
        + "\n\n"
        + model.table(result)
        + f"\n\n`{ours}` makes this many times as many tokens in a second as each of the others:\n\n"
        + model.ratios(result, ours)
        + "\n"
    )


def _encoders(result: dict[str, Any]) -> str:
    return (
        "Random weights, one thread, processor time. Here a ratio is float32's time divided by that of the column, and "
        "the last line of a model the least cosine of a token's output to float32's of all cells. torch.ao is dynamic, "
        "its activations per tensor; ONNX Runtime dynamic, weights per channel; OpenVINO quantised by NNCF, static "
        "activations. `fused` is `w8a8.optimize`. `mixed` is eight texts of 16 to 128 tokens, padded; of pictures and "
        "sound a cell is a batch. Compiled, by inductor, takes minutes and was measured of one model.\n\n"
        + encoders.table(result)
        + "\n\n"
        + "\n\n".join(encoders.summary(result, ours) for ours in ("ours fused", "ours asym fused"))
        + "\n"
    )


def _embedding(result: dict[str, Any]) -> str:
    return (
        f"{embed.said(result)} The model is opened before the clock runs. Tables in int8 take no longer: what lies "
        "between the last two rows is noise. OpenVINO's activations were calibrated on random tokens, which costs its "
        f"vectors, and no time.\n\n{embed.table(result)}\n"
    )


def _serving(result: dict[str, Any]) -> str:
    said = (
        "Tokens a second of all clients together, by the clock, and by the processor time of all threads of the server "
        f"where that was measured; {result['prompt']} tokens in for each. A column is so many clients by so many "
        "tokens out; an empty cell was not measured, or took longer than four minutes. llama-cpp-python's server "
        "answers one request after another. Opt-125m was measured before attention of many clients was one native call."
    )
    return f"{said}\n\n{serve.table(result)}\n"


def _tokens(result: dict[str, Any]) -> str:
    calls = ", ".join(f"{name} {us:.1f} us" for name, us in result["calls_us"].items())
    sizes = ", ".join(
        f"{r['model']} {r['linear_layers']} layers, {r['code_mb']:.0f} MB of codes" for r in result["models"]
    )
    return (
        f"Decoding, batch 1, eager, head in int8 ({sizes}). The parts come from torch.profiler, in a run whose "
        "linear layers are stubs.\n\n"
        + overhead.table(result)
        + f"\n\nA call whose product is next to nothing (32 x 64, one row): {calls}.\n"
    )


def _account(result: dict[str, Any]) -> str:
    clock = "processor time of the one thread" if result["clock"] == "processor" else "time of the wall"
    return (
        f"Decoding, batch 1, eager, head in int8, after a context of random keys and values; {clock}, medians. Clocks "
        "run around each part in one of two tokens; the parts add up to so much of a token without clocks. "
        "`int8` is `w8a8.set_cache(model)`; `int8, dequantised` the same cache with PyTorch's attention.\n\n"
        + account.table(result)
        + "\n"
    )


def _contexts(result: dict[str, Any]) -> str:
    return (
        "Tokens a second of all sequences together, and in brackets, where it was measured, what has to be read for "
        "them beside a plain read of memory: the codes of all layers once, and keys and values. Random weights, head "
        "in int8; rows of fewer layers are of the first ones. Compiled is `torch.compile` with transformers' "
        "StaticCache and our attention, `compiled, sdpa` with transformers'. llama.cpp has no OPT: its column there is "
        "GPT-2's architecture with the same matrices. The last column is the best of ours beside llama.cpp. With one "
        "thread all clocks are of processor time.\n\n" + contexts.table(result) + "\n"
    )


def _together(result: dict[str, Any]) -> str:
    return (
        "The first layers of a shape, decoding, batch 1, after 256 tokens in blocks; beside the model as it is. `in "
        "one call`: layers that read the same tensor, their input quantised once, with no check at all. `no norms`: "
        "norms that do nothing. One thread by its processor time, two by the wall.\n\n" + together.table(result) + "\n"
    )


def _caches(result: dict[str, Any]) -> str:
    clock = "processor time of the one thread" if result["clock"] == "processor" else "time of the wall"
    return (
        "What a model says with keys and values in blocks or in int8, beside itself with transformers' cache; 95 % "
        "intervals, paired by windows. Both models are tiny, the second with heads of 8 elements, a scale for each. "
        "Below each where it comes from: rounded as floats, values alone, keys in three other ways, and keys alone as "
        "`int8` has them.\n\n"
        + cache.table(result, every=True)
        + f"\n\nA Llama of four layers writes from its first token on; {clock} beside transformers' cache for the same "
        f"tokens, medians of {cache.STRETCH}. Drawn with the same random numbers: {cache.text(result)}.\n\n"
        + cache.speeds(result)
        + "\n"
    )


def _memory(result: dict[str, Any]) -> str:
    return allocator.text(result) + "\n"


def _layouts(result: dict[str, Any]) -> str:
    return (
        "Our kernel on packed panels against oneDNN's product on row-major weights between our own quantiser and "
        "epilogue, in C on both sides, with the same bits; geometric means over the shapes, its time divided by ours. "
        "Row-major weights could stay the file's mapping, and oneDNN's product could be preferred for some rows, "
        "if either were faster. Quantising is shown as a share of our layer's time: q, k and v read the same tensor, "
        "and so do gate and up, so sharing would save two thirds of that share in three layers of a block, half in "
        "two.\n\n"
        + layout.summary(result)
        + f"\n\nNot compared: {layout.not_compared(result) or 'nothing.'}\n\n"
        + layout.table(result)
        + "\n"
    )


def _calibrating(result: dict[str, Any]) -> str:
    return (
        f"One batch of {calibration.LENGTH} tokens through four layers of OPT-125m's widths, with statistics on the "
        "input of every linear layer; the ratio is the median over batches. The peak is what the process holds at most "
        "over what it held before, in a process of its own for each cell, two layers, batches of "
        f"{calibration.MEMORY_LENGTH} tokens.\n\n" + calibration.table(result) + "\n"
    )


def _smoothing(result: dict[str, Any]) -> str:
    return (
        "Perplexities; 8 bits run in integers, 6 and 4 bits are simulated; calibration and evaluation text are "
        "disjoint. `auto` searches alpha for each group.\n\n" + smoothing.tables(result) + "\n"
    )


def _smoothing_peer(result: dict[str, Any]) -> str:
    versions = result["machine"]
    return (
        f"llm-compressor {versions['llmcompressor']}, compressed-tensors {versions['compressed-tensors']}; the same "
        "model and batches, a process for each line, one thread. How far smoothing alone changed the float logits "
        "(relative norm) says whether it kept the function. The random Gemma-3 stores its norm weights less one.\n\n"
        + smoothing_peer.table(result)
        + "\n"
    )


def _evaluation(result: dict[str, Any]) -> str:
    return evaluation.text(result) + "\n"


def _loading(result: dict[str, Any]) -> str:
    text = (
        f"TinyLlama's shape, {result['bytes'] / 1e9:.2f} GB in int8 with float embeddings, in the page cache; a "
        "process for each opening, in turn; medians, and the range. Memory is the peak resident size over that after "
        "the imports; pages of mapped files are in it, which processes share. transformers decompresses at the first "
        "forward, of one token, which is in its time. New memory has to be cleared, here behind a hypervisor: whatever "
        "makes a copy pays for that.\n\n" + loading.table(result) + "\n"
    )
    if "float_ways" not in result:  # measured before they were
        return text
    return (
        text + f"\nThe same model in bfloat16, {result['float_bytes'] / 1e9:.2f} GB, opened and run on one token. The "
        "float pages that were read stay mapped and are in these figures, though the system may take them back at any "
        "time; what is allocated is the int8 weights and room for one float weight.\n\n"
        + loading.quantising_table(result)
        + "\n"
    )


def _streaming(result: dict[str, Any]) -> str:
    return streaming.text(result) + "\n\n" + streaming.table(result) + "\n"


def _blocks(result: dict[str, Any]) -> str:
    return (
        "`quantize --stream --calib` beside `w8a8.quantize` and `save` in memory, each a process of its own. "
        "`before` is w8a8 as it compared each fold of a block alone and searched in float. Files in memory: the result "
        "and the activations that pass from block to block, on a file system without a disk. Other work ran "
        "meanwhile, so that the processor's time is the one to compare.\n\n" + blocks.table(result) + "\n"
    )


def _experts(result: dict[str, Any]) -> str:
    told = (
        "Tokens per second through one layer of experts, its router with it (bench/experts.py): transformers' loop "
        "over the experts that are hit (eager), its grouped product, which is its default, and ours. Every call has "
        "other random tokens. Variants in turn, medians.\n\n"
    )
    return told + experts.table(result) + "\n"


def _where(result: dict[str, Any]) -> str:
    machine = result["machine"]
    threads = machine["cores, and threads torch uses"].rpartition(" ")[2]
    versions = {name: machine[name] for name in ("torch", "transformers")} | result.get("versions", {})
    return (
        f"{machine['processor']}, {machine['native kernel runs']}, {threads} threads, a shared and noisy machine; "
        f"{', '.join(f'{name} {version}' for name, version in versions.items())}; {machine['date']}.\n\n"
    )


def _sensitivity(result: dict[str, Any]) -> str:
    return "`w8a8.sensitivity` on the shipped model and held-out text. " + sensitivity.summary(result) + "\n"


SECTIONS: tuple[tuple[str, str, Callable[[dict[str, Any]], str]], ...] = (
    ("linear", "One linear layer, float32 in and out, through `QuantLinear.forward`", _layers),
    ("model", "A whole model in transformers, random weights, tokens per second", _models),
    ("encoders", "Encoders beside other runtimes", _encoders),
    ("embed", "Texts of a file into vectors", _embedding),
    ("serve", "Texts for many clients at once", _serving),
    ("overhead", "Where a token's time goes", _tokens),
    ("account", "Where a token's time goes, by context and cache", _account),
    ("contexts", "Decoding after short and long contexts", _contexts),
    ("cache", "Keys and values in blocks and in int8", _caches),
    ("together", "Layers that read the same tensor, in one call", _together),
    ("allocator", "New memory", _memory),
    ("layout", "Packed or row-major, our tile or oneDNN's product", _layouts),
    ("calibration", "Calibrating", _calibrating),
    ("smoothing", "Smoothing", _smoothing),
    ("smoothing_peer", "Smoothing beside llm-compressor", _smoothing_peer),
    ("loading", "Opening a W8A8 directory", _loading),
    ("evaluation", "Evaluating", _evaluation),
    ("sensitivity", "Which layers matter", _sensitivity),
    ("streaming", "Bigger than memory", _streaming),
    ("blocks", "Block by block", _blocks),
    ("experts", "Experts", _experts),
)
"""Of the page: whose results, under which heading, and what is said of one machine's."""


def with_table(text: str, table: str) -> str:
    """The text with its one table that has the same first two headings replaced by this one."""
    headings = "|".join(table.split("|")[:3]) + "|"
    lines = text.split("\n")
    (first,) = [i for i, line in enumerate(lines) if line.startswith(headings)]
    last = next(i for i in range(first, len(lines)) if not lines[i].startswith("|"))
    return "\n".join([*lines[:first], *table.split("\n"), *lines[last:]])


def table_of(script: ModuleType) -> str:
    """The table of a script's newest results."""
    return str(script.table(results_of(script.__name__)[0]))


def main() -> None:
    PAGE.write_text(page())
    for path, script in TABLES:
        table, text = table_of(script), path.read_text()
        if table not in text:
            path.write_text(with_table(text, table))
    print(f"wrote {PAGE} and the tables of {', '.join(sorted({path.name for path, _ in TABLES}))}")


if __name__ == "__main__":
    main()
