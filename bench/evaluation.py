"""What evaluating costs beside the forward passes of both models that it cannot do without.

    python bench/evaluation.py [--tokens 16384] [--rounds 7]

The shipped OPT, float32 against w8a8, windows of 256, interleaved: the plain forwards of both models over all windows,
then `compare` of the same.  The vocabulary (2,048) is as large beside the model as it ever gets: 18 % of the
multiply-adds are in the head.  The ratio is the median over rounds.
"""

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import torch

import w8a8
from machine import describe_machine, keep
from w8a8.demo import corpus
from w8a8.demo.run import demo_model
from w8a8.evaluation import compare, encode

WINDOW = 256


@torch.inference_mode()
def measure(tokens: int, rounds: int) -> dict[str, Any]:
    """Seconds of both, round by round."""
    reference, model = demo_model(), demo_model()
    reference.model.to(torch.float32)
    model.model.to(torch.float32)
    w8a8.quantize(model.model)
    text = encode(reference.tokenizer, corpus.held_out_text()).first(tokens)
    plain, whole = [], []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        for begin in range(0, tokens, WINDOW):
            window = text.ids[None, begin : begin + WINDOW]
            model.model(input_ids=window, use_cache=False)
            reference.model(input_ids=window, use_cache=False)
        between = time.perf_counter()
        compare(model.model, reference.model, text, seq_len=WINDOW)
        plain.append(between - start)
        whole.append(time.perf_counter() - between)
    ratios = [b / a for a, b in zip(plain[1:], whole[1:], strict=True)]  # the first round warms up
    return {
        "machine": describe_machine(),
        "tokens": tokens,
        "window": WINDOW,
        "forwards_s": statistics.median(plain[1:]),
        "compare_s": statistics.median(whole[1:]),
        "ratio": statistics.median(ratios),
        "ratios": ratios,
    }


def text(result: dict[str, Any]) -> str:
    """The result as a sentence."""
    return (
        f"Comparing two models on {result['tokens']:,} tokens in windows of {result['window']} takes "
        f"{result['compare_s']:.2f} s, the plain forward passes of both {result['forwards_s']:.2f} s: "
        f"{result['ratio']:.2f} times as long (median of {len(result['ratios'])} rounds, interleaved; the shipped OPT)."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--output", type=Path, help="instead of bench/results/MACHINE/")
    arguments = parser.parse_args()
    result = measure(arguments.tokens, arguments.rounds)
    keep("evaluation", result, arguments.output)
    print(text(result))


if __name__ == "__main__":
    main()
