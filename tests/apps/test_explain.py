"""`manyheads vision explain`: pictures of photos, what is wrong in a line, bad images aside."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib import image
from PIL import Image

import manyheads
from manyheads.apps import cli, options
from manyheads.apps.explain import read_options
from manyheads.apps.explaining import find_class, picture_name, pixels
from manyheads.core import hub
from manyheads.core.errors import UsageError
from manyheads.vision.preprocessing import Preprocessing

LABELS = ["cat", "dog", "7", "bird", "bird"]
ARGUMENTS: dict[str, dict[str, hub.Json]] = {
    "vit_tiny_patch16_224": {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2},
    "vim": {"img_size": 32, "patch_size": 8, "stride": 8, "embed_dim": 32, "depth": 2},
    "swin_tiny_patch4_window7_224": {"img_size": 32, "window_size": 2, "depths": [1, 1, 1, 1]},
}


def call(*args: object) -> int:
    return cli.main(["vision", "explain", *map(str, args)])


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of model folders."""
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    for name, sizes in ARGUMENTS.items():
        arguments = {**sizes, "num_classes": len(LABELS)}
        model = manyheads.create_model(name, **arguments)
        preprocessing = Preprocessing(size=(32, 32)).to_json()
        where = folder / name.split("_")[0]
        hub.save(
            where,
            model,
            domain="vision",
            name=name,
            arguments=arguments,
            preprocessing=preprocessing,
            labels=LABELS,  # type: ignore[arg-type]
        )
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for name in ("a.png", "b.jpg", "more/a.png"):
        (folder / name).parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (40, 60, 3), dtype=np.uint8)).save(folder / name)
    return folder


@pytest.mark.parametrize(
    ("model", "more", "method"),
    [
        ("vit", (), "rollout"),
        ("vit", ("--layer", 1, "--heads", "max", "--discard", 0.5), "rollout"),
        ("vit", ("--class", "dog"), "gradcam"),
        ("vit", ("--layer", "blocks.0"), "gradcam"),
        ("vim", (), "rollout"),
        ("vim", ("--method", "gradcam"), "gradcam"),
        ("swin", ("--class", 3, "--layer", 2), "gradcam"),
    ],
)
def test_a_picture_an_image(
    models: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], model: str,
    more: tuple[object, ...], method: str,
) -> None:  # fmt: skip
    assert call(models / model, photos, "-o", tmp_path / "maps", "--json", "--top", 2, *more) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["bad"] == []
    assert [each["id"] for each in shown["images"]] == ["a.png", "b.jpg", "more/a.png"]
    names = {path.name for path in (tmp_path / "maps").iterdir()}
    assert (
        names == {"a.png", "b.png", "more_a.png"} == {Path(each["picture"]).name for each in shown["images"]}
    )
    for each in shown["images"]:
        assert each["method"] == method
        assert (each["class"] is None) == (method == "rollout")
        assert len(each["top"]) == 2
        assert each["top"][0]["probability"] >= each["top"][1]["probability"]
        assert image.imread(each["picture"])[..., :3].std() > 0.05
    if "--class" in more:
        assert {each["class"] for each in shown["images"]} == {"dog" if "dog" in more else "bird"}


def test_bad_images_are_named_and_the_others_drawn(
    models: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "broken.jpg"
    broken.write_text("no image")
    assert call(models / "vit", broken, photos / "a.png", "-o", tmp_path / "maps") == 3
    said = capsys.readouterr()
    assert "broken.jpg: text, not an image" in said.err
    assert said.out.split() == [str(tmp_path / "maps" / "a.png")]
    assert [path.name for path in (tmp_path / "maps").iterdir()] == ["a.png"]


@pytest.mark.parametrize(
    ("model", "more", "message"),
    [
        ("nothing", (), "no model folder"),
        ("vit", ("--class", "dgo"), "no class 'dgo'; did you mean 'dog'?"),
        ("vit", ("--class", "9"), "--class 9: the model has 5 classes, from 0"),
        ("vit", ("--class", "bird"), "classes 3, 4 are all named 'bird'"),
        ("vit", ("--layer", 3), "no layer 3: the model has 2, from 1"),
        ("vit", ("--layer", "blocks.7"), "no module 'blocks.7'"),
        ("swin", ("--method", "rollout"), "no rollout for SwinTransformer"),
    ],
)
def test_what_the_model_has_not_got_is_said(
    models: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], model: str,
    more: tuple[object, ...], message: str,
) -> None:  # fmt: skip
    assert call(models / model, photos / "a.png", "-o", tmp_path / "maps", *more) == 2
    said = capsys.readouterr().err
    assert message in said
    assert "Traceback" not in said


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--method", "rollout", "--class", "dog"], "same for every class"),
        (["--method", "gradcam", "--heads", "max"], "--heads and --discard are for --method rollout"),
        (["--method", "rollout", "--layer", "blocks.1"], "takes a layer's number"),
        (["--discard", "1"], "from 0 to below 1"),
        (["--layer", "0"], "--layer must be at least 1"),
        (["--top", "0"], "--top must be at least 1"),
        (["--methd", "rollout"], "did you mean '--method'"),
        (["--method", "gradcm"], "invalid choice"),
    ],
)
def test_wrong_options_are_refused_before_anything_is_loaded(more: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        read_options(["model", "a.png", "-o", "maps", *more])


@pytest.mark.parametrize(
    "args",
    [["explain", "--help"], ["explain", "m", "i", "-o", "o", "--tpo", "3"], ["knn", "--help"], ["knn", "m"]],
)
def test_help_and_slips_are_answered_without_torch(args: list[str]) -> None:
    code = (
        "import sys\nfrom manyheads.apps import cli\n"
        f"try:\n    cli.main(['vision', *{args}])\nexcept SystemExit:\n    pass\n"
        "print('torch' in sys.modules, 'numpy' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False False"


def test_a_number_that_is_a_label_is_the_label() -> None:
    assert (find_class("7", LABELS), find_class("1", LABELS), find_class("cat", LABELS)) == (2, 1, 0)


def test_names_of_pictures_stay_in_the_folder() -> None:
    taken: set[str] = set()
    ids = ["a/x.jpg", "b/x.png", "b/x.jpg", "../../etc/passwd", "/", "..", "ü ber.jpeg"]
    found = [picture_name(each, taken) for each in ids]
    assert found == ["x.png", "b_x.png", "b_x-2.png", "passwd.png", "image.png", "image-2.png", "ü_ber.png"]
    assert all(Path(each).name == each and os.sep not in each for each in found)


@pytest.mark.parametrize("channels", [1, 3])
def test_the_photo_is_what_the_model_saw(channels: int) -> None:
    plain = {1: ((0.3,), (0.2,)), 3: ((0.4, 0.5, 0.6), (0.2, 0.3, 0.4))}[channels]
    preprocessing = Preprocessing(size=(8, 8), channels=channels, mean=plain[0], std=plain[1], crop_pct=1.0)
    colours = np.random.default_rng(0).integers(0, 255, (8, 8, 3), dtype=np.uint8)
    photo = Image.fromarray(colours)
    found = pixels(preprocessing(photo), preprocessing)
    assert np.array_equal(found, photo.convert("L" if channels == 1 else "RGB").convert("RGB"))


def test_the_overview_names_the_tools() -> None:
    shown = options.overview("vision")
    assert "explain" in shown
    assert "knn" in shown
