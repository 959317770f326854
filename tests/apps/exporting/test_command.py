"""`manyheads export`: files, what stands beside them, and what is refused."""

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from manyheads.apps import cli
from manyheads.apps.export_table import EXPORTS
from manyheads.core import hub
from manyheads.core.catalog import create_model

ARGUMENTS = {"img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 3}


def call(*args: object) -> int:
    return cli.main([str(arg) for arg in args])


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model folder of a tiny ViT, and beside it five photos."""
    rng = np.random.default_rng(0)
    (tmp_path / "photos").mkdir()
    for i in range(5):
        pixels = rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "photos" / f"{i}.png")
    preprocessing = {
        "size": [16, 16],
        "channels": 3,
        "mean": [0.5, 0.5, 0.5],
        "std": [0.25, 0.25, 0.25],
        "interpolation": "bicubic",
        "crop_pct": 1.0,
        "resize": "shorter",
    }
    name = "vit_tiny_patch16_224"
    hub.save(
        tmp_path / "model",
        create_model(name, **ARGUMENTS),
        domain="vision",
        name=name,
        arguments=ARGUMENTS,
        preprocessing=preprocessing,
        labels=["cat", "dog", "owl"],
        training={},
    )
    return tmp_path / "model"


def test_onnx_of_photos(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import onnxruntime

    path, photos = tmp_path / "out" / "vit.onnx", tmp_path / "photos"
    assert call("export", model, "--format", "onnx", "-o", path, "--check", photos) == 0
    printed = capsys.readouterr().out
    assert "image float32 [batch, 3, 16, 16] -> logits" in printed
    assert printed.count("largest difference") == 2
    assert f"(inputs: of {photos})" in printed
    about = json.loads((tmp_path / "out" / "vit.onnx.json").read_text())
    assert about["inputs"] == [{"name": "image", "dtype": "float32", "shape": ["batch", 3, 16, 16]}]
    assert about["labels"] == ["cat", "dog", "owl"]
    assert about["preprocessing"]["mean"] == [0.5, 0.5, 0.5]
    assert [each["size"] for each in about["parity"]["batches"]] == [1, 3]
    assert {"manyheads", "torch", "onnxruntime"} <= about["versions"].keys()
    assert sorted(each.name for each in path.parent.iterdir()) == ["vit.onnx", "vit.onnx.json"]
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    x = torch.randn(7, 3, 16, 16)
    found = session.run(["logits"], {"image": x.numpy()})[0]
    with torch.inference_mode():
        wanted = hub.load_model(model)[0](x)
    assert np.abs(found - wanted.numpy()).max() < 1e-5


def test_torch_of_random_numbers_says_so(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MANYHEADS_DATA", str(tmp_path))
    monkeypatch.setenv("MANYHEADS_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "vit.pt2"
    assert call("export", model, "--format", "torch", "-o", path, "--json") == 0
    about = json.loads(capsys.readouterr().out)
    assert about["parity"]["inputs"] == "random numbers"
    assert torch.export.load(path).module()(torch.randn(5, 3, 16, 16)).shape == (5, 3)


def test_a_file_that_is_off_is_not_kept(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "out" / "vit.pt2"
    args = ("--format", "torch", "-o", path, "--check", tmp_path / "photos", "--tolerance", 1e-12)
    assert call("export", model, *args) == 1
    assert "the file is off by" in capsys.readouterr().err
    assert not list(path.parent.iterdir())


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--format", "onnx"], "export needs MODEL, --format torch or onnx, and -o FILE"),
        (["--format", "tflite", "-o", "x"], "invalid choice"),
        (["--format", "onnx", "-o", "x", "--tolerance", "0"], "must be above 0"),
        (["--formt", "onnx"], "did you mean '--format'?"),
    ],
)
def test_usage(args: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("export", "folder", *args) == 2
    assert says in capsys.readouterr().err


def test_what_cannot_be_read_is_refused(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    assert call("export", model, "--format", "torch", "-o", "x.pt2", "--check", tmp_path / "empty") != 0
    assert len(capsys.readouterr().err.strip().splitlines()) <= 2


def test_onnx_needs_its_libraries(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    find: Callable[..., object] = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "onnxscript" else find(name, *rest)
    )
    assert call("export", model, "--format", "onnx", "-o", tmp_path / "x.onnx") == 2
    assert "needs onnxscript: pip install 'manyheads[export]'" in capsys.readouterr().err


def test_the_list_names_every_family(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("export", "--list") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(EXPORTS)
    assert all("torch: " in line and "onnx: " in line for line in lines)
    assert call("export", "--list", "--json") == 0
    assert json.loads(capsys.readouterr().out) == EXPORTS
