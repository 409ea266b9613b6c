"""Evaluation: what a model predicts of a text, and how far another's predictions are from it, with intervals."""

from w8a8.evaluation.compare import Comparison as Comparison
from w8a8.evaluation.compare import Evaluation as Evaluation
from w8a8.evaluation.compare import compare as compare
from w8a8.evaluation.compare import perplexity as perplexity
from w8a8.evaluation.intervals import Estimate as Estimate
from w8a8.evaluation.stored import Reference as Reference
from w8a8.evaluation.stored import store as store
from w8a8.evaluation.text import Text as Text
from w8a8.evaluation.text import encode as encode
from w8a8.model.kinds import context_length as context_length
