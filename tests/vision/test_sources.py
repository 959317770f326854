"""Listings of folders, tables and archives: ids, order, labels, what is read, and what is refused."""

from __future__ import annotations

import io
import os
import pickle
import tarfile
import tracemalloc
import zipfile

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from manyheads.core.errors import BadRecord, DataError, UsageError
from manyheads.vision import containers, images
from manyheads.vision.sources import list_images


def encoded(value):
    """A picture of its own for each number."""
    out = io.BytesIO()
    Image.new("RGB", (4, 4), (value, 0, 0)).save(out, "PNG")
    return out.getvalue()


@pytest.fixture
def folder(tmp_path):
    """Five images in classes, one hidden, and other files."""
    root = tmp_path / "photos"
    for i, name in enumerate(("cat/b.png", "cat/a.JPG", "dog/deep/c.png", "dog/z.tif", "root.png")):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(encoded(i))
    (root / "labels.csv").write_text("x\n")
    (root / ".cache").mkdir()
    (root / ".cache" / "d.png").write_bytes(encoded(9))
    (root / ".e.png").write_bytes(encoded(9))
    return root


NAMES = ["cat/a.JPG", "cat/b.png", "dog/deep/c.png", "dog/z.tif", "root.png"]
VALUES = [1, 0, 2, 3, 4]


def values(listing):
    """The pictures' numbers, or the reasons against them, streamed; each as when read by itself."""

    def value(data):
        if isinstance(data, BadRecord):
            return str(data)
        try:
            return images.decode(data).getpixel((0, 0))[0]
        except BadRecord as error:
            return str(error)

    found = [value(data) for _, data in listing.stream()]
    assert [ref for ref, _ in listing.stream()] == list(listing)
    for i, each in enumerate(found):
        try:
            assert value(listing.read(i)) == each
        except BadRecord as error:
            assert str(error) == each
    check_cuts(listing, found, value)
    return found


def check_cuts(listing, found, value):
    """Any range, streamed, cut, or cut and sent to another process, is the same."""
    for start in range(len(listing)):
        for stop in range(start + 1, len(listing) + 1):
            cut = pickle.loads(pickle.dumps(listing[start:stop]))
            assert list(cut) == list(listing)[start:stop]
            assert [value(data) for _, data in listing.stream(start, stop)] == found[start:stop]
            assert [value(data) for _, data in cut.stream()] == found[start:stop]


def ids(listing):
    return [ref.id for ref in listing]


def test_folder(folder):
    listing = list_images(folder)
    assert ids(listing) == NAMES
    assert values(listing) == VALUES
    assert [ref.label for ref in listing] == [None] * 5
    assert [ref.label for ref in list_images(folder, folder_labels=True)] == [
        "cat",
        "cat",
        "dog",
        "dog",
        None,
    ]
    assert listing[-1] == listing[4]
    with pytest.raises(IndexError):
        listing[5]


def test_links(folder, tmp_path):
    (tmp_path / "secret.png").write_bytes(encoded(7))
    (folder / "out.png").symlink_to(tmp_path / "secret.png")
    (folder / "in.png").symlink_to(folder / "root.png")
    (folder / "round").symlink_to(tmp_path)
    (folder / "gone.png").symlink_to(folder / "nothing")
    listing = list_images(folder)
    assert ids(listing) == [*NAMES[:4], "gone.png", "in.png", "out.png", "root.png"]
    assert values(listing) == [1, 0, 2, 3, "no such file", 4, "a link that leads out of the folder", 4]
    (tmp_path / "alias").symlink_to(folder)
    assert values(list_images(tmp_path / "alias"))[:4] == VALUES[:4]


def test_names_that_are_no_text(folder):
    (folder / os.fsdecode(b"\xff\xe9.png")).write_bytes(encoded(8))
    listing = list_images(folder)
    assert ids(listing)[-1] == r"\xff\xe9.png"
    assert values(listing)[-1] == 8


def test_images_patterns_and_lists(folder, tmp_path):
    assert ids(list_images(str(folder / "cat" / "b.png"))) == ["b.png"]
    (folder / "without_suffix").write_bytes(encoded(6))
    assert values(list_images(folder / "without_suffix")) == [6]
    assert ids(list_images(str(folder / "**" / "*.png"))) == ["cat/b.png", "dog/deep/c.png", "root.png"]
    listing = list_images([str(folder / "dog" / "z.tif"), folder / "cat" / "a.JPG"])
    assert ids(listing) == ["dog/z.tif", "cat/a.JPG"]
    assert values(listing) == [3, 1]
    assert list(listing.named_files()) == []


def test_several_sources(folder, tmp_path):
    (tmp_path / "list.csv").write_text("image\nphotos/root.png\n")
    (tmp_path / "one.png").write_bytes(encoded(5))
    listing = list_images([folder / "cat", tmp_path / "list.csv", tmp_path / "one.png"])
    assert ids(listing) == ["one.png", "cat/a.JPG", "cat/b.png", "list.csv/photos/root.png"]
    assert values(listing) == [5, 1, 0, 4]
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "a.JPG").write_bytes(encoded(5))
    with pytest.raises(UsageError, match="two sources are called 'cat'"):
        list_images([folder / "cat", tmp_path / "cat"])
    with pytest.raises(UsageError, match="given twice"):
        list_images([tmp_path / "one.png", tmp_path / "one.png"])


def test_csv_of_paths(folder, tmp_path):
    table = folder / "list.csv"
    table.write_text("label,image,id\ncat,cat/b.png,x\n,gone.png,y\ndog,,NA\n0,https://x.org/a.png,w\n")
    listing = list_images(table, label_column="label")
    assert ids(listing) == ["x", "y", "NA", "w"]
    assert [ref.label for ref in listing] == ["cat", None, "dog", "0"]
    assert [ref.place for ref in listing] == ["cat/b.png", "gone.png", 2, "https://x.org/a.png"]
    reasons = ["no such file", "no path in the cell", "an address, not a path: only files are read"]
    assert values(listing) == [0, *reasons]
    assert list(listing.named_files()) == [
        f"{folder}/{each}" for each in ("cat/b.png", "gone.png", "https://x.org/a.png")
    ]
    pd.read_csv(table, keep_default_na=False).to_csv(tmp_path / "list.csv.gz", index=False)
    assert len(list_images(tmp_path / "list.csv.gz")) == 4


def test_paths_without_ids_and_absolute_ones(folder, tmp_path):
    table = tmp_path / "elsewhere.parquet"
    paths = [str(folder / name) for name in NAMES]
    pq.write_table(pa.table({"picture": paths, "class": range(5)}), table, row_group_size=2)
    listing = list_images(table, image_column="picture", label_column="class")
    assert ids(listing) == paths
    assert values(listing) == VALUES
    assert [ref.label for ref in listing] == list("01234")


@pytest.mark.parametrize("group", [1, 3, 7, 100])
def test_parquet_of_bytes(tmp_path, monkeypatch, group):
    monkeypatch.setattr(containers, "CELLS", 2)
    cells = [encoded(i) for i in range(8)]
    cells[5] = None
    table = pa.table(
        {"image": pa.array(cells, pa.binary()), "y": range(8), "id": [f"r{i}" for i in range(8)]}
    )
    pq.write_table(table, tmp_path / "t.parquet", row_group_size=group)
    listing = list_images(tmp_path / "t.parquet", label_column="y")
    assert ids(listing) == [f"r{i}" for i in range(8)]
    assert [ref.place for ref in listing] == list(range(8))
    assert [ref.label for ref in listing] == list("01234567")
    assert values(listing) == [0, 1, 2, 3, 4, "no image in the cell", 6, 7]


def test_parquet_of_structs(folder):
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    cells = [{"bytes": encoded(i), "path": f"{i}.png"} for i in range(3)] + [{"bytes": None, "path": None}]
    pq.write_table(pa.table({"image": pa.array(cells, kind)}), folder / "packed.parquet", row_group_size=2)
    listing = list_images(folder / "packed.parquet")
    assert ids(listing) == list("0123")
    assert values(listing) == [0, 1, 2, "no image in the cell"]
    cells = [{"bytes": None, "path": name} for name in NAMES]
    pq.write_table(pa.table({"image": pa.array(cells, kind)}), folder / "named.parquet", row_group_size=2)
    assert values(list_images(folder / "named.parquet")) == VALUES


def test_cells_of_the_wrong_kind(tmp_path):
    pq.write_table(pa.table({"image": [1, 2]}), tmp_path / "t.parquet")
    with pytest.raises(DataError, match="holds int64, neither paths nor bytes"):
        list_images(tmp_path / "t.parquet")


def test_zip(folder, tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for name in reversed(NAMES):
            archive.write(folder / name, name)
        archive.writestr("__MACOSX/cat/._a.JPG", b"x")
        archive.writestr("../up.png", encoded(5))
        archive.writestr("readme.txt", b"x")
    listing = list_images(tmp_path / "a.zip", folder_labels=True)
    assert ids(listing) == ["../up.png", *NAMES]
    assert [ref.label for ref in listing][1:] == ["cat", "cat", "dog", "dog", None]
    assert values(listing) == [5, *VALUES]
    assert not (tmp_path.parent / "up.png").exists()


def test_zip_with_damage_and_a_bomb(tmp_path, monkeypatch):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("bomb.png", bytes(3 << 20), zipfile.ZIP_DEFLATED)
        archive.writestr("crc.png", encoded(1))
        archive.writestr("good.png", encoded(2))
    data = (tmp_path / "a.zip").read_bytes()
    (tmp_path / "a.zip").write_bytes(data.replace(encoded(1), encoded(3), 1))
    monkeypatch.setattr(containers, "MAX_BYTES", 1 << 20)
    found = values(list_images(tmp_path / "a.zip"))
    assert found == [
        "too large: 3 MiB, at most 1",
        "damaged in the archive: Bad CRC-32 for file 'crc.png'",
        2,
    ]


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:xz"])
def test_tar(folder, tmp_path, mode):
    path = tmp_path / ("a.tar" + mode[1:].replace(":", "."))
    (folder / "link.png").symlink_to("root.png")
    with tarfile.open(path, mode) as archive:
        archive.add(folder, ".", filter=lambda member: None if "deep" in member.name else member)
    listing = list_images(path, folder_labels=True)
    kept = dict(zip(NAMES, VALUES, strict=True))
    del kept["dog/deep/c.png"]
    assert sorted(ids(listing)) == sorted([*kept, "link.png"])
    assert {ref.id: ref.label for ref in listing}["dog/z.tif"] == "dog"
    if mode == "w":
        found = values(listing)
    else:
        with pytest.raises(DataError, match="no places to go to"):
            listing.read(0)
        streamed = [[data for _, data in listing.stream(i)] for i in range(len(listing))]
        assert [list(map(str, each)) for each in streamed[1:]] == [
            list(map(str, streamed[0][i:])) for i in range(1, len(listing))
        ]
        found = [
            str(data) if isinstance(data, BadRecord) else images.decode(data).getpixel((0, 0))[0]
            for data in streamed[0]
        ]
    kept["link.png"] = "a link or device in the archive"
    assert dict(zip(ids(listing), found, strict=True)) == kept


def test_frames(folder):
    frame = pd.DataFrame({"image": [encoded(1), str(folder / "root.png"), None, folder / "no.png", 5]})
    listing = list_images(frame)
    assert ids(listing) == list("01234")
    assert values(listing) == [1, 4, "no image in the cell", "no such file", "a int, not an image"]
    frame = pd.DataFrame({"image": [encoded(1)] * 2, "id": ["a", "b"], "y": [1.0, None]})
    assert [(ref.id, ref.label) for ref in list_images(frame, label_column="y")] == [
        ("a", "1.0"),
        ("b", None),
    ]


def write(path, text):
    path.write_bytes(text)
    return path


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("t.csv", b"picture,y\na.png,1\n", "no column 'image' \\(it has picture, y\\)"),
        ("t.csv", b"images,y\na.png,1\n", "did you mean 'images'"),
        ("t.csv", b"image\na.png\na.png\n", "'a.png' stands twice; a column 'id'"),
        ("t.csv", b"id,image\n1,a.png\n1,b.png\n", "the id '1' stands twice"),
        ("t.csv", b"id,image\n,a.png\n1,b.png\n", "a row has no id"),
        ("t.csv", b"", "cannot be read"),
        ("t.parquet", b"PAR1nonsense", "no parquet file"),
        ("a.zip", b"PK nonsense", "no zip archive"),
        ("a.tar", b"nonsense", "no tar archive"),
        ("a.tar.gz", b"\x1f\x8b\x08nonsense", "no tar archive"),
    ],
)
def test_tables_and_archives_that_cannot_be_used(tmp_path, name, content, says):
    with pytest.raises(DataError, match=says):
        list_images(write(tmp_path / name, content))


def test_sources_that_are_none(folder, tmp_path):
    with pytest.raises(UsageError, match="no such file, folder or pattern"):
        list_images(tmp_path / "nowhere")
    with pytest.raises(UsageError, match="images come from a folder"):
        list_images({"image": []})
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no images"):
        list_images(tmp_path / "empty")
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("x.txt", b"x")
    with pytest.raises(DataError, match="holds no images"):
        list_images(tmp_path / "a.zip")
    with pytest.raises(DataError, match="no column 'label'"):
        list_images(write(tmp_path / "t.csv", b"image\na.png\n"), label_column="label")


def test_a_list_of_many_files_is_small(tmp_path):
    """A quarter of a million paths: their text once, and nothing else a file."""
    table = tmp_path / "t.parquet"
    names = pa.array([f"folder{i % 100:03d}/image_{i:08d}.jpg" for i in range(250_000)])
    pq.write_table(pa.table({"image": names}), table)
    before = pa.total_allocated_bytes()
    tracemalloc.start()
    listing = list_images(table)
    held = pa.total_allocated_bytes() - before + tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert len(listing) == 250_000
    assert listing[249_999].id == "folder099/image_00249999.jpg"
    assert held / len(listing) < 60
    assert len(pickle.dumps(listing[1000:1100])) < 10_000
