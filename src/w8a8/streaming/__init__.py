"""Models larger than memory: from a directory of safetensors files to another, a piece of a tensor at a time."""

from w8a8.records.streaming import Streamed

__all__ = ["Streamed"]
