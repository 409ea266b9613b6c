"""Quantise a classifier, and see how far its outputs are from the float ones.

python examples/encoder.py [MODEL]     by default a small random BERT

What predicts no tokens has no perplexity: its outputs are compared on batches of your own.
"""

import copy
import sys

import torch
from transformers import AutoModelForSequenceClassification, BertConfig, BertForSequenceClassification

import w8a8
from w8a8.evaluation.outputs import compare_outputs


def main(name: str | None = None) -> None:
    torch.manual_seed(0)
    if name is None:
        sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
        reference = BertForSequenceClassification(BertConfig(vocab_size=256, num_labels=3, **sizes)).eval()
    else:
        reference = AutoModelForSequenceClassification.from_pretrained(name).eval()
    model = copy.deepcopy(reference)
    result = w8a8.quantize(model, "w8a8", exclude=["classifier"])  # a small layer at the end may stay float
    print(result.coverage)

    vocabulary = reference.config.vocab_size
    batches = [{"input_ids": torch.randint(0, vocabulary, (4, 16))} for _ in range(8)]  # real texts in earnest
    print(compare_outputs(model, reference, batches))


if __name__ == "__main__":
    main(*sys.argv[1:])
