"""k nearest neighbours on features: how well a backbone separates classes, without training anything.

Source: Wu et al. 2018 (arXiv 1805.01978), as DINO evaluates (Caron et al. 2021, arXiv 2104.14294): features
of length 1, votes of exp(cosine / temperature).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from manyheads.core.errors import BadRecord, DataError
from manyheads.core.predictor import Bad
from manyheads.vision.manifest import Manifest
from manyheads.vision.predictor import Predictor
from manyheads.vision.splits import OPEN, TEST, TRAIN, VAL

BLOCK = 1 << 16  # training images that a batch is compared with at a time


@dataclass(frozen=True)
class Labelled:
    """Images with a class each: some rows of a manifest.

    Shape:
        rows, targets `[n]`.
    """

    manifest: Manifest
    rows: NDArray[np.int64]
    targets: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.rows)


def training_rows(manifest: Manifest) -> Labelled:
    """Return a manifest's training images; all of one that names no parts.

    Raises:
        DataError: It has none, or images with several labels.
    """
    return _part(manifest, (TRAIN, OPEN), "training", manifest.labels)


def test_rows(manifest: Manifest, labels: Sequence[str]) -> Labelled:
    """Return a manifest's test images, else those for validation, else all of one that names no parts.

    Args:
        labels: Names of the classes by which targets are numbered: those of the training images.

    Raises:
        DataError: It has none, images with several labels, or a class that `labels` has not.
    """
    return _part(manifest, (TEST, VAL, OPEN), "test", labels)


test_rows.__test__ = False  # type: ignore[attr-defined]  # pytest: no test


def _part(manifest: Manifest, parts: Sequence[int], what: str, labels: Sequence[str]) -> Labelled:
    if manifest.multi_label:
        raise DataError(f"{manifest.source}: images with several labels have no nearest class")
    rows = next((found for part in parts if len(found := np.flatnonzero(manifest.parts == part))), None)
    if rows is None:
        raise DataError(f"{manifest.source}: no {what} images")
    known = {label: number for number, label in enumerate(labels)}
    targets = manifest.targets[rows].astype(np.int64)
    names = [manifest.labels[number] for number in np.unique(targets)]
    strange = [name for name in names if name not in known]
    if strange:
        raise DataError(f"{manifest.source}: class {strange[0]!r} is none of the training images' classes")
    numbers = np.array([known.get(name, -1) for name in manifest.labels], dtype=np.int64)
    return Labelled(manifest, rows.astype(np.int64), numbers[targets])


def features(
    predictor: Predictor, images: Labelled, advance: Callable[[int], None] = lambda count: None
) -> Iterator[tuple[Tensor, Tensor, list[Bad]]]:
    """Yield features and targets of images, batch by batch, and which of them cannot be used.

    Args:
        predictor: Gives features (`configure({"output_kind": "features"})`).
        images: The images.
        advance: Called with the number of images of each batch.

    Yields:
        Features of length 1 `[b, D]`, targets `[b]`, bad images.
    """

    def load(row: int) -> Tensor | BadRecord:
        preprocessing = predictor.preprocessing
        try:
            at_least = max(preprocessing.scaled)
            return preprocessing(images.manifest.store.image(row, preprocessing.channels, at_least))
        except BadRecord as error:
            return error

    with ThreadPoolExecutor(predictor.prepare_threads) as pool:
        for start in range(0, len(images), predictor.batch_size):
            rows = images.rows[start : start + predictor.batch_size].tolist()
            targets = images.targets[start : start + predictor.batch_size]
            found = list(pool.map(load, rows))
            good = [i for i, each in enumerate(found) if isinstance(each, Tensor)]
            bad = [
                Bad(images.manifest.store.id(row), str(each))
                for row, each in zip(rows, found, strict=True)
                if isinstance(each, BadRecord)
            ]
            samples = [each for each in found if isinstance(each, Tensor)]
            if samples:
                normed = F.normalize(predictor.forward(predictor.collate(samples)), dim=1)
                yield normed, torch.from_numpy(targets[good]), bad
            else:
                yield torch.empty(0, 0), torch.empty(0, dtype=torch.int64), bad
            advance(len(rows))


def nearest(queries: Tensor, bank: Tensor, k: int, block: int = BLOCK) -> tuple[Tensor, Tensor]:
    """Return the k most similar rows of a bank: their cosines, falling, and their numbers.

    The bank is read in blocks, so that memory does not grow with it.

    Shape:
        queries `[b, D]`, bank `[M, D]`, rows of length 1; the results `[b, k]`.
    """
    best, where = queries.new_empty(len(queries), 0), torch.empty(len(queries), 0, dtype=torch.int64)
    for start in range(0, len(bank), block):
        close = queries @ bank[start : start + block].T
        values, rows = close.topk(min(k, close.shape[1]), dim=1)
        best, where = torch.cat([best, values], 1), torch.cat([where, rows + start], 1)
        best, order = best.topk(min(k, best.shape[1]), dim=1)
        where = where.gather(1, order)
    return best, where


def votes(cosines: Tensor, targets: Tensor, classes: int, temperature: float) -> Tensor:
    """Return the votes of neighbours for each class, the nearest neighbour's being 1.

    Shape:
        cosines `[b, k]`, the largest first, targets `[b, k]`; the result `[b, classes]`, float64.
    """
    weights = torch.exp((cosines - cosines[:, :1]).double() / temperature)
    return weights.new_zeros(len(targets), classes).scatter_add_(1, targets, weights)


def _bank(
    predictor: Predictor, train: Labelled, advance: Callable[[int], None]
) -> tuple[Tensor, Tensor, list[Bad]]:
    """Return the features and targets of all training images, and which of them cannot be used."""
    bank, targets = torch.empty(0, 0), torch.empty(len(train), dtype=torch.int64)
    bad: list[Bad] = []
    filled = 0
    for rows, some, strange in features(predictor, train, advance):
        bad += strange
        if not len(rows):
            continue
        if not filled:
            bank = torch.empty(len(train), rows.shape[1])  # once: a list of batches would hold them twice
        bank[filled : filled + len(rows)], targets[filled : filled + len(rows)] = rows, some
        filled += len(rows)
    return bank[:filled], targets[:filled], bad


@dataclass(frozen=True)
class Accuracy:
    """How many test images were recognised by their k nearest training images."""

    k: int
    top1: float
    top5: float


def evaluate(
    predictor: Predictor,
    train: Labelled,
    test: Labelled,
    ks: Sequence[int],
    temperature: float,
    advance: Callable[[int], None] = lambda count: None,
) -> tuple[list[Accuracy], list[Bad]]:
    """Classify test images by their nearest training images.

    Args:
        predictor: Any predictor of the model.
        train: The images whose classes vote; `train.manifest.labels` are all classes.
        test: The images to classify.
        ks: How many neighbours vote; each has its figures.
        temperature: Divides cosines: the lower, the more the nearest count.
        advance: Called with the number of images of each batch.

    Returns:
        The accuracies, one a k, and the images that cannot be used.

    Raises:
        DataError: Fewer training images than k, or no test image that can be used.
    """
    predictor = predictor.configure({"output_kind": "features"})
    bank, targets, bad = _bank(predictor, train, advance)
    if len(bank) < max(ks):
        raise DataError(f"{max(ks)} neighbours are asked for, of {len(bank)} training images")
    classes, top, tested = len(train.manifest.labels), min(5, len(train.manifest.labels)), 0
    hits = np.zeros((len(ks), 2), dtype=np.int64)
    for rows, truth, some in features(predictor, test, advance):
        bad += some
        if not len(rows):
            continue
        cosines, where = nearest(rows, bank, max(ks))
        for i, k in enumerate(ks):
            ballot = votes(cosines[:, :k], targets[where[:, :k]], classes, temperature)
            right = ballot.sort(dim=1, descending=True, stable=True).indices[:, :top] == truth[:, None]
            hits[i] += (int(right[:, 0].sum()), int(right.any(1).sum()))
        tested += len(rows)
    if not tested:
        raise DataError(f"{test.manifest.source}: no test image can be used ({bad[-1].reason})")
    return [Accuracy(k, *(hits[i] / tested).tolist()) for i, k in enumerate(ks)], bad
