"""k-NN on features: the figures of a brute-force reference, whatever the blocks, and what cannot be used."""

from __future__ import annotations

import math
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from manyheads.core.errors import DataError
from manyheads.vision import neighbours
from manyheads.vision.manifest import read_manifest
from manyheads.vision.predictor import Outputs, Predictor
from manyheads.vision.preprocessing import Preprocessing

COLOURS = {"red": (200, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 200)}


class Means(nn.Module):
    """Features are an image's mean colours."""

    num_classes = 0

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(3))

    def forward_features(self, x: Tensor) -> Tensor:
        return x.mean((2, 3)) @ self.weight

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        assert pre_logits
        return x


@pytest.fixture
def predictor() -> Predictor:
    plain: dict[str, Any] = {"mean": (0.5,) * 3, "std": (0.5,) * 3, "crop_pct": 1.0}
    found = Predictor(Means(), Preprocessing(size=(8, 8), **plain), Outputs((), kind="features"))
    found.batch_size = 7
    return found


def fill(folder: Path, count: int, noise: int, seed: int, colours: tuple[str, ...] = tuple(COLOURS)) -> Path:
    """Class folders of images of noisy colours."""
    rng = np.random.default_rng(seed)
    for name in colours:
        (folder / name).mkdir(parents=True)
        for i in range(count):
            shift = rng.integers(-noise, noise + 1, 3)
            pixels = np.clip(np.array(COLOURS[name]) + shift, 0, 255).astype(np.uint8)
            Image.fromarray(np.broadcast_to(pixels, (8, 8, 3)).copy()).save(folder / name / f"{i}.png")
    return folder


def reference(
    train: Tensor, targets: list[int], test: Tensor, k: int, temperature: float
) -> list[list[tuple[int, float]]]:
    """The classes of each test row by falling votes, one pair after the other."""
    found = []
    for row in test.double().tolist():
        cosines = []
        for other, target in zip(train.double().tolist(), targets, strict=True):
            lengths = math.hypot(*row) * math.hypot(*other)
            cosines.append((sum(a * b for a, b in zip(row, other, strict=True)) / lengths, target))
        ballot: dict[int, float] = defaultdict(float)
        for cosine, target in sorted(cosines, reverse=True)[:k]:
            ballot[target] += math.exp(cosine / temperature)
        found.append(sorted(ballot.items(), key=lambda pair: -pair[1]))
    return found


@pytest.mark.parametrize("block", [1, 10, 64, 1000])
@pytest.mark.parametrize("k", [1, 5, 20])
def test_votes_are_those_of_the_reference(block: int, k: int) -> None:
    train, test = torch.randn(150, 6), torch.randn(20, 6)
    targets = torch.randint(0, 7, (150,))
    bank, queries = (nn.functional.normalize(each, dim=1) for each in (train, test))
    cosines, where = neighbours.nearest(queries, bank, k, block)
    votes = neighbours.votes(cosines, targets[where], 7, 0.07)
    for mine, nearest, expected in zip(
        votes, cosines, reference(train, targets.tolist(), test, k, 0.07), strict=True
    ):
        largest = math.exp(nearest[0].item() / 0.07)
        for target, vote in expected:
            assert mine[target].item() * largest == pytest.approx(vote, rel=1e-4)
        assert int((mine > 0).sum()) == len(expected)


def test_low_temperatures_do_not_overflow() -> None:
    cosines, targets = torch.tensor([[1.0, 0.9, 0.9]]), torch.tensor([[2, 0, 0]])
    assert neighbours.votes(cosines, targets, 3, 1e-4).tolist() == [[0.0, 0.0, 1.0]]
    assert neighbours.votes(cosines, targets, 3, 10.0)[0].argmax() == 0


def test_accuracies_are_those_of_the_reference(predictor: Predictor, tmp_path: Path) -> None:
    train = neighbours.training_rows(read_manifest(fill(tmp_path / "train", 12, 150, 0)))
    test = neighbours.test_rows(read_manifest(fill(tmp_path / "test", 9, 150, 1)), train.manifest.labels)
    assert len(train), len(test) == (36, 27)
    seen: list[int] = []
    found, bad = neighbours.evaluate(predictor, train, test, (1, 5, 20), 0.07, seen.append)
    assert not bad
    assert sum(seen) == 36 + 27
    rows = [torch.cat([f for f, _, _ in neighbours.features(predictor, each)]) for each in (train, test)]
    assert rows[0].norm(dim=1).allclose(torch.ones(36))
    for each in found:
        ranked = reference(rows[0], train.targets.tolist(), rows[1], each.k, 0.07)
        right = [pairs[0][0] == truth for pairs, truth in zip(ranked, test.targets.tolist(), strict=True)]
        assert each.top1 == pytest.approx(sum(right) / 27)
        assert each.top5 == 1.0 if each.k == 20 else each.top5 >= each.top1
    assert 0.5 < found[0].top1 < 1
    assert neighbours.evaluate(predictor, train, test, (1, 5, 20), 0.07)[0] == found


def test_classes_are_matched_by_name(predictor: Predictor, tmp_path: Path) -> None:
    train = neighbours.training_rows(read_manifest(fill(tmp_path / "train", 3, 5, 0)))
    only = read_manifest(fill(tmp_path / "test", 3, 5, 1, ("green", "red")))
    test = neighbours.test_rows(only, train.manifest.labels)
    (found,), _ = neighbours.evaluate(predictor, train, test, (3,), 0.07)
    assert found.top1 == 1.0
    with pytest.raises(DataError, match="class 'blue' is none of the training images' classes"):
        neighbours.test_rows(train.manifest, only.labels)


def test_parts_that_a_source_names_are_kept_apart(tmp_path: Path) -> None:
    for part, count in (("train", 4), ("val", 3), ("test", 2)):
        fill(tmp_path / part, count, 5, count)
    manifest = read_manifest(tmp_path)
    train = neighbours.training_rows(manifest)
    test = neighbours.test_rows(manifest, manifest.labels)
    assert (len(train), len(test)) == (12, 6)
    assert not set(train.rows) & set(test.rows)


def test_images_that_cannot_be_used_are_named(predictor: Predictor, tmp_path: Path) -> None:
    train = fill(tmp_path / "train", 8, 5, 0)
    (train / "red" / "broken.png").write_bytes(b"no image")
    test = fill(tmp_path / "test", 2, 5, 1)
    for path in sorted((test / "blue").iterdir()):
        path.write_bytes(b"\x89PNG broken")
    train_rows = neighbours.training_rows(read_manifest(train))
    test_rows = neighbours.test_rows(read_manifest(test), train_rows.manifest.labels)
    (found,), bad = neighbours.evaluate(predictor, train_rows, test_rows, (5,), 0.07)
    assert found.top1 == 1.0
    assert [each.id for each in bad] == ["red/broken.png", "blue/0.png", "blue/1.png"]
    for path in test.rglob("*.png"):
        path.write_bytes(b"\x89PNG broken")
    with pytest.raises(DataError, match="no test image can be used"):
        neighbours.evaluate(predictor, train_rows, test_rows, (5,), 0.07)


def test_more_neighbours_than_images(predictor: Predictor, tmp_path: Path) -> None:
    rows = neighbours.training_rows(read_manifest(fill(tmp_path / "train", 3, 5, 0)))
    with pytest.raises(DataError, match="20 neighbours are asked for, of 9 training images"):
        neighbours.evaluate(predictor, rows, rows, (20,), 0.07)


def test_several_labels_are_refused(tmp_path: Path) -> None:
    fill(tmp_path, 2, 5, 0, ("red",))
    (tmp_path / "list.csv").write_text("image,a,b\nred/0.png,1,0\nred/1.png,0,1\n")
    from manyheads.vision.manifest import Columns

    manifest = read_manifest(tmp_path / "list.csv", Columns(label=["a", "b"]))
    with pytest.raises(DataError, match="several labels have no nearest class"):
        neighbours.training_rows(manifest)
