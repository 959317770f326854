"""`manyheads timeseries plot`: forecasts of a file, or what a model's variates attend to, as a picture.

Only options are read here; the work is in `apps.drawing`, which imports torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from manyheads.apps.arguments import Parser, levels, make_parser, positive
from manyheads.core.errors import UsageError

ENDINGS = (".png", ".pdf", ".svg")


@dataclass(frozen=True)
class PlotOptions:
    """What to draw.

    Args:
        model: A model folder.
        file: A CSV or parquet file, or a data set's name.
        output: The picture.
        series: Ids of the series to draw; None for the first ones.
        truth: Forecast the last rows of the file, and draw them beside.
        levels: Levels of the quantiles; None for those that the model has.
        attention: Draw the attention map.
        layer: Whose map: a layer, counted from 1; None for the last.
        head: One head's, counted from 1; None for the mean of all.
        windows: Over how many windows the map is a mean: the last ones.
    """

    model: Path
    file: str
    output: Path
    series: tuple[str, ...] | None = None
    truth: bool = False
    levels: tuple[float, ...] | None = None
    attention: bool = False
    layer: int | None = None
    head: int | None = None
    windows: int = 32


def _parser() -> Parser:
    parser = make_parser(
        "timeseries plot",
        "Draw a model's forecasts past the end of a file's series: history, forecast, quantiles as bands.\n"
        "With --attention, draw which variates, calendar features and covariates its variates attend to.",
        epilog="examples:\n"
        "  manyheads timeseries plot quickstart/model sales.parquet -o sales.png --series shop_1 shop_7\n"
        "  manyheads timeseries plot quickstart/model etth1 -o truth.png --truth\n"
        "  manyheads timeseries plot quickstart/model etth1 -o attention.png --attention",
    )
    add = parser.add_argument
    add("model", metavar="MODEL", type=Path, help="a model folder, or a run folder")
    add("file", metavar="FILE", help="a CSV or parquet file, or a data set's name")
    add("-o", "--output", type=Path, required=True, help=f"the picture ({', '.join(ENDINGS)})")
    add("--series", nargs="+", metavar="ID", help="the series to draw, by id or column (the first eight)")
    add("--truth", action="store_true", help="forecast the file's last rows, and draw them beside")
    add("--levels", help="levels of the quantiles, as in 0.1,0.5,0.9 (those that the model has)")
    add("--attention", action="store_true", help="the attention map in place of forecasts")
    add("--layer", type=int, help="with --attention: this layer's, from 1 (the last one's)")
    add("--head", type=int, help="with --attention: this head's, from 1 (the mean of all)")
    add("--windows", type=int, help="with --attention: the mean over so many last windows (32)")
    return parser


def read_options(args: Sequence[str]) -> PlotOptions:
    """Read and check the command line; imports no torch.

    Raises:
        UsageError: What is wrong.
    """
    given = _parser().parse(args)
    if given.output.suffix.lower() not in ENDINGS:
        raise UsageError(f"a picture ends in {', '.join(ENDINGS)}, not {given.output.name!r}")
    if not given.output.parent.is_dir():
        raise UsageError(f"no folder {given.output.parent}")
    for option in ("layer", "head", "windows"):
        positive(f"--{option}", getattr(given, option))
        if getattr(given, option) is not None and not given.attention:
            raise UsageError(f"--{option} is for --attention")
    if given.attention and (given.truth or given.levels):
        raise UsageError("--attention draws no forecasts: leave --truth and --levels out")
    return PlotOptions(
        model=given.model,
        file=given.file,
        output=given.output,
        series=tuple(given.series) if given.series else None,
        truth=given.truth,
        levels=levels("--levels", given.levels),
        attention=given.attention,
        layer=given.layer,
        head=given.head,
        windows=cast(int, given.windows or 32),
    )


def main(args: Sequence[str]) -> int:
    """Run the command."""
    read = read_options(args)
    from manyheads.apps.drawing import run

    return run(read)
