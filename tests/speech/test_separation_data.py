"""Speakers found and divided, finished mixtures, batches, resuming."""

from __future__ import annotations

import os
from pathlib import Path

import pandas as pd
import pytest
import torch

from manyheads.core.errors import DataError, UsageError
from manyheads.speech.audio import write
from manyheads.speech.separation.data import Columns, Loading, Mixing, SeparationData, Splits
from manyheads.speech.separation.fixed import FixedMixtures
from manyheads.speech.separation.speakers import PARTS, find_speakers

SHARED = Path(os.environ.get("MANYHEADS_DATA", "nowhere").split(os.pathsep)[0]) / "speech"
shared = pytest.mark.skipif(
    not (SHARED / "librispeech_speakers").is_dir(), reason="needs librispeech_speakers in MANYHEADS_DATA"
)
RATE = 8000


def speak(path: Path, length: int = 6000) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write(path, 0.1 * torch.randn(length).clamp(-5, 5), RATE)


@pytest.fixture(scope="module")
def people(tmp_path_factory) -> Path:
    """Twelve speakers with two recordings each."""
    folder = tmp_path_factory.mktemp("people")
    for n in range(12):
        for k in range(2):
            speak(folder / f"p{n:02}" / f"p{n:02}-{k}.wav", 5000 + 500 * n)
    return folder


def find(source: Path, splits: Splits | None = None):
    return find_speakers(source, Columns(), splits or Splits(), speakers=2, seed=0)


def who(found) -> list[set[str]]:
    return [set(found[part].speakers) for part in PARTS]


def test_speakers_of_folders_are_divided_and_disjoint(people):
    found = find(people, splits=Splits(0.2, 0.25))
    train, val, test = who(found)
    assert (len(train), len(val), len(test)) == (7, 2, 3)
    assert not train & val
    assert not train & test
    assert not val & test
    assert sum(len(found[part].refs) for part in PARTS) == 24
    for part in PARTS:
        for ref, name in zip(found[part].refs, found[part].speakers, strict=True):
            assert ref.id.startswith(f"{name}/")
    again = find(people, splits=Splits(0.2, 0.25))
    assert who(again) == [train, val, test]


def test_folders_of_parts_are_taken_as_they_are(tmp_path):
    for part, names in {"train-clean": "abcd", "dev": "ef", "test": "gh"}.items():
        for name in names:
            speak(tmp_path / part / name / "1.wav")
    assert who(find(tmp_path)) == [set("abcd"), set("ef"), set("gh")]


def test_a_table_says_who_speaks_and_in_which_part(people, tmp_path):
    rows = [
        {"audio": str(path), "speaker": path.parent.name, "split": "test" if n >= 16 else "train"}
        for n, path in enumerate(sorted(people.rglob("*.wav")))
    ]
    for name in ("table.csv", "table.parquet", "table.jsonl"):
        frame = pd.DataFrame(rows)
        if name.endswith("csv"):
            frame.to_csv(tmp_path / name, index=False)
        elif name.endswith("parquet"):
            frame.to_parquet(tmp_path / name)
        else:
            frame.to_json(tmp_path / name, orient="records", lines=True)
        train, val, test = who(find(tmp_path / name))
        assert test == {"p08", "p09", "p10", "p11"}
        assert len(val) == 2  # of the training speakers: the table has no validation
        assert len(train) == 6
        assert not train & val


def test_what_is_wrong_with_a_table_is_said(people, tmp_path):
    path = sorted(people.rglob("*.wav"))[0]
    base = {"audio": [str(path)] * 2, "id": ["a", "b"], "speaker": ["x", "x"], "split": ["train", "test"]}
    for change, message in (
        ({}, "speaker x is in two parts, train and test"),
        ({"speaker": ["x", None]}, "row 2: no speaker"),
        ({"split": ["train", "other"]}, "row 2: 'other' is none of train"),
    ):
        pd.DataFrame(base | change).to_csv(tmp_path / "t.csv", index=False)
        with pytest.raises(DataError, match=message):
            find(tmp_path / "t.csv")
    pd.DataFrame(base).rename(columns={"speaker": "spaeker"}).to_csv(tmp_path / "t.csv", index=False)
    with pytest.raises(DataError, match=r"no column 'speaker'; did you mean 'spaeker'|no column 'speaker'"):
        find(tmp_path / "t.csv")


def test_what_is_wrong_with_a_folder_is_said(tmp_path):
    with pytest.raises(UsageError, match="there is no such file or folder"):
        find(tmp_path / "nothing")
    speak(tmp_path / "loose.wav")
    with pytest.raises(DataError, match=r"loose.wav lies in no speaker's folder"):
        find(tmp_path)
    (tmp_path / "loose.wav").rename(tmp_path / "note.txt")
    for name in "abcde":
        speak(tmp_path / name / "1.wav")
    with pytest.raises(DataError, match="5 speakers are not enough for three parts of 2 or more each"):
        find(tmp_path)
    with pytest.raises(UsageError, match="not a table"):
        find(tmp_path / "note.txt")


def make(people: Path, **more) -> SeparationData:
    loading = Loading(epoch_mixtures=10, val_mixtures=3, test_mixtures=4, **more.pop("loading", {}))
    return SeparationData(str(people), batch_size=3, loading=loading, mixing=Mixing(seconds=0.7), **more)


def test_batches_are_filled_up_and_say_so(people):
    data = make(people, loading={"eval_batch_size": 2})
    train = list(data.train_dataloader())
    assert len(train) == 3  # the fourth would not be full
    for batch in [*train, *data.test_dataloader()]:
        count, length = batch["mixture"].shape
        assert batch["sources"].shape == (count, 2, length)
        assert len(batch["ids"]) == count
        for row, own in enumerate(batch["lengths"].tolist()):
            assert (batch["sources"][row, :, own:] == 0).all()
            torch.testing.assert_close(batch["sources"][row].sum(0), batch["mixture"][row])
    assert [len(batch["ids"]) for batch in data.test_dataloader()] == [2, 2]
    assert len(data.val_dataloader()) == 2
    assert {n for batch in train for n in batch["lengths"].tolist()} >= {5600}


def test_training_differs_by_epoch_and_evaluation_does_not(people):
    data = make(people)
    loader = data.train_dataloader()
    epochs = [[each["mixture"] for each in loader] for _ in range(2)]  # an epoch's end begins the next
    assert not any(torch.equal(a, b) for a, b in zip(*epochs, strict=True))
    evaluated = [[each["mixture"] for each in data.val_dataloader()] for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*evaluated, strict=True))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_saved_position_goes_on_with_the_same_mixtures(people, workers):
    whole = make(people).train_dataloader()
    whole.sampler.set_epoch(2)
    expected = [batch["mixture"] for batch in whole]
    first = make(people, loading={"workers": workers}).train_dataloader()
    first.sampler.set_epoch(2)
    batches = iter(first)
    next(batches)
    state = first.state_dict()
    resumed = make(people, loading={"workers": workers}).train_dataloader()
    resumed.load_state_dict(state)
    found = [batch["mixture"] for batch in resumed]
    assert len(found) == 2
    assert all(torch.equal(a, b) for a, b in zip(found, expected[1:], strict=True))


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    """Three finished mixtures, one cut shorter than its sources."""
    for n in range(3):
        sources = 0.05 * torch.randn(2, 4000 + n).clamp(-5, 5)
        for k, samples in enumerate((sources.sum(0)[: 3900 + n], *sources)):
            (tmp_path / ("mix", "s1", "s2")[k]).mkdir(exist_ok=True)
            write(tmp_path / ("mix", "s1", "s2")[k] / f"m{n}.wav", samples, RATE, "FLOAT")
    return tmp_path


def test_finished_mixtures_are_for_the_test(people, finished):
    data = make(people, evaluation=str(finished))
    batches = list(data.test_dataloader())
    assert [batch["ids"] for batch in batches] == [["m0"], ["m1"], ["m2"]]
    assert [batch["mixture"].shape[1] for batch in batches] == [3900, 3901, 3902]
    torch.testing.assert_close(batches[0]["sources"].sum(1), batches[0]["mixture"])
    assert data.path == finished / "mix"
    assert len(data.val_dataloader()) == 3  # of the speakers
    with pytest.raises(UsageError, match=r"for the test alone: give it as data.evaluation"):
        SeparationData(str(finished)).setup()
    with pytest.raises(UsageError, match="holds no finished mixtures"):
        make(people, evaluation=str(people)).test_dataloader()


def test_what_is_wrong_with_finished_mixtures_is_said(finished):
    with pytest.raises(DataError, match="has no folder s3, and mixtures of 3 voices are wanted"):
        FixedMixtures(finished, 3, RATE)
    with pytest.raises(DataError, match="has mixtures of more than 1 voices"):
        FixedMixtures(finished, 1, RATE)
    (finished / "s2" / "m1.wav").rename(finished / "s2" / "m9.wav")
    with pytest.raises(DataError, match=r"m1.wav is not in both mix and s2"):
        FixedMixtures(finished, 2, RATE)


def test_options_that_cannot_be_meant_are_refused(people):
    for options, message in (
        ({"batch_size": 0}, "batch_size must be 1 or more"),
        ({"speakers": 0}, "speakers must be 1 or more"),
        ({"channel": "left"}, "channel 'left'"),
    ):
        with pytest.raises(UsageError, match=message):
            SeparationData(str(people), **options)
    with pytest.raises(UsageError, match=r"loading.val_mixtures must be 1 or more"):
        Loading(val_mixtures=0)
    with pytest.raises(UsageError, match=r"splits.val_share must lie between 0 and 1"):
        Splits(val_share=0.0)
    with pytest.raises(UsageError, match="10 mixtures an epoch do not fill a batch of 11"):
        SeparationData(str(people), batch_size=11, loading=Loading(epoch_mixtures=10)).train_dataloader()


@shared
def test_librispeech_speakers_are_disjoint_between_parts():
    data = SeparationData()
    data.setup()
    names = [set(data.voices(part).names) for part in PARTS]
    assert [len(each) for each in names] == [90, 10, 10]
    assert not names[0] & names[1]
    assert not (names[0] | names[1]) & names[2]
    table = pd.read_csv(SHARED / "librispeech_speakers" / "metadata.csv", dtype=str)
    given = table.speaker[table.file.str.startswith("test-other/")]
    assert names[2] == set(given)
    batch = next(iter(data.test_dataloader()))
    assert batch["mixture"].shape[1] >= RATE
    assert {each.split("-")[0] for each in batch["ids"][0].split("_")} <= names[2]
