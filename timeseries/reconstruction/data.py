"""Windows that are rebuilt from themselves, in batches: with cells hidden, or with labels to test by."""

from __future__ import annotations

from pathlib import Path
from typing import Unpack

from lightning.pytorch import LightningDataModule

from manyheads.core.errors import UsageError
from manyheads.core.loading import share_of
from manyheads.timeseries.calendar import feature_names
from manyheads.timeseries.data import Split, find_source
from manyheads.timeseries.reconstruction.masks import Masked, MaskedBatch
from manyheads.timeseries.reconstruction.parts import Names, Parts, Scaling, ScoredBatch, Tiles, read_parts
from manyheads.timeseries.tables import Missing
from manyheads.timeseries.windows import Batch, WindowLoader, Windows


def _saved(
    parts: Parts, seq_len: int, missing: Missing, named: Names, targets: list[str] | None
) -> dict[str, object]:
    """Return what a predictor needs; its outputs are as long as its inputs."""
    return {
        "seq_len": seq_len,
        "pred_len": seq_len,
        "columns": list(parts.columns),
        "targets": targets,
        "time_column": named.get("time_column"),
        "id_column": named.get("id_column"),
        "freq": parts.freq,
        "missing": missing,
        "time_features": list(feature_names(parts.freq)),
        **parts.treatment.to_json(),
    }


def _check_sizes(seq_len: int, batch_size: int) -> None:
    if seq_len < 2 or batch_size < 1:
        raise UsageError(
            f"seq_len must be 2 or more and batch_size 1 or more, not {seq_len} and {batch_size}"
        )


class ImputationData(LightningDataModule):
    """Windows of a data set or a file with cells hidden at random; missing values are left out everywhere.

    Validation and test hide the same cells each time, whatever the batches; training hides new ones.

    Args:
        dataset: Name of a data set, or path of a CSV or parquet file, long or wide.
        seq_len: Steps of a window.
        batch_size: Windows a batch.
        mask_ratio: Expected share of the cells to hide, between 0 and 1.
        gap: Steps of a run of hidden cells of one column; 1 hides each cell by itself.
        split: Where the parts begin; None takes the data set's own, and "ratio" for a file.
        freq: Frequency of the timestamps; None infers it.
        scaling: By all train rows ("global"), or each series by its own ("series").
        seed: Seed of the train order and of the hidden cells.
        named: Which columns are what.
    """

    def __init__(
        self,
        dataset: str = "etth1",
        seq_len: int = 96,
        batch_size: int = 16,
        mask_ratio: float = 0.25,
        gap: int = 1,
        split: Split | None = None,
        freq: str | None = None,
        scaling: Scaling = "global",
        seed: int = 0,
        **named: Unpack[Names],
    ) -> None:
        super().__init__()
        _check_sizes(seq_len, batch_size)
        if not 0 < mask_ratio < 1:
            raise UsageError(f"mask_ratio must lie between 0 and 1, not {mask_ratio}")
        if not 1 <= gap < seq_len:
            raise UsageError(f"gap must be 1 or more and shorter than the window of {seq_len}, not {gap}")
        self.dataset, self.seq_len, self.batch_size, self.split = dataset, seq_len, batch_size, split
        self.mask_ratio, self.gap, self.seed, self.named = mask_ratio, gap, seed, named
        self.freq, self.scaling = freq, scaling
        self._parts: Parts | None = None

    @property
    def path(self) -> Path:
        """The file that the data come from."""
        return find_source(self.dataset, self.split)[0]

    @property
    def parts(self) -> Parts:
        """The windows and their treatment; read once."""
        if self._parts is None:
            path, split = find_source(self.dataset, self.split)
            self._parts = read_parts(
                path, split, self.seq_len, self.seq_len, self.freq, "mask", self.scaling, self.named
            )
        return self._parts

    @property
    def channels(self) -> int:
        """Values a step."""
        return len(self.parts.columns)

    def setup(self, stage: str | None = None) -> None:
        """Read, check, split and scale; once, whatever the stage.

        Raises:
            DataError: What is wrong with the data.
        """
        assert self.parts

    def _masked(self, windows: Windows, seed: int | None) -> Masked:
        return Masked(windows, self.mask_ratio, self.gap, seed)

    def train_dataloader(self) -> WindowLoader[MaskedBatch]:
        """Return the train batches, in a new order each epoch."""
        windows = self._masked(self.parts.train, None)
        return WindowLoader(windows, self.batch_size, True, False, self.seed, share_of(self.trainer))

    def val_dataloader(self) -> WindowLoader[MaskedBatch]:
        """Return this process' share of the validation batches."""
        windows = self._masked(self.parts.val, self.seed)
        return WindowLoader(windows, self.batch_size, part=share_of(self.trainer))

    def test_dataloader(self) -> WindowLoader[MaskedBatch]:
        """Return this process' share of the test batches."""
        windows = self._masked(self.parts.test, self.seed)
        return WindowLoader(windows, self.batch_size, part=share_of(self.trainer))

    def preprocessing(self) -> dict[str, object]:
        """Return what a predictor needs to treat new data as the train data were; plain JSON."""
        return _saved(self.parts, self.seq_len, "mask", self.named, self.named.get("targets"))


class DetectionData(LightningDataModule):
    """Windows of a data set or a file; validation and test go once over each row.

    Args:
        dataset: Name of a data set, or path of a CSV or parquet file, long or wide.
        seq_len: Steps of a window.
        batch_size: Windows a batch.
        label_column: Column that is 1 in a row with an anomaly, else 0, to test by; nothing learns from it.
        split: Where the parts begin; None takes the data set's own, and "ratio" for a file.
        freq: Frequency of the timestamps; None infers it.
        scaling: By all train rows ("global"), or each series by its own ("series").
        missing: "refuse" missing values, or "mask" them: they are not scored.
        seed: Seed of the train order.
        named: Which columns are what.
    """

    def __init__(
        self,
        dataset: str = "etth1",
        seq_len: int = 96,
        batch_size: int = 32,
        label_column: str | None = None,
        split: Split | None = None,
        freq: str | None = None,
        scaling: Scaling = "global",
        missing: Missing = "refuse",
        seed: int = 0,
        **named: Unpack[Names],
    ) -> None:
        super().__init__()
        _check_sizes(seq_len, batch_size)
        self.dataset, self.seq_len, self.batch_size, self.split = dataset, seq_len, batch_size, split
        self.label_column, self.seed, self.named = label_column, seed, named
        self.freq, self.scaling, self.missing = freq, scaling, missing
        self._parts: Parts | None = None

    @property
    def path(self) -> Path:
        """The file that the data come from."""
        return find_source(self.dataset, self.split)[0]

    @property
    def parts(self) -> Parts:
        """The windows and their treatment; read once."""
        if self._parts is None:
            path, split = find_source(self.dataset, self.split)
            self._parts = read_parts(
                path,
                split,
                self.seq_len,
                0,
                self.freq,
                self.missing,
                self.scaling,
                self.named,
                self.label_column,
            )
        return self._parts

    @property
    def channels(self) -> int:
        """Values a step."""
        return len(self.parts.columns)

    def setup(self, stage: str | None = None) -> None:
        """Read, check, split and scale; once, whatever the stage.

        Raises:
            DataError: What is wrong with the data.
        """
        assert self.parts

    def train_dataloader(self) -> WindowLoader[Batch]:
        """Return the train batches, in a new order each epoch."""
        return WindowLoader(self.parts.train, self.batch_size, True, False, self.seed, share_of(self.trainer))

    def val_dataloader(self) -> WindowLoader[ScoredBatch]:
        """Return this process' share of the validation rows, each once."""
        tiles = Tiles(self.parts.val, self.parts.labels)
        return WindowLoader(tiles, self.batch_size, part=share_of(self.trainer))

    def test_dataloader(self) -> WindowLoader[ScoredBatch]:
        """Return this process' share of the test rows, each once."""
        tiles = Tiles(self.parts.test, self.parts.labels)
        return WindowLoader(tiles, self.batch_size, part=share_of(self.trainer))

    def preprocessing(self) -> dict[str, object]:
        """Return what a predictor needs to treat new data as the train data were; plain JSON."""
        # Named, so that a table's other columns, a label among them, are left alone.
        return _saved(self.parts, self.seq_len, self.missing, self.named, list(self.parts.columns))
