"""Groups of parameters by timm's rules, rates by step, averaged weights."""

import math
from itertools import pairwise

import pytest
import timm
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from manyheads.core.errors import UsageError
from manyheads.core.training import make_averaging
from manyheads.vision import optimization
from manyheads.vision.optimization import Optimizer, Schedule


@pytest.fixture
def model() -> nn.Module:
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=16, patch_size=4, embed_dim=16, depth=3, num_heads=2, num_classes=5
    )


def test_vectors_and_named_parameters_are_not_decayed(model: nn.Module) -> None:
    adam = optimization.make_optimizer(model, Optimizer(weight_decay=0.1))
    decay = {id(p): group["weight_decay"] for group in adam.param_groups for p in group["params"]}
    names = {name: decay[id(p)] for name, p in model.named_parameters()}
    assert set(decay) == {id(p) for p in model.parameters()}
    assert names["blocks.0.attn.qkv.weight"] == 0.1
    for name in ("blocks.0.attn.qkv.bias", "norm.weight", "pos_embed", "cls_token"):
        assert names[name] == 0, name


def test_each_layer_before_the_last_has_a_lower_rate(model: nn.Module) -> None:
    adam = optimization.make_optimizer(model, Optimizer(learning_rate=1.0, layer_decay=0.5))
    rate = {id(p): group["lr"] for group in adam.param_groups for p in group["params"]}
    names = {name: rate[id(p)] for name, p in model.named_parameters()}
    assert names["head.weight"] == 1
    found = [names[f"blocks.{k}.attn.qkv.weight"] for k in range(3)]
    assert found == [0.125, 0.25, 0.5] or found == [0.25, 0.5, 1]
    assert names["patch_embed.proj.weight"] == found[0] / 2
    schedule = optimization.make_schedule(adam, Schedule("constant", warmup_epochs=1), 20, 4)
    assert schedule.get_last_lr()[0] == pytest.approx(adam.param_groups[0]["initial_lr"] / 5)


def test_frozen_parameters_have_no_group(model: nn.Module) -> None:
    model.requires_grad_(False)
    with pytest.raises(UsageError, match="no parameters to train"):
        optimization.make_optimizer(model, Optimizer())
    model.head.requires_grad_(True)  # type: ignore[operator, union-attr]
    groups = optimization.make_optimizer(model, Optimizer()).param_groups
    assert sum(len(group["params"]) for group in groups) == 2


def test_the_rate_rises_and_falls() -> None:
    cosine = Schedule("cosine", min_lr=0.1)
    rates = [optimization.rate(cosine, 100, 10, step) for step in range(100)]
    assert rates[:2] == [pytest.approx(1 / 11), pytest.approx(2 / 11)]
    assert max(rates) == rates[10] == 1
    assert rates[55] == pytest.approx(0.55)
    assert rates[99] == pytest.approx(0.1, abs=1e-3)
    assert all(a > b for a, b in pairwise(rates[10:]))
    flat = [optimization.rate(Schedule("constant"), 100, 10, step) for step in range(100)]
    assert flat[:10] == rates[:10]
    assert set(flat[10:]) == {1.0}
    one = [optimization.rate(Schedule("onecycle", min_lr=0), 100, 30, step) for step in range(101)]
    assert one[0] == pytest.approx((1 - math.cos(math.pi / 31)) / 2)
    assert one[30] == 1
    assert one[100] == pytest.approx(0)
    assert optimization.rate(cosine, 100, 10, 150) == pytest.approx(0.1)  # a run made longer


def test_a_rise_as_long_as_the_run_is_refused(model: nn.Module) -> None:
    adam = optimization.make_optimizer(model, Optimizer())
    with pytest.raises(UsageError, match="the whole run of 20"):
        optimization.make_schedule(adam, Schedule(warmup_epochs=5), 20, 4)


@pytest.mark.parametrize(
    ("optimizer", "schedule", "says"),
    [
        (Optimizer(learning_rate=0), Schedule(), "learning_rate must be above 0"),
        (Optimizer(layer_decay=1.5), Schedule(), "layer_decay"),
        (Optimizer(beta2=1.0), Schedule(), "beta2"),
        (Optimizer(weight_decay=math.nan), Schedule(), "weight_decay"),
        (Optimizer(), Schedule(min_lr=2), "min_lr"),
        (Optimizer(), Schedule(warmup_epochs=-1), "warmup_epochs"),
    ],
)
def test_numbers_that_cannot_be_meant_are_refused(
    optimizer: Optimizer, schedule: Schedule, says: str
) -> None:
    with pytest.raises(UsageError, match=says):
        optimization.check(optimizer, schedule)


def test_averaged_weights_begin_short_and_counters_are_the_last() -> None:
    module = nn.BatchNorm1d(1)
    callback = make_averaging(0.5, torch.device("cpu"))
    average = AveragedModel(module, use_buffers=True, **callback._kwargs)
    expected = 0.0
    for step in range(40):
        with torch.no_grad():
            module.weight.fill_(float(step))
            module.num_batches_tracked.fill_(step)  # type: ignore[union-attr, operator]
        average.update_parameters(module)
        keep = 0.0 if step == 0 else min(0.5, (1 + step) / (10 + step))
        expected = keep * expected + (1 - keep) * step
    assert average.module.weight.item() == pytest.approx(expected)
    assert average.module.num_batches_tracked.item() == 39  # type: ignore[union-attr, operator]
