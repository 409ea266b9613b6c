"""What new memory costs a prompt in eager transformers, and how to have it back.

    python bench/allocator.py [--rounds 3]

glibc gives large blocks back to the system when they are freed, and takes them anew for the next tensor, whose pages
then have to be cleared and mapped again; in eager mode every operation makes a tensor.  Two environment variables make
it keep them.  TinyLlama's shape, our int8 layers, a prompt of 512 tokens; processes with and without the variables take
turns.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time

import torch

import w8a8
from machine import describe_machine, keep
from model import PREFILL, tinyllama

KEEP = {"MALLOC_MMAP_THRESHOLD_": str(1 << 30), "MALLOC_TRIM_THRESHOLD_": str(16 << 30)}


@torch.inference_mode()
def tokens_per_second() -> float:
    """Of reading a prompt; the median of five."""
    torch.manual_seed(0)
    model = w8a8.quantize(tinyllama().eval(), head="int8").model
    ids = torch.randint(0, model.config.vocab_size, (1, PREFILL))
    seconds = []
    for _ in range(6):
        start = time.perf_counter()
        model(input_ids=ids, use_cache=False, logits_to_keep=1)
        seconds.append(time.perf_counter() - start)
    return PREFILL / statistics.median(seconds[1:])


def measured(environment: dict[str, str]) -> float:
    command = [sys.executable, __file__, "--child"]
    return float(
        subprocess.run(command, env=os.environ | environment, capture_output=True, check=True, text=True).stdout
    )


def text(result: dict[str, object]) -> str:
    """One sentence for the page."""
    plain, kept = result["tok_per_s"], result["kept_tok_per_s"]
    settings = " ".join(f"{name}={value}" for name, value in KEEP.items())
    return (
        f"A prompt of {PREFILL} tokens, TinyLlama's shape, ours with the int8 head: {plain:.0f} tokens per second, and "
        f"{kept:.0f} with `{settings}` in the environment, which makes glibc keep the memory of large tensors; "
        "processes in turn, medians (bench/allocator.py)."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(tokens_per_second())
        return
    rates = [(measured({}), measured(KEEP)) for _ in range(arguments.rounds)]
    plain, kept = (statistics.median(rate) for rate in zip(*rates, strict=True))
    result = {"machine": describe_machine(), "tok_per_s": plain, "kept_tok_per_s": kept, "rates": rates}
    keep("allocator", result)
    print(text(result))


if __name__ == "__main__":
    main()
