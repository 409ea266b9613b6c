"""Models larger than memory: from a directory of safetensors files to another, a piece of a tensor at a time."""

from w8a8.streaming.run import Streamed, quantize_directory

__all__ = ["Streamed", "quantize_directory"]
