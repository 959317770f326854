"""Utterances to batches: connected digits, tables of recordings, buckets, what is changed by chance."""

import os
import tarfile
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from manyheads.core.errors import DataError, UsageError
from manyheads.speech.recognition.augment import Augment, change_speed, drawn_from, mask
from manyheads.speech.recognition.data import (
    Columns,
    Features,
    Joining,
    Loading,
    RecognitionData,
)
from manyheads.speech.recognition.digits import JoinedDigits, read_digits
from manyheads.speech.recognition.loading import UtteranceBatch

DATA = os.environ.get("MANYHEADS_DATA")
needs_data = pytest.mark.skipif(not DATA, reason="MANYHEADS_DATA names no folder of shared data")
SPEECH = Path(str(DATA)) / "speech"
SMALL = Joining(train=90, val=24, test=60)
PLAIN = Augment(speeds=[1.0], frequency_masks=0, time_masks=0, dither=0.0)


def digits(**options: Any) -> RecognitionData:
    features = Features(mels=20, stack=5, stride=4)
    given = {
        "sample_rate": 8000,
        "joining": SMALL,
        "features": features,
        "loading": Loading(batch_seconds=20),
    }
    return RecognitionData(**(given | options))


def ljspeech(**options: Any) -> RecognitionData:
    given = {"columns": Columns(audio="file"), "loading": Loading(batch_seconds=25), "seed": 1}
    return RecognitionData(str(SPEECH / "ljspeech_samples" / "metadata.csv"), **(given | options))


@pytest.fixture(scope="module")
def data() -> RecognitionData:
    found = digits()
    found.setup()
    return found


def joined(data: RecognitionData, part: Any) -> JoinedDigits:
    found = data.utterances[part]
    assert isinstance(found, JoinedDigits)
    return found


@needs_data
def test_digits_are_dealt_like_cards(data: RecognitionData) -> None:
    test = joined(data, "test")
    assert len(test.clips) == 300
    used = Counter(int(clip) for i in range(len(test)) for clip in test.chosen(i, 0))
    mine = Counter(test.clips[clip].speaker for clip in used.elements())
    assert len(mine) == 6
    for speaker in mine:
        times = [used[i] for i, clip in enumerate(test.clips) if clip.speaker == speaker]
        assert max(times) - min(times) <= 1
    for i in range(len(test)):
        assert len({test.clips[clip].speaker for clip in test.chosen(i, 0)}) == 1
    assert Counter(test.counts.tolist()).keys() == set(range(1, 9))


@needs_data
def test_an_utterance_is_its_digits_and_pauses(data: RecognitionData) -> None:
    train = joined(data, "train")
    samples, text = train.read(5, 2)
    clips = [train.clips[i] for i in train.chosen(5, 2)]
    assert text == "".join(clip.digit for clip in clips)
    pauses = len(samples) - sum(len(clip.samples) for clip in clips)
    assert 0.05 * 8000 * (len(clips) + 1) - 10 <= pauses <= 0.3 * 8000 * (len(clips) + 1)
    assert any(samples[i : i + len(clips[0].samples)].equal(clips[0].samples) for i in range(400, 2401))
    again, other = train.read(5, 2), train.read(5, 3)
    assert again.samples.equal(samples)
    assert other.text != text
    assert len(other.text) == len(text)
    lengths = np.array([len(train.read(i).samples) / 8000 for i in range(len(train))])
    assert abs(lengths.mean() / train.seconds.mean() - 1) < 0.05


@needs_data
def test_no_clip_is_in_two_parts(data: RecognitionData) -> None:
    sizes = [len(joined(data, part).clips) for part in ("train", "val", "test")]
    assert sizes == [2400, 300, 300]
    heads = [
        {clip.samples[:400].numpy().tobytes() for clip in joined(data, part).clips}
        for part in ("train", "val", "test")
    ]
    assert not heads[0] & heads[1]
    assert not heads[0] & heads[2]
    assert not heads[1] & heads[2]


@needs_data
def test_batches_hold_what_was_said(data: RecognitionData) -> None:
    seen = []
    for batch in data.test_dataloader():
        assert batch["features"].shape[1] == batch["lengths"].max()
        for row, length, text, count, index in zip(
            *(batch[key] for key in ("features", "lengths", "text", "text_lengths", "index")),  # type: ignore[literal-required]
            strict=True,
        ):
            samples, said = data.utterances["test"].read(int(index))
            assert row[:length].equal(data.front_end(samples))
            assert (row[length:] == 0).all()
            assert data.vocabulary.text(text[:count].tolist()) == said
            assert (text[count:] == -1).all()
            seen.append(int(index))
    assert sorted(seen) == list(range(60))


@needs_data
def test_rows_are_normalised_on_the_training_part() -> None:
    data = digits(augment=PLAIN)
    found: list[torch.Tensor] = []
    for batch in data.train_dataloader():
        found += [row[:n] for row, n in zip(batch["features"], batch["lengths"], strict=True)]
    rows = torch.cat(found)
    assert rows.mean(0).abs().max() < 1e-4
    assert (rows.std(0) - 1).abs().max() < 1e-3
    part = digits(loading=Loading(batch_seconds=20, cmvn_seconds=60))
    part.setup()
    one, other = part.front_end.cmvn, data.front_end.cmvn
    assert one is not None
    assert other is not None
    assert 0 < (one[0] - other[0]).abs().max() < 1.0


def test_a_folder_without_the_digits(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not hold the spoken digits"):
        read_digits(tmp_path, "test", SMALL, 0)
    (tmp_path / "metadata.csv").write_text("file,digit,speaker,take\n0_a_0.flac,0,a,0\n")
    with tarfile.open(tmp_path / "fsdd_flac.tar", "w"):
        pass
    with pytest.raises(DataError, match=r"0_a_0\.flac"):
        read_digits(tmp_path, "test", SMALL, 0)


def _same(one: UtteranceBatch, other: UtteranceBatch) -> bool:
    return all(value.equal(other[key]) for key, value in one.items())  # type: ignore[literal-required, attr-defined]


@needs_data
@pytest.mark.parametrize("workers", [0, 1])
def test_a_loader_goes_on_where_it_was(
    data: RecognitionData, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = data.train_dataloader()
    whole.sampler.set_epoch(1)
    batches = list(whole)
    monkeypatch.setattr(data, "loading", replace(data.loading, workers=workers))
    begun = data.train_dataloader()
    begun.sampler.set_epoch(1)
    first = iter(begun)
    seen = [next(first) for _ in range(4)]
    resumed = data.train_dataloader()
    resumed.load_state_dict(begun.state_dict())
    seen += list(resumed)
    assert len(seen) == len(batches)
    assert all(_same(one, other) for one, other in zip(seen, batches, strict=True))
    assert not _same(next(iter(data.train_dataloader())), batches[0])


def test_masks_are_bands_of_all_frames_and_stretches_of_rows() -> None:
    options = Augment(frequency_masks=1, frequency_width=6, time_masks=1, time_width=5, time_share=0.5)
    bands, stretches = set(), set()
    for index in range(40):
        with drawn_from(0, 0, index):
            masked = mask(torch.ones(30, 4 * 20), 20, options).unflatten(1, (4, 20)) == 0
        rows, channels = masked.all(-1).all(-1), masked.all(0).all(0)
        assert masked.equal((rows[:, None, None] | channels).expand_as(masked))
        for found, largest, sizes in ((rows, 5, stretches), (channels, 6, bands)):
            places = found.nonzero()[:, 0].tolist()
            assert len(places) <= largest
            assert not places or places == list(range(places[0], places[-1] + 1))
            sizes.add(len(places))
    assert len(bands) > 3
    assert len(stretches) > 3


def test_speed_changes_length_and_pitch() -> None:
    tone = torch.sin(2 * torch.pi * 440 * torch.arange(8000) / 8000)
    for speed in (0.9, 1.1):
        changed = change_speed(tone, [speed])
        assert abs(len(changed) - 8000 / speed) <= 1
        peak = torch.fft.rfft(changed, 8000 * 8).abs().argmax() / 8
        assert float(peak) == pytest.approx(440 * speed, abs=0.5)
    assert change_speed(tone, [1.0]).equal(tone)


@needs_data
def test_what_is_changed_follows_from_seed_epoch_and_number(data: RecognitionData) -> None:
    part = data.part("train")
    before = torch.get_rng_state()
    one, other, epoch = part.sample(3, 1)[0], part.sample(4, 1)[0], part.sample(3, 2)[0]
    assert torch.get_rng_state().equal(before)
    torch.rand(5)
    assert part.sample(3, 1)[0].equal(one)
    assert not (one.shape == epoch.shape and one.equal(epoch))
    assert not (one.shape == other.shape and one.equal(other))


@pytest.mark.parametrize(
    "options", [{"speeds": []}, {"speeds": [3.0]}, {"time_share": 1.5}, {"time_width": -1}, {"dither": -1.0}]
)
def test_changes_that_cannot_be_meant(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="augment"):
        Augment(**options)
