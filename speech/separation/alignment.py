"""Which speaker of a chunk is which of the next: told by their overlap, and by the voices of all chunks.

A model gives the speakers of each chunk in an order of its own. Where neighbours overlap they have separated
the same sounds, which tells their orders apart; but where a model is unsure all that follows would stay
wrong. A voice sounds alike in all chunks, which tells less of one chunk, but keeps to the whole recording.
Both are log likelihoods: the likeliest orders of all chunks are found (Viterbi), and the voices' means from
them, in turn until nothing changes, as k-means does; from several beginnings, of which the best is taken.

Layout: C chunks, S speakers, P = S! orders, V = S voices, F bands, I beginnings.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from itertools import permutations

import numpy as np
import torch
import torchaudio.functional as audio_functional
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import pad

# How much better an overlap fits in one order than in the next best, of 2 at most:
DOUBTFUL = 0.1  # below it two chunks may as well belong together in another order
CERTAIN = 0.8  # from it on the overlap is believed, whatever the voices say

# How voices are described.
BANDS = 24
FRAME_MS = 32
AUDIBLE = 0.1  # of the chunk's mean energy: a frame below it says nothing of a voice
ENOUGH_S = 0.5  # of frames in which a speaker is alone: then its description counts half

# Weights, chosen on pairs of speakers other than those that the proof of long recordings shows.
VARIANCE = 0.05  # of a description around its voice's mean, in a band, in nats squared
OVERLAP = 4.0  # weight of an overlap's log likelihood
LEAST = 1e-3  # of what an overlap leaves unexplained: more certain it cannot be

BEGINNINGS = 8  # chunks whose speakers are taken for the voices to begin with
ROUNDS = 20

Array = NDArray[np.float64]


class Alignment:
    """Finds the orders of a recording's speakers; holds one chunk, and some numbers of each.

    Args:
        sample_rate: In Hz.
    """

    def __init__(self, sample_rate: int) -> None:
        self.sample_rate = sample_rate
        self._before: Tensor | None = None
        self._at = 0
        self._voices: list[tuple[Tensor, Tensor]] = []
        self._fits: list[list[float]] = []

    @classmethod
    def of(cls, chunks: Iterable[tuple[Tensor, int]], sample_rate: int) -> Alignment:
        """Take all chunks, each with its start."""
        found = cls(sample_rate)
        for chunk, start in chunks:
            found.add(chunk, start)
        return found

    def add(self, chunk: Tensor, start: int) -> None:
        """Take the next chunk.

        Args:
            chunk: `[S, L]`.
            start: Its place in the recording.

        Raises:
            ValueError: It does not overlap the one before.
        """
        if self._before is not None:
            over = self._before[:, start - self._at :]
            count = over.shape[1]
            if not 0 < count <= chunk.shape[1]:
                raise ValueError(f"a piece at {start} does not overlap the one before")
            self._fits.append(fits(over, chunk[:, :count]))
            if not self._voices:  # of a single chunk none is needed
                self._voices.append(describe(self._before, self.sample_rate))
            self._voices.append(describe(chunk, self.sample_rate))
        self._before, self._at = chunk, start

    def orders(self) -> tuple[list[list[int]], int]:
        """Return each chunk's order of speakers, the first's as it is; and how many joins are doubtful.

        A join is doubtful where the overlap does not bear its order out: it is silent, the speakers are
        alike there, or their voices speak against it.
        """
        assert self._before is not None
        perms = list(permutations(range(len(self._before))))
        if not self._fits or len(perms) == 1:
            return [list(perms[0])] * (len(self._fits) + 1), 0
        voices = np.stack([voice.numpy() for voice, _ in self._voices])  # [C, S, F]
        trust = np.stack([each.numpy() for _, each in self._voices])  # [C, S]
        relations = _relations(perms)
        overlaps = np.array(self._fits)
        path = _likeliest(voices, trust, overlaps, perms)
        doubtful = 0
        for number, chosen in enumerate(relations[path[:-1], path[1:]]):
            others = np.delete(overlaps[number], chosen)
            doubtful += bool(overlaps[number][chosen] - others.max() < DOUBTFUL)
        first = np.argsort(perms[path[0]])
        return [[perms[state][voice] for voice in first] for state in path], doubtful


def fits(before: Tensor, after: Tensor) -> list[float]:
    """Tell how well the speakers of two chunks fit in each order, from -1 to 1; all 0 where one is silent.

    Args:
        before, after: The same stretch of the recording, from two chunks.

    Shape:
        Both `[S, L]`; the result `[P]`, in the sequence of `itertools.permutations`.
    """
    products = (before.double() @ after.double().T).tolist()
    scale = float(before.double().norm() * after.double().norm())
    return [
        sum(products[i][j] for i, j in enumerate(each)) / scale if scale else 0.0
        for each in permutations(range(len(before)))
    ]


def describe(chunk: Tensor, sample_rate: int) -> tuple[Tensor, Tensor]:
    """Describe each speaker's voice: its mean spectrum, without its level, where it speaks and no other does.

    Returns:
        The spectra in nats, `[S, F]` float64; and how far each can be trusted, `[S]`, from 0 to 1.
    """
    size = sample_rate * FRAME_MS // 1000
    frames = pad(chunk, (0, -chunk.shape[1] % size)).unflatten(1, (-1, size)) * torch.hann_window(size)
    power = (torch.fft.rfft(frames).abs().square() @ _bank(size, sample_rate)).double()  # [S, T, F]
    energy = power.sum(2)
    total, least = energy.sum(0), torch.finfo(torch.float32).tiny
    alone = (2 * energy / total.clamp(min=least) - 1).clamp(min=0) * (energy > AUDIBLE * total.mean())
    shape = (power + 1e-5 * energy.mean() / BANDS + least).log()
    shape = shape - shape.mean(2, keepdim=True)
    seconds = alone.sum(1) * FRAME_MS / 1000
    spectra = (alone[..., None] * shape).sum(1) / alone.sum(1, keepdim=True).clamp(min=1e-9)
    return spectra, seconds / (seconds + ENOUGH_S)


@cache
def _bank(size: int, sample_rate: int) -> Tensor:
    """Return mel filters over the spectrum of a frame, `[size / 2 + 1, F]`."""
    return audio_functional.melscale_fbanks(size // 2 + 1, 60.0, 0.4875 * sample_rate, BANDS, sample_rate)


@cache
def _relation_of(before: tuple[int, ...], after: tuple[int, ...]) -> tuple[int, ...]:
    """Where each speaker of the chunk before is in the one after, if these are their orders."""
    return tuple(after[before.index(speaker)] for speaker in range(len(before)))


def _relations(perms: list[tuple[int, ...]]) -> NDArray[np.int64]:
    """Return which relation two orders have, by their numbers, `[P, P]`."""
    return np.array([[perms.index(_relation_of(a, b)) for b in perms] for a in perms])


def _likeliest(
    voices: Array, trust: Array, overlaps: Array, perms: list[tuple[int, ...]]
) -> NDArray[np.int64]:
    """Return the likeliest order of each chunk, by its number, `[C]`."""
    steps = -OVERLAP * np.log(np.maximum(1 - overlaps, LEAST))  # [C - 1, P], by relation
    steps[:, 0] += 1e-6  # where nothing tells, the speakers stay as they are
    first, second = np.sort(overlaps, 1)[:, :-3:-1].T
    certain = (first - second >= CERTAIN)[:, None] & (overlaps < first[:, None])
    steps[certain] -= 1e9
    steps = steps[:, _relations(perms)]  # [C - 1, P before, P after]
    count, order = len(voices), np.array(perms)
    chosen = np.unique(np.linspace(0, count - 1, BEGINNINGS).astype(int))
    means, known = np.repeat(voices[chosen][:, None], count, 1), np.repeat(trust[chosen][:, None], count, 1)
    plain = np.zeros((1, count, len(perms)))  # the overlaps alone
    paths, _ = _viterbi(np.concatenate((plain, _chances(voices, trust, means, known, order))), steps)
    for _ in range(ROUNDS):
        own, weight = voices[None], trust[None, ..., None]
        at = np.arange(count)[None, :, None], order[paths]  # of each chunk, who is which voice: [I, C, V]
        own, weight = voices[at], trust[at]
        weighed = own * weight[..., None]
        known = weight.sum(1, keepdims=True) - weight  # of all other chunks
        means = (weighed.sum(1, keepdims=True) - weighed) / np.maximum(known, 1e-9)[..., None]
        before = paths
        paths, totals = _viterbi(_chances(voices, trust, means, known, order), steps)
        if (paths == before).all():
            break
    best: NDArray[np.int64] = paths[totals.argmax()]
    return best


def _chances(voices: Array, trust: Array, means: Array, known: Array, order: NDArray[np.int64]) -> Array:
    """Return the log likelihood of each chunk's voices in each order, `[I, C, P]`.

    Args:
        voices, trust: `[C, S, F]`, `[C, S]`.
        means: Of the voices, as each chunk should see them, `[I, C, V, F]`.
        known: What they are made of: the sum of trust, `[I, C, V]`.
        order: `[P, V]`.
    """
    squares = (voices**2).sum(2)[None, :, :, None] + (means**2).sum(3)[:, :, None]
    distances = (squares - 2 * np.einsum("csf,icvf->icsv", voices, means)) / voices.shape[2]
    weights = trust[None, :, :, None] * (known / (known + 1))[:, :, None]
    costs = weights * distances / (2 * VARIANCE)
    return -sum(costs[:, :, order[:, voice], voice] for voice in range(order.shape[1]))


def _viterbi(chances: Array, steps: Array) -> tuple[NDArray[np.int64], Array]:
    """Return the likeliest paths `[I, C]`, and their log likelihoods `[I]`."""
    total, back = chances[:, 0], []
    for number, step in enumerate(steps, 1):
        ways = total[:, :, None] + step[None]
        back.append(ways.argmax(1))
        total = ways.max(1) + chances[:, number]
    path = [total.argmax(1)]
    lines = np.arange(len(total))
    for choice in reversed(back):
        path.append(choice[lines, path[-1]])
    return np.stack(path[::-1], 1), total.max(1)
