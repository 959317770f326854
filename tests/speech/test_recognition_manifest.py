"""Tables of recordings and texts: LJ Speech's and SpeechBrain's samples, in each form, whole and broken."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import soundfile
import torch

from manyheads.core.errors import DataError, UsageError
from manyheads.speech.recognition.data import Columns, Loading, RecognitionData, Splits, Units

DATA = os.environ.get("MANYHEADS_DATA")
pytestmark = pytest.mark.skipif(not DATA, reason="MANYHEADS_DATA names no folder of shared data")
SPEECH = Path(str(DATA)) / "speech"
BOTH = ("spk1", "spk2")


@pytest.fixture
def table(tmp_path: Path) -> pd.DataFrame:
    """SpeechBrain's sentences beside their recordings; two of the twelve have no text."""
    folder = SPEECH / "speechbrain_samples"
    for file in folder.glob("*.flac"):
        shutil.copyfile(file, tmp_path / file.name)
    rows = pd.read_csv(folder / "metadata.csv")[["file", "speaker", "text"]]
    return rows.rename(columns={"file": "audio"})


def read(path: Path, **options: Any) -> RecognitionData:
    loading = {"batch_seconds": 20.0, **options.pop("loading", {})}
    given = {"splits": Splits(0.2, 0.2), "units": Units(normalizer="basic"), "loading": Loading(**loading)}
    data = RecognitionData(str(path), **(given | options))
    data.setup()
    return data


def ids(data: RecognitionData) -> dict[str, list[str]]:
    return {part: list(found.ids) for part, found in data.utterances.items()}


def test_ljspeech_as_it_is() -> None:
    table = SPEECH / "ljspeech_samples" / "metadata.csv"
    units = Units("sentencepiece", 150, normalizer="basic")
    data = read(table, columns=Columns(audio="file"), units=units)
    assert sorted(len(each) for each in ids(data).values()) == [6, 6, 20]
    assert data.vocab_size == 150
    assert data.input_size == 560
    rows = pd.read_csv(table).set_index("file")
    for part, found in data.utterances.items():
        assert found.seconds == pytest.approx(rows.loc[list(found.ids), "seconds"].to_numpy(), abs=1e-4), part
    samples, text = data.utterances["test"].read(0)
    name = data.utterances["test"].ids[0]
    assert text == rows.loc[name, "text"]
    assert len(samples) == pytest.approx(16000 * rows.loc[name, "seconds"], abs=1)
    (batch, *_) = data.test_dataloader()
    assert batch["features"].shape[2] == 560


def test_rows_without_text_are_an_error_or_left_out(table: pd.DataFrame, tmp_path: Path) -> None:
    path = tmp_path / "all.csv"
    table.to_csv(path, index=False)
    with pytest.raises(DataError, match=r"2 of 12 rows cannot be used, the first is .* \(it has no text\)"):
        read(path)
    data = read(path, loading={"bad": "skip"})
    assert sum(len(each) for each in ids(data).values()) == 10


@pytest.mark.parametrize("form", ["csv", "jsonl", "parquet"])
def test_all_forms_say_the_same(table: pd.DataFrame, tmp_path: Path, form: str) -> None:
    table = table.dropna(subset="text").reset_index(drop=True)
    table["split"] = ["train", "train", "dev", "test", "train"] * 2
    path = tmp_path / f"table.{form}"
    if form == "csv":
        table.to_csv(path, index=False)
    elif form == "jsonl":
        table.to_json(path, orient="records", lines=True)
    else:
        content = [(tmp_path / name).read_bytes() for name in table["audio"]]
        table.assign(audio=content, id=table["audio"]).to_parquet(path)
    data = read(path)
    wanted = {"train": [0, 1, 4, 5, 6, 9], "val": [2, 7], "test": [3, 8]}
    assert ids(data) == {part: table["audio"][rows].tolist() for part, rows in wanted.items()}
    whole, rate = soundfile.read(tmp_path / table["audio"][3], dtype="float32")
    assert rate == 16000
    assert data.utterances["test"].read(0).samples.equal(torch.from_numpy(whole))


def test_speakers_stay_on_one_side(table: pd.DataFrame, tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    table = table.dropna(subset="text")
    table.to_csv(path, index=False)
    data = read(path, columns=Columns(group="speaker"), splits=Splits(0.4, 0.0))
    sides = [{name[:4] for name in ids(data)[part]} for part in ("train", "val")]
    assert sides in ([{"spk1"}, {"spk2"}], [{"spk2"}, {"spk1"}])
    with pytest.raises(DataError, match="has no utterances in the part 'test'"):
        data.test_dataloader()
    with pytest.raises(DataError, match="2 groups of rows are too few"):
        read(path, columns=Columns(group="speaker"))
    with pytest.raises(DataError, match="no column 'who'"):
        read(path, columns=Columns(group="who"))


def test_parts_of_recordings(table: pd.DataFrame, tmp_path: Path) -> None:
    table = table.dropna(subset="text").assign(start=0.5, end=1.25)
    table.to_csv(tmp_path / "table.csv", index=False)
    data = read(tmp_path / "table.csv")
    for found in data.utterances.values():
        assert found.seconds == pytest.approx([0.75] * len(found.ids))
        assert len(found.read(0).samples) == 12000


def test_broken_recordings(table: pd.DataFrame, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    table = table.dropna(subset="text").reset_index(drop=True)
    (tmp_path / "spk1_snt1.flac").write_text("no sound")
    cut = (tmp_path / "spk1_snt2.flac").read_bytes()
    (tmp_path / "spk1_snt2.flac").write_bytes(cut[: len(cut) // 2])
    (tmp_path / "spk1_snt3.flac").unlink()
    path = tmp_path / "table.csv"
    table.to_csv(path, index=False)
    with pytest.raises(DataError, match=r"3 of 10 rows .* spk1_snt1.flac \(not audio"):
        read(path)
    data = read(path, loading={"bad": "skip"})
    assert sum(len(each) for each in ids(data).values()) == 7
    assert "3 rows are left out" in caplog.text
    short = read(path, loading={"bad": "skip", "max_seconds": 2.5})
    assert 0 < sum(len(each) for each in ids(short).values()) < 7
    assert "above 2.5 s are left out" in caplog.text


def test_a_recording_that_breaks_later(table: pd.DataFrame, tmp_path: Path) -> None:
    """NaN samples are behind a header that is right: only reading says it."""
    table = table.dropna(subset="text").assign(split=["train"] * 8 + ["val", "test"])
    broken = tmp_path / "nan.wav"
    soundfile.write(broken, torch.full((16000,), float("nan")).numpy(), 16000, subtype="FLOAT")
    table.iloc[0, 0] = "nan.wav"
    path = tmp_path / "table.csv"
    table.to_csv(path, index=False)
    with pytest.raises(DataError, match=r"nan.wav cannot be used \(NaN"):
        list(read(path).train_dataloader())
    data = read(path, loading={"bad": "skip"})
    seen = [int(i) for batch in data.train_dataloader() for i in batch["index"]]
    assert sorted(seen) == list(range(1, 8))
    assert list(data.bad) == ["nan.wav"]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"split": "trian"}, "'trian', which is no part; did you mean 'train'"),
        ({"text": None}, "no column 'text', or no text in it"),
        ({"split": "test"}, "no usable row is left for the part 'train'|too few to divide"),
    ],
)
def test_tables_that_cannot_be_meant(
    table: pd.DataFrame, tmp_path: Path, change: dict[str, Any], says: str
) -> None:
    table.dropna(subset="text").assign(**change).to_csv(tmp_path / "table.csv", index=False)
    with pytest.raises(DataError, match=says):
        read(tmp_path / "table.csv")


def test_what_is_no_table(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="are a table"):
        read(SPEECH / "fsdd")
    (tmp_path / "bad.jsonl").write_text(json.dumps({"audio": "a.wav"}) + "\n{")
    with pytest.raises(DataError, match="line 2"):
        read(tmp_path / "bad.jsonl")
    with pytest.raises(UsageError, match="at 8000 Hz"):
        RecognitionData("fsdd_connected").setup()
