"""The forecasting models. Data only: importing this imports no torch."""

from __future__ import annotations

from manyheads.core.catalog import Entry, Task

TASKS: tuple[Task, ...] = (
    Task(
        name="forecast",
        summary="the next rows of every series",
        training="manyheads.timeseries.task:Forecaster",
        data="manyheads.timeseries.data:ForecastData",
        predictor="manyheads.timeseries.predictor:Predictor",
    ),
)

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
        name="iflowformer",
        domain="timeseries",
        task="forecast",
        builder="manyheads.timeseries.models.iflowformer:iflowformer",
        paper="arXiv 2202.06258",
        licence="Apache-2.0",
        summary="iTransformer with Flow attention: linear in the number of variates",
    ),
    Entry(
        name="s_mamba",
        domain="timeseries",
        task="forecast",
        builder="manyheads.timeseries.models.smamba:s_mamba",
        paper="arXiv 2403.11144",
        licence="Apache-2.0",
        summary="State space scans over the variates from both ends, each of which is one token",
    ),
    Entry(
        name="patchtst",
        domain="timeseries",
        task="forecast",
        builder="manyheads.timeseries.models.patchtst:patchtst",
        paper="arXiv 2211.14730",
        licence="Apache-2.0",
        summary="Attention over patches of each series apart; a strong baseline",
    ),
    Entry(
        name="autoformer",
        domain="timeseries",
        task="forecast",
        builder="manyheads.timeseries.models.autoformer:autoformer",
        paper="arXiv 2106.13008",
        licence="Apache-2.0",
        summary="Season and trend apart; attention by the lags at which a series repeats",
    ),
    Entry(
        name="informer",
        domain="timeseries",
        task="forecast",
        builder="manyheads.timeseries.models.informer:informer",
        paper="arXiv 2012.07436",
        licence="Apache-2.0",
        summary="Sparse attention over time; the whole horizon in one pass",
    ),
    Entry(
        name="informer_stack",
        domain="timeseries",
        task="forecast",
        builder="manyheads.timeseries.models.informer:informer_stack",
        paper="arXiv 2012.07436",
        licence="Apache-2.0",
        summary="Informer with further encoders, each on half of the history before",
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
        name="forecaster",
        domain="timeseries",
        task="forecast",
        builder="manyheads.timeseries.models.forecaster:forecaster",
        paper="",
        licence="Apache-2.0",
        summary="Any of the others with covariates, and with quantiles or a distribution as output",
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
