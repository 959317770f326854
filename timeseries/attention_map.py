"""What iTransformer's tokens attend to: variates, calendar features and covariates, by name."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from manyheads.core.errors import UsageError
from manyheads.timeseries.calls import forecast
from manyheads.timeseries.models.forecaster import CategoryEmbedding, WindowForecaster
from manyheads.timeseries.models.inverted import InvertedForecaster
from manyheads.timeseries.preprocessing import Preprocessing
from manyheads.timeseries.windows import Batch


def base_of(model: nn.Module) -> InvertedForecaster:
    """Return the model whose tokens are variates, within what may be around it.

    Raises:
        UsageError: There is none.
    """
    base = model.base if isinstance(model, WindowForecaster) else model
    if not isinstance(base, InvertedForecaster):
        raise UsageError("an attention map is of iTransformer: this model's tokens are not its variates")
    return base


def attention_maps(model: nn.Module, batch: Batch) -> list[Tensor]:
    """Return each layer's attention weights for a batch.

    Args:
        model: iTransformer, with or without covariates and an output around it.
        batch: Windows.

    Shape:
        A list of `[B, H, T, T]`: row i says what token i takes from the others.

    Raises:
        UsageError: The model has no such weights.
    """
    base = base_of(model)
    given: list[tuple[tuple[Tensor, ...], dict[str, Tensor]]] = []

    def note(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        given.append((args, kwargs))

    # What is around it scales windows and embeds categories: the base is asked again with what it was given.
    handle = base.register_forward_pre_hook(note, with_kwargs=True)
    try:
        with torch.inference_mode():
            forecast(model, batch)
    finally:
        handle.remove()
    (x, x_mark, _), covariates = given[0]
    with torch.inference_mode():
        return base.forward_with_attention(x, x_mark, **covariates)[1]


def token_names(model: nn.Module, of: Preprocessing, columns: Sequence[str]) -> list[tuple[str, str]]:
    """Return each token's name and kind: "variate", "calendar" or "covariate".

    A category is embedded in several channels, each of which is a token: `shop.0`, `shop.1` and so on.

    Args:
        model: The model.
        of: How its train data were treated.
        columns: The variates.
    """
    tokens = [(name, "variate") for name in columns]
    tokens += [(name.replace("_", " "), "calendar") for name in of.time_features]
    embeddings = dict(model.embeddings.items()) if isinstance(model, WindowForecaster) else {}
    for role, of_role in of.treatment.covariates.roles.items():
        tokens += [(name, "covariate") for name in of_role.numeric]
        embedding = embeddings.get(role)
        tables = embedding.tables if isinstance(embedding, CategoryEmbedding) else ()
        for name, table in zip(of_role.categories, tables, strict=True):
            assert isinstance(table, nn.Embedding)
            tokens += [(f"{name}.{i}", "covariate") for i in range(table.embedding_dim)]
    return tokens
