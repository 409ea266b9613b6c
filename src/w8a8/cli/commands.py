# ruff: noqa: I001
"""The commands, in the order in which a user meets them."""

from w8a8.cli import quantize, evaluate, sensitivity, inspect, run, bench, serve, embed  # each registers its own
from w8a8.cli.app import app

__all__ = ["app", "bench", "embed", "evaluate", "inspect", "quantize", "run", "sensitivity", "serve"]
