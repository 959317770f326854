"""Recordings of speakers, or finished mixtures, to training, validation and test batches."""

from __future__ import annotations

import logging
from pathlib import Path

from lightning.pytorch import LightningDataModule

from manyheads.core import datasets
from manyheads.core.errors import DataError, UsageError
from manyheads.core.loading import Schedule, share_of
from manyheads.speech.audio import check_channel
from manyheads.speech.separation.fixed import MIX, FixedMixtures, is_fixed
from manyheads.speech.separation.loading import Loading, MixtureBatch, MixtureLoader, Mixtures, mixture_loader
from manyheads.speech.separation.mixing import Mixer, Mixing
from manyheads.speech.separation.speakers import Columns, Part, Recordings, Splits, find_speakers
from manyheads.speech.separation.voices import Voices
from manyheads.speech.sources import TABLES, list_audio

__all__ = ["Columns", "Loading", "Mixing", "MixtureBatch", "SeparationData", "Splits"]

log = logging.getLogger(__name__)

# How the shipped data sets' tables name things; the parts of `librispeech_speakers` are its folders.
_TABLES = {
    "librispeech_speakers": Columns(audio="file", split="file"),
    "speechbrain_samples": Columns(audio="file"),
}
_COLUMNS, _SPLITS, _MIXING, _LOADING = Columns(), Splits(), Mixing(), Loading()


class SeparationData(LightningDataModule):
    """Mixtures of voices: others each epoch to train on, fixed ones for validation and test.

    No speaker is in two parts. A test can be one of finished mixtures instead.

    Args:
        dataset: Name of a data set; a table of recordings with a column of speakers; or a folder of speakers'
            folders, perhaps in folders train, val and test.
        evaluation: A data set or folder of finished mixtures (`mix`, `s1`, `s2`, ...) for the test, instead
            of mixtures of the test speakers.
        sample_rate: Of the model's input, in Hz; recordings are resampled.
        speakers: Voices of a mixture.
        batch_size: Mixtures a batch.
        channel: What is read of recordings with several: "mix", their mean, or the number of one.
        seed: Of the division and the mixing.
        columns: A table's columns.
        splits: How speakers are divided where the source does not say.
        mixing: How voices are mixed.
        loading: How many mixtures, workers, memory.
    """

    def __init__(
        self,
        dataset: str = "librispeech_speakers",
        evaluation: str | None = None,
        sample_rate: int = 8000,
        speakers: int = 2,
        batch_size: int = 4,
        channel: str = "mix",
        seed: int = 0,
        columns: Columns = _COLUMNS,
        splits: Splits = _SPLITS,
        mixing: Mixing = _MIXING,
        loading: Loading = _LOADING,
    ) -> None:
        super().__init__()
        for name, value, least in (
            ("sample_rate", sample_rate, 1),
            ("speakers", speakers, 1),
            ("batch_size", batch_size, 1),
        ):
            if value < least:
                raise UsageError(f"{name} must be {least} or more, not {value}")
        check_channel(channel)
        self.dataset, self.evaluation = dataset, evaluation
        self.sample_rate, self.speakers, self.batch_size = sample_rate, speakers, batch_size
        self.channel, self.seed, self.columns, self.splits = channel, seed, columns, splits
        self.mixing, self.loading = mixing, loading
        self._recordings: dict[Part, Recordings] | None = None
        self._parts: dict[Part, Mixtures] = {}

    @property
    def path(self) -> Path:
        """What prediction takes: the finished mixtures, else the recordings."""
        return _place(self.evaluation) / MIX if self.evaluation else _place(self.dataset)

    def setup(self, stage: str | None = None) -> None:
        """Find and divide the speakers; once, whatever the stage.

        Raises:
            UsageError: There is no such source.
            DataError: What is wrong with the data.
        """
        if self._recordings is not None:
            return
        place = _place(self.dataset)
        if place.is_dir() and is_fixed(place):
            raise UsageError(
                f"{place} holds finished mixtures, which are for the test alone: give it as data.evaluation"
            )
        columns = _TABLES.get(self.dataset, self.columns)
        found = find_speakers(place, columns, self.splits, self.speakers, self.seed)
        self._recordings = found
        log.info(
            "%s: %d train, %d val, %d test speakers",
            place,
            *(len(set(found[part].speakers)) for part in ("train", "val", "test")),
        )

    def part(self, part: Part) -> Mixtures:
        """Return the mixtures of a part.

        Raises:
            DataError: The part is empty, or a recording cannot be used.
        """
        if part not in self._parts:
            self._parts[part] = self._make(part)
        return self._parts[part]

    def _make(self, part: Part) -> Mixtures:
        if part == "test" and self.evaluation:
            folder = _place(self.evaluation)
            if not is_fixed(folder):
                raise UsageError(f"{folder} holds no finished mixtures (folders {MIX}, s1, s2, ...)")
            return FixedMixtures(folder, self.speakers, self.sample_rate)
        voices, loading = self.voices(part), self.loading
        counts = {
            "train": loading.epoch_mixtures,
            "val": loading.val_mixtures,
            "test": loading.test_mixtures,
        }
        seed, whole = self.seed + ("train", "val", "test").index(part), part != "train"
        return Mixer(voices, counts[part], self.speakers, self.mixing, seed, whole, self._noise())

    def voices(self, part: Part) -> Voices:
        """Return the recordings of a part by who speaks in them.

        Raises:
            DataError: The part is empty, or a recording cannot be used.
        """
        self.setup()
        assert self._recordings is not None
        found, place = self._recordings[part], str(_place(self.dataset))
        if not found.refs:
            raise DataError(f"{place} has no {part} speakers")
        options = self.sample_rate, self.channel, self.loading.cache_mib
        return Voices(place, found.refs, found.speakers, *options)

    def _noise(self) -> Voices | None:
        folder = self.mixing.noise
        if folder is None or folder == "white":
            return None
        refs = list(list_audio(folder))
        return Voices(folder, refs, ["noise"] * len(refs), self.sample_rate, "mix", self.loading.cache_mib)

    def train_dataloader(self) -> MixtureLoader:
        """Return the training batches, others each epoch; a last one that is not full is left out.

        Raises:
            UsageError: An epoch has fewer mixtures than a batch.
        """
        mixtures = self.part("train")
        schedule = Schedule(
            len(mixtures), self.batch_size, drop_last=True, seed=self.seed, part=share_of(self.trainer)
        )
        if not len(schedule):
            raise UsageError(
                f"{len(mixtures)} mixtures an epoch do not fill a batch of {self.batch_size}: raise "
                "loading.epoch_mixtures"
            )
        return mixture_loader(mixtures, schedule, self.loading.workers)

    def _evaluated(self, part: Part) -> MixtureLoader:
        mixtures = self.part(part)
        schedule = Schedule(len(mixtures), self.loading.eval_batch_size, part=share_of(self.trainer))
        return mixture_loader(mixtures, schedule, self.loading.workers)

    def val_dataloader(self) -> MixtureLoader:
        """Return this process' share of the validation batches."""
        return self._evaluated("val")

    def test_dataloader(self) -> MixtureLoader:
        """Return this process' share of the test batches."""
        return self._evaluated("test")

    def preprocessing(self) -> dict[str, object]:
        """Return what a predictor needs to treat new recordings as these; plain JSON."""
        return {"sample_rate": self.sample_rate}


def _place(name: str) -> Path:
    """Return where a data set's or a path's recordings are."""
    path = Path(name)
    named = "/" not in name and not name.lower().endswith(TABLES) and not path.is_dir()
    return datasets.locate(name) if named else path
