"""Calibration and smoothing one block at a time: models larger than memory, with data."""
