"""Checkpoints: compressed-tensors directories that transformers and vLLM load, and theirs, in int8 here."""
