"""Quantise from files to files, a piece of a tensor at a time, and open the result with transformers.

python examples/larger_than_memory.py [MODEL [DIRECTORY]]     by default the shipped model, into streamed-model

The same call goes on where it was stopped; under `torchrun` processes share the work.
"""

import sys

from transformers import AutoModelForCausalLM

import w8a8
from w8a8.demo import demo_directory


def main(name: str = str(demo_directory()), directory: str = "streamed-model") -> None:
    w8a8.quantize_directory(
        name,
        directory,
        "w8a8",
        overwrite=True,
        progress=lambda done, total, tensor: print(f"{done}/{total} {tensor}"),
    )
    w8a8.enable()  # from here on transformers runs such directories in integers
    model = AutoModelForCausalLM.from_pretrained(directory)
    w8a8.disable()
    layers = [name for name, module in model.named_modules() if isinstance(module, w8a8.QuantLinear)]
    print(f"{len(layers)} layers run in integers, the first is {layers[0]}")


if __name__ == "__main__":
    main(*sys.argv[1:])
