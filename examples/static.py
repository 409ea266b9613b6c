"""Calibrate static scales with and without smoothing, and see which model is nearer to the float one.

python examples/static.py [MODEL [TEXT]]     by default the shipped model and docstrings of the standard library
"""

import sys
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

import w8a8
from w8a8.demo import demo_directory, held_out_text, training_text
from w8a8.evaluation import compare, encode


def main(name: str = str(demo_directory()), text: str | None = None) -> None:
    content = training_text() if text is None else Path(text).read_text()
    tokenizer = AutoTokenizer.from_pretrained(name)
    reference = AutoModelForCausalLM.from_pretrained(name, dtype="float32")
    calibration = w8a8.Calibration.of(content.split("\n\n"), tokenizer, samples=8, length=128, seed=0)
    heldout = encode(tokenizer, held_out_text()).first(1024)
    for smooth in ("none", "searched"):
        model = AutoModelForCausalLM.from_pretrained(name, dtype="float32")
        w8a8.quantize(model, "w8a8-static", calibration=calibration, smooth=smooth)
        found = compare(model, reference, heldout, seq_len=128)
        print(f"smooth={smooth}: KL {found.kl_nats.mean:.5f} nats a token, {found.verdict}")


if __name__ == "__main__":
    main(*sys.argv[1:])
