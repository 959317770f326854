"""Explanations: the numbers they rest on, and that they show what a trained model uses."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import permutations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from manyheads.core.errors import UsageError
from manyheads.core.layers.mamba import BidirectionalMamba, Mamba
from manyheads.core.ops import selective_scan
from manyheads.vision.explain import attention, explain, hidden, methods_for
from manyheads.vision.explain.capture import Place, run
from manyheads.vision.explain.rollout import drop_lowest, rollout
from manyheads.vision.models.cct import cct
from manyheads.vision.models.maxvit import maxvit
from manyheads.vision.models.swin import swin
from manyheads.vision.models.vim import VisionMamba, vim
from manyheads.vision.models.vit import vit

SIZE, HALF = 32, 16
STRIPES = torch.tensor([[1.0, -1.0] * 8] * HALF)
PATTERNS = (STRIPES, STRIPES.T, STRIPES * STRIPES.T)  # upright, lying, a chess board


def tiny_vit(**args: object) -> nn.Module:
    sizes = {"img_size": SIZE, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 3}
    return vit("vit_tiny_patch16_224", **{**sizes, **args})  # type: ignore[arg-type]


def tiny_cct() -> nn.Module:
    return cct(32, 2, 2, conv_layers=1, stride=2, img_size=SIZE, num_classes=3)


def tiny_vim(**args: object) -> nn.Module:
    sizes = {"embed_dim": 32, "depth": 2, "patch_size": 8, "stride": 8, "img_size": SIZE, "num_classes": 3}
    return vim(**{**sizes, **args})  # type: ignore[arg-type]


BUILDERS: dict[str, Callable[[], nn.Module]] = {
    "vit": tiny_vit,
    "cct": tiny_cct,
    "vim": lambda: tiny_vim(depth=1),
}


def place(image: Tensor, kind: int, quadrant: int) -> None:
    """Add a pattern to a quadrant."""
    row, column = (HALF * part for part in divmod(quadrant, 2))
    image[:, row : row + HALF, column : column + HALF] += PATTERNS[kind]


def images(count: int) -> tuple[Tensor, Tensor]:
    """Noise with a pattern in one quadrant, which is the class."""
    x = 0.3 * torch.randn(count, 3, SIZE, SIZE)
    kinds, quadrants = torch.randint(0, 3, (count,)), torch.randint(0, 4, (count,)).tolist()
    for image, kind, quadrant in zip(x, kinds.tolist(), quadrants, strict=True):
        place(image, kind, quadrant)
    return x, kinds


def share(heat: Tensor, quadrant: int) -> float:
    """How much of a map is in a quadrant."""
    row, column = (HALF * part for part in divmod(quadrant, 2))
    return (heat[row : row + HALF, column : column + HALF].sum() / heat.sum()).item()


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Threads cost more than they bring at these sizes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def trained() -> Callable[[str], nn.Module]:
    """A tiny model of a family that tells the patterns."""
    kept: dict[str, nn.Module] = {}

    def train(name: str) -> nn.Module:
        if name not in kept:
            torch.manual_seed(0)
            model = BUILDERS[name]()
            optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
            for _ in range(150):
                x, kinds = images(64)
                loss = F.cross_entropy(model(x), kinds)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                if loss < 0.01:
                    break
            assert loss < 0.01
            kept[name] = model.eval()
        return kept[name]

    return train


def class_shares(model: nn.Module) -> tuple[float, float]:
    """How much of a class's map is on its own pattern, and on another's in the same image: means."""
    found = []
    for kind, other in permutations(range(3), 2):
        for own in (0, 1):
            x = 0.3 * torch.randn(1, 3, SIZE, SIZE)
            place(x[0], kind, own)
            place(x[0], other, 3 - own)
            heat = explain(model, x, "gradcam", kind)
            assert heat.max() > 0
            found.append((share(heat, own), share(heat, 3 - own)))
    own_share, other_share = torch.tensor(found).mean(0).tolist()
    return own_share, other_share


@pytest.mark.parametrize("name", ["vit", "cct", "vim"])
def test_gradcam_tells_two_classes_in_one_image_apart(trained: Callable[[str], nn.Module], name: str) -> None:
    own, other = class_shares(trained(name))
    assert own > 0.35  # 0.25 by chance
    assert own > 2 * other


def mark(quadrant: int, side: int) -> Tensor:
    """Ones at a quadrant's tokens."""
    row, column = (side // 2 * part for part in divmod(quadrant, 2))
    marked = torch.zeros(side, side)
    marked[row : row + side // 2, column : column + side // 2] = 1
    return marked.flatten()


@pytest.mark.parametrize("quadrant", [0, 1, 2, 3])
def test_rollout_of_vit_shows_what_all_tokens_attend_to(quadrant: int) -> None:
    model = tiny_vit(depth=1)
    block = model.blocks[0]  # type: ignore[index]
    with torch.no_grad():
        model.patch_embed.proj.weight.zero_()  # type: ignore[union-attr,operator]
        model.cls_token.zero_()  # type: ignore[operator]
        model.pos_embed.zero_()  # type: ignore[operator]
        model.pos_embed[0, 1:, 0] = mark(quadrant, 4)  # type: ignore[index]
        block.attn.qkv.weight.zero_()
        block.attn.qkv.bias.zero_()
        block.attn.qkv.bias[:16] = 1  # the queries of the first head
        block.attn.qkv.weight[32:48, 0] = 1  # its keys
    x = torch.randn(1, 3, SIZE, SIZE)
    assert share(explain(model, x), quadrant) > 0.7
    assert share(explain(model, x, fusion="max"), quadrant) > 0.7
    other = tiny_vit(depth=1)
    assert share(explain(other, x), quadrant) < 0.4


@pytest.mark.parametrize("quadrant", [0, 3])
def test_rollout_of_cct_follows_the_pooling(quadrant: int) -> None:
    model = tiny_cct()
    classifier = model.classifier
    x = torch.randn(1, 3, SIZE, SIZE)
    with torch.no_grad():
        for block in classifier.blocks:  # type: ignore[union-attr]
            block.self_attn.qkv.weight.zero_()  # every token attends to all alike
            block.self_attn.proj.weight.zero_()
            block.linear2.weight.zero_()
        model.tokenizer.conv_layers[0][0].weight.zero_()  # type: ignore[union-attr,index]
        classifier.positional_emb.zero_()  # type: ignore[union-attr,operator]
        classifier.positional_emb[0, :, 0] = mark(quadrant, 8)  # type: ignore[union-attr,index]
        classifier.attention_pool.weight.zero_()  # type: ignore[union-attr]
        classifier.attention_pool.weight[0, 0] = 3  # type: ignore[union-attr]
    assert share(explain(model, x), quadrant) > 0.9


@pytest.mark.parametrize("quadrant", [0, 1, 2, 3])
def test_rollout_of_vim_shows_where_the_step_sizes_are_large(quadrant: int) -> None:
    """By hand: the positions mark a quadrant's patches, and marked tokens alone have large step sizes."""
    model = tiny_vim(depth=1)
    assert isinstance(model, VisionMamba)
    (block,) = model.layers
    mixer = block.mixer
    assert isinstance(mixer, BidirectionalMamba)
    flat = mark(quadrant, 4)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        block.norm.weight.fill_(1)
        marks = torch.cat([flat[:8], torch.zeros(1), flat[8:]])  # the class token in the middle
        model.pos_embed[0, :, 0] = marks
        model.pos_embed[0, :, 1] = 1 - marks
        mixer.in_proj.weight[0, 0] = mixer.in_proj.weight[1, 1] = 1
        for conv, x_proj, dt_proj, A_log in (
            (mixer.conv1d, mixer.x_proj, mixer.dt_proj, mixer.A_log),
            (mixer.conv1d_b, mixer.x_proj_b, mixer.dt_proj_b, mixer.A_b_log),
        ):
            conv.weight[:, 0, -1] = 1
            rank = dt_proj.in_features
            x_proj.weight[0, 0] = 2
            x_proj.weight[rank:, :2] = 1  # B and C alike for all tokens
            dt_proj.weight[:, 0] = 1
            dt_proj.bias.fill_(-6)
            A_log.fill_(-6)
    heat = explain(model, torch.randn(1, 3, SIZE, SIZE))
    assert share(heat, quadrant) > 0.8


@pytest.mark.parametrize("kind", ["v1", "v2", "none"])
@pytest.mark.parametrize("length", [1, 16, 197])
def test_matrices_of_a_scan_give_what_the_scan_gives(kind: str, length: int) -> None:
    mixer = Mamba(24) if kind == "none" else BidirectionalMamba(24, kind=kind)  # type: ignore[arg-type]
    x = 3 * torch.randn(1, length, 24)
    with torch.no_grad():
        outputs = []
        found = hidden.scans(mixer, x)
        for scan in found:
            y = torch.full_like(scan.u, torch.nan)
            for part, matrices in hidden.matrices(scan):
                y[:, part] = torch.einsum("ets,se->te", matrices, scan.u[:, part])
            inputs = (scan.u[None], scan.delta[None], scan.A, scan.B[None], scan.C[None])
            (expected,) = selective_scan(*inputs, reverse=scan.reverse)
            assert (y - expected).abs().max() < 1e-4 * expected.abs().max().clamp(min=1)
            outputs.append((y + scan.D * scan.u) * F.silu(scan.z))
        halved = isinstance(mixer, BidirectionalMamba) and mixer.divide
        total = mixer.out_proj(sum(outputs)) / (2 if halved else 1)
        assert (total - mixer(x)[0]).abs().max() < 1e-4


def test_matrices_of_large_steps_do_not_overflow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hidden, "HELD", 5 * 100 * 100)  # five channels at a time
    u, delta, z = torch.randn(100, 12), 20 * torch.rand(100, 12), torch.zeros(100, 12)
    A, B, C = -torch.arange(1.0, 17).repeat(12, 1), torch.randn(100, 16), torch.randn(100, 16)
    scan = hidden.Scan(u, delta, A, B, C, torch.zeros(12), z, reverse=True)
    parts = list(hidden.matrices(scan))
    assert [part.stop - part.start for part, _ in parts] == [5, 5, 5]
    y = torch.cat([torch.einsum("ets,se->te", m, u[:, part]) for part, m in parts], 1)
    (expected,) = selective_scan(u[None], delta[None], A, B[None], C[None], reverse=True)
    assert (y - expected).abs().max() < 1e-4 * expected.abs().max()


@pytest.mark.parametrize("args", [{}, {"global_pool": "avg"}])
def test_recomputed_weights_give_what_the_fused_attention_gives(args: dict[str, object]) -> None:
    model = tiny_vit(**args).eval()
    (block, _) = model.blocks  # type: ignore[misc]
    (x,), grid = run(model, torch.randn(1, 3, SIZE, SIZE), [Place(block.attn, "input")])
    assert grid == (4, 4)
    with torch.no_grad():
        found = attention.weights(block.attn, x) @ attention.project(block.attn, x)[2]
        out = block.attn.proj(found.transpose(1, 2).flatten(2))
        assert (out - block.attn(x)).abs().max() < 1e-5


def test_rollout_of_one_layer_is_that_layers_map() -> None:
    model = tiny_vit().eval()
    x = torch.randn(1, 3, SIZE, SIZE)
    second = model.blocks[1].attn  # type: ignore[index,union-attr]
    (inside,), _ = run(model, x, [Place(second, "input")])
    row = attention.weights(second, inside)[0].mean(0)[0, 1:].reshape(1, 1, 4, 4).detach()
    row = row - row.min()
    wide = F.interpolate(row, (SIZE, SIZE), mode="bilinear", align_corners=False)[0, 0]
    assert (explain(model, x, layer=2) - wide / wide.max()).abs().max() < 1e-5


def test_rollout_multiplies_layers_with_their_residuals() -> None:
    first, second = (torch.rand(5, 5).softmax(1) for _ in range(2))
    eye = torch.eye(5)
    expected = (second + eye) / 2 @ ((first + eye) / 2)
    assert torch.equal(rollout([first, second]), expected)
    assert rollout([first, second]).sum(1).allclose(torch.ones(5))


def test_discard_drops_the_lowest_weights_but_keeps_the_class_token() -> None:
    weights = torch.tensor([[0.1, 0.2, 0.7], [0.05, 0.9, 0.05], [0.0, 0.4, 0.6]])
    kept = drop_lowest(weights, 0.5, (0,))
    assert (kept[:, 0] > 0).tolist() == [True, True, False]  # 0 before, too
    assert ((kept > 0) == torch.tensor([[1, 0, 1], [1, 1, 0], [0, 0, 1]]).bool()).all()
    assert kept.sum(1).allclose(torch.ones(3))
    assert drop_lowest(weights, 0.0, (0,)).allclose(weights)


WINDOWED = {
    "swin": lambda: swin("swin_tiny_patch4_window7_224", 3, img_size=64, depths=[1, 1, 2, 1], window_size=2),
    "maxvit": lambda: maxvit("maxvit_tiny_tf_224", 3, img_size=64, depths=[1, 1, 1, 1]),
}


@pytest.mark.parametrize("name", WINDOWED)
def test_windows_have_gradcam_alone(name: str) -> None:
    model = WINDOWED[name]()
    x = torch.randn(1, 3, 64, 64)
    assert methods_for(model) == ("gradcam",)
    heat = explain(model, x)
    assert heat.shape == (64, 64)
    assert not torch.equal(explain(model, x, target=0), explain(model, x, target=1))
    with pytest.raises(UsageError, match=r"no rollout for .*take gradcam"):
        explain(model, x, "rollout")


ALL = {
    **BUILDERS,
    "vit avg": lambda: tiny_vit(global_pool="avg"),
    "deit distilled": lambda: vit("deit_tiny_distilled_patch16_224", 2, img_size=SIZE, depth=2),
    "vit registers": lambda: vit("vit_small_patch14_reg4_dinov2", 2, img_size=28, depth=2),
    "vit post-norm": lambda: vit(
        "vit_base_patch32_clip_224", 2, img_size=64, depth=2, embed_dim=64, num_heads=4
    ),
    "vit parallel": lambda: vit("vit_small_patch16_18x2_224", 2, img_size=SIZE, depth=2),
    "vit relative": lambda: vit("vit_relpos_small_patch16_224", 2, img_size=SIZE, depth=2),
    "vit map": lambda: tiny_vit(global_pool="map"),
    "vim double": lambda: tiny_vim(class_token="double"),
    "vim without": lambda: tiny_vim(class_token="none"),
    "vim forward": lambda: tiny_vim(bimamba="none", class_token="tail"),
    "swin v2": lambda: swin("swinv2_tiny_window8_256", 2, img_size=64, depths=[1, 1, 1, 1], window_size=2),
}


@pytest.mark.parametrize("name", ALL)
def test_every_method_leaves_the_model_as_it_was(name: str) -> None:
    model = ALL[name]()
    size = 28 if "registers" in name else 64 if name in ("swin v2", "vit post-norm") else SIZE
    x = torch.randn(1, 3, size, size)
    model.train()
    frozen = next(iter(model.children()))
    frozen.eval()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    for method in methods_for(model):
        heat = explain(model, x, method)  # type: ignore[arg-type]
        assert heat.shape == (size, size)
        assert heat.min() >= 0
        assert heat.max() in (0, 1)
        assert torch.equal(heat, explain(model, x, method))  # type: ignore[arg-type]
    assert all(parameter.grad is None for parameter in model.parameters())
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_gradcam_needs_no_gradients_of_parameters(trained: Callable[[str], nn.Module]) -> None:
    model, x = trained("vit"), images(1)[0]
    expected = explain(model, x, "gradcam", 1)
    model.requires_grad_(False)
    with torch.no_grad():
        found = explain(model, x, "gradcam", 1)
    model.requires_grad_(True)
    assert (found - expected).abs().max() < 1e-5


def test_a_randomised_model_has_another_map(trained: Callable[[str], nn.Module]) -> None:
    """The sanity check of Adebayo et al. 2018 (arXiv 1810.03292)."""
    fresh = tiny_vit()
    alike = []
    for image, kind in zip(*images(16), strict=True):
        maps = [
            explain(each, image[None], "gradcam", int(kind)).flatten() for each in (trained("vit"), fresh)
        ]
        alike.append(torch.corrcoef(torch.stack(maps))[0, 1])
    assert torch.stack(alike).nanmean() < 0.3


def test_an_image_that_is_no_square() -> None:
    model = tiny_vit(img_size=[32, 64])
    x = torch.randn(1, 3, 32, 64)
    for method in ("rollout", "gradcam"):
        assert explain(model, x, method).shape == (32, 64)  # type: ignore[arg-type]
    assert explain(tiny_vim(), x).shape == (32, 64)


def test_gradcam_of_any_model_at_a_named_layer() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16 * 16, 4))
    with pytest.raises(UsageError, match="Sequential is none of"):
        methods_for(model)
    x = torch.randn(1, 3, SIZE, SIZE)
    heat = explain(model, x, "gradcam", 2, layer="1")
    activation = model[:2](x)
    slope = model[3].weight[2].reshape(8, 16, 16).mean((1, 2))
    expected = torch.relu((slope[:, None, None] * activation[0]).sum(0)).detach()
    wide = F.interpolate(expected[None, None], (SIZE, SIZE), mode="bilinear", align_corners=False)[0, 0]
    assert (heat - wide / wide.max()).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "rollout", "target": 1}, "same for every class"),
        ({"method": "rollout", "layer": "blocks.1"}, "takes a layer's number from 1 to 2"),
        ({"layer": 3}, "no layer 3: the model has 2, from 1"),
        ({"method": "gradcam", "layer": 0}, "no layer 0"),
        ({"method": "gradcam", "layer": "blocks.9"}, "no module 'blocks.9'"),
        ({"method": "gradcam", "layer": "head"}, "makes no map"),
        ({"method": "gradcam", "target": 3}, "no class 3: the model has 3, from 0"),
        ({"discard": 1.0}, "discard is a share"),
    ],
)
def test_what_cannot_be_is_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        explain(tiny_vit(), torch.randn(1, 3, SIZE, SIZE), **arguments)  # type: ignore[arg-type]


def test_one_image_at_a_time() -> None:
    with pytest.raises(UsageError, match="one image"):
        explain(tiny_vit(), torch.randn(2, 3, SIZE, SIZE))
