"""The main job on the model that is shipped."""

from w8a8.demo.run import demo_directory, demo_model

__all__ = ["demo_directory", "demo_model"]
