"""`manyheads quickstart`: the options; the tours are in `apps.tours`, and `apps.touring` runs them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from manyheads.apps.arguments import Parser, make_parser, positive
from manyheads.apps.tours import TOURS, Tour
from manyheads.core import datasets
from manyheads.core.errors import DataError, UsageError


def _parser() -> Parser:
    parser = make_parser(
        "quickstart",
        "Real data, then: train, test, save, predict as a job, plot; each step is a command that is shown.\n"
        "Up to three minutes on two cores. Works offline: timeseries on data that are in the package, the\n"
        "others on data sets that are here (`manyheads data list`) or can be downloaded once.",
        epilog="tours:\n" + "\n".join(f"  {name:10}  {tour.title}" for name, tour in TOURS.items()),
    )
    parser.add_argument(
        "domain",
        metavar="DOMAIN",
        nargs="?",
        choices=tuple(TOURS),
        default="timeseries",
        help=f"{', '.join(TOURS)} (timeseries)",
    )
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        metavar="DIR",
        help="folder to fill (quickstart, or quickstart_DOMAIN for the others)",
    )
    parser.add_argument("--epochs", type=int, metavar="N", help="training epochs (the tour's own number)")
    parser.add_argument("--seed", type=int, help="random seed (the config's)")
    return parser


def main(args: Sequence[str]) -> int:
    """Run the tour of one domain."""
    given = _parser().parse(args)
    positive("--epochs", given.epochs)
    tour = TOURS[given.domain]
    usual = Path("quickstart" if given.domain == "timeseries" else f"quickstart_{given.domain}")
    output = given.output or usual
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UsageError(f"{output} is not empty: remove it, or choose another folder with -o")
    find_data(given.domain, tour)
    from manyheads.apps.touring import run

    return run(given.domain, tour, output, given.epochs or tour.epochs, given.seed)


def find_data(domain: str, tour: Tour) -> None:
    """Find the tour's data set, or download it.

    Raises:
        UsageError: It is not here and cannot be had; says what to do.
    """
    from manyheads.apps.data import show_bytes

    try:
        datasets.locate(tour.dataset, show_bytes)
    except DataError as error:
        other = "" if domain == "timeseries" else "; `manyheads quickstart` without a domain needs nothing"
        raise UsageError(f"quickstart {domain}: {error}{other}") from error
