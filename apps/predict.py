"""`manyheads predict`: a model over files, as a batch job."""

from __future__ import annotations

import json
from collections.abc import Sequence

from manyheads.apps import options
from manyheads.apps.arguments import Parser, make_parser
from manyheads.core.errors import UsageError

HELP = """Run a model over files. The output folder holds parts, bad records, files made of several parts
in `results` (a file a speaker, subtitles), and _SUCCESS at the end; a killed job is continued
with --resume and gives the same bytes. `manyheads jobs status OUT` tells how far one is."""
EPILOG = """INPUT and OUT may be addresses of any file system that fsspec knows: s3://bucket/photos, gs://...,
memory://... Keys and endpoints come from fsspec's own configuration: the environment
(FSSPEC_S3_ENDPOINT_URL=..., AWS_PROFILE=...) or the files in ~/.config/fsspec; `pip install s3fs` (gcsfs,
adlfs ...) brings the file system. Inputs from there are copied to the cache before the job starts, with a
check of their sizes, and removed when it is done; outputs go out shard by shard, and no more than a few
shards of them are ever on this machine. MANYHEADS_CACHE chooses the disk.

--engine ray runs the shards on the Ray cluster at --address HOST:PORT, else at RAY_ADDRESS, else on one that
it starts on this machine for the job. All nodes must see model, inputs and OUT under the same names.

example: manyheads predict quickstart/model sales.parquet -o forecasts"""
ENGINES = ("local", "ray")


def make() -> Parser:
    """Return the command's parser."""
    parser = make_parser("predict", HELP, epilog=EPILOG)
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="a model folder, a run folder, org/name[@revision], or a catalogue name with published weights",
    )
    parser.add_argument("inputs", metavar="INPUT", nargs="+", help="files, folders, patterns or addresses")
    parser.add_argument("-o", "--output", metavar="OUT", required=True, help="output folder or address")
    parser.add_argument("--engine", choices=ENGINES, default="local", help="where shards run (local)")
    parser.add_argument("--address", metavar="HOST:PORT", help="the Ray cluster (with --engine ray)")
    parser.add_argument("--batch-size", default="auto", help="records a batch (auto: the domain's default)")
    parser.add_argument(
        "--shard-size", default="auto", help="records a part file (auto: the domain's default, or 64)"
    )
    parser.add_argument(
        "--workers", default="auto", help="worker processes (auto: this process; with Ray one a processor)"
    )
    parser.add_argument("--resume", action="store_true", help="continue a job that was stopped")
    parser.add_argument(
        "--max-bad", type=float, default=0.0, help="share of bad records that is accepted (0)"
    )
    parser.add_argument("--quiet", action="store_true", help="no progress")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    for title, known in options.SETTINGS.items():
        group = parser.add_argument_group(title)
        for name, (kind, metavar, text) in known.items():
            group.add_argument(f"--{name.replace('_', '-')}", type=kind, metavar=metavar, help=text)
    return parser


def main(args: Sequence[str]) -> int:
    """Run a batch job."""
    parsed = make().parse(args)
    from manyheads.apps.jobs import JobOptions, run_job

    result = run_job(
        JobOptions(
            model=parsed.model,
            inputs=parsed.inputs,
            output=parsed.output,
            engine=parsed.engine,
            address=parsed.address,
            batch_size=_number(parsed.batch_size, "--batch-size"),
            shard_size=_number(parsed.shard_size, "--shard-size"),
            workers=_number(parsed.workers, "--workers", least=0),
            resume=parsed.resume,
            max_bad=parsed.max_bad,
            quiet=parsed.quiet or parsed.json,
            settings={
                name: getattr(parsed, name)
                for known in options.SETTINGS.values()
                for name in known
                if getattr(parsed, name) is not None
            },
        )
    )
    if parsed.json:
        shown = ("records", "rows", "bad", "shards", "seconds", "starting", "preparing")
        print(json.dumps({key: getattr(result, key) for key in shown}))
    return result.exit_code


def _number(text: str, option: str, least: int = 1) -> int | None:
    if text == "auto":
        return None
    if not text.isdecimal() or int(text) < least:
        raise UsageError(f"{option} takes `auto` or a number from {least}, not {text!r}")
    return int(text)
