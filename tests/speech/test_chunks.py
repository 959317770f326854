"""Pieces of a recording: where they are cut, in which order their speakers belong, how they are joined."""

from __future__ import annotations

import itertools

import pytest
import torch

from manyheads.speech.separation.chunks import DOUBTFUL, Joiner, cuts, fade, order


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


@pytest.mark.parametrize("speakers", [1, 2, 3, 4])
def test_the_order_is_found_among_all(speakers):
    before = torch.randn(speakers, 4000) * torch.logspace(-1.5, 0, speakers)[:, None]
    for each in itertools.permutations(range(speakers)):
        after = torch.empty_like(before)
        after[list(each)] = before + 0.02 * torch.randn_like(before)
        found, certainty = order(before, after)
        assert found == list(each)
        assert certainty > 2e-3


def test_one_active_speaker_is_enough_and_leakage_does_not_turn_it():
    """Who is silent in the overlap adds nothing; correlations of noise, scaled up, would."""
    before = torch.stack([torch.randn(8000), 1e-4 * torch.randn(8000)])
    after = torch.stack([1e-4 * torch.randn(8000) + 0.1 * before[0], before[0]])
    found, certainty = order(before, after)
    assert found == [1, 0]
    assert certainty > DOUBTFUL


def test_silence_and_likeness_keep_the_order_and_say_so():
    noise = torch.randn(4000)
    for before, after in (
        (torch.zeros(2, 4000), torch.zeros(2, 4000)),
        (torch.randn(2, 4000), torch.zeros(2, 4000)),
        (torch.stack([noise, noise]), torch.stack([noise, noise])),
    ):
        found, certainty = order(before, after)
        assert found == [0, 1]
        assert certainty == 0


def shuffled(speakers, pieces, seed=0):
    """Each piece of a separated recording, its speakers in an order of its own."""
    generator = torch.Generator().manual_seed(seed)
    return [(speakers[torch.randperm(len(speakers), generator=generator), a:b], a) for a, b in pieces]


def join(pieces, joiner=None):
    joiner = Joiner() if joiner is None else joiner
    ready = [joiner.add(piece, start) for piece, start in pieces]
    return torch.cat([*ready, joiner.end()], 1)


@pytest.mark.parametrize("speakers", [1, 2, 3, 4])
@pytest.mark.parametrize(
    ("length", "size", "overlap"), [(90_000, 8000, 3000), (7000, 8000, 3000), (8001, 8000, 4000)]
)
def test_shuffled_pieces_join_to_the_whole(speakers, length, size, overlap):
    whole = torch.randn(speakers, length)
    pieces = shuffled(whole, cuts(length, size, overlap, least=size))
    first = order(whole[:, :500], pieces[0][0][:, :500])[0]
    joiner = Joiner()
    torch.testing.assert_close(join(pieces, joiner)[first], whole, atol=1e-6, rtol=0)
    assert joiner.doubtful == 0


def test_what_comes_out_early_is_final_and_little_is_held():
    whole = torch.randn(2, 50_000)
    joiner, ready = Joiner(), 0
    for piece, start in shuffled(whole, cuts(50_000, 8000, 2000, least=8000)):
        ready += joiner.add(piece, start).shape[1]
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
    joined = join(broken)
    best = order(whole, joined)[0]
    torch.testing.assert_close(joined[best], whole, atol=1e-6, rtol=0)


def test_doubtful_joins_are_counted():
    whole = torch.randn(2, 40_000)
    whole[:, 10_000:20_000] = 0
    joiner = Joiner(doubtful=2)
    join([(whole[:, a:b], a) for a, b in cuts(40_000, 4000, 2000, least=4000)], joiner)
    assert joiner.doubtful == 2 + 5  # overlaps that begin at 10,000, 12,000, ... 18,000


def test_a_gap_is_an_error():
    joiner = Joiner()
    joiner.add(torch.randn(2, 100), 0)
    with pytest.raises(ValueError, match="a piece at 100 does not overlap the one before"):
        joiner.add(torch.randn(2, 100), 100)
