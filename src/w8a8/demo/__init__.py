"""The main job on the model that is shipped."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from w8a8.demo.corpus import held_out_text, training_text
    from w8a8.demo.run import demo_directory, demo_model, run_demo

__all__ = ["demo_directory", "demo_model", "held_out_text", "run_demo", "training_text"]

_TEXTS = {"held_out_text", "training_text"}  # which need no torch


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(importlib.import_module(f"w8a8.demo.{'corpus' if name in _TEXTS else 'run'}"), name)
    raise AttributeError(f"module 'w8a8.demo' has no attribute {name!r}")
