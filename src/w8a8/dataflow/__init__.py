"""Dataflow: which linears read the very same tensor, and which module made it, observed in one forward."""

from w8a8.dataflow.groups import Dataflow, Group, Refusal
from w8a8.dataflow.observing import observe, probe

__all__ = ["Dataflow", "Group", "Refusal", "observe", "probe"]
