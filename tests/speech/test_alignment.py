"""The orders of chunks' speakers: by overlaps, by voices, by both; what is doubtful."""

from __future__ import annotations

import itertools

import pytest
import torch

from manyheads.speech.separation.alignment import BANDS, DOUBTFUL, Alignment, describe, fits
from manyheads.speech.separation.chunks import cuts

RATE = 8000


def voices(seconds, count, seed=0):
    """Speakers of noise with spectra of their own and pauses of their own, `[count, L]`."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(count, int(seconds * RATE), generator=generator)
    spectrum = torch.fft.rfft(noise)
    place = torch.linspace(0, 1, spectrum.shape[1])
    tilts = torch.stack([(-3 * (place - number / count).abs()).exp() for number in range(count)])
    sound = torch.fft.irfft(spectrum * tilts, noise.shape[1])
    speaks = torch.rand(count, int(seconds * 4) + 1, generator=generator) < 0.6
    return 0.1 * sound * speaks.repeat_interleave(RATE // 4, 1)[:, : sound.shape[1]]


def shuffled(speakers, pieces, seed=0):
    """Chunks, and the order in which each has its speakers."""
    generator = torch.Generator().manual_seed(seed)
    drawn = [torch.randperm(len(speakers), generator=generator) for _ in pieces]
    return [(speakers[each, a:b], a) for each, (a, b) in zip(drawn, pieces, strict=True)], drawn


def right(orders, drawn):
    """How many chunks are in the order of the first."""
    speakers = [each[order].tolist() for each, order in zip(drawn, orders, strict=True)]
    return sum(each == speakers[0] for each in speakers)


@pytest.mark.parametrize("speakers", [1, 2, 3, 4])
def test_the_order_that_fits_best_is_the_true_one(speakers):
    before = torch.randn(speakers, 4000) * torch.logspace(-1.5, 0, speakers)[:, None]
    orders = list(itertools.permutations(range(speakers)))
    for each in orders:
        after = torch.empty_like(before)
        after[list(each)] = before + 0.02 * torch.randn_like(before)
        found = sorted(zip(fits(before, after), orders, strict=True))
        assert found[-1][1] == each
        assert len(found) == 1 or found[-1][0] - found[-2][0] > 2e-3


def test_one_active_speaker_is_enough_and_leakage_does_not_turn_it():
    """Who is silent in the overlap adds nothing; correlations of noise, scaled up, would."""
    before = torch.stack([torch.randn(8000), 1e-4 * torch.randn(8000)])
    after = torch.stack([1e-4 * torch.randn(8000) + 0.1 * before[0], before[0]])
    same, turned = fits(before, after)
    assert turned - same > DOUBTFUL


def test_silence_and_likeness_keep_the_order_and_are_doubtful():
    noise = torch.randn(8000)
    for before, after in (
        (torch.zeros(2, 8000), torch.zeros(2, 8000)),
        (torch.randn(2, 8000), torch.zeros(2, 8000)),
        (torch.stack([noise, noise]), torch.stack([noise, noise])),
    ):
        found = Alignment.of([(before, 0), (after, 4000)], RATE)
        assert found.orders() == ([[0, 1], [0, 1]], 1)


def test_a_chunk_alone_and_a_speaker_alone_have_their_order():
    assert Alignment.of([(torch.randn(3, 100), 0)], RATE).orders() == ([[0, 1, 2]], 0)
    pieces = [(torch.randn(1, 100), 0), (torch.randn(1, 100), 50)]
    assert Alignment.of(pieces, RATE).orders() == ([[0], [0]], 0)


@pytest.mark.parametrize("speakers", [2, 3, 4])
@pytest.mark.parametrize("seed", [0, 1])
def test_voices_tell_the_order_across_silence(speakers, seed):
    """Every overlap is silent: before voices were compared the order behind it was a guess."""
    sound = voices(120, speakers, seed)
    pieces = cuts(sound.shape[1], 12 * RATE, 3 * RATE, least=12 * RATE)
    for (start, _), (_, stop) in zip(pieces[1:], pieces[:-1], strict=True):
        sound[:, start:stop] = 0
    chunks, drawn = shuffled(sound, pieces, seed)
    orders, doubtful = Alignment.of(chunks, RATE).orders()
    assert right(orders, drawn) == len(pieces)
    assert orders[0] == list(range(speakers))
    assert doubtful == len(pieces) - 1


def test_one_wrong_overlap_does_not_turn_all_that_follows():
    """A model that swaps its speakers inside one chunk; by overlaps alone half of the chunks were wrong."""
    sound = voices(240, 2)
    pieces = cuts(sound.shape[1], 12 * RATE, 4 * RATE, least=12 * RATE)
    chunks, drawn = shuffled(sound, pieces)
    middle = len(pieces) // 2
    chunk, start = chunks[middle]
    chunk = chunk.clone()
    swapped = 5 * RATE // 2  # of four seconds
    chunk[:, :swapped] = chunk[:, :swapped].flip(0)
    chunks[middle] = chunk, start
    same, turned = fits(
        chunks[middle - 1][0][drawn[middle - 1].argsort(), 8 * RATE :],
        chunk[drawn[middle].argsort(), : 4 * RATE],
    )
    assert turned - same > DOUBTFUL  # the overlap tells the wrong order
    orders, doubtful = Alignment.of(chunks, RATE).orders()
    assert right(orders, drawn) >= len(pieces) - 1
    assert doubtful == 1


def test_a_certain_overlap_is_believed_although_voices_change():
    """Two speakers who exchange their microphones in the middle stay who they are."""
    sound = voices(120, 2)
    half = sound.shape[1] // 2
    changed = sound.clone()
    changed[:, half:] = sound[:, half:].flip(0)
    chunks, drawn = shuffled(changed, cuts(sound.shape[1], 12 * RATE, 4 * RATE, least=12 * RATE))
    orders, _ = Alignment.of(chunks, RATE).orders()
    assert right(orders, drawn) == len(chunks)


def test_a_description_has_no_level_and_no_trust_in_leakage():
    sound = voices(24, 2)
    spectra, trust = describe(sound, RATE)
    assert spectra.shape == (2, BANDS)
    assert (trust > 0.5).all()
    for scale in (1e-3, 30.0):
        torch.testing.assert_close(describe(scale * sound, RATE)[0], spectra, atol=1e-3, rtol=0)
    alone = torch.stack([sound[0], 1e-2 * sound[0]])
    assert describe(alone, RATE)[1][1] < 0.05
    for rate in (8000, 16_000, 48_000):
        spectra, trust = describe(torch.zeros(2, 5), rate)
        assert torch.isfinite(spectra).all()
        assert trust.tolist() == [0, 0]
