"""A log of interactions to training, validation and test batches."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lightning.pytorch import LightningDataModule

from manyheads.core import hub
from manyheads.core.errors import UsageError
from manyheads.core.loading import BatchLoader, Indices, Schedule, share_of
from manyheads.recsys.logs import Columns, Rules
from manyheads.recsys.models.encoder import Packed
from manyheads.recsys.preprocessing import Preprocessing
from manyheads.recsys.sequences import Sequences, Windows, windows
from manyheads.recsys.source import (
    Asked,
    Core,
    Loading,
    LogSource,
    Plan,
    Splitting,
    pack_windows,
    question_loader,
    unchanged,
)
from manyheads.recsys.splits import Part, Questions

__all__ = ["Asked", "Columns", "Core", "Cutting", "Loading", "RecommendationData", "Rules", "Splitting"]


@dataclass(frozen=True)
class Cutting:
    """How training's histories are cut into windows, from their ends.

    Args:
        length: Events of a window, at most.
        step: From a window to the one before it, as a share of its length; 0 trains on the last alone.
    """

    length: int = 200
    step: float = 0.5

    def __post_init__(self) -> None:
        if self.length < 2 or not 0 <= self.step <= 1:
            raise UsageError("windows.length must be at least 2, and windows.step from 0 to 1")

    @property
    def events(self) -> int | None:
        """Events from a window to the one before it."""
        return max(1, int(self.step * self.length)) if self.step else None


_COLUMNS, _RULES, _CORE, _SPLITTING = Columns(), Rules(), Core(), Splitting()
_CUTTING, _LOADING = Cutting(), Loading()


class RecommendationData(LightningDataModule):
    """Histories of users: read, divided, cut into windows.

    Args:
        dataset: `ml_100k`, `ml_1m`, `ml_latest_small`, or the path of a log (CSV, parquet, a folder of them).
        seed: Of the order of windows.
        columns: Of a log.
        rules: What is done with its bad rows.
        core: What is left out for having few events.
        splitting: What is held out.
        windows: How training's histories are cut.
        loading: Batches.
        start: A model folder whose items keep their numbers; the model's start says it.
    """

    def __init__(
        self,
        dataset: str = "ml_100k",
        seed: int = 0,
        columns: Columns = _COLUMNS,
        rules: Rules = _RULES,
        core: Core = _CORE,
        splitting: Splitting = _SPLITTING,
        windows: Cutting = _CUTTING,
        loading: Loading = _LOADING,
        start: str | None = None,
    ) -> None:
        super().__init__()
        self.source = LogSource(dataset, columns, rules, core, splitting)
        self.seed, self.splitting, self.cutting, self.loading = seed, splitting, windows, loading
        self.start = start
        self._ready = False

    @property
    def path(self) -> Path:
        """The log; of MovieLens a copy with named columns, which is written to the cache."""
        return self.source.path

    @property
    def num_items(self) -> int:
        """Items of the catalogue."""
        self.setup()
        return self.split.sequences.num_items

    @property
    def max_len(self) -> int:
        """Events of a window."""
        return self.cutting.length

    def setup(self, stage: str | None = None) -> None:
        """Read and divide the log; once, whatever the stage.

        Raises:
            DataError: What is wrong with the data.
        """
        if self._ready:
            return
        sequences = self.source.thinned(self.source.sequences())
        if self.start is not None:
            config = hub.read_config(hub.find_folder(Path(self.start)))
            sequences = sequences.numbered_by(Preprocessing.from_json(config.preprocessing).item_ids)
        self.split = self.source.divide(sequences)
        self.counts = self.split.counts()
        self.windows: Windows = windows(*self.split.span("train"), self.cutting.length, self.cutting.events)
        self.questions: dict[Part, Questions] = {}
        self._ready = True

    def asked(self, part: Part) -> Questions:
        """Return what a part asks."""
        self.setup()
        if part not in self.questions:
            self.questions[part] = self.split.questions(part, self.splitting.target)
        return self.questions[part]

    def train_dataloader(self) -> BatchLoader[Packed, Packed]:
        """Return the training windows, in another order each epoch."""
        self.setup()
        make = Cut(self.split.sequences, self.windows)
        schedule = Schedule(
            len(self.windows.users),
            self.loading.batch_size,
            shuffle=True,
            seed=self.seed,
            part=share_of(self.trainer),
        )
        return BatchLoader(schedule, Plan(schedule), make, unchanged, self.loading.workers)

    def val_dataloader(self) -> BatchLoader[Asked, Asked]:
        """Return the validation questions."""
        return self.question_loader("val")

    def test_dataloader(self) -> BatchLoader[Asked, Asked]:
        """Return the test questions."""
        return self.question_loader("test")

    def question_loader(self, part: Part, alone: bool = False) -> BatchLoader[Asked, Asked]:
        """Return a part's questions: this process' share of them, or all."""
        questions = self.asked(part)
        return question_loader(self.split.sequences, questions, self.loading, None if alone else self.trainer)

    def preprocessing(self) -> dict[str, object]:
        """Return what a predictor needs to treat another log as this one; plain JSON."""
        self.setup()
        sequences = self.split.sequences
        return Preprocessing(self.source.columns_of(sequences), sequences.item_ids, self.counts).to_json()


class Cut:
    """Makes a batch of training windows."""

    def __init__(self, sequences: Sequences, windows: Windows) -> None:
        self.sequences, self.windows = sequences, windows

    def __call__(self, indices: Indices) -> Packed:
        """Return the windows of these numbers."""
        return pack_windows(self.sequences, self.windows.first[indices], self.windows.end[indices])
