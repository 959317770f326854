"""The separator's task: what is minimised and logged, its options, a run from the command line."""

from __future__ import annotations

import math
import os
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer
from torch import nn

from manyheads.core.errors import UsageError
from manyheads.core.optimization import Optimizer
from manyheads.speech.audio import write
from manyheads.speech.models.mossformer import mossformer, overlap_add
from manyheads.speech.models.mossformer2 import mossformer2
from manyheads.speech.separation.data import Loading, Mixing, SeparationData
from manyheads.speech.separation.fresh import cosine
from manyheads.speech.separation.task import Objective, Separator

RATE = 8000
SPEAKERS = (
    Path(os.environ.get("MANYHEADS_DATA", "nowhere").split(os.pathsep)[0]) / "speech/librispeech_speakers"
)
TINY = {"dim": 16, "depth": 1, "kernel_size": 16, "query_key_dim": 8, "group_size": 32, "dropout": 0.0}


@pytest.fixture(scope="module")
def people(tmp_path_factory) -> Path:
    """Nine speakers, each a hum of its own pitch: what a very small model can separate."""
    folder = tmp_path_factory.mktemp("people")
    for n in range(9):
        (folder / f"p{n}").mkdir()
        time = torch.arange(8000) / RATE
        hum = sum(torch.sin(2 * math.pi * (250 + 350 * n) * k * time) / k for k in (1, 2, 3))
        write(folder / f"p{n}" / "1.wav", 0.1 * hum, RATE, "FLOAT")
    return folder


def make(people: Path, batch_size: int = 2, **loading) -> SeparationData:
    sizes = {"epoch_mixtures": 8, "val_mixtures": 3, "test_mixtures": 3} | loading
    return SeparationData(
        str(people), batch_size=batch_size, mixing=Mixing(seconds=0.3), loading=Loading(**sizes)
    )


def trainer(**more) -> Trainer:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    return Trainer(accelerator="cpu", enable_model_summary=False, **quiet, **more)


class Oracle(nn.Module):
    """Gives the first voice as it is and the second with noise, in the wrong order."""

    def __init__(self, sources: torch.Tensor) -> None:
        super().__init__()
        self.sources = sources

    def forward(self, mixture, lengths=None):
        return (self.sources + 0.01 * self.sources.std() * torch.randn_like(self.sources)).flip(1)


def test_the_order_of_the_voices_does_not_count(people):
    task = Separator(2, arguments=TINY)
    batch = next(iter(make(people).train_dataloader()))
    task.model = Oracle(batch["sources"])
    assert task.training_step(batch).item() == pytest.approx(-40, abs=3)


def test_mixtures_that_are_separated_well_enough_add_nothing(people):
    batch = next(iter(make(people).train_dataloader()))
    task = Separator(2, arguments=TINY, objective=Objective(threshold_db=30.0))
    task.model = Oracle(batch["sources"])
    assert task.training_step(batch) == 0
    task = Separator(2, arguments=TINY, objective=Objective(threshold_db=60.0))
    task.model = Oracle(batch["sources"])
    assert task.training_step(batch).item() == pytest.approx(-40, abs=3)


def test_a_training_learns_and_logs(people):
    task = Separator(
        2,
        arguments=TINY,
        fresh="cosine",
        optimizer=Optimizer(learning_rate=3e-3, warmup_steps=2, weight_decay=0),
    )
    fit = trainer(max_epochs=12, check_val_every_n_epoch=12)
    fit.fit(task, make(people))
    logged = fit.callback_metrics
    assert {"train_loss", "val_loss", "val_si_sdri"} <= set(logged)
    fresh = Separator(2, arguments=TINY, fresh="cosine")
    before = trainer().validate(fresh, make(people), verbose=False)[0]
    after = trainer().validate(task, make(people), verbose=False)[0]
    assert after["val_loss"] < before["val_loss"] - 1
    assert after["val_si_sdri"] > before["val_si_sdri"] + 1


def test_a_batch_is_measured_as_its_mixtures_one_by_one(people):
    task = Separator(2, arguments=TINY).eval()
    one, all_ = (trainer().test(task, make(people, eval_batch_size=n), verbose=False)[0] for n in (1, 3))
    assert one == pytest.approx(all_, abs=1e-4)
    assert one["test_mixtures"] == 3
    assert one["test_si_sdri"] == pytest.approx(one["test_si_sdr"] - one["test_mixture_si_sdr"], abs=1e-4)


def test_the_rate_is_halved_without_progress(people):
    task = Separator(
        2,
        arguments=TINY,
        objective=Objective(halve_after=1),
        optimizer=Optimizer(schedule="constant", learning_rate=1e-30, warmup_steps=0),
    )
    fit = trainer(max_epochs=5)
    fit.fit(task, make(people))  # too small a rate to get anywhere: the first epoch stays the best
    assert fit.optimizers[0].param_groups[0]["lr"] < 0.6e-30


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"speakers": 6}, "data.speakers must be from 1 to 5"),
        ({"speakers": 2, "arguments": {"num_spks": 3}}, "num_spks is decided by data.speakers"),
        ({"speakers": 2, "objective": Objective(halve_after=3)}, "goes with optimizer.schedule: constant"),
        (
            {"speakers": 2, "fresh": "cosine", "arguments": {"dim": 8}},
            "features as a frame has",
        ),
    ],
)
def test_options_that_do_not_go_together_are_refused(options, message):
    with pytest.raises(UsageError, match=message):
        Separator(**options)


def test_cosine_filters_give_a_waveform_back():
    for model in (mossformer(dim=40, depth=1, kernel_size=32), mossformer2(dim=40, depth=1, kernel_size=32)):
        cosine(model)
        encoder, decoder = (
            (model.encoder, model.decoder) if hasattr(model, "encoder") else (model.enc, model.dec)
        )
        wave = torch.randn(2, 3200)
        with torch.no_grad():
            features = encoder(wave)
            features[..., 32:] = 0  # what there is beyond the cosines is as it was
            back = overlap_add(features[:, :, None], decoder.weight)[:, 0]
        torch.testing.assert_close(back[:, 16:-16], wave[:, 16:-16], atol=1e-5, rtol=0)


@pytest.mark.slow
@pytest.mark.skipif(not SPEAKERS.is_dir(), reason="needs librispeech_speakers in MANYHEADS_DATA")
def test_a_short_training_separates_speakers_it_has_not_heard():
    """A minute of the shipped run's model on real voices; the mixture itself has 0 dB."""
    arguments = {"dim": 128, "depth": 4, "kernel_size": 128, "query_key_dim": 64, "group_size": 128}
    data = SeparationData(
        batch_size=2,
        mixing=Mixing(seconds=2.0),
        loading=Loading(epoch_mixtures=800, val_mixtures=40, test_mixtures=40),
    )
    optimizer = Optimizer(learning_rate=2e-3, warmup_steps=50, ema_decay=0.98)
    task = Separator(2, arguments=arguments | {"dropout": 0.0}, fresh="cosine", optimizer=optimizer)
    fit = trainer(max_epochs=1, gradient_clip_val=5.0)
    fit.fit(task, data)
    assert fit.callback_metrics["val_si_sdri"] > 1.0
    assert trainer().test(task, data, verbose=False)[0]["test_si_sdri"] > 0.5
