"""Embeddings of values, calendar and position."""

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from manyheads.core.errors import UsageError
from manyheads.timeseries.calendar import time_features
from manyheads.timeseries.models.embeddings import (
    CalendarEmbedding,
    CircularConv,
    DataEmbedding,
    FeatureEmbedding,
    TokenEmbedding,
    sinusoid,
    temporal_embedding,
)


def test_positions_are_the_official_table(golden):
    pe = golden("timeseries", "informer_a_prob_distil_mix_eval").group("param")[
        "enc_embedding.position_embedding.pe"
    ]
    torch.testing.assert_close(sinusoid(5000, 16), pe[0], rtol=0, atol=1e-6)
    assert sinusoid(7, 5).shape == (7, 5)


def test_fixed_tables_are_the_official_ones():
    table = CalendarEmbedding("h", 16, learned=False).state_dict()["hour_embed.emb.weight"]
    torch.testing.assert_close(table, sinusoid(24, 16), rtol=0, atol=0)


@pytest.mark.parametrize("padding", [1, 2])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("c_in", "c_out"), [(3, 5), (5, 3), (4, 4)])
def test_circular_convolution_is_torchs(c_in, c_out, bias, padding):
    ours = CircularConv(c_in, c_out, bias, padding)
    torchs = nn.Conv1d(c_in, c_out, 3, padding=padding, padding_mode="circular", bias=bias)
    torchs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 9, c_in)
    y, expected = ours(x), torchs(x.mT).mT
    torch.testing.assert_close(y, expected)
    cotangent = torch.randn_like(y)
    grads = (
        torch.autograd.grad(out, list(m.parameters()), cotangent)
        for out, m in ((y, ours), (expected, torchs))
    )
    torch.testing.assert_close(*grads)


def test_circular_convolution_starts_as_torchs():
    torch.manual_seed(3)
    ours = CircularConv(4, 6)
    torch.manual_seed(3)
    torchs = nn.Conv1d(4, 6, 3)
    torch.testing.assert_close(ours.weight, torchs.weight, rtol=0, atol=0)
    torch.testing.assert_close(ours.bias, torchs.bias, rtol=0, atol=0)


def test_values_start_with_the_official_spread():
    weight = TokenEmbedding(7, 4096, bias=False).tokenConv.weight
    assert weight.std().item() == pytest.approx((2 / (1 + 0.01**2) / 21) ** 0.5, rel=0.02)


@pytest.mark.parametrize(("freq", "step"), [("15min", 15), ("h", 60), ("D", 1440)])
def test_tables_read_the_calendar_from_its_features(freq, step):
    ds = np.arange("1999-01-01", "2005-01-01", np.timedelta64(step, "m"), dtype="datetime64[us]")[::7]
    at = pd.DatetimeIndex(ds)
    features = torch.from_numpy(time_features(ds, freq))[None]
    marks = CalendarEmbedding(freq, 8, learned=True).marks(features)[0]
    expected = [at.month, at.day, at.day_of_week, at.hour, at.minute // 15]
    assert marks.shape == (len(ds), 5 if freq == "15min" else 4)
    for got, want in zip(marks.unbind(-1), expected, strict=False):
        np.testing.assert_array_equal(got.numpy(), want)


@pytest.mark.parametrize("freq", ["15min", "h"])
@pytest.mark.parametrize("learned", [True, False])
def test_tables_add_up(freq, learned):
    layer = CalendarEmbedding(freq, 8, learned)
    marks = torch.tensor([[[2, 29, 6, 23, 3][: len(layer.parts)]]])
    state = layer.state_dict()
    suffix = "_embed.weight" if learned else "_embed.emb.weight"
    expected = sum(state[part + suffix][i] for part, i in zip(layer.parts, marks[0, 0], strict=True))
    torch.testing.assert_close(layer(marks)[0, 0], expected)
    assert any(p.requires_grad for p in layer.parameters()) == learned


@pytest.mark.parametrize(("freq", "count"), [("s", 6), ("t", 5), ("h", 4), ("D", 3), ("W", 2), ("ME", 1)])
def test_a_frequency_has_its_features(freq, count):
    layer = temporal_embedding("timeF", freq, 8, bias=True)
    assert isinstance(layer, FeatureEmbedding)
    assert layer(torch.zeros(1, 2, count)).shape == (1, 2, 8)
    with pytest.raises(ValueError, match=f"{count} calendar features"):
        layer(torch.zeros(1, 2, count + 1))


def test_tables_refuse_features_of_another_frequency():
    with pytest.raises(ValueError, match="4 calendar features"):
        CalendarEmbedding("h", 8, learned=True).marks(torch.zeros(1, 2, 5))


@pytest.mark.parametrize(
    ("embed", "freq", "complaint"),
    [
        ("clock", "h", "timeF"),
        ("timeF", "parsec", "parsec"),
        ("fixed", "W", "longer"),
        ("learned", "ME", "longer"),
    ],
)
def test_unknown_calendars_are_refused(embed, freq, complaint):
    with pytest.raises(UsageError, match=complaint):
        temporal_embedding(embed, freq, 8, bias=True)


@pytest.mark.parametrize("positions", [0, 12])
def test_an_embedding_is_the_sum_of_its_parts(positions):
    layer = DataEmbedding(3, 8, FeatureEmbedding("h", 8, True), dropout=0.0, bias=True, positions=positions)
    x, marks = torch.randn(2, 10, 3), torch.randn(2, 10, 4)
    expected = layer.value_embedding(x) + layer.temporal_embedding(marks)
    if positions:
        expected = expected + sinusoid(positions, 8)[:10]
    torch.testing.assert_close(layer(x, marks), expected)
    assert not any("pe" in key.split(".") for key in layer.state_dict())
    without = layer.value_embedding(x) + (sinusoid(positions, 8)[:10] if positions else 0)
    torch.testing.assert_close(layer(x, None), without)
