"""Pieces of a recording: where they are cut, how they are joined."""

from __future__ import annotations

import itertools

import pytest
import torch

from manyheads.speech.separation.alignment import Alignment, fits
from manyheads.speech.separation.chunks import Joiner, cuts, fade, join

RATE = 8000


@pytest.mark.parametrize("length", [1, 2, 7, 8, 9, 12, 13, 14, 20, 103])
@pytest.mark.parametrize(("size", "overlap", "least"), [(8, 3, 8), (8, 4, 8), (8, 1, 4), (40, 3, 8)])
def test_cuts_cover_overlap_and_are_not_short(length, size, overlap, least):
    found = cuts(length, size, overlap, least)
    assert found[0][0] == 0
    assert found[-1][1] == length
    for (a, b), (c, d) in itertools.pairwise(found):
        assert a < c
        assert b < d
        assert b - c >= overlap
    assert all(b - a <= size for a, b in found)
    assert all(b - a == size for a, b in found[:-1])
    assert found[-1][1] - found[-1][0] >= min(length, least)
    assert len(found) == 1 or length > size


def test_a_fade_and_its_mirror_are_one():
    for count in (1, 2, 3, 8, 101, 24_000):
        weights = fade(count)
        torch.testing.assert_close(weights + weights.flip(0), torch.ones(count))
        assert (weights.diff() >= 0).all()
        assert (weights[: count // 4] == 0).all()


def shuffled(speakers, pieces, seed=0):
    """Each piece of a separated recording, its speakers in an order of its own."""
    generator = torch.Generator().manual_seed(seed)
    return [(speakers[torch.randperm(len(speakers), generator=generator), a:b], a) for a, b in pieces]


def joined(pieces):
    """The pieces in the orders that are found; and how many of these are doubtful."""
    orders, doubtful = Alignment.of(pieces, RATE).orders()
    return torch.cat(list(join(pieces, orders)), 1), doubtful


def order(whole, other):
    """Which speakers of the other are those of the whole."""
    found = fits(whole, other)
    return list(list(itertools.permutations(range(len(whole))))[found.index(max(found))])


@pytest.mark.parametrize("speakers", [1, 2, 3, 4])
@pytest.mark.parametrize(
    ("length", "size", "overlap"), [(90_000, 8000, 3000), (7000, 8000, 3000), (8001, 8000, 4000)]
)
def test_shuffled_pieces_join_to_the_whole(speakers, length, size, overlap):
    whole = torch.randn(speakers, length)
    pieces = shuffled(whole, cuts(length, size, overlap, least=size))
    found, doubtful = joined(pieces)
    first = order(whole[:, :500], pieces[0][0][:, :500])  # the speakers are in the order of the first piece
    torch.testing.assert_close(found[first], whole, atol=1e-6, rtol=0)
    assert doubtful == 0


def test_what_comes_out_early_is_final_and_little_is_held():
    whole = torch.randn(2, 50_000)
    joiner, ready = Joiner(), 0
    for start, stop in cuts(50_000, 8000, 2000, least=8000):
        ready += joiner.add(whole[:, start:stop], start).shape[1]
        assert joiner.end().shape[1] <= 8000
        assert ready == start


def test_ends_of_pieces_are_not_heard():
    """A quarter of the overlap at each end of a piece has no weight, so broken edges leave no trace."""
    whole = torch.randn(2, 30_000)
    pieces = cuts(30_000, 8000, 3000, least=8000)
    broken = []
    for clean, start in shuffled(whole, pieces):
        piece = clean.clone()
        if start:
            piece[:, :700] += 0.3 * torch.randn(2, 700)
        if start + 8000 < 30_000:
            piece[:, -700:] += 0.3 * torch.randn(2, 700)
        broken.append((piece, start))
    found, _ = joined(broken)
    torch.testing.assert_close(found[order(whole, found)], whole, atol=1e-6, rtol=0)


def test_a_gap_is_an_error():
    joiner = Joiner()
    joiner.add(torch.randn(2, 100), 0)
    with pytest.raises(ValueError, match="a piece at 100 does not overlap the one before"):
        joiner.add(torch.randn(2, 100), 100)
    with pytest.raises(ValueError, match="a piece at 100 does not overlap the one before"):
        Alignment.of([(torch.randn(2, 100), 0), (torch.randn(2, 100), 100)], RATE)
