"""State dicts of training codes, with sizes that the caller gives, become model folders."""

from __future__ import annotations

import json

import pytest
import torch

from manyheads.core import hub
from manyheads.core.catalog import create_model
from manyheads.core.errors import DataError, UsageError
from manyheads.timeseries.models import published
from manyheads.timeseries.models.checkpoints import DIALECTS

SIZES = {
    "label_len": 8,
    "seq_len": 16,
    "pred_len": 8,
    "enc_in": 2,
    "d_model": 8,
    "n_heads": 2,
    "e_layers": 2,
    "d_ff": 8,
}
CODES = [
    ("informer", "informer", "informer"),
    ("autoformer", "autoformer", "informer"),
    ("autoformer", "autoformer", "autoformer"),
    ("time_series_library", "library", "autoformer"),
    ("time_series_library", "library", "informer"),
]


def written(path, name, dialect):
    """A checkpoint as that code has it: its model is built with what the dialect asks for."""
    kind = type(create_model(name, **SIZES))
    switches = {key: values[0] for key, values in DIALECTS[kind][dialect].items()}
    model = create_model(name, **SIZES, **switches)
    state = {f"module.{key}": value for key, value in model.state_dict().items()}
    if name == "informer" and dialect != "informer":
        state = {
            key.replace("module.projection.", "module.decoder.projection."): v for key, v in state.items()
        }
    torch.save(state, path)
    return model, switches


@pytest.mark.parametrize(("code", "dialect", "name"), CODES)
def test_a_state_dict_and_sizes_give_a_model_folder(tmp_path, code, dialect, name):
    model, switches = written(tmp_path / "checkpoint.pth", name, dialect)
    (tmp_path / "sizes.json").write_text(json.dumps(SIZES))
    convert = getattr(published, f"convert_{code}")
    convert(tmp_path / "checkpoint.pth", tmp_path / "m", name=name, arguments=str(tmp_path / "sizes.json"))
    found, config = hub.load_model(tmp_path / "m")
    assert config.arguments == {**SIZES, **switches}
    assert config.training["dialect"] == dialect
    assert all(torch.equal(found.state_dict()[key], value) for key, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("name", "arguments", "error", "says"),
    [
        ("informre", "{}", UsageError, "no forecaster 'informre'"),
        ("informer", "sizes", UsageError, "'sizes' is neither a JSON object nor a file of one"),
        ("informer", "{", UsageError, "arguments: not JSON"),
        ("informer", '{"seq_len": 16}', DataError, "builds no informer: informer needs pred_len"),
        ("informer", json.dumps({**SIZES, "d_model": 1 << 20}), DataError, "is too small for the"),
        ("informer", json.dumps({**SIZES, "d_model": 16}), DataError, "the weights do not fit this Informer"),
        ("dlinear", '{"seq_len": 16, "pred_len": 8}', UsageError, "dlinear is not published in this dialect"),
        ("autoformer", json.dumps(SIZES), UsageError, "Autoformer has no dialect 'informer'"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path, name, arguments, error, says):
    written(tmp_path / "checkpoint.pth", "informer", "informer")
    with pytest.raises(error, match=says):
        published.convert_informer(
            tmp_path / "checkpoint.pth", tmp_path / "m", name=name, arguments=arguments
        )
    assert not (tmp_path / "m").exists()


def test_s_mamba_is_s_mamba(tmp_path):
    written(tmp_path / "checkpoint.pth", "informer", "informer")
    with pytest.raises(UsageError, match="informer is no s_mamba"):
        published.convert_s_mamba(
            tmp_path / "checkpoint.pth", tmp_path / "m", name="informer", arguments=json.dumps(SIZES)
        )
