"""Figures over the whole catalogue: the recorded ones of popularity, and plain definitions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from torch import Tensor

from manyheads.core.errors import UsageError
from manyheads.recsys import sampled
from manyheads.recsys.metrics import Spread, measure, standing
from manyheads.recsys.popularity import popularity
from manyheads.recsys.retrieval import Factors, Pairs, top_k
from manyheads.recsys.sequences import Cells, cells, k_core
from manyheads.recsys.splits import Part, leave_one_out

GOLDEN = Path(__file__).parents[1] / "golden" / "recsys"
TIES: dict[str, Literal["average", "optimistic", "pessimistic"]] = {
    "average_rank": "average", "optimistic": "optimistic", "pessimistic": "pessimistic",
}  # fmt: skip


def pairs(found: Cells) -> Pairs:
    return Pairs(torch.as_tensor(found.rows), torch.as_tensor(found.items).long())


@pytest.mark.parametrize("name", ["ml_100k", "ml_1m"])
@pytest.mark.parametrize("core", ["no k-core", "5-core"])
def test_popularity_has_the_recorded_figures(name: str, core: str, movielens) -> None:
    """All three ways to count ties, of test and validation, with the history and without, to seven digits."""
    case = f"popularity_{name.replace('_', '-')}_a"
    recorded = json.loads((GOLDEN / f"{case}.json").read_text())["results"][core]
    found = movielens.sequences(name)
    found = found if core == "no k-core" else k_core(found, 5, 5)[0]
    split = leave_one_out(found)
    counts = split.counts()
    with_val = counts + np.bincount(found.items[split.val], minlength=found.num_items)
    asked: list[tuple[str, Part, np.ndarray, bool]] = [
        ("test, counts from train, history filtered", "test", counts, True),
        ("test, counts from train, history kept", "test", counts, False),
        ("test, counts from train+valid, history filtered", "test", with_val, True),
        ("valid, counts from train, history filtered", "val", counts, True),
    ]
    for title, part, chosen, filtered in asked:
        questions = split.questions(part)
        seen = pairs(cells(found.items, questions.first, questions.end)) if filtered else None
        place = standing(popularity(chosen, len(questions.users)), pairs(questions.targets), seen)
        for kind, ties in TIES.items():
            have = measure(place.ranks(ties), questions.targets.rows)
            for key, want in recorded[title][kind].items():
                assert have[key.lower()] == pytest.approx(want, abs=1e-7), (title, kind, key)
        if (core, title) == ("5-core", asked[0][0]):
            tensors = load_file(GOLDEN / f"{case}.safetensors")
            users = [int(found.user_ids.ids[user]) for user in questions.users]
            order = np.argsort(users)
            assert np.array_equal(np.sort(users), tensors["users"])
            assert np.array_equal(place.above.numpy()[order], tensors["items_strictly_above"])
            assert np.array_equal(place.ties.numpy()[order] + 1, tensors["tied_items_incl_target"])


def plain_ranks(scores: Tensor, targets: Pairs, seen: Pairs | None) -> list[float]:
    """Ranks by the definition."""
    found = []
    for row, item in zip(targets.rows.tolist(), targets.items.tolist(), strict=True):
        own = scores[row, item]
        out = set(seen.items[seen.rows == row].tolist()) if seen is not None else set()
        others = [scores[row, i] for i in range(scores.shape[1]) if i not in out and i != item]
        below = sum(bool(score < own) for score in others)
        ties = sum(bool(score == own) for score in others)
        found.append(1 + len(others) - below - ties + ties / 2)
    return found


@pytest.mark.parametrize("block", [None, 1, 7, 50])
def test_ranks_are_by_definition_with_ties_seen_items_and_several_targets(block: int | None) -> None:
    queries = torch.randint(-2, 3, (6, 3)).float()
    items = torch.randint(-2, 3, (50, 3)).float()
    targets = Pairs(torch.tensor([0, 0, 1, 3, 3, 3, 5]), torch.tensor([4, 9, 4, 0, 49, 20, 7]))
    seen = Pairs(torch.tensor([0, 0, 0, 1, 3, 3, 5]), torch.tensor([4, 5, 5, 11, 49, 2, 7]))
    factors = Factors(queries, items, torch.randint(0, 2, (50,)).float())
    scores = queries @ items.T + factors.bias
    for left_out in (None, seen):
        found = standing(factors, targets, left_out, block).ranks()
        assert found.tolist() == plain_ranks(scores, targets, left_out)


def test_what_is_no_number_counts_against_the_recommender() -> None:
    items = torch.tensor([[1.0], [torch.nan], [3.0], [2.0]])
    factors = Factors(torch.ones(4, 1), items)
    targets = Pairs(torch.arange(4), torch.arange(4))
    assert standing(factors, targets).ranks().tolist() == [4, 4, 2, 3]
    all_same = Factors(torch.ones(1, 1), torch.full((9, 1), torch.inf))
    assert standing(all_same, Pairs(torch.tensor([0]), torch.tensor([5]))).ranks().tolist() == [5]


def test_scores_of_a_large_catalogue_are_never_held_for_all_users(
    blocks: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("manyheads.recsys.metrics.CELLS", 1 << 16)
    factors = Factors(torch.randn(32, 8), torch.randn(20_000, 8))
    standing(factors, Pairs(torch.arange(32), torch.randint(0, 20_000, (32,))))
    assert max(blocks) <= 1 << 16
    assert sum(blocks) <= 2 * 32 * 20_000


def test_figures_are_by_definition() -> None:
    ranks, rows = np.array([1.0, 4.0, 2.5, 30.0, 10.0]), np.array([0, 0, 3, 4, 7])
    counts = np.array([10, 0, 2, 1, 5])
    found = measure(ranks, rows, (2, 10), counts)
    log = np.log2
    assert found["hr@2"] == 1 / 4
    assert found["hr@10"] == 3 / 4
    assert found["recall@2"] == pytest.approx((1 / 2 + 0 + 0 + 0) / 4)
    assert found["recall@10"] == pytest.approx((1 + 1 + 0 + 1) / 4)
    best = 1 + 1 / log(3)
    assert found["ndcg@2"] == pytest.approx((1 / best) / 4)
    assert found["ndcg@10"] == pytest.approx(((1 + 1 / log(5)) / best + 1 / log(3.5) + 1 / log(11)) / 4)
    assert found["mrr@10"] == pytest.approx((1 + 1 / 2.5 + 1 / 10) / 4)
    assert found["mrr"] == pytest.approx((1 + 1 / 2.5 + 1 / 30 + 1 / 10) / 4)
    weights = np.array([1 / 10, 1, 1 / 2, 1, 1 / 5])
    assert found["stratified_hr@10"] == pytest.approx(weights[[0, 1, 2, 4]].sum() / weights.sum())
    assert found["stratified_ndcg@2"] == pytest.approx(weights[0] / weights.sum())
    assert "recall@10" not in measure(ranks[:1], rows[:1])
    for ks in ((0,), (5, 0)):
        with pytest.raises(UsageError, match="nothing to measure"):
            measure(ranks, rows, ks)
    with pytest.raises(UsageError, match="nothing to measure"):
        measure(ranks[:0], rows[:0])


def test_several_targets_of_one_user_have_the_textbooks_figure() -> None:
    """Of few targets at the top the figure is 1, and of more than k the first k are as many as can be."""
    assert measure(np.array([1.0, 2.0, 3.0]), np.zeros(3, int), (5,))["ndcg@5"] == pytest.approx(1)
    many = measure(np.arange(1.0, 31.0), np.zeros(30, int), (10,))
    assert (many["ndcg@10"], many["recall@10"]) == (pytest.approx(1), pytest.approx(1))


def test_spread_counts_lists() -> None:
    counts = np.array([7, 3, 1, 0])
    spread, other = Spread(counts, 7, (1, 2)), Spread(counts, 7, (1, 2))
    spread.add(np.array([[0, 1], [0, -1]]))
    other.add(np.array([[0, 3]]))
    spread.join([other])
    found = spread.figures()
    assert found["coverage@1"] == 1 / 4
    assert found["coverage@2"] == 3 / 4
    assert found["novelty@1"] == pytest.approx(0)
    assert found["novelty@2"] == pytest.approx((3 * 0 + np.log2(8 / 4) + np.log2(8)) / 5)


def test_drawn_items_are_different_unseen_and_the_same_for_a_seed() -> None:
    rng = np.random.default_rng(0)
    counts = np.arange(100) ** 2
    excluded = cells(rng.integers(0, 100, 40).astype(np.int32), np.arange(0, 40, 2), np.arange(2, 42, 2))
    for kind in ("uniform", "popularity"):
        found = sampled.draw(excluded, 20, counts, 30, kind, seed=3)
        assert found.shape == (20, 30)
        for user, row in enumerate(found):
            assert len(set(row.tolist())) == 30
            assert not set(row.tolist()) & set(excluded.items[excluded.rows == user].tolist())
        assert np.array_equal(found, sampled.draw(excluded, 20, counts, 30, kind, seed=3))
        assert not np.array_equal(found, sampled.draw(excluded, 20, counts, 30, kind, seed=4))
    popular = sampled.draw(excluded, 20, counts, 1, "popularity")
    assert 0 not in popular and popular.mean() > 60  # the chances' mean is 75, uniform draws' 50
    with pytest.raises(UsageError, match="not 99 items left"):
        sampled.draw(excluded, 20, counts, 99, "uniform")
    with pytest.raises(UsageError, match="items left"):
        sampled.draw(excluded, 20, np.eye(100, dtype=int)[0], 30, "popularity")


def test_first_draws_have_their_chances() -> None:
    counts = np.array([1, 2, 3, 4])
    none = Cells(np.zeros(0, np.int64), np.zeros(0, np.int32))
    first = sampled.draw(none, 20_000, counts, 2, "popularity")[:, 0]
    assert np.bincount(first) / 20_000 == pytest.approx(counts / 10, abs=0.015)


def test_sampled_ranks_are_those_among_the_drawn() -> None:
    factors = Factors(
        torch.randint(-2, 3, (5, 3)).float(), torch.randint(-2, 3, (40, 3)).float(), torch.ones(40)
    )
    targets = torch.tensor([1, 2, 3, 4, 5])
    drawn = torch.stack([torch.randperm(34)[:10] + 6 for _ in range(5)])
    scores = factors.scores(0, 40)
    own, others = scores.gather(1, targets[:, None]), scores.gather(1, drawn)
    wanted = 1 + (others > own).sum(1) + (others == own).sum(1) / 2
    assert sampled.standing_among(factors, targets, drawn).ranks().tolist() == wanted.tolist()
    assert sampled.prefix("popularity", 100) == "sampled_popularity100_"


def test_lists_and_ranks_agree() -> None:
    """A target is in the list of k exactly where its rank, without ties, is at most k."""
    factors = Factors(torch.randn(30, 8), torch.randn(200, 8))
    targets = Pairs(torch.arange(30), torch.randint(0, 200, (30,)))
    seen = Pairs(torch.arange(30).repeat_interleave(5), torch.randint(0, 200, (150,)))
    free = ~((seen.rows == targets.rows[:, None]) & (seen.items == targets.items[:, None])).any(1)
    ranks = torch.from_numpy(standing(factors, targets, seen).ranks())
    inside = (top_k(factors, 50, seen).items == targets.items[:, None]).any(1)
    assert torch.equal(inside[free], (ranks <= 50)[free])
    assert inside[free].any() and not inside[free].all()
