"""The transformers library's Informer and Autoformer against its recorded tensors."""

import pytest
import torch

from manyheads.core.catalog import create_model
from manyheads.core.errors import DataError, UsageError
from manyheads.timeseries.calls import forecast, training_loss
from manyheads.timeseries.models.checkpoints import load_weights, our_key
from manyheads.timeseries.models.lagged import History, Target, lagged, negative_log_likelihood, scale_window
from manyheads.timeseries.models.lagged_attention import LaggedCorrelation
from manyheads.timeseries.models.lagged_autoformer import autoformer_lagged
from manyheads.timeseries.models.lagged_informer import informer_lagged
from manyheads.timeseries.models.pretrained import builder_arguments

INFORMER = ["student_eval", "student_train", "negbin", "full_normal_multi"]
AUTOFORMER = [
    "student_eval_trunc",
    "student_eval_pad",
    "student_train_trunc",
    "student_train_pad",
    "batch1_eval",
]
SIZES = {"seq_len": 31, "pred_len": 6, "lags": [1, 2, 7], "time_features": 2, "d_model": 16, "d_ff": 20}
SMALL = {"informer_lagged": SIZES, "autoformer_lagged": SIZES | {"label_len": 5, "moving_avg": 5}}


def build(case, compat):
    kind = case.config["class"].lower()
    name, arguments = builder_arguments(case.config | {"model_type": kind})
    model = create_model(name, **arguments, compat=compat)
    load_weights(model, case.group("param"), "transformers")
    return model.train(case.name.split("_")[-1] == "train" or "_train_" in case.name)


def read(inputs):
    """The library's inputs, with an axis of variates where it has none, as ours."""

    def wide(x):
        return x[..., None] if x.dim() == 2 else x

    past = wide(inputs["past_values"])
    context = inputs["past_time_features"][:, 7:]  # the longest lag
    time = torch.cat([context, inputs["future_time_features"]], dim=1)
    static, categories = inputs.get("static_real_features"), inputs.get("static_categorical_features")
    history = History(past, wide(inputs["past_observed_mask"]), time, static, categories)
    if "future_values" not in inputs:
        return history, None
    return history, Target(wide(inputs["future_values"]), wide(inputs["future_observed_mask"]))


def raw_parameters(model, x):
    """The distribution's parameters before loc and scale."""
    head = model.parameter_projection
    return head.distribution.parameters(torch.stack([project(x) for project in head.proj], dim=-1))


def check(case, model, name):
    inputs = case.inputs()
    history, target = read(inputs)
    samples = [inputs[f"index_sample.{i}"] for i in range(len([k for k in inputs if "index_sample" in k]))]
    seen = {}
    model.encoder.register_forward_hook(lambda module, args, out: seen.update(encoded=out))
    hidden = model.decoder if name == "informer" else model.seasonality_projection
    hidden.register_forward_hook(lambda module, args, out: seen.update(decoded=out))
    model.parameter_projection.register_forward_hook(lambda module, args, out: seen.update(x=args[0]))
    model.window.register_forward_hook(lambda module, args, out: seen.update(scaled=out))
    if name == "informer":
        distribution = model.distribution(history, target, samples or None)
    else:
        distribution = model.distribution(history)
        parts = model.decode(seen["scaled"], seen["encoded"])
    scaled = seen["scaled"]
    names = type(distribution).names
    parameters = dict(zip(names, raw_parameters(model, seen["x"]), strict=True))
    if "logits" in parameters:  # which the library scales in place
        parameters["logits"] = distribution.logits
    narrow = model.variates == 1
    outputs = {f"params.{k}": v.squeeze(-1) if narrow else v for k, v in parameters.items()}
    outputs |= {k: getattr(scaled, k).squeeze(-1) if narrow else getattr(scaled, k) for k in ("loc", "scale")}
    outputs["loss"] = negative_log_likelihood(distribution, target)[None]
    outputs |= {"encoder_last_hidden_state": seen["encoded"], "static_features": scaled.static}
    outputs["decoder_last_hidden_state"] = seen["decoded"]
    if name == "autoformer":
        outputs["trend"] = parts.trend
    buffers = {k: v for k, v in model.named_buffers() if "running" in k} if model.training else {}
    outputs |= {f"state_after.model.{k}": v for k, v in buffers.items()}
    theirs = {our_key(key): key for key in case.group("param")}
    case.check_all(inputs, outputs, model, lambda key: theirs[key])


@pytest.mark.parametrize("case", INFORMER)
def test_informers_outputs_and_every_gradient_are_the_librarys(golden, case):
    case = golden("timeseries", f"hf_informer_a_{case}")
    check(case, build(case, "transformers"), "informer")


@pytest.mark.parametrize("case", AUTOFORMER)
def test_autoformers_outputs_and_every_gradient_are_the_librarys(golden, case):
    case = golden("timeseries", f"hf_autoformer_a_{case}")
    check(case, build(case, "transformers"), "autoformer")


def test_alone_an_autoformer_is_the_librarys_on_a_batch_of_one(golden):
    case = golden("timeseries", "hf_autoformer_a_batch1_eval")
    check(case, build(case, "alone"), "autoformer")
