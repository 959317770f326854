"""Sliding windows without copies: one table of rows, a strided view of it, and one gather a batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Generic, NotRequired, Protocol, TypedDict, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from manyheads.core.loading import Schedule


class Batch(TypedDict):
    """A batch of windows, float32 unless said; a key is absent where the data have nothing for it.

    In past, future and static the numeric columns come first, scaled and filled, then the categorical ones as
    codes: 0 is an unseen or missing value, 1 and on are the known categories.
    """

    x: Tensor  # [B, seq_len, N] the known values, gaps filled
    y: Tensor  # [B, pred_len, N] the values to forecast; NaN where missing
    x_mark: Tensor  # [B, seq_len, M] calendar features of x
    y_mark: Tensor  # [B, pred_len, M] calendar features of y
    observed: NotRequired[Tensor]  # [B, seq_len, N] bool: x was observed, not filled; where gaps are masked
    past: NotRequired[Tensor]  # [B, seq_len, Cp] covariates known in the history alone
    future: NotRequired[Tensor]  # [B, seq_len + pred_len, Cf] covariates known in history and horizon
    static: NotRequired[Tensor]  # [B, Cs] covariates of the series
    series: NotRequired[Tensor]  # [B] int64, the series' number; where the loader knows it


def running_max(x: Tensor) -> Tensor:
    """Return the largest whole number so far along the steps.

    Shape:
        x `[B, L, N]` -> the same.
    """
    if not torch.compiler.is_exporting():
        return x.cummax(dim=1).values
    steps = torch.arange(x.shape[1], device=x.device)  # ONNX has no such operator: every step looks at all
    later = (steps > steps[:, None])[..., None]
    return x[:, None].masked_fill(later, torch.iinfo(x.dtype).min).amax(2)


def fill_gaps(x: Tensor) -> Tensor:
    """Fill NaN with the window's last observed value, before the first one with that one, else with 0.

    Shape:
        x `[B, L, N]`, returns the same.
    """
    seen = ~x.isnan()
    steps = torch.arange(x.shape[1], device=x.device)[:, None]
    last = running_max(torch.where(seen, steps, -1))  # [B, L, N]
    first = seen.to(torch.int8).argmax(dim=1, keepdim=True)  # [B, 1, N]
    return x.gather(1, torch.where(last >= 0, last, first)).nan_to_num_(nan=0.0)


class Windows:
    """All windows of some ranges of a row table; a window never crosses a range's end.

    Args:
        rows: Values, and after them calendar features, past and future covariates of all series, one under
            the other. Covariates hold their numeric columns first.
        n_values: How many of the columns are values.
        ranges: Pairs (first row, end row), the i-th of series i; windows lie wholly inside one.
        seq_len: Rows known.
        pred_len: Rows to forecast.
        past: How many of the columns are past covariates.
        future: How many are future covariates.
        static: The series' static covariates, if there are any.
        masked: Values may be missing: batches say which were observed.

    Shape:
        rows `[R, N + M + past + future]`; static `[S, Cs]`.
    """

    def __init__(
        self,
        rows: Tensor,
        n_values: int,
        ranges: Sequence[tuple[int, int]],
        seq_len: int,
        pred_len: int,
        past: int = 0,
        future: int = 0,
        static: Tensor | None = None,
        masked: bool = False,
    ) -> None:
        self.n_values, self.seq_len, self.pred_len = n_values, seq_len, pred_len
        self.static, self.masked = static, masked
        length, width = seq_len + pred_len, rows.shape[1]
        counts = np.array([max(0, end - length + 1 - first) for first, end in ranges], np.int64)
        # What is kept is two numbers a series: a window's row is computed when it is asked for.
        self._ends = np.cumsum(counts)
        self._shifts = np.array([first for first, _ in ranges], np.int64) - (self._ends - counts)
        self._cuts = (n_values, width - future - past, width - future)  # where marks, past, future begin
        n, p, f = self._cuts
        gaps = np.zeros(width, bool)
        for first, end in ranges:
            gaps |= rows[first:end].isnan().any(dim=0).numpy()
        self._gaps = bool(gaps[:n].any()), bool(gaps[p:f].any()), bool(gaps[f:].any())
        # A window is one run of memory, so that the gather of a batch copies each in one go.
        self.rows = rows.contiguous()
        room = length * width if len(rows) >= length else 0
        self._view = self.rows.view(-1).unfold(0, room, width).numpy()  # [R - length + 1, length * C]

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def locate(self, indices: NDArray[np.integer]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the series of windows, and their first rows in the table.

        Shape:
            indices `[B]`; returns `[B]` and `[B]`.
        """
        series = np.searchsorted(self._ends, indices, side="right")
        return series, self._shifts[series] + indices

    def batch(self, indices: Tensor) -> Batch:
        """Gather the windows of some indices.

        Shape:
            indices `[B]`, int64.
        """
        return self.gather(indices.numpy())

    def gather(self, indices: NDArray[np.integer]) -> Batch:
        """Gather the windows of some indices."""
        series, starts = self.locate(indices)
        # In numpy: torch would wake its pool of threads for a quarter of a megabyte, and slices slower.
        table = self._view[starts].reshape(len(starts), self.seq_len + self.pred_len, -1)  # [B, L + P, C]
        known, ahead, (n, p, f) = table[:, : self.seq_len], table[:, self.seq_len :], self._cuts
        x, gaps = torch.from_numpy(known[:, :, :n]), self._gaps
        batch: Batch = {
            "x": fill_gaps(x) if gaps[0] else x,
            "y": torch.from_numpy(ahead[:, :, :n]),
            "x_mark": torch.from_numpy(known[:, :, n:p]),
            "y_mark": torch.from_numpy(ahead[:, :, n:p]),
            "series": torch.from_numpy(series),
        }
        if self.masked:
            batch["observed"] = ~x.isnan()
        if f > p:
            past = torch.from_numpy(known[:, :, p:f])
            batch["past"] = fill_gaps(past) if gaps[1] else past
        if table.shape[2] > f:
            future = torch.from_numpy(table[:, :, f:])
            batch["future"] = fill_gaps(future) if gaps[2] else future
        if self.static is not None:
            batch["static"] = self.static[series]
        return batch


B_co = TypeVar("B_co", covariant=True)


class Source(Protocol[B_co]):
    """Numbered samples, such as `Windows`."""

    def __len__(self) -> int:
        """How many samples there are."""

    def gather(self, indices: NDArray[np.integer]) -> B_co:
        """Return some of them as a batch."""


class WindowLoader(Generic[B_co]):
    """Batches of windows, made in this process; the order depends on (seed, epoch) alone, and resumes.

    Args:
        windows: The windows, or other numbered samples.
        batch_size: Windows a batch.
        shuffle: Draw a new order each epoch.
        drop_last: Leave out a last batch that is not full.
        seed: Seed of the order.
        part: This process and the number of processes; each gives its own windows, as many as the others.

    Example:
        >>> loader = WindowLoader(windows, batch_size=32, shuffle=True)
        >>> for batch in loader:
        ...     batch["x"].shape
    """

    batch_sampler = None  # Lightning reads it of whatever has a `sampler`

    def __init__(
        self,
        windows: Source[B_co],
        batch_size: int,
        shuffle: bool = False,
        drop_last: bool = False,
        seed: int = 0,
        part: tuple[int, int] = (0, 1),
    ) -> None:
        self.windows = windows
        self.schedule = Schedule(len(windows), batch_size, shuffle, drop_last, seed, part)

    @property
    def sampler(self) -> Schedule:
        """Where Lightning looks for `set_epoch`."""
        return self.schedule

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch comes; a saved position of another epoch is dropped."""
        self.schedule.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self.schedule)

    def order(self, epoch: int) -> NDArray[np.integer]:
        """Return the order of the windows in an epoch, of all processes together."""
        return self.schedule.order(epoch)

    def __iter__(self) -> Iterator[B_co]:
        # A generator's body begins with the first batch: `set_epoch` may come between `iter` and that.
        for indices in self.schedule.plan(self.schedule.begin()):
            self.schedule.give()
            yield self.windows.gather(indices)
        self.schedule.end()

    def state_dict(self) -> dict[str, int]:
        """Return the position: the epoch, and the batches already given in it."""
        return self.schedule.state_dict()

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on at a saved position."""
        self.schedule.load_state_dict(state)
