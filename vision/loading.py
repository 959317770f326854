"""Images of a part to batches: decoded here or in worker processes, kept in memory where they are few.

A batch is a function of (seed, epoch, sample numbers): workers, resuming and the cache change nothing in it.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Literal, TypedDict

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from manyheads.core.errors import BadRecord, DataError
from manyheads.core.loading import BatchLoader, Job, Schedule
from manyheads.vision.augment import NO_AUGMENT, Augment, Augmenter
from manyheads.vision.idx import Pixels
from manyheads.vision.manifest import Manifest
from manyheads.vision.preprocessing import Preprocessing

log = logging.getLogger(__name__)

_PROBED = 32  # images looked at to guess what the others are like
_NAMED = 5  # bad images named one by one; of the others, the number


class ImageBatch(TypedDict):
    """A batch of images."""

    image: Tensor  # [B, C, H, W] float32, normalised
    target: Tensor  # [B] int64, the class; or [B, K] float32, NaN where a label is unknown


Reasons = dict[str, str]  # id of a bad image -> why
Policy = Literal["error", "skip"]


@dataclass(frozen=True)
class Loading:
    """How images are loaded.

    Args:
        eval_batch_size: Images a batch in validation and test; None takes that of training.
        cache: "auto" keeps decoded images in memory where they fit; "off" decodes them again each epoch.
        cache_mib: What each part may take in memory, in MiB.
        bad_images: What an image that cannot be decoded is: an "error", or left out ("skip") and reported.
    """

    eval_batch_size: int | None = None
    cache: Literal["auto", "off"] = "auto"
    cache_mib: int = 512
    bad_images: Policy = "error"


def probe(manifest: Manifest, rows: NDArray[np.integer], channels: int) -> list[Image.Image]:
    """Decode a few images, spread evenly, leaving out bad ones."""
    found = []
    for row in rows[np.unique(np.linspace(0, len(rows) - 1, min(_PROBED, len(rows))).astype(int))]:
        try:
            found.append(manifest.store.image(int(row), channels, None))
        except BadRecord:
            continue
    return found


class ImagePart:
    """The images of one part, as numbered samples.

    Args:
        manifest: All images.
        rows: Which of them are in this part.
        preprocessing: Their way to the model.
        augment: What is done to them by chance; None for validation and test.
        seed: Seed of that.
        bad_images: What an image that cannot be decoded is.
    """

    def __init__(
        self,
        manifest: Manifest,
        rows: NDArray[np.integer],
        preprocessing: Preprocessing,
        augment: Augment | None = None,
        seed: int = 0,
        bad_images: Policy = "error",
    ) -> None:
        self.manifest, self.rows, self.preprocessing = manifest, rows, preprocessing
        self.bad_images, self.cached = bad_images, False
        size, channels = preprocessing.size, preprocessing.channels
        self.augmenter = Augmenter(augment or NO_AUGMENT, size, preprocessing.interpolation, seed)
        # Values 0 to 1 before normalising: what the evaluation does up to there, exactly.
        self._plain = Preprocessing(
            size,
            channels,
            (0.0,) * channels,
            (1.0,) * channels,
            preprocessing.interpolation,
            preprocessing.crop_pct,
            preprocessing.resize,
        )
        levels = np.arange(256, dtype=np.float32)[:, None] / np.float32(255)
        mean, std = (np.array(each, np.float32) for each in (preprocessing.mean, preprocessing.std))
        self._table = np.ascontiguousarray(((levels - mean) / std).T)  # [C, 256]: each level, normalised
        self._missing = np.zeros(len(rows), bool)  # of what is in memory: bad images
        self._pixels: NDArray[np.uint8] | None = None  # all images at the model's size
        self._whole: list[NDArray[np.uint8]] | None = None  # all images at their own

    def __len__(self) -> int:
        return len(self.rows)

    def _image(self, sample: int) -> Image.Image:
        """Return an image as it is, or at the model's size where nothing is cut by chance."""
        if self._whole is not None:
            if self._missing[sample]:
                raise BadRecord("see above")
            return _to_image(self._whole[sample])
        size, resized = max(self._plain.scaled), self.augmenter.crop == "resized"
        if resized:  # the smallest cut must not be enlarged more than it must
            size = max(size, int(max(self.preprocessing.size) / self.augmenter.options.scale_min**0.5 / 2))
        image = self.manifest.store.image(int(self.rows[sample]), self.preprocessing.channels, size)
        return image if resized else self._fit(image)

    def _fit(self, image: Image.Image) -> Image.Image:
        # In numpy, here and below: torch would wake its threads for each image, and they wait for each other.
        values = self._plain(image).numpy().transpose(1, 2, 0)
        return _to_image(np.rint(values * np.float32(255)).astype(np.uint8))

    def load(
        self, samples: NDArray[np.integer], bad: Reasons
    ) -> tuple[list[Image.Image], NDArray[np.integer]]:
        """Decode images; those that cannot be are left out, with the reason in `bad`.

        Returns:
            The images, and their places among the samples.

        Raises:
            DataError: One cannot be decoded, and that is an error.
        """
        images, places = [], []
        for place, sample in enumerate(samples.tolist()):
            try:
                images.append(self._image(sample))
                places.append(place)
            except BadRecord as error:
                name = self.manifest.store.id(int(self.rows[sample]))
                if self.bad_images == "error":
                    raise DataError(
                        f"{self.manifest.source}: image {name} cannot be used ({error}); "
                        "mend or remove it, or leave such images out with bad_images: skip"
                    ) from None
                bad[name] = str(error)
        return images, np.array(places, np.int64)

    def gather(
        self, samples: NDArray[np.integer], epoch: int, tickets: NDArray[np.integer]
    ) -> tuple[ImageBatch, Reasons]:
        """Return a batch, and why images are missing in it."""
        bad: Reasons = {}
        if self._pixels is not None:
            places: NDArray[np.integer] = np.flatnonzero(~self._missing[samples])
            pixels = self._pixels[samples[places]]
            images = [_to_image(each) for each in pixels] if self.augmenter.single else []
        else:
            images, places = self.load(samples, bad)
        if not len(places):
            known = next(iter(bad.items()), ("one", "see above"))
            raise DataError(
                f"{self.manifest.source}: none of a batch's {len(samples)} images can be used, as {known[0]} "
                f"({known[1]})"
            )
        kept, tickets = samples[places], tickets[places]
        if images:
            changed = self.augmenter.images(images, epoch, tickets)
            pixels = np.stack([_to_pixels(image) for image in changed])
        pixels = self.augmenter.batch(pixels, epoch, tickets)
        return {"image": self._normalised(pixels, epoch, tickets), "target": self._targets(kept)}, bad

    def _normalised(self, pixels: NDArray[np.uint8], epoch: int, tickets: NDArray[np.integer]) -> Tensor:
        values = np.empty((len(pixels), pixels.shape[3], *pixels.shape[1:3]), np.float32)
        for c, table in enumerate(self._table):
            np.take(table, pixels[..., c], out=values[:, c], mode="clip")  # "clip" writes to `out` directly
        erased = self.augmenter.erased(epoch, tickets)
        if erased is not None:
            values *= ~erased[:, None]
        return torch.from_numpy(values)

    def _targets(self, samples: NDArray[np.integer]) -> Tensor:
        return torch.from_numpy(self.manifest.targets[self.rows[samples]])

    def _ready_pixels(self) -> NDArray[np.uint8] | None:
        """Return arrays of pixels that need neither decoding nor a resize."""
        store, wanted = self.manifest.store, self.preprocessing
        if not isinstance(store, Pixels) or wanted.scaled != wanted.size:
            return None
        pixels = store.pixels if store.pixels.ndim == 4 else store.pixels[..., None]
        return pixels[self.rows] if pixels.shape[1:] == (*wanted.size, wanted.channels) else None

    def fill_cache(self, limit: int, bad: Reasons) -> bool:
        """Decode all images into memory, if a look at a few says that they fit; bad ones are marked.

        Args:
            limit: Bytes.
            bad: Takes the reasons of bad images.
        """
        whole = self.augmenter.crop == "resized"
        ready = self._ready_pixels()
        if ready is not None and ready.size <= limit and not whole:
            self._pixels, self.cached = ready, True
            return True
        each = float(np.prod(self.preprocessing.size)) * self.preprocessing.channels
        if each * len(self) > limit and not whole:
            return False
        if whole:
            looked = probe(self.manifest, self.rows, self.preprocessing.channels)
            if not looked or np.mean([_to_pixels(image).size for image in looked]) * len(self) > limit:
                return False
        found: list[NDArray[np.uint8]] = [np.empty((0, 0, 1), np.uint8)] * len(self)
        missing, used = np.ones(len(self), bool), 0
        for first in range(0, len(self), 256):
            samples = np.arange(first, min(first + 256, len(self)))
            images, places = self.load(samples, bad)
            for place, image in zip(places.tolist(), images, strict=True):
                found[first + place] = pixels = _to_pixels(image)
                used += pixels.size
            missing[samples[places]] = False
            if used > limit:
                return False
        if missing.all():
            raise DataError(f"{self.manifest.source}: no image can be used, as {next(iter(bad.items()))}")
        self._missing = missing
        if whole:
            self._whole = found
        else:
            blank = np.zeros((*self.preprocessing.size, self.preprocessing.channels), np.uint8)
            self._pixels = np.stack([blank if gone else f for f, gone in zip(found, missing, strict=True)])
        self.cached = True
        return True


def _to_pixels(image: Image.Image) -> NDArray[np.uint8]:
    pixels = np.asarray(image)
    return pixels if pixels.ndim == 3 else pixels[:, :, None]


def _to_image(pixels: NDArray[np.uint8]) -> Image.Image:
    return Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)


def _jobs(schedule: Schedule, first: int) -> Iterator[Job]:
    """Yield the samples, the epoch and the tickets of an epoch's batches, from one of them on."""
    epoch, seen = schedule.epoch, None
    if schedule.weights is not None:
        order = schedule.order(epoch)
        tickets = order + schedule.samples * _repeats(order).astype(np.int64)
        seen = Schedule(len(order), schedule.batch_size, drop_last=schedule.drop_last, part=schedule.part)
    for i, samples in enumerate(schedule.plan(first), first):
        yield samples, epoch, samples if seen is None else tickets[next(seen.plan(i))]


def _repeats(order: NDArray[np.integer]) -> NDArray[np.integer]:
    """Return how often each sample of an order came before."""
    by_sample = np.argsort(order, kind="stable")
    grouped = order[by_sample]
    starts = np.flatnonzero(np.r_[True, grouped[1:] != grouped[:-1]])
    counts = np.arange(len(order)) - np.repeat(starts, np.diff(np.r_[starts, len(order)]))
    found = np.empty_like(counts)
    found[by_sample] = counts
    return found


def default_workers(cached: bool) -> int:
    """Return how many worker processes serve: none where nothing is decoded, else up to 2."""
    return 0 if cached else min(2, os.cpu_count() or 1)


ImageLoader = BatchLoader[tuple[ImageBatch, Reasons], ImageBatch]


def image_loader(part: ImagePart, schedule: Schedule, workers: int, bad: Reasons) -> ImageLoader:
    """Return the batches of a part.

    Args:
        part: The images.
        schedule: Which come when.
        workers: Worker processes; 0 decodes here.
        bad: Reasons of bad images that are reported already; new ones are added.
    """

    def accept(made: tuple[ImageBatch, Reasons]) -> ImageBatch:
        report(made[1], bad, part.manifest.source)
        return made[0]

    return BatchLoader(schedule, partial(_jobs, schedule), part.gather, accept, workers)


def report(new: Reasons, known: Reasons, source: str) -> None:
    """Log bad images that were not reported yet, the first few by name, and add them to the known."""
    for name, reason in new.items():
        if name not in known:
            known[name] = reason
            if len(known) <= _NAMED:
                log.warning("%s: image %s is left out: %s", source, name, reason)
            elif len(known) & (len(known) - 1) == 0:  # at 8, 16, 32 ...
                log.warning("%s: %d images are left out so far", source, len(known))


def balanced_weights(manifest: Manifest, rows: NDArray[np.integer]) -> NDArray[np.float64]:
    """Return chances that make every class, or label, equally frequent.

    Of several labels an image's chance is the mean of those of its labels; without any, that of the most
    frequent.
    """
    counts = np.maximum(np.array(manifest.counts(rows), np.float64), 1)
    targets = manifest.targets[rows]
    if targets.ndim == 1:
        return 1 / counts[targets.astype(np.int64)]
    have = targets == 1
    number = have.sum(axis=1)
    return np.where(number > 0, (have / counts).sum(axis=1) / np.maximum(number, 1), 1 / counts.max())
