"""Embedding at scale: texts of a file in, vectors in a file out, in memory that does not grow with their number."""
