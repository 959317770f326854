"""Model folders: round trip, strictness, hostile folders."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import struct
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from manyheads.core import catalog, files, hub
from manyheads.core.catalog import create_model
from manyheads.core.errors import ManyheadsError, UsageError

ARGUMENTS = {"seq_len": 8, "pred_len": 4}


@pytest.fixture
def model():
    return create_model("dlinear", **ARGUMENTS)


def save(path, model, **changes):
    known = {
        "domain": "timeseries",
        "name": "dlinear",
        "arguments": ARGUMENTS,
        "preprocessing": {"columns": ["a"]},
    }
    return hub.save(path, model, **{**known, **changes})


@pytest.fixture
def folder(tmp_path, model):
    """A good model folder."""
    save(tmp_path / "model", model, training={"test_mse": 0.3858, "data": "etth1"})
    return tmp_path / "model"


def edit(folder, **changes):
    """Change keys of the config; None removes one."""
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))


def swap_weights(folder, tensors):
    """Replace the weights, and their hash with them."""
    save_file(tensors, folder / "model.safetensors")
    edit(folder, weights_sha256=files.sha256(folder / "model.safetensors"))


def representatives() -> list[catalog.Entry]:
    """Every entry with a builder of its own, and of each family the variant that is a small one."""
    small = ("vit_tiny_patch16_224", "swin_tiny_patch4_window7_224", "coatnet_pico_rw_224", "gcn")
    found = [entry for entry in catalog.entries() if entry.variant is None or entry.name in small]
    assert {entry.builder for entry in found} == {entry.builder for entry in catalog.entries()}
    return found


@pytest.mark.parametrize("entry", representatives(), ids=lambda entry: entry.name)
def test_every_model_round_trips(entry, tmp_path):
    takes = {part.partition(":")[0] for part in catalog.arguments(entry).split(", ")}
    plain = {"seq_len": 96, "pred_len": 4, "enc_in": 3, "channels": 3, "classes": 2, "vocab_size": 50}
    plain |= {"encoder_blocks": 2, "decoder_blocks": 2, "num_items": 20}
    plain |= {"numeric": 2}
    if entry.domain == "graph":
        plain |= {"outputs": 2, "node_features": 5, "node_types": [28]}
    wanted = {key: value for key, value in plain.items() if key in takes}
    if "node_types" in wanted:
        wanted.pop("node_features", None)
    if "base" in takes:
        wanted |= {"base": "itransformer", "arguments": {"d_model": 16, "d_ff": 16}}
    if "quantiles" in takes:
        wanted |= {"past_categories": [3, 4], "output": "quantile", "quantiles": [0.1, 0.9]}
    model = create_model(entry.name, **wanted)
    saved = hub.save(
        tmp_path / "m", model, domain=entry.domain, name=entry.name, arguments=wanted, preprocessing={}
    )
    read, config = hub.load_model(tmp_path / "m")
    assert config == saved
    assert not read.training
    assert type(read) is type(model)
    state = read.state_dict()
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())


def test_config_holds_what_was_given(folder, model):
    config = hub.read_config(folder)
    assert dataclasses.asdict(config) == {
        "format_version": 1,
        "domain": "timeseries",
        "name": "dlinear",
        "arguments": ARGUMENTS,
        "preprocessing": {"columns": ["a"]},
        "labels": None,
        "training": {"test_mse": 0.3858, "data": "etth1"},
        "weights_sha256": files.sha256(folder / "model.safetensors"),
    }
    assert sorted(file.name for file in folder.iterdir()) == ["README.md", "config.json", "model.safetensors"]


def test_same_model_gives_the_same_bytes_and_identity(folder, model, tmp_path):
    save(tmp_path / "again", model, training={"test_mse": 0.3858, "data": "etth1"})
    for name in ("README.md", "config.json", "model.safetensors"):
        assert (folder / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
    identity = hub.read_config(folder).identity
    assert identity == hub.read_config(tmp_path / "again").identity
    edit(folder, preprocessing={"columns": ["b"]})
    assert hub.read_config(folder).identity != identity


def test_shared_and_transposed_tensors_are_saved(tmp_path, model):
    weight = next(value for value in model.parameters() if value.ndim == 2)
    weight.data = torch.randn(weight.shape[::-1]).T
    save(tmp_path / "m", model)
    state = hub.load_model(tmp_path / "m")[0].state_dict()
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())


def test_weights_can_be_read_by_whoever_reads_the_config(folder):
    assert (folder / "model.safetensors").stat().st_mode == (folder / "config.json").stat().st_mode


def test_card_has_name_figures_licence_and_usage(folder):
    card = (folder / "README.md").read_text()
    for words in ("# dlinear", "license: apache-2.0", "| test_mse | 0.3858 |", "| seq_len | 8 |"):
        assert words in card
    for words in ("arXiv 2205.13504", "manyheads.load(", "manyheads predict", "SHA-256"):
        assert words in card


def test_card_cannot_be_broken_by_a_value(tmp_path, model):
    save(tmp_path / "m", model, training={"note": "a|b\n\n# evil", "nested": {"x": 1.5}})
    card = (tmp_path / "m" / "README.md").read_text()
    assert "| note | a\\|b # evil |" in card
    assert "| nested.x | 1.5 |" in card


def test_given_card_is_kept(tmp_path, model):
    save(tmp_path / "m", model, card="# Mine\n")
    assert (tmp_path / "m" / "README.md").read_text() == "# Mine\n"


def test_replacing_a_model_folder(folder, model):
    with torch.no_grad():
        next(model.parameters()).fill_(7)
    save(folder, model)
    assert (next(hub.load_model(folder)[0].parameters()) == 7).all()
    assert [file.name for file in folder.parent.iterdir()] == ["model"]


@pytest.mark.parametrize("name", ["file", "folder", "link"])
def test_nothing_else_is_replaced(tmp_path, model, name, folder):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "thesis.txt").write_text("mine")
    (tmp_path / "link").symlink_to(folder)
    with pytest.raises(ManyheadsError, match="is no model folder: choose another place"):
        save(tmp_path / name, model)
    assert (tmp_path / "file").read_text() == "mine"
    assert (tmp_path / "folder" / "thesis.txt").read_text() == "mine"
    assert len(list(folder.iterdir())) == 3


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"arguments": {"seq_len": 9, "pred_len": 4}}, "of another kind"),
        ({"arguments": {"seq_len": 8}}, "needs pred_len"),
        ({"arguments": {**ARGUMENTS, "width": 3}}, "takes no argument 'width'"),
        ({"name": "dlinea"}, "did you mean 'dlinear'"),
        ({"domain": "visions"}, "domain must be one of"),
        ({"training": {"mse": float("nan")}}, "NaN is no JSON number"),
    ],
)
def test_save_refuses_what_load_would_and_leaves_nothing(tmp_path, model, changes, says):
    with pytest.raises(ManyheadsError, match=says) as raised:
        save(tmp_path / "m", model, **changes)
    assert ".tmp-" not in str(raised.value)
    assert list(tmp_path.iterdir()) == []


def test_failed_replacement_keeps_the_old_folder(folder, model, monkeypatch):
    before = files.sha256(folder / "model.safetensors")

    def fail(written, path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "commit", fail)
    with pytest.raises(OSError, match="No space"):
        save(folder, create_model("dlinear", **ARGUMENTS))
    assert files.sha256(folder / "model.safetensors") == before
    assert [file.name for file in folder.parent.iterdir()] == ["model"]


def deep(depth):
    value = 1
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"format_version": 2}, "format_version is 2; this version of manyheads reads 1"),
        ({"format_version": True}, "format_version is True"),
        ({"format_version": ...}, "format_version is None"),
        ({"labels": ...}, "no key 'labels'"),
        ({"lables": None}, "unknown key 'lables'; did you mean 'labels'"),
        ({"auto_map": {"AutoModel": "evil.Model"}}, "unknown key 'auto_map'"),
        ({"domain": 3}, "domain must be a string"),
        ({"domain": "../../evil"}, "domain must be one of vision, timeseries"),
        ({"domain": "os"}, "domain must be one of vision, timeseries"),
        ({"name": "os.system"}, "no model 'os.system'"),
        ({"name": ["dlinear"]}, "name must be a string"),
        ({"arguments": []}, "arguments must be an object"),
        (
            {"arguments": {**ARGUMENTS, "kernel": {"class_path": "os.system"}}},
            "takes no argument 'kernel'",
        ),
        (
            {"arguments": {**ARGUMENTS, "kernel": {"init": {"class_path": "os.system"}}}},
            "arguments.kernel must be a plain",
        ),
        (
            {"arguments": {**ARGUMENTS, "kernel": [[1]]}},
            "arguments.kernel must be a plain value, a flat list of them, or an object of these",
        ),
        ({"arguments": {**ARGUMENTS, "class_path": "os.system"}}, "takes no argument 'class_path'"),
        ({"arguments": {"seq_len": "8", "pred_len": 4}}, "the arguments build no model"),
        ({"arguments": {"seq_len": -8, "pred_len": 4}}, "the arguments build no model"),
        ({"arguments": {"seq_len": 10**15, "pred_len": 4}}, "of another kind"),
        ({"preprocessing": None}, "preprocessing must be an object"),
        ({"preprocessing": {"x": deep(40)}}, "nested deeper than 16"),
        ({"labels": [1]}, "labels must be null or a list of strings"),
        ({"training": 1}, "training must be an object"),
        ({"weights_sha256": "0"}, "weights_sha256 must be 64 hex digits"),
        ({"weights_sha256": "../../../etc/passwd"}, "weights_sha256 must be 64 hex digits"),
        ({"weights_sha256": "0" * 64}, "SHA-256 differs"),
    ],
)
def test_configs_that_are_refused(folder, changes, says):
    edit(folder, **changes)
    with pytest.raises(ManyheadsError, match=says):
        hub.load_model(folder)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (b"", "not JSON"),
        (b"\xff\xfe\xff", "not JSON"),
        (b"{", "not JSON"),
        (b"[]", "not an object"),
        (b"null", "not an object"),
        (b'{"format_version": 1, "format_version": 1}', "a key stands twice"),
        (b'{"format_version": Infinity}', "Infinity is no JSON number"),
        (b'{"format_version": 1e999}', "1e999 is no JSON number"),
        (b'{"a":' * 100_000, "nested deeper|not JSON"),
        (b"[" * 100_000 + b"]" * 100_000, "nested deeper than 16"),
        (b'{"format_version": ' + b"1" * 10_000 + b"}", "not JSON"),
        (b'"' + b"x" * (8 << 20) + b'"', "bytes, more than the"),
    ],
)
def test_texts_that_are_no_config(folder, text, says):
    (folder / "config.json").write_bytes(text)
    with pytest.raises(ManyheadsError, match=says) as raised:
        hub.read_config(folder)
    assert len(str(raised.value)) < 400


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_links_are_refused(folder, name, tmp_path):
    (folder / name).rename(tmp_path / "elsewhere")
    (folder / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ManyheadsError, match=f"{name} is a symbolic link"):
        hub.load_model(folder)


def test_fifo_is_refused(folder):
    (folder / "model.safetensors").unlink()
    os.mkfifo(folder / "model.safetensors")
    with pytest.raises(ManyheadsError, match=r"has no model.safetensors"):
        hub.load_model(folder)


def test_missing_weights(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(ManyheadsError, match=r"has no model.safetensors"):
        hub.load_model(folder)


def test_changed_weights_are_not_read(folder, monkeypatch):
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (folder / "model.safetensors").write_bytes(content)
    monkeypatch.setattr("safetensors.safe_open", lambda *args, **kwargs: pytest.fail("the file was read"))
    with pytest.raises(ManyheadsError, match="SHA-256 differs"):
        hub.load_model(folder)


class Evil:
    """Runs when it is unpickled."""

    def __reduce__(self):
        return (os.mkdir, ("pwned",))


def pickled():
    return pickle.dumps(Evil())


def zipped(tmp_path):
    torch.save({"x": torch.zeros(1)}, tmp_path / "x.pth")
    return (tmp_path / "x.pth").read_bytes()


@pytest.mark.parametrize("kind", ["pickle", "torch", "huge header", "truncated", "overlapping", "empty"])
def test_weights_that_are_no_safetensors(folder, tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    path = folder / "model.safetensors"
    good = path.read_bytes()
    size = struct.unpack("<Q", good[:8])[0]
    header = json.loads(good[8 : 8 + size])
    names = [name for name in header if name != "__metadata__"]
    header[names[1]]["data_offsets"] = header[names[0]]["data_offsets"]
    overlapping = json.dumps(header).encode()
    contents = {
        "pickle": pickled(),
        "torch": zipped(tmp_path),
        "huge header": struct.pack("<Q", 1 << 40) + good[8:],
        "truncated": good[:-4],
        "overlapping": struct.pack("<Q", len(overlapping)) + overlapping + good[8 + size :],
        "empty": b"",
    }
    path.write_bytes(contents[kind])
    edit(folder, weights_sha256=files.sha256(path))
    with pytest.raises(ManyheadsError, match="is no safetensors file"):
        hub.load_model(folder)
    assert not (tmp_path / "pwned").exists()


def test_a_billion_layers_are_not_built(tmp_path):
    arguments = {"seq_len": 8, "pred_len": 4, "d_model": 8, "n_heads": 2, "e_layers": 1, "d_ff": 8}
    model = create_model("itransformer", **arguments)
    save(tmp_path / "m", model, name="itransformer", arguments=arguments)
    edit(tmp_path / "m", arguments={**arguments, "e_layers": 10**9})
    with pytest.raises(ManyheadsError, match="many more parameters than the weights have"):
        hub.load_model(tmp_path / "m")
    create_model("itransformer", **{**arguments, "e_layers": 200})  # the limit is gone with the check


def renamed(state):
    first = next(iter(state))
    return {(f"{key}.x" if key == first else key): value for key, value in state.items()}


def dropped(state):
    return dict(list(state.items())[1:])


def added(state):
    return {**state, "extra": torch.zeros(2)}


def reshaped(state):
    return {key: value.reshape(-1, 2) if value.ndim == 2 else value for key, value in state.items()}


def halved(state):
    return {key: value.half() for key, value in state.items()}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (renamed, "1 missing .*; 1 left over"),
        (dropped, "tensors 1 missing"),
        (added, r"1 left over \(extra\)"),
        (reshaped, "of another kind .*, not F32"),
        (halved, r"of another kind .*F16\[.*not F32"),
    ],
)
def test_every_tensor_is_used_and_fits(folder, change, says):
    swap_weights(folder, change(load_file(folder / "model.safetensors")))
    with pytest.raises(ManyheadsError, match=says):
        hub.load_model(folder)


def test_only_the_first_names_are_listed(folder):
    state = load_file(folder / "model.safetensors")
    swap_weights(folder, {**state, **{f"extra{i}": torch.zeros(1) for i in range(9)}})
    with pytest.raises(ManyheadsError, match=r"9 left over \(extra0, extra1, extra2, \.\.\.\)"):
        hub.load_model(folder)


def test_find_folder(folder, tmp_path):
    assert hub.find_folder(folder) == folder
    assert hub.find_folder(str(tmp_path)) == folder  # a run folder


@pytest.mark.parametrize(
    ("reference", "says"),
    [
        ("dlinear", "no published weights of dlinear are known here: train it"),
        ("org/../name", "no model folder"),
        ("https://example.org/m", "no model folder"),
        ("no where", "no model folder no where"),
    ],
)
def test_references_that_are_refused(reference, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=says):
        hub.load(reference)


def test_folder_without_a_config(tmp_path):
    with pytest.raises(UsageError, match=r"is no model folder: it has no config.json"):
        hub.load(tmp_path)


def test_importing_the_hub_imports_no_torch():
    code = "import sys, manyheads.core.hub; sys.exit('torch' in sys.modules or 'safetensors' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
