"""Masks by the paper's recipe."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from manyheads.recsys.masking import RECIPES, ask, mask_items, newest, next_items
from manyheads.recsys.models.encoder import Packed, starts_of

LENGTHS = torch.tensor([200, 2, 1, 50, 0, 13])
MASK = 301


def batch() -> Packed:
    return Packed(torch.randint(1, 301, (int(LENGTHS.sum()),)), starts_of(LENGTHS))


@pytest.mark.parametrize(("rate", "most"), [(0.2, 40), (0.2, 20), (0.6, 30), (0.4, 20)])
def test_so_many_of_each_history(rate, most):
    """Exactly min(most, max(1, round(length * rate))), every one by [MASK], and nothing else changed."""
    given = batch()
    before = given.tokens.clone()
    found = mask_items(given, MASK, rate, most)
    assert torch.equal(given.tokens, before)
    counts = torch.bincount(given.rows()[found.at], minlength=6).tolist()
    wanted = [min(most, max(1, math.floor(n * rate + 0.5))) if n else 0 for n in LENGTHS.tolist()]
    assert counts == wanted
    assert (found.batch.tokens[found.at] == MASK).all()
    assert torch.equal(found.targets + 1, before[found.at])
    assert int((found.batch.tokens != before).sum()) == len(found.at) == len(found.at.unique())
    assert torch.equal(found.at, found.at.sort().values)
    assert torch.equal(found.batch.starts, given.starts)


def test_the_last_alone():
    """What the paper adds for each window: its last item hidden and no other."""
    last = torch.tensor([True, False, True, False, True, True])
    found = mask_items(batch(), MASK, 0.2, 40, last)
    per_row = [
        (found.at[(found.at >= first) & (found.at < end)] - first).tolist()
        for first, end in pairwise(starts_of(LENGTHS).tolist())
    ]
    assert per_row[0] == [199]
    assert len(per_row[1]) == 1
    assert (per_row[2], per_row[4], per_row[5]) == ([0], [], [12])
    assert len(per_row[3]) == 10


def test_every_place_is_hidden_as_often():
    """10,000 histories of 10 items, 2 of each hidden: 2,000 a place, give or take five deviations."""
    many = Packed(torch.ones(100_000, dtype=torch.int64), torch.arange(0, 100_001, 10).int())
    found = mask_items(many, MASK, 0.2, 40, generator=torch.Generator().manual_seed(3))
    again = mask_items(many, MASK, 0.2, 40, generator=torch.Generator().manual_seed(3))
    assert torch.equal(found.at, again.at)
    counts = torch.bincount(found.at % 10, minlength=10)
    assert int(counts.sum()) == 20_000
    assert (counts - 2000).abs().max() < 5 * math.sqrt(10_000 * 0.2 * 0.8)


def test_questions():
    given = batch()
    asked = ask(given, 50, MASK)
    assert asked.lengths.tolist() == [50, 3, 2, 50, 1, 14]
    rows = [given.tokens[first:end] for first, end in pairwise(given.starts.tolist())]
    for row, (first, end) in zip(rows, pairwise(asked.starts.tolist()), strict=True):
        assert asked.tokens[first:end].tolist() == [*row.tolist()[-49:], MASK]
    kept = newest(given, 50)
    for row, (first, end) in zip(rows, pairwise(kept.starts.tolist()), strict=True):
        assert kept.tokens[first:end].tolist() == row.tolist()[-50:]


def test_next_items():
    given = batch()
    found = next_items(given)
    assert found.batch.lengths.tolist() == [199, 1, 0, 49, 0, 12]
    rows = [given.tokens[first:end].tolist() for first, end in pairwise(given.starts.tolist())]
    assert found.batch.tokens.tolist() == [token for row in rows for token in row[:-1]]
    assert (found.targets + 1).tolist() == [token for row in rows for token in row[1:]]
    assert torch.equal(found.at, torch.arange(261))


def test_recipes_are_the_papers():
    """The published scripts and their JSON files."""
    found = {name: (each.max_len, each.rate, each.most, each.step) for name, each in RECIPES.items()}
    assert found == {
        "ml_1m": (200, 0.2, 40, 100),
        "ml_20m": (200, 0.2, 20, 100),
        "beauty": (50, 0.6, 30, 5),
        "steam": (50, 0.4, 20, 25),
    }
