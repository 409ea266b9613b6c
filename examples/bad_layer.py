"""Find the layers that cost a model's predictions most, leave the worst in float, and see what that gains.

python examples/bad_layer.py [MODEL [TEXT]]     by default the shipped model and docstrings of the standard library
"""

import sys
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

import w8a8
from w8a8.demo import demo_directory, held_out_text
from w8a8.evaluation import compare, encode


def main(name: str = str(demo_directory()), text: str | None = None) -> None:
    reference = AutoModelForCausalLM.from_pretrained(name, dtype="float32")
    ids = encode(AutoTokenizer.from_pretrained(name), held_out_text() if text is None else Path(text).read_text())
    found = w8a8.sensitivity(reference, ids, "w8a8", windows=1, seq_len=64)
    for layer in found.worst(3):
        print(f"{layer.name}: KL {layer.kl_alone:.2e} nats a token alone, output {layer.output_sqnr_db:.1f} dB")

    worst = found.worst(1)[0].name
    for schemes in ({"*": "w8a8"}, {worst: None, "*": "w8a8"}):  # the first pattern that matches decides; None is float
        model = AutoModelForCausalLM.from_pretrained(name, dtype="float32")
        w8a8.quantize(model, schemes)
        kl = compare(model, reference, ids.first(1024), seq_len=128).kl_nats
        print(f"{schemes}: KL {kl.mean:.5f} ({kl.low:.5f} to {kl.high:.5f})")


if __name__ == "__main__":
    main(*sys.argv[1:])
