"""`manyheads models`: the catalogue's models, listed and shown."""

from __future__ import annotations

import json
from collections.abc import Sequence

from manyheads.apps.arguments import make_parser
from manyheads.core.catalog import DOMAINS, arguments, entries, find, matching
from manyheads.core.errors import UsageError


def main(args: Sequence[str]) -> int:
    """List the catalogue or show one entry."""
    parser = make_parser(
        "models",
        "List the catalogue, or show one model: its paper, task and arguments.",
        epilog="example: manyheads models list 'swin*'",
    )
    parser.add_argument("action", nargs="?", choices=("list", "show"), default="list")
    parser.add_argument(
        "name",
        nargs="?",
        help="with show: the model's name; with list: a pattern that names fit, such as 'swin*'",
    )
    parser.add_argument("--domain", choices=DOMAINS, help="only this domain's")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parsed = parser.parse(args)
    if parsed.action == "show":
        if parsed.name is None:
            raise UsageError("manyheads models show needs a NAME")
        entry = find(parsed.name)
        shown = {**vars(entry), "arguments": arguments(entry)}
        print(
            json.dumps(shown)
            if parsed.json
            else "\n".join(f"{key:9} {value}" for key, value in shown.items())
        )
        return 0
    found = matching(entries(parsed.domain), parsed.name)
    if parsed.json:
        print(json.dumps([vars(entry) for entry in found]))
        return 0
    width, tasks = (max(len(getattr(entry, key)) for entry in found) for key in ("name", "task"))
    for entry in found:
        print(f"{entry.name:{width}}  {entry.domain:10}  {entry.task:{tasks}}  {entry.summary}")
    return 0
