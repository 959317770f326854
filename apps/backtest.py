"""`manyheads timeseries backtest`: a model on rolling windows over rows that are known.

Only options are read here; the work is in `apps.rolling`, which imports torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

from manyheads.apps import options
from manyheads.apps.arguments import Parser, levels, make_parser, positive
from manyheads.core.errors import UsageError

Conformal = Literal["split", "rolling"]
SPLITS = ("ratio", "ett_hour", "ett_minute")
_EPILOG = """\
what is tested:
  --config NAME   the run's best model on the test part of the config's data, as `test` does
  MODEL           the same of a run folder
  MODEL FILE      a model folder on a CSV or parquet file, or on a data set by its name: the last fifth of
                  each series (a data set: its test part), or as many rows as --windows and --step take

examples:
  manyheads timeseries backtest --config itransformer_etth1_96
  manyheads timeseries backtest quickstart/model sales.parquet --windows 12 --step 24 --conformal rolling
  manyheads timeseries backtest --config itransformer_etth1_96 --step 96 --refit 10"""


@dataclass(frozen=True)
class BacktestOptions:
    """What to measure.

    Args:
        model: A model folder or a run folder.
        file: A file or a data set's name; not with a run.
        config: A config's file, in place of model and file.
        step: Rows from a window to the next.
        windows: Windows of each series, the last ones; None for all.
        refit: Train again after so many windows; None for never.
        levels: Levels of the quantiles; None for those that the model has.
        conformal: Intervals made of the errors of earlier windows, in place of the model's own.
        split: Where a file's test part begins.
        season: Rows in a season, for MASE; None takes the frequency's.
        seed: Seed; None takes the run's.
        batch_size: Windows a batch.
        output: The folder to write.
        json: Print the results as JSON.
        quiet: Print results alone.
    """

    model: Path | None = None
    file: str | None = None
    config: Path | None = None
    step: int = 1
    windows: int | None = None
    refit: int | None = None
    levels: tuple[float, ...] | None = None
    conformal: Conformal | None = None
    split: Literal["ratio", "ett_hour", "ett_minute"] | None = None
    season: int | None = None
    seed: int | None = None
    batch_size: int = 64
    output: Path | None = None
    json: bool = False
    quiet: bool = False


def _parser() -> Parser:
    parser = make_parser(
        "timeseries backtest",
        "Forecast rolling windows over rows that are known, and measure them: by series and overall, in\n"
        "scaled and in own units, beside the published figure where the protocol is its own.",
        epilog=_EPILOG,
    )
    add = parser.add_argument
    add("model", metavar="MODEL", nargs="?", type=Path, help="a model folder, or a run folder")
    add("file", metavar="FILE", nargs="?", help="a CSV or parquet file, or a data set's name")
    add("-c", "--config", help="a config's name or file, whose run is measured")
    add("--step", type=int, default=1, help="rows from a window to the next (1: the published protocol)")
    add("--windows", type=int, help="windows of each series, the last ones (all of the test part)")
    add(
        "--refit",
        default="none",
        help="train again after every so many windows, on all rows before them, by the run's config (none)",
    )
    add("--levels", help="levels of the quantiles, as in 0.1,0.5,0.9 (those that the model has)")
    add(
        "--conformal",
        choices=("split", "rolling"),
        help="intervals of the size of the errors in the windows before the tested ones, fixed or moving with"
        " the truth, in place of the model's own (levels: 0.05,0.95)",
    )
    add("--split", choices=SPLITS, help="FILE: where its test part begins (ratio: the last fifth)")
    add("--season", type=int, help="rows in a season, for MASE (a day of hours, a week of days, ...)")
    add("--seed", type=int, help="seed of what is random, and of training again (the run's)")
    add("--batch-size", type=int, default=64, help="windows a batch (64)")
    add("-o", "--output", type=Path, help="folder to write (the run's backtest/, or backtest/)")
    add("--json", action="store_true", help="print the results as JSON")
    add("--quiet", action="store_true", help="no progress")
    return parser


def read_options(args: Sequence[str]) -> BacktestOptions:
    """Read and check the command line; imports no torch.

    Raises:
        UsageError: What is wrong.
    """
    given = _parser().parse(args)
    config = _config(given.model, given.file, given.config)
    refit = _refit(given.refit)
    if config is None and refit is not None:
        raise UsageError("--refit trains by a config: give --config or a run folder in place of MODEL FILE")
    if config is not None and given.split is not None:
        raise UsageError("--split is for a FILE; a run is tested where its config says")
    return BacktestOptions(
        model=given.model,
        file=given.file,
        config=config,
        step=cast(int, positive("--step", given.step)),
        windows=positive("--windows", given.windows),
        refit=refit,
        levels=levels("--levels", given.levels),
        conformal=given.conformal,
        split=given.split,
        season=positive("--season", given.season),
        seed=given.seed,
        batch_size=cast(int, positive("--batch-size", given.batch_size)),
        output=given.output,
        json=given.json,
        quiet=given.quiet or given.json,
    )


def _config(model: Path | None, file: str | None, config: str | None) -> Path | None:
    """Return the config of the run that is meant, if it is one."""
    if config is not None:
        if model is not None:
            raise UsageError("give --config, or MODEL and FILE, not both")
        return options.resolve_config("timeseries", config)
    if model is None:
        raise UsageError("--config is needed, or MODEL and FILE (`manyheads timeseries backtest --help`)")
    if not model.is_dir():
        raise UsageError(f"no folder {model}")
    if file is not None:
        return None
    if not (model / "config.yaml").is_file():
        raise UsageError(
            f"{model} is no run folder: give a FILE or a data set to test it on, as in MODEL FILE"
        )
    return model / "config.yaml"


def _refit(text: str) -> int | None:
    if text == "none":
        return None
    if not text.isdecimal() or int(text) < 1:
        raise UsageError(f"--refit takes `none` or a number of windows from 1, not {text!r}")
    return int(text)


def main(args: Sequence[str]) -> int:
    """Run the command."""
    read = read_options(args)
    from manyheads.apps.rolling import run

    return run(read)
