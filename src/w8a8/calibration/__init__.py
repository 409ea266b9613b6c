"""Calibration: from texts to batches, from batches to summaries of a fixed size, from those to static grids."""
