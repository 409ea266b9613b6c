"""Measures of encoders: the figures of scipy and scikit-learn, and paired intervals of their differences."""

import math

import numpy as np
import pytest
from scipy.stats import spearmanr
from sklearn.metrics import f1_score, ndcg_score

from w8a8.errors import ModelError
from w8a8.evaluation.encoders import alike, found_right, labelled_right, ranked_alike


@pytest.fixture
def chance():
    return np.random.default_rng(0)


def test_vectors_are_compared_row_by_row(chance):
    theirs = chance.standard_normal((200, 8))
    ours = theirs + 0.05 * chance.standard_normal((200, 8))
    ours[7] = -theirs[7]
    found = alike(ours, theirs)
    cosines = (ours * theirs).sum(-1) / np.linalg.norm(ours, axis=-1) / np.linalg.norm(theirs, axis=-1)
    assert found.cosine.mean == pytest.approx(cosines.mean(), rel=1e-9)
    assert found.cosine_p1.mean == pytest.approx(np.sort(cosines)[2], rel=1e-6)
    assert found.cosine.low < found.cosine.mean < found.cosine.high
    same = alike(theirs, 3 * theirs)
    assert same.cosine.mean == pytest.approx(1.0, rel=1e-12)


@pytest.mark.slow
def test_a_correlation_is_scipys_and_the_same_models_do_not_differ(chance):
    gold = chance.integers(0, 6, 80).astype(float)
    theirs = gold + chance.standard_normal(80)
    ours = theirs + chance.standard_normal(80)
    found = ranked_alike(ours, theirs, gold)
    assert found.model.mean == pytest.approx(spearmanr(ours, gold).statistic, rel=1e-9)
    assert found.reference.mean == pytest.approx(spearmanr(theirs, gold).statistic, rel=1e-9)
    assert found.difference.mean == pytest.approx(found.model.mean - found.reference.mean, rel=1e-9)
    assert found.difference.low < found.difference.mean < found.difference.high
    equal = ranked_alike(theirs, theirs, gold)
    assert (equal.difference.low, equal.difference.high) == (0.0, 0.0)
    assert equal.verdict == "indistinguishable at 95 %"


def test_the_interval_of_a_difference_is_narrower_than_that_of_a_model(chance):
    gold = chance.standard_normal(100)
    theirs = gold + chance.standard_normal(100)
    found = ranked_alike(theirs + 0.05 * chance.standard_normal(100), theirs, gold)
    assert found.difference.high - found.difference.low < 0.3 * (found.model.high - found.model.low)


@pytest.mark.slow
def test_what_is_clearly_worse_is_called_so(chance):
    gold = chance.standard_normal(300)
    found = ranked_alike(chance.standard_normal(300), gold, gold)
    assert found.verdict.startswith("worse by 0.")
    assert ranked_alike(gold, chance.standard_normal(300), gold).verdict.startswith("better by 0.")


def test_labels_give_the_accuracy_and_the_f1_of_scikit_learn(chance):
    gold = chance.integers(0, 3, 60)
    theirs = np.where(chance.random(60) < 0.9, gold, chance.integers(0, 3, 60))
    ours = np.where(chance.random(60) < 0.8, theirs, 3)  # a label that no text has
    accuracy, f1 = labelled_right(ours, theirs, gold.tolist())
    assert accuracy.model.mean == pytest.approx((ours == gold).mean(), rel=1e-12)
    assert f1.model.mean == pytest.approx(f1_score(gold, ours, average="macro"), rel=1e-12)
    assert f1.reference.mean == pytest.approx(f1_score(gold, theirs, average="macro"), rel=1e-12)
    assert accuracy.difference.mean == pytest.approx((ours == gold).mean() - (theirs == gold).mean(), rel=1e-9)


def test_what_is_found_gives_ndcg_and_recall(chance):
    relevant = [{3: 1.0, 5: 2.0}, {0: 1.0}, {7: 3.0, 2: 1.0, 11: 1.0}]
    theirs = chance.standard_normal((3, 40))
    for row, wanted in zip(theirs, relevant, strict=True):
        for document in wanted:
            row[document] = 5 + document / 100
    ours = theirs.copy()
    ours[1, 0] = -9.0  # the only answer is the last
    gain, recall = found_right(ours, theirs, relevant)
    truth = np.zeros((3, 40))
    for number, wanted in enumerate(relevant):
        truth[number, list(wanted)] = list(wanted.values())
    assert gain.model.mean == pytest.approx(ndcg_score(truth, ours, k=10), rel=1e-12)
    assert gain.reference.mean == pytest.approx(ndcg_score(truth, theirs, k=10), rel=1e-12)
    assert (recall.model.mean, recall.reference.mean) == (pytest.approx(2 / 3), 1.0)


def test_what_cannot_be_compared_is_told(chance):
    with pytest.raises(ModelError, match=r"returned \(3, 4\), the reference \(3, 5\)"):
        alike(np.ones((3, 4)), np.ones((3, 5)))
    with pytest.raises(ModelError, match="not finite"):
        alike(np.full((3, 4), math.nan), np.ones((3, 4)))
    with pytest.raises(ModelError, match="three pairs whose scores are not all the same, found 4"):
        ranked_alike(np.ones(4), np.ones(4), [2.0] * 4)
