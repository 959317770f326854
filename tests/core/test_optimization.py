"""Optimizers of several domains: what decays, how rates fall, a fall that a resumed run repeats."""

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader

from manyheads.core.errors import UsageError
from manyheads.core.optimization import (
    Falling,
    Optimizer,
    Plateau,
    check_plateau,
    make_optimizer,
    make_schedule,
)


def test_what_decays() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2))
    matrices = make_optimizer(model, Optimizer(weight_decay=0.1)).param_groups
    assert [[p.ndim for p in group["params"]] for group in matrices] == [[2, 2], [1, 1, 1, 1]]
    assert [group["weight_decay"] for group in matrices] == [0.1, 0.0]
    first = make_optimizer(model, Optimizer(weight_decay=0.1, decayed="first", kind="adam"))
    assert type(first) is torch.optim.Adam
    assert first.param_groups[0]["params"] == [model[0].weight]
    assert sum(len(group["params"]) for group in first.param_groups) == 6


def test_adams_decay_is_a_gradient_and_adamws_is_not() -> None:
    """With no other gradient Adam's first step is the rate itself; AdamW's is the rate times the decay."""
    steps = {}
    for kind in ("adam", "adamw"):
        layer = nn.Linear(1, 1, bias=False)
        nn.init.ones_(layer.weight)
        options = Optimizer(learning_rate=0.01, weight_decay=0.5, kind=kind)  # type: ignore[arg-type]
        layer.weight.grad = torch.zeros_like(layer.weight)
        make_optimizer(layer, options).step()
        steps[kind] = 1 - float(layer.weight.detach())
    assert steps == pytest.approx({"adam": 0.01, "adamw": 0.005}, rel=1e-4)


def test_rates_rise_and_fall() -> None:
    layer = nn.Linear(2, 2)
    options = Optimizer(learning_rate=1.0, warmup_steps=4, min_lr=0.1)
    optimizer = make_optimizer(layer, options)
    schedule = make_schedule(optimizer, options, 20)
    rates = []
    for _ in range(20):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert all(a > b for a, b in pairwise(rates[4:]))
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1)
    with pytest.raises(UsageError, match="whole run"):
        make_schedule(optimizer, options, 4)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Plateau(patience=-1), "plateau.patience"),
        (lambda: Plateau(3, factor=1.0), "plateau.factor"),
        (lambda: Plateau(stop_below=1e-6), "plateau.stop_below needs"),
        (lambda: check_plateau(Optimizer(), Plateau(3)), "schedule: constant"),
        (lambda: Optimizer(learning_rate=0), "optimizer.learning_rate"),
    ],
)
def test_numbers_that_cannot_be_meant_are_refused(make: object, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        make()  # type: ignore[operator]


class Stuck(LightningModule):
    """Its figure is best in the epochs 0 and 3."""

    FIGURES = (1.0, 1.0, 1.0, 0.5, 0.6, 0.6, 0.6, 0.6, 0.6, 0.6, 0.6, 0.6)

    def __init__(self, plateau: Plateau) -> None:
        super().__init__()
        self.layer, self.plateau, self.rates = nn.Linear(1, 1), plateau, list[float]()

    def training_step(self, batch: Tensor) -> Tensor:
        self.rates.append(self.trainer.optimizers[0].param_groups[0]["lr"])
        return self.layer(batch).sum()

    def validation_step(self, batch: Tensor) -> None:
        self.log("val_loss", self.FIGURES[self.current_epoch])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return make_optimizer(self.layer, Optimizer(learning_rate=1.0, schedule="constant", warmup_steps=0))

    def configure_callbacks(self) -> list[Falling]:
        return [Falling(self.plateau, "val_loss", "min")]


def run(folder: Path, epochs: int, plateau: Plateau, resume: bool = False) -> list[float]:
    model = Stuck(plateau)
    saved = ModelCheckpoint(folder, "last", save_on_train_epoch_end=True, enable_version_counter=False)
    trainer = Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        callbacks=[saved],
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    data = DataLoader(torch.ones(2, 1), batch_size=2)
    trainer.fit(model, data, data, ckpt_path=folder / "last.ckpt" if resume else None, weights_only=True)
    return model.rates


@pytest.mark.filterwarnings("ignore")
def test_rates_fall_where_nothing_gets_better_and_a_resumed_run_repeats_it(tmp_path: Path) -> None:
    plateau = Plateau(patience=1, stop_below=0.2)
    # worse in 1 and 2: falls; better in 3; worse in 4 and 5: falls; in 6 and 7: below 0.2, the end
    wanted = [1.0, 1.0, 1.0, 0.5, 0.5, 0.5, 0.25, 0.25]
    assert run(tmp_path / "straight", 12, plateau) == wanted
    for stop in (2, 3, 5, 6):
        begun = run(tmp_path / str(stop), stop, plateau)
        assert begun + run(tmp_path / str(stop), 12, plateau, resume=True) == wanted
