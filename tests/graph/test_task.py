"""Training and testing graph models: builder arguments, levels, figures, reports, what is refused."""

import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from lightning.pytorch import Trainer
from torch import Tensor
from torch_geometric.data import Data

from manyheads.core.errors import DataError, UsageError
from manyheads.core.optimization import Optimizer, Plateau
from manyheads.graph.collection import GraphSet
from manyheads.graph.data import Encodings, GraphData, Loading, Split
from manyheads.graph.losses import Kind, Loss
from manyheads.graph.preprocessing import Target
from manyheads.graph.task import GraphTask, recipe

SMALL = {"hidden_dim": 16, "L": 2}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One thread; what is written to the cache is this test's alone."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    monkeypatch.setenv("MANYHEADS_CACHE", str(tmp_path / "cache"))


def some_graphs(level: str, kind: Kind, count: int = 90) -> tuple[GraphSet, Target]:
    """Random rings with chords; targets follow from the nodes' categories, and a few are unknown."""
    rng = np.random.default_rng(0)
    parts = []
    for size in rng.integers(4, 12, count).tolist():
        ring = np.stack([np.arange(size), np.roll(np.arange(size), -1)])
        pairs = np.concatenate([ring, rng.integers(0, size, (2, 3))], 1)
        edges = torch.from_numpy(np.concatenate([pairs, pairs[::-1]], 1))
        parts.append((torch.from_numpy(rng.integers(0, 3, (size, 1))), edges, None))
    graphs = GraphSet.of(parts)
    ones = (graphs.x[:, 0] == 1).float()
    share = torch.segment_reduce(ones, "mean", lengths=graphs.sizes)
    base = share if level == "graph" else ones + 0.1 * (graphs.x[:, 0] == 2)
    y = {
        "regression": torch.stack([10 + 3 * base, 100 - 20 * base], 1),
        "classification": (base > 0.3).float()[:, None],
        "multilabel": torch.stack([base > 0.3, base < 0.05], 1).float(),
    }[kind]
    y[::17] = torch.nan
    classes = kind == "classification"
    target = Target(kind, ("c",), ("low", "high")) if classes else Target(kind, ("a", "b"))
    return GraphSet(
        graphs.x, graphs.edge_index, graphs.nodes, graphs.edges, None, y, level  # type: ignore[arg-type]
    ), target  # fmt: skip


def parts(rows: int) -> dict[str, Tensor]:
    first, second = int(0.7 * rows), int(0.85 * rows)
    return {
        "train": torch.arange(first),
        "val": torch.arange(first, second),
        "test": torch.arange(second, rows),
    }


def make_data(level: str, kind: Kind, **options: object) -> GraphData:
    graphs, target = some_graphs(level, kind)
    return GraphData.of(graphs, target, parts(len(graphs)), **options)  # type: ignore[arg-type]


def fit(task: GraphTask, data: GraphData, epochs: int = 15) -> Trainer:
    trainer = Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    trainer.fit(task, datamodule=data)
    return trainer


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("level", ["graph", "node"])
@pytest.mark.parametrize("kind", ["regression", "classification", "multilabel"])
def test_it_learns_measures_and_reports(level: str, kind: Kind, tmp_path: Path) -> None:
    data = make_data(level, kind, loading=Loading(batch_size=16))
    optimizer = Optimizer(learning_rate=0.01, warmup_steps=2)
    task = GraphTask.of(data, "gine", arguments=dict(SMALL), optimizer=optimizer)
    figure, mode = task.monitor
    trainer = fit(task, data, 1)
    first = float(trainer.callback_metrics[figure])
    trainer = fit(task, data)
    last = float(trainer.callback_metrics[figure])
    assert last > max(first, 0.9) if mode == "max" else last < 0.5 * first
    (found,) = trainer.test(task, datamodule=data, verbose=False)
    rows = len(data.targets("test"))
    assert found["test_rows"] == rows
    lines = task.report(tmp_path)
    assert lines[-1].startswith(f"in {tmp_path}")
    assert (tmp_path / "picture.png").stat().st_size > 5000
    written = pd.read_csv(tmp_path / "rows.csv", dtype={"id": str})
    assert written["id"].tolist() == data.ids("test")
    columns = pd.read_csv(tmp_path / "columns.csv")
    if kind == "regression":  # the table's numbers are the data's, and so are the figures
        errors = (written["b_predicted"] - written["b"]).abs()
        assert columns["mae"][1] == pytest.approx(errors.mean(), rel=1e-4)
        assert found["test_mae"] == pytest.approx(columns["mae"].mean(), rel=1e-4)
        assert written["b"].mean() > 80
    elif kind == "classification":
        right = (written["predicted"] == written["true"])[written["true"].notna()]
        assert found["test_accuracy"] == pytest.approx(right.mean())
        assert columns["class"].tolist() == ["low", "high"]
    else:
        assert found["test_roc_auc"] == pytest.approx(columns["roc_auc"].mean())
        assert columns["rows"].tolist() == (~data.targets("test").isnan()).sum(0).tolist()


@pytest.mark.filterwarnings("ignore")
def test_figures_do_not_depend_on_batches() -> None:
    task, found = None, []
    for loading in (Loading(batch_size=3), Loading(batch_size=64), Loading(max_nodes=30, buckets=4)):
        data = make_data("graph", "regression", loading=loading)
        task = task or GraphTask.of(data, "gcn", arguments=dict(SMALL))
        trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False)
        (figures,) = trainer.validate(task, datamodule=data, verbose=False)
        found.append(figures)
    for each in found[1:]:
        assert each == pytest.approx(found[0], rel=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_one_graph_whole_and_by_samples() -> None:
    """Full neighbourhoods one hop further than the layers give the same validation figures as the graph."""
    torch.manual_seed(1)
    pairs = torch.randint(0, 300, (2, 700))
    x, label = torch.rand(300, 6), torch.randint(0, 3, (300, 1)).float()
    edges = torch.cat([pairs, pairs.flip(0)], 1)
    graphs = GraphSet(
        x, edges, torch.tensor([0, 300]), torch.tensor([0, edges.shape[1]]), y=label, level="node"
    )
    target = Target("classification", ("c",), ("a", "b", "c"))
    task, found = None, []
    for loading in (Loading(), Loading(batch_size=7, fanouts=[-1, -1, -1])):
        data = GraphData.of(graphs, target, parts(300), loading=loading)
        task = task or GraphTask.of(data, "kipf_gcn", arguments={"dropout": 0.0}).eval()
        trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False)
        found += trainer.validate(task, datamodule=data, verbose=False)
    assert found[0] == pytest.approx(found[1], rel=1e-5)
    fit(task, data, 2)
    assert task is not None


@pytest.mark.filterwarnings("ignore")
def test_a_rate_falls_with_the_figure() -> None:
    data = make_data("graph", "regression", loading=Loading(batch_size=32))
    optimizer = Optimizer(learning_rate=0.1, schedule="constant", warmup_steps=0, kind="adam")
    task = GraphTask.of(
        data, "gcn", arguments=dict(SMALL), optimizer=optimizer, plateau=Plateau(1, 0.01, 0.01)
    )
    trainer = fit(task, data, 60)
    assert 2 < trainer.current_epoch < 60
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(1e-3)


@pytest.mark.parametrize(
    "name", ["graph_transformer", "gps", "urpe", "gcn", "gine", "res_gated", "gated_gcn"]
)
@pytest.mark.parametrize("level", ["graph", "node"])
def test_every_model_of_any_size_takes_what_the_data_have(name: str, level: str) -> None:
    distances = 6 if name == "urpe" else 0
    encoding = Encodings("random_walk", 4, distances=distances)
    data = make_data(level, "multilabel", encoding=encoding, loading=Loading(batch_size=16))
    task = GraphTask.of(data, name, arguments={"hidden_dim": 32, "L": 1})
    batch = next(iter(data.train_dataloader()))
    loss = task.criterion(task(batch), batch["target"])
    loss.backward()
    assert loss.isfinite()
    readout = "node" if level == "node" else None
    assert task.builder_arguments.get("readout") == readout
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in task.model.parameters())


MOLECULES: dict[str, int | list[int] | None] = {"node_types": [28], "edge_types": [4], "outputs": 1}


def test_what_a_builder_gets() -> None:
    assert recipe("gine", {"L": 3}, {**MOLECULES, "encoding_dim": 8}, "node") == {
        "node_types": [28],
        "edge_types": [4],
        "encoding_dim": 8,
        "outputs": 1,
        "readout": "node",
        "L": 3,
    }
    assert recipe("graph_transformer_zinc", {}, {**MOLECULES, "encoding_dim": 8}, "graph") == {
        "encoding_dim": 8
    }
    bare = recipe("graph_transformer", {"edges": False}, MOLECULES, "graph")
    assert "edge_types" not in bare


@pytest.mark.parametrize(
    ("name", "arguments", "inputs", "says"),
    [
        ("gine", {"outputs": 3}, {}, "model.arguments.outputs is decided by the data"),
        ("gine", {"readout": "node"}, {}, "readout must be mean, sum or max"),
        ("kipf_gcn", {}, {"encoding_dim": 4}, r"set data\.encoding\.kind: none"),
        ("gine", {}, {"roles": 4}, r"set data\.encoding\.roles: 0"),
        ("urpe", {}, {}, r"set data\.encoding\.distances"),
        ("dlinear", {}, {}, "is for forecast, not for graphs"),
        ("gin", {}, {}, "'gine'"),
    ],
)
def test_what_does_not_go_together_is_refused(
    name: str, arguments: dict[str, int], inputs: dict[str, int], says: str
) -> None:
    with pytest.raises(UsageError, match=says):
        recipe(name, arguments, {**MOLECULES, **inputs}, "graph")


@pytest.mark.filterwarnings("ignore")
def test_a_model_of_other_data_is_refused() -> None:
    data = make_data("graph", "regression", encoding=Encodings("laplacian", 8))
    with pytest.raises(UsageError, match=r"made for node_types \[28\], the data have \[4\]"):
        GraphTask.of(data, "graph_transformer_zinc")
    inputs: dict[str, int | list[int] | None] = {"node_features": 3, "outputs": 2}
    task = GraphTask(inputs, "graph", "regression", "kipf_gcn")
    graphs, target = some_graphs("graph", "regression")
    features = GraphSet(
        torch.rand(graphs.x.shape[0], 3), graphs.edge_index, graphs.nodes, graphs.edges, y=graphs.y
    )
    with pytest.raises(UsageError, match=r"kipf_gcn gives .* choose another model"):
        fit(task, GraphData.of(features, target, parts(len(graphs))), 1)


@pytest.mark.filterwarnings("ignore")
def test_a_validation_part_without_a_figure_is_refused() -> None:
    graphs, target = some_graphs("graph", "multilabel")
    assert graphs.y is not None
    rows = parts(len(graphs))["val"]
    graphs.y[rows] = torch.where(graphs.y[rows].isnan(), math.nan, 1.0)
    data = GraphData.of(graphs, target, parts(len(graphs)))
    with pytest.raises(DataError, match="val_roc_auc cannot be had"):
        fit(GraphTask.of(data, "gcn", arguments=dict(SMALL)), data, 1)


def test_what_the_best_epoch_is_chosen_by() -> None:
    def monitor(kind: Kind, **options: object) -> tuple[str, str]:
        return GraphTask(dict(MOLECULES), "graph", kind, "gine", **options).monitor  # type: ignore[arg-type]

    assert monitor("regression") == ("val_mae", "min")
    assert monitor("regression", loss=Loss("mse")) == ("val_rmse", "min")
    assert monitor("classification") == ("val_accuracy", "max")
    assert monitor("multilabel") == ("val_roc_auc", "max")
    assert monitor("multilabel", best_by="loss") == ("val_loss", "min")


@pytest.mark.filterwarnings("ignore")
def test_torch_geometrics_graphs_train_with_lightnings_trainer() -> None:
    """Rings and paths: only in a ring have all nodes two neighbours."""

    def one(i: int) -> Data:
        size = 4 + i % 5
        edges = torch.stack([torch.arange(size - i % 2), torch.arange(1, size + 1 - i % 2) % size])
        both = torch.cat([edges, edges.flip(0)], 1)
        return Data(x=torch.ones(size, 2), edge_index=both, y=torch.tensor([i % 2]))

    data = GraphData.from_torch_geometric(
        [one(i) for i in range(60)],
        "classification",
        Split("folds", folds=4),
        encoding=Encodings("degree", 4),
        loading=Loading(batch_size=10),
    )
    task = GraphTask.of(data, "gine", arguments=dict(SMALL), optimizer=Optimizer(0.01, warmup_steps=2))
    trainer = fit(task, data, 25)
    (found,) = trainer.test(task, datamodule=data, verbose=False)
    assert found["test_accuracy"] == 1.0
