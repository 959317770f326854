"""The graph models. Data only: importing this imports no torch."""

from __future__ import annotations

from manyheads.core.catalog import Entry, Task

TASK = "graph"
TASKS: tuple[Task, ...] = (
    Task(
        name=TASK,
        summary="numbers or classes of whole graphs, of nodes, or of pairs of nodes",
        training="manyheads.graph.task:GraphTask",
        data="manyheads.graph.data:GraphData",
        predictor="manyheads.graph.predictor:Predictor",
    ),
)


def _row(
    name: str, builder: str, paper: str, licence: str, summary: str, variant: str | None = None
) -> Entry:
    return Entry(
        name=name,
        domain="graph",
        task=TASK,
        builder=f"manyheads.graph.models.{builder}",
        paper=paper,
        licence=licence,
        summary=summary,
        variant=variant,
    )


def _transformers(rows: dict[str, str]) -> tuple[Entry, ...]:
    module = "graph_transformer"
    return tuple(
        _row(name, f"{module}:{name}", "arXiv 2012.09699", "MIT", summary) for name, summary in rows.items()
    )


def _messages(rows: dict[str, tuple[str, str]]) -> tuple[Entry, ...]:
    return tuple(
        _row(name, "message_passing:message_passing", paper, "MIT", summary, variant=name)
        for name, (paper, summary) in rows.items()
    )


MODELS: tuple[Entry, ...] = (
    *_transformers(
        {
            "graph_transformer_zinc": "Graph Transformer of ZINC, 588,929 parameters: nodes and bonds",
            "graph_transformer_pattern": "Graph Transformer of PATTERN, 522,982 parameters: nodes alone",
            "graph_transformer_cluster": "Graph Transformer of CLUSTER, 524,026 parameters: nodes alone",
            "graph_transformer": "Graph Transformer of any size: attention along the edges",
        }
    ),
    _row(
        "gps_zinc",
        "gps:gps_zinc",
        "arXiv 2205.12454",
        "MIT",
        "GPS of ZINC, 423,717 parameters: GINE messages and attention among all nodes",
    ),
    _row("gps", "gps:gps", "arXiv 2205.12454", "MIT", "GPS of any size: messages and attention, packed"),
    _row(
        "urpe",
        "urpe:urpe",
        "arXiv 2205.13401",
        "MIT",
        "attention by shortest path with a factor behind the softmax, of any size",
    ),
    *_messages(
        {
            "gcn": ("arXiv 1609.02907", "GCN with residuals and norms, of any size"),
            "gine": ("arXiv 1905.12265", "GINE with residuals and norms, of any size"),
            "res_gated": ("arXiv 1711.07553", "torch-geometric's residual gated convolution, of any size"),
            "gated_gcn": ("arXiv 2003.00982", "GatedGCN, which carries its edges along, of any size"),
        }
    ),
    _row(
        "kipf_gcn",
        "message_passing:kipf_gcn",
        "arXiv 1609.02907",
        "MIT",
        "the GCN of the citation graphs: two convolutions and nothing else",
    ),
)
