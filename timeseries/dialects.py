"""How others publish weights of our forecasters. Data only."""

from __future__ import annotations

from manyheads.core.dialects import Dialect, Source

_STATE = ("*.pth|*.pt|*.bin|*.safetensors",)


def _state_dict(name: str, summary: str) -> Dialect:
    """The state dict of a training code, which says neither model nor sizes: the caller does."""
    return Dialect(
        name=name,
        summary=f"{summary}; needs --option name=... and arguments=FILE.json, the builder's",
        files=_STATE,
        converter=f"manyheads.timeseries.models.published:convert_{name.replace('-', '_')}",
        options=("name", "arguments"),
        named=True,
    )


DIALECTS: tuple[Dialect, ...] = (
    Dialect(
        name="transformers",
        summary="transformers' Informer and Autoformer for prediction",
        files=("config.json", "model.safetensors|pytorch_model.bin"),
        mark=("config.json", "model_type", ("informer", "autoformer")),
        converter="manyheads.timeseries.models.published:convert_transformers",
        options=("compat",),
    ),
    _state_dict("informer", "checkpoints of Informer's authors"),
    _state_dict("autoformer", "checkpoints of Autoformer's authors, and of papers that took their code over"),
    _state_dict(
        "time-series-library", "checkpoints of the time-series library: Informer, Autoformer, PatchTST"
    ),
    _state_dict("s-mamba", "checkpoints of S-Mamba's authors"),
)

SOURCES: dict[str, Source] = {
    "informer_lagged": Source("huggingface/informer-tourism-monthly", "transformers"),
    "autoformer_lagged": Source("huggingface/autoformer-tourism-monthly", "transformers"),
}
