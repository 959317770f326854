"""Batch jobs over images, through the command line: bad kinds, tables, lists; the proof at scale is slow.

`pytest -m slow tests/apps/test_jobs_vision.py -s` prints the proof's figures.
"""

from __future__ import annotations

import functools
import io
import json
import os
import re
import signal
import struct
import subprocess
import sys
import time
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

import manyheads
from manyheads.apps import cli, inputs
from manyheads.apps.jobs import JobOptions, run_job
from manyheads.core import hub
from manyheads.core.errors import UsageError
from manyheads.vision.preprocessing import Preprocessing

COMMAND = """
import sys
from manyheads.apps.cli import main
code = main(sys.argv[1:])
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
print(int(status["VmHWM"].split()[0]) / 1024)  # MiB; ru_maxrss would count the parent's memory at the fork
sys.exit(code)
"""
LABELS = [f"class {i}" for i in range(7)]
SAMPLES = Path(os.environ.get("MANYHEADS_DATA", "")) / "vision" / "imagenet_samples" / "images"


def encode(image, kind, **options):
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def png_bomb(width, height):
    """A PNG that claims a size, and has no pixels."""

    def chunk(kind, content):
        return (
            struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


PHOTO = encode(Image.linear_gradient("L").resize((120, 90)).convert("RGB"), "JPEG")
BAD = {  # content and the reason that must be given
    "truncated.jpg": (PHOTO[: len(PHOTO) // 2], "a damaged or truncated JPEG"),
    "text.jpg": (b"not a picture\n", "text, not an image"),
    "empty.png": (b"", "an empty file"),
    "bomb.png": (png_bomb(50_000, 50_000), "too many pixels"),
    "page.gif": (b"<html></html>", "not an image that is read here (HTML or XML)"),
    "paper.tif": (b"%PDF-1.4\n", "not an image that is read here (PDF)"),
    "phone.heic": (b"\0\0\0\x20ftypheic\0\0\0\0mif1", "not an image that is read here (HEIC"),
    "header.webp": (b"RIFF\x10\0\0\0WEBPVP8 ", "a damaged or truncated WebP"),
    "float.tif": (encode(Image.new("F", (9, 9)), "TIFF"), "floating-point samples"),
    "line.png": (encode(Image.new("1", (1, 400_000)), "PNG"), "too narrow"),
}


@functools.cache
def generate(i):
    """A picture of patterns and noise, of one of many kinds: its suffix and bytes."""
    rng = np.random.default_rng(i)
    height, width = (int(n) for n in rng.integers(40, 420, 2))
    rows, columns = np.mgrid[0:height, 0:width]
    waves = [np.sin(rows / rng.uniform(3, 40) + columns / rng.uniform(3, 40)) for _ in range(3)]
    pixels = 127 + 90 * np.stack(waves, axis=2) + rng.normal(0, 12, (height, width, 3))
    image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    modes = {0: "L", 1: "P", 2: "RGBA", 3: "LA", 4: "1", 5: "I;16"}
    if i % 3:
        return "jpg", encode(image.convert("CMYK") if i % 50 == 1 else image, "JPEG", quality=80)
    mode = modes.get(i // 3 % 12)
    if mode == "I;16":
        image = Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
    elif mode:
        image = image.convert(mode)
    kind = ("PNG", "PNG", "TIFF", "PNG")[i // 3 % 4]
    return kind.lower(), encode(image, kind)


def write_images(folder, count, bad_every=100):
    """Write images in folders of 500, real ones among them, each `bad_every`th broken; how many are.

    The generated ones are a thousand, again and again: drawing 10,000 would take longer than the job.
    """
    samples = sorted(SAMPLES.glob("*.jpg")) if SAMPLES.is_dir() else []
    kinds, broken = list(BAD), 0
    for i in range(count):
        place = folder / f"{i // 500:03d}"
        place.mkdir(parents=True, exist_ok=True)
        if i % bad_every == bad_every // 2:
            name, content = f"{i:06d}_{kinds[broken % len(kinds)]}", BAD[kinds[broken % len(kinds)]][0]
            broken += 1
        elif samples and i % 2:
            name, content = f"{i:06d}.jpg", samples[i % len(samples)].read_bytes()
        else:
            suffix, content = generate(i % 2000)
            name = f"{i:06d}.{suffix}"
        (place / name).write_bytes(content)
    return broken


def save(folder, name="cct", size=32, **arguments):
    """Write a model folder of random weights."""
    torch.manual_seed(0)
    model = manyheads.create_model(name, **arguments)
    options = {"domain": "vision", "name": name, "arguments": arguments}
    preprocessing = Preprocessing((size, size)).to_json()
    hub.save(folder, model, **options, preprocessing=preprocessing, labels=LABELS)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    sizes = {"embed_dim": 32, "depth": 1, "num_heads": 2, "num_classes": len(LABELS)}
    return save(tmp_path_factory.mktemp("vision") / "model", **sizes)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Fifty good images and one of every bad kind."""
    folder = tmp_path_factory.mktemp("vision") / "photos"
    for i in range(50):
        suffix, content = generate(i)
        place = folder / str(i % 4)
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{i:06d}.{suffix}").write_bytes(content)
    for name, (content, _) in BAD.items():
        (folder / "2" / name).write_bytes(content)
    return folder


def predict(*arguments):
    return cli.main(["predict", *map(str, arguments)])


def read(output):
    """The rows of all parts in order."""
    parts = sorted(output.glob("part-*.parquet"))
    return pd.concat([pq.read_table(part).to_pandas() for part in parts], ignore_index=True)


def bad_of(output):
    """The bad records of all shards."""
    lines = [line for file in sorted(output.glob("bad-*.jsonl")) for line in file.read_text().splitlines()]
    return {Path(each["id"]).name: each["reason"] for each in map(json.loads, lines)}


def test_every_bad_kind_is_reported_with_its_reason(model, photos, tmp_path, capsys):
    out = tmp_path / "out"
    assert predict(model, photos, "-o", out, "--shard-size", 16, "--batch-size", 5) == 3
    error = capsys.readouterr().err
    assert "10 of 60 records are bad (0.167), more than --max-bad 0" in error
    assert re.search(r"60 records in [\d.]+ s, [\d.]+ records/s, .*reading and preparing \d+% of CPU", error)
    bad = bad_of(out)
    assert set(bad) == set(BAD)
    for name, (_, reason) in BAD.items():
        assert bad[name].startswith(reason)
    assert not (out / "_SUCCESS").exists()
    assert (
        predict(
            model, photos, "-o", out, "--shard-size", 16, "--batch-size", 5, "--resume", "--max-bad", 0.17
        )
        == 0
    )
    assert (out / "_SUCCESS").exists()
    rows = read(out)
    good = sorted(str(path.relative_to(photos)) for path in photos.rglob("*.*") if path.name not in BAD)
    assert rows["id"].tolist() == good
    assert list(rows.columns[:3]) == ["id", "label", "probability"]
    assert rows["label"].isin(LABELS).all()


def test_below_max_bad_it_is_done(model, photos, tmp_path, capsys):
    assert predict(model, photos, "-o", tmp_path / "out", "--max-bad", 0.2, "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["records"], result["rows"], result["bad"], result["shards"]) == (60, 50, 10, 1)
    assert 0 < result["preparing"] < 1


@pytest.mark.parametrize("kind", ["features", "probabilities", "logits"])
def test_lists_in_parts(model, photos, tmp_path, kind):
    out = tmp_path / "out"
    assert predict(model, photos / "1", "-o", out, "--output-kind", kind, "--shard-size", 5, "--quiet") == 0
    for part in out.glob("part-*"):
        schema = pq.read_schema(part)
        assert schema.field("id").type == pa.string()
        assert schema.field(kind).type == pa.list_(pa.float32())
    found = np.stack(read(out)[kind].tolist())
    assert found.shape == (13, 32 if kind == "features" else 7)
    wanted = manyheads.load(model).predict(photos / "1", output_kind=kind)
    np.testing.assert_allclose(found, np.stack(wanted[kind].tolist()), rtol=1e-5, atol=1e-6)
    assert json.loads((out / "job.json").read_text())["options"]["output_kind"] == kind


def test_settings_belong_to_the_job(model, photos, tmp_path, capsys):
    out = tmp_path / "out"
    assert predict(model, photos / "1", "-o", out, "--top-k", 2, "--quiet") == 0
    assert list(read(out)) == ["id", "label", "probability", "label_2", "probability_2"]
    assert predict(model, photos / "1", "-o", out, "--top-k", 3, "--resume") == 2
    assert "top_k 2 -> 3" in capsys.readouterr().err
    assert predict(model, photos / "1", "-o", tmp_path / "b", "--top-k", 9) == 2
    assert "--top-k 9: the model has 7 labels" in capsys.readouterr().err
    assert predict(model, photos / "1", "-o", tmp_path / "b", "--output-kind", "labels") == 2
    assert "did you mean 'label'" in capsys.readouterr().err
    assert not (tmp_path / "b").exists()


def test_a_domain_without_settings_refuses_them(fake, source, tmp_path):
    options = JobOptions('{"name": "fake"}', [str(source)], tmp_path / "out", settings={"top_k": 3})
    with pytest.raises(UsageError, match=r"--top-k is no option of this model \(it has: none\)"):
        run_job(options, load=fake.load)


def test_parts_made_again_have_the_same_bytes(model, photos, tmp_path, inspect_folder):
    out, options = tmp_path / "out", ["--max-bad", 1, "--shard-size", 20, "--quiet"]
    assert predict(model, photos, "-o", out, *options) == 0
    before = inspect_folder.digests(out)
    for name in ("_SUCCESS", "part-00001-of-00003.parquet", "bad-00002.jsonl"):
        (out / name).unlink()
    assert predict(model, photos, "-o", out, *options, "--resume") == 0
    assert inspect_folder.digests(out) == before


def test_workers_give_the_same_rows(model, photos, tmp_path):
    options = ["--max-bad", 1, "--shard-size", 20, "--output-kind", "logits", "--quiet"]
    assert predict(model, photos, "-o", tmp_path / "one", *options) == 0
    assert predict(model, photos, "-o", tmp_path / "two", *options, "--workers", 1) == 0
    one, two = read(tmp_path / "one"), read(tmp_path / "two")
    assert one["id"].tolist() == two["id"].tolist()
    np.testing.assert_allclose(
        np.stack(one["logits"].tolist()), np.stack(two["logits"].tolist()), rtol=1e-5, atol=1e-6
    )
    assert bad_of(tmp_path / "one") == bad_of(tmp_path / "two")


def test_the_files_that_a_table_names_are_part_of_the_job(model, photos, tmp_path, capsys):
    image = tmp_path / "x.jpg"
    image.write_bytes(PHOTO)
    (tmp_path / "list.csv").write_text("image,id\nx.jpg,first\ngone.jpg,second\n")
    out = tmp_path / "out"
    assert predict(model, tmp_path / "list.csv", "-o", out, "--quiet") == 3
    assert read(out)["id"].tolist() == ["first"]
    assert bad_of(out) == {"second": "no such file"}
    inputs = json.loads((out / "job.json").read_text())["inputs"]
    assert [(each["name"], each.get("files")) for each in inputs] == [
        ("list.csv", None),
        ("files that the inputs name", 2),
    ]
    image.write_bytes(PHOTO + b" ")
    assert predict(model, tmp_path / "list.csv", "-o", out, "--resume") == 2
    assert "files that the inputs name has other content" in capsys.readouterr().err


def test_parquet_of_bytes_and_an_archive(model, photos, tmp_path):
    paths = sorted((photos / "1").iterdir())
    table = pa.table({"image": [path.read_bytes() for path in paths], "id": [path.name for path in paths]})
    pq.write_table(table, tmp_path / "t.parquet", row_group_size=4)
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for path in paths:
            archive.write(path, path.name)
    for source in ("t.parquet", "a.zip"):
        out = tmp_path / f"{source}-out"
        assert predict(model, tmp_path / source, "-o", out, "--shard-size", 3, "--quiet") == 0
        assert read(out)["id"].tolist() == [path.name for path in paths]


def test_the_hash_of_a_folder_sees_names_contents_and_order(tmp_path):
    for i in range(5):
        (tmp_path / "in" / str(i % 2)).mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / str(i % 2) / f"{i}.bin").write_bytes(bytes([i]) * (1 << 20 | i))
    read_files = []
    first = inputs.describe_input(tmp_path / "in", read_files.append)
    assert (first["files"], first["bytes"], sum(read_files)) == (5, sum(1 << 20 | i for i in range(5)), 5)
    stamp = inputs.stamp([tmp_path / "in"])
    target = tmp_path / "in" / "1" / "3.bin"
    content = bytearray(target.read_bytes())
    content[-1] ^= 1
    target.write_bytes(content)
    assert inputs.describe_input(tmp_path / "in")["sha256"] != first["sha256"]
    assert inputs.stamp([tmp_path / "in"]) != stamp


def start(*arguments):
    """Start `manyheads predict` in a process that prints its peak memory at the end."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    command = [sys.executable, "-c", COMMAND, "predict", *map(str, arguments)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )


def finish(process):
    """Wait for a run; its peak memory in MiB and its last line."""
    out, err = process.communicate(timeout=3000)
    assert process.returncode == 0, err
    return float(out), err.strip().splitlines()[-1]


def kill_after(process, output, parts):
    """Kill a run as soon as so many parts are there."""
    while len(list(output.glob("part-*"))) < parts:
        assert process.poll() is None, "it ended before it was killed"
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (output / "_SUCCESS").exists()


@pytest.mark.slow
@pytest.mark.timeout(5400)
def test_twenty_thousand_images_killed_twice_and_memory_flat(tmp_path, inspect_folder):
    """20,000 images, 1 % broken: the same bytes after two kills, and the memory of 2,000."""
    sizes = {"img_size": 64, "patch_size": 16, "depth": 4, "num_classes": len(LABELS)}
    model = save(tmp_path / "model", "vit_tiny_patch16_224", 64, **sizes)
    begin = time.perf_counter()
    broken = write_images(tmp_path / "photos", 20_000)
    few = write_images(tmp_path / "few", 2000)
    total = sum(file.stat().st_size for file in (tmp_path / "photos").rglob("*.*")) / 1e6
    print(f"\n22,000 images written in {time.perf_counter() - begin:.0f} s, 20,000 are {total:.0f} MB")
    begin = time.perf_counter()
    described = inputs.describe_input(tmp_path / "photos")
    print(f"fingerprint of {described['files']} files in {time.perf_counter() - begin:.1f} s")

    options = ["--max-bad", 0.02]
    small_peak, line = finish(start(model, tmp_path / "few", "-o", tmp_path / "few-out", *options))
    print(f"2,000: {small_peak:.0f} MiB; {line}")
    peak, line = finish(start(model, tmp_path / "photos", "-o", tmp_path / "undisturbed", *options))
    print(f"20,000: {peak:.0f} MiB; {line}")
    killed = tmp_path / "killed"
    kill_after(start(model, tmp_path / "photos", "-o", killed, *options), killed, 5)
    kill_after(start(model, tmp_path / "photos", "-o", killed, *options, "--resume"), killed, 12)
    _, line = finish(start(model, tmp_path / "photos", "-o", killed, *options, "--resume"))
    print(f"killed twice: {line}")

    assert inspect_folder.digests(killed) == inspect_folder.digests(tmp_path / "undisturbed")
    rows, bad = read(killed), bad_of(killed)
    assert len(rows) == 20_000 - broken
    assert rows["id"].is_unique
    assert (len(bad), broken, few) == (200, 200, 20)
    for name, reason in bad.items():
        assert reason.startswith(BAD[name[7:]][1])
    assert peak <= 1.15 * small_peak
