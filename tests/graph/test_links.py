"""Links: what is asked for is not seen, pairs without an edge have none, and each draw is decided."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torchmetrics.functional.classification import binary_auroc

from manyheads.core.errors import DataError, UsageError
from manyheads.core.optimization import Optimizer
from manyheads.graph.collection import GraphSet
from manyheads.graph.data import Encodings, GraphData, Links, Loading, Split
from manyheads.graph.encodings import laplacian
from manyheads.graph.graphs import Graphs
from manyheads.graph.link_parts import Asked, LinkSet, without
from manyheads.graph.links import Joined, divide, ranking
from manyheads.graph.parts import GraphBatch
from manyheads.graph.task import GraphTask

FRACTIONS = (0.7, 0.1, 0.2)
SPLIT = Split(fractions=FRACTIONS)
PARTS = ("train", "val", "test")


def network(nodes: int = 60, edges: int = 240, seed: int = 0, *, directed: bool = False) -> Tensor:
    """Random edges: some twice, some loops, both directions where there are none."""
    draw = torch.Generator().manual_seed(seed)
    once = torch.randint(0, nodes, (2, edges), generator=draw)
    once = torch.cat([once, once[:, :20], torch.arange(3).expand(2, 3)], 1)
    found = once if directed else torch.cat([once, once.flip(0)], 1)
    return found[:, torch.randperm(found.shape[1], generator=draw)]


def graph_set(edge_index: Tensor, nodes: int = 60) -> GraphSet:
    draw = torch.Generator().manual_seed(1)
    bounds = (torch.tensor([0, nodes]), torch.tensor([0, edge_index.shape[1]]))
    kinds = torch.arange(edge_index.shape[1]) % 3
    return GraphSet(torch.randn(nodes, 5, generator=draw), edge_index, *bounds, kinds)


def pairs_in(edge_index: Tensor, *, directed: bool = False) -> set[tuple[int, ...]]:
    rows = edge_index.T.tolist()
    return {tuple(row) if directed else tuple(sorted(row)) for row in rows if row[0] != row[1]}


def data(hidden: float = 0.0, fanouts: list[int] | None = None, **more: Any) -> GraphData:
    loading = Loading(batch_size=16, fanouts=fanouts)
    return GraphData.of_links(graph_set(network()), SPLIT, Links(hidden, 7), loading=loading, **more)


def batches(of: GraphData, part: Any, epoch: int = 0) -> list[GraphBatch]:
    loader = {"train": of.train_dataloader, "val": of.val_dataloader, "test": of.test_dataloader}[part]()
    loader.sampler.set_epoch(epoch)
    return list(loader)


@pytest.mark.parametrize("directed", [False, True])
def test_edges_are_divided_whole(directed: bool) -> None:
    edge_index = network(directed=directed)
    joined = Joined.of(edge_index, 60, directed)
    found = divide(edge_index, joined, FRACTIONS, seed=3)
    every = pairs_in(edge_index, directed=directed)
    parts = {name: pairs_in(found.parts[name], directed=directed) for name in PARTS}  # type: ignore[index]
    assert set().union(*parts.values()) == every
    assert sum(map(len, parts.values())) == len(every) == len(joined.keys)
    assert [len(parts[name]) for name in ("val", "test")] == [round(s * len(every)) for s in FRACTIONS[1:]]
    seen = edge_index[:, found.seen]
    assert pairs_in(seen, directed=directed) == parts["train"]
    assert int((seen[0] == seen[1]).sum()) == int((edge_index[0] == edge_index[1]).sum()) >= 3
    again, other = (divide(edge_index, joined, FRACTIONS, seed).parts["test"] for seed in (3, 4))
    assert torch.equal(again, found.parts["test"])
    assert not torch.equal(other, found.parts["test"])


@pytest.mark.parametrize("directed", [False, True])
def test_pairs_without_an_edge_have_none_and_are_drawn_evenly(directed: bool) -> None:
    nodes = 12
    edge_index = network(nodes, 30, directed=directed)
    joined, edges = Joined.of(edge_index, nodes, directed), pairs_in(edge_index, directed=directed)
    every = [(a, b) for a in range(nodes) for b in range(nodes) if a != b and (directed or a < b)]
    absent = [pair for pair in every if pair not in edges]
    assert 10 < len(absent) < len(every)
    assert all((pair in joined) == (pair in edges) for pair in every)
    draws = 20_000
    found = joined.absent(draws, (0, 1))
    kept = [tuple(row) if directed else tuple(sorted(row)) for row in found.T.tolist()]
    counts = np.array([kept.count(pair) for pair in absent])
    assert counts.sum() == draws
    wanted = draws / len(absent)
    assert float(((counts - wanted) ** 2 / wanted).sum()) < len(absent) + 5 * (2 * len(absent)) ** 0.5
    assert torch.equal(found, joined.absent(draws, (0, 1)))
    assert not torch.equal(found, joined.absent(draws, (0, 2)))


def test_pairs_at_a_node_begin_there() -> None:
    joined = Joined.of(network(), 60)
    ends = torch.tensor([5, 9, 5])
    found = joined.absent_at(ends, 40, (1,))
    assert found[0].tolist() == [5] * 40 + [9] * 40 + [5] * 40
    assert not bool(joined.has(found).any())
    assert not bool((found[0] == found[1]).any())
    assert len(set(found[1, :40].tolist())) > 20


def test_a_graph_without_such_pairs_is_refused() -> None:
    full = torch.combinations(torch.arange(6)).T
    with pytest.raises(DataError, match="no pairs of nodes without an edge"):
        Joined.of(full, 6).absent(3, (0,))
    with pytest.raises(DataError, match="3 edges are too few"):
        divide(full[:, :3], Joined.of(full[:, :3], 6), FRACTIONS, 0)


@pytest.mark.parametrize("fanouts", [None, [4, 3], [-1, -1]])
@pytest.mark.parametrize("hidden", [0.0, 0.4])
def test_no_edge_of_validation_or_test_is_ever_seen(hidden: float, fanouts: list[int] | None) -> None:
    of = data(hidden, fanouts)
    of.setup()
    assert of._link_set is not None
    held = pairs_in(torch.cat([of._link_set.parts["val"], of._link_set.parts["test"]], 1))
    asked_for: dict[str, set[tuple[int, ...]]] = {}
    for part in PARTS:
        asked_for[part] = set()
        for epoch in range(3 if part == "train" else 1):
            for batch in batches(of, part, epoch):
                graphs = batch["graphs"]
                assert graphs.pairs is not None
                assert graphs.edge_attr is not None
                assert len(graphs.edge_attr) == graphs.edge_index.shape[1]
                # back to the whole graph's numbers, by features that no two nodes share
                same = (graphs.x[:, None] == of.graphs.x).all(-1)
                number = same.long().argmax(1)
                assert bool(same.any(1).all())
                seen = pairs_in(number[graphs.edge_index])
                pairs, target = number[graphs.pairs], batch["target"][:, 0]
                edges, others = pairs_in(pairs[:, target == 1]), pairs[:, target != 1]
                assert not seen & held
                assert not bool(of._link_set.joined.has(others).any())
                assert bool(of._link_set.joined.has(pairs[:, target == 1]).all())
                if part == "train" and (hidden or fanouts):
                    assert not seen & edges
                asked_for[part] |= edges
    every = pairs_in(of._link_set.joined.pairs)
    assert asked_for["val"] | asked_for["test"] == held
    assert asked_for["train"] <= every - held
    assert len(asked_for["train"]) >= (0.7 if hidden and not fanouts else 1.0) * len(every - held)


def test_encodings_know_of_seen_edges_alone() -> None:
    of = data(encoding=Encodings("laplacian", 3))
    of.setup()
    seen, nodes = of.graphs.edge_index, torch.tensor([0, 60])
    assert of.graphs.encoding is not None
    torch.testing.assert_close(of.graphs.encoding, laplacian(seen, nodes, 3))
    assert not torch.allclose(of.graphs.encoding, laplacian(network(), nodes, 3), atol=1e-2)


@pytest.mark.parametrize("fanouts", [None, [-1, -1, -1]])
def test_rows_are_laid_out_as_they_are_named(fanouts: list[int] | None) -> None:
    of = data(fanouts=fanouts)
    parts = batches(of, "test")
    count = of._link_set.parts["test"].shape[1]  # type: ignore[union-attr]
    index = torch.cat([batch["index"] for batch in parts])
    order = index.argsort()
    assert index[order].tolist() == list(range(count * (2 + 7)))
    target = torch.cat([batch["target"] for batch in parts])[order]
    torch.testing.assert_close(target[: 2 * count], of.targets("test"))
    assert bool(target[2 * count :].isnan().all())
    named = of.ids("test")
    pairs = torch.cat(
        [(b["graphs"].x[:, None] == of.graphs.x).all(-1).long().argmax(1)[b["graphs"].pairs] for b in parts],
        1,
    )[:, order]
    assert named == [f"{a} - {b}" for a, b in pairs[:, : 2 * count].T.tolist()]
    first = pairs[0, 2 * count :].view(count, 7)
    assert bool((first == pairs[0, :count, None]).all())
    if fanouts is None:
        assert len(parts) == 1


def test_epochs_and_batches_draw_others_and_the_same_again() -> None:
    def drawn(epoch: int, fanouts: list[int] | None) -> list[list[int]]:
        found = batches(data(0.3, fanouts), "train", epoch)
        return [batch["graphs"].pairs.flatten().tolist() for batch in found]  # type: ignore[union-attr]

    for fanouts in (None, [3]):
        assert drawn(1, fanouts) == drawn(1, fanouts)
        assert drawn(1, fanouts) != drawn(2, fanouts)


def test_edges_are_taken_out_in_both_directions() -> None:
    edge_index = torch.tensor([[0, 1, 1, 2, 0, 0], [1, 0, 2, 1, 1, 0]])
    starts = torch.tensor([0, 3], dtype=torch.int32)
    graphs = Graphs(torch.zeros(3, 1), edge_index, starts, torch.arange(6))
    left = without(graphs, torch.tensor([[1], [0]]), directed=False)
    assert left.edge_index.T.tolist() == [[1, 2], [2, 1], [0, 0]]
    assert left.edge_attr.tolist() == [2, 3, 5]  # type: ignore[union-attr]
    one_way = without(graphs, torch.tensor([[1], [0]]), directed=True)
    assert one_way.edge_attr.tolist() == [0, 2, 3, 4, 5]  # type: ignore[union-attr]


def test_ranks_count_ties_half() -> None:
    scores = torch.tensor([3.0, 1.0, 0.0, 0.0, 2.0, 1.0, 3.0, 1.0, 1.0, 5.0])
    target = torch.tensor([1.0, 1.0, 0.0, 0.0, *[float("nan")] * 6])
    found = ranking(scores, target)
    ranks = [1 + 0.5, 1 + 1 + 2 / 2]  # 3 among 2, 1, 3; 1 among 1, 1, 5
    assert found["sampled_mrr"] == pytest.approx(sum(1 / rank for rank in ranks) / 2)
    assert found["sampled_hits_1"] == 0
    assert found["sampled_hits_10"] == 1
    assert ranking(scores[:4], target[:4]) == {}


def test_a_model_learns_which_nodes_are_joined(tmp_path: Any) -> None:
    """Two groups, edges within them alone: pairs within a group rank above others."""
    from lightning.pytorch import Trainer, seed_everything

    draw = torch.Generator().manual_seed(0)
    once = torch.randint(0, 80, (2, 400), generator=draw)
    once[1] += (once[0] - once[1]) % 2  # ends of an edge are both even, or both odd
    once = once[:, (once[0] != once[1]) & (once.max(0).values < 80)]
    graphs = graph_set(torch.cat([once, once.flip(0)], 1), 80)
    x = torch.randn(80, 4, generator=draw) + 0.5 * (torch.arange(80)[:, None] % 2)
    graphs = GraphSet(x, graphs.edge_index, graphs.nodes, graphs.edges)
    seed_everything(0)
    of = GraphData.of_links(graphs, SPLIT, Links(0.3, 20))
    task = GraphTask.of(
        of, "gcn", arguments={"hidden_dim": 16, "L": 2}, optimizer=Optimizer(0.01, warmup_steps=0)
    )
    assert task.monitor == ("val_roc_auc", "max")
    trainer = Trainer(
        max_epochs=60, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tmp_path, accelerator="cpu",
    )  # fmt: skip
    trainer.fit(task, datamodule=of)
    found = trainer.test(task, datamodule=of, verbose=False)[0]
    names = {
        "loss",
        "roc_auc",
        "average_precision",
        "sampled_mrr",
        "sampled_hits_1",
        "sampled_hits_10",
        "rows",
    }
    assert found.keys() == {f"test_{name}" for name in names}
    assert found["test_roc_auc"] > 0.75
    (batch,) = batches(of, "test")
    with torch.no_grad():
        scores, target = task.eval()(batch)[:, 0], batch["target"][:, 0]
    known = ~target.isnan()
    assert found["test_rows"] == int(known.sum())
    assert found["test_roc_auc"] == pytest.approx(float(binary_auroc(scores[known], target[known].long())))
    assert found["test_sampled_mrr"] == pytest.approx(ranking(scores, target)["sampled_mrr"])
    lines = task.report(tmp_path)
    assert any("edge" in line for line in lines)
    rows = (tmp_path / "rows.csv").read_text().splitlines()
    assert len(rows) == 1 + int(known.sum())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda: Links(hidden=1.0), "links.hidden must be from 0 to below 1"),
        (lambda: Links(negatives=-1), "links.negatives must be 0 or more"),
        (
            lambda: LinkSet.of(GraphSet.join([graph_set(network())] * 2), SPLIT, False),
            "pairs are predicted of the nodes of one graph, and there are 2",
        ),
        (
            lambda: LinkSet.of(graph_set(network()), Split("scaffold"), False),
            "split.kind 'scaffold' is not for them",
        ),
    ],
)
def test_wrong_options_are_refused(change: Callable[[], object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        change()


def test_an_edge_keeps_its_pairs_whatever_the_batch() -> None:
    joined = Joined.of(network(), 60)
    asked = Asked(joined.pairs[:, :30], joined, (0, 1), 4)
    whole, _, rows = asked(torch.arange(30))
    part, _, own = asked(torch.tensor([7, 21]))
    assert torch.equal(part, whole[:, (rows[:, None] == own).long().argmax(0)])
