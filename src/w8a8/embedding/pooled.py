"""A plain encoder as an embedder: the mean of the states of a text's tokens."""

from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

from w8a8.checkpoint.directory import Directory
from w8a8.checkpoint.opening import open_model
from w8a8.errors import ModelError
from w8a8.model.kinds import Asked, Kind, input_config, window_of
from w8a8.serving.batching import Content, Item
from w8a8.serving.encoders import TRIED, Encoder

ASKED = Asked("vectors of texts", frozenset({Kind.TEXT, Kind.MASKED}))


class Pooled(Encoder):
    """An encoder of transformers: its last states, the mean over the tokens that are no padding.

    What stands on the encoder, a classifier's head or a masked model's, is not run.
    """

    @property
    def width(self) -> int:
        return int(input_config(self.model.config).hidden_size)

    def items(self, texts: Sequence[str]) -> list[Item]:
        """Texts, as they are."""
        return [Item(("text",), text, count) for text, count in zip(texts, self.counts(texts), strict=True)]

    @torch.inference_mode()
    def run(self, kind: Hashable, contents: Sequence[Content]) -> Sequence[Tensor]:
        """(width,) of float32 for each."""
        inputs = self.tokenizer(contents, padding=True, truncation=True, max_length=self.window, return_tensors="pt")
        states = self.model(**inputs).last_hidden_state.float()
        seen = inputs["attention_mask"][..., None].float()  # (B, T, 1)
        return list((states * seen).sum(1) / seen.sum(1))

    def warm_up(self) -> None:
        for texts in ([TRIED[0]], list(TRIED)):
            self.run(("text",), texts)


def open_pooled(directory: Directory) -> Pooled:
    """The encoder in a directory of transformers.

    Raises:
        ModelError: it is no encoder of text; it has no tokenizer, or one that cannot pad.
    """
    opened = open_model(directory, ASKED)
    tokenizer, model = opened.tokenizer, opened.model.base_model
    if tokenizer is None:
        raise ModelError(f"{directory.path} is an encoder without a tokenizer; copy tokenizer.json there")
    if tokenizer.pad_token is None:
        raise ModelError(
            f"the tokenizer of {directory.path} names no token to pad with, and texts of several lengths were to be "
            'embedded together; name one, "pad_token" in tokenizer_config.json'
        )
    return Pooled(directory.path.name, model, tokenizer, window_of(tokenizer, model))
