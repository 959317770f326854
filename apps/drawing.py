"""The pictures of `manyheads timeseries plot`."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import nn

from manyheads.apps.backtest_report import Tested, panels_of
from manyheads.apps.plot import PlotOptions
from manyheads.apps.rolling import label, load_forecaster
from manyheads.core import files
from manyheads.core.errors import BadRecord, DataError, UsageError, did_you_mean
from manyheads.core.tables import column_names
from manyheads.timeseries.attention_map import attention_maps, base_of, token_names
from manyheads.timeseries.backtest import RollingModel, Schedule, cut
from manyheads.timeseries.data import find_source
from manyheads.timeseries.frames import Series, read
from manyheads.timeseries.layout import find_layout
from manyheads.timeseries.plots import MOST_PANELS, Panel, draw_attention, draw_forecasts
from manyheads.timeseries.predictor import Predictor
from manyheads.timeseries.preprocessing import Preprocessing
from manyheads.timeseries.rolling import Fixed


def run(given: PlotOptions) -> int:
    """Draw a picture.

    Raises:
        UsageError: The model has not got what is asked for, or the file no such series.
        DataError: The file cannot be forecast.
    """
    if given.series and len(given.series) > MOST_PANELS:
        raise UsageError(f"--series takes {MOST_PANELS} series at most, not {len(given.series)}")
    model, config, of = load_forecaster(given.model)
    path = find_source(given.file, None)[0]
    # A name that only this process uses, with the ending that says what kind of picture it is.
    written = files.temporary(given.output)
    try:
        if given.attention:
            _draw_attention(given, model, of, path, written)
        else:
            predictor = Predictor(model, of, given.levels)
            panels = (_with_truth if given.truth else _past_the_end)(predictor, path, given.series or ())
            chosen = list(islice(panels, MOST_PANELS))
            _check_found([panel.name for panel in chosen], given.series or (), path)
            draw_forecasts(chosen, written, f"{label(config)} on {path.name}, {of.pred_len} rows ahead")
        files.commit(written, given.output)
    finally:
        written.unlink(missing_ok=True)
    print(given.output)
    return 0


def _matches(name: str, wanted: Collection[str]) -> bool:
    """Say whether a series, or one column of it, is among those wanted."""
    return not wanted or name in wanted or name.rpartition("/")[0] in wanted


def _check_found(names: Sequence[str], wanted: Collection[str], path: Path) -> None:
    found = {*names, *(name.rpartition("/")[0] for name in names)}
    for each in wanted:
        if each not in found:
            raise UsageError(f"{path} has no series {each!r}")


def _past_the_end(predictor: Predictor, path: Path, wanted: Collection[str]) -> Iterator[Panel]:
    """Forecast past the end of each series, and yield its columns."""
    for shard in predictor.shards(path, 64):
        for record in predictor.read(shard):
            if not any(_matches(name, wanted) for name in record.names):
                continue
            try:
                sample = predictor.prepare(record)
            except BadRecord as error:
                raise DataError(str(error)) from None
            (output,) = predictor.forward(predictor.collate([sample]))
            assert not isinstance(record.tail, DataError)
            for j, name in enumerate(record.names):
                fan = dict(zip(predictor.quantiles, output.quantiles[:, j].T, strict=True))
                if _matches(name, wanted):
                    yield Panel(
                        name, record.tail.ds, record.tail.values[:, j], output.ds, output.point[:, j], fan
                    )


def _with_truth(predictor: Predictor, path: Path, wanted: Collection[str]) -> Iterator[Panel]:
    """Forecast the last rows of each series, and yield its columns with what came."""
    of, levels = predictor.preprocessing, predictor.quantiles
    series = read(path, freq=of.freq, missing=of.missing, **of.named)
    layout = find_layout(column_names(path), str(path), **of.named)
    intervals = Fixed(predictor.conformal, series[0].columns, levels) if predictor.conformal else None
    for each in series:
        tested = Tested([each], layout, of.seq_len, of.pred_len)
        if not any(_matches(name, wanted) for name in tested.names(0)):
            continue
        tester, parts = RollingModel(predictor.model, of, [each]), cut([each], of, None, of.pred_len)
        schedule = Schedule([each], parts, of, windows=1)
        answer = tester.ask(tester.windows([parts[0].test]), schedule.last(0), () if intervals else levels)
        if intervals:
            answer = answer._replace(quantiles=intervals.around(answer))
        yield from (p for p in panels_of(tested, 0, answer, levels) if _matches(p.name, wanted))


def _draw_attention(
    given: PlotOptions, model: nn.Module, of: Preprocessing, path: Path, written: Path
) -> None:
    """Draw the mean attention of the last windows of the chosen series."""
    layers = len(base_of(model).encoder.attn_layers)
    layer = given.layer or layers
    if layer > layers:
        raise UsageError(f"--layer {layer}: the model has {layers} layers")
    every = read(path, freq=of.freq, missing=of.missing, **of.named)
    series = [each for each in every if not given.series or each.id in given.series]
    if not series:
        known = [each.id for each in every]
        asked = (given.series or ("",))[0]
        raise UsageError(f"{path} has no series {asked!r}{did_you_mean(asked, known)}")
    weights = _mean_attention(given, RollingModel(model, of, series), series, layer)
    tokens = token_names(model, of, series[0].columns)
    which = f"layer {layer} of {layers}, " + (f"head {given.head}" if given.head else "mean of all heads")
    draw_attention(weights, tokens, written, f"{path.name}: attention of {which}")


def _mean_attention(
    given: PlotOptions, tester: RollingModel, series: Sequence[Series], layer: int
) -> np.ndarray[tuple[int, int], np.dtype[np.float64]]:
    """Return the mean map of the last windows, of one head or of all."""
    parts = cut(series, tester.of, None, tester.of.pred_len)
    windows = tester.windows([(0, part.test[1]) for part in parts])
    last = np.arange(max(0, len(windows) - given.windows), len(windows))
    total: torch.Tensor | None = None
    for indices in np.array_split(last, -(-len(last) // 32)):
        maps = attention_maps(tester.model, tester.inputs(windows, indices)[0])[layer - 1]  # [B, H, T, T]
        heads = maps.shape[1]
        if given.head is not None and given.head > heads:
            raise UsageError(f"--head {given.head}: the model has {heads} heads")
        chosen = maps.double().mean(dim=1) if given.head is None else maps[:, given.head - 1].double()
        total = chosen.sum(dim=0).cpu() + (0 if total is None else total)
    assert total is not None
    return (total / len(last)).numpy()
