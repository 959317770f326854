"""Figures over all rows: against plain formulas, with gaps, with labels that have one class alone."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from manyheads.graph import metrics

NAN = math.nan


def auc_by_pairs(scores: Tensor, truth: Tensor) -> float:
    """The share of pairs of a positive and a negative in the right order, ties half."""
    found = [
        0.5 if p == n else float(p > n)
        for p in scores[truth == 1].tolist()
        for n in scores[truth == 0].tolist()
    ]
    return float(np.mean(found))


def test_regression_in_the_datas_units_with_gaps() -> None:
    target = torch.tensor([[1.0, 10], [2, NAN], [4, 30], [NAN, 20]])
    predicted = torch.tensor([[2.0, 11], [2, 5], [1, 30], [7, 24]])
    found = metrics.figures("regression", predicted, target)
    first, second = metrics.of_regression(predicted, target)
    assert first["mae"] == pytest.approx(4 / 3)
    assert first["rmse"] == pytest.approx(math.sqrt(10 / 3))
    assert second["mae"] == pytest.approx(5 / 3)
    assert (first["rows"], second["rows"]) == (3, 3)
    true = np.array([10.0, 30, 20])
    wanted = 1 - (1 + 0 + 16) / ((true - true.mean()) ** 2).sum()
    assert second["r2"] == pytest.approx(wanted)
    assert found["mae"] == pytest.approx((4 / 3 + 5 / 3) / 2)


def test_roc_auc_is_the_mean_of_the_labels_that_have_both_classes() -> None:
    torch.manual_seed(0)
    scores = torch.randn(60, 4).mul(4).round().div(2)  # with ties
    target = torch.randint(0, 2, (60, 4)).float()
    target[torch.rand(60, 4) < 0.3] = NAN
    target[:, 1] = target[:, 1] * 0  # one class alone, and gaps
    target[:, 3] = NAN
    each = metrics.of_multilabel(scores, target)
    known = [~target[:, i].isnan() for i in range(4)]
    wanted = [auc_by_pairs(scores[known[i], i], target[known[i], i]) for i in (0, 2)]
    assert [each[0]["roc_auc"], each[2]["roc_auc"]] == pytest.approx(wanted)
    assert math.isnan(each[1]["roc_auc"])
    assert math.isnan(each[3]["average_precision"])
    assert metrics.figures("multilabel", scores, target)["roc_auc"] == pytest.approx(np.mean(wanted))


def test_scores_far_out_are_not_made_equal() -> None:
    """A sigmoid in float32 is one from 17 on: these four would be ties."""
    scores = torch.tensor([40.0, 50, 60, 70])[:, None]
    target = torch.tensor([0.0, 0, 1, 1])[:, None]
    assert metrics.of_multilabel(scores, target)[0]["roc_auc"] == 1.0
    assert metrics.of_multilabel(-scores, target)[0]["roc_auc"] == 0.0


def test_classes() -> None:
    target = torch.tensor([0.0, 0, 0, 1, NAN, 1])[:, None]
    guesses = torch.tensor([0, 0, 1, 1, 1, 0])
    scores = torch.nn.functional.one_hot(guesses, 3).float()  # class 2 does not occur
    found = metrics.figures("classification", scores, target)
    assert found["accuracy"] == pytest.approx(3 / 5)
    assert found["balanced_accuracy"] == pytest.approx((2 / 3 + 1 / 2) / 2)
    assert found["f1"] == pytest.approx((2 * 2 / 6 + 2 * 1 / 4) / 2)
    assert metrics.confusion(scores, target[:, 0]).tolist() == [[2, 1, 0], [1, 1, 0], [0, 0, 0]]


@pytest.mark.parametrize("kind", ["regression", "classification", "multilabel"])
def test_nothing_known_is_no_figure(kind: str) -> None:
    found = metrics.figures(kind, torch.randn(3, 2), torch.full((3, 2), NAN))  # type: ignore[arg-type]
    assert all(map(math.isnan, found.values()))
