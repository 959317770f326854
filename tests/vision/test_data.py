"""ImageData: the same batches whatever decodes them, bad images, sampling, what others are told."""

from __future__ import annotations

import dataclasses
import io
import json
import logging
import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from manyheads.core.errors import DataError, UsageError
from manyheads.vision.data import Augment, Columns, ImageBatch, ImageData, Loading, Splits, View
from manyheads.vision.loading import ImageLoader
from manyheads.vision.preprocessing import Preprocessing
from manyheads.vision.splits import TEST, TRAIN, VAL

SHARED = Path(os.environ.get("MANYHEADS_DATA", "nowhere").split(os.pathsep)[0]) / "vision"
FULL = Augment(crop="resized", scale_min=0.3, randaugment=1, erasing=0.5)
NEAR = Augment(crop="pad", pad=2, erasing=0.3)


def jpeg(rng: np.random.Generator, colour: int, size: tuple[int, int] = (40, 30), mode: str = "RGB") -> bytes:
    pixels = rng.normal(60 * colour + 40, 20, (size[1], size[0], 3)).clip(0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(buffer, "JPEG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """120 photos of 3 classes, of several sizes."""
    root, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for label, n in enumerate((60, 40, 20)):
        (root / f"c{label}").mkdir()
        for i in range(n):
            size = (40 + i % 5, 30 + i % 7)
            (root / f"c{label}" / f"{i:02}.jpg").write_bytes(jpeg(rng, label, size))
    return root


def data(path: Path | str, **options: object) -> ImageData:
    return ImageData(str(path), **{"size": 24, "batch_size": 8, "workers": 0, **options})  # type: ignore[arg-type]


def same(first: list[ImageBatch], second: list[ImageBatch]) -> bool:
    return len(first) == len(second) and all(
        torch.equal(a["image"], b["image"])
        and torch.equal(a["target"].nan_to_num(9), b["target"].nan_to_num(9))
        for a, b in zip(first, second, strict=True)
    )


def test_what_the_task_is_told(photos: Path) -> None:
    module = data(photos, splits=Splits(0.25, 0.1))
    assert module.classes == 3  # before any setup
    assert (module.channels, module.size, module.multi_label) == (3, 24, False)
    assert module.labels == ("c0", "c1", "c2")
    assert [len(rows) for rows in module.rows] == [81, 27, 12]
    assert module.class_counts == [40, 27, 14]
    assert module.path == photos
    batch = next(iter(module.train_dataloader()))
    assert batch["image"].shape == (8, 3, 24, 24)
    assert batch["image"].dtype == torch.float32
    assert batch["target"].dtype == torch.int64
    assert len(module.train_dataloader()) == 10  # the last is left out
    assert sum(len(batch["target"]) for batch in module.val_dataloader()) == 27
    assert sum(len(batch["target"]) for batch in module.test_dataloader()) == 12


@pytest.mark.parametrize("augment", [FULL, NEAR])
@pytest.mark.parametrize("sampler", ["uniform", "balanced"])
def test_workers_and_memory_change_nothing(photos: Path, augment: Augment, sampler: str) -> None:
    def epochs(workers: int, cache: str) -> list[ImageBatch]:
        module = data(photos, augment=augment, sampler=sampler, workers=workers, loading=Loading(cache=cache))  # type: ignore[arg-type]
        loader = module.train_dataloader()
        assert module.part(TRAIN).cached == (cache == "auto")
        return [batch for _ in range(2) for batch in loader]

    here = epochs(0, "off")
    assert len(here) == 2 * (86 // 8)
    assert not same(here[:10], here[10:])
    assert same(here, epochs(2, "off"))
    assert same(here, epochs(0, "auto"))
    assert same(here, epochs(2, "auto"))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("sampler", ["uniform", "balanced"])
@pytest.mark.parametrize("given", [1, 4, 10])
def test_a_resumed_epoch_has_the_batches_that_remain(
    photos: Path, workers: int, sampler: str, given: int
) -> None:
    def loader() -> ImageLoader:
        return data(
            photos, augment=FULL, sampler=sampler, workers=workers, loading=Loading(cache="off")
        ).train_dataloader()

    straight = loader()
    first, second = list(straight), list(straight)
    stopped = loader()
    running = iter(stopped)
    before = [next(running) for _ in range(given)]
    state = json.loads(json.dumps(stopped.state_dict()))
    resumed = loader()
    resumed.load_state_dict(state)
    rest = list(resumed)
    if given < len(first):
        assert same(before + rest, first)
        rest = list(resumed)
    assert same(rest, second)


def test_a_stopped_epoch_is_followed_by_a_whole_one(photos: Path) -> None:
    """Lightning leaves an epoch early where batches are limited; workers must forget what they had begun."""
    options = {"augment": NEAR, "loading": Loading(cache="off")}
    loaders = [data(photos, workers=workers, **options).train_dataloader() for workers in (0, 2)]
    found = []
    for loader in loaders:
        running = iter(loader)
        next(running), next(running)
        loader.sampler.set_epoch(3)
        found.append(list(loader))
    assert same(*found)
    assert len(found[0]) == 10


def test_processes_share_the_images(photos: Path) -> None:
    seen = []
    for rank in range(2):
        loader = data(photos, augment=NEAR, batch_size=5).train_dataloader()
        loader.schedule.part = (rank, 2)
        seen.append([i for samples in loader.schedule.plan() for i in samples.tolist()])
    assert len(seen[0]) == len(seen[1]) == 40
    assert not set(seen[0]) & set(seen[1])


def test_another_seed_is_another_order_and_division(photos: Path) -> None:
    first, second = (data(photos, seed=seed, splits=Splits(0.2, 0.2)) for seed in (0, 1))
    batches = [next(iter(each.train_dataloader())) for each in (first, second)]
    assert not torch.equal(batches[0]["image"], batches[1]["image"])
    assert not np.array_equal(first.rows[TEST], second.rows[TEST])


@pytest.mark.parametrize("cache", ["auto", "off"])
def test_evaluation_sees_what_prediction_sees(photos: Path, cache: str) -> None:
    module = data(photos, loading=Loading(cache=cache, eval_batch_size=50))  # type: ignore[arg-type]
    (batch,) = module.test_dataloader()
    preprocessing = Preprocessing.from_json(json.loads(json.dumps(module.preprocessing())))
    for image, row in zip(batch["image"], module.rows[TEST], strict=True):
        assert torch.equal(image, preprocessing.load(photos / module.manifest.store.id(int(row))))


def test_preprocessing_is_json_with_labels(photos: Path) -> None:
    saved = json.loads(json.dumps(data(photos).preprocessing()))
    assert saved["labels"] == ["c0", "c1", "c2"]
    assert saved["multi_label"] is False
    assert saved["size"] == [24, 24]
    assert saved["crop_pct"] == 1.0


def test_mean_and_deviation(photos: Path) -> None:
    small = data(photos, augment=Augment(crop="none", flip=False))
    values = torch.cat([batch["image"] for batch in small.train_dataloader()])
    assert values.mean(dim=(0, 2, 3)).abs().max() < 0.15  # some train images are left out of the last batch
    assert (values.std(dim=(0, 2, 3)) - 1).abs().max() < 0.1
    large = data(photos, size=96)
    large.setup()
    assert large.transform.mean == (0.485, 0.456, 0.406)
    assert large.transform.crop_pct == 0.875
    given = data(photos, view=View(mean=[0.5] * 3, std=[0.25] * 3, crop_pct=0.9, resize="squash"))
    given.setup()
    assert given.transform == Preprocessing((24, 24), 3, (0.5,) * 3, (0.25,) * 3, "bicubic", 0.9, "squash")


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_grey_images_have_one_channel(tmp_path: Path, mode: str) -> None:
    rng = np.random.default_rng(0)
    cells = [jpeg(rng, i % 2, (28, 28), mode) for i in range(40)]
    pd.DataFrame({"image": cells, "label": [i % 2 for i in range(40)]}).to_parquet(tmp_path / "a.parquet")
    module = ImageData(str(tmp_path / "a.parquet"), workers=0, batch_size=4)
    assert (module.channels, module.size) == ({"L": 1, "RGB": 3}[mode], 28)  # the images' own size
    assert ImageData(str(tmp_path / "a.parquet"), channels=1).channels == 1


@pytest.fixture
def broken(photos: Path, tmp_path: Path) -> Path:
    """The photos, of which each tenth is cut short, and one is no image."""
    root = tmp_path / "broken"
    for i, path in enumerate(sorted(photos.rglob("*.jpg"))):
        target = root / path.relative_to(photos)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes()[: 300 if i % 10 == 3 else None])
    (root / "c1" / "05.jpg").write_text("<html>")
    return root


@pytest.mark.parametrize("cache", ["auto", "off"])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_image_is_an_error(broken: Path, cache: str, workers: int) -> None:
    module = data(
        broken, workers=workers, loading=Loading(cache=cache), view=View(mean=[0.5] * 3, std=[0.5] * 3)
    )  # type: ignore[arg-type]
    with pytest.raises(DataError, match=r"image c\d/\d+\.jpg cannot be used \(.*bad_images: skip"):
        list(module.train_dataloader())


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_images_are_left_out_and_reported_once(
    broken: Path, workers: int, caplog: pytest.LogCaptureFixture
) -> None:
    found = []
    for cache in ("auto", "off"):
        caplog.clear()
        module = data(broken, workers=workers, augment=FULL, loading=Loading(cache=cache, bad_images="skip"))  # type: ignore[arg-type]
        module.setup()
        with caplog.at_level(logging.WARNING):
            loader = module.train_dataloader()
            found.append([batch for _ in range(3) for batch in loader])
            list(module.val_dataloader()), list(module.test_dataloader())
        assert len(module.bad) == 13
        assert "text, not an image" in module.bad["c1/05.jpg"] or "HTML" in module.bad["c1/05.jpg"]
        named = [r.getMessage() for r in caplog.records if " is left out: " in r.getMessage()]
        assert len(named) == len(set(named)) == 5
        assert any("8 images are left out so far" in r.getMessage() for r in caplog.records)
    assert same(*found)
    sizes = [len(batch["target"]) for batch in found[0]]
    assert max(sizes) == 8
    assert 3 * 80 - 3 * 13 <= sum(sizes) < 3 * 80


def test_a_batch_without_a_good_image_is_an_error(photos: Path, tmp_path: Path) -> None:
    for i, path in enumerate(sorted(photos.rglob("*.jpg"))):
        target = tmp_path / "all" / path.relative_to(photos)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes() if i % 2 else b"")
    for cache in ("auto", "off"):
        module = data(tmp_path / "all", batch_size=1, loading=Loading(cache=cache, bad_images="skip"))  # type: ignore[arg-type]
        with pytest.raises(DataError, match="none of a batch's 1 images can be used"):
            list(module.train_dataloader())


def test_several_labels_keep_what_is_unknown(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    n, nan = 60, float("nan")
    labels = np.where(rng.random((n, 2)) < 0.2, nan, (rng.random((n, 2)) < 0.4).astype(float))
    frame = pd.DataFrame(
        {"image": [jpeg(rng, i % 3) for i in range(n)], "x": labels[:, 0], "y": labels[:, 1]}
    )
    frame["patient"] = np.arange(n) // 3
    frame.to_parquet(tmp_path / "a.parquet")
    module = data(tmp_path / "a.parquet", columns=Columns(label=["x", "y"], group="patient"))
    assert (module.multi_label, module.labels, module.classes) == (True, ("x", "y"), 2)
    assert module.preprocessing()["multi_label"] is True
    for one, other in ((TRAIN, VAL), (TRAIN, TEST), (VAL, TEST)):
        assert not set(module.rows[one] // 3) & set(module.rows[other] // 3)
    targets = torch.cat([batch["target"] for batch in module.test_dataloader()])
    assert targets.dtype == torch.float32
    np.testing.assert_array_equal(targets.numpy(), labels[module.rows[TEST]].astype(np.float32))
    assert module.class_counts == np.nansum(labels[module.rows[TRAIN]], axis=0).tolist()
    balanced = data(tmp_path / "a.parquet", columns=Columns(label=["x", "y"]), sampler="balanced")
    assert len(list(balanced.train_dataloader())) > 1


def test_balanced_sampling_draws_each_class_as_often(photos: Path) -> None:
    loader = data(photos, sampler="balanced", augment=NEAR).train_dataloader()
    targets = torch.cat([batch["target"] for _ in range(15) for batch in loader])
    share = torch.bincount(targets) / len(targets)
    assert (share - 1 / 3).abs().max() < 0.05
    batches = list(loader)
    images = torch.cat([batch["image"] for batch in batches]).flatten(1)
    assert len(torch.unique(images, dim=0)) > 0.9 * len(images)  # drawn twice, an image is changed twice


def test_images_beyond_the_limit_are_not_kept(photos: Path) -> None:
    for augment in (NEAR, FULL):
        module = data(photos, size=400, augment=augment, loading=Loading(cache_mib=0))
        module.setup()
        assert not module.part(TRAIN).cached


def test_duplicates_across_parts_are_reported(
    photos: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for part in ("train", "val"):
        for label in ("c0", "c1"):
            (tmp_path / part / label).mkdir(parents=True)
            for i in range(12):
                at = photos / label / f"{i + 12 * (part == 'val') - (part == 'val' and i == 0):02}.jpg"
                (tmp_path / part / label / f"{i}.jpg").write_bytes(at.read_bytes())
    module = data(tmp_path, splits=Splits(check_duplicates=True))
    with caplog.at_level(logging.WARNING):
        module.setup()
    (record,) = caplog.records
    assert (
        "2 images are in two parts, such as train/c0/11.jpg (train) and val/c0/0.jpg (val)"
        in record.getMessage()
    )
    with pytest.raises(DataError, match="has no test images"):
        module.test_dataloader()


def test_a_class_that_is_not_learned(photos: Path, tmp_path: Path) -> None:
    for name in ("train/a", "train/b", "test/a", "test/c"):
        (tmp_path / name).mkdir(parents=True)
        for i in range(10):
            (tmp_path / name / f"{i}.jpg").write_bytes((photos / "c0" / f"{i:02}.jpg").read_bytes())
    with pytest.raises(DataError, match="no train image is of class 'c', which test images are of"):
        data(tmp_path).setup()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"splits": Splits(val_share=0)}, "splits.val_share must lie between 0 and 1, not 0"),
        ({"splits": Splits(test_share=1.5)}, "splits.test_share must lie"),
        ({"batch_size": 0}, "batch_size must be 1 or more"),
        ({"size": 0}, "size must be 1 or more"),
        ({"workers": -1}, "workers must be 0 or more"),
        ({"loading": Loading(eval_batch_size=0)}, "loading.eval_batch_size must be 1 or more"),
        ({"view": View(mean=[0.5])}, "view.mean and view.std are given together"),
    ],
)
def test_options_that_mean_nothing(options: dict[str, object], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        data("fashion_mnist", **options)


def test_sources_that_cannot_be_used(photos: Path) -> None:
    with pytest.raises(UsageError, match="no data set 'fashon_mnist'; did you mean 'fashion_mnist'"):
        data("fashon_mnist").setup()
    with pytest.raises(DataError, match="do not fill a batch of 200"):
        data(photos, batch_size=200).train_dataloader()
    with pytest.raises(DataError, match="mean"):
        data(photos, view=View(mean=[0.5], std=[0.5])).setup()


@pytest.mark.skipif(not (SHARED / "fashion_mnist").is_dir(), reason="needs Fashion-MNIST in MANYHEADS_DATA")
def test_fashion_mnist() -> None:
    module = ImageData("fashion_mnist", augment=dataclasses.replace(NEAR, erasing=0.0))
    assert (module.classes, module.channels, module.size) == (10, 1, 28)
    assert [len(rows) for rows in module.rows] == [54000, 6000, 10000]
    assert module.class_counts == [5400] * 10
    assert module.labels[9] == "Ankle boot"
    assert module.transform.mean == (0.2871,)  # published: 0.2860, of all 60,000 images
    loader = module.train_dataloader()
    assert module.part(TRAIN).cached
    assert loader.workers == 0
    assert sum(len(batch["target"]) for batch in loader) == 54000 // 128 * 128
    first = next(iter(module.test_dataloader()))
    assert first["target"][:5].tolist() == [9, 2, 1, 1, 6]


@pytest.mark.skipif(not (SHARED / "cifar10").is_dir(), reason="needs CIFAR-10 in MANYHEADS_DATA")
def test_cifar10() -> None:
    module = ImageData("cifar10_10k", splits=Splits(val_share=0.1))
    assert (module.classes, module.channels, module.size) == (10, 3, 32)
    assert [len(rows) for rows in module.rows] == [9000, 1000, 2000]
    assert module.class_counts == [900] * 10
    assert module.labels[6] == "frog"
    batch = next(iter(module.val_dataloader()))
    assert batch["image"].shape == (128, 3, 32, 32)


@pytest.mark.skipif(not (SHARED / "imagenet_samples").is_dir(), reason="needs the photos in MANYHEADS_DATA")
def test_imagenet_samples_are_for_testing_only() -> None:
    module = ImageData("imagenet_samples", batch_size=10, loading=Loading(cache="off"))
    assert (module.classes, module.size, module.labels[0]) == (1000, 224, "tench")
    batch = next(iter(module.test_dataloader()))
    assert batch["image"].shape == (10, 3, 224, 224)
    assert batch["target"].tolist() == list(range(0, 100, 10))
    with pytest.raises(DataError, match="has no train images"):
        module.train_dataloader()
