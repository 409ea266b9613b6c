"""Evaluation: what a model predicts of a text, and how far another's predictions are from it, with intervals."""

from w8a8.evaluation.compare import Comparison, Evaluation, compare, perplexity
from w8a8.evaluation.intervals import Estimate
from w8a8.evaluation.stored import Reference, store
from w8a8.evaluation.text import Text, encode
from w8a8.model.kinds import context_length

__all__ = [
    "Comparison",
    "Estimate",
    "Evaluation",
    "Reference",
    "Text",
    "compare",
    "context_length",
    "encode",
    "perplexity",
    "store",
]
