"""`manyheads quickstart`: the options; the tour is in `apps.touring`, which imports torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from manyheads.apps.arguments import Parser, make_parser, positive


def parser() -> Parser:
    """Return the command's parser."""
    made = make_parser(
        "quickstart", "Real data, then: train, test, save, predict as a job, plot. Works offline."
    )
    made.add_argument(
        "domain", nargs="?", choices=("timeseries",), default="timeseries", help="timeseries alone so far"
    )
    made.add_argument(
        "-o", "--output", type=Path, default=Path("quickstart"), help="folder to fill (quickstart/)"
    )
    made.add_argument("--epochs", type=int, default=4, help="training epochs (4)")
    made.add_argument("--seed", type=int, default=2023, help="random seed (2023)")
    return made


def main(args: Sequence[str]) -> int:
    """Run the guided tour of one domain."""
    given = parser().parse(args)
    positive("--epochs", given.epochs)
    from manyheads.apps.touring import run

    return run(given.output, epochs=given.epochs, seed=given.seed)
