"""The description of all addresses, with the real schema of each model's requests and rows."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from pydantic.json_schema import models_json_schema

from manyheads import __version__
from manyheads.apps.serving.queue import Model
from manyheads.apps.serving.schemas import FILES, request_of

Json = dict[str, Any]
TYPES: dict[str, Json] = {
    "string": {"type": "string"},
    "bool": {"type": "boolean"},
    "timestamp[us]": {"type": "string", "format": "date-time"},
}
ERROR: Json = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["code", "message", "request_id"],
            "properties": {
                "code": {"type": "string"},
                "message": {"type": "string"},
                "request_id": {"type": "string"},
                "details": {"type": "array", "items": {"type": "object"}},
            },
        }
    },
}
REFUSALS = {
    "400": "The body is no JSON, or no form.",
    "413": "The body is too large.",
    "415": "The body is of a kind that is not taken.",
    "422": "A field or a record is wrong; the details name it.",
    "429": "Too many requests wait; Retry-After says when to try again.",
    "503": "The model is not ready, or its worker failed.",
    "504": "No answer before the deadline.",
}


def document(models: Iterable[Model], token: bool) -> Json:
    """Return the OpenAPI document.

    Args:
        models: That are served; their rows are described once they are ready.
        token: Whether clients must show one.
    """
    served = list(models)
    schemas = {request_of(each.plan.model.domain, each.plan.model.task): None for each in served}
    _, defined = models_json_schema(
        [(schema, "validation") for schema in schemas], ref_template="#/components/schemas/{model}"
    )
    components: Json = {"schemas": {"Error": ERROR, **defined.get("$defs", {})}}
    found: Json = {
        "openapi": "3.1.0",
        "info": {"title": "Manyheads", "version": __version__},
        "paths": {path: {"get": _get(summary)} for path, summary in _GETS.items()},
        "components": components,
    }
    for model in served:
        components["schemas"][f"{model.name}.Rows"] = _rows(model)
        found["paths"][f"/v1/models/{model.name}/predict"] = {"post": _predict(model)}
    if token:
        components["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
        found["security"] = [{"token": []}]
    return found


_GETS = {
    "/livez": "The process runs.",
    "/readyz": "All models answer (200), or not yet or no longer (503).",
    "/metrics": "Counters in Prometheus' format.",
    "/v1/models": "The models, what they take and what they return.",
}


def _get(summary: str) -> Json:
    return {"summary": summary, "responses": {"200": {"description": "As the summary says."}}}


def _predict(model: Model) -> Json:
    """Describe a model's address."""
    served = model.plan.model
    name = request_of(served.domain, served.task).__name__
    upload: Json = {
        "type": "object",
        "properties": {
            "file": {"type": "string", "contentMediaType": "application/octet-stream"},
            "settings": {"type": "string", "contentMediaType": "application/json"},
        },
    }
    raw = "application/octet-stream" if served.domain in FILES else "text/csv"
    content: Json = {
        "application/json": {"schema": {"$ref": f"#/components/schemas/{name}"}},
        "multipart/form-data": {"schema": upload},
        raw: {"schema": {"type": "string"}},
    }
    rows: Json = {"application/json": {"schema": {"$ref": f"#/components/schemas/{model.name}.Rows"}}}
    if hasattr(model.about, "settings") and served.domain == "speech":
        rows["application/zip"] = {"schema": {"type": "string", "contentMediaType": "application/zip"}}
    error: Json = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    return {
        "operationId": f"predict_{served.name}",
        "summary": f"{served.domain} {served.task} by {served.name}",
        "requestBody": {"required": True, "content": content},
        "responses": {
            "200": {"description": "The rows.", "content": rows},
            **{status: {"description": text, "content": error} for status, text in REFUSALS.items()},
        },
    }


def _rows(model: Model) -> Json:
    """Describe a model's response."""
    row: Json = {"type": "object"}
    if model.about is not None:
        names = model.about.columns
        row["properties"] = {name: _type(kind) for name, kind in names.items()}
        row["description"] = "With the model's own settings."
    if model.plan.model.task == "separation":  # a job's results, not its parts
        row = {"type": "object", "description": "A speaker: id, speaker, file, seconds, level_db, ..."}
    bad = {"type": "object", "properties": {"id": {"type": "string"}, "reason": {"type": "string"}}}
    return {
        "type": "object",
        "required": ["model", "rows", "bad"],
        "properties": {
            "model": {"const": model.name},
            "rows": {"type": "array", "items": row},
            "bad": {"type": "array", "items": bad},
            "files": {
                "type": "object",
                "additionalProperties": {"type": "string", "contentEncoding": "base64"},
            },
        },
    }


def _type(kind: str) -> Json:
    """Return the JSON type of a column."""
    if kind.startswith("list<"):
        return {"type": "array", "items": _type(kind[5:-1])}
    if kind in TYPES:
        return TYPES[kind]
    return {"type": "integer"} if kind.startswith(("int", "uint")) else {"type": ["number", "null"]}
