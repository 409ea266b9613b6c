"""What an encoder answers to texts: vectors, scores of pairs, labels; told by its directory which of them.

sentence-transformers opens its own directories and computes with them, prompts, pooling and dense layers included; a
sequence classifier is transformers' alone.  Nothing here knows of HTTP.

A server is a process of its own, so that its default dtype is nobody else's.
"""

import copy
from abc import ABC, abstractmethod
from collections.abc import Hashable, Sequence
from functools import cached_property
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from w8a8.checkpoint.beside import class_around
from w8a8.checkpoint.directory import Directory
from w8a8.checkpoint.opening import open_model
from w8a8.defaults import usual_defaults
from w8a8.errors import ModelError
from w8a8.jobs.encoders import open_sentences
from w8a8.model.kinds import window_of
from w8a8.serving.batching import Content, Item

TRIED = ("a", "a few words to be warm with", "as many words as a longer text may have " * 4)
"""What a model is called with before the first client."""

Pair: TypeAlias = tuple[str, str]


class Encoder(ABC):
    """A model that is asked with texts.

    Args:
        model: A `SentenceTransformer`, a `CrossEncoder` or a classifier of transformers.
        window: The most tokens that it reads; None where there is no limit.
    """

    def __init__(self, name: str, model: Any, tokenizer: Any, window: int | None) -> None:
        self.name, self.model, self.tokenizer, self.window = name, model, tokenizer, window
        # a tokenizer keeps how it pads and cuts as its state: one that counts, in whatever thread, is not the one
        # that the model's thread pads with
        self._counting = copy.deepcopy(tokenizer)
        self.counts(["a"])  # its state is set once, before threads share it

    @abstractmethod
    def warm_up(self) -> None:
        """Call the model as clients will."""

    @abstractmethod
    def run(self, kind: Hashable, contents: Sequence[Content]) -> Sequence[Tensor]:
        """An answer for the content of each item of a kind."""

    def counts(self, texts: Sequence[str] | Sequence[Pair]) -> list[int]:
        """How many tokens each text or pair has, special ones included."""
        asked = list(texts) if texts and isinstance(texts[0], str) else [list(pair) for pair in texts]
        return [len(ids) for ids in self._counting(asked, truncation=False, padding=False, verbose=False)["input_ids"]]


class Embedder(Encoder):
    """A `SentenceTransformer`: a vector for a text."""

    @property
    def width(self) -> int:
        return int(self.model.get_embedding_dimension())

    @property
    def prompts(self) -> dict[str, str]:
        """By name what is put before a text."""
        return {name: prompt or "" for name, prompt in self.model.prompts.items()}

    def items(self, texts: Sequence[str], prompt: str | None = None) -> list[Item]:
        """Texts, with the prompt of a name before each."""
        name = self.model.default_prompt_name if prompt is None else prompt
        before = self.prompts.get(name, "") if name is not None else ""
        counts = self.counts([before + text for text in texts])
        return [Item(("text", name), text, count) for text, count in zip(texts, counts, strict=True)]

    def ids(self, sequences: Sequence[Sequence[int]]) -> list[Item]:
        """Sequences of token ids, special ones included where they are to be."""
        return [Item(("ids",), list(ids), len(ids)) for ids in sequences]

    def run(self, kind: Hashable, contents: Sequence[Content]) -> Sequence[Tensor]:
        """(width,) of float32 for each."""
        if kind == ("ids",):
            return self._of_ids(contents)
        assert isinstance(kind, tuple)  # as `items` makes them
        found = self.model.encode(contents, prompt_name=kind[1], batch_size=len(contents), show_progress_bar=False)
        return list(torch.from_numpy(found.astype("float32")))

    @torch.inference_mode()
    def _of_ids(self, sequences: Sequence[Content]) -> Sequence[Tensor]:
        padded = self.tokenizer.pad({"input_ids": sequences}, return_tensors="pt")
        found = self.model.forward(dict(padded.to(self.model.device)))["sentence_embedding"]
        return list(found.float().cpu())

    def warm_up(self) -> None:
        for texts in ([TRIED[0]], list(TRIED)):
            self.run(("text", self.model.default_prompt_name), texts)


class Scorer(Encoder):
    """A classifier of texts or of pairs: logits; with one label a reranker."""

    @cached_property
    def labels(self) -> list[str]:
        """The names of its labels, by number."""
        config = self.model.config
        return [str(config.id2label[number]) for number in range(config.num_labels)]

    @property
    def ranks(self) -> bool:
        """Whether it gives one score."""
        return len(self.labels) == 1

    def items(self, contents: Sequence[str] | Sequence[Pair]) -> list[Item]:
        """Texts, or pairs."""
        kind = "text" if contents and isinstance(contents[0], str) else "pair"
        each: Sequence[Content] = contents
        return [Item((kind,), content, count) for content, count in zip(each, self.counts(contents), strict=True)]

    def run(self, kind: Hashable, contents: Sequence[Content]) -> Sequence[Tensor]:
        """(labels,) logits of each."""
        with torch.inference_mode():
            found = self.logits(contents)
        return list(found.reshape(len(contents), len(self.labels)).float().cpu())

    @abstractmethod
    def logits(self, contents: Sequence[Content]) -> Tensor:
        """(contents, labels), or (contents,) for one label."""

    @abstractmethod
    def likely(self, logits: Tensor) -> Tensor:
        """What logits mean: probabilities, or the score that the model was made for."""

    def warm_up(self) -> None:
        for texts in ([TRIED[0]], list(TRIED)):
            self.run(("pair",), [(text, text) for text in texts])


class _CrossEncoder(Scorer):
    def logits(self, contents: Sequence[Content]) -> Tensor:
        found: Tensor = self.model.predict(
            contents,
            batch_size=len(contents),
            show_progress_bar=False,
            activation_fn=nn.Identity(),
            convert_to_tensor=True,
        )
        return found

    def likely(self, logits: Tensor) -> Tensor:
        if not self.ranks:
            return logits.softmax(-1)
        score: Tensor = self.model.activation_fn(logits)
        return score


class _Classifier(Scorer):
    def logits(self, contents: Sequence[Content]) -> Tensor:
        asked = contents if isinstance(contents[0], str) else [list(pair) for pair in contents]
        inputs = self.tokenizer(asked, padding=True, truncation=True, max_length=self.window, return_tensors="pt")
        found: Tensor = self.model(**inputs).logits
        return found

    def likely(self, logits: Tensor) -> Tensor:
        several = self.ranks or self.model.config.problem_type == "multi_label_classification"
        return logits.sigmoid() if several else logits.softmax(-1)


def is_encoder(directory: Directory) -> bool:
    """Whether a directory is of sentence-transformers, or of a sequence classifier."""
    return class_around(directory.path) is not None or _classifies(directory)


def open_encoder(directory: Directory) -> Encoder:
    """The encoder in a directory.

    Raises:
        ModelError: it is none that answers texts; sentence-transformers is not there.
    """
    around, name = class_around(directory.path), directory.path.name
    if around is None and not _classifies(directory):
        raise ModelError(
            f"{directory.path} was to answer texts, and is neither a directory of sentence-transformers (it has no "
            f"modules.json) nor a sequence classifier, but a {directory.architecture[0].__name__}; an encoder "
            "becomes an embedder with its pooling: SentenceTransformer(DIR).save(DIR)"
        )
    if around is None:
        opened = open_model(directory)
        if opened.tokenizer is None:
            raise ModelError(f"{directory.path} is a classifier without a tokenizer; copy tokenizer.json there")
        return _Classifier(name, opened.model, opened.tokenizer, window_of(opened.tokenizer, opened.model))
    with usual_defaults():  # sentence-transformers makes tensors without saying where
        model = open_sentences(directory, around)
    kind = _CrossEncoder if around == "CrossEncoder" else Embedder
    return kind(name, model.eval(), model.tokenizer, model.max_seq_length)


def _classifies(directory: Directory) -> bool:
    return bool(directory.architecture[0].__name__.endswith("ForSequenceClassification"))
