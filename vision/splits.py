"""Train, validation and test: stratified by label, whole groups together, given parts as they are.

All of it is a function of the targets, the groups and a seed. Groups (a patient's images, a scene's) are
never divided; they are dealt out one by one, the largest first, to the part whose labels lack them most.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from manyheads.core.errors import DataError

TRAIN, VAL, TEST, OPEN = 0, 1, 2, -1
PARTS = ("train", "val", "test")

Targets: TypeAlias = NDArray[Any]  # classes [n] int64, or labels [n, K] float32 of 0, 1 and NaN


def assign(
    targets: Targets,
    given: NDArray[np.int8],
    groups: NDArray[np.int64] | None,
    val_share: float,
    test_share: float,
    seed: int,
) -> NDArray[np.int8]:
    """Give each image its part.

    Where any image's part is given, all are, and only validation, if it has none, is cut from train.

    Args:
        targets: Class of each image, or its labels (0, 1, NaN).
        given: TRAIN, VAL, TEST or OPEN for each image.
        groups: Number of each image's group.
        val_share: Share of the train images that becomes validation.
        test_share: Share of all images that becomes the test.
        seed: Seed of the choice.

    Shape:
        targets `[n]` or `[n, K]`; given, groups and the result `[n]`.

    Raises:
        DataError: A group is in two given parts, or there is too little to divide.
    """
    parts = given.copy()
    if groups is not None:
        check_groups(parts, groups)
    if (parts == OPEN).all():
        parts[:] = TRAIN
        _cut(parts, TEST, targets, groups, test_share, seed)
    if not (parts == VAL).any() and (parts == TRAIN).any():
        _cut(parts, VAL, targets, groups, val_share, seed + 1)
    return parts


def check_groups(parts: NDArray[np.int8], groups: NDArray[np.int64]) -> None:
    """Refuse a group with images in two parts.

    Raises:
        DataError: There is one; says how many.
    """
    pairs = np.unique(np.stack([groups, parts.astype(np.int64)], axis=1), axis=0)
    leaking = int((np.unique(pairs[:, 0], return_counts=True)[1] > 1).sum())
    if leaking:
        raise DataError(f"{leaking} groups have images in two of the given parts (train, val, test)")


def _cut(
    parts: NDArray[np.int8],
    part: int,
    targets: Targets,
    groups: NDArray[np.int64] | None,
    share: float,
    seed: int,
) -> None:
    """Turn a share of the train images into another part."""
    rows = np.flatnonzero(parts == TRAIN)
    rng = np.random.default_rng([seed, part])
    if groups is not None:
        chosen = by_group(targets[rows], groups[rows], share, rng)
    elif targets.ndim == 1:
        chosen = by_class(targets[rows], share, rng)
    else:
        chosen = by_labels(targets[rows], share, rng)
    if not chosen.any() or chosen.all():
        raise DataError(f"{len(rows)} images are too few to take a share of {share} for {PARTS[part]}")
    parts[rows[chosen]] = part


def by_class(classes: NDArray[np.integer], share: float, rng: np.random.Generator) -> NDArray[np.bool_]:
    """Choose a share of each class, one image at least; a class of a single image gives none."""
    chosen = np.zeros(len(classes), bool)
    order = rng.permutation(len(classes))
    order = order[np.argsort(classes[order], kind="stable")]
    first = 0
    for count in np.unique(classes, return_counts=True)[1]:
        if count > 1:
            chosen[order[first : first + min(count - 1, max(1, round(share * count)))]] = True
        first += count
    return chosen


def by_labels(targets: NDArray[np.floating], share: float, rng: np.random.Generator) -> NDArray[np.bool_]:
    """Choose a share of images with several labels: evenly along an order by combination of labels.

    Each combination gives its share to within one image, and rare ones do so together with their neighbours.
    """
    coded = np.nan_to_num(targets, nan=2.0).astype(np.uint8)
    order = rng.permutation(len(coded))
    common = np.argsort(-(coded == 1).sum(axis=0), kind="stable")  # the rarest label sorts first
    order = order[np.lexsort(coded[order][:, common].T)]
    steps = np.floor(np.arange(len(coded) + 1) * share + rng.random())
    chosen = np.zeros(len(coded), bool)
    chosen[order] = np.diff(steps) > 0
    return chosen


def _memberships(targets: Targets) -> tuple[NDArray[np.int64], NDArray[np.int64], int]:
    """Return pairs (image, class), and how many classes; several labels have one more, of every image."""
    if targets.ndim == 1:
        return np.arange(len(targets)), targets.astype(np.int64), int(targets.max()) + 1
    rows, labels = np.nonzero(targets == 1)
    n, k = targets.shape
    return np.concatenate([rows, np.arange(n)]), np.concatenate([labels, np.full(n, k)]), k + 1


def by_group(
    targets: Targets, groups: NDArray[np.int64], share: float, rng: np.random.Generator
) -> NDArray[np.bool_]:
    """Choose whole groups with about a share of each class; every class stays in what is not chosen.

    Raises:
        DataError: There is but one group.
    """
    names, numbers = np.unique(groups, return_inverse=True)
    if len(names) < 2:
        raise DataError("all images are of one group, which cannot be divided")
    rows, classes, k = _memberships(targets)
    # One entry a (group, class): how many of the group's images are of the class.
    keys, counts = np.unique(numbers[rows] * k + classes, return_counts=True)
    bounds = np.searchsorted(keys, np.arange(len(names) + 1) * k)
    total = np.bincount(classes, minlength=k).astype(float)
    lacking = np.stack([(1 - share) * total, share * total])  # what each of the two parts still lacks
    sizes = np.bincount(numbers)
    order = rng.permutation(len(names))
    second = np.zeros(len(names), bool)
    for g in order[np.argsort(-sizes[order], kind="stable")]:
        of, have = keys[bounds[g] : bounds[g + 1]] % k, counts[bounds[g] : bounds[g + 1]]
        costs = (have * (have - 2 * lacking[:, of]) / total[of]).sum(axis=1)
        second[g] = costs[1] < costs[0]
        lacking[int(second[g]), of] -= have
    entry_class, entry_group = keys % k, keys // k
    there = np.unique(entry_class[~second[entry_group]])
    for c in np.setdiff1d(np.unique(entry_class), there):  # a class that only the chosen groups have
        having = entry_group[entry_class == c]
        if second[having].all():
            second[having[np.argmin(sizes[having])]] = False
    if not second.any():  # few groups, a small share: the smallest that takes no class with it
        second[_spare(entry_class, entry_group, sizes)] = True
    return second[numbers]


def _spare(classes: NDArray[np.int64], groups: NDArray[np.int64], sizes: NDArray[np.int64]) -> int:
    """Return the smallest group without which every class is still there."""
    alone = np.bincount(classes)[classes] == 1
    needed = set(groups[alone].tolist())
    free = [g for g in np.argsort(sizes, kind="stable").tolist() if g not in needed]
    if not free:
        raise DataError("each group has a class of its own: no group can be set apart")
    return int(free[0])
