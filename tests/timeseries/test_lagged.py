"""The transformers library's Informer and Autoformer against its recorded tensors."""

import pytest
import torch

from manyheads.core.catalog import create_model
from manyheads.core.errors import DataError, UsageError
from manyheads.timeseries.calls import forecast, training_loss
from manyheads.timeseries.distributions import StudentT
from manyheads.timeseries.models.checkpoints import load_weights, our_key
from manyheads.timeseries.models.lagged import History, Target, lagged, negative_log_likelihood, scale_window
from manyheads.timeseries.models.lagged_attention import Draws, LaggedCorrelation
from manyheads.timeseries.models.lagged_autoformer import autoformer_lagged
from manyheads.timeseries.models.lagged_informer import informer_lagged
from manyheads.timeseries.models.pretrained import builder_arguments
from manyheads.timeseries.task import Forecaster

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


def test_informers_mean_path_is_the_librarys(golden):
    """There every sample was replaced by its distribution's mean, so that all paths are the same one."""
    case = golden("timeseries", "hf_informer_a_generate")
    model = build(case, "transformers")
    inputs = case.inputs()
    count = len([key for key in inputs if key.startswith("index_sample")])
    # The third and fourth are of the library's pass over a step that is thrown away.
    draws = Draws(iter([inputs[f"index_sample.{i}"] for i in range(count) if i not in (2, 3)]))
    with torch.no_grad():
        scaled = model.window(read(inputs)[0])
        paths = model._paths(scaled, model.encode(scaled, draws), 2, lambda each, step: each.mean, draws)
    assert next(draws.samples, None) is None
    case.check("output", {"sequences": paths.squeeze(-1)})


def test_autoformers_means_are_the_librarys_with_its_copies_mixed(golden, monkeypatch):
    case = golden("timeseries", "hf_autoformer_a_generate")
    model = build(case, "transformers")
    monkeypatch.setattr(StudentT, "sample", lambda self, n, generator: self.mean[None])
    case.check("output", {"sequences": model.generate(read(case.inputs())[0]).squeeze(-1)})


def batch(name, n=4, gaps=False, **sizes):
    sizes = SMALL[name] | sizes
    length, ahead, variates = sizes["seq_len"], sizes["pred_len"], sizes.get("enc_in", 1)
    made = {
        "x": torch.randn(n, length, variates).cumsum(1) + 5,
        "y": torch.randn(n, ahead, variates) + 5,
        "x_mark": torch.rand(n, length, 2) - 0.5,
        "y_mark": torch.rand(n, ahead, 2) - 0.5,
    }
    if gaps:
        made["observed"] = torch.rand(n, length, variates) > 0.3
        made["observed"][1] = False
        made["x"][1] = 0
    return made


def only(made, i):
    return {key: value[i : i + 1] for key, value in made.items()}


def strong(name, **sizes):
    """A small model whose weights are large enough for an attention's choices to matter."""
    model = create_model(name, **(SMALL[name] | sizes)).eval()
    with torch.no_grad():
        for key, value in model.named_parameters():
            if value.dim() > 1:
                value.normal_(std=0.3 if "proj" in key else 0.5)
    return model


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("compat", ["none", "alone"])
def test_a_series_forecast_does_not_depend_on_its_batch(name, compat):
    model, made = strong(name, compat=compat), batch(name, gaps=True)
    together = model.predict(made, [0.1, 0.5, 0.9])
    for i in range(4):
        alone = model.predict(only(made, i), [0.1, 0.5, 0.9])
        assert torch.allclose(alone.point[0], together.point[i], rtol=1e-4, atol=1e-4)
        assert torch.allclose(alone.quantiles[0], together.quantiles[i], rtol=1e-4, atol=1e-4)


def test_with_the_librarys_faults_an_autoformers_forecast_depends_on_its_batch():
    model, made = strong("autoformer_lagged", compat="transformers"), batch("autoformer_lagged")
    together, alone = model.predict(made).point[1], model.predict(only(made, 1)).point[0]
    assert (together - alone).abs().max() > 0.01


def test_without_any_observation_a_series_takes_its_batchs_scale_only_if_asked_to():
    values, observed = torch.full((3, 8, 2), 4.0), torch.ones(3, 8, 2)
    values[1], observed[1] = 0, 0
    values[2, :, 1] = 10
    assert scale_window(values, observed, "mean", shared=False)[1][1].tolist() == [[1, 1]]
    assert scale_window(values, observed, "mean", shared=True)[1][1].tolist() == [[4, 7]]


def test_queries_that_are_more_than_keys_are_read_whole_as_published():
    q, k = torch.randn(2, 12, 2, 4), torch.randn(2, 9, 2, 4)
    published, cut = (LaggedCorrelation(2, compat)(q, k, k) for compat in ("none", "alone"))
    assert not torch.allclose(published, cut)
    same = torch.cat([q[:, :3], torch.randn(2, 9, 2, 4)], dim=1)  # only three queries are read
    assert torch.allclose(LaggedCorrelation(2, "alone")(same, k, k), cut, atol=1e-6)
    assert torch.allclose(LaggedCorrelation(2, "none")(k, k, k), LaggedCorrelation(2, "alone")(k, k, k))


def test_lags_look_back_from_each_step():
    sequence = torch.arange(10.0)[None, :, None]
    assert lagged(sequence, [1, 3], 6, 2)[0].tolist() == [[5, 3], [6, 4]]


def test_a_step_does_not_see_its_own_truth():
    model, made = strong("informer_lagged", attn="full"), batch("informer_lagged")
    history, target = model.window.history(made), model.window.target(made)
    first = model.distribution(history, target).loc
    changed = target.values.clone()
    changed[:, 3] += 7
    second = model.distribution(history, target._replace(values=changed)).loc
    assert torch.equal(first[:, :4], second[:, :4])
    assert not torch.allclose(first[:, 4:], second[:, 4:])


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("output", ["student_t", "normal", "negative_binomial"])
def test_it_trains_on_batches_with_gaps(name, output):
    model, made = create_model(name, **SMALL[name], output=output), batch(name, gaps=True)
    made["y"] = made["y"].abs().round()
    made["y"][2] = torch.nan
    made["y"][3, 1:] = torch.nan
    loss = training_loss(model, made)
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    made["y"][2] = 1000
    assert training_loss(model.eval(), made) > 0


@pytest.mark.parametrize("name", SMALL)
def test_missing_targets_count_nowhere(name):
    model, made = create_model(name, **SMALL[name]).eval(), batch(name)
    whole = torch.stack([training_loss(model, only(made, i)) for i in range(4)])
    made["y"][1:3] = torch.nan
    assert torch.allclose(training_loss(model, made), whole[[0, 3]].mean(), atol=1e-5)


@pytest.mark.parametrize("name", SMALL)
def test_quantiles_rise_and_repeat_and_agree_with_samples(name):
    model, made = strong(name, num_samples=200), batch(name, n=2)
    found = forecast(model, made, [0.1, 0.5, 0.9])
    assert (found.quantiles.diff(dim=-1) > 0).all()
    assert torch.equal(found.quantiles, forecast(model, made, [0.1, 0.5, 0.9]).quantiles)
    history = model.window.history(made)
    paths = model.generate(history, 1000, torch.Generator().manual_seed(1))
    assert found.quantiles.shape == (2, 6, 1, 3) and paths.shape == (2, 1000, 6, 1)
    spread = (found.quantiles[..., 2] - found.quantiles[..., 0])[..., None]
    sampled = torch.stack([paths.quantile(level, dim=1) for level in (0.1, 0.5, 0.9)], dim=-1)
    assert ((sampled - found.quantiles).abs() < 0.15 * spread).all()


@pytest.mark.parametrize("name", SMALL)
def test_samples_are_those_of_the_generator(name):
    model, made = strong(name), batch(name, n=2)
    history = model.window.history(made)
    first, again, other = (model.generate(history, 3, torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_covariates_reach_the_forecast():
    sizes = {"future": 1, "static": 1, "static_categories": [3]}
    for name in SMALL:
        model, made = strong(name, **sizes), batch(name, n=2)
        made["future"] = torch.randn(2, 37, 1)
        made["static"] = torch.tensor([[0.5, 0], [0.5, 2]])
        found = model.predict(made).point
        for key, change in (
            ("future", 1.0),
            ("static", torch.tensor([0.5, 0])),
            ("static", torch.tensor([0, 1.0])),
        ):
            changed = made | {key: made[key] * (1 if key == "static" else 2) + change * (key == "static")}
            if key == "static":
                changed[key][:, 1] %= 3
            assert not torch.allclose(model.predict(changed).point, found), (name, key)
        with pytest.raises(DataError, match="static category 3 of column 0"):
            model.predict(made | {"static": torch.tensor([[0.5, 0], [0.5, 3]])})
        with pytest.raises(ValueError, match="1 future covariates, not 0"):
            model.predict({key: value for key, value in made.items() if key != "future"})
        with pytest.raises(UsageError, match="known in the history alone"):
            model.predict(made | {"past": torch.randn(2, 31, 1)})


@pytest.mark.parametrize("name", SMALL)
def test_called_with_a_history_it_gives_the_point_forecast(name):
    model, made = strong(name), batch(name)
    assert torch.equal(model(made["x"], made["x_mark"], made["y_mark"]), model.predict(made).point)
    assert strong(name, time_features=0)(made["x"]).shape == (4, 6, 1)


def test_counts_are_counts():
    model, made = informer_lagged(**SIZES, output="negative_binomial"), batch("informer_lagged")
    with pytest.raises(DataError, match="forecasts counts"):
        model.loss(made)


def test_dropped_attention_weights_have_the_right_mean():
    model = informer_lagged(**SIZES, attention_dropout=0.4)
    attend = model.decoder.layers[0].self_attn.attend
    q, k, v = torch.randn(3, 1, 6, 2, 8)
    index = torch.arange(6).expand(6, -1)
    whole = attend.eval()(q, k, v, Draws())
    attend.train()
    dropped = torch.stack([attend(q, k, v, Draws(iter([index[0]]))) for _ in range(1000)])
    assert (dropped[0] - whole).abs().max() > 0.1
    assert torch.allclose(dropped.mean(0), whole, atol=0.2)


@pytest.mark.parametrize(
    ("name", "changed", "said"),
    [
        ("informer_lagged", {"lags": [0, 1]}, "1 or more each"),
        ("informer_lagged", {"lags": [40]}, "no context"),
        ("informer_lagged", {"lags": "1,day"}, r"not \[1, 0\]"),
        ("informer_lagged", {"dec_heads": 3}, "does not divide"),
        ("informer_lagged", {"scaling": "max"}, "no scaling 'max'"),
        ("informer_lagged", {"compat": "hf"}, "no compat 'hf'"),
        ("informer_lagged", {"output": "gamma"}, "no output 'gamma'"),
        ("informer_lagged", {"enc_layerdrop": 1.0}, "enc_layerdrop must be"),
        ("informer_lagged", {"static_categories": [3], "embedding_dims": [2, 2]}, "2 embedding_dims for 1"),
        ("informer_lagged", {"time_features": None, "freq": "parsec"}, "parsec"),
        ("autoformer_lagged", {"label_len": 25}, r"not in \[1, context=24\]"),
        ("autoformer_lagged", {"moving_avg": 4}, "odd"),
    ],
)
def test_impossible_arguments_are_refused(name, changed, said):
    with pytest.raises(UsageError, match=said):
        create_model(name, **(SMALL[name] | changed))


def test_a_batch_of_other_sizes_is_refused():
    model = autoformer_lagged(**SMALL["autoformer_lagged"])
    with pytest.raises(ValueError, match=r"built for \[B, 31, 1\]"):
        model.predict(batch("autoformer_lagged", seq_len=30))
    with pytest.raises(ValueError, match="2 calendar features"):
        made = batch("autoformer_lagged")
        model.predict(made | {"x_mark": torch.zeros(4, 31, 3), "y_mark": torch.zeros(4, 6, 3)})


def test_with_weights_dropped_the_same_queries_attend():
    attend = (
        informer_lagged(**SIZES, attention_dropout=1e-9, factor=1).train().decoder.layers[0].self_attn.attend
    )
    q, k, v = torch.randn(3, 2, 12, 2, 8)
    keys = torch.randint(0, 12, (12,))
    dropping = attend(q, k, v, Draws(iter([keys])))
    attend.dropout = 0.0
    assert torch.allclose(dropping, attend(q, k, v, Draws(iter([keys]))), atol=1e-5)


def test_paths_of_many_series_are_walked_in_parts(monkeypatch):
    model, made = strong("informer_lagged", num_samples=10), batch("informer_lagged")
    whole = model.predict(made, [0.2, 0.8]).quantiles
    monkeypatch.setattr("manyheads.timeseries.models.lagged_informer._ROWS", 15)
    assert torch.allclose(model.predict(made, [0.2, 0.8]).quantiles, whole, rtol=1e-4, atol=1e-4)


def test_the_task_trains_it_with_covariates_of_the_data():
    sizes = {"future": 1, "static_categories": [3]}
    task = Forecaster("autoformer_lagged", {"time_features": 2, "label_len": 4}, 31, 6, covariate_sizes=sizes)
    made = batch("autoformer_lagged") | {
        "future": torch.randn(4, 37, 1),
        "static": torch.tensor([[0.0], [1], [2], [1]]),
    }
    loss = training_loss(task.model, made)
    loss.backward()
    assert task.model.window.embedders[0].weight.grad.abs().sum() > 0
