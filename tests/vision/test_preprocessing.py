"""The evaluation transform beside timm's, live, and its journey through a model folder."""

from __future__ import annotations

import json

import numpy as np
import pytest
import timm.data
import torch
from PIL import Image

from manyheads.core.errors import BadRecord, DataError
from manyheads.vision.preprocessing import Preprocessing

SIZES = [(224, 224), (341, 256), (256, 341), (100, 90), (33, 500), (640, 480), (225, 224), (1, 1)]


def noise(width, height, mode="RGB"):
    rng = np.random.default_rng(width * height)
    shape = (height, width, 3) if mode == "RGB" else (height, width)
    return Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    ("target", "crop_pct", "interpolation", "resize"),
    [
        ((224, 224), 0.875, "bicubic", "shorter"),
        ((224, 224), 0.9, "bilinear", "shorter"),
        ((224, 224), 1.0, "bicubic", "squash"),
        ((32, 32), 0.95, "lanczos", "squash"),
        ((96, 160), 0.9, "bicubic", "shorter"),
        ((96, 160), 0.875, "nearest", "squash"),
    ],
)
def test_equals_timm(size, target, crop_pct, interpolation, resize):
    image = noise(*size)
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
    transform = timm.data.create_transform(
        (3, *target),
        is_training=False,
        interpolation=interpolation,
        mean=mean,
        std=std,
        crop_pct=crop_pct,
        crop_mode={"shorter": "center", "squash": "squash"}[resize],
    )
    found = Preprocessing(target, 3, mean, std, interpolation, crop_pct, resize)(image)
    assert found.shape == (3, *target)
    assert found.dtype == torch.float32
    assert found.is_contiguous()
    torch.testing.assert_close(found, transform(image), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "name", ["vit_tiny_patch16_224", "swin_tiny_patch4_window7_224", "maxvit_tiny_tf_384"]
)
def test_the_numbers_of_a_timm_model(name):
    model = timm.create_model(name, pretrained=False)
    config = timm.data.resolve_model_data_config(model)
    image = noise(500, 375)
    wanted = timm.data.create_transform(**config, is_training=False)(image)
    found = Preprocessing.from_timm(model.pretrained_cfg)(image)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)


def test_another_size_and_a_crop_mode_that_is_not_done():
    cfg = {"input_size": (3, 224, 224), "crop_pct": 1.0, "interpolation": "bilinear", "crop_mode": "squash"}
    found = Preprocessing.from_timm(cfg, size=96)
    assert (found.size, found.resize, found.interpolation) == ((96, 96), "squash", "bilinear")
    with pytest.raises(DataError, match="crop_mode = 'border'"):
        Preprocessing.from_timm({**cfg, "crop_mode": "border"})


def test_one_channel():
    grey = Preprocessing((28, 28), 1, (0.286,), (0.353,), crop_pct=1.0)
    image = noise(28, 28, "L")
    wanted = (torch.from_numpy(np.array(image)).float() / 255 - 0.286) / 0.353
    torch.testing.assert_close(grey(image), wanted[None], rtol=0, atol=1e-5)
    colour = noise(28, 28)
    torch.testing.assert_close(grey(colour), grey(colour.convert("L")))


def test_json_and_back():
    one = Preprocessing((96, 160), 1, (0.5,), (0.25,), "bilinear", 0.9, "squash")
    saved = json.loads(json.dumps(one.to_json()))
    assert Preprocessing.from_json({**saved, "temperature": 1.5, "labels": ["a"]}) == one
    with pytest.raises(DataError, match="has no mean"):
        Preprocessing.from_json({key: value for key, value in saved.items() if key != "mean"})


@pytest.mark.parametrize(
    "wrong",
    [
        {"size": [0, 4]},
        {"size": 4},
        {"channels": 2},
        {"mean": [0.5]},
        {"std": [0.0, 1.0, 1.0]},
        {"interpolation": "cubic"},
        {"crop_pct": 1.2},
        {"crop_pct": "x"},
        {"resize": "longer"},
    ],
)
def test_numbers_that_mean_nothing(wrong):
    with pytest.raises(DataError, match="preprocessing"):
        Preprocessing.from_json({**Preprocessing().to_json(), **wrong})


def test_a_line_is_refused_before_its_resize():
    with pytest.raises(BadRecord, match="too narrow: 1 x 100000 would become 256 x 25600000"):
        Preprocessing()(Image.new("RGB", (1, 100_000)))


def test_load_is_decode_and_this(tmp_path):
    image = noise(300, 280)
    image.save(tmp_path / "a.png")
    of = Preprocessing()
    assert torch.equal(of.load(tmp_path / "a.png"), of(image))
    assert torch.equal(of.load((tmp_path / "a.png").read_bytes()), of(image))


def test_a_large_jpeg_comes_smaller_and_nearly_the_same(tmp_path):
    smooth = noise(20, 15).resize((2400, 1800), Image.Resampling.BICUBIC)
    smooth.save(tmp_path / "a.jpg", quality=95)
    of = Preprocessing()
    with Image.open(tmp_path / "a.jpg") as whole:
        wanted = of(whole)
    difference = (of.load(tmp_path / "a.jpg") - wanted).abs() * 0.225 * 255
    assert difference.mean() < 1  # levels of 255
    assert torch.equal(of.load(tmp_path / "a.jpg"), of.load(tmp_path / "a.jpg"))
