"""Calibration and smoothing one block at a time: models larger than memory, with data."""

from w8a8.blockwise.calibrated import Calibrated, quantize_blocks

__all__ = ["Calibrated", "quantize_blocks"]
