"""Published weights of the Graph Transformer, made our model folders."""

from __future__ import annotations

from pathlib import Path

from manyheads.core import hub
from manyheads.core.catalog import create_model
from manyheads.core.errors import DataError, UsageError
from manyheads.core.weights import read_tensors
from manyheads.graph.models.graph_transformer import GraphTransformer, load_official
from manyheads.graph.preprocessing import Encoding, Preprocessing, Target

NAMES = ("graph_transformer_zinc", "graph_transformer_pattern", "graph_transformer_cluster")
_ENCODING = "embedding_lap_pos_enc.weight"


def convert(published: str | Path, folder: str | Path, *, name: str) -> hub.ModelConfig:
    """Write a model folder from the authors' `epoch_<n>.pkl`, or another state dict of their code.

    Of ZINC the folder predicts from SMILES. PATTERN's and CLUSTER's graphs come from no table that a config
    could describe: their preprocessing stays empty.

    Args:
        published: The file.
        folder: The model folder to write.
        name: Of which of the three data sets it is, by the catalogue's name.

    Raises:
        UsageError: No such name.
        DataError: The weights are not exactly that model's.
    """
    published = Path(published)
    if name not in NAMES:
        raise UsageError(f"no published Graph Transformer {name!r} (known: {', '.join(NAMES)})")
    state = read_tensors(published)
    state = {key.removeprefix("module."): value for key, value in state.items()}
    if not any(key.startswith("layers.") for key in state):
        raise DataError(f"{published.name} holds no weights of a Graph Transformer: no layers")
    columns = state[_ENCODING].shape[-1] if _ENCODING in state else 0
    norms = [kind for kind in ("batch", "layer") if any(f".{kind}_norm" in key for key in state)]
    arguments = {"encoding_dim": columns, "norm": "both" if len(norms) == 2 else (norms or ["none"])[0]}
    hub.check_buildable(name, arguments, published)
    model = create_model(name, **arguments)
    assert isinstance(model, GraphTransformer)
    load_official(model, state)
    preprocessing = {}
    if name == NAMES[0]:
        encoding = Encoding("laplacian", columns) if columns else Encoding()
        of = Preprocessing(features="zinc", encoding=encoding, target=Target("regression", ("y",)))
        preprocessing = of.to_json()
    return hub.save(
        folder,
        model,
        domain="graph",
        name=name,
        arguments=arguments,
        preprocessing=preprocessing,
        training={"converted_from": published.name, "dialect": "graphtransformer"},
    )
