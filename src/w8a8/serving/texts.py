"""Requests to encoders: what a body asks for, checked, and its texts counted in tokens.

`/v1/embeddings` is OpenAI's, `/rerank` that of Cohere and Jina (`documents`) and of text-embeddings-inference
(`texts`), `/classify` the latter's.  A text that is longer than what the model reads is refused unless the client says
`"truncate": true`: cut in silence, a vector is of another text.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeGuard

from w8a8.serving.batching import Item
from w8a8.serving.encoders import Embedder, Encoder, Scorer
from w8a8.serving.fields import Body, flag, integer, one_of, only, readable, text, texts, wrong
from w8a8.serving.front import Checked
from w8a8.serving.mistakes import RefusedError

MOST_TEXTS = 2048
"""In one request, as OpenAI's API has it."""

_INPUTS = ("a text", "a list of texts", "a list of token ids", "a list of lists of token ids")


@dataclass(frozen=True)
class Embeddings:
    """Asked for: a vector of each item.

    dimensions: How many of its numbers; None for all.
    base64: Whether they go out as bytes in base64.
    """

    items: Sequence[Item]
    dimensions: int | None
    base64: bool


@dataclass(frozen=True)
class Ranking:
    """Asked for: which documents answer a query.

    documents: As they were given.
    top: How many of them.
    told: Whether they go out again.
    raw: Whether scores are the logits.
    theirs: Whether the answer is to be that of text-embeddings-inference.
    """

    items: Sequence[Item]
    documents: Sequence[str]
    top: int
    told: bool
    raw: bool
    theirs: bool


@dataclass(frozen=True)
class Labels:
    """Asked for: the labels of texts or pairs.

    single: Whether one text was given, and no list.
    raw: Whether scores are the logits.
    """

    items: Sequence[Item]
    single: bool
    raw: bool


def check_embeddings(embedder: Embedder, names: Sequence[str], body: Body) -> Checked:
    """The check of `/v1/embeddings`."""
    known = ("input", "model", "encoding_format", "dimensions", "user", "input_type", "truncate")
    only(body, known, names)
    base64 = one_of(body, "encoding_format", ("float", "base64")) == "base64"
    dimensions = integer(body, "dimensions", low=1, high=embedder.width)
    prompt = one_of(body, "input_type", list(embedder.prompts))
    items = _inputs(body.get("input"), embedder, prompt)
    _fits(embedder, items, "input", flag(body, "truncate"))
    return Checked(body, Embeddings(items, dimensions, base64))


def check_ranking(scorer: Scorer, names: Sequence[str], body: Body) -> Checked:
    """The check of `/rerank`."""
    known = ("query", "documents", "texts", "model", "top_n", "return_documents", "return_text", "raw_scores")
    only(body, (*known, "truncate"), names)
    query = text(body, "query")
    if not query:
        raise RefusedError("there is no query; send the text that the documents are to answer", param="query")
    theirs = "texts" in body
    name = "texts" if theirs else "documents"
    given = body.get(name)
    if theirs and "documents" in body:
        raise RefusedError("there are documents and texts; send one of them", param="texts")
    if isinstance(given, list):
        given = [entry.get("text") if isinstance(entry, Mapping) else entry for entry in given]
    documents = texts(given, name, most=MOST_TEXTS)
    items = scorer.items([(query, document) for document in documents])
    _fits(scorer, items, name, flag(body, "truncate"))
    top = integer(body, "top_n", low=1) or len(documents)
    told = bool(flag(body, "return_documents")) or bool(flag(body, "return_text"))
    return Checked(body, Ranking(items, documents, top, told, bool(flag(body, "raw_scores")), theirs))


def check_labels(scorer: Scorer, names: Sequence[str], body: Body) -> Checked:
    """The check of `/classify`."""
    only(body, ("inputs", "model", "raw_scores", "truncate"), names)
    given = body.get("inputs")
    single = isinstance(given, str)
    entries = [given] if single else given
    if not isinstance(entries, list) or not entries:
        raise wrong("inputs", given, "a text, a list of texts, or a list of pairs of texts")
    if len(entries) > MOST_TEXTS:
        raise RefusedError(f"inputs has {len(entries)} entries; at most {MOST_TEXTS} are taken", param="inputs")
    if isinstance(entries[0], list):
        items = scorer.items([_pair(entry, f"inputs[{place}]") for place, entry in enumerate(entries)])
    else:
        items = scorer.items(texts(entries, "inputs", most=MOST_TEXTS))
    _fits(scorer, items, "inputs", flag(body, "truncate"))
    return Checked(body, Labels(items, single, bool(flag(body, "raw_scores"))))


def _pair(value: object, name: str) -> tuple[str, str]:
    if not isinstance(value, list) or len(value) != 2:
        raise wrong(name, value, "a pair of texts, as the first entry is one")
    return readable(value[0], name), readable(value[1], name)


def _inputs(given: object, embedder: Embedder, prompt: str | None) -> list[Item]:
    """What is to be embedded, in any of the four ways in which OpenAI's API takes it."""
    if isinstance(given, str):
        return embedder.items([readable(given, "input")], prompt)
    if not isinstance(given, list) or not given:
        raise wrong("input", given, ", or ".join(_INPUTS))
    if len(given) > MOST_TEXTS and not _is_id(given[0]):
        raise RefusedError(f"input has {len(given)} entries; at most {MOST_TEXTS} are taken", param="input")
    if isinstance(given[0], str):
        return embedder.items(texts(given, "input", most=MOST_TEXTS), prompt)
    if prompt is not None:
        raise RefusedError(
            "input_type puts a text before others, and token ids were given; send texts", param="input_type"
        )
    if _is_id(given[0]):
        return embedder.ids([_ids(given, "input", embedder)])
    return embedder.ids([_ids(entry, f"input[{place}]", embedder) for place, entry in enumerate(given)])


def _ids(given: object, name: str, embedder: Embedder) -> list[int]:
    size = len(embedder.tokenizer)
    if not isinstance(given, list) or not given:
        raise wrong(name, given, " or ".join(_INPUTS[1:3]))
    for place, entry in enumerate(given):
        if not _is_id(entry) or not 0 <= entry < size:
            raise wrong(f"{name}[{place}]", entry, f"a token id below {size}")
    return given


def _is_id(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _fits(encoder: Encoder, items: Sequence[Item], name: str, truncate: bool | None) -> None:
    for place, item in enumerate(items):
        fits, cut = encoder.window is None or item.tokens <= encoder.window, item.kind != ("ids",)
        if not fits and not (truncate and cut):
            raise RefusedError(
                f"{name}[{place}] has {item.tokens} tokens, and the model reads {encoder.window}: shorten it"
                + (', or send "truncate": true to have it cut' if cut else ""),
                param=name,
                code="context_length_exceeded",
            )
    if any(item.tokens == 0 for item in items):
        raise RefusedError(f"an entry of {name} has no tokens", param=name)
