"""What of a model leaves for other runtimes: a module of tensors, and how a predictor's samples enter it.

Each function makes an `Exportable` of one task's models. The axes that vary from batch to batch have names;
all others are as they were when the model was exported.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from manyheads.core.errors import UsageError

Inputs = tuple[Tensor | None, ...]
BATCH = "batch"
RANGES = {
    BATCH: (1, 65536),
    "length": (2, 1 << 16),
    "tokens": (2, 1 << 16),
    "rows": (8, 1 << 15),
    "nodes": (3, 1 << 20),
}
RANGES |= {"edges": (3, 1 << 22), "starts": (2, 1 << 16), "pairs": (3, 1 << 20), "distances": (3, 1 << 24)}


@dataclass(frozen=True)
class Exportable:
    """A module to be exported.

    Attributes:
        module: Takes tensors, or None for one that this model has no use for; gives a tensor or a tuple.
        inputs: Their names, in order.
        outputs: The results' names.
        axes: Of each input the axes that vary, and what they count.
        take: Makes inputs of what the predictor prepared.
        draw: Makes random inputs of so many samples; None where such make no sense.
        ranges: How far axes go, where not as RANGES says.
    """

    module: nn.Module
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    axes: Mapping[str, Mapping[int, str]]
    take: Callable[[Sequence[Any]], Inputs]
    draw: Callable[[int], Inputs] | None = None
    ranges: Mapping[str, tuple[int, int]] = field(default_factory=dict)


class _Images(nn.Module):
    def __init__(self, model: nn.Module, features: bool) -> None:
        super().__init__()
        self.model, self.features = model, features

    def forward(self, image: Tensor) -> Tensor:
        model = cast(Any, self.model)
        if self.features:
            return cast(Tensor, model.forward_head(model.forward_features(image), pre_logits=True))
        return cast(Tensor, model(image))


def images(model: nn.Module, shape: tuple[int, int, int], features: bool = False) -> Exportable:
    """Images `[B, C, H, W]`, normalised, to logits or features."""
    return Exportable(
        _Images(model, features),
        ("image",),
        ("features" if features else "logits",),
        {"image": {0: BATCH}},
        lambda samples: (torch.stack(list(samples)),),
        lambda count: (torch.randn(count, *shape),),
    )


class _Forecasts(nn.Module):
    def __init__(self, model: nn.Module, levels: Sequence[float], columns: int) -> None:
        super().__init__()
        self.model, self.levels, self.columns = model, tuple(levels), columns

    def forward(
        self,
        x: Tensor,
        x_mark: Tensor,
        y_mark: Tensor,
        observed: Tensor | None = None,
        past: Tensor | None = None,
        future: Tensor | None = None,
        static: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        from manyheads.timeseries.calls import forecast

        every = {"x": x, "x_mark": x_mark, "y_mark": y_mark, "observed": observed}
        every |= {"past": past, "future": future, "static": static}
        batch = {key: value for key, value in every.items() if value is not None}
        batch["y"] = x.new_full((x.shape[0], y_mark.shape[1], self.columns), torch.nan)
        made = forecast(self.model, cast(Any, batch), self.levels)
        return made.point if made.quantiles is None else (made.point, made.quantiles)


SERIES = ("x", "x_mark", "y_mark", "observed", "past", "future", "static")


def series(
    model: nn.Module, sizes: tuple[int, int], columns: int, marks: int, levels: Sequence[float] = ()
) -> Exportable:
    """Scaled windows with calendar marks and covariates, to forecasts in scaled units.

    Args:
        sizes: Steps known, and to forecast.
        columns: Targets.
        marks: Calendar features.
        levels: Quantiles wanted.
    """

    def take(samples: Sequence[Any]) -> Inputs:
        from manyheads.timeseries.samples import collate

        return tuple(collate(samples)[0].inputs.get(name) for name in SERIES)

    def draw(count: int) -> Inputs:
        known, ahead = sizes
        x = torch.randn(count, known, columns)
        given = (x, torch.rand(count, known, marks) - 0.5, torch.rand(count, ahead, marks) - 0.5)
        return *given, *(None,) * (len(SERIES) - 3)

    return Exportable(
        _Forecasts(model, levels, columns),
        SERIES,
        ("point", "quantiles") if levels else ("point",),
        {name: {0: BATCH} for name in SERIES},
        take,
        draw,
    )


def labelled_series(
    model: nn.Module, seq_len: int, channels: int, collate: Callable[[Sequence[Any]], Inputs]
) -> Exportable:
    """Scaled series, padded, and which of their steps are observed, to logits.

    Args:
        collate: The predictor's.
    """

    def draw(count: int) -> Inputs:
        steps = torch.arange(seq_len) < torch.randint(1, seq_len + 1, (count, 1))
        return torch.randn(count, seq_len, channels) * steps[..., None], steps

    names = ("x", "observed")
    return Exportable(model, names, ("logits",), {name: {0: BATCH} for name in names}, collate, draw)


def gaps(model: nn.Module, seq_len: int, channels: int, marks: int) -> Exportable:
    """Scaled windows, which of their values are known, and calendar marks, to rebuilt windows."""

    def take(samples: Sequence[Any]) -> Inputs:
        from manyheads.timeseries.reconstruction.stream import collate

        group = collate(samples)[0]
        return group.x, group.observed, group.x_mark

    def draw(count: int) -> Inputs:
        x, known = torch.randn(count, seq_len, channels), torch.rand(count, seq_len, channels) > 0.2
        return x * known, known, torch.rand(count, seq_len, marks) - 0.5

    names = ("x", "observed", "x_mark")
    return Exportable(model, names, ("rebuilt",), {name: {0: BATCH} for name in names}, take, draw)


def mixtures(model: nn.Module, samples_at_once: int) -> Exportable:
    """Recordings of one length, to the voices in them `[B, speakers, L]`."""

    def take(samples: Sequence[Any]) -> Inputs:
        whole = torch.cat([sample.float() for sample in samples])
        count = len(samples)
        times = -(-count * samples_at_once // len(whole))
        return (whole.repeat(times)[: count * samples_at_once].reshape(count, -1),)

    def draw(count: int) -> Inputs:
        return (0.1 * torch.randn(count, samples_at_once),)

    return Exportable(model, ("mixture",), ("voices",), {"mixture": {0: BATCH}}, take, draw)


class _Texts(nn.Module):
    def __init__(self, model: nn.Module, max_tokens: int) -> None:
        super().__init__()
        self.model, self.max_tokens = model, max_tokens

    def forward(self, features: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        found = self.model(features, lengths, max_tokens=self.max_tokens)
        return found.logits, found.counts


def speech(model: nn.Module, width: int, max_tokens: int, fixed: int | None = None) -> Exportable:
    """Rows of the front end, padded, and how many there are of each, to logits of tokens and their counts.

    Args:
        width: Channels of a row.
        max_tokens: Tokens of a recording at most; later ones are left out.
        fixed: The number of rows, where the model's program is of one; later rows are left out.
    """

    def pad(rows: Sequence[Tensor]) -> Inputs:
        cut = [each[:fixed] for each in rows]
        lengths = torch.tensor([len(each) for each in cut])
        features = nn.utils.rnn.pad_sequence(cut, batch_first=True)
        if fixed is not None:
            features = nn.functional.pad(features, (0, 0, 0, fixed - features.shape[1]))
        return features, lengths

    def draw(count: int) -> Inputs:
        return pad([torch.randn(60 + 7 * i, width) for i in range(count)])

    axes = {"features": {0: BATCH} if fixed else {0: BATCH, 1: "rows"}, "lengths": {0: BATCH}}
    return Exportable(_Texts(model, max_tokens), tuple(axes), ("logits", "counts"), axes, pad, draw)


GRAPH = ("x", "edge_index", "starts", "edge_attr", "encoding", "roles", "distances", "pairs")
_GRAPH_AXES = (
    {0: "nodes"},
    {1: "edges"},
    {0: "starts"},
    {0: "edges"},
    {0: "nodes"},
    {0: "nodes"},
    {0: "distances"},
    {1: "pairs"},
)


class _Graphs(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        x: Tensor,
        edge_index: Tensor,
        starts: Tensor,
        edge_attr: Tensor | None = None,
        encoding: Tensor | None = None,
        roles: Tensor | None = None,
        distances: Tensor | None = None,
        pairs: Tensor | None = None,
    ) -> Tensor:
        from manyheads.graph.graphs import Graphs

        given = (x, edge_index, starts, edge_attr, encoding, roles, distances, pairs)
        return cast(Tensor, self.model(Graphs(*given)))


def graphs(model: nn.Module, collate: Callable[[Sequence[Any]], Any]) -> Exportable:
    """Graphs in a row, `manyheads.graph.graphs.Graphs`, to a row of outputs a graph, node or pair.

    Args:
        collate: Puts what the predictor prepared into batches: `(Graphs, rows)` each.
    """

    def take(samples: Sequence[Any]) -> Inputs:
        (found, _), *_ = collate(samples)
        return tuple(found)

    axes = dict(zip(GRAPH, _GRAPH_AXES, strict=True))
    return Exportable(_Graphs(model), GRAPH, ("outputs",), axes, take)


@dataclass(frozen=True)
class Limits:
    """What is fixed in a file of sound.

    Attributes:
        seconds: Of a mixture, and of what a Conformer recognises.
        max_tokens: Of a recording.
    """

    seconds: float = 4.0
    max_tokens: int = 256


def _of_vision(predictor: Any, limits: Limits) -> Exportable:
    of = predictor.preprocessing
    return images(predictor.model, (of.channels, *of.size), predictor.outputs.kind == "features")


def _of_forecast(predictor: Any, limits: Limits) -> Exportable:
    of = predictor.preprocessing
    levels = () if predictor.conformal else predictor.quantiles
    sizes = of.seq_len, of.pred_len
    return series(predictor.model, sizes, len(of.columns), len(of.time_features), levels)


def _of_series_classification(predictor: Any, limits: Limits) -> Exportable:
    channels = len(predictor.channels)
    return labelled_series(predictor.model, predictor.seq_len, channels, predictor.collate)


def _of_gaps(predictor: Any, limits: Limits) -> Exportable:
    of = predictor.preprocessing
    return gaps(predictor.model, of.seq_len, len(of.columns), len(of.time_features))


def _of_separation(predictor: Any, limits: Limits) -> Exportable:
    return mixtures(predictor.model, round(limits.seconds * predictor.sample_rate))


def _of_recognition(predictor: Any, limits: Limits) -> Exportable:
    from manyheads.speech.models.conformer import ConformerEncoder

    of, fixed = predictor.front_end, None
    if isinstance(predictor.model.encoder, ConformerEncoder):
        fixed = max(8, round(1000 * limits.seconds / of.row_ms))
    return speech(predictor.model, of.size, limits.max_tokens, fixed)


def _of_graphs(predictor: Any, limits: Limits) -> Exportable:
    return graphs(predictor.model, predictor.collate)


def _of_recsys(predictor: Any, limits: Limits) -> Exportable:
    from manyheads.apps.exportable_recsys import of_predictor

    return of_predictor(predictor)


_TASKS: dict[tuple[str, str], Callable[[Any, Limits], Exportable]] = {
    ("vision", "classification"): _of_vision,
    ("timeseries", "forecast"): _of_forecast,
    ("timeseries", "classification"): _of_series_classification,
    ("timeseries", "imputation"): _of_gaps,
    ("timeseries", "anomaly"): _of_gaps,
    ("speech", "separation"): _of_separation,
    ("speech", "recognition"): _of_recognition,
    ("graph", "graph"): _of_graphs,
    ("recsys", "recommendation"): _of_recsys,
    ("recsys", "text_recommendation"): _of_recsys,
    ("recsys", "text_classification"): _of_recsys,
}


def of_predictor(predictor: Any, domain: str, task: str, limits: Limits) -> Exportable:
    """Return what is exported of a predictor's model.

    Raises:
        UsageError: Models of this task are not exported.
    """
    make = _TASKS.get((domain, task))
    if make is None:
        raise UsageError(f"models of {task} are not exported (`manyheads export --list`)")
    return make(predictor, limits)
