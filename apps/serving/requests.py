"""From HTTP bodies to the requests of the schemas: JSON, an upload, or the plain bytes of a file.

Nothing here opens an image, a recording or a table: the workers do.
"""

from __future__ import annotations

import json
from typing import Any

from pydantic import ValidationError
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request as HttpRequest

from manyheads.apps.serving.payload import Problem, Work
from manyheads.apps.serving.queue import Refused
from manyheads.apps.serving.schemas import FILES, MOST_FILES, Request, chosen, request_of

MOST_FIELDS = 16
LONGEST_SETTINGS = 10_000
SHOWN = 20  # wrong fields that an error lists
BROKEN = ("json_invalid", "json_type")  # pydantic's words for what is no JSON


async def read(http: HttpRequest, domain: str, task: str) -> Work:
    """Read a request.

    Args:
        http: What came.
        domain, task: Of the model.

    Raises:
        Refused: 400, 415 or 422, with the field that is wrong.
    """
    kind = http.headers.get("content-type", "").partition(";")[0].strip().lower()
    if http.headers.get("content-encoding", "identity").lower() != "identity":
        raise _refused(415, "unsupported_media_type", "send the body without a content-encoding")
    schema, field = request_of(domain, task), FILES.get(domain)
    if kind == "multipart/form-data":
        request = await _upload(http, schema, field)
    elif kind == "application/json":
        request = parse(schema, await http.body())
    elif field is not None and (kind.startswith(("image/", "audio/")) or kind == "application/octet-stream"):
        request = _files(schema, field, [(None, await http.body())], {})
    elif field is None and kind == "text/csv":
        request = _table(schema, await http.body(), {})
    else:
        takes = "the bytes of a file" if field else "text/csv"
        raise _refused(
            415, "unsupported_media_type", f"send application/json, multipart/form-data, or {takes}"
        )
    zipped = "application/zip" in http.headers.get("accept", "")
    return Work(request.payload(), chosen(request), zipped)


def parse(schema: type[Request], body: bytes) -> Request:
    """Read JSON.

    Raises:
        Refused: 400 where it is no JSON, 422 with the fields that are wrong.
    """
    try:
        return schema.model_validate_json(body)
    except ValidationError as error:
        raise _explained(error) from None


def _explained(error: ValidationError) -> Refused:
    """Say which fields are wrong."""
    found = error.errors(include_url=False, include_input=False, include_context=False)
    if found[0]["type"] in BROKEN:
        return _refused(400, "no_json", f"the body is no JSON: {found[0]['msg'].partition(': ')[2]}"[:200])
    details = tuple(
        {
            "field": ".".join(str(part)[:100] for part in each["loc"]) or "body",
            "reason": each["msg"].removeprefix("Value error, ")[:200],
        }
        for each in found[:SHOWN]
    )
    first = details[0]
    return Refused(Problem(422, "invalid_request", f"{first['field']}: {first['reason']}", details))


async def _upload(http: HttpRequest, schema: type[Request], field: str | None) -> Request:
    """Read a form: files, and settings as JSON in a field of that name."""
    try:
        parser = MultiPartParser(
            http.headers,
            http.stream(),
            max_files=MOST_FILES,
            max_fields=MOST_FIELDS,
            max_part_size=LONGEST_SETTINGS,
        )
        form = await parser.parse()
    except (MultiPartException, KeyError, ValueError, UnicodeError) as error:
        said = getattr(error, "message", "") or "a boundary, a name or a header is wrong"
        raise _refused(400, "no_form", f"the form cannot be read: {said}"[:200]) from None
    try:
        files: list[tuple[str | None, bytes]] = []
        settings: dict[str, Any] = {}
        for name, value in form.multi_items():
            if isinstance(value, UploadFile):
                files.append((_name(value.filename), await value.read()))
            elif name == "settings":
                settings = _settings(value)
            else:
                raise _wrong(name[:100], "no such field: files, and settings as JSON")
    finally:
        await form.close()
    if not files:
        raise _wrong(field or "csv", "no file in the form")
    if field is not None:
        return _files(schema, field, files, settings)
    if len(files) > 1:
        raise _wrong("csv", "one file in a form")
    return _table(schema, files[0][1], settings)


def _name(name: str | None) -> str | None:
    """Return a file's name without what some clients put in front of it."""
    return (name or "").replace("\\", "/").rpartition("/")[2][:200] or None


def _settings(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        raise _wrong("settings", "no JSON") from None
    if not isinstance(found, dict):
        raise _wrong("settings", "not an object")
    return found


def _files(
    schema: type[Request], field: str, files: list[tuple[str | None, bytes]], settings: dict[str, Any]
) -> Request:
    """Make the request of files; their bytes are taken as they are."""
    from manyheads.apps.serving.schemas import File

    for _, content in files:
        if not content:
            raise _wrong(field, "an empty file")
    listed = [File.model_construct(id=id, data=content) for id, content in files]
    return _checked(schema, settings, {field: listed})


def _table(schema: type[Request], content: bytes, settings: dict[str, Any]) -> Request:
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise _wrong("csv", "the table is no UTF-8 text") from None
    return _checked(schema, settings, {"csv": text})


def _checked(schema: type[Request], settings: dict[str, Any], fields: dict[str, Any]) -> Request:
    try:
        return schema.model_validate({**fields, "settings": settings}, strict=True)
    except ValidationError as error:
        raise _explained(error) from None


def _wrong(field: str, reason: str) -> Refused:
    details = ({"field": field, "reason": reason},)
    return Refused(Problem(422, "invalid_request", f"{field}: {reason}", details))


def _refused(status: int, code: str, message: str) -> Refused:
    return Refused(Problem(status, code, message))
