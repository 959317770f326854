"""`manyheads vision knn`: figures of folders, one line an error."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import manyheads
from manyheads.apps import cli
from manyheads.apps.knn import read_options
from manyheads.core import hub
from manyheads.core.errors import UsageError
from manyheads.vision.preprocessing import Preprocessing


def call(*args: object) -> int:
    return cli.main(["vision", "knn", *map(str, args)])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder, and images of two colours in parts."""
    folder = tmp_path_factory.mktemp("knn")
    torch.manual_seed(0)
    arguments: dict[str, hub.Json] = {"img_size": 32, "patch_size": 16, "embed_dim": 32, "depth": 1}
    arguments |= {"num_heads": 2, "num_classes": 4}
    name = "vit_tiny_patch16_224"
    model = manyheads.create_model(name, **arguments)
    preprocessing = Preprocessing(size=(32, 32)).to_json()
    hub.save(
        folder / "model",
        model,
        domain="vision",
        name=name,
        arguments=arguments,
        preprocessing=preprocessing,  # type: ignore[arg-type]
    )
    rng = np.random.default_rng(0)
    for part, count in (("train", 8), ("test", 3)):
        for label, channel in (("red", 0), ("blue", 2)):
            (folder / "images" / part / label).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 60, (32, 32, 3), dtype=np.uint8)
                pixels[..., channel] += 180
                Image.fromarray(pixels).save(folder / "images" / part / label / f"{i}.png")
    return folder


def test_a_source_with_parts(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(folder / "model", "--train", folder / "images", "--k", 3, 5, "--json") == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown == {
        "train": 16,
        "test": 6,
        "classes": 2,
        "temperature": 0.07,
        "accuracy": [{"k": 3, "top1": 1.0, "top5": 1.0}, {"k": 5, "top1": 1.0, "top5": 1.0}],
        "bad": [],
    }


def test_two_sources_and_a_bad_image(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for label in ("red", "blue"):
        (tmp_path / label).mkdir()
        for i in range(2):
            Image.open(folder / "images" / "test" / label / f"{i}.png").save(tmp_path / label / f"{i}.png")
    (tmp_path / "red" / "broken.png").write_bytes(b"no image")
    train = folder / "images" / "train"
    assert call(folder / "model", "--train", train, "--test", tmp_path, "--k", 3, "--batch-size", 4) == 3
    said = capsys.readouterr()
    assert said.out.splitlines() == [
        "5 test images, 16 training images, 2 classes",
        "k    3  top-1 1.0000  top-5 1.0000",
    ]
    assert "red/broken.png: text, not an image" in said.err
    assert "21 images" in said.err  # progress


@pytest.mark.parametrize(
    ("train", "more", "code", "message"),
    [
        ("images/train", (), 1, "names no test part: give --test"),
        ("nothing", (), 2, "and no data set (data sets: "),
        ("images", ("--k", 100), 1, "100 neighbours are asked for, of 16 training images"),
    ],
)
def test_what_cannot_be_measured_is_said(
    folder: Path, capsys: pytest.CaptureFixture[str], train: str, more: tuple[object, ...], code: int,
    message: str,
) -> None:  # fmt: skip
    assert call(folder / "model", "--train", folder / train, *more) == code
    said = capsys.readouterr().err
    assert message in said
    assert "Traceback" not in said


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--k", "0"], "--k must be at least 1"),
        (["--k", "5", "5"], "twice"),
        (["--temperature", "0"], "--temperature must be above 0"),
        (["--temperature", "nan"], "--temperature must be above 0"),
        (["--temperatur", "1"], "did you mean '--temperature'"),
        (["--batch-size", "0"], "--batch-size must be at least 1"),
    ],
)
def test_wrong_options_are_refused_before_anything_is_loaded(more: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        read_options(["model", "--train", "images", *more])


def test_train_is_needed() -> None:
    with pytest.raises(UsageError, match="--train"):
        read_options(["model"])
