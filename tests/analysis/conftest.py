from w8a8.core.scheme import PerChannel, PerToken, QuantSpec, Scheme

TWO_BITS = Scheme(QuantSpec(2, PerChannel()), QuantSpec(8, PerToken()))
"""Weights that lose much."""
