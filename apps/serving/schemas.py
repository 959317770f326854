"""What requests look like, typed: one schema a domain, and the settings that a caller may choose.

Settings that name files of the server (lists of items), or files that a job makes, are not among them.
"""

from __future__ import annotations

import base64
import binascii
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    WithJsonSchema,
    model_validator,
)

from manyheads.apps.serving.payload import Blobs, Columns, Csv, Graph, Payload, Settings, Table

MOST_FILES = 64  # images or recordings
MOST_ROWS = 200_000
MOST_MOLECULES = 4096
LONGEST_SMILES = 2000
LONGEST_CELL = 10_000
MOST_COLUMNS = 1000


def _decode(value: object) -> bytes:
    if not isinstance(value, str):
        raise ValueError("must be base64 text")
    try:
        return base64.b64decode(value, validate=True)
    except (binascii.Error, ValueError):
        raise ValueError("is no base64") from None


Content: TypeAlias = Annotated[
    bytes,
    BeforeValidator(_decode),
    Field(min_length=1),
    WithJsonSchema({"type": "string", "contentEncoding": "base64", "minLength": 1}),
]
Id: TypeAlias = Annotated[str, Field(min_length=1, max_length=200)]
Number: TypeAlias = Annotated[float, Field(allow_inf_nan=False)]
Whole: TypeAlias = Annotated[int, Field(strict=True, ge=-(2**63), lt=2**63)]
Text: TypeAlias = Annotated[str, Field(max_length=LONGEST_CELL)]
Cells: TypeAlias = Annotated[dict[Id, Whole | Number | Text | None], Field(max_length=MOST_COLUMNS)]
Rows: TypeAlias = Annotated[list[Cells], Field(min_length=1, max_length=MOST_ROWS)]


def _few_columns(text: str) -> str:
    line = text[: text.find("\n") if "\n" in text else len(text)]
    columns = 1 + line.count(",")
    if columns > MOST_COLUMNS:
        raise ValueError(f"has {columns:,} columns, at most {MOST_COLUMNS:,} are taken")
    return text


TextOfTable: TypeAlias = Annotated[str, Field(min_length=1), AfterValidator(_few_columns)]


class Strict(BaseModel):
    """Of all requests: no field that is not known, no NaN, nothing turned into another type."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class NoSettings(Strict):
    """The model has none."""


class VisionSettings(Strict):
    """What is returned of an image."""

    output_kind: Literal["label", "probabilities", "logits", "features"] | None = None
    top_k: Annotated[int, Field(ge=1, le=1000)] | None = None


class RecognitionSettings(Strict):
    """How recordings are recognised."""

    vad: Literal["silero", "energy", "none"] | None = None
    channel: Annotated[str, Field(pattern="^(mix|[0-9]{1,3})$")] | None = None
    segment_seconds: Annotated[int, Field(ge=1, le=600)] | None = None
    subtitles: Literal["none", "srt", "vtt", "both"] | None = None


class SeparationSettings(Strict):
    """How recordings are separated."""

    chunk_seconds: Annotated[int, Field(ge=2, le=120)] | None = None
    overlap_seconds: Annotated[int, Field(ge=1, le=60)] | None = None
    span_seconds: Annotated[int, Field(ge=4, le=600)] | None = None
    channel: Annotated[str, Field(pattern="^(mix|[0-9]{1,3})$")] | None = None
    sample_format: Literal["pcm16", "float"] | None = None
    silent_db: Annotated[int, Field(ge=-200, le=0)] | None = None


class GraphSettings(Strict):
    """What is returned of a molecule or a graph."""

    output_kind: Literal["label", "probabilities"] | None = None
    neighbours: Literal["sampled", "all"] | None = None


class RecommendationSettings(Strict):
    """What is recommended."""

    top_k: Annotated[int, Field(ge=1, le=1000)] | None = None
    seen: Literal["leave_out", "keep"] | None = None
    unknown: Literal["error", "popular", "skip"] | None = None
    bad_rows: Literal["error", "skip"] | None = None


class File(Strict):
    """An image or a recording: its encoded bytes, and an id that the rows get."""

    id: Id | None = None
    data: Content


Files: TypeAlias = Annotated[list[File], Field(min_length=1, max_length=MOST_FILES)]


def _blobs(field: str, column: str, files: list[File]) -> Blobs:
    return Blobs(field, column, tuple((file.id or str(i), file.data) for i, file in enumerate(files)))


def columns_of(rows: list[dict[str, Any]]) -> Columns:
    """Turn rows into columns; a cell that a row lacks is empty."""
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [row.get(name) for row in rows] for name in names}


class VisionRequest(Strict):
    """Images."""

    images: Files
    settings: VisionSettings = VisionSettings()

    def payload(self) -> Payload:
        """Return what a worker gets."""
        return _blobs("images", "image", self.images)


class RecognitionRequest(Strict):
    """Recordings, to be recognised."""

    recordings: Files
    settings: RecognitionSettings = RecognitionSettings()

    def payload(self) -> Payload:
        """Return what a worker gets."""
        return _blobs("recordings", "audio", self.recordings)


class SeparationRequest(Strict):
    """Recordings, to be separated."""

    recordings: Files
    settings: SeparationSettings = SeparationSettings()

    def payload(self) -> Payload:
        """Return what a worker gets."""
        return _blobs("recordings", "audio", self.recordings)


class SeriesRequest(Strict):
    """A table of series, long or wide, as rows or as the text of a CSV file: one of both."""

    rows: Rows | None = None
    csv: TextOfTable | None = None
    settings: NoSettings = NoSettings()

    @model_validator(mode="after")
    def _one(self) -> SeriesRequest:
        if (self.rows is None) == (self.csv is None):
            raise ValueError("give rows or csv, one of both")
        return self

    def payload(self) -> Payload:
        """Return what a worker gets."""
        if self.rows is not None:
            return Table("rows", columns_of(self.rows))
        return Csv("csv", (self.csv or "").encode(errors="replace"))


class Interaction(Strict):
    """A user chose an item; of several rows of a user the times say the order."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)
    __pydantic_extra__: dict[str, Whole | Number | Text | None] = Field(init=False)

    user_id: Whole | Id
    item_id: Whole | Id
    timestamp: Whole | Number | Text | None = None


class HistoryRequest(Strict):
    """What users chose, as rows or as the text of a CSV file: one of both."""

    interactions: Annotated[list[Interaction], Field(min_length=1, max_length=MOST_ROWS)] | None = None
    csv: TextOfTable | None = None
    settings: RecommendationSettings = RecommendationSettings()

    @model_validator(mode="after")
    def _one(self) -> HistoryRequest:
        if (self.interactions is None) == (self.csv is None):
            raise ValueError("give interactions or csv, one of both")
        return self

    def payload(self) -> Payload:
        """Return what a worker gets."""
        if self.interactions is not None:
            rows = [row.model_dump(exclude_unset=True) for row in self.interactions]
            return Table("interactions", columns_of(rows))
        return Csv("csv", (self.csv or "").encode(errors="replace"))


Smiles: TypeAlias = Annotated[str, Field(max_length=LONGEST_SMILES)]


class GraphRequest(Strict):
    """Molecules as SMILES, with ids or numbered; a CSV of them; or a graph as tables of nodes and edges."""

    smiles: Annotated[list[Smiles], Field(min_length=1, max_length=MOST_MOLECULES)] | None = None
    ids: Annotated[list[Id], Field(max_length=MOST_MOLECULES)] | None = None
    csv: TextOfTable | None = None
    nodes: Rows | None = None
    edges: Rows | None = None
    pairs: Rows | None = None
    settings: GraphSettings = GraphSettings()

    @model_validator(mode="after")
    def _one(self) -> GraphRequest:
        given = [name for name in ("smiles", "csv", "nodes") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError("give smiles, csv, or nodes and edges: one of these")
        if (self.nodes is None) != (self.edges is None):
            raise ValueError("nodes and edges go together")
        if self.ids is not None and (self.smiles is None or len(self.ids) != len(self.smiles)):
            raise ValueError("ids: as many as smiles")
        if self.pairs is not None and self.nodes is None:
            raise ValueError("pairs go with nodes and edges")
        return self

    def payload(self) -> Payload:
        """Return what a worker gets."""
        if self.smiles is not None:
            columns: Columns = {"smiles": list(self.smiles)}
            return Table("smiles", columns | ({"id": list(self.ids)} if self.ids is not None else {}))
        if self.nodes is not None and self.edges is not None:
            pairs = None if self.pairs is None else columns_of(self.pairs)
            return Graph("nodes", columns_of(self.nodes), columns_of(self.edges), pairs)
        return Csv("csv", (self.csv or "").encode(errors="replace"))


Request: TypeAlias = (
    VisionRequest | RecognitionRequest | SeparationRequest | SeriesRequest | HistoryRequest | GraphRequest
)
REQUESTS: dict[tuple[str, str], type[Request]] = {
    ("speech", "recognition"): RecognitionRequest,
    ("speech", "separation"): SeparationRequest,
}
_BY_DOMAIN: dict[str, type[Request]] = {
    "vision": VisionRequest,
    "timeseries": SeriesRequest,
    "graph": GraphRequest,
    "recsys": HistoryRequest,
}
FILES = {"vision": "images", "speech": "recordings"}  # fields of domains that take files, not tables


def request_of(domain: str, task: str) -> type[Request]:
    """Return the schema of a model's requests."""
    return REQUESTS.get((domain, task)) or _BY_DOMAIN[domain]


def chosen(request: Request) -> Settings:
    """Return the settings that a request gives."""
    return request.settings.model_dump(exclude_none=True)
