"""The forecasting task in a plain trainer: figures, schedule, determinism."""

import json
import math

import numpy as np
import pandas as pd
import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule, Trainer, seed_everything
from torch.utils.data import DataLoader

import manyheads
from manyheads.apps import cli
from manyheads.core.errors import UsageError
from manyheads.timeseries.calls import forecast, training_loss
from manyheads.timeseries.conformal import SplitConformal
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


@pytest.mark.parametrize("output", ["point", "quantile", "student_t", "normal"])
def test_val_loss_is_the_models_own_over_all_targets(output):
    task = tiny(output=output, quantiles=[0.1, 0.9] if output == "quantile" else None).eval()
    data = batches([5, 2])
    data.dataset[1]["y"][:, 2:, 1:] = math.nan
    (figures,) = trainer().validate(task, data, verbose=False)
    weighed = [(training_loss(task.model, b), (~b["y"].isnan()).sum()) for b in data]
    wanted = sum(loss * count for loss, count in weighed) / sum(count for _, count in weighed)
    assert figures["val_loss"] == pytest.approx(wanted.item(), rel=1e-6)


@pytest.mark.parametrize("output", ["quantile", "normal"])
def test_a_test_measures_quantiles_over_all_targets(output):
    levels = [0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95]
    task = tiny(output=output, quantiles=levels if output == "quantile" else None).eval()
    data = batches([5, 2])
    data.dataset[0]["y"][0, 2:, 1] = math.nan
    (figures,) = trainer().test(task, data, verbose=False)
    with torch.no_grad():
        made = [forecast(task.model, each, levels) for each in data]
    y = torch.cat([each["y"] for each in data]).double()
    seen, quantiles = ~y.isnan(), torch.cat([each.quantiles for each in made]).double()
    error = (y - torch.cat([each.point for each in made]))[seen]
    assert figures["test_mae"] == pytest.approx(error.abs().mean().item(), rel=1e-6)
    over = [
        torch.where(y > q, level * (y - q), (1 - level) * (q - y))
        for level, q in zip(levels, quantiles.unbind(-1), strict=True)
    ]
    assert figures["test_pinball"] == pytest.approx(torch.stack(over)[:, seen].mean().item(), rel=1e-6)
    for share, low, high in ((0.9, 0, 6), (0.8, 1, 5), (0.5, 2, 4)):
        inside = (quantiles[..., low] <= y) & (y <= quantiles[..., high])
        assert figures[f"test_coverage_{share}"] == pytest.approx(inside[seen].double().mean().item())
        width = (quantiles[..., high] - quantiles[..., low])[seen].mean().item()
        assert figures[f"test_width_{share}"] == pytest.approx(width, rel=1e-6)


def test_a_plain_model_is_not_wrapped():
    zero = {"past": 0, "past_categories": [], "future": 0, "static": 0, "static_categories": []}
    task = tiny(covariate_sizes=zero)
    assert (task.name, task.builder_arguments) == ("itransformer", {**TINY, "seq_len": 24, "pred_len": 8})
    assert type(task.model) is type(manyheads.create_model("itransformer", seq_len=24, pred_len=8))


@pytest.mark.parametrize(
    "more",
    [
        {"covariate_sizes": {"past": 0, "static_categories": [3]}},
        {"output": "normal"},
        {"window_scaling": "mean"},
    ],
)
def test_covariates_outputs_and_scaling_put_a_forecaster_around_it(more):
    task = tiny(**more)
    added = {"static_categories": [3]} if "covariate_sizes" in more else more
    wanted = {"base": "itransformer", "arguments": TINY, "seq_len": 24, "pred_len": 8, **added}
    assert (task.name, task.builder_arguments) == ("forecaster", wanted)


def test_a_model_with_outputs_of_its_own_gets_them_itself():
    task = Forecaster("autoformer_lagged", {"lags": "1,2", "d_model": 8}, 24, 8, output="normal")
    assert task.name == "autoformer_lagged"
    assert task.builder_arguments == {
        "lags": "1,2",
        "d_model": 8,
        "seq_len": 24,
        "pred_len": 8,
        "output": "normal",
    }


class Held(LightningDataModule):
    """Validation windows whose errors conformal intervals are made of, and test windows."""

    columns, pred_len = ("a", "b", "c"), 8

    def __init__(self, val, test):
        super().__init__()
        self.val, self.test = val, test
        self.val_windows = range(sum(len(each["y"]) for each in val))

    def val_dataloader(self, alone=False):
        return self.val

    def test_dataloader(self):
        return self.test


def test_conformal_intervals_are_made_of_the_validation_windows():
    task, data = tiny(conformal=[0.5, 0.8]).eval(), Held(batches([40, 13]), batches([9, 4], seed=1))
    (figures,) = trainer().test(task, data, verbose=False)
    with torch.no_grad():
        val, test = (torch.cat([(task(b) - b["y"]).abs() for b in part]) for part in (data.val, data.test))
    split = SplitConformal.fit(val.double().numpy(), [0.5, 0.8], data.columns)
    for i, share in enumerate(("0.5", "0.8")):
        inside = (test.double().numpy() <= split.radius[i]).mean()
        assert figures[f"test_coverage_{share}"] == pytest.approx(inside, abs=1e-3)
        assert figures[f"test_width_{share}"] == pytest.approx(2 * split.radius[i].mean(), rel=1e-6)


def test_large_validation_parts_give_every_kth_window(monkeypatch):
    monkeypatch.setattr("manyheads.timeseries.conformal._MOST_ERRORS", 20 * 8 * 3)
    task, data = tiny(conformal=[0.8]).eval(), Held(batches([10, 10, 10, 10, 13]), batches([2]))
    runner = trainer()
    runner.test(task, data, verbose=False)
    with torch.no_grad():
        errors = torch.cat([(task(b) - b["y"]).abs() for b in data.val])[::3].double().numpy()
    wanted = SplitConformal.fit(errors, [0.8], data.columns).radius
    np.testing.assert_allclose(task._intervals.radius, wanted, rtol=1e-5)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"output": "normal", "conformal": [0.9]}, "conformal intervals are for output point"),
        ({"conformal": [0.9, 0.5]}, "conformal out of order"),
        ({"output": "quantile", "quantiles": [0.9, 0.5]}, "quantiles out of order"),
        ({"output": "quantile"}, "output quantile needs its quantiles"),
    ],
)
def test_options_that_do_not_go_together_are_refused(more, message):
    with pytest.raises(UsageError, match=message):
        tiny(**more)


def table(path, days=320, seed=0):
    """A long table of two shops whose sales are a level of the shop and a random promotion's effect."""
    rng = np.random.default_rng(seed)
    parts = []
    for shop, level in (("a", 5.0), ("b", 9.0)):
        kind = rng.integers(0, 2, days)
        y = level + 2.0 * kind + 0.1 * rng.standard_normal(days)
        ds = pd.date_range("2024-01-01", periods=days, freq="D")
        promotion = np.where(kind == 1, "flyer", "none")
        parts.append(pd.DataFrame({"unique_id": shop, "ds": ds, "y": y, "promotion": promotion}))
    pd.concat(parts).to_csv(path, index=False)


@pytest.mark.parametrize("output", ["quantile", "conformal"])
def test_the_command_trains_with_covariates_and_its_folder_gives_intervals(tmp_path, output):
    table(tmp_path / "sales.csv")
    wanted = {
        "quantile": {"output": "quantile", "quantiles": [0.1, 0.5, 0.9]},
        "conformal": {"conformal": [0.8]},
    }
    config = {
        "seed_everything": 0,
        "trainer": {"max_epochs": 6, "accelerator": "cpu"},
        "model": {
            "name": "dlinear",
            "arguments": {"moving_avg": 3},
            "learning_rate": 0.03,
            "lr_decay": 0.9,
            **wanted[output],
        },
        "data": {
            "dataset": str(tmp_path / "sales.csv"),
            "seq_len": 14,
            "pred_len": 7,
            "future": ["promotion"],
            "categorical": ["promotion"],
        },
    }
    (tmp_path / "c.yaml").write_text(json.dumps(config))
    run = tmp_path / "run"
    for action in ("fit", "test"):
        args = ["--config", str(tmp_path / "c.yaml"), "--output", str(run)]
        assert cli.main(["timeseries", action, *args]) == 0
    figures = json.loads((run / "test.json").read_text())
    assert (
        figures["test_mse"] < 0.15
    )  # without the promotion 0.2: its effect has a variance of 1, all sales of 5
    assert 0.6 < figures["test_coverage_0.8"] < 0.95
    saved = json.loads((run / "model" / "config.json").read_text())
    assert saved["arguments"]["future_categories"] == [3]
    assert ("conformal" in saved["preprocessing"]) == (output == "conformal")
    frame = pd.read_csv(tmp_path / "sales.csv", parse_dates=["ds"])
    frame.loc[frame.groupby("unique_id").tail(7).index, "y"] = np.nan
    rows = manyheads.load(run).predict(frame)
    names = ["yhat_q0.1", "yhat_q0.9"] if output == "conformal" else ["yhat_q0.1", "yhat_q0.5", "yhat_q0.9"]
    assert list(rows.columns) == ["unique_id", "ds", "yhat", *names]
    assert len(rows) == 14
    assert (rows["yhat_q0.1"] < rows["yhat_q0.9"]).all()
    assert abs(rows.groupby("unique_id")["yhat"].mean() - [6.0, 10.0]).max() < 1.5
