"""Labelled series to train, validation and test batches: split, scaled by the train series, padded."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TypedDict

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from numpy.typing import NDArray
from torch import Tensor

from manyheads.core import datasets
from manyheads.core.errors import DataError, UsageError
from manyheads.core.loading import share_of
from manyheads.timeseries.classification.labelled import Labelled, read_archive, read_long
from manyheads.timeseries.scaling import StandardScaler
from manyheads.timeseries.windows import WindowLoader, fill_gaps


class LabelledBatch(TypedDict):
    """A batch of series."""

    x: Tensor  # [B, L, C] scaled, gaps filled, zeros after a series' end
    observed: Tensor  # [B, L] bool, False after a series' end
    y: Tensor  # [B] int64, the class


def pad(values: Sequence[NDArray[np.float32]], scaler: StandardScaler, seq_len: int) -> tuple[Tensor, Tensor]:
    """Scale series, fill their gaps, and pad them with zeros; of a longer one the last steps are taken.

    Shape:
        values: each `[T, C]` -> x `[B, L, C]` float32, observed `[B, L]` bool.
    """
    x = torch.zeros(len(values), seq_len, values[0].shape[1])
    observed = torch.zeros(len(values), seq_len, dtype=torch.bool)
    for i, each in enumerate(values):
        there = torch.from_numpy(scaler.transform(each[-seq_len:].astype(np.float64))).float()
        x[i, : len(there)], observed[i, : len(there)] = fill_gaps(there[None])[0], True
    return x, observed


class Samples:
    """All series of a part, padded once.

    Shape:
        x `[n, L, C]`, observed `[n, L]`, y `[n]`.
    """

    def __init__(self, x: Tensor, observed: Tensor, y: Tensor) -> None:
        self.x, self.observed, self.y = x, observed, y

    def __len__(self) -> int:
        return len(self.y)

    def gather(self, indices: NDArray[np.integer]) -> LabelledBatch:
        """Return some series as a batch."""
        of = torch.from_numpy(np.asarray(indices, np.int64))
        return {"x": self.x[of], "observed": self.observed[of], "y": self.y[of]}


def stratified(labels: Sequence[str], share: float, seed: int) -> tuple[list[int], list[int]]:
    """Split indices so that each class gives its share to the second part, one of its series at least.

    A class of a single series stays in the first part.
    """
    rng = np.random.default_rng(seed)
    second: list[int] = []
    for label in sorted(set(labels)):
        of = rng.permutation([i for i, each in enumerate(labels) if each == label])
        count = max(1, round(share * len(of))) if len(of) > 1 else 0
        second += of[:count].tolist()
    kept = set(second)
    return [i for i in range(len(labels)) if i not in kept], sorted(second)


class LabelledData(LightningDataModule):
    """Series with a label each: an archive with its own test part, or a long table that is split here.

    Args:
        dataset: Name of a data set, or path of an .npz archive, or of a long CSV or parquet file.
        batch_size: Series a batch.
        label_column: A table's column of labels.
        id_column: A table's column of ids, if not a usual one.
        columns: A table's channels; None takes all that is neither id, label nor time.
        seq_len: Steps of the window; None takes the longest train series. Of a longer series the last steps
            are taken, a shorter one is padded.
        val_share: Share of each class of the train part that is kept for validation.
        test_share: Share of each class of a table that is kept for the test.
        seed: Seed of the splits and of the train order.
    """

    def __init__(
        self,
        dataset: str = "japanese_vowels",
        batch_size: int = 16,
        label_column: str = "label",
        id_column: str | None = None,
        columns: list[str] | None = None,
        seq_len: int | None = None,
        val_share: float = 0.2,
        test_share: float = 0.2,
        seed: int = 0,
    ) -> None:
        super().__init__()
        for name, share in (("val_share", val_share), ("test_share", test_share)):
            if not 0 < share < 1:
                raise UsageError(f"{name} must lie between 0 and 1, not {share}")
        if batch_size < 1 or (seq_len is not None and seq_len < 1):
            raise UsageError("batch_size and seq_len must be 1 or more")
        self.dataset, self.batch_size, self.seed = dataset, batch_size, seed
        self.label_column, self.id_column, self.named_columns = label_column, id_column, columns
        self.given_len, self.val_share, self.test_share = seq_len, val_share, test_share
        self._ready = False

    @property
    def path(self) -> Path:
        """The file that the data come from."""
        return Path(self.dataset) if Path(self.dataset).suffix else datasets.locate(self.dataset)

    @property
    def seq_len(self) -> int:
        """Steps of the window."""
        self.setup()
        return self.train_samples.x.shape[1]

    @property
    def channels(self) -> int:
        """Values a step."""
        self.setup()
        return len(self.columns)

    @property
    def classes(self) -> int:
        """How many classes there are."""
        self.setup()
        return len(self.labels)

    def setup(self, stage: str | None = None) -> None:
        """Read, check, split and scale; once, whatever the stage.

        Raises:
            DataError: What is wrong with the data.
        """
        if self._ready:
            return
        path = self.path
        if path.suffix == ".npz":
            given, test = read_archive(path)
        else:
            whole = read_long(path, self.label_column, self.id_column, self.named_columns)
            first, second = stratified(whole.labels, self.test_share, self.seed)
            given, test = whole.take(first), whole.take(second)
        first, second = stratified(given.labels, self.val_share, self.seed)
        train, val = given.take(first), given.take(second)
        self.labels, self.columns = tuple(sorted(set(given.labels))), given.columns
        if len(self.labels) < 2 or not len(val) or not len(test):
            raise DataError(
                f"{path}: {len(given)} train series of {len(self.labels)} classes cannot be split"
            )
        self.scaler = StandardScaler.fit((each.astype(np.float64) for each in train.values), self.columns)
        length = self.given_len or max(len(each) for each in given.values)
        self.train_samples, self.val_samples, self.test_samples = (
            self._samples(part, length, str(path)) for part in (train, val, test)
        )
        self._ready = True

    def _samples(self, part: Labelled, length: int, source: str) -> Samples:
        unknown = sorted(set(part.labels) - set(self.labels))
        if unknown:
            raise DataError(f"{source}: no train series has the label {unknown[0]!r} of a test series")
        y = torch.tensor([self.labels.index(label) for label in part.labels])
        return Samples(*pad(part.values, self.scaler, length), y)

    def train_dataloader(self) -> WindowLoader[LabelledBatch]:
        """Return the train batches, in a new order each epoch."""
        return WindowLoader(
            self.train_samples, self.batch_size, True, False, self.seed, share_of(self.trainer)
        )

    def val_dataloader(self) -> WindowLoader[LabelledBatch]:
        """Return this process' share of the validation batches."""
        return WindowLoader(self.val_samples, self.batch_size, part=share_of(self.trainer))

    def test_dataloader(self) -> WindowLoader[LabelledBatch]:
        """Return this process' share of the test batches."""
        return WindowLoader(self.test_samples, self.batch_size, part=share_of(self.trainer))

    def preprocessing(self) -> dict[str, object]:
        """Return what a predictor needs to treat new data as the train data were; plain JSON."""
        return {
            "seq_len": self.seq_len,
            "columns": list(self.columns),
            "labels": list(self.labels),
            "id_column": self.id_column,
            "scaler": self.scaler.to_json(),
        }
