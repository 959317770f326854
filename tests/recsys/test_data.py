"""Batches of histories: windows for training, questions for validation and test."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from manyheads.core.errors import DataError, UsageError
from manyheads.recsys.data import Columns, Core, Cutting, Loading, RecommendationData, Rules, Splitting
from manyheads.recsys.models.encoder import FIRST, Packed
from manyheads.recsys.preprocessing import Preprocessing

WHOLE = Core(1, 1)


def write(folder: Path, users: int = 20, seed: int = 0, first: int = 0) -> Path:
    """A log in which everybody goes on from an item to the next ones."""
    rng = np.random.default_rng(seed)
    rows = [
        (f"u{user}", f"i{(begin + step) % 30 + first}", 100 * step + user)
        for user, (begin, size) in enumerate(rng.integers((0, 3), (30, 12), (users, 2)))
        for step in range(size)
    ]
    path = folder / f"log{seed}.csv"
    pd.DataFrame(rows, columns=["user_id", "item_id", "timestamp"]).to_csv(path, index=False)
    return path


def data(path: Path, **options: object) -> RecommendationData:
    found = RecommendationData(str(path), core=WHOLE, **options)  # type: ignore[arg-type]
    found.setup()
    return found


def rows(batch: Packed) -> list[list[int]]:
    edges = batch.starts.tolist()
    return [batch.tokens[a:b].tolist() for a, b in pairwise(edges)]


def test_an_epoch_has_every_window_once_in_an_order_of_its_own(tmp_path: Path) -> None:
    found = data(write(tmp_path), windows=Cutting(4, 0.5), loading=Loading(7))
    loader = found.train_dataloader()
    first = [row for batch in loader for row in rows(batch)]
    second = [row for batch in loader for row in rows(batch)]
    sequences, (begin, end) = found.split.sequences, found.split.span("train")
    wanted = []
    for a, b in zip(begin, end, strict=True):
        history = (sequences.items[a:b] + FIRST).tolist()
        cuts = [*range(len(history) - 4, 0, -2), 0]
        wanted += [history[cut : cut + 4] for cut in cuts]
    assert sorted(first) == sorted(second) == sorted(wanted)
    assert first != second
    assert first == [row for batch in data(
        write(tmp_path), windows=Cutting(4, 0.5), loading=Loading(7)
    ).train_dataloader() for row in rows(batch)]  # fmt: skip


def test_questions_hold_the_history_before_the_target(tmp_path: Path) -> None:
    found = data(write(tmp_path), loading=Loading(eval_batch_size=6))
    sequences = found.split.sequences
    for part, back in (("val", 2), ("test", 1)):
        user = 0
        for batch in found.question_loader(part):  # type: ignore[arg-type]
            histories = rows(batch.histories)
            assert batch.questions.tolist() == list(range(user, user + len(histories)))
            assert batch.targets.rows.tolist() == list(range(len(histories)))
            for place, history in enumerate(histories):
                whole = sequences.history(user).tolist()
                assert [token - FIRST for token in history] == whole[:-back]
                assert batch.targets.items[place] == whole[-back]
                assert batch.seen.items[batch.seen.rows == place].tolist() == whole[:-back]
                user += 1
        assert user == len(sequences) == 20


def test_all_targets_of_a_part_can_be_asked_for(tmp_path: Path) -> None:
    splitting = Splitting("ratio", 0.2, 0.4, "all")
    found = data(write(tmp_path), splitting=splitting, loading=Loading(eval_batch_size=3))
    batches = list(found.test_dataloader())
    total = sum(len(batch.targets.items) for batch in batches)
    first, end = found.split.span("test")
    assert total == (end - first).sum() > len(batches) * 3
    assert max(int(batch.targets.rows.max()) for batch in batches) == 2


def test_workers_make_the_same_batches(tmp_path: Path) -> None:
    here = data(write(tmp_path), windows=Cutting(4), loading=Loading(8))
    there = data(write(tmp_path), windows=Cutting(4), loading=Loading(8, workers=1))
    want = [rows(batch) for batch in here.train_dataloader()]
    assert [rows(batch) for batch in there.train_dataloader()] == want


def test_a_stopped_epoch_goes_on_where_it_stood(tmp_path: Path) -> None:
    one, other = (data(write(tmp_path), windows=Cutting(4), loading=Loading(3)) for _ in range(2))
    whole = [rows(batch) for batch in one.train_dataloader()]
    loader = one.train_dataloader()
    batches = iter(loader)
    begun = [rows(next(batches)) for _ in range(4)]
    later = other.train_dataloader()
    later.load_state_dict(loader.state_dict())
    assert begun + [rows(batch) for batch in later] == whole


def test_what_a_model_folder_keeps_is_read_back(tmp_path: Path) -> None:
    found = data(write(tmp_path), columns=Columns())
    kept = Preprocessing.from_json(found.preprocessing())
    assert kept.columns == Columns()
    assert kept.item_ids.ids == found.split.sequences.item_ids.ids
    assert kept.counts.tolist() == found.counts.tolist()
    plain = kept.to_json()
    for key, value in (
        ("columns", {"user": "u"}), ("columns", {**plain["columns"], "user": 3}), ("counts", "AAAA"),  # type: ignore[dict-item]
        ("counts", Preprocessing(Columns(), kept.item_ids, kept.counts[:-1]).to_json()["counts"]),
        ("items", ""),
    ):  # fmt: skip
        with pytest.raises(DataError, match="model folder"):
            Preprocessing.from_json({**plain, key: value})
    with pytest.raises(DataError, match="lacks 'items'"):
        Preprocessing.from_json({"columns": plain["columns"]})


def test_rows_are_left_out_only_where_that_is_wanted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write(tmp_path)
    path.write_text(path.read_text() + ",i1,5\n")
    with pytest.raises(DataError, match="'user_id' is missing"):
        data(path)
    data(path, rules=Rules("skip"))
    assert "no_user 1" in caplog.text


def test_options_that_cannot_be_are_refused(tmp_path: Path) -> None:
    for make in (
        lambda: Cutting(1),
        lambda: Cutting(5, 1.5),
        lambda: Loading(0),
        lambda: Loading(workers=-1),
    ):
        with pytest.raises(UsageError):
            make()
    with pytest.raises(DataError, match="lower the k-core"):
        RecommendationData(str(write(tmp_path)), core=Core(50, 50)).setup()


def test_movielens_is_ready(movielens, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    movielens.folder("ml_100k")
    monkeypatch.setenv("MANYHEADS_CACHE", str(tmp_path))
    found = RecommendationData("ml_100k", windows=Cutting(100, 0.5))
    assert (found.num_items, found.max_len, len(found.windows.users)) == (1349, 100, 1865)
    copy = pd.read_parquet(found.path)
    assert list(copy.columns) == ["user_id", "item_id", "timestamp"]
    assert len(copy) == 100_000
    again = RecommendationData(str(found.path))
    again.setup()
    have, want = again.split.sequences, found.split.sequences
    assert len(have) == len(want)
    for user in range(0, len(have), 100):
        other = want.user_ids.numbers([have.user_ids.ids[user]])[0]
        ids = [have.item_ids.ids[item] for item in have.history(user)]
        assert ids == [want.item_ids.ids[item] for item in want.history(other)]
