"""Training by texts: the stages, what each learns, items that training never saw, going on from a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import EarlyStopping
from numpy.typing import NDArray
from torch import Tensor

from manyheads.core import hub
from manyheads.core.errors import UsageError
from manyheads.core.optimization import Optimizer
from manyheads.recsys.cold import _chance
from manyheads.recsys.data import Core, Loading, Splitting
from manyheads.recsys.measuring import Sampled
from manyheads.recsys.metrics import measure
from manyheads.recsys.models.encoder import FIRST, Packed, starts_of
from manyheads.recsys.stages import Stages
from manyheads.recsys.text_data import Drawing, TextData, Texts
from manyheads.recsys.text_task import TextRecommender
from manyheads.recsys.texts import text_batch

COLOURS = ("red", "blue", "green", "black", "white", "gold")
THINGS = ("hat", "shoe", "shirt", "coat", "glove", "scarf", "belt", "sock", "ring", "bag")
ARGUMENTS = {"hidden_size": 32, "layers": 1, "heads": 2, "inner_size": 64, "dropout": 0.0}
FAST = Optimizer(learning_rate=1e-2, schedule="constant", warmup_steps=3, beta2=0.999)


def write(folder: Path, users: int = 120, colours: int = 6) -> tuple[str, str]:
    """A log in which everybody buys things of one colour, and their table."""
    rng = np.random.default_rng(0)
    rows = [
        (f"u{user}", f"{user % colours}.{thing}", step)
        for user in range(users)
        for step, thing in enumerate(rng.permutation(10)[:8])
    ]
    log, table = folder / f"log{colours}.csv", folder / f"items{colours}.csv"
    pd.DataFrame(rows, columns=["user_id", "item_id", "timestamp"]).to_csv(log, index=False)
    texts = [(f"{c}.{t}", f"{COLOURS[c]} {THINGS[t]}") for c in range(colours) for t in range(10)]
    pd.DataFrame(texts, columns=["item_id", "title"]).to_csv(table, index=False)
    return str(log), str(table)


def make(
    folder: Path,
    stages: Stages,
    cold: float = 0.0,
    start: str | None = None,
    colours: int = 6,
    splitting: Splitting | None = None,
    **options: Any,
) -> tuple[TextRecommender, TextData]:
    torch.manual_seed(0)
    log, table = write(folder, colours=colours)
    data = TextData(
        log,
        table,
        core=Core(1, 1),
        splitting=splitting or Splitting(),
        texts=Texts(vocab_size=320, max_tokens=40),
        drawing=Drawing(4, per_user=2, cold=cold),
        loading=Loading(32, 50),
        start=start,
    )
    options = {"optimizer": FAST, "ks": [1, 5]} | options
    sizes = (data.num_items, data.vocab_size, data.max_items, data.max_tokens)
    return TextRecommender(*sizes, "recformer", dict(ARGUMENTS), stages, start=start, **options), data


def trainer(epochs: int = 1, patience: int = 0) -> Trainer:
    return Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        gradient_clip_val=1.0,
        callbacks=[EarlyStopping("val_ndcg@5", mode="max", patience=patience)] if patience else [],
    )


@pytest.mark.parametrize(
    "stages",
    [
        Stages(12, 0, language=0.0),
        Stages(12, 0, batch_items="corrected"),
        Stages(0, 25),
        Stages(0, 25, negatives=20),
    ],
    ids=["pretraining", "with words, corrected", "whole catalogue", "drawn items"],
)
def test_every_stage_learns_the_colour(stages: Stages, tmp_path: Path) -> None:
    task, data = make(tmp_path, stages)
    run = trainer(stages.pretrain + stages.refresh)
    run.fit(task, data)
    figures = {key: float(value) for key, value in run.callback_metrics.items()}
    assert figures["val_hr@5"] > 0.8  # of 60 items; by colour alone 5 of 4
    assert figures["val_popularity_hr@5"] < 0.3
    assert (task.model.lm_head is not None) == stages.words


def test_items_that_training_never_saw_are_found_by_their_texts(tmp_path: Path) -> None:
    task, data = make(tmp_path, Stages(10, 3, language=0.0), cold=0.1)
    run = trainer(13)
    run.fit(task, data)
    (figures,) = run.test(task, data, verbose=False)
    assert task.model.num_items == 54
    assert figures["test_cold_hr@5"] > 0.5 > 5 * figures["test_cold_chance_hr@5"]
    assert figures["test_cold_only_ndcg@5"] > figures["test_cold_only_chance_ndcg@5"]
    lines = task.report(tmp_path)
    assert any(line.startswith("items that training never saw: 6, in") for line in lines)
    ids = data.split.sequences.item_ids
    written = pd.read_csv(tmp_path / "cold_ranks.csv", dtype={"item_id": str})
    assert (ids.numbers(written["item_id"].tolist()) >= 54).all()
    assert figures["test_cold_hr@5"] == pytest.approx((written["rank"] <= 5).mean())


def test_their_ranks_are_those_of_a_plain_loop(tmp_path: Path) -> None:
    """Each question alone, what the encoder makes of each item alone, all scores compared."""
    task, data = make(tmp_path, Stages(0, 1), cold=0.1)
    for weight in task.model.parameters():
        if weight.ndim > 1:
            torch.nn.init.normal_(weight, std=0.3)  # so large that texts differ
    trainer().test(task, data, verbose=False)
    task.report(tmp_path)
    written = pd.read_csv(tmp_path / "cold_ranks.csv", dtype={"item_id": str})
    ranks, only = plain_ranks(task, data)
    for name, (low, high) in (("rank", ranks), ("rank_among_new", only)):
        assert ((low <= written[name]) & (written[name] <= high)).all()
        assert (high - low).mean() < 0.1


Bounds = tuple[NDArray[np.int64], NDArray[np.int64]]


@torch.no_grad()
def plain_ranks(task: TextRecommender, data: TextData) -> tuple[Bounds, Bounds]:
    """The lowest and highest ranks that roundings leave open, among all items and among the last six."""
    model, questions = task.model.eval(), data.cold_questions()

    def read(items: list[int]) -> Tensor:
        history = Packed(torch.tensor(items) + FIRST, starts_of(torch.tensor([len(items)])))
        return torch.nn.functional.normalize(model(text_batch(data.texts, history, 4, 40)), dim=-1)[0]

    def bounds(scores: Tensor, own: Tensor) -> tuple[int, int]:
        return 1 + int((scores > own + 1e-4).sum()), int((scores > own - 1e-4).sum())

    table = torch.nn.functional.normalize(model.item_embedding.weight, dim=-1)  # type: ignore[union-attr]
    now = torch.stack([read([item]) for item in range(60)])
    ridge = (1e-3 * 54) ** 0.5 * torch.eye(32)
    moved = torch.cat([table - now[:54], torch.zeros(32, 32)])
    change = torch.linalg.lstsq(torch.cat([now[:54], ridge]), moved).solution
    table = torch.cat([table, torch.nn.functional.normalize(now[54:] + now[54:] @ change, dim=-1)])
    ranks, only = [], []
    for first, end, target in zip(questions.first, questions.end, questions.targets.items, strict=True):
        history = data.split.sequences.items[first:end].tolist()
        scores = table @ read(history)
        scores[history] = -torch.inf  # nobody buys a thing twice
        ranks.append(bounds(scores, scores[target]))
        only.append(bounds(scores[54:], scores[target]))
    (low, high), (low_only, high_only) = np.array(ranks).T, np.array(only).T
    return (low, high), (low_only, high_only)


def test_chance_is_the_mean_over_all_places() -> None:
    candidates, ks = np.array([3, 40]), (2, 5, 10)
    every = [measure(np.arange(1.0, n + 1), np.arange(n), ks) for n in candidates]
    found = _chance(candidates, ks)
    assert found == pytest.approx({key: np.mean([each[key] for each in every]) for key in found})


def test_the_stages_follow_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The table is encoded before each epoch of the second stage; the third begins with the best weights."""
    task, data = make(tmp_path, Stages(2, 3, language=0.0))
    seen: list[tuple[int, str, float]] = []
    tables: dict[int, Tensor] = {}
    bests: list[dict[str, Tensor]] = []
    encode, step = task._encode_table, task.training_step

    def encoded() -> None:
        encode()
        assert task.model.item_embedding is not None
        seen.append((task.current_epoch, "encoded", 0.0))

    def stepped(batch: Any, batch_idx: int) -> Tensor:
        if batch_idx == 0:
            rate = task.trainer.optimizers[0].param_groups[0]["lr"]
            seen.append((task.current_epoch, task.stages.at(task.current_epoch), rate))
            tables[task.current_epoch] = task.model.item_embedding.weight.clone()  # type: ignore[union-attr]
            if task.current_epoch == 5:
                assert all(torch.equal(x, bests[-1][k]) for k, x in task.model.state_dict().items())
        if task.current_epoch == 4 and task._best is not None:
            bests.append(task._best[1])
        return step(batch, batch_idx)

    monkeypatch.setattr(task, "_encode_table", encoded)
    monkeypatch.setattr(task, "training_step", stepped)
    worst = iter(
        [0.1, 0.2, 0.3, 0.9, 0.5, 0.1, 0.1, 0.1]
    )  # the fourth epoch is the best before the last stage
    end = task.measuring.end
    monkeypatch.setattr(task.measuring, "end", lambda *args: {**end(*args), "ndcg@5": next(worst)})
    trainer(8).fit(task, data)
    stages = [(epoch, what) for epoch, what, _ in seen]
    assert stages == [
        (0, "pretrain"), (0, "encoded"), (1, "pretrain"), (1, "encoded"),
        (2, "encoded"), (2, "refresh"), (3, "encoded"), (3, "refresh"), (4, "encoded"), (4, "refresh"),
        (5, "keep"), (6, "keep"), (7, "keep"),
    ]  # fmt: skip
    assert not torch.equal(tables[3], tables[4])
    assert torch.equal(tables[5], tables[3]) and torch.equal(tables[5], tables[7])
    assert task._best is None
    rates = {epoch: rate for epoch, what, rate in seen if what != "encoded"}
    assert rates[0] == rates[2] == rates[5] == pytest.approx(1e-2 / 4)  # each stage's rate rises anew


def test_patience_counts_in_the_last_stage_alone(tmp_path: Path) -> None:
    still = Optimizer(learning_rate=1e-12, schedule="constant", warmup_steps=0)
    task, data = make(tmp_path, Stages(2, 2, language=0.0), optimizer=still)
    run = trainer(12, patience=2)
    run.fit(task, data)
    assert run.current_epoch == 2 + 2 + 2


def test_training_goes_on_from_a_folder_with_new_items(tmp_path: Path) -> None:
    task, data = make(tmp_path, Stages(8, 0, language=0.0), colours=5)
    trainer(8).fit(task, data)
    hub.save(
        tmp_path / "model",
        task.model,
        domain="recsys",
        name="recformer",
        arguments=task.builder_arguments,
        preprocessing=data.preprocessing(),
    )
    later, more = make(tmp_path, Stages(1, 1), start=str(tmp_path / "model"))
    assert (data.num_items, more.num_items) == (50, 60)
    for key, value in later.model.longformer.state_dict().items():
        assert torch.equal(value, task.model.longformer.state_dict()[key])
    assert later.model.lm_head is not None  # it had none, and learns it now
    run = trainer(2)
    run.fit(later, more)
    assert float(run.callback_metrics["val_hr@5"]) > 0.8
    with pytest.raises(UsageError, match="is of recformer, not of recformer_base"):
        small = {"num_items": 60, "vocab_size": 320, "max_items": 4, "max_tokens": 40}
        TextRecommender(**small, name="recformer_base", start=str(tmp_path / "model"))


def test_figures_among_drawn_items_and_several_targets(tmp_path: Path) -> None:
    task, data = make(
        tmp_path, Stages(0, 1), splitting=Splitting("ratio", 0.2, 0.3, "all"), sampled=Sampled(5)
    )
    with pytest.raises(UsageError, match="one target a user"):
        trainer().test(task, data, verbose=False)
    task.measuring.sampled = Sampled()
    (figures,) = trainer().test(task, data, verbose=False)
    assert 0 <= figures["test_recall@5"] < 1


def test_options_that_do_not_go_together_are_refused(tmp_path: Path) -> None:
    sizes = {"num_items": 5, "vocab_size": 300, "max_items": 4, "max_tokens": 40}
    for options, said in (
        ({"name": "sasrec"}, "is for recommendation"),
        ({"arguments": {"max_items": 7}}, "decided by data.drawing.length"),
        ({"arguments": {"positions": 7}}, "decided by data.texts.max_tokens"),
        ({"arguments": {"language_head": True}}, "decided by model.stages"),
        ({"optimizer": Optimizer(ema_decay=0.9)}, "optimizer.ema_decay"),
        ({"ks": []}, "lengths of lists"),
    ):
        with pytest.raises(UsageError, match=said):
            TextRecommender(**sizes, **options)  # type: ignore[arg-type]
    with (
        torch.device("meta"),
        pytest.raises(UsageError, match=r"takes 50 items and 4096 tokens \(data.drawing"),
    ):
        TextRecommender(5, 300, 51, 1024, "recformer_base")
    for options in ({"pretrain": -1}, {"mask_rate": 0}, {"pretrain_rate": 0}, {"negatives": -1}):
        with pytest.raises(UsageError, match=r"stages\."):
            Stages(**options)  # type: ignore[arg-type]
    slow = Optimizer(warmup_steps=100)
    task, data = make(tmp_path, Stages(1, 1, language=0.0), optimizer=slow)
    with pytest.raises(UsageError, match="warmup_steps 100 are a whole stage of 8 steps"):
        trainer(5).fit(task, data)
