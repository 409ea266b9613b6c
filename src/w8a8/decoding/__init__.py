"""Decoding: keys and values of the past kept in blocks, in int8 or as they came, and attention that reads them."""
