"""Vim's training checkpoints become model folders; what is something else is refused, and nothing is run."""

import argparse
import os
import pickle

import pytest
import torch

from manyheads.core import hub
from manyheads.core.errors import DataError, UsageError
from manyheads.vision.models.vim import vim, vim_tiny_patch16_224, vim_tiny_patch16_stride8_224
from manyheads.vision.models.vim_checkpoints import (
    convert,
    filter_vim,
    fit_pos_embed,
    imagenet_labels,
    load_strictly,
    read_checkpoint,
)

OFFICIAL = "vim_tiny_patch16_224_bimambav2_final_pool_mean_abs_pos_embed_with_midclstok_div2"


def checkpoint(path, model, /, **changed):
    """A file as the official training writes it."""
    options = argparse.Namespace(model=OFFICIAL, input_size=224, data_set="IMNET", lr=1e-3, gpu=0)
    content = {
        "model": model.state_dict(),
        "optimizer": {"state": {}, "param_groups": [{"lr": 1e-3, "betas": (0.9, 0.999)}]},
        "lr_scheduler": {"base_values": [0.001], "t_initial": 300},
        "epoch": 299,
        "model_ema": {key: value + 1 for key, value in model.state_dict().items()},
        "scaler": {"scale": 65536.0},
        "args": options,
    }
    torch.save(content | changed, path)
    return path


@pytest.fixture(scope="module")
def tiny():
    torch.manual_seed(3)
    return vim_tiny_patch16_224().eval()


def test_a_published_checkpoint_becomes_a_model_folder(tiny, tmp_path):
    config = convert(checkpoint(tmp_path / "vim_t.pth", tiny), tmp_path / "model")
    model, read = hub.load_model(tmp_path / "model")
    assert read == config
    assert (read.name, read.labels) == ("vim_tiny_patch16_224", imagenet_labels())
    assert read.preprocessing["crop_pct"] == 0.875
    assert read.preprocessing["size"] == [224, 224]
    x = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        assert torch.equal(model(x), tiny(x))
    convert(tmp_path / "vim_t.pth", tmp_path / "model", ema=True, labels=[str(i) for i in range(1000)])
    averaged, read = hub.load_model(tmp_path / "model")
    assert torch.equal(averaged.pos_embed, tiny.pos_embed + 1)
    assert read.labels is not None
    assert read.labels[7] == "7"


def test_name_and_size_are_read_off_the_weights(tmp_path):
    model = vim_tiny_patch16_stride8_224()
    config = convert(checkpoint(tmp_path / "a.pth", model, args=None), tmp_path / "a")
    assert (config.name, config.arguments["img_size"]) == ("vim_tiny_patch16_stride8_224", 224)
    assert config.labels is None  # it does not say whose classes
    model = vim_tiny_patch16_224(num_classes=4, img_size=96)
    options = argparse.Namespace(model=OFFICIAL, input_size=96)
    path = checkpoint(tmp_path / "b.pth", model, args=options)
    with pytest.raises(DataError, match="has 4 classes, not 1000: if so, say num_classes=4"):
        convert(path, tmp_path / "b")
    config = convert(path, tmp_path / "b", num_classes=4, labels=list("abcd"))
    assert (config.arguments["img_size"], config.arguments["num_classes"]) == (96, 4)
    with pytest.raises(UsageError, match="2 labels for 4 classes"):
        convert(path, tmp_path / "b", num_classes=4, labels=["a", "b"])
    with pytest.raises(UsageError, match="no Vim 'vim_huge'"):
        convert(path, tmp_path / "b", name="vim_huge")
    with pytest.raises(DataError, match=r"not those of vim_tiny_patch16_stride8_224: .* of another shape"):
        convert(path, tmp_path / "c", name="vim_tiny_patch16_stride8_224", num_classes=4)
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda s: s.pop("layers.3.mixer.D_b"), r"1 missing \(layers\.3\.mixer\.D_b\)"),
        (lambda s: s.update({"layers.24.norm.weight": torch.ones(192)}), r"1 left over \(layers\.24"),
        (lambda s: s.update({"norm_f.weight": torch.ones(191)}), r"norm_f\.weight is \[191\], not \[192\]"),
        (lambda s: s.update({"rope.freqs_cos": torch.ones(1)}), "first release"),
        (lambda s: s.pop("pos_embed"), "no weights of Vim"),
    ],
)
def test_weights_that_do_not_fit_are_refused(tiny, tmp_path, spoil, said):
    state = dict(tiny.state_dict())
    spoil(state)
    path = checkpoint(tmp_path / "vim.pth", tiny, model=state, model_ema=None)
    with pytest.raises(DataError, match=said):
        convert(path, tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_nothing_is_loaded_where_something_does_not_fit():
    model = vim(16, 2, img_size=32)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    state = {key: value + 1 for key, value in before.items()} | {"more": torch.zeros(1)}
    with pytest.raises(DataError, match="left over"):
        load_strictly(model, state, "vim")
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


class Hostile:
    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (self.mark,)


@pytest.mark.parametrize("where", ["top", "args", "raw"])
def test_a_hostile_pickle_is_refused_and_not_run(tmp_path, where):
    mark = str(tmp_path / "was run")
    path, model = tmp_path / "vim.pth", vim(16, 2, img_size=32)
    if where == "raw":
        path.write_bytes(pickle.dumps({"model": Hostile(mark)}, protocol=2))
    elif where == "top":
        checkpoint(path, model, epoch=Hostile(mark))
    else:
        checkpoint(path, model, args=argparse.Namespace(model=Hostile(mark)))
    with pytest.raises(DataError, match=r"is refused: it asks for posix\.mkdir; tensors, plain values"):
        read_checkpoint(path)
    assert not os.path.exists(mark)


def test_namespaces_are_let_in_only_while_a_checkpoint_is_read(tmp_path):
    path = checkpoint(tmp_path / "vim.pth", vim(16, 2, img_size=32))
    state, options = read_checkpoint(path)
    assert options["lr"] == 1e-3
    assert argparse.Namespace not in torch.serialization.get_safe_globals()
    with pytest.raises(pickle.UnpicklingError):
        torch.load(path, weights_only=True)
    torch.save(state, path)
    assert read_checkpoint(path)[0].keys() == state.keys()  # bare weights


@pytest.mark.parametrize(
    ("content", "said"),
    [(b"no pickle", "damaged"), (b"", "damaged"), (None, "no file")],
)
def test_files_that_are_something_else_are_refused(tmp_path, content, said):
    path = tmp_path / "vim.pth"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=said):
        read_checkpoint(path)


@pytest.mark.parametrize(("content", "said"), [([1], "holds a list"), ({"epoch": 3}, "'model'.*holds epoch")])
def test_files_without_weights_are_refused(tmp_path, content, said):
    torch.save(content, tmp_path / "vim.pth")
    with pytest.raises(DataError, match=said):
        read_checkpoint(tmp_path / "vim.pth")
    checkpoint(tmp_path / "vim.pth", vim(16, 2, img_size=32), model_ema=None)
    with pytest.raises(DataError, match="no weights under 'model_ema'"):
        read_checkpoint(tmp_path / "vim.pth", ema=True)


def test_weights_of_another_size_are_resized():
    model, larger = vim(16, 2, img_size=64), vim(16, 2, img_size=(96, 64))
    fitted = fit_pos_embed(model.state_dict(), larger)
    load_strictly(larger, fitted, "vim")
    model.set_input_size((96, 64))
    assert torch.equal(larger.pos_embed, model.pos_embed)
    back = fit_pos_embed(larger.state_dict(), vim(16, 2, img_size=64), grid=(6, 4))
    assert back["pos_embed"].shape == (1, 17, 16)
    with pytest.raises(DataError, match="24 patches make no square"):
        filter_vim({"model": larger.state_dict()}, vim(16, 2, img_size=64))
