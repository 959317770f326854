"""Informer against recorded tensors of its authors' code and of the time-series library."""

import pytest
import torch

from manyheads.core.catalog import create_model
from manyheads.core.errors import UsageError
from manyheads.core.ops.prob_sparse_attention import draw_keys
from manyheads.timeseries.models.attention import fixed_keys
from manyheads.timeseries.models.checkpoints import load_weights
from manyheads.timeseries.models.informer import Informer, informer, informer_stack
from manyheads.timeseries.models.informer_layers import DistilLayer

SHARED = ("seq_len", "label_len", "enc_in", "c_out", "factor", "d_model", "n_heads", "d_layers", "d_ff")
SHARED += ("dropout", "embed", "freq", "activation", "distil")
LIBRARY = {
    "head_layout": "scrambled",
    "distil_padding": 2,
    "cross_attention": "prob",
    "embed_bias": False,
    "batch_union": True,
}
SIZES = {"seq_len": 24, "pred_len": 6, "enc_in": 3, "label_len": 10, "d_model": 16, "n_heads": 2, "d_ff": 20}


def small(**args):
    return informer(**(SIZES | {"factor": 2, "d_layers": 1} | args)).eval()


def batch(n=2, freq_features=4, **sizes):
    sizes = SIZES | sizes
    x = torch.randn(n, sizes["seq_len"], sizes["enc_in"])
    marks = torch.rand(n, sizes["seq_len"] + sizes["pred_len"], freq_features) - 0.5
    return x, marks[:, : sizes["seq_len"]], marks[:, sizes["seq_len"] :]


def run(case, model):
    """Outputs in the case's names, from its inputs and the keys that its code sampled."""
    inputs, encoded, maps = case.inputs(), [], []
    hook = model.encoder.register_forward_hook(lambda module, args, out: encoded.append(out))
    samples = [inputs[f"index_sample.{i}"] for i in range(sum(k.startswith("index_") for k in inputs))]
    wanted = case.group("output")
    y = model.forecast(
        *(inputs[k] for k in ("x_enc", "x_mark_enc", "x_dec", "x_mark_dec")),
        index_samples=samples or None,
        maps=maps if "attn.0" in wanted else None,
    )
    hook.remove()
    outputs = {"y": y, "encoder": encoded[0]} | {f"attn.{i}": each for i, each in enumerate(maps)}
    state = model.state_dict()
    outputs |= {k: state[k.removeprefix("state_after.")] for k in wanted if k.startswith("state_after.")}
    return inputs, outputs


OFFICIAL = (
    ("full_distil_mix", "eval"),
    ("prob_dense", "eval"),
    ("prob_distil_mix_eval", "eval"),
    ("prob_distil_mix_train", "train"),
    ("prob_fixed_t", "eval"),
    ("prob_nodistil_nomix", "eval"),
    ("stack_eval", "eval"),
)


@pytest.mark.parametrize(("name", "mode"), OFFICIAL)
def test_outputs_and_every_gradient_are_the_official_ones(golden, name, mode):
    case = golden("timeseries", f"informer_a_{name}")
    args = {k: case.config[k] for k in SHARED} | {"pred_len": case.config["out_len"]}
    args |= {"attn": case.config["attn"], "head_layout": "mix_decoder" if case.config["mix"] else "ordered"}
    layers = case.config["e_layers"]
    if case.config["class"] == "InformerStack":
        model = informer_stack(**args, s_layers=",".join(map(str, layers)))
    else:
        model = informer(**args, e_layers=layers)
    load_weights(model, case.group("param"), "informer")
    inputs, outputs = run(case, model.train(mode == "train"))
    case.check_all(inputs, outputs, model)


@pytest.mark.parametrize("dialect", ["library", "autoformer"])
@pytest.mark.parametrize(
    ("name", "mode"),
    [("batch1", "eval"), ("distil_eval", "eval"), ("distil_train", "train"), ("nodistil", "eval")],
)
def test_outputs_and_every_gradient_are_the_librarys(golden, name, mode, dialect):
    case = golden("timeseries", f"tsl_informer_a_{name}")
    args = {k: case.config[k] for k in (*SHARED, "pred_len", "e_layers")}
    model = informer(**args, **LIBRARY)
    load_weights(model, case.group("param"), dialect)
    inputs, outputs = run(case, model.train(mode == "train"))
    renamed = {"projection.weight": "decoder.projection.weight", "projection.bias": "decoder.projection.bias"}
    case.check_all(inputs, outputs, model, rename=lambda key: renamed.get(key, key))


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize(("origin", "padding"), [("informer", 1), ("tsl", 2)])
def test_a_halving_is_the_official_one(golden, origin, padding, mode):
    case = golden("timeseries", f"{origin}_distil_a_{mode}")
    layer = DistilLayer(case.config["c_in"], padding).train(mode == "train")
    layer.load_state_dict(case.group("param"), strict=True)
    inputs = case.inputs()
    outputs = {"y": layer(inputs["x"])}
    state = layer.state_dict()
    kept = [key for key in case.group("output") if key.startswith("state_after.")]
    outputs |= {key: state[key.removeprefix("state_after.")] for key in kept}
    assert bool(kept) == (mode == "train")
    case.check_all(inputs, outputs, layer)


def test_parameter_count_is_the_official_codes():
    d, d_ff = 512, 2048
    attention, feed_forward, norm = 4 * (d * d + d), 2 * d * d_ff + d_ff + d, 2 * d
    embedding = 3 * 7 * d + d + 4 * d + d
    encoder = 2 * (attention + feed_forward + 2 * norm) + norm + 3 * d * d + d + norm
    decoder = 2 * attention + feed_forward + 3 * norm + norm
    by_formula = 2 * embedding + encoder + decoder + 7 * d + 7
    model = create_model("informer", seq_len=96, pred_len=96, enc_in=7)
    assert sum(p.numel() for p in model.parameters()) == by_formula == 11_330_055
    library = create_model("informer", seq_len=96, pred_len=96, enc_in=7, **LIBRARY)
    assert sum(p.numel() for p in library.parameters()) == by_formula - 4 * d


def test_the_decoder_reads_the_end_of_the_history_and_the_calendar_of_the_horizon():
    model = small()
    x, x_mark, y_mark = batch()
    y = model(x, x_mark, y_mark)
    x_dec = torch.cat([x[:, -10:], torch.zeros(2, 6, 3)], dim=1)
    again = model.forecast(x, x_mark, x_dec, torch.cat([x_mark[:, -10:], y_mark], dim=1))
    torch.testing.assert_close(y, again, rtol=0, atol=0)
    assert (model(x, x_mark, y_mark + 0.1) - y).abs().max() > 1e-4
    assert (model(x) - y).abs().max() > 1e-4


@pytest.mark.parametrize("label_len", [0, 24])
def test_the_decoder_may_read_none_or_all_of_the_history(label_len):
    assert small(label_len=label_len)(*batch()).shape == (2, 6, 3)


@pytest.mark.parametrize("cross_attention", ["full", "prob"])
def test_leaving_out_what_no_forecast_needs_changes_nothing(cross_attention):
    model = small(cross_attention=cross_attention, d_layers=2)
    x, x_mark, y_mark = batch()
    whole = []

    def keep(module, args, kwargs, out):
        tokens, encoded = args[:2]
        for layer in module.layers:
            tokens = layer(tokens, encoded)
        whole.append(module.norm(tokens)[:, -6:])

    model.decoder.register_forward_hook(keep, with_kwargs=True)
    torch.testing.assert_close(model(x, x_mark, y_mark), model.projection(whole[0]))


def test_evaluation_repeats_and_a_window_does_not_depend_on_its_batch():
    model, inputs = small(), batch(5)
    y = model(*inputs)
    torch.testing.assert_close(model(*inputs), y, rtol=0, atol=0)
    one = model(*(each[2:3] for each in inputs))
    torch.testing.assert_close(one, y[2:3])


def test_training_samples_anew_and_by_the_seed():
    model, inputs = small(factor=1, dropout=0.0, distil=False).train(), batch()
    torch.manual_seed(1)
    first = model(*inputs)
    assert any((model(*inputs) - first).abs().max() > 1e-5 for _ in range(5))
    torch.manual_seed(1)
    torch.testing.assert_close(model(*inputs), first, rtol=0, atol=0)


def test_attention_maps_are_of_the_plain_forecast():
    model, inputs = small(e_layers=3), batch()
    y, maps = model.forward_with_attention(*inputs)
    torch.testing.assert_close(y, model(*inputs), rtol=0, atol=0)
    assert [each.shape for each in maps] == [(2, 2, 24, 24), (2, 2, 12, 12), (2, 2, 6, 6)]
    torch.testing.assert_close(maps[0].sum(-1), torch.ones(2, 2, 24))
    equal = ((maps[0] - 1 / 24).abs() < 1e-6).all(-1).sum(-1)  # queries that do not stand out
    assert (equal == 24 - 2 * 4).all()


@pytest.mark.parametrize("args", [{}, {"attn": "full"}, LIBRARY, {"n_heads": 1}, {"distil": False}])
def test_every_form_trains(args):
    model = small(**args).train()
    model(*batch()).square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("heads", [1, 2])
def test_the_librarys_union_over_the_batch_needs_one_head(heads):
    inputs = batch(6)
    model = small(n_heads=heads, batch_union=True, distil=False)
    alone = torch.cat([model(*(each[i : i + 1] for each in inputs)) for i in range(6)])
    depends = (model(*inputs) - alone).abs().max() > 1e-4
    assert depends == (heads == 1)


def test_a_missing_value_gives_no_number():
    x, x_mark, y_mark = batch()
    x[0, 3, 1] = float("nan")
    y = small()(x, x_mark, y_mark)
    assert y[0].isnan().all()
    assert y[1].isfinite().all()


@pytest.mark.parametrize(
    ("args", "complaint"),
    [
        ({"n_heads": 3}, "n_heads=3"),
        ({"activation": "tanh"}, "tanh"),
        ({"dropout": 1.0}, "dropout"),
        ({"d_ff": 0}, "d_ff"),
        ({"label_len": 25}, "label_len=25"),
        ({"attn": "sparse"}, "attn 'sparse'"),
        ({"head_layout": "mixed"}, "mix_decoder"),
        ({"distil_padding": 3}, "distil_padding 3"),
        ({"cross_attention": "none"}, "cross_attention 'none'"),
        ({"embed": "time"}, "timeF"),
        ({"freq": "x"}, "'x'"),
        ({"e_layers": 0}, "0"),
    ],
)
def test_impossible_arguments_are_refused(args, complaint):
    with pytest.raises(UsageError, match=complaint):
        small(**args)


@pytest.mark.parametrize("s_layers", ["", "3,x", "2,0", "1,1,1,1,1,1"])
def test_impossible_stacks_are_refused(s_layers):
    with pytest.raises(UsageError, match="encoders"):
        informer_stack(**SIZES, s_layers=s_layers)


def test_another_number_of_variates_or_features_is_refused():
    x, x_mark, y_mark = batch()
    with pytest.raises(ValueError, match="enc_in"):
        small()(x[..., :2], x_mark, y_mark)
    with pytest.raises(ValueError, match="4 calendar features"):
        small()(x, x_mark[..., :3], y_mark[..., :3])


def test_builders_return_plain_modules():
    assert type(create_model("informer", **SIZES)) is Informer
    assert type(create_model("informer_stack", **SIZES)) is Informer


def test_it_exports():
    model = small()
    inputs = batch()
    exported = torch.export.export(model, inputs, strict=False).module()
    again = batch()
    torch.testing.assert_close(exported(*again), model(*again))


def test_a_history_or_calendar_of_another_length_is_refused():
    x, x_mark, y_mark = batch()
    with pytest.raises(ValueError, match="fewer than label_len=10"):
        small()(x[:, :9], x_mark[:, :9], y_mark)
    with pytest.raises(ValueError, match="calendar features"):
        small()(x, x_mark, y_mark[:, :-1])
    with pytest.raises(ValueError, match="of the horizon are missing"):
        small()(x, x_mark)
    with pytest.raises(ValueError, match="of the history are missing"):
        small()(x, None, y_mark)
    with pytest.raises(ValueError, match="25 steps are more than the 24"):
        small()(torch.randn(1, 25, 3))


def test_evaluations_sample_is_spread_over_all_keys():
    sample = fixed_keys(720, 720, 5, torch.device("cpu"))
    assert sample.shape == draw_keys(720, 720, 5).shape == (720, 35)
    counts = sample.flatten().bincount(minlength=720).float()  # a good draw has a variance of its mean
    assert 0.8 < counts.var() / counts.mean() < 1.2
    assert len(sample.unique(dim=0)) == 720
    torch.testing.assert_close(fixed_keys(720, 720, 5, torch.device("cpu")), sample, rtol=0, atol=0)


def test_inference_mode_gives_the_same_forecasts():
    model, inputs = small(seq_len=96, pred_len=48).eval(), batch(seq_len=96, pred_len=48)
    with torch.inference_mode():
        y = model(*inputs)
    torch.testing.assert_close(y, model(*inputs).detach())


@pytest.mark.parametrize(("count", "complaint"), [(2, "fewer"), (4, "more")])
def test_samples_are_one_for_each_sparse_attention(count, complaint):
    x, x_mark, y_mark = batch()
    x_dec, marks = torch.zeros(2, 16, 3), torch.cat([x_mark[:, -10:], y_mark], dim=1)
    samples = [torch.zeros(length, 4, dtype=torch.int64) for length in (24, 24, 16, 16)]
    model = small(distil=False)
    model.forecast(x, x_mark, x_dec, marks, index_samples=samples[:3])
    with pytest.raises(ValueError, match=complaint):
        model.forecast(x, x_mark, x_dec, marks, index_samples=samples[:count])
