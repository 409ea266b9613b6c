"""Smoothing: a scale per channel out of a source and into its readers, searched, gated, and taken back to the bit."""
