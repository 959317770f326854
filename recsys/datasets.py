"""The table of the recommenders' data sets. None ships in the package: their terms do not allow it."""

from __future__ import annotations

from manyheads.core.datasets import DataSet, File

_OWNED = "GroupLens: for research only, no redistribution (for local evaluation only)"


def _files(folder: str, files: dict[str, tuple[int, str]]) -> tuple[File, ...]:
    return tuple(File(f"recsys/{folder}/{name}", size, sha256) for name, (size, sha256) in files.items())


DATASETS: tuple[DataSet, ...] = (
    DataSet(
        name="ml_100k",
        domain="recsys",
        summary="MovieLens 100K: ratings with times, titles and genres; 943 users, 1,682 films",
        licence=_OWNED,
        files=_files(
            "ml-100k",
            {
                "u.data": (1979173, "06416e597f82b7342361e41163890c81036900f418ad91315590814211dca490"),
                "u.item": (236344, "553841ebc7de3a0fd0d6b62a204ea30c1e651aacfb2814c7a6584ac52f2c5701"),
                "u.user": (22628, "f120e114da2e8cf314fd28f99417c94ae9ddf1cb6db8ce0e4b5995d40e90e62c"),
                "u.genre": (202, "9757e0d3e6b298159a80dd48eaf938114690e911e39af97a76949ef1663610bb"),
            },
        ),
        split="leave one out",
        shape=(100000, 4),
        columns=("user_id", "item_id", "rating", "timestamp"),
    ),
    DataSet(
        name="ml_1m",
        domain="recsys",
        summary="MovieLens 1M: films of 6,040 users in order of time, no ratings; titles, genres",
        licence=_OWNED,
        files=_files(
            "ml-1m",
            {
                "sequences.txt": (
                    4749878,
                    "d9f4cd4477ba7f93f87cb673306240ca66eba6981ed0e70bb4d3c71b233d7e1f",
                ),
                "movies.dat": (171308, "0140fc2356357c1a851d0f52e893a1e4d3696df632c4141cea8d5bc3d621f0b9"),
            },
        ),
        split="leave one out",
        shape=(1000209, 2),
        columns=("user_id", "item_id"),
    ),
    DataSet(
        name="ml_latest_small",
        domain="recsys",
        summary="MovieLens latest-small (2018): ratings with times, titles, genres; 610 users, 9,724 films",
        licence="GroupLens: for research, passed on under the same terms, not for commercial use",
        files=_files(
            "ml-latest-small",
            {
                "ratings.csv": (
                    2382886,
                    "80da8b3393dae325bbba5a31f291a6ba55d8d4f4396de3c456f2c1635b1b70e8",
                ),
                "movies.csv": (484688, "c47b783f23eb304413307e1bb05335e427737da20ec8d3c0e96335567dd5f3dc"),
            },
        ),
        split="leave one out",
        shape=(100836, 4),
        columns=("userId", "movieId", "rating", "timestamp"),
    ),
)
