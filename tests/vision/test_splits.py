"""Splits: no group in two parts, every class in train, shares kept."""

from __future__ import annotations

import numpy as np
import pytest

from manyheads.core.errors import DataError
from manyheads.vision.splits import OPEN, TEST, TRAIN, VAL, assign, by_class, by_group, by_labels


def free(n: int) -> np.ndarray:
    return np.full(n, OPEN, np.int8)


@pytest.mark.parametrize("seed", range(40))
def test_no_group_is_in_two_parts_and_every_class_is_learned(seed: int) -> None:
    rng = np.random.default_rng(seed)
    n, classes = int(rng.integers(60, 400)), int(rng.integers(2, 8))
    groups = rng.integers(0, int(rng.integers(12, 60)), n)
    # A group's images are mostly of one class, as a patient's are.
    targets = np.where(rng.random(n) < 0.7, groups % classes, rng.integers(0, classes, n))
    parts = assign(targets, free(n), groups, 0.2, 0.2, seed)
    for group in np.unique(groups):
        assert len(set(parts[groups == group])) == 1
    assert set(parts) == {TRAIN, VAL, TEST}
    assert set(targets[parts == TRAIN]) == set(targets)
    assert 0.05 < (parts == TEST).mean() < 0.35
    np.testing.assert_array_equal(parts, assign(targets, free(n), groups, 0.2, 0.2, seed))


@pytest.mark.parametrize("seed", range(10))
def test_groups_with_several_labels(seed: int) -> None:
    rng = np.random.default_rng(seed)
    groups = rng.integers(0, 60, 600)
    targets = (rng.random((600, 4)) < [0.5, 0.3, 0.1, 0.05]).astype(np.float32)
    targets[rng.random((600, 4)) < 0.1] = np.nan
    chosen = by_group(targets, groups, 0.25, rng)
    assert not set(groups[chosen]) & set(groups[~chosen])
    assert abs(chosen.mean() - 0.25) < 0.06
    assert ((targets[~chosen] == 1).sum(axis=0) > 0).all()
    common = (targets == 1).sum(axis=0)[:2]
    assert (np.abs((targets[chosen] == 1).sum(axis=0)[:2] / common - 0.25) < 0.1).all()


def test_each_class_gives_its_share() -> None:
    classes = np.repeat([0, 1, 2, 3], [1000, 100, 3, 1])
    chosen = by_class(classes, 0.1, np.random.default_rng(0))
    assert np.bincount(classes[chosen], minlength=4).tolist() == [100, 10, 1, 0]
    assert not np.array_equal(chosen, by_class(classes, 0.1, np.random.default_rng(1)))


def test_each_combination_of_labels_gives_its_share() -> None:
    rng = np.random.default_rng(0)
    targets = (rng.random((5000, 5)) < 0.3).astype(np.float32)
    targets[rng.random((5000, 5)) < 0.05] = np.nan
    chosen = by_labels(targets, 0.2, rng)
    assert chosen.sum() in (1000, 1001)
    codes = np.nan_to_num(targets, nan=2) @ 3 ** np.arange(5)
    for code in np.unique(codes):
        assert abs(chosen[codes == code].sum() - 0.2 * (codes == code).sum()) <= 1
    share = (targets[chosen] == 1).sum(axis=0) / (targets == 1).sum(axis=0)
    np.testing.assert_allclose(share, 0.2, atol=0.01)


def test_given_parts_are_kept_and_validation_is_cut_from_train() -> None:
    given = np.repeat(np.array([TRAIN, TEST], np.int8), [80, 20])
    targets = np.arange(100) % 4
    parts = assign(targets, given, None, 0.25, 0.5, 0)
    np.testing.assert_array_equal(parts == TEST, given == TEST)
    assert np.bincount(targets[parts == VAL]).tolist() == [5, 5, 5, 5]
    whole = np.repeat(np.array([TRAIN, VAL, TEST], np.int8), [50, 25, 25])
    np.testing.assert_array_equal(assign(targets, whole, None, 0.25, 0.5, 0), whole)
    without_test = np.repeat(np.array([TRAIN, VAL], np.int8), 50)
    np.testing.assert_array_equal(assign(targets, without_test, None, 0.25, 0.5, 0), without_test)


def test_what_cannot_be_divided() -> None:
    targets = np.arange(20) % 2
    with pytest.raises(DataError, match="1 groups have images in two of the given parts"):
        given = np.repeat(np.array([TRAIN, TEST], np.int8), 10)
        assign(targets, given, np.repeat([0, 1, 2, 2], [8, 1, 3, 8]), 0.2, 0.2, 0)
    with pytest.raises(DataError, match="all images are of one group"):
        assign(targets, free(20), np.zeros(20, np.int64), 0.2, 0.2, 0)
    with pytest.raises(DataError, match="each group has a class of its own"):
        by_group(targets, targets, 0.01, np.random.default_rng(0))
    with pytest.raises(DataError, match="too few to take a share"):
        assign(np.array([0, 1]), free(2), None, 0.2, 0.2, 0)
