"""What the server and its workers send each other. Data only: nothing heavy is imported here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

Cell: TypeAlias = str | float | int | None
Columns: TypeAlias = dict[str, list[Cell]]
Settings: TypeAlias = Mapping[str, str | int]


@dataclass(frozen=True)
class Served:
    """A model that is served.

    Args:
        name: In addresses.
        folder: Its model folder.
        domain, task: What it is for.
        catalog_name: Of its architecture.
    """

    name: str
    folder: Path
    domain: str
    task: str
    catalog_name: str


@dataclass(frozen=True)
class Limits:
    """What one request may hold beside the size of its body.

    Args:
        seconds: Of sound, all recordings together.
        pixels: Of an image; all images together may have some times as many.
    """

    seconds: float = 600
    pixels: int = 50_000_000


@dataclass(frozen=True)
class Blobs:
    """Images or recordings, encoded, each with its id.

    Args:
        field: Of the request, for messages.
        column: Of the predictor's source.
        items: Ids and contents.
    """

    field: str
    column: str
    items: tuple[tuple[str, bytes], ...]


@dataclass(frozen=True)
class Table:
    """A table, as columns of the same length."""

    field: str
    columns: Columns


@dataclass(frozen=True)
class Csv:
    """A table as the text of a CSV file."""

    field: str
    content: bytes


@dataclass(frozen=True)
class Graph:
    """A graph as tables: nodes, edges, and the pairs of nodes that are asked about, of models of these."""

    field: str
    nodes: Columns
    edges: Columns
    pairs: Columns | None = None


Payload: TypeAlias = Blobs | Table | Csv | Graph


@dataclass(frozen=True)
class Work:
    """A request, as a worker gets it.

    Args:
        payload: The records.
        settings: Of the predictor, where others than its own.
        zipped: The answer is a zip with the files, not JSON with the files in it.
        picture: Of a single image, the answer also has a picture of what the model looks at.
    """

    payload: Payload
    settings: Settings = field(default_factory=dict)
    zipped: bool = False
    picture: bool = False


@dataclass(frozen=True)
class Step:
    """A step of a recording that is recognised while it goes on.

    Args:
        session: Its number.
        action: "open", "push", "finish" or "close".
        samples: Of a push: float32, little-endian.
        endpoints: Of an opening: how the ends of utterances are found.
    """

    session: int
    action: str
    samples: bytes = b""
    endpoints: str = "none"


@dataclass(frozen=True)
class Problem:
    """Why there are no rows.

    Args:
        status: Of HTTP.
        code: One word, for programs.
        message: A line, for people.
        details: The fields or records that are wrong, each with its reason.
        log: For the server's log alone.
    """

    status: int
    code: str
    message: str
    details: tuple[dict[str, str], ...] = ()
    log: str = ""


@dataclass(frozen=True)
class Answer:
    """What came of a request.

    Args:
        body: Of the response; empty where there is a problem.
        media_type: Of the body.
        records, bad: How many there were, and how many of them could not be used.
        problem: Why there are no rows.
    """

    body: bytes = b""
    media_type: str = "application/json"
    records: int = 0
    bad: int = 0
    problem: Problem | None = None


@dataclass(frozen=True)
class About:
    """What a worker says of its model once it is ready.

    Args:
        identity: The model folder's hash.
        columns: Of a row, with their Arrow types.
        settings: Of the predictor, by name.
        batch_size: Records that the model sees at once.
        device: Where it runs.
        load_s, warm_up_s: What loading and the first prediction took.
        note: Why there was no first prediction.
        sample_rate: Of a recogniser that takes recordings while they go on; 0 of others.
        latency_ms: Of that: from a sound to its text, at most; computing comes on top.
    """

    identity: str
    columns: dict[str, str]
    settings: dict[str, str | int]
    batch_size: int
    device: str
    load_s: float
    warm_up_s: float
    note: str = ""
    sample_rate: int = 0
    latency_ms: int = 0


@dataclass(frozen=True)
class Failed:
    """A worker could not load its model."""

    message: str
