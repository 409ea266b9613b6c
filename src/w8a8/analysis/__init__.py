"""Which layers matter: what each does to the model's predictions, and what to do about it under a budget."""

from w8a8.analysis.budget import Allocation, Budget, allocate
from w8a8.analysis.errors import layer_errors
from w8a8.analysis.layers import sensitivity
from w8a8.analysis.remedy import remedies
from w8a8.records.layers import LayerErrors, Remedy, Sensitivity

__all__ = [
    "Allocation",
    "Budget",
    "LayerErrors",
    "Remedy",
    "Sensitivity",
    "allocate",
    "layer_errors",
    "remedies",
    "sensitivity",
]
