"""Quantise a model, save it, load it, and see that it is the same model.

python examples/quantize.py [MODEL [DIRECTORY]]     by default the shipped model, into int8-model
"""

import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import w8a8
from w8a8.demo import demo_directory


def main(name: str = str(demo_directory()), directory: str = "int8-model") -> None:
    model = AutoModelForCausalLM.from_pretrained(name, dtype="float32")
    tokenizer = AutoTokenizer.from_pretrained(name)
    result = w8a8.quantize(model, "w8a8")
    print(result.coverage)

    w8a8.save(model, directory, tokenizer, overwrite=True)
    loaded = w8a8.load(directory)
    ids = tokenizer("Return the number of", return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        print("saved and loaded, the logits are equal:", torch.equal(model(ids).logits, loaded(ids).logits))
        written = loaded.generate(ids, max_new_tokens=16, do_sample=False)
    print(tokenizer.decode(written[0], skip_special_tokens=True))
    print("which kernel ran:", sorted({kernel for ran in w8a8.ledger(loaded).values() for kernel in ran}))


if __name__ == "__main__":
    main(*sys.argv[1:])
