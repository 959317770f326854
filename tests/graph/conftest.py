"""What the tests of the graph room share: recorded cases, and batches of small graphs."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from manyheads.graph.graphs import Graphs

FOLDER = Path(__file__).parents[1] / "golden" / "graph"
EXACT = {"output": (1e-6, 1e-6), "grad": (1e-6, 1e-6)}  # of float64: absolute, relative
# Of float32, as the files say: outputs, and gradients of parameters and inputs
SINGLE = {"output": (1e-5, 1e-4), "grad": (2e-3, 2e-3)}


@dataclass(frozen=True)
class Recorded:
    """Tensors recorded from published code, in the dtype that a test asks for."""

    about: dict[str, Any]
    tensors: dict[str, Tensor]
    dtype: torch.dtype

    def group(self, prefix: str) -> dict[str, Tensor]:
        """The tensors whose name begins so, by the rest of their names."""
        return {k.removeprefix(prefix): v for k, v in self.tensors.items() if k.startswith(prefix)}

    def inputs(self) -> dict[str, Tensor]:
        """The inputs; those with a recorded gradient require one."""
        found = self.group("input.")
        return {k: v.clone().requires_grad_(f"grad_input.{k}" in self.tensors) for k, v in found.items()}

    def starts(self) -> Tensor:
        """The bounds of the graphs, from the nodes of each or from each node's graph."""
        sizes = self.tensors.get("input.batch_num_nodes")
        sizes = torch.bincount(self.tensors["input.batch"]) if sizes is None else sizes
        return bounds(sizes.tolist())

    def load(self, model: nn.Module, rename: Callable[[str], str] = lambda key: key) -> nn.Module:
        """Load the parameters, strictly; in the mode of the case."""
        model.load_state_dict({rename(k): v for k, v in self.group("param.").items()}, strict=True)
        return model.to(self.dtype).train(self.about["mode"] == "train")

    def check(
        self,
        outputs: dict[str, Tensor],
        inputs: dict[str, Tensor],
        model: nn.Module,
        rename: Callable[[str], str] = lambda key: key,
    ) -> None:
        """Compare outputs, all gradients and the buffers after the run, with nothing left over.

        `rename` turns recorded names into the model's.
        """
        wanted = {k: v for k, v in self.group("output.").items() if not k.startswith("after.")}
        self.same(outputs, wanted, "output")
        after = {rename(k): v for k, v in self.group("output.after.").items()}
        if after:
            buffers = {k: v for k, v in model.state_dict().items() if k in after}
            self.same({k: v.to(self.dtype) for k, v in buffers.items()}, after, "output")
        cotangents = self.group("cotangent.")
        if not any(key.startswith("grad") for key in self.tensors):
            return  # a case without finite gradients
        sum((outputs[k] * v).sum() for k, v in cotangents.items()).backward()  # type: ignore[union-attr]
        wanted = {rename(k): v for k, v in self.group("grad.").items()}
        # the last layer's edge states are never used: neither has a gradient of what makes them
        reached = {k: p.grad for k, p in model.named_parameters() if p.grad is not None}
        self.same(reached, wanted, "grad")
        given = {k: x.grad for k, x in inputs.items() if x.requires_grad}
        self.same(given, self.group("grad_input."), "grad")  # type: ignore[arg-type]

    def same(self, found: dict[str, Tensor], wanted: dict[str, Tensor], kind: str) -> None:
        """Compare tensors by name."""
        absolute, relative = (EXACT if self.dtype == torch.float64 else SINGLE)[kind]
        assert found.keys() == wanted.keys()
        for key, want in wanted.items():
            have = found[key]
            assert have is not None, key
            torch.testing.assert_close(
                have.detach(), want.to(have.dtype), atol=absolute, rtol=relative, equal_nan=True,
                msg=lambda text, key=key: f"{key}: {text}",
            )  # fmt: skip


def recorded(name: str, dtype: torch.dtype = torch.float64) -> Recorded:
    about = json.loads((FOLDER / f"{name}_a.json").read_text())
    path = FOLDER / f"{name}_a.safetensors"
    tensors = {
        k: v.to(dtype) if v.is_floating_point() else v for k, v in load_file(path).items()
    }  # fmt: skip
    return Recorded(about, tensors, dtype)


def bounds(sizes: list[int]) -> Tensor:
    return torch.tensor([0, *sizes]).cumsum(0).int()


def random_graphs(
    sizes: list[int], *, edges: int = 3, edge_types: int = 4, encoding: int = 0, seed: int = 0
) -> Graphs:
    """Random graphs with atoms below 28 and undirected edges; a graph of one node has none."""
    draw = torch.Generator().manual_seed(seed)
    found, starts = [torch.zeros(2, 0, dtype=torch.int64)], bounds(sizes)
    for size, first in zip(sizes, starts.tolist(), strict=False):
        if size > 1:
            pairs = torch.randint(0, size, (2, edges * size), generator=draw)
            pairs = pairs[:, pairs[0] < pairs[1]].unique(dim=1) + first
            found.append(torch.cat([pairs, pairs.flip(0)], 1))
    edge_index = torch.cat(found, 1)
    nodes = int(starts[-1])
    return Graphs(
        torch.randint(0, 28, (nodes,), generator=draw),
        edge_index,
        starts,
        torch.randint(0, edge_types, edge_index.shape[1:], generator=draw),
        torch.randn(nodes, encoding, generator=draw) if encoding else None,
    )


def split(graphs: Graphs) -> list[Graphs]:
    """The graphs of a batch, one by one; without distances and pairs."""
    found = []
    for first, last in zip(graphs.starts.tolist(), graphs.starts[1:].tolist(), strict=False):
        own = (graphs.edge_index[0] >= first) & (graphs.edge_index[0] < last)
        rows = slice(first, last)
        found.append(
            Graphs(
                graphs.x[rows],
                graphs.edge_index[:, own] - first,
                bounds([last - first]),
                None if graphs.edge_attr is None else graphs.edge_attr[own],
                None if graphs.encoding is None else graphs.encoding[rows],
                None if graphs.roles is None else graphs.roles[rows],
            )
        )
    return found


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tensors here are small: on a busy machine threads wait for each other longer than they work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(name="recorded")
def recorded_cases() -> Callable[..., Recorded]:
    """Load a recorded case by name and dtype."""
    return recorded


@pytest.fixture(name="random_graphs")
def batches_of_random_graphs() -> Callable[..., Graphs]:
    """Make a batch of random graphs of these sizes."""
    return random_graphs


@pytest.fixture(name="split")
def graphs_one_by_one() -> Callable[[Graphs], list[Graphs]]:
    """Cut a batch into its graphs."""
    return split
