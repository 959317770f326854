"""iFlowformer against the official code's recorded tensors, and what must hold of any of them."""

import pytest
import torch

from manyheads.core.catalog import create_model
from manyheads.core.dispatch import use_backend
from manyheads.core.errors import DataError, UsageError
from manyheads.timeseries.models.iflowformer import iflowformer
from manyheads.timeseries.models.itransformer import load_library_weights

SHARED = (
    "seq_len",
    "pred_len",
    "d_model",
    "n_heads",
    "e_layers",
    "d_ff",
    "dropout",
    "activation",
    "use_norm",
)


def small(**args):
    sizes = {"seq_len": 24, "pred_len": 5, "d_model": 16, "n_heads": 2, "d_ff": 20} | args
    return iflowformer(**sizes).eval()


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_outputs_and_every_gradient_are_the_official_ones(golden, backend):
    case = golden("timeseries", "iflowformer_a")
    model = iflowformer(**{key: case.config[key] for key in SHARED}).eval()
    model.load_state_dict(case.group("param"), strict=True)
    inputs = case.inputs()
    with use_backend(backend, op="flow_attention"):
        y = model(inputs["x_enc"], inputs["x_mark_enc"])
        case.check_all(inputs, {"y": y}, model)


def test_parameters_are_those_of_itransformer():
    sizes = {"seq_len": 96, "pred_len": 96, "d_model": 256, "d_ff": 256}
    flow, soft = (create_model(name, **sizes).state_dict() for name in ("iflowformer", "itransformer"))
    assert {k: v.shape for k, v in flow.items()} == {k: v.shape for k, v in soft.items()}
    assert sum(v.numel() for v in flow.values()) == 841_568


def test_the_librarys_itransformer_is_refused():
    state = {k.replace("projector.", "projection."): v for k, v in small().state_dict().items()}
    with pytest.raises(DataError, match="built by itransformer"):
        load_library_weights(small(), state)


def test_order_of_variates_does_not_matter():
    model, order = small(), torch.tensor([3, 0, 4, 1, 2])
    x, x_mark = torch.randn(2, 24, 5), torch.randn(2, 24, 4)
    torch.testing.assert_close(model(x[..., order], x_mark), model(x, x_mark)[..., order])


@pytest.mark.parametrize("variates", [1, 3, 200])
def test_any_number_of_variates(variates):
    assert small()(torch.randn(2, 24, variates), torch.randn(2, 24, 4)).shape == (2, 5, variates)


def test_calendar_features_take_part_in_the_last_layer():
    """Their queries are not asked for a forecast, but their flows weigh the sources."""
    model, x = small(e_layers=1), torch.randn(2, 24, 3)
    marks = torch.randn(2, 2, 24, 4)
    assert (model(x, marks[0]) - model(x, marks[1])).abs().max() > 1e-3


def test_covariates_and_several_outputs():
    model = small(past=2, future=1, static=3, outputs=4, use_norm=False)
    given = {"past": torch.randn(2, 24, 2), "future": torch.randn(2, 29, 1), "static": torch.randn(2, 3)}
    y = model(torch.randn(2, 24, 3), torch.randn(2, 24, 4), **given)
    assert y.shape == (2, 5, 3, 4)


def test_there_are_no_attention_weights():
    with pytest.raises(UsageError, match="no weights of pairs"):
        small().forward_with_attention(torch.randn(2, 24, 3))


@pytest.mark.parametrize(
    ("args", "complaint"),
    [({"n_heads": 3}, "n_heads=3"), ({"activation": "tanh"}, "tanh"), ({"d_ff": 0}, "d_ff")],
)
def test_impossible_sizes_are_refused(args, complaint):
    with pytest.raises(UsageError, match=f"iflowformer: .*{complaint}"):
        small(**args)
