"""The main job on the model that is shipped."""

from w8a8.demo.corpus import held_out_text, training_text
from w8a8.demo.run import demo_directory, demo_model, run_demo

__all__ = ["demo_directory", "demo_model", "held_out_text", "run_demo", "training_text"]
