"""Whole jobs, silent and typed: what the command prints, a program can call."""
