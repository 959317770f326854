"""Our models in timm: whichever is imported first, built and adapted as timm's own."""

import subprocess
import sys

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.data import resolve_data_config
from timm.optim import create_optimizer_v2

from manyheads import vision
from manyheads.core import catalog
from manyheads.core.errors import UsageError
from manyheads.vision.models.cct import CCT
from manyheads.vision.models.class_tokens import resize_pos_embed
from manyheads.vision.models.vim import VisionMamba
from manyheads.vision.registration import CCT as CCTS
from manyheads.vision.registration import VIM, register

NAMES = (*VIM, *CCTS)


def test_every_entry_of_the_catalogue_is_in_timm():
    assert set(VIM) == set(timm.list_models("vim_*"))
    assert set(CCTS) == set(timm.list_models("cct_*"))
    assert set(NAMES) <= set(catalog.list_models("vision"))
    assert vision.register is register


@pytest.mark.parametrize("name", NAMES)
def test_timm_builds_what_the_catalogue_builds(name):
    with torch.device("meta"):
        theirs, ours = timm.create_model(name), catalog.create_model(name)
    assert type(theirs) is type(ours)
    shapes = {key: value.shape for key, value in ours.state_dict().items()}
    assert {key: value.shape for key, value in theirs.state_dict().items()} == shapes
    for key in ("mean", "std", "crop_pct", "interpolation", "input_size", "num_classes", "first_conv"):
        assert theirs.pretrained_cfg[key] == ours.pretrained_cfg[key] == ours.default_cfg[key], key


@pytest.mark.parametrize(
    "code",
    [
        "import manyheads.vision, timm",
        "import timm, manyheads.vision",
        "import manyheads.vision.models.vim, timm",
        "import timm, importlib, manyheads.vision as v; v.register(); importlib.reload(v)",
    ],
)
@pytest.mark.slow
def test_either_may_be_imported_first(code):
    check = "assert timm.is_model('vim_tiny_patch16_224') and timm.is_model('cct_7_3x1_32')"
    subprocess.run([sys.executable, "-W", "error::UserWarning", "-c", f"{code}; {check}"], check=True)


def test_registering_again_changes_nothing(recwarn):
    before = {name: timm.model_entrypoint(name) for name in NAMES}
    register()
    assert {name: timm.model_entrypoint(name) for name in NAMES} == before
    assert not [each for each in recwarn if "registry" in str(each.message)]


def test_arguments_are_timms():
    model = timm.create_model(
        "vim_tiny_patch16_224", num_classes=7, in_chans=1, img_size=(32, 48), drop_path_rate=0.1,
        drop_rate=0.2, global_pool="avg", pretrained_cfg_overlay={"crop_pct": 0.9},
    ).eval()  # fmt: skip
    assert isinstance(model, VisionMamba)
    assert model(torch.zeros(2, 1, 32, 48)).shape == (2, 7)
    assert (model.global_pool, model.head_drop.p) == ("avg", 0.2)
    assert model.layers[-1].drop_path.drop_prob == pytest.approx(0.1)
    assert model.pretrained_cfg["crop_pct"] == 0.9
    with pytest.raises(TypeError, match="num_heads"):
        timm.create_model("vim_tiny_patch16_224", num_heads=3)


def test_evaluation_is_as_published():
    config = resolve_data_config(model=timm.create_model("vim_tiny_patch16_224"))
    assert (config["input_size"], config["crop_pct"], config["interpolation"]) == (
        (3, 224, 224),
        0.875,
        "bicubic",
    )
    assert config["mean"] == (0.485, 0.456, 0.406)
    cfg = timm.get_pretrained_cfg("vim_small_patch16_stride8_224")
    assert (cfg.hf_hub_id, cfg.hf_hub_filename) == (
        "hustvl/Vim-small-midclstok",
        "vim_s_midclstok_ft_81p6acc.pth",
    )
    assert timm.get_pretrained_cfg("cct_7_3x1_32").mean == (0.4914, 0.4822, 0.4465)


@pytest.mark.parametrize(
    ("name", "size", "reduction", "channels"),
    [
        ("vim_tiny_patch16_224", (64, 96), 16, 192),
        ("vim_tiny_patch16_stride8_224", (64, 96), 8, 192),
        ("cct_7_3x2_32", (32, 32), 4, 256),
    ],
)
def test_features_only(name, size, reduction, channels):
    model = timm.create_model(name, features_only=True, img_size=size).eval()
    assert model.feature_info.channels() == [channels] * 3
    assert model.feature_info.reduction() == [reduction] * 3
    maps = model(torch.randn(2, 3, *size))
    rows = [(n - 16) // reduction + 1 if name.startswith("vim") else n // reduction for n in size]
    assert [tuple(each.shape) for each in maps] == [(2, channels, *rows)] * 3


def test_blocks_after_the_last_map_are_pruned():
    model = timm.create_model("cct_7_3x2_32", features_only=True, out_indices=(0, 2)).eval()
    assert len(model(torch.randn(1, 3, 32, 32))) == 2
    assert len(model.model.classifier.blocks) == 3


def test_features_are_the_whole_models():
    torch.manual_seed(0)
    whole = timm.create_model("vim_tiny_patch16_224", img_size=48).eval()
    part = timm.create_model("vim_tiny_patch16_224", img_size=48, features_only=True, out_indices=[3]).eval()
    kept = {key: value for key, value in whole.state_dict().items() if "model." + key in part.state_dict()}
    part.model.load_state_dict(kept)
    x = torch.randn(1, 3, 48, 48)
    want = whole.forward_intermediates(x, indices=[3], intermediates_only=True)[0]
    assert torch.equal(part(x)[0], want)


@pytest.mark.parametrize("name", ["vim_tiny_patch16_224", "vim_base_patch16_224"])
def test_published_training_checkpoints_are_not_loaded_by_timm(name):
    with pytest.raises(UsageError, match=r"training checkpoint.*vim_checkpoints\.convert.*overlay"):
        timm.create_model(name, pretrained=True)


def test_weights_from_a_file_are_fitted_to_size_channels_and_classes(tmp_path):
    model = timm.create_model("vim_tiny_patch16_224", img_size=64).eval()
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    overlay = {"file": str(tmp_path / "model.safetensors")}
    same = timm.create_model(
        "vim_tiny_patch16_224", pretrained=True, img_size=64, pretrained_cfg_overlay=overlay
    )
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(same.eval()(x), model(x))
    other = timm.create_model(
        "vim_tiny_patch16_224", pretrained=True, img_size=(80, 48), in_chans=1, num_classes=3,
        pretrained_cfg_overlay=overlay,
    )  # fmt: skip
    assert other.head.out_features == 3
    assert torch.equal(other.pos_embed, resize_pos_embed(model.pos_embed, (4, 4), (5, 3)))
    grey = model.patch_embed.proj.weight.sum(1, keepdim=True)
    assert torch.allclose(other.patch_embed.proj.weight, grey, atol=1e-6)
    save_file({"norm_f.weight": torch.ones(192)}, tmp_path / "model.safetensors")
    with pytest.raises(Exception, match="no weights of Vim"):
        timm.create_model("vim_tiny_patch16_224", pretrained=True, pretrained_cfg_overlay=overlay)


def test_optimizers_of_timm_take_layers_and_decay_from_the_model():
    model = timm.create_model("vim_tiny_patch16_224", img_size=32, num_classes=2)
    found = create_optimizer_v2(model, "adamw", lr=1e-3, weight_decay=0.05, layer_decay=0.5)
    names = {id(p): name for name, p in model.named_parameters()}
    free = {
        names[id(p)] for group in found.param_groups if not group["weight_decay"] for p in group["params"]
    }
    assert {"pos_embed", "cls_token", "layers.0.mixer.A_log", "layers.23.mixer.D_b"} <= free
    assert "layers.0.mixer.in_proj.weight" not in free
    scales = {names[id(p)]: group["lr_scale"] for group in found.param_groups for p in group["params"]}
    assert scales["head.weight"] == 1
    assert scales["layers.0.mixer.D"] < scales["layers.20.mixer.D"] < scales["layers.23.mixer.D"]


def test_a_cct_is_adapted_as_timms_models_are():
    model = timm.create_model("cct_2_3x2_32", in_chans=1, img_size=28, num_classes=0).eval()
    assert isinstance(model, CCT)
    assert model(torch.zeros(2, 1, 28, 28)).shape == (2, 128)
    model.reset_classifier(10)
    assert model(torch.zeros(2, 1, 28, 28)).shape == (2, 10)
