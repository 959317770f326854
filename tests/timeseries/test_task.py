"""The forecasting task in a plain trainer: figures, schedule, determinism."""

import math

import pytest
import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from torch.utils.data import DataLoader

from manyheads.core.errors import UsageError
from manyheads.timeseries.task import Forecaster

TINY = {"d_model": 8, "n_heads": 2, "e_layers": 1, "d_ff": 8}


def batches(sizes, seed=0):
    """Noisy sines of different phases, in batches of the given sizes."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for size in sizes:
        phase = 6 * torch.rand(size, 1, 3, generator=generator)
        steps = torch.arange(32.0).view(1, 32, 1)
        series = (steps * math.pi / 4 + phase).sin() + 0.1 * torch.randn(size, 32, 3, generator=generator)
        marks = torch.rand(size, 32, 2, generator=generator)
        made.append(
            {"x": series[:, :24], "y": series[:, 24:], "x_mark": marks[:, :24], "y_mark": marks[:, 24:]}
        )
    return DataLoader(made, batch_size=None)


def trainer(**options):
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    return Trainer(**quiet, accelerator="cpu", enable_model_summary=False, num_sanity_val_steps=0, **options)


def tiny(**options):
    return Forecaster("itransformer", TINY, seq_len=24, pred_len=8, **options)


def naive():
    return Forecaster("seasonal_naive", {"season_length": 8}, seq_len=24, pred_len=8)


def errors(task, data):
    parts = [(task(each) - each["y"]).flatten() for each in data]
    found = torch.cat(parts).double()
    return found[~found.isnan()]


@pytest.mark.parametrize("missing", [False, True])
def test_figures_are_means_over_all_windows_whatever_the_batches(missing):
    data = batches([7, 7, 2])
    data.dataset[2]["y"] += 5  # so that a mean of batch means is far off
    if missing:
        data.dataset[2]["y"][0, 2:5, 1] = math.nan
    task = naive()
    figures = trainer().test(task, data, verbose=False)[0]
    wanted = errors(task, data)
    assert figures["test_mse"] == pytest.approx(wanted.square().mean().item(), rel=1e-6)
    assert figures["test_mae"] == pytest.approx(wanted.abs().mean().item(), rel=1e-6)
    assert figures["test_windows"] == 16
    (validation,) = trainer().validate(task, data, verbose=False)
    assert validation["val_loss"] == pytest.approx(figures["test_mse"], rel=1e-6)


def test_figures_of_a_second_pass_do_not_contain_the_first():
    task, data, runner = naive(), batches([4, 3]), trainer()
    assert runner.test(task, data, verbose=False) == runner.test(task, data, verbose=False)


def test_training_lowers_the_loss_and_logs_both_losses():
    task, data = tiny(learning_rate=1e-2, lr_decay=0.9), batches([16] * 8)
    before = errors(task, data).square().mean()
    runner = trainer(max_epochs=4)
    runner.fit(task, data, batches([8, 3], seed=1))
    assert {"train_loss", "val_loss"} <= set(runner.callback_metrics)
    assert errors(task.eval(), data).square().mean() < 0.7 * before
    wanted = errors(task, batches([8, 3], seed=1)).square().mean()
    assert runner.callback_metrics["val_loss"].item() == pytest.approx(wanted.item(), rel=1e-6)


def trained_weights(seed):
    seed_everything(seed, verbose=False)
    task = tiny(learning_rate=1e-3)
    trainer(max_epochs=2, deterministic=True).fit(task, batches([8] * 3), batches([4]))
    return torch.cat([p.detach().flatten() for p in task.parameters()])


def test_the_seed_decides_the_weights():
    first = trained_weights(5)
    assert torch.equal(first, trained_weights(5))
    assert not torch.equal(first, trained_weights(6))


class Rates(Callback):
    """Note the learning rate of each epoch."""

    def __init__(self):
        self.seen = []

    def on_train_epoch_start(self, trainer, pl_module):
        self.seen.append(trainer.optimizers[0].param_groups[0]["lr"])


def test_learning_rate_holds_for_two_epochs_and_then_halves():
    rates = Rates()
    trainer(max_epochs=5, callbacks=[rates]).fit(tiny(learning_rate=8e-4), batches([4]), batches([4]))
    assert rates.seen == pytest.approx([8e-4, 8e-4, 4e-4, 2e-4, 1e-4])


def test_gaps_in_the_targets_do_not_reach_the_weights():
    data = batches([8])
    data.dataset[0]["y"][::2, 3:] = math.nan
    task = tiny()
    trainer(max_epochs=2).fit(task, data, data)
    assert all(p.isfinite().all() for p in task.parameters())


def test_predictions_are_the_models_forecasts():
    task, data = tiny().eval(), batches([3, 2])
    found = trainer().predict(task, data)
    for got, batch in zip(found, data, strict=True):
        torch.testing.assert_close(got, task.model(batch["x"], batch["x_mark"], batch["y_mark"]))


def test_a_checkpoint_gives_back_the_task(tmp_path):
    task, runner = tiny(), trainer(max_epochs=1)
    runner.fit(task, batches([4]), batches([4]))
    runner.save_checkpoint(tmp_path / "a.ckpt")
    back = Forecaster.load_from_checkpoint(tmp_path / "a.ckpt", weights_only=True)
    assert back.builder_arguments == task.builder_arguments == {**TINY, "seq_len": 24, "pred_len": 8}
    batch = batches([2]).dataset[0]
    torch.testing.assert_close(back.eval()(batch), task.eval()(batch), rtol=0, atol=0)


def test_a_model_without_parameters_is_tested_but_not_trained():
    with pytest.raises(UsageError, match="no parameters"):
        trainer(max_epochs=1).fit(naive(), batches([4]), batches([4]))


def test_a_mistyped_argument_is_named():
    with pytest.raises(UsageError, match="did you mean 'd_model'"):
        Forecaster("itransformer", {"d_modl": 8})
