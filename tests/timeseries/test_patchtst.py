"""PatchTST against recorded tensors of the time-series library."""

import pytest
import torch

from manyheads.core.catalog import create_model
from manyheads.core.errors import UsageError
from manyheads.timeseries.models.checkpoints import load_weights
from manyheads.timeseries.models.patchtst import PatchTST, patchtst

SHARED = ("seq_len", "pred_len", "d_model", "n_heads", "e_layers", "d_ff", "dropout", "activation")
SHARED += ("patch_len", "stride")


def small(**args):
    sizes = {
        "seq_len": 26,
        "pred_len": 5,
        "d_model": 16,
        "n_heads": 2,
        "d_ff": 20,
        "patch_len": 8,
        "stride": 4,
    }
    return patchtst(**(sizes | args)).eval()


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_outputs_and_every_gradient_are_the_librarys(golden, mode):
    case = golden("timeseries", f"tsl_patchtst_a_{mode}")
    model = patchtst(**{k: case.config[k] for k in SHARED})
    load_weights(model, case.group("param"), "library")
    model.train(mode == "train")
    inputs = case.inputs()
    outputs = {"y": model(inputs["x_enc"])}
    state = model.state_dict()
    kept = [key for key in case.group("output") if key.startswith("state_after.")]
    outputs |= {key: state[key.removeprefix("state_after.")] for key in kept}
    assert bool(kept) == (mode == "train")
    case.check_all(inputs, outputs, model)


def test_parameter_count_is_the_librarys():
    d, d_ff, patches = 512, 2048, 12
    layer = 4 * (d * d + d) + 2 * d * d_ff + d_ff + d + 4 * d
    by_formula = 16 * d + layer + 2 * d + d * patches * 96 + 96
    model = create_model("patchtst", seq_len=96, pred_len=96, e_layers=1, n_heads=2)
    assert sum(p.numel() for p in model.parameters()) == by_formula == 3_751_520


@pytest.mark.parametrize(("seq_len", "patches"), [(8, 2), (11, 2), (12, 3), (26, 6)])
def test_patches_cover_the_series_and_its_repeated_end(seq_len, patches):
    model, seen = small(seq_len=seq_len), []
    model.patch_embedding.value_embedding.register_forward_hook(
        lambda module, args, out: seen.append(args[0])
    )
    model(torch.arange(1.0, seq_len + 1).view(1, -1, 1))
    assert seen[0].shape == (1, patches, 8)
    assert (seen[0][0, 1:, 0] == seen[0][0, :-1, 4]).all()  # half of each is the half of the next
    ends = seen[0][0, -1]
    assert (ends[-((patches + 1) * 4 - seq_len) :] == ends[-1]).all()


def test_variates_do_not_see_each_other_and_may_be_any_number():
    model, x = small(), torch.randn(3, 26, 4)
    y = model(x)
    assert y.shape == (3, 5, 4)
    torch.testing.assert_close(model(x[1:2, :, 2:3]), y[1:2, :, 2:3])


def test_forecasts_follow_scale_and_level():
    model, x = small(), torch.randn(2, 26, 3)
    scale, level = torch.tensor([100.0, 3.0, 7.0]), torch.tensor([-4.0, 50.0, 1.0])
    torch.testing.assert_close(model(x * scale + level), model(x) * scale + level, rtol=1e-4, atol=1e-4)


def test_a_constant_window_stays_finite():
    assert small()(torch.full((1, 26, 2), 7.0)).sub(7).abs().max() < 1


def test_calendar_features_are_ignored():
    model, x = small(), torch.randn(2, 26, 3)
    torch.testing.assert_close(model(x, torch.randn(2, 26, 4), torch.randn(2, 5, 4)), model(x))


def test_dropout_acts_in_training_only_and_by_the_seed():
    model, x = small(dropout=0.5), torch.randn(2, 26, 3)
    torch.testing.assert_close(model(x), model(x), rtol=0, atol=0)
    model.train()
    torch.manual_seed(1)
    first = model(x)
    assert (first - model(x)).abs().max() > 1e-3
    torch.manual_seed(1)
    torch.testing.assert_close(first, model(x), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("args", "complaint"),
    [
        ({"n_heads": 3}, "n_heads=3"),
        ({"activation": "tanh"}, "tanh"),
        ({"dropout": 1.0}, "dropout"),
        ({"patch_len": 27}, "patch_len=27"),
        ({"stride": 0}, "stride"),
    ],
)
def test_impossible_arguments_are_refused(args, complaint):
    with pytest.raises(UsageError, match=complaint):
        small(**args)


def test_builder_returns_a_plain_module():
    assert type(create_model("patchtst", seq_len=16, pred_len=4, d_model=8)) is PatchTST


def test_it_exports():
    model, x = small(), torch.randn(2, 26, 3)
    exported = torch.export.export(model, (x,), strict=False).module()
    torch.testing.assert_close(exported(x + 1), model(x + 1))
