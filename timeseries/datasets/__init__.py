"""The table of the series data sets; ETTh1 lies beside this file, unchanged (README.md says whose it is)."""

from __future__ import annotations

from manyheads.core.datasets import DataSet, File

DATASETS = (
    DataSet(
        name="etth1",
        domain="timeseries",
        summary="Electricity Transformer Temperature, hourly, 2016-07-01 to 2018-06-26",
        licence="CC BY-ND 4.0 (unchanged copies may be passed on)",
        files=(
            File(
                path="timeseries/ETTh1.csv",
                size=2589657,
                sha256="f18de3ad269cef59bb07b5438d79bb3042d3be49bdeecf01c1cd6d29695ee066",
                address="https://raw.githubusercontent.com/zhouhaoyi/ETDataset/main/ETT-small/ETTh1.csv",
                embedded="manyheads.timeseries.datasets:ETTh1.csv",
            ),
        ),
        split="ett_hour",
        shape=(17420, 7),
        columns=("HUFL", "HULL", "MUFL", "MULL", "LUFL", "LULL", "OT"),
    ),
    DataSet(
        name="exchange_rate",
        domain="timeseries",
        summary="Exchange rates of 8 countries, daily, with artificial dates from 1990-01-01",
        licence="none stated (for local evaluation only)",
        files=(
            File(
                path="timeseries/exchange_rate.csv",
                size=630212,
                sha256="d55e7aa2641009814a18ba3279431b13f6d413b0eab195b9ff21988d8cf94e97",
            ),
        ),
        split="ratio",
        shape=(7588, 8),
        columns=("0", "1", "2", "3", "4", "5", "6", "OT"),
    ),
    DataSet(
        name="national_illness",
        domain="timeseries",
        summary="Influenza-like illness in the United States, weekly, 2002-01-01 to 2020-06-30",
        licence="data of the United States government (CDC ILINet)",
        files=(
            File(
                path="timeseries/national_illness.csv",
                size=66653,
                sha256="8594cecb98c6f2f9dc014eca11c4d5d1e38ad5ce6ed0592d4abe65b146fce395",
            ),
        ),
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
    DataSet(
        name="japanese_vowels",
        domain="timeseries",
        summary="Nine speakers saying two vowels, 12 coefficients: 270 and 370 series of 7 to 29 steps",
        licence="of the UEA and UCR archive, which asks for citation (arXiv 1811.00075, 1810.07758)",
        files=(
            File(
                path="timeseries/uea_ucr/JapaneseVowels.npz",
                size=466925,
                sha256="df3c2ef77b361fade858171db947bb189a19440013ef8150a2c70df3160c6072",
            ),
        ),
        split="given",
        shape=(640, 12),
        columns=(
            "channel_0",
            "channel_1",
            "channel_2",
            "channel_3",
            "channel_4",
            "channel_5",
            "channel_6",
            "channel_7",
            "channel_8",
            "channel_9",
            "channel_10",
            "channel_11",
        ),
    ),
    DataSet(
        name="basic_motions",
        domain="timeseries",
        summary="Four activities by a wrist sensor of 6 channels: 40 and 40 series of 100 steps",
        licence="of the UEA and UCR archive, which asks for citation (arXiv 1811.00075, 1810.07758)",
        files=(
            File(
                path="timeseries/uea_ucr/BasicMotions.npz",
                size=144026,
                sha256="6c77249a77cb8b317b43bb7f033564d176b5ca94f82188f076ce4e2a5ba704fc",
            ),
        ),
        split="given",
        shape=(80, 6),
        columns=("channel_0", "channel_1", "channel_2", "channel_3", "channel_4", "channel_5"),
    ),
    DataSet(
        name="gun_point",
        domain="timeseries",
        summary="A hand that draws a gun or points, one channel: 50 and 150 series of 150 steps",
        licence="of the UEA and UCR archive, which asks for citation (arXiv 1811.00075, 1810.07758)",
        files=(
            File(
                path="timeseries/uea_ucr/GunPoint.npz",
                size=108036,
                sha256="bebd9544c3ef8d30a1dd84babd6f060cf21c0f9c85dd880ecab7fa9d98e894a4",
            ),
        ),
        split="given",
        shape=(200, 1),
        columns=("channel_0",),
    ),
    DataSet(
        name="italy_power_demand",
        domain="timeseries",
        summary="A day's power demand, winter or summer: 67 and 1029 series of 24 steps",
        licence="of the UEA and UCR archive, which asks for citation (arXiv 1811.00075, 1810.07758)",
        files=(
            File(
                path="timeseries/uea_ucr/ItalyPowerDemand.npz",
                size=89977,
                sha256="e65b2bbe170bd62ea89b8d8437ff584a29916c0b1a280c7c98eaf82ce86017ac",
            ),
        ),
        split="given",
        shape=(1096, 1),
        columns=("channel_0",),
    ),
)
