"""The table of the series data sets; ETTh1 lies beside this file, unchanged (README.md says whose it is)."""

from __future__ import annotations

from manyheads.core.datasets import DataSet

DATASETS = (
    DataSet(
        name="etth1",
        domain="timeseries",
        summary="Electricity Transformer Temperature, hourly, 2016-07-01 to 2018-06-26",
        licence="CC BY-ND 4.0 (unchanged copies may be passed on)",
        path="timeseries/ETTh1.csv",
        size=2589657,
        sha256="f18de3ad269cef59bb07b5438d79bb3042d3be49bdeecf01c1cd6d29695ee066",
        split="ett_hour",
        shape=(17420, 7),
        columns=("HUFL", "HULL", "MUFL", "MULL", "LUFL", "LULL", "OT"),
        address="https://raw.githubusercontent.com/zhouhaoyi/ETDataset/main/ETT-small/ETTh1.csv",
        embedded="manyheads.timeseries.datasets:ETTh1.csv",
    ),
    DataSet(
        name="exchange_rate",
        domain="timeseries",
        summary="Exchange rates of 8 countries, daily, with artificial dates from 1990-01-01",
        licence="none stated (for local evaluation only)",
        path="timeseries/exchange_rate.csv",
        size=630212,
        sha256="d55e7aa2641009814a18ba3279431b13f6d413b0eab195b9ff21988d8cf94e97",
        split="ratio",
        shape=(7588, 8),
        columns=("0", "1", "2", "3", "4", "5", "6", "OT"),
    ),
    DataSet(
        name="national_illness",
        domain="timeseries",
        summary="Influenza-like illness in the United States, weekly, 2002-01-01 to 2020-06-30",
        licence="data of the United States government (CDC ILINet)",
        path="timeseries/national_illness.csv",
        size=66653,
        sha256="8594cecb98c6f2f9dc014eca11c4d5d1e38ad5ce6ed0592d4abe65b146fce395",
        split="ratio",
        shape=(966, 7),
        columns=(
            "% WEIGHTED ILI",
            "%UNWEIGHTED ILI",
            "AGE 0-4",
            "AGE 5-24",
            "ILITOTAL",
            "NUM. OF PROVIDERS",
            "OT",
        ),
    ),
)
