"""A backtest's work: find model and data, forecast window after window, measure, and write the folder."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from manyheads.apps import backtest_report as report
from manyheads.apps import options
from manyheads.apps.backtest import BacktestOptions
from manyheads.apps.progress import Count
from manyheads.apps.stopping import Stopping
from manyheads.core import hub
from manyheads.core.catalog import find
from manyheads.core.errors import UsageError
from manyheads.core.tables import column_names
from manyheads.timeseries.backtest import Parts, RollingModel, Schedule, cut, season_of, units
from manyheads.timeseries.conformal import SplitConformal
from manyheads.timeseries.data import Split, find_source
from manyheads.timeseries.frames import Series, read
from manyheads.timeseries.layout import Layout, find_layout
from manyheads.timeseries.metrics import SeriesSums, seasonal_scale
from manyheads.timeseries.predictor import levels_of
from manyheads.timeseries.preprocessing import Preprocessing
from manyheads.timeseries.published import Published, published
from manyheads.timeseries.rolling import Fixed, Intervals, Rolling, coverages_of
from manyheads.timeseries.treatment import Range

if TYPE_CHECKING:
    from manyheads.apps.trainer import CLI

CONFORMAL_LEVELS = (0.05, 0.95)


@dataclass(frozen=True)
class Subject:
    """What is tested.

    Args:
        model: The module.
        config: What its folder says of it.
        of: How its train data were treated.
        dataset: A data set's name, or a file.
        split: By which rule its rows are split; None where the number of windows says it.
        output: The folder to write.
        seed: The seed.
        cli: The run's config, where there is one.
    """

    model: nn.Module
    config: hub.ModelConfig
    of: Preprocessing
    dataset: str
    split: Split | None
    output: Path
    seed: int
    cli: CLI | None = None

    @property
    def path(self) -> Path:
        """The file."""
        return find_source(self.dataset, None)[0]

    @property
    def layout(self) -> Layout:
        """Which of the file's columns are what."""
        return find_layout(column_names(self.path), str(self.path), **self.of.named)


def run(given: BacktestOptions) -> int:
    """Run a backtest and write its folder.

    Raises:
        UsageError: An option does not fit model or data.
        DataError: The data cannot be tested.
    """
    subject = _of_run(given) if given.config else _of_folder(given)
    report.check_free(subject.output)
    of = subject.of
    series = read(subject.path, freq=of.freq, missing=of.missing, **of.named)
    rows = (given.windows - 1) * given.step + of.pred_len if given.windows else None
    parts = cut(series, of, subject.split, rows)
    schedule = Schedule(series, parts, of, given.step, given.windows)
    levels, season = _levels(given, subject), given.season or season_of(of.freq)
    pairs = list(zip(series, parts, strict=True))
    naive = [seasonal_scale(torch.tensor(s.values[slice(*p.train)]), season) for s, p in pairs]
    sums = SeriesSums(units(series, parts, of), torch.stack(naive), levels)
    tested = report.Tested(series, subject.layout, of.seq_len, of.pred_len)
    torch.manual_seed(subject.seed)
    with report.whole_folder(subject.output) as folder, Stopping() as stopping:
        with (folder / report.WINDOWS).open("w", encoding="utf-8", newline="") as stream:
            record = report.Record(tested, sums, stream)
            refits = _roll(given, subject, series, parts, schedule, record, stopping)
        overall, rows_by_series = report.results(tested, sums)
        about = _about(given, subject, schedule, season, refits)
        results = {**about, "overall": overall, "series": rows_by_series}
        (folder / report.RESULTS).write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
        report.write_series(folder / report.SERIES, rows_by_series)
        record.draw(folder / report.PICTURE, f"{results['model']} on {subject.dataset}: the last windows")
    print(json.dumps(results) if given.json else report.text(results, subject.output))
    return 0


def load_forecaster(folder: str | Path) -> tuple[nn.Module, hub.ModelConfig, Preprocessing]:
    """Load a forecasting model's folder.

    Raises:
        UsageError: It is no folder of a forecaster.
    """
    found = hub.find_folder(folder)
    config = hub.read_config(found)
    task = find(config.name).task
    if config.domain != "timeseries" or task != "forecast":
        raise UsageError(f"{found} holds a model for {task}; a backtest is of forecasts")
    model, config = hub.load_model(found)
    return model, config, Preprocessing.from_json(config.preprocessing)


def label(config: hub.ModelConfig) -> str:
    """Return a model's name, with that of the model within."""
    base = config.arguments.get("base")
    return f"{config.name} ({base})" if isinstance(base, str) else config.name


def _of_folder(given: BacktestOptions) -> Subject:
    """Return a model folder with a file or data set."""
    assert given.model is not None
    assert given.file is not None
    model, config, of = load_forecaster(given.model)
    named = not Path(given.file).suffix
    split = find_source(given.file, given.split)[1] if named else given.split
    seed = given.seed if given.seed is not None else _seed(config)
    return Subject(model, config, of, given.file, split, given.output or Path("backtest"), seed)


def _seed(config: hub.ModelConfig) -> int:
    seed = config.training.get("seed")
    return seed if isinstance(seed, int) else 0


def _of_run(given: BacktestOptions) -> Subject:
    """Return the best model of a run with its config's data."""
    from manyheads.apps import training
    from manyheads.apps.trainer import make_cli

    training.quieten()
    args = ["--config", str(given.config), *(["--output", str(given.model)] if given.model else [])]
    task = options.task_of("timeseries", args)
    if task.name != "forecast":
        raise UsageError(f"{given.config} is a config of {task.name}; a backtest is of forecasts")
    cli = make_cli("timeseries", task, "backtest", args)
    folder = training.run_folder(cli)
    if not (folder / training.MODEL).is_dir():
        raise UsageError(f"no model folder {folder / training.MODEL}: fit first")
    model, config, of = load_forecaster(folder / training.MODEL)
    dataset = cli.config["data"]["dataset"]
    split = find_source(dataset, cli.config["data"]["split"])[1]
    seed = given.seed if given.seed is not None else cli.config["seed_everything"]
    return Subject(model, config, of, dataset, split, given.output or folder / "backtest", seed, cli)


def _levels(given: BacktestOptions, subject: Subject) -> tuple[float, ...]:
    """Return the levels of the quantiles that are measured.

    Raises:
        UsageError: The model has not got one of those asked for.
    """
    if given.conformal:
        coverages_of(given.levels or CONFORMAL_LEVELS)
        return given.levels or CONFORMAL_LEVELS
    has = SplitConformal.from_json(subject.of.conformal) if subject.of.conformal else subject.model
    try:
        return levels_of(has, given.levels)
    except UsageError as error:
        raise UsageError(
            f"{error}; --conformal split or rolling makes intervals around any model's forecasts,"
            " and `fit --model.output quantile` trains quantiles"
        ) from None


def _roll(
    given: BacktestOptions,
    subject: Subject,
    series: Sequence[Series],
    parts: Sequence[Parts],
    schedule: Schedule,
    record: report.Record,
    stopping: Stopping,
) -> list[dict[str, object]]:
    """Forecast every window, training again where that is asked for; return what was trained."""
    refits: list[dict[str, object]] = []
    tests = [part.test for part in parts]
    calibration = [part.calibration for part in parts]
    trained = None if given.refit else RollingModel(subject.model, subject.of, series)
    intervals: Intervals | None = None
    with Count(schedule.total, "windows", given.quiet) as count:
        for block in schedule.blocks(given.refit):
            if given.refit:
                from manyheads.apps.refit import refit

                assert subject.cli is not None
                cutoffs = schedule.first_targets(block[0])
                held = [end - first - subject.of.seq_len for first, end in calibration]
                again = refit(subject.cli, subject.of, series, cutoffs, held, subject.layout, subject.seed)
                trained, calibration_now = again.tester, again.validation
                refits.append({"before_window": block[0], **again.about})
            else:
                calibration_now = calibration
            assert trained is not None
            if intervals is None or given.conformal != "rolling":
                intervals = _intervals(given, subject, trained, calibration_now, record)
            own = () if intervals else record.sums.levels
            windows = trained.windows(tests)
            for indices in schedule.batches(block, given.batch_size):
                stopping.check()
                answer = trained.ask(windows, indices, own)
                record.add(answer._replace(quantiles=intervals.around(answer)) if intervals else answer)
                count.advance(len(indices))
    return refits


def _intervals(
    given: BacktestOptions,
    subject: Subject,
    tester: RollingModel,
    calibration: Sequence[Range],
    record: report.Record,
) -> Intervals | None:
    """Return conformal intervals: those asked for, or those of the model's folder."""
    levels, columns = record.sums.levels, record.tested.series[0].columns
    if given.conformal == "rolling":
        return Rolling(tester, calibration, levels, given.step, given.batch_size)
    if given.conformal == "split" or (subject.of.conformal and given.refit):
        return Fixed.fit(tester, calibration, columns, levels, given.batch_size)
    if subject.of.conformal:
        return Fixed(SplitConformal.from_json(subject.of.conformal), columns, levels)
    return None


def _about(
    given: BacktestOptions,
    subject: Subject,
    schedule: Schedule,
    season: int,
    refits: list[dict[str, object]],
) -> dict[str, object]:
    """Return what was measured and how, as `backtest.json` holds it beside the figures."""
    of, config = subject.of, subject.config
    whole = given.step == 1 and given.windows is None and given.refit is None
    known = published_figure(subject) if whole else None
    return {
        "model": label(config),
        "model_sha256": config.identity,
        "dataset": subject.dataset,
        "seq_len": of.seq_len,
        "pred_len": of.pred_len,
        "split": subject.split or ("last rows" if given.windows else "ratio"),
        "windows": schedule.total,
        "step": given.step,
        "season": season,
        "seed": subject.seed,
        "training": dict(config.training),
        "refit": given.refit,
        "refits": refits,
        "conformal": given.conformal or ("split" if of.conformal else None),
        "units": report.UNITS,
        "published": asdict(known) if known else None,
    }


def published_figure(subject: Subject) -> Published | None:
    """Return the published figure where this is its protocol: all columns and rows, nothing added."""
    of = subject.of
    named = Path(subject.dataset).suffix == ""
    standard = named and subject.split == find_source(subject.dataset, None)[1]
    plain = of.targets is None and not of.treatment.covariates and of.treatment.scaling == "global"
    if not (standard and plain and of.missing == "refuse"):
        return None
    return published(subject.dataset, of.seq_len, of.pred_len, subject.config.name)
