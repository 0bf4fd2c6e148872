"""Formulas of the scores, as pure functions of answers and truths.

An unreadable answer counts as chance. It is never dropped, because a judge would then choose its own questions. It is None among predicted
choices, and NaN among probabilities and numbers. A formula is NaN only if there are too few truths: none, a single one for a correlation,
or one of two classes missing.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def accuracy(truths: Sequence[int], predictions: Sequence[int | None], choices: int) -> float:
    """Share of right predictions. An unreadable prediction counts `1 / choices`, the expected value of a guess.

    Two are right, one is wrong, and one of five is guessed: `(2 + 0.2) / 4`.

    >>> accuracy([0, 1, 2, 3], [0, 1, 4, None], choices=5)
    0.55
    """
    right = [
        1 / choices if prediction is None else float(prediction == truth) for truth, prediction in zip(truths, predictions, strict=True)
    ]
    return float(np.mean(right)) if right else float("nan")


def balanced_accuracy(truths: Sequence[int], predictions: Sequence[int | None]) -> float:
    """Mean of the true positive rate and the true negative rate, `(TPR + TNR) / 2`. An unreadable prediction counts 1/2.

    One of two positives is found, and the one negative: `(1/2 + 1) / 2`. In the second example the unreadable prediction is half right.

    >>> balanced_accuracy([1, 1, 0], [1, 0, 0])
    0.75
    >>> balanced_accuracy([1, 0], [None, 0])
    0.75
    """
    pairs = list(zip(truths, predictions, strict=True))
    classes = [[pair for pair in pairs if pair[0] == truth] for truth in (0, 1)]
    if not all(classes):
        return float("nan")
    negative, positive = ([0.5 if p is None else float(p == truth) for truth, p in of_class] for of_class in classes)
    return float((np.mean(positive) + np.mean(negative)) / 2)


def auc(positive: Sequence[float], negative: Sequence[float]) -> float:
    """Probability that a value of a positive is larger than that of a negative; a tie counts 1/2, and so does a pair with a NaN.

    Of four pairs, three are in order and one is a tie: `3.5 / 4`.

    >>> auc([0.9, 0.4], [0.4, 0.1])
    0.875
    >>> auc([0.9, float("nan")], [0.1])
    0.75
    """
    high, low = np.asarray(positive, float), np.asarray(negative, float)
    if not len(high) or not len(low):
        return float("nan")
    pairs = len(high) * len(low)
    high, low = high[~np.isnan(high)], np.sort(low[~np.isnan(low)])
    in_order = (np.searchsorted(low, high, "left") + np.searchsorted(low, high, "right")).sum() / 2
    return float((in_order + (pairs - len(high) * len(low)) / 2) / pairs)


def pearson(truths: Sequence[float], predictions: Sequence[float]) -> float:
    """Pearson's correlation; 0, which is chance, where either side is constant.

    An unreadable prediction (NaN) is replaced by the mean of the others, which adds nothing to the covariance.

    >>> pearson([0.0, 1.0, 2.0], [1.0, 3.0, 5.0])
    1.0
    >>> pearson([0.0, 1.0, 2.0], [4.0, 4.0, 4.0])
    0.0
    """
    truth, prediction = np.asarray(truths, float), _with_means(predictions)
    if len(truth) < 2:
        return float("nan")
    if np.ptp(truth) == 0 or np.ptp(prediction) == 0:
        return 0.0
    return float(np.clip(np.corrcoef(truth, prediction)[0, 1], -1, 1).round(12))


def spearman(truths: Sequence[float], predictions: Sequence[float]) -> float:
    """Spearman's rank correlation: Pearson's of the ranks, where equal values have their mean rank. 0 where either side is constant.

    An unreadable prediction (NaN) has the mean rank of the others.

    >>> spearman([0.0, 1.0, 2.0], [1.0, 8.0, 9.0])
    1.0
    >>> spearman([0.0, 1.0, 2.0], [float("nan")] * 3)
    0.0
    """
    predicted = np.asarray(predictions, float)
    is_read = ~np.isnan(predicted)
    predicted[is_read] = ranks(predicted[is_read].tolist())
    return pearson(ranks(truths).tolist(), predicted.tolist())


def ranks(values: Sequence[float]) -> NDArray[np.float64]:
    """Rank of each value from 1 on; equal values have their mean rank.

    >>> ranks([3.0, 1.0, 3.0]).tolist()
    [2.5, 1.0, 2.5]
    """
    _, group, sizes = np.unique(np.asarray(values, float), return_inverse=True, return_counts=True)
    return (np.cumsum(sizes) - (sizes - 1) / 2)[group]


def _with_means(predictions: Sequence[float]) -> NDArray[np.float64]:
    """The predictions, with each NaN replaced by the mean of the others; zeros if all are NaN."""
    values = np.asarray(predictions, float)
    read = values[~np.isnan(values)]
    # Clipped, because a rounded mean of equal predictions could differ from them.
    return np.where(np.isnan(values), read.mean().clip(read.min(), read.max()) if len(read) else 0.0, values)
