"""Figures over a split, against counts by hand and scikit-like definitions."""

import numpy as np
import pytest
import torch

from manyheads.vision import metrics

NAN = float("nan")


def test_top_1_and_top_5_count_hits() -> None:
    logits = torch.arange(8.0).expand(4, 8)  # class 7 first, then 6 ...
    target = torch.tensor([7, 6, 3, 2])
    found = metrics.figures(logits, target)
    assert found["top1"] == 0.25
    assert found["top5"] == 0.75
    assert set(metrics.figures(logits[:, :5], torch.tensor([4, 1, 1, 1]))) == {"top1"}


def test_labels_without_both_answers_are_left_out_of_the_means() -> None:
    logits = torch.tensor([[3.0, 1, 0], [2, 1, 0], [1, 1, 0], [-1, 1, 9]])
    target = torch.tensor([[1, 1, 0], [0, 1, NAN], [1, 1, 1], [NAN, 1, NAN]])
    precision, area = metrics.ranking(logits, target)
    assert area[0] == 0.5  # of the known three: one positive above, one below the negative
    assert precision[0] == pytest.approx((1 + 2 / 3) / 2)
    assert precision[1].isnan()
    assert area[1].isnan()
    assert area[2] == 0.5  # a tie
    assert metrics.figures(logits, target)["auroc"] == 0.5


def test_the_report_counts_by_class() -> None:
    answer, target = torch.tensor([0, 0, 1, 1, 1]), torch.tensor([0, 1, 1, 1, 2])
    logits = torch.nn.functional.one_hot(answer, 3).float()
    assert metrics.confusion(logits, target).tolist() == [[1, 0, 0], [1, 2, 0], [0, 1, 0]]
    table = metrics.by_class(logits, target, ["a", "b", "c"]).set_index("label")
    assert table["support"].tolist() == [1, 3, 1]
    np.testing.assert_allclose(table["precision"], [1 / 2, 2 / 3, np.nan])
    np.testing.assert_allclose(table["recall"], [1, 2 / 3, 0])
    np.testing.assert_allclose(table["f1"], [2 / 3, 2 / 3, 0])


def test_the_report_of_several_labels_counts_the_known() -> None:
    logits = torch.tensor([[1.0, -1], [1, -1], [-1, 1], [1, 1]])
    target = torch.tensor([[1, 0], [0, NAN], [1, 0], [NAN, 1]])
    table = metrics.by_class(logits, target, ["a", "b"]).set_index("label")
    assert table["support"].tolist() == [2, 1]
    assert table["known"].tolist() == [3, 3]
    np.testing.assert_allclose(table["precision"], [1 / 2, 1 / 2])
    np.testing.assert_allclose(table["recall"], [1 / 2, 1])
    np.testing.assert_allclose(table["auroc"], [0.25, 0.75])


def test_the_calibration_error_is_the_gap_between_confidence_and_accuracy() -> None:
    logits = torch.tensor([[2.0, 0.0]]).repeat(10, 1)
    target = torch.tensor([0] * 6 + [1] * 4)
    confidence = torch.tensor(2.0).sigmoid()
    torch.testing.assert_close(metrics.calibration_error(logits, target), confidence - 0.6)
    hot = metrics.calibration_error(logits, target, temperature=4.0)
    torch.testing.assert_close(hot, (torch.tensor(0.5).sigmoid() - 0.6).abs())
    several = torch.tensor([[1.0, NAN]] * 6 + [[0.0, NAN]] * 4)
    torch.testing.assert_close(metrics.calibration_error(logits, several), confidence - 0.6)
    p, right = metrics.judged(logits, several)
    assert p.shape == (10,)
    assert right.sum() == 6


def test_long_reports_show_both_ends() -> None:
    logits = torch.eye(30)[torch.arange(30)]
    target = torch.arange(30)
    target[3] = 4
    table = metrics.by_class(logits, target, [f"class {k}" for k in range(30)])
    printed = metrics.lines(table)
    assert len(printed) == 2 * 6 + 2
    assert "class 3" in printed[2]  # no image, no hit
    few = metrics.lines(table.head(20))
    assert len(few) == 21
