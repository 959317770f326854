"""The best items, block by block, are those of a sort of all scores: equal ones by number."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from manyheads.core.errors import UsageError
from manyheads.recsys import retrieval
from manyheads.recsys.retrieval import NONE, Factors, Pairs, Top, allowed_items, top_k


def brute(factors: Factors, k: int, seen: Pairs | None = None, allowed: Tensor | None = None) -> Top:
    """Sort everything: stable, so that of equal scores the lower number comes first."""
    scores = factors.scores(0, len(factors.items)).nan_to_num(
        nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf
    )
    if seen is not None:
        scores[seen.rows, seen.items] = -torch.inf
    if allowed is not None:
        out = torch.ones(scores.shape[1], dtype=torch.bool)
        out[allowed] = False
        scores[:, out] = -torch.inf
    found, items = scores.sort(dim=1, descending=True, stable=True)
    found, items = found[:, :k], items[:, :k].masked_fill(found[:, :k] == -torch.inf, NONE)
    short = k - found.shape[1]
    if short > 0:
        found = torch.cat((found, torch.full((len(found), short), -torch.inf)), 1)
        items = torch.cat((items, torch.full((len(items), short), NONE)), 1)
    return Top(items, found)


def whole_numbers(users: int, items: int, width: int = 3) -> Factors:
    """Scores that are exact however they are added up, with many ties."""
    return Factors(
        torch.randint(-2, 3, (users, width)).float(),
        torch.randint(-2, 3, (items, width)).float(),
        torch.randint(0, 2, (items,)).float(),
    )


def same(found: Top, wanted: Top) -> None:
    assert torch.equal(found.items, wanted.items)
    assert torch.equal(found.scores, wanted.scores)


@pytest.fixture(params=["compiled", "torch"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways to merge: the loop of CPUs, and what runs on a GPU."""
    if request.param == "torch":
        monkeypatch.setattr(retrieval, "_compiles", lambda scores: False)
    else:
        pytest.importorskip("numba")
    return str(request.param)


@pytest.mark.parametrize(("users", "items"), [(1, 1), (1000, 1000), (3, 7), (5, 64), (4, 100)])
@pytest.mark.parametrize("k", [1, 7, 63, 130])
def test_equal_to_a_sort_of_everything(path: str, users: int, items: int, k: int) -> None:
    factors = whole_numbers(9, 129)
    seen = Pairs(torch.arange(9).repeat_interleave(20), torch.randint(0, 129, (180,)))
    allowed = allowed_items(129, deny=range(0, 129, 3))
    for left_out in (None, seen):
        for among in (None, allowed):
            found = top_k(factors, k, left_out, among, users, items)
            same(found, brute(factors, k, left_out, among))


def test_scores_that_are_all_equal_or_no_numbers(path: str) -> None:
    equal = Factors(torch.ones(2, 1), torch.ones(300, 1))
    found = top_k(equal, 5, Pairs(torch.tensor([1, 1]), torch.tensor([0, 3])), items=64)
    assert found.items.tolist() == [[0, 1, 2, 3, 4], [1, 2, 4, 5, 6]]
    odd = Factors(
        torch.ones(1, 1), torch.tensor([[torch.nan], [1.0], [-torch.inf], [torch.inf], [torch.nan]])
    )
    for block in (1, 2, 5):
        found = top_k(odd, 4, items=block)
        assert found.items.tolist() == [[3, 1, NONE, NONE]]
        assert found.scores.tolist() == [[torch.inf, 1.0, -torch.inf, -torch.inf]]


def test_each_user_can_have_a_number_of_its_own(path: str) -> None:
    factors = whole_numbers(4, 50)
    counts = torch.tensor([3, 0, 7, 1])
    found, wanted = top_k(factors, counts), brute(factors, 7)
    for row, count in enumerate(counts.tolist()):
        assert found.items[row, :count].tolist() == wanted.items[row, :count].tolist()
        assert (found.items[row, count:] == NONE).all() and (found.scores[row, count:] == -torch.inf).all()
    for k in (0, -1, torch.tensor([0, 0, 0, 0]), torch.tensor([1, 2, -1, 1])):
        with pytest.raises(UsageError, match="at least 1"):
            top_k(factors, k)


def test_lists_of_items_allow_and_deny() -> None:
    assert allowed_items(5) is None
    assert allowed_items(5, allow=[4, 1, 1]).tolist() == [1, 4]  # type: ignore[union-attr]
    assert allowed_items(5, deny=[0, 2]).tolist() == [1, 3, 4]  # type: ignore[union-attr]
    assert allowed_items(5, [0, 1], [0]).tolist() == [1]  # type: ignore[union-attr]
    for allow, deny in (([1], [1]), ([], None), (None, range(5))):
        with pytest.raises(UsageError, match="nothing to recommend"):
            allowed_items(5, allow, deny)


def test_seen_items_come_from_a_flat_array(path: str) -> None:
    flat, starts = torch.tensor([3, 1, 1, 2]), torch.tensor([0, 2, 2, 4])
    seen = Pairs.of(flat, starts)
    assert seen.rows.tolist() == [0, 0, 2, 2]
    factors = Factors(torch.ones(3, 1), torch.arange(4.0)[:, None])
    assert top_k(factors, 2, seen).items.tolist() == [[2, 0], [3, 2], [3, 0]]
    assert seen.part(1, 3).rows.tolist() == [1, 1]


def test_the_order_of_users_and_blocks_changes_nothing(path: str) -> None:
    factors = Factors(torch.randn(50, 16), torch.randn(3000, 16))
    whole = top_k(factors, 20)
    assert torch.equal(top_k(factors, 20, users=7, items=411).items, whole.items)
    one = top_k(factors.part(13, 14), 20)
    assert torch.equal(one.items[0], whole.items[13])


def test_threads_share_the_users() -> None:
    pytest.importorskip("numba")
    factors = whole_numbers(100, 500)
    torch.set_num_threads(4)
    try:
        same(top_k(factors, 11), brute(factors, 11))
    finally:
        torch.set_num_threads(1)


def test_one_block_of_scores_is_held(path: str, blocks: list[int]) -> None:
    factors = whole_numbers(100, 3000)
    top_k(factors, 10, users=64, items=1024)
    assert max(blocks) == 64 * 1024
    assert sum(blocks) == 100 * 3000


@pytest.mark.gpu
def test_equal_to_a_sort_on_a_gpu() -> None:
    factors = whole_numbers(300, 5000)
    seen = Pairs(torch.arange(300).repeat_interleave(30), torch.randint(0, 5000, (9000,)))
    there = Factors(*(each.cuda() for each in factors if each is not None))
    found = top_k(there, 20, Pairs(seen.rows.cuda(), seen.items.cuda()))
    same(Top(found.items.cpu(), found.scores.cpu()), brute(factors, 20, seen))
