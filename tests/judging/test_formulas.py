"""Formulas: equal to scikit-learn's and scipy's, and to Delphi's balanced accuracy; what an unreadable answer counts."""

from math import isnan, nan

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import balanced_accuracy_score, roc_auc_score

from metasae_lightning.judging.scoring import formulas


@pytest.mark.parametrize("seed", range(20))
def test_formulas_equal_those_of_scikit_learn_and_scipy(seed: int):
    rng = np.random.default_rng(seed)
    truths = [0, 1, *rng.integers(2, size=30).tolist()]
    predictions = rng.integers(2, size=32).tolist()
    # Few distinct values, so that there are ties.
    probabilities = (rng.integers(5, size=32) / 4).tolist()
    assert formulas.balanced_accuracy(truths, predictions) == pytest.approx(balanced_accuracy_score(truths, predictions), abs=1e-12)
    of_class = [[p for p, truth in zip(probabilities, truths, strict=True) if truth == wanted] for wanted in (1, 0)]
    assert formulas.auc(*of_class) == pytest.approx(roc_auc_score(truths, probabilities), abs=1e-12)
    x, y = rng.normal(size=32).round(1).tolist(), rng.integers(4, size=32).astype(float).tolist()
    assert formulas.pearson(x, y) == pytest.approx(stats.pearsonr(x, y).statistic, abs=1e-9)
    assert formulas.spearman(x, y) == pytest.approx(stats.spearmanr(x, y).statistic, abs=1e-9)


# Delphi's formula (eai-delphi 0.1.3, log/result_analysis.py): half of hits over positives plus half of correct rejections over negatives,
# where a prediction that is at least 0.5 is a yes. Its own code gave the same values as ours on 40 scores, to 1.2e-16.
@pytest.mark.parametrize("seed", range(20))
def test_balanced_accuracy_is_delphis(seed: int):
    rng = np.random.default_rng(seed)
    is_activating, predicted = np.array([True, False, *(rng.random(25) < 0.6).tolist()]), rng.random(27).round(1)
    hits = np.sum((predicted >= 0.5) & is_activating)
    rejections = np.sum((predicted < 0.5) & ~is_activating)
    delphi = (hits / np.sum(is_activating) + rejections / np.sum(~is_activating)) / 2
    ours = formulas.balanced_accuracy(is_activating.astype(int).tolist(), (predicted >= 0.5).astype(int).tolist())
    assert ours == pytest.approx(delphi, abs=1e-12)
    # Accuracy without balance is another number: the classes differ in size.
    right = np.mean((predicted >= 0.5) == is_activating)
    assert is_activating.mean() == 0.5 or delphi == pytest.approx(0.5) or right != pytest.approx(delphi, abs=1e-6)


def test_an_unreadable_answer_is_at_chance_and_never_dropped():
    # All positives found, no negative readable: (1 + 1/2) / 2. Dropped, they would leave a score of 1 or none.
    assert formulas.balanced_accuracy([1, 1, 0, 0], [1, 1, None, None]) == 0.75
    assert formulas.balanced_accuracy([1, 0], [None, None]) == 0.5
    assert formulas.accuracy([0, 3], [None, None], choices=5) == pytest.approx(0.2)
    # One of two pairs is in order, the other has no probability.
    assert formulas.auc([0.9], [0.1, nan]) == 0.75
    assert formulas.auc([nan], [nan]) == 0.5
    assert formulas.spearman([1.0, 2.0, 3.0], [nan] * 3) == formulas.pearson([1.0, 2.0, 3.0], [nan] * 3) == 0


def test_an_unreadable_number_adds_nothing_to_the_covariance():
    # Centred predictions are -1, 1, 0, 0 and truths -2, 0, -1, 3: covariance 2, variances 2 and 14, so 2 / sqrt(28). With zeros, which
    # the author's code takes for missing numbers, centred predictions would be 0, 2, -1, -1, and the covariance -2.
    assert formulas.pearson([0.0, 2.0, 1.0, 5.0], [1.0, 3.0, nan, nan]) == pytest.approx(2 / 28**0.5)
    assert formulas.pearson([0.0, 2.0, 1.0, 5.0], [1.0, 3.0, 0.0, 0.0]) < 0
    # Ranks of the readable ones are 1 and 2, and the others have 1.5: centred -.5, .5, 0, 0; ranks of truths are 1, 3, 2, 4.
    assert formulas.spearman([0.0, 2.0, 1.0, 5.0], [1.0, 3.0, nan, nan]) == pytest.approx(1 / (0.5 * 5) ** 0.5)


def test_a_constant_prediction_is_at_chance_and_a_missing_class_is_nan():
    # Three times 0.1 has a mean that is not 0.1 in floating point: it must stay constant.
    assert formulas.pearson([1.0, 2.0, 3.0, 9.0], [0.1, 0.1, 0.1, nan]) == 0
    assert formulas.spearman([1.0, 2.0], [3.0, 3.0]) == formulas.pearson([4.0, 4.0], [1.0, 2.0]) == 0
    assert all(map(isnan, (formulas.balanced_accuracy([1, 1], [1, 1]), formulas.accuracy([], [], 2), formulas.auc([], [0.1]))))
    assert isnan(formulas.pearson([1.0], [1.0]))
