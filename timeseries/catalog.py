"""The forecasting models. Data only: importing this imports no torch."""

from __future__ import annotations

from manyheads.core.catalog import Entry

MODELS: tuple[Entry, ...] = (
    Entry(
        name="itransformer",
        domain="timeseries",
        task="forecast",
        builder="manyheads.timeseries.models.itransformer:itransformer",
        paper="arXiv 2310.06625",
        licence="Apache-2.0",
        summary="Attention over variates: each series is one token; takes any number of variates",
    ),
    Entry(
        name="dlinear",
        domain="timeseries",
        task="forecast",
        builder="manyheads.timeseries.models.dlinear:dlinear",
        paper="arXiv 2205.13504",
        licence="Apache-2.0",
        summary="One linear map for the trend and one for the rest; the baseline to beat",
    ),
    Entry(
        name="seasonal_naive",
        domain="timeseries",
        task="forecast",
        builder="manyheads.timeseries.models.seasonal_naive:seasonal_naive",
        paper="",
        licence="Apache-2.0",
        summary="The last season, repeated; no parameters",
    ),
)
