"""Which layers matter: what each does to the model's predictions, and what to do about it under a budget."""

from w8a8.analysis.layers import Sensitivity, sensitivity

__all__ = ["Sensitivity", "sensitivity"]
