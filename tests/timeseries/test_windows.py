from __future__ import annotations

import numpy as np
import pytest
import torch

from manyheads.timeseries.windows import WindowLoader, Windows, fill_gaps

L, P, N, M = 5, 3, 2, 4
RANGES = [(0, 20), (20, 31), (35, 43)]  # 13, 4 and 1 windows


def table(rows: int = 43) -> torch.Tensor:
    return torch.arange(rows * (N + M), dtype=torch.float32).view(rows, N + M)


def starts(ranges: list[tuple[int, int]]) -> list[int]:
    return [i for first, end in ranges for i in range(first, end - L - P + 1)]


def test_windows_equal_slices_and_stay_in_their_range() -> None:
    rows = table()
    windows = Windows(rows, N, RANGES, L, P)
    assert len(windows) == 13 + 4 + 1
    batch = windows.batch(torch.arange(len(windows)))
    for k, i in enumerate(starts(RANGES)):
        assert torch.equal(batch["x"][k], rows[i : i + L, :N])
        assert torch.equal(batch["y"][k], rows[i + L : i + L + P, :N])
        assert torch.equal(batch["x_mark"][k], rows[i : i + L, N:])
        assert torch.equal(batch["y_mark"][k], rows[i + L : i + L + P, N:])


def test_windows_copy_no_rows() -> None:
    rows = table()
    windows = Windows(rows, N, RANGES, L, P)
    assert np.shares_memory(windows._view, rows.numpy())
    batch = windows.batch(torch.tensor([0, 3]))
    before = rows.clone()
    batch["x"].add_(1.0)
    assert torch.equal(rows, before)  # but a batch is one's own


@pytest.mark.parametrize("ranges", [[(0, L + P - 1)], [], [(0, 3), (3, 7)]])
def test_too_short_ranges_hold_no_window(ranges: list[tuple[int, int]]) -> None:
    windows = Windows(table(7), N, ranges, L, P)
    assert len(windows) == 0
    assert list(WindowLoader(windows, 4)) == []


@pytest.mark.parametrize("batch_size", [1, 4, 7, 18, 100])
@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("drop_last", [False, True])
def test_loader_gives_each_window_once(batch_size: int, shuffle: bool, drop_last: bool) -> None:
    windows = Windows(table(), N, RANGES, L, P)
    loader = WindowLoader(windows, batch_size, shuffle, drop_last, seed=3)
    batches = list(loader)
    assert len(batches) == len(loader) == (18 // batch_size if drop_last else -(-18 // batch_size))
    firsts = torch.cat([b["x"][:, 0, 0] for b in batches]).tolist() if batches else []
    expected = [float(i * (N + M)) for i in starts(RANGES)]
    if not drop_last:
        assert sorted(firsts) == expected
    assert len(set(firsts)) == len(firsts)
    assert shuffle or firsts == expected[: len(firsts)]


def order(loader: WindowLoader) -> list[float]:
    return [v for batch in loader for v in batch["x"][:, 0, 0].tolist()]


def test_order_depends_on_seed_and_epoch_alone() -> None:
    windows = Windows(table(), N, RANGES, L, P)
    loader = WindowLoader(windows, 4, shuffle=True, seed=1)
    torch.manual_seed(5)
    first, second = order(loader), order(loader)
    assert first != second
    torch.manual_seed(6)
    again = WindowLoader(windows, 4, shuffle=True, seed=1)
    again.set_epoch(1)
    assert order(again) == second
    again.set_epoch(0)
    assert order(again) == first
    assert order(WindowLoader(windows, 4, shuffle=True, seed=2)) != first


@pytest.mark.parametrize("given", [0, 1, 3, 5])
def test_loader_resumes_at_its_position(given: int) -> None:
    windows = Windows(table(), N, RANGES, L, P)
    loader = WindowLoader(windows, 4, shuffle=True, seed=1)
    loader.set_epoch(2)
    running = iter(loader)
    for _ in range(given):
        next(running)
    state = loader.state_dict()
    rest = [v for batch in running for v in batch["x"][:, 0, 0].tolist()]
    resumed = WindowLoader(windows, 4, shuffle=True, seed=1)
    resumed.load_state_dict(state)
    if given == 5:  # all were given: the next epoch comes
        assert rest == []
        assert order(resumed) == order(loader)
    else:
        assert order(resumed) == rest
        assert order(resumed) == order(loader)  # and the epoch after it is whole


@pytest.mark.parametrize("world", [2, 3, 5])
def test_processes_share_the_windows(world: int) -> None:
    windows = Windows(table(), N, RANGES, L, P)
    loaders = [WindowLoader(windows, 2, shuffle=True, part=(rank, world)) for rank in range(world)]
    given = [order(loader) for loader in loaders]
    values = [value for each in given for value in each]
    assert len(values) == len(set(values)) == 18
    assert len({len(loader) for loader in loaders}) == 1


def test_set_epoch_drops_a_position_of_another_epoch() -> None:
    loader = WindowLoader(Windows(table(), N, RANGES, L, P), 4, shuffle=True)
    loader.load_state_dict({"epoch": 1, "batch": 2, "size": 4})
    loader.set_epoch(1)
    assert len(list(loader)) == 3
    loader.load_state_dict({"epoch": 1, "batch": 2, "size": 4})
    loader.set_epoch(4)
    assert len(list(loader)) == 5


def test_fill_gaps() -> None:
    nan = float("nan")
    x = torch.tensor([[nan, 1.0, nan, nan, 4.0], [nan] * 5, [1.0, 2.0, 3.0, 4.0, 5.0]]).T[None]  # [1, 5, 3]
    expected = torch.tensor([[1.0, 1.0, 1.0, 1.0, 4.0], [0.0] * 5, [1.0, 2.0, 3.0, 4.0, 5.0]]).T[None]
    assert torch.equal(fill_gaps(x), expected)


def test_gaps_are_filled_in_x_and_kept_in_y() -> None:
    rows = table()
    rows[6, 0] = float("nan")
    windows = Windows(rows, N, RANGES, L, P)
    batch = windows.batch(torch.arange(len(windows)))
    assert not batch["x"].isnan().any()
    assert batch["x"][2, 4, 0] == rows[5, 0]  # row 6 of the window that begins at 2: the value before it
    assert batch["y"].isnan().sum() == 2  # of the windows that begin at 0 and at 1


def test_covariates_stand_behind_the_marks() -> None:
    rows, static = table(), torch.arange(6.0).view(3, 2)
    rows[36, 3] = rows[38, 5] = float("nan")
    windows = Windows(rows, 1, RANGES, L, P, past=1, future=2, static=static)
    batch = windows.batch(torch.tensor([0, 17]))  # the first one, and the only one of the last series
    assert batch["series"].tolist() == [0, 2]
    assert torch.equal(batch["static"], static[[0, 2]])
    assert [batch[key].shape for key in ("x", "y", "x_mark", "y_mark", "past", "future")] == [  # type: ignore[literal-required]
        (2, L, 1),
        (2, P, 1),
        (2, L, 2),
        (2, P, 2),
        (2, L, 1),
        (2, L + P, 2),
    ]
    assert torch.equal(batch["past"][0], rows[:L, 3:4])
    assert torch.equal(batch["future"][0], rows[: L + P, 4:])
    assert batch["past"][1, 1, 0] == rows[35, 3]
    assert batch["future"][1, 3, 1] == rows[37, 5]
    assert "observed" not in batch


def test_observed_is_there_where_values_may_be_masked() -> None:
    rows = table()
    rows[6, 0] = float("nan")
    batch = Windows(rows, N, RANGES, L, P, masked=True).batch(torch.tensor([2, 17]))
    assert batch["observed"].dtype == torch.bool
    assert (~batch["observed"]).nonzero().tolist() == [[0, 4, 0]]


def test_each_window_is_located() -> None:
    ranges = [(0, 3), (3, 20), (20, 27), (27, 43)]  # the first and the third hold none
    windows = Windows(table(), N, ranges, L, P)
    series, first = windows.locate(np.arange(len(windows)))
    assert first.tolist() == starts(ranges)
    assert series.tolist() == [1] * 10 + [3] * 9


def test_an_order_is_that_of_numpy_in_four_bytes() -> None:
    loader = WindowLoader(Windows(table(), N, RANGES, L, P), 4, shuffle=True, seed=3)
    order = loader.order(2)
    assert order.dtype == np.int32
    np.testing.assert_array_equal(order, np.random.default_rng([3, 2]).permutation(18))
