"""`manyheads models`: the catalogue, listed and shown; models of a hub, pulled, verified and published."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from manyheads.apps.arguments import Parser, make_parser
from manyheads.core.catalog import DOMAINS, arguments, entries, find, list_models, matching
from manyheads.core.errors import ManyheadsError, UsageError

if TYPE_CHECKING:
    from manyheads.core.pull import Pulled

ACTIONS = ("list", "show", "pull", "verify", "push")


def main(args: Sequence[str]) -> int:
    """List the catalogue, show one entry, or pull, verify or publish a model."""
    if args and args[0] in ("pull", "verify", "push"):
        return {"pull": _pull, "verify": _verify, "push": _push}[args[0]](args[1:])
    return _list(args)


def _list(args: Sequence[str]) -> int:
    parser = make_parser(
        "models",
        "List the catalogue, or show one model: its paper, task and arguments.",
        epilog="""also:
  manyheads models pull REF      fetch published weights, verified, and converted to a model folder
  manyheads models verify [REF]  check hashes, shapes and card of a folder or of what is in the cache
  manyheads models push DIR REF  publish a model folder

example: manyheads models list 'swin*'""",
    )
    parser.add_argument("action", nargs="?", choices=ACTIONS, default="list")
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
            else "\n".join(f"{key:9} {value}" for key, value in shown.items() if value is not None)
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


def _choices(parser: Parser) -> None:
    parser.add_argument("--dialect", default="", help="the published layout, where it is not told by itself")
    parser.add_argument("--file", default="", help="which of several weights")
    parser.add_argument(
        "--option",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="of the conversion; may be repeated",
    )


def _pull(args: Sequence[str]) -> int:
    parser = make_parser(
        "models pull",
        "Fetch a model: org/name[@revision] of a hub, or a catalogue name whose published weights are\n"
        "known. A path converts published files that are here. A broken download goes on where it stopped,\n"
        "every file's hash is verified, and what others published is converted once to a model folder.",
        epilog="example: manyheads models pull org/name@v1.0\n"
        "HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE are honoured; MANYHEADS_CACHE is where models are kept.",
    )
    parser.add_argument("reference", metavar="REF", help="a reference, a catalogue name, or a path")
    parser.add_argument("-o", "--output", type=Path, help="also write the model folder here")
    _choices(parser)
    parser.add_argument("--dialects", action="store_true", help="list the published layouts that are known")
    parser.add_argument("--quiet", action="store_true", help="no progress")
    parser.add_argument("--json", action="store_true", help="print JSON")
    if "--dialects" in args:
        return _dialects()
    parsed = parser.parse(args)
    from manyheads.apps.downloads import Bar
    from manyheads.core import pull, references

    choice = pull.Choice(parsed.dialect, parsed.file, dict(map(_option, parsed.option)))
    start, path = time.perf_counter(), Path(parsed.reference)
    with Bar(parsed.quiet or parsed.json) as bar:
        if path.exists():
            if parsed.output is None:
                raise UsageError(f"{path} is here: -o says where to write its model folder")
            pulled = pull.convert_local(path, parsed.output, choice)
        else:
            reference = references.parse(parsed.reference)
            if parsed.reference in list_models():
                reference, known = pull.of_catalogue(parsed.reference)
                choice = dataclasses.replace(known, options={**known.options, **choice.options})
            if reference is None:
                raise UsageError(
                    f"{parsed.reference!r} is no org/name[@revision], no catalogue name and no path"
                )
            pulled = pull.pull(reference, choice, bar)
            if parsed.output is not None:
                pulled = pull.copy(pulled, parsed.output)
    seconds = time.perf_counter() - start
    if parsed.json:
        print(json.dumps({**dataclasses.asdict(pulled), "folder": str(pulled.folder), "seconds": seconds}))
        return 0
    _report(pulled, seconds)
    return 0


def _report(pulled: Pulled, seconds: float) -> None:
    """Say what was pulled, and what was done to it."""
    came = f"{pulled.received / 1e6:.1f} MB" if pulled.received else "nothing new"
    print(f"{pulled.reference}" + (f" at {pulled.commit}" if pulled.commit else ""))
    rows = {
        "files": f"{pulled.files}, {pulled.size / 1e6:.1f} MB, verified; {came} came, {seconds:.1f} s in all",
        "layout": f"{pulled.dialect}, converted" if pulled.dialect else "a model folder",
        "model": f"{pulled.name}: {pulled.tensors} tensors, {pulled.parameters:,} parameters",
        "licence": pulled.licence or "nothing says",
        "folder": str(pulled.folder),
    }
    if not pulled.ready:
        rows["note"] = "nothing says how inputs are prepared: Python can load it, `predict` refuses it"
    for name, text in rows.items():
        print(f"  {name:8} {text}")


def _dialects() -> int:
    from manyheads.core import dialects

    found = dialects.dialects()
    width = max(map(len, found))
    for name, dialect in found.items():
        print(f"{name:{width}}  {dialect.summary}")
        print(
            f"{'':{width}}  files {' '.join(dialect.files)}; options {', '.join(dialect.options) or 'none'}"
        )
    return 0


def _option(text: str) -> tuple[str, str | int | float | bool]:
    key, equals, value = text.partition("=")
    if not equals or not key.isidentifier():
        raise UsageError(f"--option takes KEY=VALUE, not {text!r}")
    try:
        found = json.loads(value)
    except (ValueError, RecursionError):
        return key, value
    return key, found if isinstance(found, bool | int | float | str) else value


def _verify(args: Sequence[str]) -> int:
    parser = make_parser(
        "models verify",
        "Check a model folder, or a model in the cache: every hash, names and shapes against the catalogue,\n"
        "the card. Without REF: everything in the cache.",
        epilog="example: manyheads models verify quickstart/model",
    )
    parser.add_argument(
        "reference", metavar="REF", nargs="?", help="a folder, org/name[@revision]; default: all"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parsed = parser.parse(args)
    from manyheads.core.verifying import verify

    good, bad = [], []
    for folder in _folders(parsed.reference):
        try:
            good.append(verify(folder))
        except ManyheadsError as error:
            if parsed.reference is not None:
                raise
            bad.append(str(error))
    if parsed.json:
        shown = [{**dataclasses.asdict(each), "folder": str(each.folder)} for each in good]
        print(json.dumps({"verified": shown, "bad": bad}))
    else:
        for each in good:
            print(f"{each.source or each.folder}")
            print(f"  {each.name}: {each.tensors} tensors, {each.parameters:,} parameters; {each.licence}")
            print(f"  hash, names, shapes and card are right: {each.folder}")
        for text in bad:
            print(f"bad: {text}")
        if not good and not bad:
            print("nothing in the cache")
    return 1 if bad else 0


def _folders(reference: str | None) -> list[Path]:
    """Return the model folders that are meant."""
    from manyheads.core import hub, pull, references

    if reference is None:
        return pull.cached()
    found = references.parse(reference)
    if found is None or Path(reference).exists():
        return [hub.find_folder(reference)]
    folders = pull.cached(found)
    if not folders:
        raise UsageError(f"{reference} is not in the cache (`manyheads models pull {reference}`)")
    return folders


def _push(args: Sequence[str]) -> int:
    parser = make_parser(
        "models push",
        "Publish a model folder in one commit, with its card: licence, figures, usage. It is verified\n"
        "before, and what the hub lists is compared after. The token is HF_TOKEN's, or that of\n"
        "huggingface_hub's login.",
        epilog="example: manyheads models push quickstart/model org/name",
    )
    parser.add_argument("folder", metavar="DIR", type=Path, help="a model folder, or a run that has one")
    parser.add_argument("reference", metavar="REF", help="org/name, or org/name@branch")
    parser.add_argument("--timm", action="store_true", help="in timm's layout, which timm reads (images)")
    parser.add_argument("--private", action="store_true", help="a new repository is for your eyes alone")
    parser.add_argument("--licence", default="", help="of the weights, for the card")
    parser.add_argument("--message", default="", help="of the commit")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parsed = parser.parse(args)
    from manyheads.apps.publishing import Push, push
    from manyheads.core import hub, references

    reference = references.parse(parsed.reference)
    if reference is None or reference.commit is not None:
        raise UsageError(f"{parsed.reference!r} is no org/name or org/name@branch")
    if not parsed.folder.exists():
        raise UsageError(f"no model folder {parsed.folder}")
    how = Push(parsed.private, parsed.timm, parsed.licence, parsed.message)
    pushed = push(hub.find_folder(parsed.folder), reference, how)
    if parsed.json:
        print(json.dumps(dataclasses.asdict(pushed)))
        return 0
    print(f"{pushed.reference} at {pushed.commit}")
    for name, digest in pushed.files.items():
        print(f"  {name:18} sha256 {digest}")
    print(f"use: manyheads predict {reference.repository}@{pushed.commit} INPUT -o OUTPUT")
    return 0
