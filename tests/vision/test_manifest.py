"""The manifest: every kind of source, and what is refused."""

from __future__ import annotations

import gzip
import io
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from manyheads.core.errors import BadRecord, DataError, ManyheadsError
from manyheads.vision.manifest import Columns, read_manifest, shared_content
from manyheads.vision.splits import OPEN, TEST, TRAIN, VAL


def encoded(number: int, kind: str = "PNG") -> bytes:
    """An image that says its number."""
    buffer = io.BytesIO()
    Image.new("RGB", (8, 6), (number % 256, number // 256, 7)).save(buffer, kind)
    return buffer.getvalue()


def number(image: Image.Image) -> int:
    red, green, _ = image.getpixel((0, 0))
    return red + 256 * green


def files(root: Path, names: list[str]) -> Path:
    for i, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(i))
    return root


PLAIN = ["cat/0.png", "cat/1.png", "dog/deeper/2.png", "dog/3.png", "10/4.png", "10/5.png"]


def pack(folder: Path, target: Path) -> Path:
    if target.suffix == ".zip":
        with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
            for path in sorted(folder.rglob("*.png")):
                archive.write(path, path.relative_to(folder.parent))
    else:
        with tarfile.open(target, "w:gz" if target.suffix == ".gz" else "w") as archive:
            archive.add(folder, folder.name)
    return target


@pytest.mark.parametrize("kind", ["folder", "all.zip", "all.tar", "all.tar.gz"])
def test_folders_of_classes(tmp_path: Path, kind: str) -> None:
    folder = files(tmp_path / "pets", PLAIN)
    (folder / "cat" / "notes.txt").write_text("not an image")
    manifest = read_manifest(folder if kind == "folder" else pack(folder, tmp_path / kind))
    assert manifest.labels == ("10", "cat", "dog")
    assert len(manifest) == 6
    assert not manifest.multi_label
    assert (manifest.parts == OPEN).all()
    for i in (5, 0, 3, 1, 2, 4):  # in any order
        original = number(manifest.store.image(i, 3, None))
        assert manifest.labels[manifest.targets[i]] == PLAIN[original].partition("/")[0]
        assert manifest.store.id(i).endswith(PLAIN[original])


def test_classes_that_are_numbers_are_in_their_order(tmp_path: Path) -> None:
    manifest = read_manifest(files(tmp_path, [f"{c}/{i}.png" for c in (10, 2, 9) for i in range(2)]))
    assert manifest.labels == ("2", "9", "10")


@pytest.mark.parametrize("kind", ["folder", "parts.zip"])
def test_folders_of_parts(tmp_path: Path, kind: str) -> None:
    parts = {"train": TRAIN, "validation": VAL, "test": TEST}
    folder = files(
        tmp_path / "all", [f"{part}/{c}/{i}.png" for part in parts for c in "ab" for i in range(2)]
    )
    manifest = read_manifest(folder if kind == "folder" else pack(folder, tmp_path / kind))
    assert manifest.labels == ("a", "b")
    for i in range(12):
        part = next(p for p in parts if f"{p}/" in manifest.store.id(i))
        assert manifest.parts[i] == parts[part]


def table(folder: Path, kind: str, frame: pd.DataFrame, name: str = "images", groups: int = 3) -> Path:
    path = folder / f"{name}.{kind}"
    if kind == "csv":
        frame.to_csv(path, index=False)
    else:
        frame.to_parquet(path, row_group_size=groups)
    return path


def paths(n: int) -> pd.DataFrame:
    names = [f"img/{i}.png" for i in range(n)]
    return pd.DataFrame({"image": names, "label": [["b", "a"][i % 2] for i in range(n)]})


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_tables_of_paths(tmp_path: Path, kind: str) -> None:
    frame = paths(8).assign(patient=list("xxyyzzww"), fold=["train"] * 4 + ["Val"] * 2 + ["test"] * 2)
    files(tmp_path, frame["image"].tolist())
    path = table(tmp_path, kind, frame)
    manifest = read_manifest(path, Columns(group="patient", split="fold"))
    assert manifest.labels == ("a", "b")
    assert manifest.targets.tolist() == [1, 0] * 4
    assert manifest.groups is not None
    assert manifest.groups.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert manifest.parts.tolist() == [TRAIN] * 4 + [VAL] * 2 + [TEST] * 2
    assert [number(manifest.store.image(i, 3, None)) for i in range(8)] == list(range(8))
    assert manifest.store.id(3) == "img/3.png"
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    moved = path.rename(elsewhere / path.name)
    with pytest.raises(DataError, match=r"8 of 8 files are missing, the first is .*elsewhere/img/0\.png"):
        read_manifest(moved)
    assert len(read_manifest(moved, Columns(folder=str(tmp_path)))) == 8


@pytest.mark.parametrize("struct", [False, True])
def test_parquet_of_bytes_is_read_in_any_order(
    tmp_path: Path, struct: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    n, copies = 50, tmp_path / "copies"
    copies.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(copies))
    cells = [encoded(i) for i in range(n)]
    images = [{"bytes": cell, "path": f"{i}.png"} for i, cell in enumerate(cells)] if struct else cells
    labels = pa.array(np.arange(n) % 5, pa.int8())
    pq.write_table(pa.table({"image": images, "label": labels}), tmp_path / "a.parquet", row_group_size=7)
    manifest = read_manifest(tmp_path / "a.parquet")
    assert manifest.labels == ("0", "1", "2", "3", "4")
    for i in np.random.default_rng(0).permutation(n).tolist():
        assert number(manifest.store.image(i, 3, None)) == i
        assert manifest.targets[i] == i % 5
    assert not list(copies.iterdir())  # unlinked, only mapped


def test_a_folder_of_tables_by_part(tmp_path: Path) -> None:
    for part, first in (
        ("train-00000-of-00002", 0),
        ("train-00001-of-00002", 10),
        ("test-00000-of-00001", 20),
    ):
        frame = pd.DataFrame({"image": [encoded(first + i) for i in range(10)], "label": [0, 1] * 5})
        table(tmp_path, "parquet", frame, part)
    manifest = read_manifest(tmp_path)
    numbers = [number(manifest.store.image(i, 3, None)) for i in range(30)]
    assert sorted(numbers) == list(range(30))
    assert all((part == TEST) == (i >= 20) for i, part in zip(numbers, manifest.parts, strict=True))
    assert [n % 2 for n in numbers] == manifest.targets.tolist()


def test_a_cell_without_an_image_is_a_bad_record(tmp_path: Path) -> None:
    frame = pd.DataFrame({"image": [encoded(0), None, b"text", encoded(3)], "label": [0, 1, 0, 1]})
    manifest = read_manifest(table(tmp_path, "parquet", frame))
    for i, reason in ((1, "no image in the cell"), (2, "text, not an image")):
        with pytest.raises(BadRecord, match=reason):
            manifest.store.image(i, 3, None)


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_several_labels_with_unknown_ones(tmp_path: Path, kind: str) -> None:
    frame = paths(4).assign(sick=[1, 0, None, 1], old=[0, None, None, 1])
    files(tmp_path, frame["image"].tolist())
    manifest = read_manifest(table(tmp_path, kind, frame), Columns(label=["sick", "old"]))
    assert manifest.multi_label
    assert manifest.labels == ("sick", "old")
    assert manifest.targets.dtype == np.float32
    nan = float("nan")
    np.testing.assert_array_equal(manifest.targets, [[1, 0], [0, nan], [nan, nan], [1, 1]])
    assert manifest.counts(np.arange(4)) == [2, 1]


def write_idx(path: Path, values: np.ndarray) -> None:
    header = b"\0\0\x08" + bytes([values.ndim]) + np.array(values.shape, ">u4").tobytes()
    with gzip.open(path, "wb") if path.suffix == ".gz" else path.open("wb") as file:
        file.write(header + values.tobytes())


def idx_folder(folder: Path, end: str = "") -> Path:
    rng = np.random.default_rng(0)
    for part, n in (("train", 20), ("t10k", 10)):
        write_idx(folder / f"{part}-images-idx3-ubyte{end}", rng.integers(0, 256, (n, 6, 5), np.uint8))
        write_idx(folder / f"{part}-labels-idx1-ubyte{end}", np.arange(n, dtype=np.uint8) % 3)
    return folder


@pytest.mark.parametrize("end", ["", ".gz"])
def test_idx_files(tmp_path: Path, end: str) -> None:
    manifest = read_manifest(idx_folder(tmp_path, end))
    assert manifest.parts.tolist() == [TRAIN] * 20 + [TEST] * 10
    assert manifest.targets.tolist() == [*(i % 3 for i in range(20)), *(i % 3 for i in range(10))]
    assert (manifest.store.id(3), manifest.store.id(24)) == ("train/3", "test/4")
    expected = np.random.default_rng(0).integers(0, 256, (20, 6, 5), np.uint8)[7]
    np.testing.assert_array_equal(np.asarray(manifest.store.image(7, 1, None)), expected)
    assert manifest.store.image(7, 3, None).mode == "RGB"


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "is no idx file"),
        (b"\0\0\x0d\x01\0\0\0\x14" + b"0" * 80, "is no idx file of bytes"),
        (b"\0\0\x08\x01\0\0\0\x14" + b"0" * 19, r"19 bytes after the header, which says \(20,\)"),
        (b"\0\0\x08\x03" + b"\xff" * 12 + b"0", "1 bytes after the header"),
        (b"\0\0\x08\x01\0\0\0\x13" + b"0" * 19, r"images \(20, 6, 5\), but labels \(19,\)"),
    ],
)
def test_idx_files_that_are_none(tmp_path: Path, content: bytes, says: str) -> None:
    (idx_folder(tmp_path) / "train-labels-idx1-ubyte").write_bytes(content)
    with pytest.raises(DataError, match=says):
        read_manifest(tmp_path)


def test_idx_files_that_are_missing_or_cut(tmp_path: Path) -> None:
    path = idx_folder(tmp_path, ".gz") / "t10k-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match="cannot be read"):
        read_manifest(tmp_path)
    path.unlink()
    with pytest.raises(DataError, match=r"no file t10k-images-idx3-ubyte\[\.gz\]"):
        read_manifest(tmp_path)


@pytest.mark.parametrize(
    ("names", "says"),
    [
        ([], "holds no images"),
        (["a/0.png", "a/1.png", "2.png"], r"2\.png lies in no class folder"),
        (["train/a/0.png", "train/1.png", "test/a/2.png"], r"train/1\.png lies in no class folder"),
        (["a/0.png", "a/1.png"], "one class only"),
        (["a/0.png", "a/1.png", "b/2.png"], r"class 'b' has a single image \(b/2\.png\)"),
        (["a/0.png", "b/1.png", "c/2.png"], "class 'a' and 2 others has a single image"),
    ],
)
def test_folders_that_are_refused(tmp_path: Path, names: list[str], says: str) -> None:
    with pytest.raises(DataError, match=says):
        read_manifest(files(tmp_path, names))


@pytest.mark.parametrize("kind", ["csv", "parquet"])
@pytest.mark.parametrize(
    ("change", "columns", "says"),
    [
        ({"label": ["a", None, "b", "b"]}, Columns(), r"(line 3|row 1): nothing in column 'label'$"),
        ({"label": [1.0, None, None, 2.0]}, Columns(), r"nothing in column 'label', and in 1 more rows"),
        ({"label": ["a", " ", "b", "b"]}, Columns(), "nothing in column 'label'"),
        ({"label": ["a"] * 4}, Columns(), "one class only"),
        ({"label": ["a", "a", "a", "b"]}, Columns(), r"class 'b' has a single image \(img/3.png\)"),
        ({}, Columns(label="labl"), "no column 'labl'; did you mean 'label'"),
        ({}, Columns(image="picture"), "no column 'picture'"),
        ({"who": ["x", "", "y", "y"]}, Columns(group="who"), "nothing in column 'who'"),
        ({"of": ["train", "test", "all", "test"]}, Columns(split="of"), "column 'of' has 'all'"),
        ({"x": [1, 0, -1, 1]}, Columns(label=["x"]), r"column 'x' has '-1(\.0)?'; a label is 1, 0, or empty"),
        ({"x": [1, None, 1, 1]}, Columns(label=["x"]), "no row has 0 in the label column 'x'"),
        ({"id": ["p", "q", "q", "r"]}, Columns(), "the id 'q' stands twice"),
        (
            {"image": ["img/0.png", "img/1.png", "no.png", "nor.png"]},
            Columns(),
            r"2 of 4 files are missing.*/no\.png$",
        ),
    ],
)
def test_tables_that_are_refused(
    tmp_path: Path, kind: str, change: dict[str, list[object]], columns: Columns, says: str
) -> None:
    files(tmp_path, paths(4)["image"].tolist())
    with pytest.raises(ManyheadsError, match=says):
        read_manifest(table(tmp_path, kind, paths(4).assign(**change)), columns)


def test_what_is_no_source(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no folder or file"):
        read_manifest(tmp_path / "nowhere")
    with pytest.raises(DataError, match="no images"):
        read_manifest(table(tmp_path, "csv", paths(0)))


def test_class_numbers_of_a_known_list(tmp_path: Path) -> None:
    files(tmp_path, paths(3)["image"].tolist())
    path = table(tmp_path, "csv", paths(3).assign(label=[2, 0, 2]))
    manifest = read_manifest(path, Columns(), ["x", "y", "z"], TEST)
    assert manifest.labels == ("x", "y", "z")
    assert manifest.targets.tolist() == [2, 0, 2]
    assert (manifest.parts == TEST).all()
    with pytest.raises(DataError, match="line 2: column 'label' has '2', not 0 to 1"):
        read_manifest(path, Columns(), ["x", "y"], TEST)


def test_content_in_two_parts_is_found(tmp_path: Path) -> None:
    folder = files(
        tmp_path, [f"{part}/{c}/{i}.png" for part in ("train", "test") for c in "ab" for i in range(3)]
    )
    (folder / "test/b/0.png").write_bytes((folder / "train/a/2.png").read_bytes())
    (folder / "test/b/1.png").write_bytes((folder / "test/b/2.png").read_bytes())  # of one part
    manifest = read_manifest(folder)
    found = shared_content(manifest, manifest.parts)
    assert [{manifest.store.id(i) for i in pair} for pair in found] == [{"train/a/2.png", "test/b/0.png"}]


def test_two_hundred_thousand_rows_are_small(tmp_path: Path) -> None:
    n = 200_000
    (tmp_path / "0.png").write_bytes(encoded(0))
    frame = pd.DataFrame({"id": np.arange(n), "label": np.arange(n) % 1000, "g": np.arange(n) % 9000})
    frame["image"] = [f"{'./' * (i % 60)}0.png" for i in range(n)]  # 65 characters on the mean
    path = table(tmp_path, "parquet", frame, groups=50_000)
    read_manifest(table(tmp_path, "parquet", frame.head(2000), "few"))  # what is kept of a first reading
    blocks, arrow = sys.getallocatedblocks(), pa.total_allocated_bytes()
    manifest = read_manifest(path, Columns(group="g"))
    assert len(manifest) == n
    assert len(manifest.labels) == 1000
    assert sys.getallocatedblocks() - blocks < 0.05 * n  # no Python object an image
    assert pa.total_allocated_bytes() - arrow < 120 * n  # ids and paths
    assert manifest.groups is not None
    assert manifest.targets.nbytes + manifest.groups.nbytes + manifest.parts.nbytes == 17 * n
