"""Vim against the official code's recorded tensors, at any image size, and what must hold of any backbone."""

import pytest
import torch
import torch.nn.functional as F
from timm.models._manipulate import group_parameters

from manyheads.core.errors import DataError, UsageError
from manyheads.core.testing import assert_within
from manyheads.vision.models import vim as module
from manyheads.vision.models.class_tokens import (
    class_rows,
    join_rows,
    resize_pos_embed,
    split_rows,
    square_grid,
)
from manyheads.vision.models.vim import VisionMamba, vim

CASES = ("vim_a1", "vim_a2", "vim_a3", "vim_a4", "vim_a5")
COUNTS = {
    "vim_tiny_patch16_224": 7_148_008,
    "vim_small_patch16_224": 25_796_584,
    "vim_base_patch16_224": 97_598_440,
    "vim_tiny_patch16_stride8_224": 7_250_344,
}


def official(case) -> VisionMamba:
    c = case.config
    token = "none" if not c["if_cls_token"] else "double" if c["use_double_cls_token"] else "middle"
    return vim(
        c["embed_dim"], c["depth"], c["d_state"], c["patch_size"], c["stride"], c["num_classes"],
        c["channels"], c["img_size"], token, "v1" if c["if_bimamba"] else c["bimamba_type"],
        c["if_divide_out"], c["init_layer_scale"],
    )  # fmt: skip


def small(**args) -> VisionMamba:
    sizes = {"embed_dim": 16, "depth": 3, "d_state": 4, "patch_size": 4, "stride": 4, "img_size": 16}
    return vim(**(sizes | {"num_classes": 5} | args)).eval()


def images(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", CASES)
def test_outputs_blocks_and_every_gradient_are_the_official_ones(golden, name, dtype):
    near, grads = (2e-5, 1e-4) if dtype == torch.float32 else (2e-6, 2e-6)
    case = golden("vision", name)
    model = official(case).eval()
    model.load_state_dict(case.group("param"))
    model = model.to(dtype)
    x = case.group("input")["images"].to(dtype).requires_grad_()
    aux = case.group("aux")
    with torch.no_grad():
        hidden, stream = model._tokens(x)[0], None
        assert_within(hidden, aux["tokens"], near)
        for i, block in enumerate(model.layers):
            hidden, stream = block(hidden, stream)
            assert_within(hidden, aux[f"block{i}.hidden"], near)
            assert_within(stream, aux[f"block{i}.residual"], near)
    tokens = model.forward_features(x)
    found = {"features": model.forward_head(tokens, pre_logits=True), "logits": model.forward_head(tokens)}
    for key, want in case.group("output").items():
        assert_within(found[key], want, near)
    sum((found[key] * want).sum() for key, want in case.group("cotangent").items()).backward()
    assert_within(x.grad, case.group("grad_input")["images"], grads)
    wanted = case.group("grad")
    assert set(wanted) == {key for key, _ in model.named_parameters()}
    for key, want in wanted.items():
        assert_within(model.get_parameter(key).grad, want, grads)


@pytest.mark.parametrize(("name", "count"), COUNTS.items())
def test_parameter_counts_and_names_are_the_published_ones(name, count):
    with torch.device("meta"):
        model = getattr(module, name)()
    state = model.state_dict()
    assert sum(value.numel() for value in state.values()) == count
    mixer = ["A_log", "D", "A_b_log", "D_b", "in_proj.weight", "out_proj.weight"]
    for back in ("", "_b"):
        mixer += [f"conv1d{back}.weight", f"conv1d{back}.bias", f"x_proj{back}.weight"]
        mixer += [f"dt_proj{back}.weight", f"dt_proj{back}.bias"]
    names = {"cls_token", "pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias"}
    names |= {"norm_f.weight", "head.weight", "head.bias"}
    names |= {
        f"layers.{i}.{key}" for i in range(24) for key in ["norm.weight", *(f"mixer.{k}" for k in mixer)]
    }
    assert set(state) == names
    assert len(state) == 415


def test_small_with_stride_8_differs_by_its_positions_alone():
    with torch.device("meta"):
        model = module.vim_small_patch16_stride8_224()
    count = sum(value.numel() for value in model.parameters())
    assert count == COUNTS["vim_small_patch16_224"] + (730 - 197) * 384


def test_layer_scale_is_a_factor_of_each_mixer():
    model = small(init_layer_scale=0.25)
    assert torch.equal(model.layers[1].mixer.gamma, torch.full((16,), 0.25))
    plain = small()
    state = {k: v for k, v in model.state_dict().items() if "gamma" not in k}
    plain.load_state_dict(state)
    with torch.no_grad():
        for block in plain.layers:
            block.mixer.out_proj.weight *= 0.25
    x = images(2, 3, 16, 16)
    assert torch.allclose(model(x), plain(x), rtol=1e-5, atol=1e-6)


# Sizes


@pytest.mark.parametrize("token", ["middle", "head", "tail", "double", "none"])
def test_class_tokens_are_taken_out_and_put_back(token):
    patches = images(2, 7, 3)
    rows = class_rows(token, 7)
    extra = images(2, len(rows), 3) + 9
    joined = join_rows(patches, extra, rows)
    assert joined.shape[1] == 7 + len(rows)
    for number, row in enumerate(rows):
        assert torch.equal(joined[:, row], extra[:, number])
    again = split_rows(joined, rows)
    assert torch.equal(again[0], patches)
    assert torch.equal(again[1], extra)


def test_the_middle_row_is_exact_and_legacy_is_what_upstream_does():
    old, new = (4, 4), (6, 6)
    table = images(1, 17, 8)
    # Upstream's interpolate_pos_embed: the first row is kept, the others are taken for a square.
    square = table[:, 1:].reshape(-1, 4, 4, 8).permute(0, 3, 1, 2)
    square = F.interpolate(square, size=new, mode="bicubic", align_corners=False)
    upstream = torch.cat([table[:, :1], square.permute(0, 2, 3, 1).flatten(1, 2)], 1)
    assert torch.equal(resize_pos_embed(table, old, new, pos_resize="legacy"), upstream)
    # Patches all alike stay so, and the class token's row is in the middle, untouched.
    table = torch.full((1, 17, 8), 2.0)
    table[:, 8] = 7.0
    resized = resize_pos_embed(table, old, new)
    assert torch.equal(resized[:, 18], table[:, 8])
    rest = split_rows(resized, (18,))[0]
    assert torch.allclose(rest, torch.full_like(rest, 2.0), atol=1e-5)
    assert (resize_pos_embed(table, old, new, pos_resize="legacy")[:, 18] - 7).abs().max() > 1e-3


@pytest.mark.parametrize("token", ["middle", "double", "none"])
@pytest.mark.parametrize("size", [(16, 24), (30, 13), (40, 40)])
def test_another_size_at_run_time_is_that_size_at_build_time(token, size):
    model, built = small(class_token=token), small(class_token=token, img_size=size)
    state = model.state_dict()
    grid = built.grid_size
    state["pos_embed"] = resize_pos_embed(state["pos_embed"], (4, 4), grid, token)
    built.load_state_dict(state)
    x = images(2, 3, *size)
    y = model(x)
    assert torch.equal(y, built(x))
    assert not torch.allclose(y, small(class_token=token)(x))
    model.set_input_size(size)
    assert model.grid_size == grid
    assert torch.equal(model(x), y)


def test_legacy_resizing_is_chosen_by_name():
    model = small()
    other = small(pos_resize="legacy")
    other.load_state_dict(model.state_dict())
    same, larger = images(1, 3, 16, 16), images(1, 3, 32, 32)
    assert torch.equal(model(same), other(same))
    assert not torch.allclose(model(larger), other(larger))


def test_overlapping_patches_follow_the_published_rule():
    model = small(patch_size=8, stride=4, img_size=(20, 32))
    assert model.grid_size == (4, 7)
    assert model.pos_embed.shape == (1, 29, 16)


@pytest.mark.parametrize(
    ("shape", "said"),
    [
        ((1, 3, 3, 16), "3 x 16 holds no patch of 4"),
        ((1, 1, 16, 16), r"\[B, 3, H, W\]"),
        ((3, 16, 16), "B, 3"),
    ],
)
def test_images_that_do_not_fit_are_refused(shape, said):
    with pytest.raises(DataError, match=said):
        small()(torch.zeros(shape))


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ({"depth": 0}, "depth must be positive"),
        ({"num_classes": -1}, "num_classes must not be negative"),
        ({"class_token": "centre"}, "class_token must be one of middle"),
        ({"bimamba": "v3"}, "bimamba must be one of v2"),
        ({"pos_resize": "exact"}, "pos_resize must be one of"),
        ({"drop_path_rate": 1.0}, r"drop_path_rate must be in \[0, 1\)"),
        ({"global_pool": "mean"}, "no global_pool 'mean'"),
        ({"class_token": "none", "global_pool": "token"}, "needs a class token"),
        ({"bimamba": "none", "init_layer_scale": 0.1}, "init_layer_scale needs"),
    ],
)
def test_options_that_mean_nothing_are_refused(args, said):
    with pytest.raises(UsageError, match=said):
        small(**args)


def test_tables_that_are_no_square_or_no_such_grid_are_refused():
    with pytest.raises(DataError, match="7 patches make no square"):
        square_grid(8, "middle")
    with pytest.raises(DataError, match="not one of 3 x 3 patches"):
        resize_pos_embed(torch.zeros(1, 17, 4), (3, 3), (4, 4))


# Heads and training


def test_pooling():
    x = images(2, 3, 16, 16)
    model = small(class_token="middle")
    tokens = model.forward_features(x)
    assert tokens.shape == (2, 17, 16)
    others = torch.cat([tokens[:, :8], tokens[:, 9:]], 1)
    logits = model.head(tokens)
    for pool, want in {
        "token": logits[:, 8],
        "avg": model.head(others.mean(1)),
        "last": logits[:, -1],
        "max": logits.amax(1),
        "": logits,
    }.items():
        model.reset_classifier(5, pool)
        model.head.load_state_dict({"weight": torch.zeros(5, 16), "bias": torch.arange(5.0)})
        assert torch.equal(model(x), torch.arange(5.0).expand_as(want))  # a new head is in use
        model.head.weight.data, model.head.bias.data = small_head(logits, tokens)
        assert torch.allclose(model(x), want, atol=1e-5)


def small_head(logits, tokens):
    """The linear map that made these logits, found again by least squares."""
    flat = torch.cat([tokens.flatten(0, 1), torch.ones(tokens.shape[:2].numel(), 1)], 1).double()
    found = torch.linalg.lstsq(flat, logits.flatten(0, 1).double()).solution.float()
    return found[:-1].t().contiguous(), found[-1].contiguous()


def test_the_classifier_can_be_replaced_or_left_out():
    model, x = small(), images(2, 3, 16, 16)
    features = model.forward_head(model.forward_features(x), pre_logits=True)
    assert features.shape == (2, 16)
    model.reset_classifier(3)
    assert model(x).shape == (2, 3)
    assert model.get_classifier() is model.head
    model.reset_classifier(0)
    assert torch.equal(model(x), features)
    assert small(num_classes=0)(x).shape == (2, 16)
    with pytest.raises(UsageError, match="needs a class token"):
        small(class_token="none").reset_classifier(3, "token")


def test_a_dropped_branch_is_the_one_upstream_drops():
    """Upstream drops block i's output with rate i / (depth - 1) of the last, as it enters the next sum."""
    model = small(drop_path_rate=0.3, depth=4)
    rates = [getattr(block.drop_path, "drop_prob", 0.0) for block in model.layers]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3])
    x = images(2, 3, 16, 16)
    for i in (1, 3):
        for number, block in enumerate(model.layers[1:], 1):
            block.drop_path.drop_prob = float(number == i)
        dropped = model.train()(x)
        without = small(depth=4)
        without.load_state_dict(model.state_dict())
        without.layers[i].mixer.out_proj.weight.data.zero_()
        assert torch.allclose(dropped, without(x), atol=1e-6)


def test_checkpointed_blocks_give_the_same_gradients():
    model, x = small(), images(2, 3, 16, 16)
    model.train()
    model(x).square().sum().backward()
    wanted = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    model.set_grad_checkpointing()
    model(x).square().sum().backward()
    for name, p in model.named_parameters():
        assert torch.equal(p.grad, wanted[name]), name


def test_every_parameter_is_in_one_layers_group_and_some_have_no_decay():
    model = small(class_token="double")
    groups = group_parameters(model, model.group_matcher(), reverse=True)
    assert set(groups) == {name for name, _ in model.named_parameters()}
    assert groups["pos_embed"] == groups["cls_token_head"] == 0
    assert groups["layers.1.mixer.D"] == groups["layers.0.norm.weight"] + 1
    kept = model.no_weight_decay()
    assert {"pos_embed", "cls_token_head", "cls_token_tail", "layers.2.mixer.A_b_log"} <= kept
    assert {name.rpartition(".")[2] for name in kept if name.startswith("layers")} == {
        "A_log", "A_b_log", "D", "D_b"
    }  # fmt: skip


# Maps


@pytest.mark.parametrize("token", ["middle", "head", "double", "none"])
def test_maps_are_the_patches_without_class_tokens(token):
    model, x = small(class_token=token, img_size=(16, 24)), images(2, 3, 16, 24)
    final, maps = model.forward_intermediates(x)
    assert [tuple(each.shape) for each in maps] == [(2, 16, 4, 6)] * 3
    assert torch.equal(final, model.forward_features(x))
    patches, extra = split_rows(final, class_rows(token, 24))
    normed = model.forward_intermediates(x, indices=[2], norm=True, intermediates_only=True)
    assert torch.allclose(normed[0].flatten(2).transpose(1, 2), patches, atol=1e-6)
    early = model.forward_intermediates(
        x, indices=[1], stop_early=True, output_fmt="NLC", intermediates_only=True
    )
    assert torch.equal(early[0].transpose(1, 2).unflatten(2, (4, 6)), maps[1])
    found = model.forward_intermediates(x, indices=1, norm=True, return_prefix_tokens=True, output_dict=True)
    assert ("image_intermediates_prefix" in found) == (token != "none")
    if token != "none":
        assert torch.allclose(found["image_intermediates_prefix"][0], extra, atol=1e-6)
    with pytest.raises(ValueError, match="NCHW or NLC"):
        model.forward_intermediates(x, output_fmt="NHWC")


def test_the_stream_after_a_block_is_what_the_next_one_adds_to():
    model, x = small(), images(1, 3, 16, 16)
    streams = []
    for block in model.layers:
        block.register_forward_hook(lambda _, __, out: streams.append(out[1]))
    maps = model.forward_intermediates(x, output_fmt="NLC", return_prefix_tokens=True)[1]
    for (patches, extra), stream in zip(maps, streams[1:], strict=False):
        assert torch.allclose(join_rows(patches, extra, (8,)), stream, atol=1e-6)


# Other forms


def test_an_exported_model_gives_the_same():
    model, x = small(depth=1), images(2, 3, 16, 16)
    assert torch.allclose(torch.export.export(model, (x,)).module()(x), model(x), atol=1e-6)


def test_a_compiled_model_gives_the_same_outputs_and_gradients():
    model, x = small(depth=1).train(), images(2, 3, 16, 16)
    y = torch.compile(model, backend="aot_eager", fullgraph=True)(x)
    y.square().sum().backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    want = model(x)
    want.square().sum().backward()
    assert torch.allclose(y, want, atol=1e-6)
    for name, p in model.named_parameters():
        assert_within(found[name], p.grad, 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("token", ["head", "double", "none"])
def test_other_class_tokens_are_exported_and_compiled_too_and_sizes_may_change(token):
    model, x = small(class_token=token, depth=2), images(2, 3, 16, 16)
    assert torch.allclose(torch.export.export(model, (x,)).module()(x), model(x), atol=1e-6)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for width in (16, 24):
        wide = images(2, 3, 16, width)
        assert torch.allclose(compiled(wide), model(wide), atol=1e-6)


def test_half_precision():
    model, x = small(), images(4, 3, 16, 16)
    want = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        y = model.train()(x)
    y.float().square().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())
    assert_within(y.float(), want, 0.05)
    model.eval().bfloat16()
    y = model(x.bfloat16())
    assert y.dtype == torch.bfloat16
    assert_within(y.float(), want, 0.08)
