"""Augmentation: what each operation may do, and that it is a function of seed, epoch and ticket."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image

from manyheads.core.errors import UsageError
from manyheads.vision.augment import Augment, Augmenter, uniform

NONE = Augment(crop="none", flip=False)


def made(size: int = 28, seed: int = 3, **options: object) -> Augmenter:
    return Augmenter(dataclasses.replace(NONE, **options), (size, size), "bicubic", seed)  # type: ignore[arg-type]


def pixels(n: int, size: int = 28, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(0).integers(1, 256, (n, size, size, channels), np.uint8)


def test_uniform_numbers() -> None:
    drawn = uniform(1, 2, np.arange(20_000), 8)
    assert drawn.shape == (20_000, 8)
    assert drawn.min() >= 0
    assert drawn.max() < 1
    np.testing.assert_allclose(drawn.mean(axis=0), 0.5, atol=0.01)
    np.testing.assert_allclose(np.corrcoef(drawn.T), np.eye(8), atol=0.03)
    np.testing.assert_array_equal(uniform(1, 2, np.array([7, 5]), 8), drawn[[7, 5]])
    for other in (uniform(2, 2, np.arange(9), 8), uniform(1, 3, np.arange(9), 8)):
        assert not np.isin(other, drawn[:9]).any()


def test_nothing_is_done_where_nothing_is_asked() -> None:
    images, tickets = pixels(5), np.arange(5)
    assert made().batch(images, 0, tickets) is images
    assert made().erased(0, tickets) is None
    assert not made().single


def test_flip_mirrors_about_half() -> None:
    images = pixels(1000, 8)
    flipped = made(8, flip=True).batch(images, 4, np.arange(1000))
    mirrored = (flipped == images[:, :, ::-1]).all(axis=(1, 2, 3))
    same = (flipped == images).all(axis=(1, 2, 3))
    assert (mirrored ^ same).all()
    assert 440 < mirrored.sum() < 560


def test_pad_crop_shifts_over_black() -> None:
    images = pixels(500, 12, 1)
    shifted = made(12, crop="pad", pad=2).batch(images, 0, np.arange(500))
    assert shifted.shape == images.shape
    seen = set()
    for image, got in zip(images, shifted, strict=True):
        padded = np.pad(image, ((2, 2), (2, 2), (0, 0)))
        fits = [(y, x) for y in range(5) for x in range(5) if (padded[y : y + 12, x : x + 12] == got).all()]
        assert len(fits) == 1
        seen.add(fits[0])
    assert len(seen) == 25


def test_erasing_takes_one_rectangle_of_some_images() -> None:
    erased = made(32, erasing=0.25).erased(0, np.arange(2000))
    assert erased is not None
    share = erased.mean(axis=(1, 2))
    assert 0.2 < (share > 0).mean() < 0.3
    assert share.max() < 0.36
    assert share[share > 0].min() > 0.01
    for mask in erased[share > 0][:50]:
        rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
        assert mask.sum() == (rows[-1] - rows[0] + 1) * (columns[-1] - columns[0] + 1)


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_images_are_cropped_and_changed_one_by_one(mode: str) -> None:
    images = [Image.fromarray(each).convert(mode) for each in pixels(6, 40)]
    augmenter = made(24, crop="resized", scale_min=0.3, randaugment=2)
    assert augmenter.single
    state = torch.get_rng_state()
    changed = augmenter.images(images, 5, np.arange(6))
    assert torch.equal(torch.get_rng_state(), state)  # the model's dropout draws as without us
    assert {image.size for image in changed} == {(24, 24)}
    assert {image.mode for image in changed} == {mode}
    torch.manual_seed(99)
    again = augmenter.images(images[4:1:-1], 5, np.array([4, 3, 2]))
    assert [image.tobytes() for image in again] == [changed[i].tobytes() for i in (4, 3, 2)]
    other = augmenter.images(images, 6, np.arange(6))
    assert all(a.tobytes() != b.tobytes() for a, b in zip(changed, other, strict=True))


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_every_operation_of_randaugment_runs(mode: str) -> None:
    images = [Image.fromarray(each).convert(mode) for each in pixels(120, 16)]
    changed = made(16, randaugment=3, magnitude=15).images(images, 0, np.arange(120))
    assert sum(a.tobytes() != b.tobytes() for a, b in zip(images, changed, strict=True)) > 100


def test_a_batch_is_its_images_one_by_one() -> None:
    augmenter, images = made(crop="pad", flip=True, erasing=0.5), pixels(40)
    whole, masks = augmenter.batch(images, 2, np.arange(40)), augmenter.erased(2, np.arange(40))
    assert masks is not None
    for i in (0, 17, 39):
        ticket = np.array([i])
        np.testing.assert_array_equal(augmenter.batch(images[[i]], 2, ticket)[0], whole[i])
        np.testing.assert_array_equal(augmenter.erased(2, ticket)[0], masks[i])  # type: ignore[index]


def test_auto_crop_follows_the_size() -> None:
    assert made(32, crop="auto").crop == "pad"
    assert made(64, crop="auto").crop == "pad"
    assert made(65, crop="auto").crop == "resized"


@pytest.mark.parametrize(
    "wrong", [{"scale_min": 0}, {"scale_min": 1.1}, {"pad": -1}, {"magnitude": 31}, {"erasing": 2}]
)
def test_options_out_of_range(wrong: dict[str, float]) -> None:
    with pytest.raises(UsageError, match=rf"augment\.{next(iter(wrong))} cannot be"):
        Augment(**wrong)  # type: ignore[arg-type]
