"""Serving: a directory behind an OpenAI-compatible port, with every request judged before a model is reached."""
