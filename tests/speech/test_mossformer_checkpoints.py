"""Published weights: loaded whole, or refused with the model and dialect that fit."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from manyheads.core import hub
from manyheads.core.errors import DataError, UsageError
from manyheads.speech.models.mossformer import mossformer
from manyheads.speech.models.mossformer2 import mossformer2
from manyheads.speech.models.mossformer_checkpoints import convert, load_weights, read_weights

SIZES = {"dim": 8, "depth": 2, "query_key_dim": 6, "group_size": 4}
BUILD = {"mossformer": lambda: mossformer(**SIZES), "mossformer2": lambda: mossformer2(**SIZES, inner=4)}
State = dict[str, Tensor]


def renamed(state: State, names: dict[str, str]) -> State:
    """Keys with another beginning; the longest that fits counts."""
    found = {}
    for key, value in state.items():
        ours = max((name for name in names if key.startswith(name)), key=len, default="")
        found[names.get(ours, "") + key.removeprefix(ours)] = value
    return found


def modelscope(state: State) -> State:
    """MossFormer's own names are ModelScope's."""
    return state


def clearervoice(state: State) -> State:
    """MossFormer2's own names are ClearerVoice's; MossFormer's are turned into them."""
    names = {
        "encoder.": "enc.",
        "decoder.": "dec.",
        "mask_net.mdl.att_mdl.mossformerM.": "mask_net.mdl.intra_mdl.mossformerM.",
        "mask_net.mdl.att_mdl.norm.norm.": "mask_net.mdl.intra_mdl.norm.",
        "mask_net.mdl.att_norm.": "mask_net.mdl.intra_norm.",
    }
    return renamed(state, names)


def standalone(state: State) -> State:
    """MossFormer2 with SpeechBrain's names."""
    names = {
        "enc.": "encoder.",
        "dec.": "decoder.",
        "mask_net.": "masknet.",
        "mask_net.mdl.intra_mdl.mossformerM.": "masknet.dual_mdl.0.intra_mdl.mdl.flashT.",
        "mask_net.mdl.intra_mdl.norm.": "masknet.dual_mdl.0.intra_mdl.mdl.norm.norm.",
        "mask_net.mdl.intra_norm.": "masknet.dual_mdl.0.intra_norm.",
    }
    return renamed(state, names)


WRITERS = {"modelscope": modelscope, "clearervoice": clearervoice, "standalone": standalone}
PUBLISHED = [
    ("mossformer", "modelscope"),
    ("mossformer", "clearervoice"),
    ("mossformer2", "clearervoice"),
    ("mossformer2", "modelscope"),
    ("mossformer2", "standalone"),
]


def official(name: str, dialect: str) -> State:
    return WRITERS[dialect](BUILD[name]().state_dict())


@pytest.mark.parametrize("prefix", ["", "module.", "model.", "module.model."])
@pytest.mark.parametrize(("name", "dialect"), PUBLISHED)
def test_every_weight_is_loaded(name, dialect, prefix):
    theirs = BUILD[name]()
    for value in theirs.state_dict().values():
        value.normal_()
    model = BUILD[name]()
    state = {prefix + key: value for key, value in WRITERS[dialect](theirs.state_dict()).items()}
    load_weights(model, state, dialect)
    mixture = torch.randn(1, 100)
    torch.testing.assert_close(model.eval()(mixture), theirs.eval()(mixture), rtol=0, atol=0)
    for key, value in model.state_dict().items():
        torch.testing.assert_close(value, theirs.state_dict()[key], rtol=0, atol=0)


def test_the_dialects_are_the_published_names(golden):
    """Names as recorded from the published classes; that of the third code is read from its source."""
    assert (
        official("mossformer", "modelscope").keys() == golden("speech", "mossformer_a").group("param").keys()
    )
    recorded = golden("speech", "mossformer2_a").group("param").keys()
    assert official("mossformer2", "clearervoice").keys() == recorded
    keys = official("mossformer2", "standalone").keys()
    layer = "masknet.dual_mdl.0.intra_mdl.mdl.flashT.fsmn.1.gated_fsmn.fsmn.conv.conv2.weight"
    last = "masknet.dual_mdl.0.intra_mdl.mdl.norm.norm.weight"
    assert {"encoder.conv1d.weight", "decoder.weight", "masknet.conv1_decoder.weight", layer, last} <= keys


@pytest.mark.parametrize(
    ("name", "written", "asked", "complaint"),
    [
        ("mossformer", "modelscope", "clearervoice", 'load them as "modelscope"'),
        ("mossformer", "clearervoice", "modelscope", 'load them as "clearervoice"'),
        ("mossformer2", "clearervoice", "standalone", 'load them as "clearervoice" or "modelscope"'),
        ("mossformer2", "standalone", "clearervoice", 'load them as "standalone"'),
        ("mossformer2", "standalone", "modelscope", 'load them as "standalone"'),
    ],
)
def test_another_dialect_is_refused_with_the_one_that_fits(name, written, asked, complaint):
    with pytest.raises(DataError, match=complaint):
        load_weights(BUILD[name](), official(name, written), asked)


@pytest.mark.parametrize(
    ("name", "state", "dialect", "complaint"),
    [
        (
            "mossformer",
            lambda: official("mossformer2", "clearervoice"),
            "modelscope",
            'MossFormer2, not of MossFormer: load them into mossformer2.* "clearervoice" or "modelscope"',
        ),
        (
            "mossformer2",
            lambda: official("mossformer", "modelscope"),
            "modelscope",
            'mossformer.* "modelscope"',
        ),
        ("mossformer2", dict, "modelscope", "no weights of MossFormer2"),
        ("mossformer", lambda: {"weight": torch.zeros(1)}, "modelscope", "no weights of MossFormer in any"),
    ],
)
def test_weights_of_another_model_are_refused_by_its_name(name, state, dialect, complaint):
    with pytest.raises(DataError, match=complaint):
        load_weights(BUILD[name](), state(), dialect)


def test_an_unknown_dialect_is_refused():
    with pytest.raises(UsageError, match=r"no dialect 'standalone' \(modelscope, clearervoice\)"):
        load_weights(BUILD["mossformer"](), {}, "standalone")


GAMMA = "mask_net.mdl.intra_mdl.mossformerM.layers.0.qk_offset_scale.gamma"


@pytest.mark.parametrize(
    ("spoil", "complaint"),
    [
        (lambda s: s.pop("dec.weight"), r"missing \(dec.weight"),
        (lambda s: s.update({"enc.conv1d.bias": torch.zeros(8)}), r"left over \(enc.conv1d.bias"),
        (lambda s: s.update({GAMMA: torch.zeros(4, 7)}), r"gamma is \[4, 7\], not \[4, 6\]"),
        (lambda s: [s.pop(k) for k in list(s) if ".conv2." in k], r"\d missing .*, \.\.\."),
    ],
)
def test_weights_that_do_not_fit_are_refused_before_any_is_copied(spoil, complaint):
    model, state = BUILD["mossformer2"](), official("mossformer2", "clearervoice")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    spoil(state)
    with pytest.raises(DataError, match=complaint):
        load_weights(model, state, "clearervoice")
    for key, value in model.state_dict().items():
        torch.testing.assert_close(value, before[key], rtol=0, atol=0)


def test_more_speakers_than_the_model_has_are_refused():
    state = mossformer2(num_spks=3, **SIZES, inner=4).state_dict()
    with pytest.raises(DataError, match=r"conv1d_out.weight is \[24, 8, 1\], not \[16, 8, 1\]"):
        load_weights(BUILD["mossformer2"](), state, "clearervoice")


def parts(state: State) -> dict[str, State]:
    found: dict[str, State] = {"encoder": {}, "decoder": {}, "masknet": {}}
    for key, value in state.items():
        part, _, rest = key.partition(".")
        found[part.replace("mask_net", "masknet")][rest] = value
    return found


@pytest.mark.parametrize(
    ("name", "dialect", "ending"),
    [("mossformer", "modelscope", "bin"), ("mossformer2", "standalone", "ckpt")],
)
def test_folders_of_three_files(tmp_path, name, dialect, ending):
    theirs = BUILD[name]()
    for part, state in parts(WRITERS[dialect](theirs.state_dict())).items():
        torch.save(state, tmp_path / f"{part}.{ending}")
    model = BUILD[name]()
    load_weights(model, read_weights(tmp_path), dialect)
    for key, value in model.state_dict().items():
        torch.testing.assert_close(value, theirs.state_dict()[key], rtol=0, atol=0)
    (tmp_path / f"decoder.{ending}").unlink()
    with pytest.raises(DataError, match="none of the files"):
        read_weights(tmp_path)


def test_a_folder_that_names_its_best_checkpoint(tmp_path):
    state = {f"module.{key}": value for key, value in official("mossformer2", "clearervoice").items()}
    torch.save({"model": state, "epoch": 3}, tmp_path / "last.pt")
    (tmp_path / "last_best_checkpoint").write_text("last.pt\n")
    load_weights(BUILD["mossformer2"](), read_weights(tmp_path), "clearervoice")
    load_weights(BUILD["mossformer2"](), read_weights(tmp_path / "last.pt"), "clearervoice")
    for wrong in ("../last.pt", "none.pt", ""):
        (tmp_path / "last_best_checkpoint").write_text(wrong)
        with pytest.raises(DataError, match="no file beside it"):
            read_weights(tmp_path)


def test_a_folder_of_safetensors(tmp_path):
    save_file(official("mossformer2", "standalone"), str(tmp_path / "model.safetensors"))
    load_weights(BUILD["mossformer2"](), read_weights(tmp_path), "standalone")


def publish(folder, name: str, dialect: str) -> torch.nn.Module:
    """A published folder of random weights, in the files of its dialect; and the model that they are of."""
    theirs = BUILD[name]()
    for value in theirs.state_dict().values():
        value.normal_()
    state = WRITERS[dialect](theirs.state_dict())
    folder.mkdir()
    if dialect == "clearervoice":
        torch.save({"model": {f"module.{k}": v for k, v in state.items()}}, folder / "best.pt")
        (folder / "last_best_checkpoint").write_text("best.pt\n")
    elif name == "mossformer2" and dialect == "modelscope":
        torch.save(state, folder / "pytorch_model.bin")
    else:
        for part, values in parts(state).items():
            torch.save(values, folder / f"{part}.{'bin' if dialect == 'modelscope' else 'ckpt'}")
    return theirs.eval()


@pytest.mark.parametrize(("name", "dialect"), PUBLISHED)
def test_a_published_folder_becomes_a_model_folder(tmp_path, name, dialect):
    theirs = publish(tmp_path / "published", name, dialect)
    mapping = name == "mossformer2" and dialect == "standalone"
    config = convert(
        tmp_path / "published", tmp_path / "made", sample_rate=8000, group_size=4, mapping=mapping
    )
    assert config.name == name and config.preprocessing == {"sample_rate": 8000}
    model, _ = hub.load_model(tmp_path / "made")
    if mapping:
        theirs.mapping = True
    mixture = torch.randn(2, 100)
    torch.testing.assert_close(model(mixture), theirs(mixture), rtol=0, atol=0)
    assert hub.load(tmp_path / "made").sample_rate == 8000


def test_what_cannot_become_a_model_folder(tmp_path):
    publish(tmp_path / "one", "mossformer", "modelscope")
    with pytest.raises(UsageError, match="mapping: these are weights of MossFormer, which"):
        convert(tmp_path / "one", tmp_path / "made", sample_rate=8000, mapping=True)
    with pytest.raises(UsageError, match="sample_rate must be positive"):
        convert(tmp_path / "one", tmp_path / "made", sample_rate=0)
    torch.save({"conv1d.bias": torch.zeros(1)}, tmp_path / "one" / "encoder.bin")
    with pytest.raises(DataError, match=r"not whole: encoder\.conv1d\.weight is missing"):
        convert(tmp_path / "one", tmp_path / "made", sample_rate=8000)
    torch.save({"weight": torch.zeros(1)}, tmp_path / "other.pt")
    with pytest.raises(DataError, match="no weights of MossFormer in any dialect"):
        convert(tmp_path / "other.pt", tmp_path / "made", sample_rate=8000)
    assert not (tmp_path / "made").exists()


class Evil:
    def __reduce__(self):
        return print, ("run",)


@pytest.mark.parametrize(
    ("write", "complaint"),
    [
        (lambda p: torch.save({"model": Evil()}, p), "does not hold tensors alone"),
        (lambda p: p.write_bytes(b"not a checkpoint"), "does not hold tensors alone"),
        (lambda p: p.write_bytes(b""), "does not hold tensors alone"),
        (lambda p: torch.save({}, p), "no state dict"),
        (lambda p: torch.save([torch.zeros(1)], p), "no state dict"),
        (lambda p: torch.save({"model": {"epoch": 3}}, p), "no state dict"),
        (lambda p: None, "no file or folder"),
    ],
)
def test_files_that_hold_no_weights_are_refused_and_run_nothing(tmp_path, capsys, write, complaint):
    write(tmp_path / "file.pt")
    with pytest.raises(DataError, match=complaint):
        read_weights(tmp_path / "file.pt")
    (tmp_path / "file.safetensors").write_bytes(b"12345")
    with pytest.raises(DataError, match="does not hold tensors alone"):
        read_weights(tmp_path / "file.safetensors")
    assert "run" not in capsys.readouterr().out
