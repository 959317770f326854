"""The task: every loss learns, figures are those of a plain loop, a run goes on with a larger catalogue."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from lightning.pytorch import Trainer

from manyheads.core import hub
from manyheads.core.errors import UsageError
from manyheads.core.optimization import Optimizer
from manyheads.recsys.data import Core, Cutting, Loading, RecommendationData, Splitting
from manyheads.recsys.masking import ask
from manyheads.recsys.measuring import Sampled
from manyheads.recsys.start import TABLE
from manyheads.recsys.task import Objective, Recommender

ARGUMENTS = {"hidden_size": 16, "layers": 1, "hidden_dropout": 0.0, "attn_dropout": 0.0}
FAST = Optimizer(learning_rate=2e-2, schedule="constant", warmup_steps=0)


def write(folder: Path, items: int = 25, users: int = 120) -> Path:
    """A log in which everybody goes round the items in steps of one, from anywhere."""
    rng = np.random.default_rng(items)
    rows = [
        (user, (begin + step) % items, step)
        for user, begin in enumerate(rng.integers(0, items, users))
        for step in range(12)
    ]
    path = folder / f"round{items}.csv"
    pd.DataFrame(rows, columns=["user_id", "item_id", "timestamp"]).to_csv(path, index=False)
    return path


def make(
    path: Path,
    name: str = "sasrec",
    start: str | None = None,
    splitting: Splitting | None = None,
    **options: Any,
) -> tuple[Recommender, RecommendationData]:
    torch.manual_seed(0)
    data = RecommendationData(
        str(path),
        core=Core(1, 1),
        splitting=splitting or Splitting(),
        windows=Cutting(12),
        loading=Loading(16, 50),
        start=start,
    )
    options = {"optimizer": FAST, "ks": [1, 10]} | options
    return Recommender(data.num_items, data.max_len, name, dict(ARGUMENTS), start=start, **options), data


def trainer(epochs: int = 1) -> Trainer:
    return Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )


@pytest.mark.parametrize(
    ("name", "objective", "rate", "epochs"),
    [
        ("sasrec", Objective(), 2e-2, 6),
        ("sasrec", Objective("sampled_softmax", negatives=10, power=0.5), 2e-2, 8),
        ("sasrec", Objective("gbce", negatives=10), 5e-3, 20),
        ("sasrec", Objective("bpr"), 2e-2, 8),
        ("bert4rec", Objective(last_share=0.5), 1e-2, 20),
    ],
)
def test_every_loss_learns_what_comes_next(
    name: str, objective: Objective, rate: float, epochs: int, tmp_path: Path
) -> None:
    fast = Optimizer(learning_rate=rate, schedule="constant", warmup_steps=5)
    task, data = make(write(tmp_path, 40), name, objective=objective, optimizer=fast)
    run = trainer(epochs)
    run.fit(task, data)
    figures = {key: float(value) for key, value in run.callback_metrics.items()}
    assert figures["val_ndcg@10"] > 2 * figures["val_popularity_ndcg@10"] > 0.1
    assert task.monitor == ("val_ndcg@10", "max")


@pytest.mark.parametrize("name", ["sasrec", "bert4rec"])
def test_the_tests_figures_are_those_of_a_plain_loop(name: str, tmp_path: Path) -> None:
    task, data = make(write(tmp_path), name, sampled=Sampled(5, "uniform"))
    (figures,) = trainer().test(task, data, verbose=False)
    task.eval()
    split = data.split
    ranks = []
    for user in range(len(split.sequences)):
        history = torch.from_numpy(split.sequences.history(user)).long()
        tokens = history[None, :-1] + 1
        with torch.no_grad():
            if name == "bert4rec":  # a [MASK] behind, and the model has room for 12
                state = task.model(torch.cat((tokens, torch.tensor([[data.num_items + 1]])), 1))[0, -1]
            else:
                state = task.model(tokens[:, -11:])[0, -1]
        weight, bias = task.model.items()
        scores = weight @ state + (0 if bias is None else bias)
        own = scores[history[-1]].clone()
        scores[history[:-1]] = -torch.inf
        ranks.append(1 + int((scores > own).sum()))
    found = np.array(ranks)
    assert figures["test_hr@10"] == pytest.approx((found <= 10).mean(), abs=1e-6)
    assert figures["test_mrr"] == pytest.approx((1 / found).mean(), abs=1e-4)
    assert figures["test_ndcg@10"] == pytest.approx(
        np.where(found <= 10, 1 / np.log2(1 + found), 0).mean(), abs=1e-4
    )
    assert figures["test_sampled_uniform5_hr@10"] == 1
    assert figures["test_sampled_uniform5_hr@1"] > figures["test_hr@1"]
    assert {"test_coverage@10", "test_novelty@10", "test_popularity_mrr"} <= figures.keys()
    lines = task.report(tmp_path)
    assert any(line.startswith("ndcg@10") for line in lines)
    written = pd.read_csv(tmp_path / "ranks.csv")
    assert written["rank"].tolist() == found.tolist()
    assert (tmp_path / "ranks.png").stat().st_size > 5000


def test_sampled_figures_need_one_target(tmp_path: Path) -> None:
    task, data = make(write(tmp_path), splitting=Splitting("ratio", 0.1, 0.3, "all"), sampled=Sampled(5))
    with pytest.raises(UsageError, match="one target a user"):
        trainer().test(task, data, verbose=False)
    task.measuring.sampled = Sampled()
    (figures,) = trainer().test(task, data, verbose=False)
    assert 0 < figures["test_recall@10"] < 1


def test_training_goes_on_over_a_larger_catalogue(tmp_path: Path) -> None:
    for name in ("sasrec", "bert4rec"):
        task, data = make(write(tmp_path), name)
        trainer().fit(task, data)
        hub.save(
            tmp_path / name,
            task.model,
            domain="recsys",
            name=name,
            arguments=task.builder_arguments,
            preprocessing=data.preprocessing(),
        )
        later, more = make(write(tmp_path, 30), name, start=str(tmp_path / name))
        old, new = (each.split.sequences.item_ids.ids for each in (data, more))
        assert new[: len(old)] == old and len(new) == 30
        stored, grown = (each.model.state_dict()[TABLE] for each in (task, later))
        assert torch.equal(grown[:26], stored[:26])
        if name == "bert4rec":
            assert torch.equal(grown[-1], stored[-1])  # [MASK]
            history = more.train_dataloader()
            batch = next(iter(history))
            assert int(ask(batch, 12, later.model.mask_token).tokens.max()) == 31  # type: ignore[union-attr, arg-type]
        trainer().fit(later, more)
    with pytest.raises(UsageError, match="is of sasrec, not of bert4rec"):
        make(write(tmp_path), "bert4rec", start=str(tmp_path / "sasrec"))


def test_options_that_do_not_go_together_are_refused(tmp_path: Path) -> None:
    for options, said in (
        ({"name": "itransformer"}, "is for forecast"),
        ({"arguments": {"max_len": 7}}, "decided by data.windows.length"),
        ({"arguments": {"num_items": 7}}, "decided by the data"),
        ({"ks": []}, "lengths of lists"),
        ({"ks": [0]}, "lengths of lists"),
    ):
        with pytest.raises(UsageError, match=said):
            Recommender(25, 12, **options)  # type: ignore[arg-type]
    for options in (
        {"negatives": 0},
        {"mask_rate": 0},
        {"t": 2},
        {"last_share": 2},
        {"loss": "gbce", "power": 1},
    ):
        with pytest.raises(UsageError, match=r"objective\."):
            Objective(**options)  # type: ignore[arg-type]
    assert Recommender(25, 12, "sasrec", ks=[1, 5]).monitor == ("val_ndcg@5", "max")
