"""One row explained: which number of the model, what adds to it, as tables and as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from manyheads.core.errors import UsageError, did_you_mean
from manyheads.graph import explain, pictures
from manyheads.graph.attributions import Attributions, Baseline, integrated_gradients
from manyheads.graph.preprocessing import Preprocessing, Target
from manyheads.graph.views import View, hops_from

if TYPE_CHECKING:
    import pandas as pd

FEATURES = 100  # the largest of a row that are in its table
DRAWN, HOPS = 40, 2  # nodes in a picture at most, and how far from the row's own


@dataclass(frozen=True)
class Asked:
    """The number that is explained.

    Args:
        name: The target's or the class' name.
        column: The model's output.
        target: What the model predicts.
    """

    name: str
    column: int
    target: Target

    @property
    def unit(self) -> str:
        """What it is, beside its name."""
        return "" if self.target.kind == "regression" else "log-odds of "

    def score(self, outputs: Tensor) -> Tensor:
        """From outputs `[..., outputs]` to the number: in the data's units, or log-odds."""
        of, column = self.target, outputs[..., self.column]
        if of.kind == "classification":
            others = torch.cat([outputs[..., : self.column], outputs[..., self.column + 1 :]], -1)
            return column - others.logsumexp(-1)
        if of.mean is not None and of.std is not None:
            return column * of.std[self.column] + of.mean[self.column]
        return column


def ask(target: Target, output: Tensor, wanted: str | None) -> Asked:
    """Return the number to explain: by its name, or the only one, or the likeliest class'.

    Args:
        target: What the model predicts.
        output: A row of its outputs.
        wanted: The target's or the class' name.

    Raises:
        UsageError: There is none of this name, or several and no name.
    """
    names = target.names if target.classes is None else target.classes
    if wanted is not None:
        if wanted not in names:
            what = "target" if target.classes is None else "class"
            raise UsageError(f"--target: the model has no {what} {wanted!r}{did_you_mean(wanted, names)}")
        return Asked(wanted, names.index(wanted), target)
    if target.classes is None and len(names) > 1:
        raise UsageError(
            f"the model predicts {len(names)} targets: name one by --target ({', '.join(names)})"
        )
    column = 0 if target.classes is None else int(output.argmax())
    return Asked(names[column], column, target)


@dataclass(frozen=True)
class Explained:
    """A row, and what was found of it.

    Args:
        view: The row and its graph.
        asked: The number that is explained; None where only attention was asked for.
        found: What adds to it.
        attention: Of the row's graph; None where the model has none, or it was not asked for.
    """

    view: View
    asked: Asked | None = None
    found: Attributions | None = None
    attention: explain.Attention | None = None

    def summary(self) -> dict[str, Any]:
        """The row's line: what is predicted, from what, and what nodes and edges add up to."""
        if self.found is None or self.asked is None:
            return {"id": self.view.id}
        found = self.found
        return {
            "id": self.view.id,
            "target": self.asked.name,
            "prediction": found.value,
            "start": found.start,
            "baseline": found.baseline,
            "nodes": float(found.nodes.sum()),
            "edges": None if found.edges is None else float(found.edges.sum()),
            "error": found.error,
            "steps": found.steps,
            "complete": found.complete,
        }

    def nodes(self) -> pd.DataFrame:
        """What each node adds: `id, node, attribution`, and of molecules `atom`."""
        import pandas as pd

        assert self.found is not None
        parts: dict[str, Any] = {"id": self.view.id, "node": self._names()}
        if self.view.molecule is not None:
            parts["atom"] = [atom.GetSymbol() for atom in self.view.molecule.GetAtoms()]
        return pd.DataFrame(parts | {"attribution": self.found.nodes.numpy()})

    def edges(self) -> pd.DataFrame | None:
        """What each edge adds: `id, source, target, attribution`; None where edges are nothing but there."""
        import pandas as pd

        if self.found is None or self.found.edges is None:
            return None
        source, target = (self._names()[ends] for ends in self.view.graphs.edge_index.numpy())
        parts: dict[str, Any] = {"id": self.view.id, "source": source, "target": target}
        return pd.DataFrame(parts | {"attribution": self.found.edges.numpy()})

    def features(self, names: Sequence[str]) -> pd.DataFrame | None:
        """The largest of what each feature of each node adds: `id, node, feature, attribution`.

        Args:
            names: The features'.
        """
        import pandas as pd

        if self.found is None or self.found.features is None:
            return None
        flat = self.found.features.flatten()
        largest = flat.abs().argsort(descending=True, stable=True)[:FEATURES]
        kept = largest[flat[largest] != 0].numpy()
        node, feature = np.divmod(kept, self.found.features.shape[1])
        parts = {"id": self.view.id, "node": self._names()[node]}
        parts["feature"] = np.asarray(names, dtype=object)[feature]
        return pd.DataFrame(parts | {"attribution": flat.numpy()[kept]})

    def weights(self, *, each: bool) -> pd.DataFrame | None:
        """The attention: as `explain.table`; the id is empty where the graph is of several rows."""
        view = self.view
        if self.attention is None:
            return None
        ids = ["" if view.shared else view.id]
        return explain.table(self.attention, view.graphs, ids, view.names, each=each)

    def draw(self, path: Path) -> None:
        """Draw the molecule, or the graph as far as it is near the row's nodes."""
        if self.view.molecule is not None:
            numbers, signed = self._edge_numbers(self.view.graphs.edge_index.shape[1])
            bonds = None if numbers is None else _both_ways(numbers, signed)
            shown = self._shown(None if self.found is None else self.found.nodes.numpy(), bonds, signed)
            pictures.draw_molecule(self.view.molecule, shown, path)
            return
        self._draw_graph(path)

    def _draw_graph(self, path: Path) -> None:
        view = self.view
        edge_index = view.graphs.edge_index.long()
        kept = self._near(edge_index)
        place = torch.full((view.graphs.nodes,), -1).index_copy(0, kept, torch.arange(len(kept)))
        inside = ((place[edge_index] >= 0).all(0) & (edge_index[0] != edge_index[1])).nonzero()[:, 0]
        ends = place[edge_index[:, inside]].sort(0).values  # one line for both directions
        lines, line = torch.unique(ends, dim=1, return_inverse=True)
        numbers, signed = self._edge_numbers(edge_index.shape[1])
        values = None
        if numbers is not None:
            chosen = torch.from_numpy(numbers)[inside].double()
            total = torch.zeros(lines.shape[1], dtype=torch.float64).index_add(0, line, chosen)
            count = torch.bincount(line, minlength=lines.shape[1]).clamp(min=1)
            values = (total if signed else total / count).numpy()
        nodes = None if self.found is None else self.found.nodes[kept].numpy()
        about = [int(i) for i in place[list(view.about)]] if view.about else []
        names = [str(name) for name in self._names()[kept.numpy()]]
        cut = "" if len(kept) == view.graphs.nodes else f"; {len(kept)} of {view.graphs.nodes} nodes"
        shown = self._shown(nodes, values, signed, names, cut)
        pictures.draw_graph(lines.numpy(), about, shown, path)

    def _near(self, edge_index: Tensor) -> Tensor:
        """The nodes to draw: the row's own, and of those near it the ones that add most."""
        view = self.view
        steps = torch.zeros(view.graphs.nodes, dtype=torch.int64)
        if view.about:
            steps = hops_from(edge_index, view.graphs.nodes, view.about, HOPS)
        size = torch.zeros(view.graphs.nodes) if self.found is None else self.found.nodes.abs()
        if self.found is None and self.attention is not None and view.about:
            size = size.index_add(0, self.attention.edge_index[0], self.attention.mean())
        order = (steps > 0).double() - size.double() / (2 * float(size.max()) or 1.0)
        near = (steps <= HOPS).nonzero()[:, 0]
        return near[order[near].argsort(stable=True)][:DRAWN].sort().values

    def _edge_numbers(self, edges: int) -> tuple[np.ndarray[Any, Any] | None, bool]:
        """Numbers of the graph's edges: attention along them, else attributions, which have a sign."""
        if self.attention is not None and self.attention.of == "edges":
            return self.attention.mean().float().numpy(), False
        if self.found is not None and self.found.edges is not None:
            return self.found.edges.numpy(), True
        return None, False

    def _shown(
        self,
        nodes: Any,
        edges: Any,
        signed: bool,
        names: Sequence[str] = (),
        more: str = "",
    ) -> pictures.Shown:
        molecule = self.view.molecule is not None
        node, edge = ("atom", "bond") if molecule else ("node", "edge")
        text = "attention, mean of layers and heads"
        if self.found is not None and self.asked is not None:
            about = self.summary()
            text = f"{self.asked.unit}{self.asked.name}: {about['prediction']:.3g}"
            text += f" = {about['baseline']:.3g} (baseline: {about['start']}) {about['nodes']:+.3g} ({node}s)"
            text += "" if about["edges"] is None else f" {about['edges']:+.3g} ({edge}s)"
        title = self.view.id
        if molecule:
            from rdkit import Chem

            smiles = Chem.MolToSmiles(self.view.molecule)
            title = smiles if title == smiles else f"{title}   {smiles}"
        label = f"attribution of the {edge}" if signed else f"attention along the {edge}"
        return pictures.Shown(
            title, text + more, nodes, edges, signed, f"attribution of the {node}", label, names
        )

    def _names(self) -> np.ndarray[Any, Any]:
        names = self.view.names
        if names is None:
            return np.arange(self.view.graphs.nodes)
        return np.asarray(names, dtype=object)


def _both_ways(numbers: np.ndarray[Any, Any], signed: bool) -> np.ndarray[Any, Any]:
    """From a molecule's edges, a bond's two directions one after the other, to its bonds."""
    total = numbers[0::2] + numbers[1::2]
    return total if signed else total / 2


def explain_row(
    model: nn.Module, of: Preprocessing, view: View, target: str | None, baseline: Baseline | None = None
) -> tuple[Asked, Attributions]:
    """Share a row's prediction out; arguments as `ask` and `integrated_gradients`.

    Without a baseline features begin at zero, and categories at the graph's average: what a model gives for
    embeddings of zero, which no training has shown it, may be far from anything.
    """
    if baseline is None:
        baseline = "zero" if view.graphs.x.is_floating_point() else "mean"
    with torch.no_grad():
        output = model(view.graphs)[view.row]
    asked = ask(of.target, output, target)
    found = integrated_gradients(
        model, view.graphs, lambda outputs: asked.score(outputs[:, view.row]), baseline=baseline
    )
    return asked, found


def feature_names(of: Preprocessing) -> list[str]:
    """Return the names of a node's features, as tables' columns become them."""
    found = []
    for column in of.node_columns:
        if column.categories is not None:
            found += [f"{column.name}={each}" for each in column.categories] + [f"{column.name}=other"]
        else:
            found += [column.name] if column.size == 1 else [f"{column.name}_{i}" for i in range(column.size)]
    return found
