"""Two encoders by name, judged on what such models are for: embeddings, rankings, labels.

sentence-transformers is imported here, and where a directory is of it only: its own classes open the directory, after
`w8a8.enable` has them run ours in integers.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from w8a8.checkpoint.beside import class_around
from w8a8.checkpoint.directory import Directory
from w8a8.checkpoint.opening import open_model
from w8a8.core.plain import plain
from w8a8.core.progress import Progress
from w8a8.defaults import usual_defaults
from w8a8.errors import ModelError, TextError, closest
from w8a8.evaluation.encoders import Alike, Array, Measure, alike, found_right, labelled_right, ranked_alike
from w8a8.evaluation.judged import Judged, Labelled, Retrieval, ScoredPairs, Texts, read_judged
from w8a8.fusing.models import fusions_in_words, optimize_where_possible
from w8a8.hf.enabling import enabled
from w8a8.jobs.watching import Watcher
from w8a8.model.kinds import window_of


@dataclass(frozen=True)
class EncoderPair:
    """Two encoders that data tells apart.

    model, against: Directories or hub ids; the second is the reference.
    data: A file or a folder, see `w8a8.evaluation.judged`.
    batch_size: Texts at once.
    seed: Of the bootstrap.
    fuse: Whether what lies between integer layers is done by the native kernel (`w8a8.optimize`), where it can be.
    trust_remote_code: As for `w8a8.load`.
    """

    model: str
    against: str
    data: Path
    batch_size: int = 32
    seed: int = 0
    fuse: bool = True
    trust_remote_code: bool = False


@dataclass(frozen=True)
class Judgement:
    """What was measured.

    judged: The number of texts, pairs or queries, in words.
    fused: What of the first model was fused, or why nothing was, in words.
    alike: How far the vectors are from the reference's; None where there are none.
    """

    judged: str
    alike: Alike | None
    measures: tuple[Measure, ...]
    fused: str = ""

    def to_dict(self) -> dict[str, object]:
        """For JSON."""
        measures = [{**plain(measure), "verdict": measure.verdict} for measure in self.measures]
        return {**plain(self), "measures": measures}


def judge_encoders(pair: EncoderPair, watcher: Watcher | None = None) -> Judgement:
    """Compare two encoders on data: what `w8a8 eval --data` does.
    Raises:
        TextError: the data cannot be read, or has a label that the model does not know.
        ModelError: the models cannot be asked what the data is for; sentence-transformers is not there.
        CheckpointError: a model cannot be read.
    """
    watcher = watcher or Watcher()
    data = read_judged(pair.data)
    names = pair.model, pair.against
    directories = [Directory.of(name, trust_remote_code=pair.trust_remote_code) for name in names]
    with usual_defaults():  # sentence-transformers makes tensors without saying where
        ours, theirs = (_opened(directory, pair.batch_size) for directory in directories)
    whys = [optimize_where_possible(each.model) if pair.fuse else "it was not asked for" for each in (ours, theirs)]
    with watcher.stage("judging") as step, usual_defaults():
        judged = _judged(data, ours, theirs, step, pair.seed)
    return replace(judged, fused=fusions_in_words(ours.model, whys[0]))


class _Encoder:
    """A model that is asked with texts; what it has no answer to is an error."""

    def __init__(self, name: str, model: Any, batch_size: int) -> None:
        self.name, self.model, self.batch_size = name, model, batch_size

    def refuse(self, asked: str) -> NoReturn:
        raise ModelError(
            f"{asked} were asked for by the data, and {self.name} is a {type(self.model).__name__}, which has none: an "
            "embedder takes texts, pairs and a folder of BEIR, a reranker pairs, a classifier texts and labels"
        )


class _Embedder(_Encoder):
    def vectors(self, texts: Sequence[str]) -> Array:
        """(texts, width)."""
        found: Array = self.model.encode(list(texts), batch_size=self.batch_size, show_progress_bar=False)
        return found

    def pair_scores(self, pairs: Sequence[tuple[str, str]]) -> Array:
        """(pairs,)."""
        first, second = (self.vectors([pair[place] for pair in pairs]) for place in (0, 1))
        return _array(self.model.similarity_pairwise(first, second))

    def retrieved(self, queries: Sequence[str], documents: Sequence[str]) -> Array:
        """(queries, documents)."""
        options = {"batch_size": self.batch_size, "show_progress_bar": False}
        asked = self.model.encode_query(list(queries), **options)  # with the prompts of either
        return _array(self.model.similarity(asked, self.model.encode_document(list(documents), **options)))


class _Ranker(_Encoder):
    def pair_scores(self, pairs: Sequence[tuple[str, str]]) -> Array:
        """(pairs,)."""
        found: Array = self.model.predict(list(pairs), batch_size=self.batch_size, show_progress_bar=False)
        if found.ndim != 1:
            self.refuse("single scores of pairs")
        return found


class _Classifier(_Encoder):
    def __init__(self, name: str, model: Any, batch_size: int, tokenizer: Any) -> None:
        super().__init__(name, model, batch_size)
        self.tokenizer, self.window = tokenizer, window_of(tokenizer, model)
        known = model.config.id2label
        self.numbers = {str(number): int(number) for number in known} | {str(v): int(k) for k, v in known.items()}

    @torch.inference_mode()
    def vectors(self, texts: Sequence[str]) -> Array:
        """(texts, labels)."""
        found = []
        for start in range(0, len(texts), self.batch_size):
            batch = list(texts[start : start + self.batch_size])
            inputs = self.tokenizer(batch, padding=True, truncation=True, max_length=self.window, return_tensors="pt")
            found.append(self.model(**inputs).logits.float())
        return _array(torch.cat(found))

    def labels(self, texts: Sequence[str]) -> Array:
        """(texts,) numbers of labels."""
        found: Array = self.vectors(texts).argmax(-1)
        return found

    def number_of(self, label: str) -> int:
        """Of a label by its name, or by its number as a text."""
        if label not in self.numbers:
            raise TextError(
                f"the data has the label {label!r}, which {self.name} does not know: {closest(label, self.numbers)}"
            )
        return self.numbers[label]


def _judged(data: Judged, ours: _Encoder, theirs: _Encoder, step: Progress, seed: int) -> Judgement:
    def both(asked: str, ways: Mapping[type[_Encoder], Callable[..., Array]], *given: object) -> Iterator[Array]:
        for done, encoder in enumerate((ours, theirs), start=1):
            if type(encoder) not in ways:
                encoder.refuse(asked)
            yield ways[type(encoder)](encoder, *given)
            step(done, 2, encoder.name)

    match data:
        case Texts(texts):
            a, b = both("vectors of texts", {_Embedder: _Embedder.vectors, _Classifier: _Classifier.vectors}, texts)
            return Judgement(f"{len(texts)} texts", alike(a, b, seed=seed), ())
        case ScoredPairs(pairs, scores):
            a, b = both("scores of pairs", {_Embedder: _Embedder.pair_scores, _Ranker: _Ranker.pair_scores}, pairs)
            return Judgement(f"{len(pairs)} pairs", None, (ranked_alike(a, b, scores, seed=seed),))
        case Labelled(texts, labels):
            if not isinstance(theirs, _Classifier):
                theirs.refuse("labels of texts")
            gold = [theirs.number_of(label) for label in labels]
            a, b = both("labels of texts", {_Classifier: _Classifier.labels}, texts)
            return Judgement(f"{len(texts)} texts", None, labelled_right(a, b, gold, seed=seed))
        case Retrieval(corpus, queries, relevant):
            number = {name: place for place, name in enumerate(corpus)}
            wanted = [{number[name]: score for name, score in relevant[query].items()} for query in queries]
            asked, documents = list(queries.values()), list(corpus.values())
            a, b = both("which document answers a query", {_Embedder: _Embedder.retrieved}, asked, documents)
            told = f"{len(asked)} queries among {len(documents)} documents"
            return Judgement(told, None, found_right(a, b, wanted, seed=seed))


def _opened(directory: Directory, batch_size: int) -> _Encoder:
    name, around = str(directory.path), class_around(directory.path)
    if around is None:
        opened = open_model(directory)
        if not type(opened.model).__name__.endswith("ForSequenceClassification") or opened.tokenizer is None:
            raise ModelError(
                f"{name} was to be judged on data, and is neither a directory of sentence-transformers (it has no "
                f"modules.json) nor a classifier with a tokenizer, but a {type(opened.model).__name__}: "
                "--text FILE compares the outputs of any model that reads text"
            )
        return _Classifier(name, opened.model, batch_size, opened.tokenizer)
    model = open_sentences(directory, around)
    return _AROUND[around](name, model, batch_size)


_AROUND: dict[str, type[_Encoder]] = {"SentenceTransformer": _Embedder, "CrossEncoder": _Ranker}


def open_sentences(directory: Directory, around: str) -> Any:
    """A directory of sentence-transformers, opened by the class that it is of, its integer layers run by this package.
    Raises:
        ModelError: sentence-transformers cannot be imported, or has no such class.
    """
    try:
        import sentence_transformers
    except ImportError as error:
        raise ModelError(
            f"{directory.path} is a directory of sentence-transformers, which cannot be imported ({error}): "
            "pip install 'w8a8[sentences]'"
        ) from error
    if around not in _AROUND:
        raise ModelError(f"{directory.path} is a {around} of sentence-transformers; known are {', '.join(_AROUND)}")
    with enabled():
        kind = getattr(sentence_transformers, around)
        return kind(str(directory.path), device="cpu", trust_remote_code=directory.trust_remote_code)


def _array(tensor: Tensor) -> Array:
    found: Array = tensor.detach().to("cpu", torch.float64).numpy()
    return found
