"""SI-SDR: the loss against torchmetrics, lengths, orders; the figures against recorded ones."""

from __future__ import annotations

import itertools
import os
from pathlib import Path

import pytest
import torch
from torchmetrics.functional.audio import scale_invariant_signal_distortion_ratio

from manyheads.speech.separation.fixed import FixedMixtures
from manyheads.speech.separation.metrics import best_order, pairwise_si_sdr, score

SHARED = Path(os.environ.get("MANYHEADS_DATA", "nowhere").split(os.pathsep)[0]) / "speech"


def voices(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64) + 0.3  # means that have to be taken out


def test_pairs_equal_torchmetrics():
    estimates, sources = voices(3, 2, 500), voices(3, 2, 500)
    estimates[0] = sources[0].flip(0) + 0.1 * torch.randn(2, 500)  # one that fits
    found = pairwise_si_sdr(estimates, sources)
    for b, i, j in itertools.product(range(3), range(2), range(2)):
        expected = scale_invariant_signal_distortion_ratio(estimates[b, i], sources[b, j], zero_mean=True)
        assert found[b, i, j].item() == pytest.approx(expected.item(), abs=1e-6)
    assert found[0, 0, 1] > 15


def test_scale_does_not_count():
    estimates, sources = voices(1, 2, 300), voices(1, 2, 300)
    torch.testing.assert_close(
        pairwise_si_sdr(3 * estimates, 0.2 * sources), pairwise_si_sdr(estimates, sources), atol=1e-9, rtol=0
    )


def test_what_lies_behind_a_row_does_not_count():
    lengths = torch.tensor([500, 123])
    estimates, sources = voices(2, 2, 500), voices(2, 2, 500)
    estimates[1, :, 123:] = 7.0
    sources[1, :, 123:] = torch.nan
    estimates.requires_grad_()
    found = pairwise_si_sdr(estimates, sources, lengths)
    alone = pairwise_si_sdr(estimates[1:, :, :123], sources[1:, :, :123])
    torch.testing.assert_close(found[1:], alone)
    found.sum().backward()
    assert (estimates.grad[1, :, 123:] == 0).all()


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_the_best_of_all_orders_is_found(count):
    scores = torch.randn(6, count, count)
    best, order = best_order(scores)
    for b in range(6):
        assert sorted(order[b].tolist()) == list(range(count))
        means = [scores[b, list(each), range(count)].mean() for each in itertools.permutations(range(count))]
        assert best[b] == max(means)
        assert scores[b, order[b], range(count)].mean() == best[b]


def test_a_silent_estimate_has_a_finite_loss_and_gradient():
    estimates = torch.zeros(1, 2, 400, requires_grad=True)
    loss = best_order(pairwise_si_sdr(estimates, torch.randn(1, 2, 400)))[0].mean()
    loss.backward()
    assert loss.isfinite()
    assert estimates.grad.isfinite().all()


def test_a_score_orders_the_voices():
    sources = torch.randn(2, 2000)
    noisy = sources.flip(0) + 0.1 * torch.randn(2, 2000)
    found = score(noisy, sources, sources.sum(0))
    assert found.order == [1, 0]
    assert found.si_sdr == pytest.approx(20, abs=1)
    assert found.mixture_si_sdr == pytest.approx(0, abs=1)
    assert found.improvement == pytest.approx(found.si_sdr - found.mixture_si_sdr)
    assert sum(found.voices) / 2 == pytest.approx(found.si_sdr, abs=1e-4)


@pytest.mark.skipif(
    not (SHARED / "libri2mix_debug").is_dir(), reason="needs libri2mix_debug in MANYHEADS_DATA"
)
def test_figures_equal_the_recorded_ones(golden):
    case = golden("speech", "separation_metrics_a")
    mixtures = FixedMixtures(SHARED / "libri2mix_debug", 2, 8000)
    assert [f"{name.rsplit('.', 1)[0]}.flac" for name in mixtures.names] == case.config["files"]
    for index in range(len(mixtures)):
        found = mixtures.sample(index)
        mixture, sources = found.mixture.double(), found.sources.double()
        have = score(mixture.expand_as(sources), sources, mixture)
        for key, value in (
            ("pit_si_sdr_zero_mean", have.si_sdr),
            ("mixture_si_sdr_zero_mean", have.mixture_si_sdr),
            ("si_sdri_zero_mean", have.improvement),
        ):
            assert value == pytest.approx(case.tensors[f"output.{key}"][index].mean().item(), abs=1e-6), key
        ours = best_order(pairwise_si_sdr(mixture.expand_as(sources)[None], sources[None]))[0]
        assert ours.item() == pytest.approx(have.si_sdr, abs=1e-6)
