"""timm's checkpoints into our models: files, folders, old layouts, other classes, and what is refused."""

import json

import pytest
import timm
import torch
from safetensors.torch import save_file

from manyheads.core.catalog import create_model
from manyheads.core.errors import DataError
from manyheads.vision.models.timm_weights import load_timm_weights

ARGS = {"img_size": 32, "num_classes": 5}
SMALL = {
    "test_vit": {},
    "deit3_small_patch16_224": {"depth": 1},
    "vit_relpos_small_patch16_224": {"depth": 1},
    "swin_tiny_patch4_window7_224": {"depths": [1, 1], "embed_dim": 12, "num_heads": [2, 4]},
    "swinv2_tiny_window8_256": {"depths": [1, 1], "embed_dim": 12, "num_heads": [2, 4]},
    "test_maxvit": {},
}


def pair(name):
    torch.manual_seed(0)
    return create_model(name, **ARGS, **SMALL[name]).eval(), timm.create_model(
        name, **ARGS, **SMALL[name]
    ).eval()


@pytest.mark.parametrize("name", SMALL)
def test_a_published_folder_gives_timms_outputs(tmp_path, name):
    ours, theirs = pair(name)
    save_file(theirs.state_dict(), str(tmp_path / "model.safetensors"))
    (tmp_path / "config.json").write_text(json.dumps({"architecture": name, "num_classes": 5}))
    load_timm_weights(ours, tmp_path)
    x = torch.randn(2, 3, 32, 32)
    assert (ours(x) - theirs(x)).abs().max() <= 1e-5


def test_files_of_torch_and_training_checkpoints(tmp_path):
    ours, theirs = pair("test_vit")
    file = tmp_path / "checkpoint.pth"
    torch.save({"state_dict": {f"module.{k}": v for k, v in theirs.state_dict().items()}, "epoch": 3}, file)
    load_timm_weights(ours, file)
    assert all(torch.equal(v, theirs.state_dict()[k]) for k, v in ours.state_dict().items())
    torch.save({"state_dict": theirs}, file)  # a module: code, not tensors
    with pytest.raises(DataError, match="no file of tensors"):
        load_timm_weights(ours, file)


def test_positions_of_another_size_are_resized_as_timm_does():
    small, large = create_model("test_vit", img_size=32), timm.create_model("test_vit", img_size=64)
    load_timm_weights(small, large.state_dict())
    assert small.pos_embed.shape != large.pos_embed.shape


def test_a_classifier_of_other_classes_needs_a_word():
    ours = create_model("test_vit", img_size=32, num_classes=3)
    state = timm.create_model("test_vit", img_size=32).state_dict()
    head = ours.head.weight.clone()
    with pytest.raises(DataError, match="reset_head=True"):
        load_timm_weights(ours, state)
    load_timm_weights(ours, state, reset_head=True)
    assert torch.equal(ours.head.weight, head)
    assert torch.equal(ours.blocks[0].attn.qkv.weight, state["blocks.0.attn.qkv.weight"])


def test_what_does_not_fit_is_refused_and_changes_nothing(tmp_path):
    ours, theirs = pair("test_vit")
    before = {key: value.clone() for key, value in ours.state_dict().items()}
    state = theirs.state_dict()
    some = dict(list(state.items())[2:])
    for wrong, message in (
        (some, "2 missing"),
        (state | {"other": torch.zeros(1)}, "1 left over"),
        (tmp_path / "none.safetensors", "no file"),
        (tmp_path, "no config.json"),
    ):
        with pytest.raises(DataError, match=message):
            load_timm_weights(ours, wrong)
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "test_vit2"}))
    with pytest.raises(DataError, match="weights of test_vit2, not of test_vit"):
        load_timm_weights(ours, tmp_path)
    assert all(torch.equal(value, before[key]) for key, value in ours.state_dict().items())
