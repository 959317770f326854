"""Splits: no row twice, none lost, classes and scaffolds as they should be."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from manyheads.core.errors import BadRecord, DataError, UsageError
from manyheads.graph import splits
from manyheads.graph.splits import Split

RINGS = [
    "CCc1ccccc1",
    "OCc1ccccc1",
    "Clc1ccccc1",
    "c1ccncc1",
    "Cc1ccncc1",
    "CCO",
    "CCN",
    "C1CC1",
    "C1CCC1",
    "C1CCCC1",
]


def rows(parts):
    return {name: part.tolist() for name, part in parts.items()}


def covers(parts, count):
    every = sorted(row for part in parts.values() for row in part.tolist())
    assert every == list(range(count))
    assert list(parts) == ["train", "val", "test"]


def test_by_chance():
    parts = Split("random", seed=3).divide(1000)
    covers(parts, 1000)
    assert [len(part) for part in parts.values()] == [800, 100, 100]
    assert rows(parts) == rows(Split("random", seed=3).divide(1000))
    assert rows(parts) != rows(Split("random", seed=4).divide(1000))
    assert [len(p) for p in splits.random(100, (0.7, 0.1, 0.2)).values()] == [70, 10, 20]


def test_scaffolds_by_hand():
    assert splits.scaffolds(["CCc1ccccc1", "CCO", "C[C@H]1CCCN1CCc1ccccc1"]) == [
        "c1ccccc1",
        "",
        "c1ccc(CCN2CCCC2)cc1",
    ]
    with pytest.raises(BadRecord, match="not a SMILES"):
        splits.scaffolds(["xx"])


def test_frequent_scaffolds_are_trained_on_and_none_is_in_two_parts():
    parts = Split("scaffold").divide(10, smiles=RINGS)
    # benzenes, then what comes in pairs, the later first; then single ones, the later first, until eight
    assert rows(parts) == {"train": [0, 1, 2, 3, 4, 5, 6, 9], "val": [8], "test": [7]}
    names = splits.scaffolds(RINGS)
    own = [{names[i] for i in part} for part in rows(parts).values()]
    assert not own[0] & own[1] | own[1] & own[2] | own[0] & own[2]


def test_scaffold_parts_as_the_published_code_fills_them():
    rng = np.random.default_rng(0)
    for _ in range(20):
        names = [str(i) for i in rng.zipf(1.5, 200).clip(max=60)]
        sets: dict[str, list[int]] = {}
        for i, name in enumerate(names):
            sets.setdefault(name, []).append(i)
        train, val, test = [], [], []
        for own in sorted(sets.values(), key=lambda own: (len(own), own[0]), reverse=True):
            if len(train) + len(own) > 0.8 * 200:
                if len(train) + len(val) + len(own) > 0.9 * 200:
                    test += own
                else:
                    val += own
            else:
                train += own
        found = rows(splits.by_scaffold(names))
        assert found == {"train": sorted(train), "val": sorted(val), "test": sorted(test)}


def test_folds_have_as_many_of_each_class():
    classes = torch.tensor([0.0] * 73 + [1.0] * 24 + [2.0] * 6)[torch.randperm(103)]
    fold_of = splits.folds(103, 10, 1, classes)
    assert sorted(fold_of.bincount().tolist()) == [10] * 7 + [11] * 3
    for kind in range(3):
        counts = fold_of[classes == kind].bincount(minlength=10)
        assert int(counts.max() - counts.min()) <= 1
    assert torch.equal(fold_of, splits.folds(103, 10, 1, classes))
    assert not torch.equal(fold_of, splits.folds(103, 10, 2, classes))


def test_each_row_is_tested_once():
    tested = []
    for fold in range(5):
        parts = Split("folds", folds=5, fold=fold).divide(53)
        covers(parts, 53)
        tested += parts["test"].tolist()
        following = Split("folds", folds=5, fold=(fold + 1) % 5).divide(53)
        assert torch.equal(parts["val"], following["test"])
    assert sorted(tested) == list(range(53))


def test_by_a_column():
    words = ["train", " Validation", "test", None, "", float("nan"), "TRAIN", "valid"]
    assert rows(Split("column").divide(8, words=words)) == {"train": [0, 6], "val": [1, 7], "test": [2]}
    with pytest.raises(DataError, match="row 1 of column 'part' says 'trian'; did you mean 'train'"):
        splits.by_column(["train", "trian"], "part")
    with pytest.raises(DataError, match=r"leaves the part 'val' empty \(1 train, 0 val, 1 test\)"):
        splits.by_column(["train", "test"])


def test_given_rows():
    mask = torch.tensor([False, True, False, True])
    assert rows(splits.given(train=mask, val=[0], test=np.array([2]))) == {
        "train": [1, 3],
        "val": [0],
        "test": [2],
    }
    with pytest.raises(DataError, match="share rows"):
        splits.given(train=[0, 1], val=[1], test=[2])
    with pytest.raises(DataError, match="no part 'test'"):
        splits.given(train=[0], val=[1])


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        (lambda: splits.random(100, (0.5, 0.1, 0.1)), "three numbers that make 1"),
        (lambda: splits.random(100, (1.2, -0.1, -0.1)), "three numbers that make 1"),
        (lambda: splits.folds(10, 2), "cannot be divided into 2 folds"),
        (lambda: splits.folds(10, 11), "cannot be divided into 11 folds"),
        (lambda: Split("folds", folds=5, fold=5).divide(20), r"no fold 5 \(there are 0 to 4\)"),
        (lambda: Split("scaffold").divide(20), "'scaffold' cannot be had"),
        (lambda: Split("column").divide(20), "'column' cannot be had"),
        (lambda: Split().divide(20), "'standard' cannot be had"),
    ],
)
def test_what_cannot_be_divided(wrong, why):
    with pytest.raises(UsageError, match=why):
        wrong()


def test_too_few_rows_leave_a_part_empty():
    with pytest.raises(DataError, match="leaves the part 'val' empty"):
        splits.random(5)
