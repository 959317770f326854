"""Listings of recordings: folders, files, manifests, DataFrames; ids, parts, names for results."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
import torch

from manyheads.core.errors import BadRecord, DataError, UsageError
from manyheads.speech import audio
from manyheads.speech.sources import AudioRef, file_stem, list_audio

RATE = 8000


def sound(seconds, seed=0):
    return np.random.default_rng(seed).normal(size=round(seconds * RATE)).astype(np.float32) / 10


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Four recordings, one of them deeper, and what is none."""
    root = tmp_path_factory.mktemp("recordings")
    (root / "b").mkdir()
    (root / ".hidden").mkdir()
    for seed, name in enumerate(("b/two.flac", "a.wav", "b/one.wav", "Z.WAV", ".hidden/x.wav", "b/.y.wav")):
        soundfile.write(root / name, sound(1 + seed, seed), RATE, format=name[-4:].strip(".").upper())
    (root / "notes.txt").write_text("no recording")
    (root / "call.m4a").write_bytes(b"?")  # listed: it is refused with a reason later
    return root


def ids(source, **options):
    return [ref.id for ref in list_audio(source, **options)]


def test_a_folder_is_sorted_and_leaves_out_what_is_hidden(folder):
    found = list_audio(folder)
    assert [ref.id for ref in found] == ["Z.WAV", "a.wav", "b/one.wav", "b/two.flac", "call.m4a"]
    assert list_audio(str(folder))[1] == AudioRef("a.wav", str(folder / "a.wav"))
    assert found[1].load() == folder / "a.wav"
    assert torch.equal(found[1].read(RATE), audio.read(folder / "a.wav", RATE))
    assert list(found.named_files()) == []
    assert [ref.id for ref in found[1:3]] == ["a.wav", "b/one.wav"]


def test_files_and_patterns(folder):
    assert ids(folder / "b" / "one.wav") == ["one.wav"]
    assert ids([str(folder / "b" / "two.flac"), folder / "a.wav"]) == ["b/two.flac", "a.wav"]
    assert ids(str(folder / "**" / "*.wav")) == ["a.wav", "b/one.wav"]
    assert ids(str(folder / "b" / "*")) == ["one.wav", "two.flac"]
    assert ids(folder / "notes.txt") == ["notes.txt"]  # as given, whatever it is called


def test_several_sources_begin_with_their_names(folder, tmp_path):
    (tmp_path / "list.csv").write_text(f"audio\n{folder}/a.wav\n")
    found = ids([folder / "b", tmp_path / "list.csv", folder / "Z.WAV"])
    assert found == ["Z.WAV", "b/one.wav", "b/two.flac", f"list.csv/{folder}/a.wav"]


ROWS = [
    {"audio": "a.wav", "id": "first", "text": "hello, you", "start": 0.5, "end": 1.25},
    {"audio": "b/two.flac", "id": "second", "text": None, "start": None, "end": None},
    {"audio": None, "id": "third", "text": "gone", "start": None, "end": None},
]


@pytest.mark.parametrize("suffix", ["csv", "csv.gz", "jsonl", "parquet"])
def test_manifests(folder, suffix):
    path = folder / f"manifest.{suffix}"
    if suffix == "jsonl":
        path.write_text("\n".join(json.dumps(row) for row in ROWS) + "\n\n")
    elif suffix == "parquet":
        pd.DataFrame(ROWS).to_parquet(path)
    else:
        pd.DataFrame(ROWS).to_csv(path, index=False)
    found = list_audio(path)
    path.unlink()
    assert found[0] == AudioRef("first", str(folder / "a.wav"), "hello, you", 0.5, 1.25, named=True)
    assert (found[1].id, found[1].text, found[1].start, found[1].end) == ("second", None, None, None)
    assert list(found.named_files()) == [str(folder / "a.wav"), str(folder / "b" / "two.flac")]
    assert torch.equal(found[0].read(RATE), audio.read(folder / "a.wav", RATE)[4000:10_000])
    with pytest.raises(BadRecord, match="the row has no audio"):
        found[2].read(RATE)


def test_other_column_names(folder):
    (folder / "other.csv").write_text("wav,said\na.wav,hi\n")
    found = list_audio(folder / "other.csv", audio_column="wav", text_column="said")
    (folder / "other.csv").unlink()
    assert (found[0].id, found[0].text) == ("a.wav", "hi")


@pytest.mark.parametrize("struct", [False, True])
def test_bytes_in_parquet_stay_there_until_they_are_read(folder, tmp_path, struct):
    contents = [(folder / name).read_bytes() for name in ("a.wav", "b/one.wav", "b/two.flac")]
    cells = [{"bytes": content, "path": None} for content in contents] if struct else contents
    pq.write_table(
        pa.table({"audio": [*cells, None], "text": ["x", None, "z", "w"]}),
        tmp_path / "t.parquet",
        row_group_size=2,
    )
    found = list_audio(tmp_path / "t.parquet")
    assert [ref.id for ref in found] == ["0", "1", "2", "3"]
    assert len(pickle.dumps(found[:3])) < 2000
    assert [ref.load() for ref in found[:3]] == contents
    assert len(found[1].read(RATE)) == 3 * RATE
    assert list(found.named_files()) == []
    with pytest.raises(BadRecord, match="the row has no audio"):
        found[3].load()


def test_a_frame_of_paths_bytes_and_parts(folder):
    path = str(folder / "a.wav")
    frame = pd.DataFrame({"audio": [path, path, Path(path).read_bytes()], "start": [0, 1.5, np.nan]})
    frame["end"] = [1.0, np.nan, np.nan]
    found = list_audio(frame)
    assert [ref.id for ref in found] == [f"{path}#0-1.0", f"{path}#1.5-", "2"]
    assert [len(ref.read(RATE)) for ref in found] == [8000, 4000, 16_000]


@pytest.mark.parametrize(
    ("start", "end", "message"),
    [
        (1.0, 1.0, "a part from 1 s to 1 s has no samples"),
        (1.5, 1.0, r"a part from 1\.5 s to 1 s has no samples"),
        (7.0, None, "a part from 7 s to 2 s has no samples"),
        (0.0, 2.5, r"end 2\.5 s lies behind the recording's 2\.000 s"),
    ],
)
def test_parts_that_are_none(folder, start, end, message):
    with pytest.raises(BadRecord, match=message):
        AudioRef("x", str(folder / "a.wav"), start=start, end=end).read(RATE)


def test_an_end_rounded_up_is_the_end(folder):
    assert len(AudioRef("x", str(folder / "a.wav"), start=1.0, end=2.004).read(RATE)) == RATE


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("audi,text\na.wav,x\n", r"has no column 'audio'; did you mean 'audi'\? \(it has audi, text\)"),
        ("audio\n", "has no rows"),
        ("audio\na.wav\na.wav\n", "the id 'a.wav' stands 2 times; a column 'id' would tell the rows apart"),
        ("audio,start\na.wav,soon\n", "row 1: start is 'soon', not a number of seconds"),
        ("audio,end\na.wav,-1\n", "row 1: end is '-1', not a number of seconds"),
        ("audio,id\na.wav,1,2\n", "cannot be read"),
    ],
)
def test_manifests_that_cannot_be_used(tmp_path, content, message):
    (tmp_path / "m.csv").write_text(content)
    with pytest.raises(DataError, match=message):
        list_audio(tmp_path / "m.csv")


def test_other_things_that_cannot_be_used(tmp_path):
    (tmp_path / "m.jsonl").write_text('{"audio": "a.wav"}\n{"audio": \n')
    with pytest.raises(DataError, match="line 2: not JSON"):
        list_audio(tmp_path / "m.jsonl")
    (tmp_path / "l.jsonl").write_text("[1]\n")
    with pytest.raises(DataError, match="line 1: not an object"):
        list_audio(tmp_path / "l.jsonl")
    pq.write_table(pa.table({"audio": [1, 2]}), tmp_path / "n.parquet")
    with pytest.raises(DataError, match="the column 'audio' holds int64, neither paths nor bytes"):
        list_audio(tmp_path / "n.parquet")
    (tmp_path / "p.parquet").write_text("no parquet")
    with pytest.raises(DataError, match="cannot be read"):
        list_audio(tmp_path / "p.parquet")
    with pytest.raises(UsageError, match=r"no recordings at .*nowhere"):
        list_audio(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no recordings"):
        list_audio(tmp_path / "empty")
    with pytest.raises(UsageError, match="recordings come from a folder, a sound file"):
        list_audio(7)


NAMES = [
    "a.wav",
    "a/b c.wav",
    "ä/语音.wav",
    "../up",
    "./here",
    "%2E%2E/up",
    "/root",
    "a//b",
    ".hidden",
    "x:y\\z\n?*",
    "l" * 300,
    "l" * 299 + "m",
    "语" * 150,
    os.fsdecode(b"not-utf8-\xff"),
]


def test_names_for_files_are_safe_and_differ():
    found = [file_stem(name) for name in NAMES]
    assert found[:3] == NAMES[:3]
    assert len(set(found)) == len(NAMES)
    for name in found:
        parts = name.split("/")
        assert all(part and not part.startswith(".") and len(part.encode()) <= 200 for part in parts), name
        assert not set("\\:*?\n\0") & set(name)
