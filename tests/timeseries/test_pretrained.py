"""Folders of the transformers library, and its own classes live."""

import json
import pickle

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file

from manyheads.core import hub
from manyheads.core.catalog import create_model
from manyheads.core.errors import DataError, UsageError
from manyheads.timeseries.calendar import feature_names
from manyheads.timeseries.models.checkpoints import load_weights
from manyheads.timeseries.models.lagged import History, Target, negative_log_likelihood
from manyheads.timeseries.models.pretrained import builder_arguments, from_transformers

COMMON = {
    "prediction_length": 8,
    "context_length": 18,
    "lags_sequence": [1, 3, 6],
    "num_time_features": 2,
    "d_model": 16,
    "encoder_ffn_dim": 20,
    "decoder_ffn_dim": 12,
    "num_parallel_samples": 3,
}
STATIC = {
    "num_static_categorical_features": 2,
    "cardinality": [5, 3],
    "embedding_dimension": [3, 2],
    "num_static_real_features": 1,
    "num_dynamic_real_features": 1,
}
CONFIGS = {
    "informer": ("informer", STATIC | {"sampling_factor": 2}),
    "informer_full": ("informer", {"attention_type": "full", "distil": False, "decoder_attention_heads": 4}),
    "informer_many": ("informer", {"input_size": 3, "distribution_output": "normal", "scaling": "std"}),
    "informer_counts": ("informer", {"distribution_output": "negative_binomial", "encoder_layers": 3}),
    "informer_plain": ("informer", {"scaling": None, "activation_function": "relu", "prediction_length": 1}),
    "autoformer": ("autoformer", STATIC | {"label_length": 4, "moving_average": 5}),
    "autoformer_cut": ("autoformer", {"label_length": 14, "moving_average": 9, "prediction_length": 16}),
    "autoformer_many": ("autoformer", {"input_size": 2, "scaling": "std", "distribution_output": "normal"}),
    "autoformer_plain": ("autoformer", {"scaling": False, "autocorrelation_factor": 1}),
}


def peer(name, folder):
    """A model of the library with random weights, saved to a folder."""
    transformers = pytest.importorskip("transformers", reason="the transformers library is not installed")
    kind, changed = CONFIGS[name]
    classes = {
        "informer": (transformers.InformerConfig, transformers.InformerForPrediction),
        "autoformer": (transformers.AutoformerConfig, transformers.AutoformerForPrediction),
    }
    config_class, model_class = classes[kind]
    torch.manual_seed(3)
    model = model_class(config_class(**(COMMON | changed))).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1 and parameter.requires_grad:
                parameter.normal_(std=0.15)
    model.save_pretrained(folder)
    return model


def theirs(model, n):
    """What the library's model is given."""
    torch.manual_seed(5)
    c = model.config
    length, ahead = c.context_length + max(c.lags_sequence), c.prediction_length
    variates = () if c.input_size == 1 else (c.input_size,)
    features = c.num_time_features + c.num_dynamic_real_features
    inputs = {
        "past_values": torch.randint(0, 9, (n, length, *variates)).float(),
        "past_observed_mask": (torch.rand(n, length, *variates) > 0.2).float(),
        "past_time_features": torch.randn(n, length, features),
        "future_time_features": torch.randn(n, ahead, features),
    }
    if c.num_static_categorical_features:
        codes = [torch.randint(0, k, (n,)) for k in c.cardinality]
        inputs["static_categorical_features"] = torch.stack(codes, dim=1)
        inputs["static_real_features"] = torch.randn(n, 1)
    truth = {
        "future_values": torch.randint(0, 9, (n, ahead, *variates)).float(),
        "future_observed_mask": (torch.rand(n, ahead, *variates) > 0.2).float(),
    }
    return inputs, truth


def ours(model, inputs, truth):
    def wide(x):
        return x if x.dim() == 3 else x[..., None]

    context = inputs["past_time_features"][:, -model.window.frame.context :]
    history = History(
        wide(inputs["past_values"]),
        wide(inputs["past_observed_mask"]),
        torch.cat([context, inputs["future_time_features"]], dim=1),
        inputs.get("static_real_features"),
        inputs.get("static_categorical_features"),
    )
    return history, Target(wide(truth["future_values"]), wide(truth["future_observed_mask"]))


@pytest.mark.parametrize("name", CONFIGS)
def test_a_folder_forecasts_as_the_library_does(name, tmp_path):
    reference = peer(name, tmp_path)
    model, catalogue_name, arguments = from_transformers(tmp_path, compat="transformers")
    inputs, truth = theirs(reference, 5)
    if model.window.frame.scaling == "mean":
        inputs["past_observed_mask"][1] = 0  # whose scale is the batch's
    history, target = ours(model, inputs, truth)
    torch.manual_seed(7)  # both draw keys
    found = model.distribution(history, target) if "informer" in name else model.distribution(history)
    torch.manual_seed(7)
    with torch.no_grad():
        expected = reference(**inputs, **truth)
    loss = negative_log_likelihood(found, target)
    assert loss.item() == pytest.approx(expected.loss.item(), rel=1e-5)
    loc, scale = (x if x.dim() == 3 else x[..., None] for x in (expected.loc, expected.scale))
    parameters = dict(zip(found.names, expected.params, strict=True))
    parameters = {k: v if v.dim() == 3 else v[..., None] for k, v in parameters.items()}
    if "scale" in parameters:
        parameters |= {"scale": parameters["scale"] * scale, "loc": parameters["loc"] * scale + loc}
    for key, want in parameters.items():
        assert torch.allclose(getattr(found, key), want, rtol=1e-5, atol=1e-5), key
    again = create_model(catalogue_name, **arguments)
    again.load_state_dict(model.state_dict(), strict=True)


@pytest.mark.parametrize(
    "name", ["informer", "informer_many", "informer_counts", "autoformer", "autoformer_cut"]
)
def test_samples_are_the_librarys_of_the_same_seed(name, tmp_path):
    reference = peer(name, tmp_path)
    model = from_transformers(tmp_path, compat="transformers").model
    inputs, truth = theirs(reference, 4)
    history, _ = ours(model, inputs, truth)
    torch.manual_seed(11)
    found = model.generate(history)
    torch.manual_seed(11)
    expected = reference.generate(**inputs).sequences
    assert torch.allclose(found.view_as(expected), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["autoformer", "autoformer_cut"])
def test_alone_each_series_is_forecast_as_by_the_library_in_a_batch_of_one(name, tmp_path):
    reference = peer(name, tmp_path)
    model = from_transformers(tmp_path).model
    inputs, truth = theirs(reference, 4)
    together = model.distribution(ours(model, inputs, truth)[0])
    for i in range(4):
        with torch.no_grad():
            one = reference(**{k: v[i : i + 1] for k, v in (inputs | truth).items()})
        want = one.params[1] * one.scale + one.loc
        assert torch.allclose(together.loc[i, :, 0], want[0], rtol=1e-5, atol=1e-5)


def written(tmp_path, name="autoformer", **config):
    """A folder of the library's layout, of a model of ours."""
    kind, changed = CONFIGS[name]
    config = COMMON | changed | {"model_type": kind} | config
    builder, arguments = builder_arguments(COMMON | changed | {"model_type": kind})
    prefix = {
        "window.": "model.embedder.",
        "seasonality": "model.decoder.seasonality",
        "parameter": "parameter",
    }
    state = {}
    for key, value in create_model(builder, **arguments).state_dict().items():
        start = next((each for each in prefix if key.startswith(each)), "")
        state[prefix.get(start, "model.") + key.removeprefix(start)] = value.contiguous()
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(state, tmp_path / "model.safetensors")
    return state


def test_a_folder_of_pickled_tensors_is_read_and_of_other_objects_is_not(tmp_path):
    state = written(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(state, tmp_path / "pytorch_model.bin")
    model = from_transformers(tmp_path).model
    assert torch.equal(model.encoder.layers[0].fc1.weight, state["model.encoder.layers.0.fc1.weight"])
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps({"a": print}, protocol=2))
    with pytest.raises(DataError, match="tensors alone"):
        from_transformers(tmp_path)
    (tmp_path / "pytorch_model.bin").unlink()
    with pytest.raises(DataError, match=r"neither model\.safetensors nor"):
        from_transformers(tmp_path)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"model_type": "bert"}, "model_type is 'bert'"),
        ({"d_model": 1 << 40}, "d_model is '1099511627776'"),
        ({"d_model": 1 << 15}, "asks for"),
        ({"encoder_layers": 200}, "asks for|do not fit"),
        ({"encoder_layers": "2"}, "no layers"),
        ({"lags_sequence": [0, 1]}, "lags_sequence is '0'"),
        ({"lags_sequence": "123"}, "not a list"),
        ({"loss": "mse"}, "loss='mse' is not built"),
        ({"minimum_scale": 0.1}, "minimum_scale=0.1 is not built"),
        ({"scaling": "max"}, "scaling is 'max'"),
        ({"dropout": 1.5}, "dropout is '1.5'"),
        ({"activation_function": "silu"}, "no activation 'silu'"),
        ({"cardinality": [5]}, "num_static_categorical_features is 2"),
        ({"prediction_length": None}, "prediction_length"),
        ({"moving_average": 4}, "moving_avg must be odd"),
        ({"d_model": 32}, "do not fit"),
    ],
)
def test_a_config_is_data_and_checked(tmp_path, config, said):
    written(tmp_path, **config)
    with pytest.raises(DataError, match=said):
        from_transformers(tmp_path)


def test_files_that_are_something_else_are_refused(tmp_path):
    with pytest.raises(DataError, match="give a folder"):
        from_transformers(tmp_path)
    (tmp_path / "config.json").write_text("[" * 100_000)
    with pytest.raises(DataError, match="no JSON"):
        from_transformers(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(DataError, match="not an object"):
        from_transformers(tmp_path)
    written(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"no header")
    with pytest.raises(DataError, match="does not hold tensors alone"):
        from_transformers(tmp_path)


@pytest.mark.parametrize("fault", ["missing", "left over", "shape"])
def test_every_key_is_used_and_every_shape_checked(tmp_path, fault):
    state = written(tmp_path)
    key = "model.decoder.layers.1.trend_projection.weight"
    if fault == "missing":
        del state[key]
    elif fault == "left over":
        state["model.decoder.layers.2.fc1.bias"] = torch.zeros(3)
    else:
        state[key] = state[key][:, :, :1].contiguous()
    save_file(state, tmp_path / "model.safetensors")
    said = {
        "missing": r"missing \(decoder.layers.1",
        "left over": r"left over \(decoder.layers.2.fc1.bias",
        "shape": r"3\]",
    }[fault]
    with pytest.raises(DataError, match=said):
        from_transformers(tmp_path)


def test_another_dialects_weights_are_named(tmp_path):
    sizes = {
        "seq_len": 24,
        "pred_len": 6,
        "enc_in": 1,
        "label_len": 4,
        "d_model": 16,
        "n_heads": 2,
        "d_ff": 20,
    }
    official = create_model("informer", **sizes)
    written(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    with pytest.raises(DataError, match=r"autoformer_lagged\), not of Informer; .* dialect \"transformers\""):
        load_weights(official, state, "informer")
    lagged = create_model("informer_lagged", seq_len=24, pred_len=6, d_model=16)
    with pytest.raises(DataError, match="LaggedAutoformer with the dialect"):
        load_weights(lagged, state, "transformers")
    with pytest.raises(DataError, match=r'its authors. Informer.*Informer with the dialect "informer"'):
        load_weights(lagged, official.state_dict(), "transformers")
    with pytest.raises(UsageError, match=r"no dialect 'informer' \(transformers\)"):
        load_weights(lagged, official.state_dict(), "informer")


@pytest.mark.parametrize("name", ["informer_plain", "autoformer"])
def test_saved_as_our_folder_it_predicts_series_with_quantiles_whatever_their_batch(name, tmp_path):
    plain = {
        "num_static_categorical_features": 0,
        "num_static_real_features": 0,
        "num_dynamic_real_features": 0,
    }
    changed = {"num_time_features": 4, "prediction_length": 6} | (plain if name == "autoformer" else {})
    kind, own = CONFIGS[name]
    builder, arguments = builder_arguments(COMMON | own | changed | {"model_type": kind})
    arguments["num_samples"] = 20
    model = create_model(builder, **arguments).eval()
    length = arguments["seq_len"]
    treated = {
        "seq_len": length, "pred_len": 6, "columns": ["y"], "targets": None, "time_column": None,
        "id_column": None, "freq": "h", "missing": "refuse", "time_features": list(feature_names("h")),
        "scaler": {"columns": ["y"], "mean": [2.0], "scale": [3.0]},
    }  # fmt: skip
    config = {"domain": "timeseries", "name": builder, "arguments": arguments}
    hub.save(tmp_path / "ours", model, **config, preprocessing=treated)
    predictor = hub.load(tmp_path / "ours")
    rows = pd.DataFrame(
        {
            "unique_id": np.repeat(["a", "b", "c"], length),
            "ds": np.tile(pd.date_range("2020-01-01", periods=length, freq="h"), 3),
            "y": np.random.default_rng(0).normal(5, 2, 3 * length),
        }
    )
    together = predictor.predict(rows, quantiles=[0.1, 0.9])
    assert list(together.columns) == ["unique_id", "ds", "yhat", "yhat_q0.1", "yhat_q0.9"]
    assert len(together) == 18
    assert (together["yhat_q0.1"] < together["yhat_q0.9"]).all()
    alone = predictor.predict(rows[rows.unique_id == "b"], quantiles=[0.1, 0.9])
    numbers = list(together.columns[2:])
    assert np.allclose(alone[numbers], together[together.unique_id == "b"][numbers], rtol=1e-5, atol=1e-4)
