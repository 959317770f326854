"""A data set, folder, table or archive of images to train, validation and test batches."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
from lightning.pytorch import LightningDataModule
from numpy.typing import NDArray

from manyheads.core import datasets
from manyheads.core.errors import DataError, UsageError
from manyheads.core.loading import Schedule, share_of
from manyheads.vision import loading
from manyheads.vision.augment import Augment
from manyheads.vision.loading import (
    ImageBatch,
    ImageLoader,
    ImagePart,
    Loading,
    Reasons,
    default_workers,
    image_loader,
)
from manyheads.vision.manifest import TABLES, Columns, Manifest, read_manifest, shared_content
from manyheads.vision.preprocessing import Interpolation, Preprocessing, Resize
from manyheads.vision.sources import ARCHIVES
from manyheads.vision.splits import PARTS, TEST, TRAIN, VAL, assign

__all__ = ["Augment", "Columns", "ImageBatch", "ImageData", "Loading", "Splits", "View"]

log = logging.getLogger(__name__)

SMALL = 64  # images of up to so many pixels are taken as they are, not cut from a larger one
_MEASURED = 10_000  # images that mean and deviation are measured on, at most
_IMAGENET = Preprocessing()
_FASHION = (
    *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
    *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
)


@dataclass(frozen=True)
class Splits:
    """How images are divided where their source does not say.

    Args:
        val_share: Share of the train images that becomes validation.
        test_share: Share of all images that becomes the test.
        check_duplicates: Look for the same file content in two parts, and warn; reads every image once.
    """

    val_share: float = 0.1
    test_share: float = 0.2
    check_duplicates: bool = False


@dataclass(frozen=True)
class View:
    """How an image becomes the model's input; what is None follows the images' size.

    Args:
        interpolation: The filter of the resize.
        crop_pct: Share of the resized image's side that validation, test and prediction see; None takes 1 for
            images of up to 64 pixels, else 0.875.
        resize: "shorter" keeps the aspect and crops, "squash" does not.
        mean: Of each channel, of values from 0 to 1; None takes ImageNet's for colour images above 64 pixels,
            else measures it on the train images.
        std: The same for the deviation; given with mean.
    """

    interpolation: Interpolation = "bicubic"
    crop_pct: float | None = None
    resize: Resize = "shorter"
    mean: list[float] | None = None
    std: list[float] | None = None


_COLUMNS, _SPLITS, _VIEW, _AUGMENT, _LOADING = Columns(), Splits(), View(), Augment(), Loading()


class ImageData(LightningDataModule):
    """Images with classes or labels: found, divided, changed by chance for training, normalised.

    Args:
        dataset: Name of a data set, or path of a folder of classes, a CSV or parquet table, a zip or a tar.
        size: Height and width of the model's input; None takes the images' own where they are of one size up
            to 64 pixels, else 224.
        channels: 3, 1, or "auto": 1 where the images looked at are grey.
        batch_size: Images a batch.
        workers: Processes that decode; None takes none where images fit into memory, else up to 2.
        sampler: "uniform" takes each train image once an epoch, "balanced" draws as many, each class equally
            often.
        seed: Seed of the division, the order and the augmentation.
        columns: A table's columns.
        splits: How images are divided.
        view: How an image becomes the model's input.
        augment: What is done to train images by chance.
        loading: Memory, bad images, and the batch size of validation and test.
    """

    def __init__(
        self,
        dataset: str = "fashion_mnist",
        size: int | None = None,
        channels: Literal["auto", 1, 3] = "auto",
        batch_size: int = 128,
        workers: int | None = None,
        sampler: Literal["uniform", "balanced"] = "uniform",
        seed: int = 0,
        columns: Columns = _COLUMNS,
        splits: Splits = _SPLITS,
        view: View = _VIEW,
        augment: Augment = _AUGMENT,
        loading: Loading = _LOADING,
    ) -> None:
        super().__init__()
        for name, value in (("val_share", splits.val_share), ("test_share", splits.test_share)):
            if not 0 < value < 1:
                raise UsageError(f"splits.{name} must lie between 0 and 1, not {value}")
        sizes = {"batch_size": batch_size, "size": size, "loading.eval_batch_size": loading.eval_batch_size}
        for name, number in sizes.items():
            if number is not None and number < 1:
                raise UsageError(f"{name} must be 1 or more, not {number}")
        if workers is not None and workers < 0:
            raise UsageError(f"workers must be 0 or more, not {workers}")
        if (view.mean is None) != (view.std is None):
            raise UsageError("view.mean and view.std are given together")
        self.dataset, self.given_size, self.given_channels = dataset, size, channels
        self.batch_size, self.workers, self.sampler, self.seed = batch_size, workers, sampler, seed
        self.columns, self.splits, self.view = columns, splits, view
        self.augment, self.loading = augment, loading
        self.bad: Reasons = {}
        self._ready = False

    @property
    def path(self) -> Path:
        """The file or folder that the images come from."""
        return datasets.locate(self.dataset) if self._is_named else Path(self.dataset)

    @property
    def _is_named(self) -> bool:
        known = (*TABLES, *ARCHIVES)
        return not (
            "/" in self.dataset or self.dataset.lower().endswith(known) or Path(self.dataset).is_dir()
        )

    @property
    def classes(self) -> int:
        """How many classes or labels there are."""
        self.setup()
        return len(self.labels)

    @property
    def multi_label(self) -> bool:
        """Whether an image can have several labels."""
        self.setup()
        return self.manifest.multi_label

    @property
    def class_counts(self) -> list[int]:
        """Train images of each class, or with each label."""
        self.setup()
        return self.manifest.counts(self.rows[TRAIN])

    @property
    def known_counts(self) -> list[int]:
        """Train images of which each label is known: all of them, but of several labels."""
        self.setup()
        targets = self.manifest.targets[self.rows[TRAIN]]
        known = (~np.isnan(targets)).sum(axis=0) if targets.ndim == 2 else np.full(self.classes, len(targets))
        return [int(n) for n in known]

    @property
    def channels(self) -> int:
        """Channels of an image."""
        self.setup()
        return self.transform.channels

    @property
    def size(self) -> int:
        """Height and width of an image."""
        self.setup()
        return self.transform.size[0]

    def setup(self, stage: str | None = None) -> None:
        """Read, check and divide; once, whatever the stage. Images are decoded when batches are asked for.

        Raises:
            DataError: What is wrong with the data.
        """
        if self._ready:
            return
        self.manifest = self._read()
        self.labels = self.manifest.labels
        given, groups = self.manifest.parts, self.manifest.groups
        shares = self.splits.val_share, self.splits.test_share
        try:
            parts = assign(self.manifest.targets, given, groups, *shares, self.seed)
        except DataError as error:
            raise DataError(f"{self.manifest.source}: {error}") from None
        self.rows = tuple(np.flatnonzero(parts == part) for part in (TRAIN, VAL, TEST))
        self._check_classes()
        if self.splits.check_duplicates:
            self._warn_of_duplicates(parts)
        self.transform = self._find_transform()
        self.parts: dict[int, ImagePart] = {}
        self._ready = True

    def _read(self) -> Manifest:
        """Read the manifest; the shipped data sets say themselves how."""
        if not self._is_named:
            return read_manifest(Path(self.dataset), self.columns)
        path = self.path
        if self.dataset == "imagenet_samples":
            index = json.loads((path / "imagenet_class_index.json").read_text())
            columns = Columns("file", "class_index", folder=str(path / "images"))
            labels = tuple(str(index[str(i)][2]) for i in range(len(index)))
            return read_manifest(path / "labels.csv", columns, labels, TEST)
        manifest = read_manifest(path, self.columns)
        if self.dataset == "fashion_mnist":
            return replace(manifest, labels=_FASHION)
        if self.dataset == "cifar10_10k":
            return replace(manifest, labels=tuple(json.loads((path / "classes.json").read_text())))
        return manifest

    def _check_classes(self) -> None:
        """Refuse classes that no train image has."""
        manifest, train = self.manifest, self.rows[TRAIN]
        if manifest.multi_label or not len(train):
            return
        counts = np.array(manifest.counts(train))
        for part in (VAL, TEST):
            unknown = np.unique(
                manifest.targets[self.rows[part]][counts[manifest.targets[self.rows[part]]] == 0]
            )
            if len(unknown):
                raise DataError(
                    f"{manifest.source}: no train image is of class {self.labels[int(unknown[0])]!r}, which "
                    f"{PARTS[part]} images are of"
                )

    def _warn_of_duplicates(self, parts: NDArray[np.int8]) -> None:
        """Log how many contents are in two parts, and one of them."""
        twice = shared_content(self.manifest, parts)
        if twice:
            one, other = (f"{self.manifest.store.id(i)} ({PARTS[parts[i]]})" for i in twice[0])
            log.warning(
                "%s: %d images are in two parts, such as %s and %s",
                self.manifest.source,
                len(twice),
                one,
                other,
            )

    def _find_transform(self) -> Preprocessing:
        """Find out size, channels and normalisation, and log them."""
        rows = np.concatenate(self.rows) if not len(self.rows[TRAIN]) else self.rows[TRAIN]
        looked = loading.probe(self.manifest, rows, 3)
        if not looked:
            raise DataError(f"{self.manifest.source}: of the first images looked at none can be decoded")
        sizes = {image.size for image in looked}
        own = sizes.pop() if len(sizes) == 1 else (SMALL + 1, SMALL + 1)
        size = self.given_size or (own[0] if own[0] == own[1] <= SMALL else 224)
        grey = all(_is_grey(np.asarray(image)) for image in looked)
        channels = self.given_channels if self.given_channels != "auto" else 1 if grey else 3
        view = self.view
        crop_pct = view.crop_pct if view.crop_pct is not None else 1.0 if size <= SMALL else 0.875
        plain = Preprocessing(
            (size, size),
            channels,
            (0.0,) * channels,
            (1.0,) * channels,
            view.interpolation,
            crop_pct,
            view.resize,
        )
        if view.mean is not None and view.std is not None:
            mean, std, origin = tuple(view.mean), tuple(view.std), "as given"
        elif channels == 3 and size > SMALL:
            mean, std, origin = _IMAGENET.mean, _IMAGENET.std, "ImageNet's"
        else:
            mean, std, origin = *self._measure(plain, rows), "measured on the train images"
        log.info(
            "%s: %d train, %d val, %d test images of %d %s; size %d, channels %d, mean and deviation %s",
            self.manifest.source,
            *(len(each) for each in self.rows),
            len(self.labels),
            "labels" if self.manifest.multi_label else "classes",
            size,
            channels,
            origin,
        )
        return replace(plain, mean=mean, std=std)

    def _measure(
        self, plain: Preprocessing, rows: NDArray[np.integer]
    ) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Measure mean and deviation of each channel, rounded so that they read well in the model folder."""
        chosen = rows[np.unique(np.linspace(0, len(rows) - 1, min(_MEASURED, len(rows))).astype(int))]
        part = ImagePart(self.manifest, chosen, plain, bad_images=self.loading.bad_images)
        count, first, second = 0, np.zeros(plain.channels), np.zeros(plain.channels)
        for begin in range(0, len(chosen), 256):
            samples = np.arange(begin, min(begin + 256, len(chosen)))
            images, _ = part.load(samples, {})
            for image in images:
                values = np.asarray(image, np.float64).reshape(-1, plain.channels) / 255
                count += len(values)
                first += values.sum(axis=0)
                second += (values**2).sum(axis=0)
        mean = first / max(1, count)
        std = np.sqrt(np.maximum(second / max(1, count) - mean**2, 0))
        if not (std > 1e-4).all():
            raise DataError(f"{self.manifest.source}: the train images are all of one colour")
        return tuple(np.round(mean, 4).tolist()), tuple(np.round(std, 4).tolist())

    def part(self, part: int) -> ImagePart:
        """Return the images of a part, in memory where they fit.

        Raises:
            DataError: The part is empty.
        """
        self.setup()
        if part not in self.parts:
            if not len(self.rows[part]):
                raise DataError(f"{self.manifest.source} has no {PARTS[part]} images")
            augment = self.augment if part == TRAIN else None
            options = self.transform, augment, self.seed, self.loading.bad_images
            found = ImagePart(self.manifest, self.rows[part], *options)
            if self.loading.cache == "auto":
                bad: Reasons = {}
                found.fill_cache(self.loading.cache_mib << 20, bad)
                loading.report(bad, self.bad, self.manifest.source)
            self.parts[part] = found
        return self.parts[part]

    def _loader(self, part: int, schedule: Schedule) -> ImageLoader:
        images = self.part(part)
        workers = self.workers if self.workers is not None else default_workers(images.cached)
        return image_loader(images, schedule, workers, self.bad)

    def train_dataloader(self) -> ImageLoader:
        """Return the train batches, in a new order each epoch; a last one that is not full is left out.

        Raises:
            DataError: There are fewer train images than a batch.
        """
        self.setup()
        share, count = share_of(self.trainer), len(self.rows[TRAIN])
        weights = None
        if self.sampler == "balanced":
            weights = loading.balanced_weights(self.manifest, self.rows[TRAIN])
        schedule = Schedule(count, self.batch_size, True, True, self.seed, share, weights)
        if count and not len(schedule):
            raise DataError(
                f"{count} train images do not fill a batch of {self.batch_size}; lower batch_size"
            )
        return self._loader(TRAIN, schedule)

    def _evaluated(self, part: int, alone: bool = False) -> ImageLoader:
        self.setup()
        size = self.loading.eval_batch_size or self.batch_size
        share = (0, 1) if alone else share_of(self.trainer)
        return self._loader(part, Schedule(len(self.rows[part]), size, part=share))

    def val_dataloader(self, alone: bool = False) -> ImageLoader:
        """Return the validation batches: this process' share of them, or all."""
        return self._evaluated(VAL, alone)

    def test_dataloader(self) -> ImageLoader:
        """Return this process' share of the test batches."""
        return self._evaluated(TEST)

    def preprocessing(self) -> dict[str, object]:
        """Return what a predictor needs to treat new images as these; plain JSON."""
        self.setup()
        saved = {"labels": list(self.labels), "multi_label": self.manifest.multi_label}
        return {**self.transform.to_json(), **saved}


def _is_grey(pixels: NDArray[np.uint8]) -> bool:
    return bool((pixels[..., 0] == pixels[..., 1]).all() and (pixels[..., 1] == pixels[..., 2]).all())
