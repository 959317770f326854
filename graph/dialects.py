"""How others publish weights of our graph models. Data only."""

from __future__ import annotations

from manyheads.core.dialects import Dialect, Source

DIALECTS: tuple[Dialect, ...] = (
    Dialect(
        name="graphtransformer",
        summary="state dicts of the Graph Transformer's authors (epoch_*.pkl); needs --option name=...",
        files=("epoch_*.pkl|*.pkl|*.pth|*.pt|*.safetensors",),
        converter="manyheads.graph.models.published:convert",
        options=("name",),
        named=True,
    ),
)

SOURCES: dict[str, Source] = {}
