"""What an encoder lost, by what it is for: how alike texts are, what is found, which label a text gets.

Each measure is taken of both models on the same texts, and the difference is drawn as one quantity, over texts, pairs
or queries: a paired interval, by `intervals`.  Pure functions of what the models returned.

Ranks and gains are those of scipy and scikit-learn, which come with sentence-transformers (w8a8[sentences]).  Its own
evaluators give the same figures, but for all texts together and not for each, so that there is nothing to draw.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from w8a8.errors import ModelError
from w8a8.evaluation.intervals import Bootstrap, Estimate, better_or_worse

Array: TypeAlias = NDArray[Any]

FOUND = 10
"""How many documents of an answer count."""


@dataclass(frozen=True)
class Measure:
    """A measure of two models, the more the better.

    name: What was measured.
    difference: The model's less the reference's, paired.
    """

    name: str
    model: Estimate
    reference: Estimate
    difference: Estimate

    @property
    def verdict(self) -> str:
        """What the interval of the difference says."""
        return better_or_worse(self.difference)


@dataclass(frozen=True)
class Alike:
    """How far vectors are from the reference's.

    cosine: The mean.
    cosine_p1: That which 1 % of the rows do not reach.
    """

    cosine: Estimate
    cosine_p1: Estimate
    rows: int


def alike(ours: Array, theirs: Array, *, seed: int = 0) -> Alike:
    """Compare what two models made of the same texts, row by row.

    Args:
        ours, theirs: (texts, width).

    Raises:
        ModelError: the shapes differ, or a value is not finite.
    """
    cosines = rowwise_cosine(_checked(ours, theirs), theirs)
    draw, single = Bootstrap(len(cosines), seed=seed), [value[None] for value in -cosines.astype(np.float32)]
    worst = draw.quantile(single, 0.99)
    mean = draw.ratio(cosines.tolist(), [1.0] * len(cosines))
    return Alike(mean, Estimate(-worst.mean, -worst.high, -worst.low), len(cosines))


def ranked_alike(ours: Array, theirs: Array, scores: Sequence[float], *, seed: int = 0) -> Measure:
    """Spearman's correlation of the models' scores of pairs with a person's.

    Args:
        ours, theirs: (pairs,).

    Raises:
        ModelError: the shapes differ, or a value is not finite; there is nothing to correlate.
    """
    from scipy.stats import rankdata

    gold = np.asarray(scores, np.float64)
    if len(gold) < 3 or not np.ptp(gold):
        raise ModelError(f"a correlation needs three pairs whose scores are not all the same, found {len(gold)}")
    _checked(ours, theirs)

    def correlation(found: Array, drawn: Array) -> float:
        a, b = (ranks - ranks.mean() for ranks in (rankdata(found[drawn]), rankdata(gold[drawn])))
        size = float(a @ a) * float(b @ b)
        return float(a @ b) / math.sqrt(size) if size else 0.0  # one pair may be drawn again and again

    return _drawn("Spearman's correlation", Bootstrap(len(gold), seed=seed), ours, theirs, correlation)


def labelled_right(ours: Array, theirs: Array, labels: Sequence[int], *, seed: int = 0) -> tuple[Measure, Measure]:
    """Accuracy, and the mean F1 of the labels that texts have or are given.

    Args:
        ours, theirs: (texts,) the numbers of the labels that the models give.

    Raises:
        ModelError: the shapes differ.
    """
    gold = np.asarray(labels)
    _checked(ours, theirs)
    draw, count = Bootstrap(len(gold), seed=seed), int(max(gold.max(), ours.max(), theirs.max())) + 1

    def f1(found: Array, drawn: Array) -> float:
        table = np.bincount(gold[drawn] * count + found[drawn], minlength=count**2).reshape(count, count)
        both, either = np.diag(table), table.sum(0) + table.sum(1)
        return float(np.mean(2 * both[either > 0] / either[either > 0]))

    accuracy = _mean_of("accuracy", draw, (ours == gold).astype(float), (theirs == gold).astype(float))
    return accuracy, _drawn("F1, mean over labels", draw, ours, theirs, f1)


def found_right(
    ours: Array, theirs: Array, relevant: Sequence[Mapping[int, float]], *, seed: int = 0
) -> tuple[Measure, Measure]:
    """NDCG and recall among the first `FOUND` documents.

    Args:
        ours, theirs: (queries, documents) scores.
        relevant: Of each query the documents that answer it, by number, and how well.

    Raises:
        ModelError: the shapes differ, or a value is not finite.
    """
    _checked(ours, theirs)
    draw = Bootstrap(len(relevant), seed=seed)
    (gain, recall), (other_gain, other_recall) = _answers(ours, relevant), _answers(theirs, relevant)
    return (
        _mean_of(f"NDCG@{FOUND}", draw, gain, other_gain),
        _mean_of(f"recall@{FOUND}", draw, recall, other_recall),
    )


def _answers(scores: Array, relevant: Sequence[Mapping[int, float]]) -> tuple[Array, Array]:
    """Of each query NDCG and recall."""
    from sklearn.metrics import ndcg_score

    gains, recalls = [], []
    for row, wanted in zip(scores, relevant, strict=True):
        truth = np.zeros(len(row))
        truth[list(wanted)] = list(wanted.values())
        gains.append(ndcg_score(truth[None], row[None], k=FOUND, ignore_ties=True))
        first = np.argsort(-row, kind="stable")[:FOUND]
        recalls.append(float((truth[first] > 0).sum()) / len(wanted))
    return np.array(gains), np.array(recalls)


def rowwise_cosine(a: Array, b: Array) -> Array:
    """Of (rows, width) the cosine of each row with that of the other, (rows,) in float64; 0 for a row of zeros."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    sizes = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    cosines: Array = (a * b).sum(-1) / np.where(sizes == 0, 1, sizes)
    return cosines


def _checked(ours: Array, theirs: Array) -> Array:
    if ours.shape != theirs.shape or not len(ours):
        raise ModelError(
            f"the model returned {ours.shape}, the reference {theirs.shape}: what is compared is of one kind and width"
        )
    if not (np.isfinite(ours).all() and np.isfinite(theirs).all()):
        raise ModelError("what a model returned is not finite; try float32 or bfloat16")
    return ours


def _mean_of(name: str, draw: Bootstrap, ours: Array, theirs: Array) -> Measure:
    ones = [1.0] * len(ours)
    model, reference, difference = (draw.ratio(v.tolist(), ones) for v in (ours, theirs, ours - theirs))
    return Measure(name, model, reference, difference)


def _drawn(name: str, draw: Bootstrap, ours: Array, theirs: Array, measure: Callable[[Array, Array], float]) -> Measure:
    def both(drawn: Array) -> tuple[float, float, float]:
        a, b = measure(ours, drawn), measure(theirs, drawn)
        return a, b, a - b

    return Measure(name, *draw.of(both))
