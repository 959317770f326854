"""`manyheads data`: the data sets, listed with licence and size, or fetched with their checksums verified."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence

from manyheads.apps.arguments import Parser, make_parser
from manyheads.core import datasets
from manyheads.core.catalog import DOMAINS
from manyheads.core.errors import UsageError


def parser() -> Parser:
    """Return the command's parser."""
    made = make_parser(
        "data",
        "List the data sets with licence, size and where they are, or fetch one (checksum verified).",
        epilog="examples:\n  manyheads data list --domain graph\n  manyheads data get fashion_mnist",
    )
    made.add_argument(
        "action", nargs="?", choices=("list", "get"), default="list", help="list (default), get"
    )
    made.add_argument("name", metavar="NAME", nargs="?", help="with get: the data set's name")
    made.add_argument("--domain", choices=DOMAINS, help="with list: only this domain's")
    made.add_argument("--json", action="store_true", help="print JSON")
    return made


def main(args: Sequence[str]) -> int:
    """List the data sets or fetch one."""
    given = parser().parse(args)
    if given.action == "get":
        if given.name is None:
            raise UsageError("manyheads data get needs a NAME (`manyheads data list` lists them)")
        path = datasets.locate(given.name, None if given.json else show_bytes)
        print(json.dumps({"name": given.name, "path": str(path)}) if given.json else path)
        return 0
    if given.name is not None:
        raise UsageError(f"manyheads data list takes no name; `manyheads data get {given.name}` fetches one")
    found = datasets.datasets(given.domain)
    if given.json:
        rows = [{**dataclasses.asdict(each), "size": each.size, "place": place(each)} for each in found]
        print(json.dumps(rows))
        return 0
    width = max(len(each.name) for each in found)
    for each in found:
        print(
            f"{each.name:{width}} {each.domain:10} {each.size / 1e6:6.1f} MB  {place(each):11} {each.split}"
        )
        print(f"{'':{width}} {each.summary}")
        print(f"{'':{width}} {each.licence}")
    return 0


def place(dataset: datasets.DataSet) -> str:
    """Say whether a data set is here, can be downloaded, or has to be put here by hand."""
    if datasets.present(dataset) is not None:
        return "here"
    return "to download" if all(file.address for file in dataset.files) else "by hand"


def show_bytes(received: int, total: int) -> None:
    """Show how far a download is, where someone looks on."""
    if sys.stderr.isatty():
        end = "\n" if received >= total else ""
        print(f"\r{received / 1e6:.1f} of {total / 1e6:.1f} MB", end=end, file=sys.stderr, flush=True)
