"""The MovieLens files: logs, and what the films are called."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from manyheads.core.errors import DataError, UsageError, did_you_mean
from manyheads.core.tables import open_csv
from manyheads.recsys.logs import Columns, Log, Rules, make_log, read_log
from manyheads.recsys.tables import Tables

if TYPE_CHECKING:
    import pandas as pd

NAMES = ("ml_100k", "ml_1m", "ml_latest_small")
ML_100K = ("user_id", "item_id", "rating", "timestamp")
LATEST = Columns("userId", "movieId")


def read_published(name: str, folder: Path, rules: Rules | None = None) -> Log:
    """Read the log of a data set of `NAMES`.

    Raises:
        UsageError: No such data set, or ratings are asked for where there are none.
        DataError: A file is not as it should be.
    """
    if name == "ml_100k":
        return read_log(Tables(find(folder, "u.data"), ML_100K), Columns(), rules)
    if name == "ml_latest_small":
        return read_log(find(folder, "ratings.csv"), LATEST, rules)
    if name != "ml_1m":
        raise UsageError(f"no log {name!r}{did_you_mean(name, NAMES)} (there are: {', '.join(NAMES)})")
    if rules is not None and rules.min_rating is not None:
        raise UsageError("rules.min_rating: the sequences of ml_1m have no ratings")
    return _read_sequences(find(folder, "sequences.txt"), rules)


def read_ratings(folder: Path) -> pd.DataFrame:
    """Return the ratings of MovieLens 100K as a table with names for its columns."""
    import pandas as pd

    return pd.read_csv(find(folder, "u.data"), sep="\t", names=list(ML_100K))


def read_titles(name: str, folder: Path) -> dict[str, dict[str, str]]:
    """Return title and genres of each item of a data set, by its id."""
    if name == "ml_100k":
        genres = [line.rpartition("|")[0] for line in _lines(find(folder, "u.genre")) if line]
        found = {}
        for line in _lines(find(folder, "u.item"), "latin-1"):
            id, title, *cells = line.split("|")
            flags = cells[-len(genres) :]
            named = [genre for genre, flag in zip(genres, flags, strict=True) if flag == "1"]
            found[id] = {"title": title, "genres": ", ".join(named)}
        return found
    if name == "ml_1m":
        rows = (line.split("::") for line in _lines(find(folder, "movies.dat"), "latin-1"))
        return {id: {"title": title, "genres": genres.replace("|", ", ")} for id, title, genres in rows}
    if name == "ml_latest_small":
        import csv

        films = csv.DictReader(_lines(find(folder, "movies.csv")))
        return {
            row["movieId"]: {"title": row["title"], "genres": row["genres"].replace("|", ", ")}
            for row in films
        }
    raise UsageError(f"no titles of {name!r} (there are: {', '.join(NAMES)})")


def write_opinions(folder: Path, path: Path) -> None:
    """Write MovieLens 100K's ratings as a table of films, those who saw them, and whether they liked them.

    Columns: user_id, item_id, title, genres, age, gender, occupation, liked ("yes" from four of five stars
    on), timestamp; rows in the order of the ratings' file.

    Raises:
        DataError: A file is missing, or names what another does not know.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    from manyheads.core import files

    films = read_titles("ml_100k", folder)
    users = {id: rest for id, *rest in (line.split("|") for line in _lines(find(folder, "u.user")))}
    rows = []
    for number, line in enumerate(_lines(find(folder, "u.data")), 1):
        user, item, rating, time = line.split("\t")
        if user not in users or item not in films:
            raise DataError(f"{folder}, u.data, line {number}: no such user, or no such film")
        age, gender, occupation, _ = users[user]
        about = {"user_id": user, "item_id": item, **films[item], "age": int(age), "gender": gender}
        liked = "yes" if int(rating) >= 4 else "no"
        rows.append(about | {"occupation": occupation, "liked": liked, "timestamp": int(time)})
    path.parent.mkdir(parents=True, exist_ok=True)
    written = files.temporary(path)
    pq.write_table(pa.Table.from_pylist(rows), written)
    files.flush(written)
    files.commit(written, path)


def find(folder: Path, name: str) -> Path:
    """Return a file of a folder, plain or packed.

    Raises:
        DataError: It is not there.
    """
    for path in (folder / name, folder / f"{name}.gz"):
        if path.is_file():
            return path
    raise DataError(f"{folder} has no {name}, plain or packed")


def _lines(path: Path, encoding: str = "utf-8") -> Iterator[str]:
    with open_csv(path) as file:
        for line in file:
            yield line.decode(encoding).rstrip("\r\n")


def _read_sequences(path: Path, rules: Rules | None) -> Log:
    """Read lines `user:item item ...`, in order of time."""
    users: list[str] = []
    items: list[str] = []
    counts: list[int] = []
    for number, line in enumerate(_lines(path), 1):
        user, colon, rest = line.partition(":")
        if not colon or not rest.strip():
            raise DataError(f"{path}, line {number}: not `user:item item ...`")
        found = rest.split()
        users.append(user)
        items += found
        counts.append(len(found))
    return make_log(np.repeat(users, counts).tolist(), items, rules=rules)
