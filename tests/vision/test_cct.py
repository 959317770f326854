"""CCT against the official code's recorded tensors and parameter counts, and what must hold of a backbone."""

import pytest
import torch
import torch.nn.functional as F
from timm.models._manipulate import group_parameters

from manyheads.core.errors import DataError, UsageError
from manyheads.core.testing import assert_within
from manyheads.vision.models import cct as module
from manyheads.vision.models.cct import CCT, cct, filter_cct
from manyheads.vision.models.cct_layers import sinusoids

# Of the official code's models at their own numbers of classes, counted there.
COUNTS = {
    "cct_2_3x2_32": 283_723,
    "cct_4_3x2_32": 482_123,
    "cct_6_3x1_32": 3_233_803,
    "cct_7_3x1_32": 3_760_139,
    "cct_7_3x2_32": 3_853_259,
    "cct_14_7x2_224": 22_367_273,
    "cct_14_7x2_384": 22_513_193,
}
REDUCTIONS = {"cct_2_3x2_32": 4, "cct_7_3x1_32": 2, "cct_14_7x2_224": 16}


def official(case) -> CCT:
    c = case.config
    return cct(
        c["embedding_dim"], c["num_layers"], c["num_heads"], c["mlp_ratio"], c["n_conv_layers"],
        c["kernel_size"], c["stride"], c["padding"], c["num_classes"], c["n_input_channels"], c["img_size"],
        c["positional_embedding"], "seq", c["dropout"], c["attention_dropout"], c["stochastic_depth"],
    )  # fmt: skip


def small(**args) -> CCT:
    sizes = {"embed_dim": 16, "depth": 3, "num_heads": 2, "mlp_ratio": 1, "img_size": 16, "num_classes": 5}
    return cct(**(sizes | args)).eval()


def images(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["cct_a1", "cct_a2"])
def test_outputs_and_every_gradient_are_the_official_ones(golden, name, dtype):
    near, grads = (2e-5, 1e-4) if dtype == torch.float32 else (2e-6, 2e-6)
    case = golden("vision", name)
    model = official(case).eval()
    model.load_state_dict(case.group("param"))
    model = model.to(dtype)
    x = case.group("input")["images"].to(dtype).requires_grad_()
    logits = model(x)
    assert_within(logits, case.group("output")["logits"], near)
    (logits * case.group("cotangent")["logits"]).sum().backward()
    assert_within(x.grad, case.group("grad_input")["images"], grads)
    wanted = case.group("grad")
    assert set(wanted) == {key for key, p in model.named_parameters() if p.requires_grad}
    largest = max(want.abs().max() for want in wanted.values())
    for key, want in wanted.items():
        assert model.get_parameter(key).grad.sub(want).abs().max() <= grads * largest, key


def test_the_table_of_sines_is_the_official_one(golden):
    case = golden("vision", "cct_a2")
    table = case.group("param")["classifier.positional_emb"]
    assert torch.allclose(sinusoids(64, 24), table, atol=2e-6)
    assert not official(case).classifier.positional_emb.requires_grad


@pytest.mark.parametrize(("name", "count"), COUNTS.items())
def test_parameter_counts_are_the_official_ones(name, count):
    with torch.device("meta"):
        model = getattr(module, name)()
    assert sum(value.numel() for value in model.parameters()) == count
    if name in REDUCTIONS:
        assert model.feature_info[0]["reduction"] == REDUCTIONS[name]


def test_a_layers_second_residual_starts_from_the_normed_tokens():
    layer, x = small().classifier.blocks[1], images(2, 9, 16)
    normed = layer.norm1(x + layer.self_attn(layer.pre_norm(x)))
    want = normed + layer.linear2(F.gelu(layer.linear1(normed)))
    assert torch.allclose(layer(x), want, atol=1e-6)


def test_pooling_is_a_mean_by_a_softmax_over_the_tokens():
    model, x = small(), images(2, 3, 16, 16)
    tokens = model.forward_features(x)
    weights = model.classifier.attention_pool(tokens)[..., 0].softmax(1)
    want = torch.einsum("bn,bnd->bd", weights, tokens)
    assert torch.allclose(model.forward_head(tokens, pre_logits=True), want, atol=1e-6)
    assert torch.allclose(model(x), model.classifier.fc(want), atol=1e-6)
    model.reset_classifier(0, "")
    assert torch.equal(model(x), tokens)
    assert small(num_classes=0)(x).shape == (2, 16)
    model.reset_classifier(4, "seq")
    assert model(x).shape == (2, 4)
    assert model.get_classifier().out_features == 4


@pytest.mark.parametrize("positions", ["learnable", "sine", "none"])
@pytest.mark.parametrize("size", [(28, 28), (16, 24)])
def test_another_size_at_run_time_is_that_size_at_build_time(positions, size):
    model = small(positions=positions, in_chans=1)
    built = small(positions=positions, in_chans=1, img_size=size)
    built.load_state_dict(filter_cct({"model": model.state_dict()}, built))
    x = images(2, 1, *size)
    y = model(x)
    assert torch.allclose(y, built(x), atol=1e-6)
    model.set_input_size(size)
    assert torch.equal(model(x), y)
    if positions == "learnable":
        old = small(positions=positions, in_chans=1)
        old.load_state_dict(
            {k: v for k, v in model.state_dict().items() if "positional" not in k}, strict=False
        )
        square = old.classifier.positional_emb.detach().reshape(1, 8, 8, 16).permute(0, 3, 1, 2)
        want = F.interpolate(square, size=built.grid_size, mode="bilinear").flatten(2).transpose(1, 2)
        found = filter_cct(old.state_dict(), built)["classifier.positional_emb"]
        assert torch.allclose(found, want, atol=1e-6)


def test_drops_are_where_the_official_code_has_them():
    model, x = small(drop_path_rate=0.2), images(2, 3, 16, 16)
    rates = [getattr(block.drop_path, "drop_prob", 0.0) for block in model.classifier.blocks]
    assert rates == pytest.approx([0.0, 0.1, 0.2])
    layer = model.classifier.blocks[2].train()
    layer.drop_path.drop_prob = 1.0
    tokens = images(2, 9, 16)
    assert torch.allclose(layer(tokens), layer.norm1(tokens), atol=1e-6)
    noisy = small(drop_rate=0.5).train()
    assert not torch.equal(noisy(x), noisy(x))
    assert torch.equal(noisy.eval()(x), noisy(x))
    noisy = small(attn_drop_rate=0.5).train()
    assert not torch.equal(noisy(x), noisy(x))


def test_checkpointed_blocks_give_the_same_gradients():
    model, x = small().train(), images(2, 3, 16, 16)
    model(x).square().sum().backward()
    wanted = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    model.set_grad_checkpointing()
    model(x).square().sum().backward()
    for name, p in model.named_parameters():
        assert torch.equal(p.grad, wanted[name]), name


def test_every_parameter_is_in_one_layers_group():
    model = small()
    groups = group_parameters(model, model.group_matcher(), reverse=True)
    assert set(groups) == {name for name, _ in model.named_parameters()}
    assert groups["tokenizer.conv_layers.0.0.weight"] == groups["classifier.positional_emb"] == 0
    assert groups["classifier.blocks.1.linear1.weight"] == 2
    assert model.no_weight_decay() == {"classifier.positional_emb"}


def test_maps_are_the_blocks_outputs():
    model, x = small(img_size=(16, 24)), images(2, 3, 16, 24)
    outputs = []
    for block in model.classifier.blocks:
        block.register_forward_hook(lambda _, __, out: outputs.append(out))
    final, maps = model.forward_intermediates(x)
    assert [tuple(each.shape) for each in maps] == [(2, 16, 8, 12)] * 3
    for image, tokens in zip(maps, outputs, strict=True):
        assert torch.equal(image, tokens.transpose(1, 2).unflatten(2, (8, 12)))
    assert torch.equal(final, model.forward_features(x))
    outputs.clear()
    early = model.forward_intermediates(x, indices=[0], stop_early=True, norm=True, intermediates_only=True)
    assert len(outputs) == 1
    assert torch.equal(early[0].flatten(2).transpose(1, 2), model.classifier.norm(outputs[0]))


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ({"depth": 0}, "depth must be positive"),
        ({"mlp_ratio": 0}, "mlp_ratio must be positive"),
        ({"num_heads": 3}, "3 heads do not divide embed_dim 16"),
        ({"positions": "rope"}, "positions must be learnable, sine or none"),
        ({"global_pool": "token"}, "global_pool must be 'seq' or ''"),
        ({"attn_drop_rate": -0.1}, r"attn_drop_rate must be in \[0, 1\)"),
    ],
)
def test_options_that_mean_nothing_are_refused(args, said):
    with pytest.raises(UsageError, match=said):
        small(**args)


def test_images_that_do_not_fit_are_refused():
    with pytest.raises(DataError, match="2 x 32 is too small"):
        small(kernel_size=7, stride=2, padding=0)(torch.zeros(1, 3, 2, 32))
    with pytest.raises(DataError, match=r"\[B, 3, H, W\]"):
        small()(torch.zeros(1, 1, 16, 16))


def test_export_compile_and_half_precision():
    model, x = small(depth=1), images(2, 3, 16, 16)
    want = model(x)
    assert torch.allclose(torch.export.export(model, (x,)).module()(x), want, atol=1e-6)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert torch.allclose(compiled(x), want, atol=1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        y = model.train()(x)
    y.float().square().sum().backward()
    assert_within(y.float(), want, 0.05)
    assert_within(model.eval().bfloat16()(x.bfloat16()).float(), want, 0.08)
