"""Checkpoints: compressed-tensors directories that transformers and vLLM load, and theirs, in int8 here."""

from w8a8.checkpoint.hub import push_to_hub
from w8a8.checkpoint.reader import load
from w8a8.checkpoint.writer import save

__all__ = ["load", "push_to_hub", "save"]
