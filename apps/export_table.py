"""Which families of the catalogue can be exported, and why others cannot: `manyheads export --list`.

Found by trying; `pytest -m "slow or not slow" tests/apps/exporting` tries again.
"""

from __future__ import annotations

_YES = {"torch": "", "onnx": ""}


def _no(reason: str) -> dict[str, str]:
    return {"torch": reason, "onnx": reason}


# By the builder's function, or by the model's name where a family's models differ in what they are made of:
# each format with the reason against it, none where there is none.
EXPORTS: dict[str, dict[str, str]] = {
    "vit": _YES,
    "swin": _YES,
    "swinv2": _YES,
    "swinv2_cr": _YES,
    "maxvit": _YES,
    "maxvit_rmlp": _YES,
    "vim": _YES,
    "cct": _YES,
    "itransformer": _YES,
    "iflowformer": _YES,
    "s_mamba": _YES,
    "patchtst": _YES,
    "autoformer": _YES,
    "informer": _YES,
    "informer_stack": _YES,
    "informer_lagged": _YES,
    "autoformer_lagged": _YES,
    "dlinear": _YES,
    "seasonal_naive": _YES,
    "forecaster": _YES,
    "classifier": _YES,
    "reconstructor": _YES,
    "mossformer": _YES,
    "mossformer2": _YES,
    "paraformer": _YES,
    "paraformer_conformer": _YES,
    "graph_transformer": _YES,
    "gps": _no("its attention goes graph by graph, by sizes that are values and no shapes"),
    "urpe": _no("graphs are filled up to the largest one, whose size is a value and no shape"),
    "message_passing": _YES,
    "gine": _YES,
    "res_gated": _YES,
    "gated_gcn": _YES,
    "kipf_gcn": _YES,
    "bert4rec": _YES,
    "sasrec": _YES,
    "recformer": _YES,
    "cross_attention_fusion": _YES,
}
