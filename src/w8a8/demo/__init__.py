"""The main job on the model that is shipped."""
