"""Forecasters against neuralforecast: a training step at ETTh1 96 -> 96, and the making of batches.

Run: python -m benchmarks timeseries, in an environment of its own that has the peer beside manyheads
(pip install -e . neuralforecast==3.3.0; importing it takes the peer half a minute).

A step is forward, mean squared error, backward and Adam, each side with the optimizer that it trains with.
The peer's Informer and Autoformer take one series a window, so ours are built for one, too, in the dialect
that the peer's code follows; the sizes are those of the papers. Weights and dropout draws are random on both
sides: parity is shown in tests.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from importlib.metadata import version

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.measure import Case, Step
from manyheads.core.catalog import create_model
from manyheads.timeseries.data import ForecastData
from manyheads.timeseries.windows import WindowLoader, Windows

SIZES = {"d_model": 512, "n_heads": 8, "e_layers": 2, "d_ff": 2048, "dropout": 0.05}
THEIR_SIZES = {
    "hidden_size": 512,
    "n_head": 8,
    "encoder_layers": 2,
    "conv_hidden_size": 2048,
    "dropout": 0.05,
}
DECODER = {"decoder_layers": 1, "decoder_input_size_multiplier": 0.5, "futr_exog_list": list("mdwh")}
LIBRARY = {
    "head_layout": "scrambled",
    "distil_padding": 2,
    "cross_attention": "prob",
    "embed_bias": False,
}
SERIES, ROWS = 500, 2000


def cases(device: str) -> Iterator[Case]:
    """Yield the lines: three training steps, and the batches of 500 series."""
    from neuralforecast.losses.pytorch import MSE
    from neuralforecast.models.autoformer import Autoformer
    from neuralforecast.models.informer import Informer
    from neuralforecast.models.itransformer import iTransformer

    peer = f"neuralforecast {version('neuralforecast')}, torch {torch.__version__}"
    data = ForecastData(dataset="etth1", seq_len=96, pred_len=96, batch_size=32)
    data.setup()
    batch = {key: value.to(device) for key, value in next(iter(data.train_dataloader())).items()}
    common = {"h": 96, "input_size": 96, "loss": MSE()}
    shared = {"d_model": 256, "n_heads": 8, "e_layers": 2, "d_ff": 256, "dropout": 0.1}
    ours: nn.Module = create_model("itransformer", seq_len=96, pred_len=96, **shared)
    theirs: nn.Module = iTransformer(
        n_series=7, hidden_size=256, n_heads=8, e_layers=2, d_ff=256, dropout=0.1, use_norm=True, **common
    )
    x, y = batch["x"], batch["y"]
    yield Case(
        "itransformer training step",
        "B32 96->96 N7 d256, 7 tokens each",
        peer,
        _step(ours.to(device), lambda m: m(x), y, fused=True),
        _step(theirs.to(device), lambda m: m({"insample_y": x}), y, fused=False),
        target=1.25,
    )
    x, y = x[..., -1:].contiguous(), y[..., -1:].contiguous()
    marks, ahead = batch["x_mark"], batch["y_mark"]
    known = torch.cat([marks, ahead], dim=1)
    for name, kind, factor, dialect in (
        ("autoformer", Autoformer, 3, {}),
        ("informer", Informer, 5, LIBRARY),
    ):
        ours = create_model(name, seq_len=96, pred_len=96, enc_in=1, factor=factor, **SIZES, **dialect)
        theirs = kind(factor=factor, **THEIR_SIZES, **DECODER, **common)
        yield Case(
            f"{name} training step",
            f"B32 96->96 N1 d512 factor {factor}",
            peer,
            _step(ours.to(device), lambda m: m(x, marks, ahead), y, fused=True),
            _step(theirs.to(device), lambda m: m({"insample_y": x, "futr_exog": known}), y, fused=False),
            target=1.3,
        )
    yield _batches(peer, common)


def _step(model: nn.Module, call: Callable[[nn.Module], Tensor], y: Tensor, fused: bool) -> Step:
    """One training step of a model, ready to be called again and again."""
    model.train()
    # The peer's own choice of Adam is torch's default, ours (timeseries/task.py) the fused one.
    adam = torch.optim.Adam(model.parameters(), lr=1e-4, fused=fused or None)

    def step() -> None:
        adam.zero_grad()
        (call(model).reshape(y.shape) - y).square().mean().backward()
        adam.step()

    return step


def _batches(peer: str, common: dict[str, object]) -> Case:
    """Return the line of a batch of 32 windows out of 500 series; the peer draws from 32 series a step."""
    import pandas as pd
    from neuralforecast.models.informer import Informer

    values = torch.from_numpy(np.random.default_rng(0).standard_normal((SERIES, ROWS)).astype(np.float32))
    ranges = [(i * ROWS, (i + 1) * ROWS) for i in range(SERIES)]
    loader = WindowLoader(Windows(values.reshape(-1, 1), 1, ranges, 96, 96), 32, shuffle=True)
    batches = (batch for _ in itertools.count() for batch in loader)  # epoch after epoch
    model = Informer(windows_batch_size=32, **common)
    columns = pd.Index(["y", "available_mask"])

    def theirs() -> None:
        series = torch.randperm(SERIES)[:32]
        temporal = torch.stack([values[series], torch.ones(32, ROWS)], dim=1)  # [32, C, T]
        given = {"temporal": temporal, "temporal_cols": columns}
        windows, static, static_columns, usable, weight, left = model._create_windows(given, "train")
        drawn = torch.randperm(len(usable))[:32]
        model._sample_windows(windows, static, static_columns, left, drawn, usable, weight)

    return Case(
        "batch of 32 windows",
        f"{SERIES} series x {ROWS} rows, 96->96",
        f"{peer} (_create_windows)",
        lambda: next(batches),
        theirs,
        target=10.0,
        memory=0.1,
    )
