"""The classifier's training, on a small ViT and images made here: what it logs, mixes, freezes, averages."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import pandas as pd
import pytest
import torch
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from manyheads.core import hub
from manyheads.core.errors import UsageError
from manyheads.vision.losses import Loss
from manyheads.vision.optimization import Optimizer, Schedule
from manyheads.vision.task import ImageClassifier, Regularize
from manyheads.vision.transfer import Transfer

NAME = "vit_tiny_patch16_224"
SMALL = {"patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Such small models are slower on several."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Images(LightningDataModule):
    """Grey images of 8 x 8 whose bright row, or rows, are their labels."""

    labels = tuple("abcdefgh")
    known_counts: ClassVar = [30] * 8

    def __init__(self, multi_label: bool = False, n: int = 96) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        images = torch.randn(3, n, 1, 8, 8, generator=generator) * 0.3
        if multi_label:
            target = torch.bernoulli(torch.full((3, n, 8), 0.4), generator=generator)
            rows = target
            unknown = torch.rand(target.shape, generator=generator) < 0.2
            self.target = torch.where(unknown, torch.nan, target)
        else:
            self.target = torch.randint(8, (3, n), generator=generator)
            rows = torch.nn.functional.one_hot(self.target, 8).float()
        self.images = images + 2 * rows[:, :, None, :, None]

    def _loader(self, part: int, shuffle: bool = False) -> DataLoader[dict[str, Tensor]]:
        def collate(pairs: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
            image, target = (torch.stack(each) for each in zip(*pairs, strict=True))
            return {"image": image, "target": target}

        data = TensorDataset(self.images[part], self.target[part])
        return DataLoader(data, 16, shuffle, collate_fn=collate)  # type: ignore[arg-type]

    def train_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        return self._loader(0, True)

    def val_dataloader(self, alone: bool = False) -> DataLoader[dict[str, Tensor]]:
        return self._loader(1)

    def test_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        return self._loader(2)


def make(**options: object) -> ImageClassifier:
    given = {
        "name": NAME,
        "arguments": SMALL,
        "optimizer": Optimizer(learning_rate=1e-2),
        "schedule": Schedule(warmup_epochs=1),
    }
    return ImageClassifier(8, 1, 8, **(given | options))  # type: ignore[arg-type]


def trainer(epochs: int = 1, **options: object) -> Trainer:
    return Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        **options,  # type: ignore[arg-type]
    )


def test_it_learns_measures_and_reports(tmp_path: Path) -> None:
    task, run, data = make(), trainer(12), Images(n=256)
    run.fit(task, data)
    assert run.callback_metrics["val_top1"] > 0.9
    assert {"train_loss", "val_loss", "val_top5"} <= run.callback_metrics.keys()
    (figures,) = run.test(task, data, verbose=False)
    assert figures["test_images"] == 256
    assert figures["test_top1"] > 0.9
    assert figures["test_temperature"] == pytest.approx(task.calibration()["temperature"])
    assert 0 < figures["test_ece"] < 1
    printed = task.report(tmp_path)
    assert len(printed) == 1 + 8 + 1
    table = pd.read_csv(tmp_path / "report.csv")
    assert table["label"].tolist() == list("abcdefgh")
    assert table["support"].sum() == 256
    matrix = pd.read_csv(tmp_path / "confusion.csv", index_col=0)
    assert matrix.to_numpy().sum() == 256
    assert matrix.to_numpy().trace() / 256 == pytest.approx(figures["test_top1"])
    assert (tmp_path / "confusion.png").stat().st_size > 5000
    assert (tmp_path / "reliability.png").stat().st_size > 5000


def test_several_labels_some_unknown(tmp_path: Path) -> None:
    task = make(multi_label=True, regularize=Regularize(mixup=0.2, cutmix=1.0, label_smoothing=0.1))
    run, data = trainer(12), Images(True, 192)
    run.fit(task, data)
    assert run.callback_metrics["val_map"] > 0.75  # 0.4 by chance
    assert run.callback_metrics["val_auroc"] > 0.8
    assert task.monitor == ("val_map", "max")
    (figures,) = run.test(task, data, verbose=False)
    assert math.isfinite(figures["test_ece_scaled"])
    task.report(tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {"report.csv", "reliability.png"}
    assert "known" in pd.read_csv(tmp_path / "report.csv")


def test_positives_weigh_by_the_known_negatives() -> None:
    task = make(multi_label=True, class_counts=[10] * 8, loss=Loss(pos_weight="balanced"))
    trainer(1, limit_val_batches=1).validate(task, Images(True), verbose=False)
    assert task.criterion.weight.tolist() == [2.0] * 8


def test_mixed_batches_have_soft_targets_and_follow_torchs_random_numbers() -> None:
    batch = {"image": torch.randn(6, 1, 8, 8), "target": torch.arange(6)}

    def mixed(seed: int) -> tuple[Tensor, Tensor]:
        task, seen = make(regularize=Regularize(mixup=1.0, cutmix=1.0)), []
        task.log = lambda *args, **kwargs: None  # type: ignore[method-assign, assignment]
        task.model.register_forward_hook(lambda module, args, out: seen.append(args[0]))
        task.criterion.register_forward_hook(lambda module, args, out: seen.append(args[1]))
        torch.manual_seed(seed)
        task.training_step(batch)  # type: ignore[arg-type]
        return seen[0], seen[1]

    (image, target), again, other = mixed(5), mixed(5), mixed(6)
    torch.testing.assert_close(target.sum(dim=-1), torch.ones(6))
    assert ((target > 0).sum(dim=-1) == 2).all()
    assert not torch.equal(image, batch["image"])
    assert torch.equal(image, again[0])
    assert torch.equal(target, again[1])
    assert not torch.equal(image, other[0])


@pytest.mark.parametrize("kind", ["probe", "backbone"])
def test_what_is_frozen_stays_as_it_was(kind: str) -> None:
    regularize = Regularize(drop_path=0.5)
    schedule = Schedule(warmup_epochs=0)
    task = make(transfer=Transfer(freeze=kind), regularize=regularize, schedule=schedule)  # type: ignore[arg-type]
    before = {name: value.clone() for name, value in task.model.state_dict().items()}
    trainer(1).fit(task, Images())
    moved = {name for name, value in task.model.state_dict().items() if not value.equal(before[name])}
    assert {"head.weight", "head.bias"} <= moved
    norms = {name for name in before if "norm" in name}
    assert len(norms) > 4
    assert moved - {"head.weight", "head.bias"} == (set() if kind == "probe" else norms)
    modes = {name: module.training for name, module in task.model.named_modules()}
    assert modes["head"]
    assert modes["blocks.1"] == (kind == "backbone")


def test_averaged_weights_are_validated_and_kept(tmp_path: Path) -> None:
    task, run, data = make(regularize=Regularize(ema_decay=0.9)), trainer(2), Images()
    run.callbacks.append(ModelCheckpoint(tmp_path, "last"))  # type: ignore[attr-defined]
    run.fit(task, data)
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)
    held, current = state["state_dict"], state["current_model_state"]
    assert state["averaging_state"]["n_averaged"] == 12
    assert not torch.equal(held["model.head.weight"], current["model.head.weight"])
    validated = run.callback_metrics["val_loss"].item()
    task.load_state_dict(held)
    (figures,) = run.validate(task, data, verbose=False)
    assert figures["val_loss"] == pytest.approx(validated)
    task.load_state_dict(current)
    (other,) = run.validate(task, data, verbose=False)
    assert other["val_loss"] != pytest.approx(figures["val_loss"], rel=1e-3)


def test_rates_drop_out_and_reach_the_builder() -> None:
    task = make(regularize=Regularize(drop_path=0.2, drop_rate=0.1))
    assert task.builder_arguments == {
        "num_classes": 8,
        "in_chans": 1,
        "img_size": 8,
        "drop_path_rate": 0.2,
        "drop_rate": 0.1,
        **SMALL,
    }
    with pytest.raises(UsageError, match=r"drop_path_rate is decided by regularize.drop_path"):
        make(arguments={**SMALL, "drop_path_rate": 0.1})


def test_weights_begin_from_a_folder_or_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(1)
    old = make()
    hub.save(
        tmp_path / "model",
        old.model,
        domain="vision",
        name=NAME,
        arguments=old.builder_arguments,
        preprocessing={},
    )
    save_file(old.model.state_dict(), tmp_path / "timm.safetensors")
    for source in ("model", "timm.safetensors"):
        torch.manual_seed(2)
        same = make(transfer=Transfer(str(tmp_path / source)))
        assert all(torch.equal(v, old.model.state_dict()[k]) for k, v in same.model.state_dict().items())
        assert capsys.readouterr().out == ""
        other = ImageClassifier(
            5, 1, 8, name=NAME, arguments=SMALL, transfer=Transfer(str(tmp_path / source))
        )
        assert other.model.state_dict()["head.weight"].shape == (5, 16)
        kept = {k for k, v in other.model.state_dict().items() if v.equal(old.model.state_dict()[k])}
        assert kept == set(old.model.state_dict()) - {"head.weight", "head.bias"}
        assert "head.bias, head.weight begin anew" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "arguments", "positions", "first", "rows"),
    [
        (NAME, SMALL, "pos_embed", 0, 17),
        (
            "vim",
            {"patch_size": 4, "stride": 4, "embed_dim": 16, "depth": 1, "d_state": 2},
            "pos_embed",
            2,
            17,
        ),
        (
            "cct",
            {"embed_dim": 16, "depth": 1, "num_heads": 2, "conv_layers": 2},
            "classifier.positional_emb",
            None,
            16,
        ),
    ],
)
def test_weights_of_another_image_size_are_resized(
    tmp_path: Path, name: str, arguments: dict[str, object], positions: str, first: int | None, rows: int
) -> None:
    old = make(name=name, arguments=arguments).model.state_dict()
    save_file(old, tmp_path / "old.safetensors")
    given = Transfer(str(tmp_path / "old.safetensors"))
    new = ImageClassifier(8, 1, 16, name=name, arguments=arguments, transfer=given).model.state_dict()  # type: ignore[arg-type]
    assert new[positions].shape[1] == rows
    assert {key for key in old if not old[key].equal(new[key])} == {positions}
    if first is not None:  # the class token's own row; Vim's stands in the middle
        middle = 0 if first == 0 else rows // 2
        assert new[positions][0, middle].equal(old[positions][0, first])


def test_weights_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    state = dict(make().model.state_dict())
    extra = {**state, "blocks.2.norm1.weight": torch.ones(16)}
    del extra["norm.weight"]
    save_file(extra, tmp_path / "extra.safetensors")
    with pytest.raises(UsageError, match=r"1 missing \(norm.weight\); 1 left over \(blocks.2.norm1.weight\)"):
        make(transfer=Transfer(str(tmp_path / "extra.safetensors")))
    with pytest.raises(UsageError, match="no file"):
        make(transfer=Transfer(str(tmp_path / "none.safetensors")))
    (tmp_path / "text.safetensors").write_text("no weights")
    with pytest.raises(UsageError, match="is no safetensors file"):
        make(transfer=Transfer(str(tmp_path / "text.safetensors")))
    with pytest.raises(UsageError, match="no model folder"):
        make(transfer=Transfer(str(tmp_path / "nowhere")))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"regularize": Regularize(label_smoothing=1.0)}, "label_smoothing must be from 0 to below 1"),
        ({"regularize": Regularize(mixup=-0.1)}, "mixup must be 0 or more"),
        ({"regularize": Regularize(ema_decay=math.nan)}, "ema_decay"),
        ({"regularize": Regularize(mix_probability=1.5)}, "mix_probability"),
        ({"optimizer": Optimizer(learning_rate=-1)}, "learning_rate"),
        ({"loss": Loss(class_weights="balanced")}, "a train image of each class"),
        ({"name": "vit_tinny_patch16_224"}, "did you mean"),
        ({"arguments": {"depht": 2}}, "did you mean 'depth'"),
    ],
)
def test_options_that_cannot_be_meant_are_refused(options: dict[str, object], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        make(**options)
