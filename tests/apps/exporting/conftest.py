"""A small model of each family of the catalogue, as it is exported."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch

from manyheads.apps import exportable, exportable_recsys
from manyheads.apps.exportable import Exportable, Inputs
from manyheads.core.catalog import create_model

LENGTHS: dict[str, Any] = {"seq_len": 24, "pred_len": 12}
SERIES: dict[str, Any] = {"d_model": 16, "n_heads": 2, "d_ff": 16, "e_layers": 1}
LAGGED: dict[str, Any] = {"enc_in": 3, "time_features": 4, "lags": [1, 2, 3]}
WINDOWS: dict[str, Any] = {
    "img_size": 64,
    "embed_dim": 24,
    "depths": [2, 2],
    "num_heads": [2, 4],
    "window_size": 4,
}
STAGES: dict[str, Any] = {"img_size": 64, "embed_dim": [32, 64], "depths": [1, 1]}
VOICES: dict[str, Any] = {"dim": 16, "depth": 1, "kernel_size": 16, "query_key_dim": 8, "group_size": 32}
WORDS: dict[str, Any] = {
    "vocab_size": 30,
    "input_size": 20,
    "dim": 16,
    "heads": 2,
    "units": 32,
    "encoder_blocks": 2,
    "decoder_blocks": 1,
}
GRAPHS: dict[str, Any] = {"outputs": 2, "node_types": [5], "hidden_dim": 16, "L": 2}
READER: dict[str, Any] = {"hidden_size": 16, "layers": 2, "heads": 2, "inner_size": 32, "window": 8}
HISTORIES: dict[str, Any] = {"num_items": 20, "hidden_size": 16, "layers": 2}


def image(name: str, **options: Any) -> Exportable:
    size = options["img_size"]
    return exportable.images(create_model(name, num_classes=5, **options).eval(), (3, size, size))


def series(name: str, **options: Any) -> Exportable:
    model = create_model(name, **LENGTHS, **options).eval()
    levels = tuple(getattr(model, "levels", None) or ())
    return exportable.series(model, (24, 12), 3, 4, levels)


def molecules(count: int, nodes: int = 0, **fields: Any) -> Inputs:
    """Rings of 5, 8, 11 ... atoms, with what a model asks for."""
    draw = torch.Generator().manual_seed(count)
    sizes = [5 + 3 * i for i in range(count)]
    starts = torch.tensor([0, *sizes]).cumsum(0).int()
    edges, distances = [], []
    for first, size in zip(starts.tolist(), sizes, strict=False):
        ring = torch.arange(size)
        onward = torch.stack([ring, (ring + 1) % size])
        edges.append(first + torch.cat([onward, onward.flip(0)], 1))
        apart = (ring[:, None] - ring).abs()
        distances.append(torch.minimum(apart, size - apart).flatten())
    edge_index, total = torch.cat(edges, 1), int(starts[-1])
    x = torch.randn(total, nodes, generator=draw) if nodes else torch.randint(5, (total,), generator=draw)
    kinds = torch.randint(3, edge_index.shape[1:], generator=draw) if fields.get("edges") else None
    encoding = torch.randn(total, 4, generator=draw) if fields.get("encoding") else None
    return (
        x,
        edge_index,
        starts,
        kinds,
        encoding,
        None,
        torch.cat(distances) if fields.get("apart") else None,
        None,
    )


def graph(name: str, fields: dict[str, Any], **options: Any) -> Exportable:
    found = exportable.graphs(create_model(name, **options).eval(), list)
    return dataclasses.replace(found, draw=lambda count: molecules(count + 1, **fields))


def sound(name: str, **options: Any) -> Exportable:
    return exportable.mixtures(create_model(name, **VOICES, **options).eval(), 800)


def history(name: str, most: int) -> Exportable:
    return exportable_recsys.histories(create_model(name, max_len=9, **HISTORIES).eval(), 20, most, 1)


def texts() -> Exportable:
    model = create_model("recformer", vocab_size=50, num_items=20, positions=66, **READER)
    return exportable_recsys.read_histories(cast(Any, model.eval()), None)


def customers() -> Exportable:
    sizes = {"vocab_size": 50, "classes": 3, "numeric": 2, "categories": [4], "positions": 66}
    model = create_model("cross_attention_fusion", **sizes, **READER)
    return exportable_recsys.customers(cast(Any, model.eval()), 2, [4], None)


def classifier() -> Exportable:
    model = create_model(
        "classifier", base="itransformer", seq_len=24, channels=3, classes=4, arguments=SERIES
    )
    return exportable.labelled_series(model.eval(), 24, 3, lambda samples: samples)


def gaps(name: str) -> Exportable:
    sizes = {"seq_len": 24, "channels": 3}
    model = create_model(name, base="itransformer", arguments=SERIES, fill="line", **sizes)
    return exportable.gaps(model.eval(), 24, 3, 4)


def speech(name: str, fixed: int | None = None) -> Exportable:
    return exportable.speech(create_model(name, **WORDS).eval(), 20, 80, fixed)


SMALL: dict[str, Callable[[], Exportable]] = {
    "vit": lambda: image(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=16, depth=2, num_heads=2
    ),
    "swin": lambda: image("swin_tiny_patch4_window7_224", **WINDOWS),
    "swinv2": lambda: image("swinv2_tiny_window8_256", **WINDOWS),
    "swinv2_cr": lambda: image("swinv2_cr_tiny_ns_224", **WINDOWS),
    "maxvit": lambda: image("maxvit_tiny_tf_224", **STAGES),
    "maxvit_rmlp": lambda: image("maxvit_rmlp_nano_rw_256", **STAGES),
    "vim": lambda: image("vim", img_size=32, embed_dim=16, depth=2, d_state=4, patch_size=8, stride=8),
    "cct": lambda: image("cct", img_size=16, embed_dim=16, depth=2, num_heads=2),
    "itransformer": lambda: series("itransformer", **SERIES),
    "iflowformer": lambda: series("iflowformer", **SERIES),
    "s_mamba": lambda: series("s_mamba", d_model=16, d_state=4, e_layers=1, d_ff=16),
    "patchtst": lambda: series("patchtst"),
    "autoformer": lambda: series("autoformer", enc_in=3, label_len=12, **SERIES),
    "informer": lambda: series("informer", enc_in=3, label_len=12, **SERIES),
    "informer_stack": lambda: series(
        "informer_stack", enc_in=3, label_len=12, d_model=16, n_heads=2, d_ff=16, s_layers="2,1"
    ),
    "informer_lagged": lambda: series("informer_lagged", **LAGGED),
    "autoformer_lagged": lambda: series("autoformer_lagged", **LAGGED),
    "dlinear": lambda: series("dlinear"),
    "seasonal_naive": lambda: series("seasonal_naive"),
    "forecaster": lambda: series(
        "forecaster", base="itransformer", arguments=SERIES, output="quantile", quantiles=[0.1, 0.5, 0.9]
    ),
    "classifier": classifier,
    "reconstructor": lambda: gaps("imputer"),
    "mossformer": lambda: sound("mossformer"),
    "mossformer2": lambda: sound("mossformer2", inner=16),
    "paraformer": lambda: speech("paraformer"),
    "paraformer_conformer": lambda: speech("paraformer_conformer", 90),
    "graph_transformer": lambda: graph(
        "graph_transformer",
        {"edges": True, "encoding": True},
        **GRAPHS,
        edge_types=[3],
        encoding_dim=4,
        n_heads=2,
    ),
    "gps": lambda: graph(
        "gps",
        {"edges": True, "encoding": True},
        **GRAPHS,
        edge_types=[3],
        encoding_dim=4,
        encoding_width=4,
        n_heads=2,
    ),
    "urpe": lambda: graph(
        "urpe", {"edges": True, "apart": True}, **GRAPHS, edge_types=[3], ffn_dim=16, n_heads=2
    ),
    "message_passing": lambda: graph("gcn", {}, **GRAPHS),
    "gine": lambda: graph("gine", {"edges": True}, **GRAPHS, edge_types=[3]),
    "res_gated": lambda: graph("res_gated", {"edges": True}, **GRAPHS, edge_types=[3]),
    "gated_gcn": lambda: graph("gated_gcn", {"edges": True}, **GRAPHS, edge_types=[3]),
    "kipf_gcn": lambda: graph("kipf_gcn", {"nodes": 6}, node_features=6, outputs=3),
    "bert4rec": lambda: history("bert4rec", 8),
    "sasrec": lambda: history("sasrec", 9),
    "recformer": texts,
    "cross_attention_fusion": customers,
}


@pytest.fixture(scope="session")
def small() -> dict[str, Callable[[], Exportable]]:
    """Makes a small model by its family."""
    return SMALL
