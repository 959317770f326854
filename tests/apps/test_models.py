"""`manyheads models`: every published layout, pulled from a hub, becomes a model folder; push and verify."""

from __future__ import annotations

import argparse
import io
import json
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save

from manyheads.apps.cli import main
from manyheads.core import catalog, dialects, hub
from manyheads.core.catalog import create_model
from manyheads.core.verifying import verify

SEPARATION = {"dim": 8, "depth": 2, "query_key_dim": 6, "group_size": 4}


def pickled(content: object) -> bytes:
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


def run(capsys, *args: str) -> tuple[int, str]:
    """A command's exit code, and what it prints (errors where it fails)."""
    code = main(["models", *args])
    printed = capsys.readouterr()
    return code, printed.out if code == 0 else printed.err


def filled(name: str, **arguments: object) -> torch.nn.Module:
    model = create_model(name, **arguments).eval()
    for value in model.state_dict().values():
        if value.is_floating_point():
            value.uniform_(0.1, 0.2)
    return model


def timm_files() -> tuple[dict[str, bytes], torch.nn.Module]:
    timm = pytest.importorskip("timm")
    model = timm.create_model("test_vit", num_classes=3).eval()
    config = {
        "architecture": "test_vit",
        "num_classes": 3,
        "label_names": ["a", "b", "c"],
        "pretrained_cfg": {
            "tag": "r160_in1k",
            "input_size": [3, 160, 160],
            "mean": [0.5] * 3,
            "crop_pct": 0.95,
        },
    }
    return {"config.json": json.dumps(config).encode(), "model.safetensors": save(model.state_dict())}, model


@cache
def vim_files() -> tuple[dict[str, bytes], torch.nn.Module]:
    model = filled("vim_tiny_patch16_224")
    options = argparse.Namespace(model="vim_tiny", input_size=224, data_set="IMNET")
    content = pickled({"model": model.state_dict(), "epoch": 1, "args": options})
    return {"vim_t_midclstok_76p1acc.pth": content, "vim_t_midclstok_ft_78p3acc.pth": b"other"}, model


def cct_files() -> tuple[dict[str, bytes], torch.nn.Module]:
    model = filled("cct_2_3x2_32", num_classes=10)
    return {"cct_2_3x2_32_cifar10.pth": pickled(model.state_dict())}, model


def transformers_files() -> tuple[dict[str, bytes], None]:
    transformers = pytest.importorskip("transformers")
    config = transformers.InformerConfig(
        prediction_length=4, context_length=8, lags_sequence=[1, 2], num_time_features=1, d_model=8,
        encoder_ffn_dim=8, decoder_ffn_dim=8, encoder_layers=1, decoder_layers=1,
    )  # fmt: skip
    model = transformers.InformerForPrediction(config)
    content = {"config.json": config.to_json_string(use_diff=False).encode()}
    return {**content, "pytorch_model.bin": pickled(dict(model.state_dict()))}, None


@cache
def mossformer_files() -> tuple[dict[str, bytes], torch.nn.Module]:
    model = filled("mossformer", **SEPARATION)
    parts: dict[str, dict[str, torch.Tensor]] = {"encoder": {}, "decoder": {}, "masknet": {}}
    for key, value in model.state_dict().items():
        part, _, rest = key.partition(".")
        parts[part.replace("mask_net", "masknet")][rest] = value
    return {f"{part}.bin": pickled(state) for part, state in parts.items()}, model


def clearervoice_files() -> tuple[dict[str, bytes], torch.nn.Module]:
    model = filled("mossformer2", **SEPARATION, inner=4)
    state = {f"module.{key}": value for key, value in model.state_dict().items()}
    named = {"last_best_checkpoint": b"last_best_checkpoint.pt\n"}
    return {**named, "last_best_checkpoint.pt": pickled({"model": state, "step": 3})}, model


def one_mossformer_file() -> tuple[dict[str, bytes], torch.nn.Module]:
    model = filled("mossformer2", **SEPARATION, inner=4)
    return {"weights.safetensors": save(model.state_dict())}, model


def funasr_files() -> tuple[dict[str, bytes], torch.nn.Module]:
    numbers = {"attention_heads": 4, "linear_units": 24, "num_blocks": 2}
    config = {
        "model": "Paraformer",
        "encoder": "ConformerEncoder",
        "encoder_conf": numbers | {"output_size": 16, "cnn_module_kernel": 15},
        "decoder": "ParaformerSANDecoder",
        "decoder_conf": numbers,
        "predictor": "CifPredictor",
        "predictor_conf": {"idim": 16},
        "frontend_conf": {"fs": 16000, "n_mels": 80, "frame_length": 25, "frame_shift": 10}
        | {"lfr_m": 1, "lfr_n": 1},
    }  # fmt: skip
    row = " ".join(["1.5"] * 80)
    rate = f"<LearnRateCoef> 0 [ {row} ]\n"
    mvn = f"<Nnet>\n<AddShift> 80 80\n{rate}<Rescale> 80 80\n{rate}"
    names = ["<blank>", "<s>", "</s>", *(f"w{i}" for i in range(33)), "<unk>"]
    model = filled(
        "paraformer_conformer", vocab_size=37, dim=16, units=24, encoder_blocks=2, decoder_blocks=2
    )
    import yaml

    files = {"config.yaml": yaml.safe_dump(config).encode(), "am.mvn": f"{mvn}</Nnet>\n".encode()}
    return {
        **files,
        "tokens.json": json.dumps(names).encode(),
        "model.pt": pickled(model.state_dict()),
    }, model


@cache
def graph_files() -> tuple[dict[str, bytes], torch.nn.Module]:
    model = filled("graph_transformer_zinc")
    state = {f"module.{key}": value for key, value in model.state_dict().items()}
    return {"epoch_187.pkl": pickled(state)}, model


def s_mamba_files() -> tuple[dict[str, bytes], torch.nn.Module]:
    model = filled("s_mamba", seq_len=16, pred_len=8, d_model=8, d_ff=8, d_state=2, e_layers=1)
    return {"checkpoint.pth": pickled(model.state_dict())}, model


def library_files() -> tuple[dict[str, bytes], torch.nn.Module]:
    model = filled("patchtst", seq_len=32, pred_len=8, d_model=8, d_ff=8, n_heads=2, e_layers=1)
    return {"checkpoint.pth": pickled(model.state_dict())}, model


def recformer_files() -> tuple[dict[str, bytes], torch.nn.Module]:
    model = filled("recformer", vocab_size=60, num_items=7, hidden_size=16, layers=1, heads=2, positions=40)
    state = {f"_forward_module.model.{key}": value for key, value in model.state_dict().items()}
    return {"recformer_seqrec_ckpt.bin": pickled(state)}, model


NAMED = ["--option", "name=patchtst"]
MOSSFORMER = ["--option", "sample_rate=8000", "--option", "group_size=4"]
S_MAMBA = '{"seq_len": 16, "pred_len": 8, "d_model": 8, "d_ff": 8, "d_state": 2, "e_layers": 1}'
PATCHTST = '{"seq_len": 32, "pred_len": 8, "d_model": 8, "d_ff": 8, "n_heads": 2, "e_layers": 1}'
# Layout: what writes its files, the options of the command, the catalogue name.
LAYOUTS = {
    "timm": (timm_files, [], "test_vit"),
    "vim": (vim_files, ["--file", "vim_t_midclstok_76p1acc.pth"], "vim_tiny_patch16_224"),
    "cct": (cct_files, [], "cct_2_3x2_32"),
    "transformers": (transformers_files, [], "informer_lagged"),
    "mossformer": (mossformer_files, MOSSFORMER, "mossformer"),
    "clearervoice": (clearervoice_files, MOSSFORMER, "mossformer2"),
    "mossformer-file": (one_mossformer_file, ["--dialect", "mossformer-file", *MOSSFORMER], "mossformer2"),
    "funasr": (funasr_files, [], "paraformer_conformer"),
    "recformer": (recformer_files, ["--option", "heads=2"], "recformer"),
    "graphtransformer": (
        graph_files, ["--dialect", "graphtransformer", "--option", "name=graph_transformer_zinc"],
        "graph_transformer_zinc",
    ),
    "s-mamba": (s_mamba_files, ["--dialect", "s-mamba", "--option", f"arguments={S_MAMBA}"], "s_mamba"),
    "time-series-library": (
        library_files, ["--dialect", "time-series-library", "--option", f"arguments={PATCHTST}", *NAMED],
        "patchtst",
    ),
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_published_layout_is_converted_once(fake_hub, capsys, layout):
    write, options, name = LAYOUTS[layout]
    files, original = write()
    files = {**files}
    files["README.md"] = b"---\ntags: [x]\nlicense: mit\n---\n# Published\n"
    commit = fake_hub.repositories["org/there"].commit(files)
    code, printed = run(capsys, "pull", "org/there", *options, "--json")
    assert code == 0, printed
    pulled = json.loads(printed)
    assert (pulled["commit"], pulled["dialect"], pulled["name"]) == (commit, layout, name)
    licence = dialects.find(layout).licence or "mit"
    assert pulled["licence"] == licence
    folder = Path(pulled["folder"])
    assert hub.find_folder("org/there") == folder
    model, config = hub.load_model(folder)
    assert sum(value.numel() for value in model.state_dict().values()) == pulled["parameters"]
    if original is not None:
        state = model.state_dict()
        assert state.keys() == original.state_dict().keys()
        assert all(torch.equal(state[key], value) for key, value in original.state_dict().items())
    card = (folder / "README.md").read_text()
    assert f"Weights from: org/there at {commit}" in card
    assert f"Licence of the weights: {licence}" in card
    if pulled["ready"]:
        assert type(hub.make_predictor(model, config)).__name__ == "Predictor"
    else:
        assert config.preprocessing == {}
    fake_hub.requests.clear()
    code, printed = run(capsys, "pull", "org/there", *options)
    assert code == 0
    assert f"layout   {layout}, converted" in printed
    assert "nothing new came" in printed
    assert len(fake_hub.requests) == 1  # the branch's commit alone: not converted or fetched again
    assert verify(folder).name == name


def test_every_layout_and_source_is_a_thing_that_is_there():
    found = dialects.dialects()
    for dialect in found.values():
        assert callable(catalog.load_class(dialect.converter))
        assert dialect.named == (
            dialect.mark is None and dialect.name in {*LAYOUTS, *found} and dialect.named
        )
    for entry in catalog.entries():
        if entry.domain != "vision":
            source = dialects.source(entry.name)
            assert source is None or source.dialect in found
    tested = set(LAYOUTS) | {"informer", "autoformer"}
    assert set(found) <= tested


def test_timms_sources_are_timms():
    source = dialects.source("vit_tiny_patch16_224")
    assert source is not None
    assert source.reference.startswith("timm/vit_tiny_patch16_224.")
    assert dialects.source("cct_7_3x1_32") is None


def test_local_files_are_converted(tmp_path, capsys):
    files, _ = cct_files()
    ((name, content),) = files.items()
    (tmp_path / name).write_bytes(content)
    code, printed = run(capsys, "pull", str(tmp_path / name), "-o", str(tmp_path / "model"))
    assert code == 0, printed
    assert "layout   cct, converted" in printed
    assert verify(tmp_path / "model").name == "cct_2_3x2_32"
    code, printed = run(capsys, "pull", str(tmp_path / name))
    assert code == 2
    assert "-o says where to write its model folder" in printed
    mossformer, model = mossformer_files()
    (tmp_path / "published").mkdir()
    for name, content in mossformer.items():
        (tmp_path / "published" / name).write_bytes(content)
    options = ["--option", "sample_rate=8000", "--option", "group_size=4", "-o", str(tmp_path / "moss")]
    code, printed = run(capsys, "pull", str(tmp_path / "published"), *options)
    assert code == 0, printed
    assert torch.equal(
        hub.load_model(tmp_path / "moss")[0].encoder.conv1d.weight, model.encoder.conv1d.weight
    )


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["org/none"], "no model org/none at"),
        (["org/vim"], "2 files fit vim_*.pth: choose by --file (vim_t_midclstok_76p1acc.pth, vim_t"),
        (["org/vim", "--file", "x.pth"], "there is no file 'x.pth'"),
        (["org/vim", "--dialect", "vimm"], "no dialect 'vimm'; did you mean 'vim'"),
        (["org/vim", "--file", "vim_t_midclstok_ft_78p3acc.pth"], "is refused: it is damaged"),
        (["org/vim", "--dialect", "funasr"], "funasr needs config.yaml, which is not there"),
        (["org/moss"], "mossformer needs --option sample_rate=..."),
        (["org/moss", "--option", "sample_rate=0"], "sample_rate must be positive, not 0"),
        (["org/moss", "--option", "sample_rate=fast"], "cannot be read as mossformer"),
        (["org/moss", "--option", "rate=1"], "mossformer takes no option 'rate' (it takes sample_rate"),
        (["org/moss", "--option", "rate"], "--option takes KEY=VALUE, not 'rate'"),
        (["org/graph"], "no published layout that is known here (files: README.md, epoch_187"),
        (["org/graph", "--dialect", "graphtransformer", "--option", "name=x"], "no published Graph Transf"),
        (["org/graph", "--dialect", "s-mamba", "--option", "arguments={}"], "s-mamba needs *.pth or *.pt or"),
        (["not a reference"], "is no org/name[@revision], no catalogue name and no path"),
        ([], "the following arguments are required: REF"),
        (["org/moss", "--opton", "x=1"], "takes no '--opton'; did you mean '--option'"),
    ],
)  # fmt: skip
def test_pulls_that_are_refused(fake_hub, capsys, args, says):
    fake_hub.repositories["org/vim"].commit(vim_files()[0])
    fake_hub.repositories["org/moss"].commit(mossformer_files()[0])
    fake_hub.repositories["org/graph"].commit({**graph_files()[0], "README.md": b"x"})
    code, printed = run(capsys, "pull", *args)
    assert code in (1, 2)
    assert says in printed
    assert len(printed.splitlines()) == 1


@pytest.fixture
def images(tmp_path):
    """A model folder of images."""
    model = filled("test_vit", num_classes=2)
    from manyheads.vision.preprocessing import Preprocessing

    preprocessing = Preprocessing(size=(160, 160), mean=(0.5,) * 3, std=(0.5,) * 3, crop_pct=0.9).to_json()
    hub.save(
        tmp_path / "images", model, domain="vision", name="test_vit", arguments={"num_classes": 2},
        preprocessing={**preprocessing, "temperature": 1.0}, labels=["cat", "dog"], training={"val_acc": 0.9},
    )  # fmt: skip
    return tmp_path / "images"


def test_push_and_pull_again(fake_hub, capsys, images, monkeypatch):
    code, printed = run(capsys, "push", str(images), "me/new")
    assert code == 2
    assert "publishing needs a token that may write: set HF_TOKEN" in printed
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    code, printed = run(capsys, "push", str(images), "me/new", "--private", "--json")
    assert code == 0, printed
    pushed = json.loads(printed[printed.index("{") :])
    repository = fake_hub.repositories["me/new"]
    assert repository.private
    files = repository.commits[pushed["commit"]]
    assert files["model.safetensors"] == (images / "model.safetensors").read_bytes()
    card = files["README.md"].decode()
    for words in ("license: apache-2.0", "| val_acc | 0.9 |", 'manyheads.load("me/new")', "predict me/new"):
        assert words in card
    code, printed = run(capsys, "pull", "me/new")
    assert code == 0
    assert "layout   a model folder" in printed
    assert hub.load_model(hub.find_folder("me/new"))[1] == hub.read_config(images)
    assert main(["models", "push", str(images), "me/new@try", "--licence", "CC BY 4.0 (mine)"]) == 0
    branch = repository.commits[repository.revisions["try"]]["README.md"].decode()
    assert 'license: other\nlicense_name: "CC BY 4.0 (mine)"' in branch


def test_predict_and_load_take_references(fake_hub, images, tmp_path, capsys):
    import pandas as pd
    from PIL import Image

    import manyheads

    commit = fake_hub.repositories["org/there"].commit({p.name: p.read_bytes() for p in images.iterdir()})
    (tmp_path / "pictures").mkdir()
    for index in range(3):
        Image.new("RGB", (170, 160), (80 * index, 9, 9)).save(tmp_path / "pictures" / f"{index}.png")
    output = tmp_path / "out"
    code = main(["predict", f"org/there@{commit}", str(tmp_path / "pictures"), "-o", str(output), "--quiet"])
    assert code == 0, capsys.readouterr().err
    rows = pd.concat(map(pd.read_parquet, sorted(output.glob("part-*.parquet"))))
    assert set(rows["label"]) <= {"cat", "dog"}
    before = len(fake_hub.requests)
    frame = manyheads.load(f"org/there@{commit}").predict(str(tmp_path / "pictures"))
    assert list(frame["label"]) == list(rows["label"])
    assert len(fake_hub.requests) == before


@pytest.mark.parametrize("name", ["test_vit", "cct_2_3x2_32", "vim"])
def test_timms_layout_is_what_timm_reads(fake_hub, capsys, images, monkeypatch, tmp_path, name):
    import timm

    import manyheads.vision  # noqa: F401  # our models in timm's registry

    small = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_classes": 2}
    if name != "test_vit":
        arguments = {"num_classes": 2} if name == "cct_2_3x2_32" else small
        hub.save(
            images,
            filled(name, **arguments),
            domain="vision",
            name=name,
            arguments=arguments,
            preprocessing={},
        )
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    code, printed = run(capsys, "push", str(images), "me/timm", "--timm")
    if name == "vim":
        assert code == 2
        assert "timm knows no vim" in printed
        return
    assert code == 0, printed
    repository = fake_hub.repositories["me/timm"]
    (tmp_path / "timm").mkdir()
    for file, content in repository.commits[repository.revisions["main"]].items():
        (tmp_path / "timm" / file).write_bytes(content)
    theirs = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True).eval()
    ours, config = hub.load_model(images)
    size = theirs.pretrained_cfg["input_size"]
    x = torch.rand(2, *size)
    assert (theirs(x) - ours(x)).abs().max() <= 1e-5
    if name == "test_vit":
        assert theirs.pretrained_cfg["label_names"] == ["cat", "dog"]
        assert (theirs.pretrained_cfg["crop_pct"], theirs.pretrained_cfg["mean"]) == (0.9, [0.5, 0.5, 0.5])
    code, printed = run(capsys, "pull", "me/timm")
    assert code == 0, printed
    again, read = hub.load_model(hub.find_folder("me/timm"))
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in ours.state_dict().items())
    assert read.labels == config.labels
    if config.preprocessing:
        assert read.preprocessing == config.preprocessing


def test_pushes_that_are_refused(fake_hub, capsys, images, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    code, printed = run(capsys, "push", str(images), "me/new")
    assert code == 1
    assert "the hub refuses me/new (401)" in printed
    for args, says in (
        ([str(images), "new"], "is no org/name"),
        ([str(images), "me/new@" + "a" * 40], "is no org/name or org/name@branch"),
        ([str(tmp_path / "none"), "me/new"], "no model folder"),
    ):
        code, printed = run(capsys, "push", *args)
        assert code == 2
        assert says in printed
    (images / "model.safetensors").write_bytes(b"other")
    code, printed = run(capsys, "push", str(images), "me/new")
    assert code == 1
    assert "is not the file that config.json names" in printed
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert run(capsys, "push", str(images), "me/new") == (
        2,
        "manyheads: HF_HUB_OFFLINE forbids to ask the hub\n",
    )


def test_verify(fake_hub, capsys, images):
    assert run(capsys, "verify") == (0, "nothing in the cache\n")
    code, printed = run(capsys, "verify", "org/there")
    assert code == 2
    assert "org/there is not in the cache (`manyheads models pull org/there`)" in printed
    code, printed = run(capsys, "verify", str(images))
    assert code == 0
    assert "hash, names, shapes and card are right" in printed
    fake_hub.repositories["org/there"].commit({path.name: path.read_bytes() for path in images.iterdir()})
    assert run(capsys, "pull", "org/there")[0] == 0
    code, printed = run(capsys, "verify", "org/there", "--json")
    assert json.loads(printed)["verified"][0]["tensors"] == len(load_file(images / "model.safetensors"))
    folder = hub.find_folder("org/there")
    (folder / "README.md").write_text("no head")
    code, printed = run(capsys, "verify", "org/there")
    assert code == 1
    assert "is not what was downloaded" in printed
    assert main(["models", "verify"]) == 1
    assert "bad: " in capsys.readouterr().out
    for text, says in (("no head", "names no licence"), (None, "has no model card")):
        (images / "README.md").unlink()
        if text:
            (images / "README.md").write_text(text)
        code, printed = run(capsys, "verify", str(images))
        assert code == 1
        assert says in printed


def test_dialects_are_listed(capsys):
    code, printed = run(capsys, "pull", "--dialects")
    assert code == 0
    assert all(name in printed for name in LAYOUTS)


class Terminal(io.StringIO):
    """A standard error that is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("terminal", [True, False])
def test_a_bar_shows_file_bytes_and_rate(fake_hub, capsys, monkeypatch, terminal):
    monkeypatch.setattr("sys.stderr", shown := Terminal() if terminal else io.StringIO())
    monkeypatch.setenv("TERM", "xterm-256color")
    from manyheads.apps.downloads import Bar

    with Bar() as bar:
        for received in (0, 500_000, 1_000_000):
            bar("w.bin", received, 1_000_000)
    assert ("w.bin" in shown.getvalue()) == terminal
    assert ("1.0/1.0 MB" in shown.getvalue()) == terminal
    with Bar(quiet=True) as bar:
        before = shown.getvalue()
        bar("w.bin", 1, 2)
        assert shown.getvalue() == before
    fake_hub.repositories["org/there"].commit(cct_files()[0])
    assert main(["models", "pull", "org/there"]) == 0
    assert ("cct_2_3x2_32_cifar10.pth" in shown.getvalue()) == terminal
