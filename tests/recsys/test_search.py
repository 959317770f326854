"""Searches by faiss: the exact answer where all lists are searched, else compared with it."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from manyheads.apps.jobs import JobOptions, run_job
from manyheads.core import hub
from manyheads.core.catalog import create_model
from manyheads.core.errors import UsageError
from manyheads.recsys.logs import Columns
from manyheads.recsys.models.encoder import Items
from manyheads.recsys.preprocessing import Preprocessing
from manyheads.recsys.retrieval import NONE, Factors, Pairs, Top, top_k
from manyheads.recsys.search import Index, compare
from manyheads.recsys.vocabulary import Vocabulary

pytest.importorskip("faiss")
COUNT = 4000


def items(bias: bool = True) -> Items:
    """Items in heaps, as trained ones are."""
    draw = torch.Generator().manual_seed(0)
    middles = torch.randn(40, 16, generator=draw)[torch.randint(0, 40, (COUNT,), generator=draw)]
    weight = middles + 0.3 * torch.randn(COUNT, 16, generator=draw)
    return Items(weight, torch.randn(COUNT, generator=draw) if bias else None)


def seen(users: int) -> Pairs:
    """Another number of items for each user, none for the first."""
    counts = torch.arange(users) % 40
    draw = torch.Generator().manual_seed(1)
    rows = torch.arange(users).repeat_interleave(counts)
    return Pairs(rows, torch.randint(0, COUNT, (len(rows),), generator=draw))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("some", [None, torch.arange(5, COUNT, 3), torch.tensor([4, 8, 15])])
def test_all_lists_are_the_exact_search(some: torch.Tensor | None, bias: bool) -> None:
    queries, pairs = torch.randn(50, 16), seen(50)
    index = Index(items(bias), some, 10_000)
    for left_out in (pairs, None):
        found = index.top_k(queries, 10, left_out)
        wanted = top_k(Factors(queries, *items(bias)), 10, left_out, some)
        assert torch.equal(found.items, wanted.items)
        torch.testing.assert_close(found.scores, wanted.scores, rtol=1e-5, atol=1e-5)


def test_few_lists_find_most_and_the_same_each_time() -> None:
    queries, pairs = items().weight[::40] + 0.3 * torch.randn(100, 16), seen(100)
    wanted = top_k(Factors(queries, *items(bias=False)), 10, pairs)
    shares = []
    for probes in (1, 8, 10_000):
        index = Index(items(bias=False), None, probes)
        found = index.top_k(queries, 10, pairs)
        assert torch.equal(
            found.items, Index(items(bias=False), None, probes).top_k(queries, 10, pairs).items
        )
        shares.append(compare(wanted, found).share)
    assert 0.2 < shares[0] < shares[1] < shares[2] == 1.0 and shares[1] > 0.9


def test_recall_counts_what_is_there() -> None:
    scores = torch.zeros(2, 3)
    exact = Top(torch.tensor([[5, 7, 1], [2, NONE, NONE]]), scores)
    found = Top(torch.tensor([[7, 2, 5], [NONE, 5, NONE]]), scores)
    assert compare(exact, found) == (0.5, 2, 3)


def save(path: Path) -> Path:
    arguments = {"num_items": COUNT, "max_len": 20, "hidden_size": 16, "layers": 1}
    torch.manual_seed(0)
    model = create_model("sasrec", **arguments)
    model.get_submodule("encoder").item_embedding.weight.data[1:].copy_(items().weight)  # type: ignore[union-attr]
    kept = Preprocessing(Columns(), Vocabulary(map(str, range(COUNT))), np.arange(COUNT))
    hub.save(
        path, model, domain="recsys", name="sasrec", arguments=arguments, preprocessing=kept.to_json()
    )  # fmt: skip
    return path


def rows_of(folder: Path) -> pd.DataFrame:
    parts = [pd.read_parquet(part) for part in sorted(folder.glob("part-*"))]
    return pd.concat(parts, ignore_index=True)


@pytest.fixture
def log(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    rows = {"user_id": np.repeat(np.arange(400), 12), "item_id": rng.integers(0, COUNT, 4800)}
    path = tmp_path / "log.parquet"
    pd.DataFrame(rows | {"timestamp": np.arange(4800)}).to_parquet(path)
    return path


def test_a_job_by_faiss_says_what_it_found(
    tmp_path: Path, log: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = save(tmp_path / "model")

    def run(name: str, **settings: str | int) -> Path:
        options = JobOptions(str(model), [str(log)], tmp_path / name, shard_size=100, quiet=True)
        options.settings.update(settings)
        assert run_job(options).exit_code == 0
        return tmp_path / name

    exact = rows_of(run("exact"))
    assert not (tmp_path / "exact" / "results").exists()
    with caplog.at_level(logging.INFO):
        whole = run("whole", search="faiss", probes=1000)
    rows = rows_of(whole)
    keys = ["user_id", "rank", "item_id"]
    pd.testing.assert_frame_equal(rows[keys], exact[keys])
    about = json.loads((whole / "results" / "search.json").read_text())
    assert about["recall"] == {"share": 1.0, "users": 256, "k": 10} and about["probes"] == about["lists"]
    assert "faiss finds 100.0% of the exact 10 best items of 256 users" in caplog.text
    few = json.loads(
        (run("few", search="faiss", probes=1, min_recall=1) / "results" / "search.json").read_text()
    )
    assert 0.01 <= few["recall"]["share"] < 1


def test_too_little_is_refused_each_time(tmp_path: Path, log: Path) -> None:
    predictor = hub.load(save(tmp_path / "model")).configure({"search": "faiss", "probes": 1})  # type: ignore[attr-defined]
    for _ in range(2):
        with pytest.raises(UsageError, match=r"below --min-recall 95: raise --probes \(1 of \d+ lists now\)"):
            predictor.predict(str(log))
    for settings in ({"search": "fais"}, {"probes": 0}, {"min_recall": 101}):
        with pytest.raises(UsageError, match=r"did you mean 'faiss'|--probes takes 1 or more"):
            predictor.predict(str(log), **settings)


def test_without_faiss(tmp_path: Path, log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    predictor = hub.load(save(tmp_path / "model"))
    assert len(predictor.predict(str(log))) == 4000
    with pytest.raises(UsageError, match=r"needs faiss: pip install 'manyheads\[faiss\]'"):
        predictor.predict(str(log), search="faiss")  # type: ignore[call-arg]
