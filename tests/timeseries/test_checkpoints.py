"""Checkpoints of other codes: loaded whole or refused with the dialect that fits."""

import numpy as np
import pytest
import torch

from manyheads.core import hub
from manyheads.core.catalog import create_model
from manyheads.core.errors import DataError, UsageError
from manyheads.timeseries.calendar import time_features
from manyheads.timeseries.models.autoformer import autoformer
from manyheads.timeseries.models.checkpoints import load_weights
from manyheads.timeseries.models.embeddings import sinusoid
from manyheads.timeseries.models.informer import informer, informer_stack
from manyheads.timeseries.models.itransformer import itransformer
from manyheads.timeseries.models.patchtst import patchtst
from manyheads.timeseries.models.smamba import s_mamba

SIZES = {"seq_len": 16, "pred_len": 4, "d_model": 8, "n_heads": 2, "d_ff": 8}
COPIED = {"head_layout": "scrambled", "distil_padding": 2, "cross_attention": "prob", "embed_bias": False}


def make(name, **args):
    if name == "patchtst":
        return patchtst(**SIZES)
    build = {"informer": informer, "informer_stack": informer_stack, "autoformer": autoformer}[name]
    return build(**SIZES, enc_in=3, label_len=8, **args)


def official(name, copied=False, **args):
    """A state dict as the code of others writes it: with tables, and the copies' name of the projection."""
    state = make(name, **args).state_dict()
    for side in ("patch",) if name == "patchtst" else ("enc", "dec"):
        state[f"{side}_embedding.position_embedding.pe"] = sinusoid(5000, 8)[None]
    if copied:
        state = {k if not k.startswith("projection.") else f"decoder.{k}": v for k, v in state.items()}
    return state


CASES = {
    "informer": ("informer", {}, False),
    "ordered": ("informer", {"head_layout": "ordered"}, False),
    "stack": ("informer_stack", {}, False),
    "copied informer": ("informer", COPIED, True),
    "autoformer": ("autoformer", {}, False),
    "library autoformer": ("autoformer", {"even_lags": True}, False),
    "patchtst": ("patchtst", {}, False),
}
DIALECTS = {
    "informer": ["informer"],
    "ordered": ["informer"],
    "stack": ["informer"],
    "copied informer": ["autoformer", "library"],
    "autoformer": ["autoformer"],
    "library autoformer": ["library"],
    "patchtst": ["library"],
}


@pytest.mark.parametrize("parallel", [False, True])
@pytest.mark.parametrize(("case", "dialect"), [(case, d) for case, of in DIALECTS.items() for d in of])
def test_every_weight_is_loaded(case, dialect, parallel):
    name, args, copied = CASES[case]
    state = official(name, copied, **args)
    model = make(name, **args)
    load_weights(model, {f"module.{k}": v for k, v in state.items()} if parallel else state, dialect)
    expected = {k.replace("decoder.projection.", "projection.") if copied else k: v for k, v in state.items()}
    loaded = model.state_dict()
    assert loaded.keys() == {key for key in expected if not key.endswith(".pe")}
    for key, value in loaded.items():
        torch.testing.assert_close(value, expected[key], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("case", "dialect", "complaint"),
    [
        ("informer", "library", 'the dialect that fits is "informer"'),
        ("informer", "autoformer", 'the dialect that fits is "informer"'),
        ("copied informer", "informer", 'the dialect that fits is "autoformer" or "library"'),
    ],
)
def test_a_checkpoint_of_another_dialect_is_refused_with_the_one_that_fits(case, dialect, complaint):
    name, args, copied = CASES[case]
    with pytest.raises(DataError, match=complaint):
        load_weights(make(name, **args), official(name, copied, **args), dialect)


@pytest.mark.parametrize(
    ("case", "args", "dialect", "complaint"),
    [
        ("copied informer", COPIED | {"head_layout": "ordered"}, "library", "head_layout='scrambled'"),
        ("copied informer", COPIED | {"distil_padding": 1}, "library", "distil_padding=2"),
        ("copied informer", COPIED | {"cross_attention": "full"}, "library", "cross_attention='prob'"),
        ("copied informer", COPIED | {"embed_bias": True}, "autoformer", "embed_bias=False"),
        (
            "copied informer",
            {},
            "library",
            "head_layout='scrambled', distil_padding=2, cross_attention='prob'",
        ),
        ("informer", {"head_layout": "scrambled"}, "informer", "head_layout='mix_decoder'"),
        ("informer", {"distil_padding": 2}, "informer", "distil_padding=1"),
        ("informer", {"cross_attention": "prob"}, "informer", "cross_attention='full'"),
        ("autoformer", {"even_lags": True}, "autoformer", "even_lags=False"),
        ("library autoformer", {}, "library", "even_lags=True"),
    ],
)
def test_a_model_built_for_another_dialect_is_refused_with_what_to_change(case, args, dialect, complaint):
    name, _, copied = CASES[case]
    with pytest.raises(UsageError, match=complaint):
        load_weights(make(name, **args), official(name, copied, **CASES[case][1]), dialect)


def test_padding_does_not_matter_where_nothing_is_halved():
    args = COPIED | {"distil_padding": 1, "distil": False}
    load_weights(make("informer", **args), official("informer", True, **args), "library")


def test_an_unknown_dialect_is_refused():
    with pytest.raises(UsageError, match=r"'informer' \(autoformer, library\)"):
        load_weights(make("autoformer"), official("autoformer"), "informer")


@pytest.mark.parametrize(
    ("state", "complaint"),
    [
        (lambda: official("autoformer"), "an Autoformer, not of Informer"),
        (lambda: official("patchtst"), "PatchTST, not of Informer"),
        (lambda: itransformer(**SIZES).state_dict(), "an iTransformer, not of Informer"),
        (lambda: s_mamba(24, 8, 16).state_dict(), r"an S-Mamba \(.*\), not of Informer"),
        (lambda: {"parameter_projection.proj.0.weight": torch.zeros(1)}, "transformers"),
        (lambda: {"weight": torch.zeros(1)}, "no weights of Informer"),
        (dict, "no weights of Informer"),
    ],
)
def test_weights_of_another_model_are_refused_by_its_name(state, complaint):
    with pytest.raises(DataError, match=complaint):
        load_weights(make("informer"), state(), "informer")


def with_pe(value):
    return lambda state: state.update({"enc_embedding.position_embedding.pe": value})


@pytest.mark.parametrize(
    ("spoil", "complaint"),
    [
        (lambda s: s.pop("encoder.norm.bias"), r"missing \(encoder.norm.bias"),
        (lambda s: s.update({"encoder.extra": torch.zeros(1)}), r"left over \(encoder.extra"),
        (lambda s: s.update({"projection.bias": torch.zeros(4)}), r"projection.bias is \[4\], not \[3\]"),
        (lambda s: [s.pop(k) for k in list(s) if "conv1" in k], r"\d missing .*, \.\.\."),
        (with_pe(sinusoid(5000, 8)[None] + 0.1), "not the usual table"),
        (with_pe(sinusoid(5000, 8)), r"\[5000, 8\]"),
        (with_pe(torch.full((1, 5000, 8), float("nan"))), "not the usual table"),
    ],
)
def test_weights_that_do_not_fit_are_refused_before_any_is_copied(spoil, complaint):
    model, state = make("informer"), official("informer")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    spoil(state)
    with pytest.raises(DataError, match=complaint):
        load_weights(model, state, "informer")
    for key, value in model.state_dict().items():
        torch.testing.assert_close(value, before[key], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("patchtst", {"patch_len": 4, "stride": 2}),
        ("autoformer", {"enc_in": 3, "label_len": 8, "embed": "learned"}),
        ("informer", {"enc_in": 3, "label_len": 8, "embed": "fixed"}),
        ("informer_stack", {"enc_in": 3, "label_len": 8, "s_layers": "2,1"}),
    ],
)
def test_a_model_folder_gives_the_same_forecasts(tmp_path, name, more):
    model = create_model(name, **SIZES, **more).eval()
    hub.save(tmp_path / "m", model, domain="timeseries", name=name, arguments=SIZES | more, preprocessing={})
    again, _ = hub.load_model(tmp_path / "m")
    ds = np.arange("2020-02-28", "2020-03-01", dtype="datetime64[h]").astype("datetime64[us]")
    marks = torch.from_numpy(time_features(ds[:20], "h")).expand(2, -1, -1)
    inputs = torch.randn(2, 16, 3), marks[:, :16], marks[:, 16:]
    torch.testing.assert_close(again(*inputs), model(*inputs), rtol=0, atol=0)
