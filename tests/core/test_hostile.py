"""No code from configs, weights or a hub's answers: refused with a plain message, whatever they hold.

The corpus, 120,000 mutated inputs and 1,600 broken downloads, takes 64 s of CPU and, for every download is
flushed, minutes of a busy disk (`--basetemp=/dev/shm/x` spares it); it prints its counts:
`pytest -m slow tests/core/test_hostile.py -s`; MANYHEADS_WRITE_RESULTS=1 writes them to
benchmarks/results/hub_faults.md.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import io
import json
import os
import random
import sys
import time
import warnings
import zipfile
from collections import Counter
from email.message import Message
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from manyheads.core import files, hub, hub_api, hub_cache, pull, references
from manyheads.core.catalog import create_model
from manyheads.core.download import Wanted, download
from manyheads.core.errors import DataError, ManyheadsError
from manyheads.core.fitting import match, stored_tensors
from manyheads.core.references import Reference
from manyheads.core.strict_json import Wrong, parse
from manyheads.core.weights import load_pickle, read_tensors
from manyheads.timeseries.models import pretrained
from manyheads.vision.models import timm_folders, vim_checkpoints

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "hub_faults.md"
ARGUMENTS = {"seq_len": 8, "pred_len": 4}
QUICK = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
plain = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
values = st.recursive(
    plain, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=9), inner, max_size=4)
)


@pytest.fixture(scope="module")
def hostile():
    """The mutators."""
    spec = importlib.util.spec_from_file_location("hostile", Path(__file__).with_name("hostile.py"))
    module = importlib.util.module_from_spec(spec)
    sys.modules["hostile"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def folder(tmp_path):
    """A small model folder."""
    model = create_model("dlinear", **ARGUMENTS)
    about = {
        "domain": "timeseries",
        "name": "dlinear",
        "arguments": ARGUMENTS,
        "preprocessing": {"columns": ["a"]},
    }
    hub.save(tmp_path / "model", model, **about, labels=["a"], training={"mse": 0.5})
    return tmp_path / "model"


def told(function, *args):
    """Call; an error that users are told, or None. Anything else goes through."""
    try:
        function(*args)
    except ManyheadsError as error:
        text = str(error)
        assert text
        assert "\n" not in text or "arguments" in text
        text.encode()
        return error
    return None


# Small, in every run


@QUICK
@given(st.binary(max_size=200))
def test_any_bytes_as_json(content):
    try:
        json.dumps(parse(content)).encode()
    except Wrong as error:
        assert str(error)


@QUICK
@given(values)
def test_any_json_comes_back_or_is_refused(value):
    try:
        assert parse(json.dumps(value).encode()) == json.loads(json.dumps(value))
    except Wrong as error:
        assert str(error)


@QUICK
@given(
    st.dictionaries(st.sampled_from(["format_version", "domain", "name", "arguments", "labels", "x"]), values)
)
def test_any_object_as_a_config(folder, value):
    known = json.loads((folder / "config.json").read_text())
    before = (folder / "config.json").read_bytes()
    try:
        (folder / "config.json").write_text(json.dumps({**known, **value}))
        told(hub.read_config, folder)
    finally:
        (folder / "config.json").write_bytes(before)


@QUICK
@given(st.text(max_size=60))
def test_any_text_as_a_reference_or_a_file_name(text):
    found = references.parse(text)
    assert found is None or (str(found) == text and ".." not in text)
    if references.is_path(text):
        path = os.path.normpath(os.path.join("/cache", text))
        assert path.startswith("/cache/")
        assert path == f"/cache/{text}"


@QUICK
@given(st.binary(max_size=300))
def test_any_bytes_as_weights(tmp_path, content):
    for name in ("w.safetensors", "w.pth", "w.bin"):
        (tmp_path / name).write_bytes(content)
        assert isinstance(told(read_tensors, tmp_path / name), DataError)


@QUICK
@given(
    st.lists(
        st.fixed_dictionaries({}, optional=dict.fromkeys(("type", "path", "size", "oid", "lfs"), values)),
        max_size=3,
    )
)
def test_any_listing(tmp_path, entries):
    answers(
        {"/tree/": json.dumps(entries).encode()}, lambda: told(hub_api.list_files, Reference("a/b"), "0" * 40)
    )


def answers(bodies, call):
    """Call with a hub that answers so, without a network."""
    before, endpoint = hub_api.read_all, os.environ.get("HF_ENDPOINT")

    def body(address, headers, limit):
        return next(content for part, content in bodies.items() if part in address), Message()

    hub_api.read_all = body
    os.environ["HF_ENDPOINT"] = "https://hub.invalid"
    try:
        return call()
    finally:
        hub_api.read_all = before
        os.environ.pop("HF_ENDPOINT")
        if endpoint is not None:
            os.environ["HF_ENDPOINT"] = endpoint


def archive(entries, packing=zipfile.ZIP_STORED):
    """A file of torch's, made by hand."""
    file = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(file, "w", packing) as made:
        warnings.simplefilter("ignore")
        for name, data in entries:
            made.writestr(name, data)
    return file.getvalue()


def test_archives_that_are_bombs(tmp_path, monkeypatch):
    path = tmp_path / "w.pth"
    path.write_bytes(archive([("a/data.pkl", b"."), ("a/data/0", bytes(50 << 20))], zipfile.ZIP_DEFLATED))
    assert path.stat().st_size < 100_000
    with pytest.raises(DataError, match=r"its archive is compressed, which torch's are not: a bomb\?"):
        read_tensors(path)
    path.write_bytes(archive([("a/data.pkl", b"."), ("a/data.pkl", b".")]))
    with pytest.raises(DataError, match="has a file twice"):
        read_tensors(path)
    big = archive([("a/data.pkl", b"x" * 100), ("a/data/0", b"y" * 100)])
    path.write_bytes(big.replace((100).to_bytes(4, "little"), (10**6).to_bytes(4, "little")))
    with pytest.raises(DataError, match="unpacks to more than it is: a bomb"):
        read_tensors(path)
    monkeypatch.setattr("manyheads.core.weights.MOST_PICKLED", 10)
    path.write_bytes(big)
    with pytest.raises(DataError, match="a pickle that is too large"):
        read_tensors(path)
    monkeypatch.setattr("manyheads.core.weights.MOST_ENTRIES", 1)
    with pytest.raises(DataError, match="too many files"):
        read_tensors(path)


def test_tensors_larger_than_they_are(tmp_path):
    """A stride of 0 makes four bytes a terabyte, as soon as it is copied."""
    torch.save({"a": torch.zeros(1).expand(1 << 38)}, tmp_path / "w.pth")
    with pytest.raises(DataError, match="a tensor larger than its storage"):
        read_tensors(tmp_path / "w.pth")
    torch.save({"a": torch.eye(3).to_sparse()}, tmp_path / "w.pth")
    with pytest.raises(DataError, match="not plain memory"):
        read_tensors(tmp_path / "w.pth")
    torch.save({"a": torch.empty(3, device="meta")}, tmp_path / "w.pth")
    with pytest.raises(DataError):
        read_tensors(tmp_path / "w.pth")
    loop = {"a": torch.zeros(2)}
    loop["self"] = [loop]
    torch.save(loop, tmp_path / "w.pth")
    assert load_pickle(tmp_path / "w.pth")["a"].shape == (2,)
    with pytest.raises(DataError, match="no state dict"):
        read_tensors(tmp_path / "w.pth")


@pytest.mark.parametrize("seed", range(24))
def test_evil_pickles_under_every_name(tmp_path, hostile, seed):
    canary = tmp_path / "canary"
    content = hostile.evil(random.Random(seed), str(canary))
    with hostile.watched(canary):
        for name in ("w.pth", "w.bin", "w.pt", "w.pkl", "w.ckpt", "w.safetensors"):
            (tmp_path / name).write_bytes(content)
            assert isinstance(told(read_tensors, tmp_path / name), DataError)
        (tmp_path / "vim_x.pth").write_bytes(archive([("a/data.pkl", content), ("a/version", b"3\n")]))
        assert isinstance(told(vim_checkpoints.read_checkpoint, tmp_path / "vim_x.pth"), DataError)
        (tmp_path / "config.json").write_text('{"architecture": "test_vit"}')
        (tmp_path / "pytorch_model.bin").write_bytes(content)
        assert isinstance(told(timm_folders.convert, tmp_path, tmp_path / "out"), ManyheadsError)


def test_the_watch_sees_what_runs(tmp_path, hostile):
    """The proof is one: the same payloads, read the wrong way, touch the canary and are seen."""
    import pickle

    seen = touched = 0
    for seed in range(40):
        canary = tmp_path / f"canary{seed}"
        content = hostile.evil(random.Random(seed), str(canary))
        try:
            with hostile.watched(canary):
                try:
                    pickle.loads(content)
                except Exception:  # some payloads have nothing to load
                    continue
        except AssertionError:
            seen += 1
        touched += canary.exists()
    assert seen > 15
    assert touched > 15


# The corpus


class Tally:
    """Counts of one kind of input."""

    def __init__(self) -> None:
        self.refused = self.taken = 0
        self.slowest = 0.0
        self.reasons: Counter[str] = Counter()
        self.cpu = -time.process_time()

    def add(self, function, *args):
        start = time.process_time()
        error = told(function, *args)
        self.slowest = max(self.slowest, time.process_time() - start)
        self.refused += error is not None
        self.taken += error is None
        return error


def configs(hostile, folder, mutator, count):
    """Configs of model folders, and of others' layouts."""
    tally = Tally()
    known = json.loads((folder / "config.json").read_text())
    more = [
        ("vision", "test_vit", {"num_classes": 3, "img_size": 32, "depth": 1}),
        ("timeseries", "itransformer", {"seq_len": 8, "pred_len": 4, "d_model": 8, "e_layers": 1}),
        ("graph", "graph_transformer", {"outputs": 1, "node_types": [3], "hidden_dim": 8, "L": 1}),
        ("speech", "mossformer", {"dim": 8, "depth": 1}),
        ("recsys", "sasrec", {"num_items": 5, "hidden_size": 8}),
    ]
    base = [known, *({**known, "domain": d, "name": n, "arguments": a} for d, n, a in more)]
    for index in range(count):
        content = mutator.text(base[index % len(base)])
        (folder / "config.json").write_bytes(content)
        if tally.add(hub.read_config, folder) is None and index % 4 == 0:
            told(match, folder, hub.read_config(folder))
    (folder / "config.json").write_text(json.dumps(known))
    return tally


def headers(hostile, folder, mutator, count):
    """Headers of safetensors."""
    tally, path = Tally(), folder / "model.safetensors"
    content, config = path.read_bytes(), hub.read_config(folder)
    for _ in range(count):
        path.write_bytes(mutator.safetensors(content))
        if tally.add(stored_tensors, path) is None and told(match, folder, config) is None:
            about = json.loads((folder / "config.json").read_text())
            (folder / "config.json").write_text(json.dumps(about | {"weights_sha256": files.sha256(path)}))
            told(hub.load_model, folder)
    path.write_bytes(content)
    return tally


def hub_answers(hostile, folder, mutator, count):
    """Answers of a hub, and records in the cache."""
    tally = Tally()
    commit, reference = "a" * 40, Reference("org/name")
    tree = [
        {"type": "file", "path": "config.json", "size": 9, "oid": "b" * 40},
        {"type": "file", "path": "m/w.bin", "size": 9, "oid": "c" * 40,
         "lfs": {"oid": "d" * 64, "size": 9, "pointerSize": 1}},
        {"type": "directory", "path": "m", "size": 0, "oid": "e" * 40},
    ]  # fmt: skip
    about = {"_id": "1", "id": "org/name", "sha": commit, "private": False, "siblings": [{"rfilename": "a"}]}
    record = {"reference": "org/name", "commit": commit, "endpoint": "https://x",
              "files": {"a": [1, "f" * 64]},
              "dialect": "", "options": {"a": 1}, "licence": "mit", "version": 1}  # fmt: skip
    for index in range(count):
        if index % 3 == 0:
            bodies = {"/revision/": mutator.text(about)}
            answers(bodies, lambda: tally.add(hub_api.find_commit, reference))
        elif index % 3 == 1:
            bodies = {"/tree/": mutator.text(tree)}

            def call():
                if tally.add(hub_api.list_files, reference, commit) is None:
                    for name in hub_api.list_files(reference, commit).files:
                        assert (folder / name).resolve().is_relative_to(folder.resolve())

            answers(bodies, call)
        else:
            (folder / "manyheads.lock").write_bytes(mutator.text(record))
            tally.add(hub_cache.read_record, folder)
    (folder / "manyheads.lock").unlink(missing_ok=True)
    return tally


def pickles(hostile, folder, mutator, count):
    """Pickles under the names of weights."""
    tally = Tally()
    state = {"a.weight": torch.arange(6.0).view(2, 3), "b": torch.zeros(2, dtype=torch.bfloat16)}
    written = []
    for content, new in (
        (state, True),
        (state, False),
        ({"model": state, "args": argparse.Namespace(x=1)}, True),
    ):
        file = io.BytesIO()
        torch.save(content, file, _use_new_zipfile_serialization=new)
        written.append(file.getvalue())
    for index in range(count):
        kind = index % 3
        path = folder / ("w.pth", "w.bin", "vim_w.pth")[kind]
        path.write_bytes(mutator.checkpoint(written[kind]))
        tally.add((read_tensors, read_tensors, vim_checkpoints.read_checkpoint)[kind], path)
    return tally


def layouts(hostile, folder, mutator, count):
    """Configs of timm's and transformers' folders, and heads of cards, beside weights that are not theirs."""
    tally = Tally()
    there = folder.with_name("published")
    there.mkdir()
    save_file({"head.weight": torch.zeros(3, 4)}, str(there / "model.safetensors"))
    timm = {"architecture": "test_vit", "num_classes": 3, "model_args": {"img_size": 32, "depth": 1},
            "pretrained_cfg": {"input_size": [3, 32, 32], "mean": [0.5] * 3, "crop_pct": 0.9}}  # fmt: skip
    informer = {"model_type": "informer", "prediction_length": 4, "context_length": 8,
                "lags_sequence": [1, 2],
                "d_model": 8, "encoder_layers": 1, "decoder_layers": 1, "num_time_features": 1}  # fmt: skip
    choice = pull.Choice()
    for index in range(count):
        (there / "config.json").write_bytes(mutator.text((timm, informer)[index % 2]))
        (there / "README.md").write_bytes(mutator.content(b"---\nlicense: mit\ntags: [a]\n---\n# x\n"))
        if index % 4 < 2:
            tally.add(pull.convert_local, there, folder.with_name("out"), choice)
        else:
            tally.add((timm_folders._read_config, pretrained._read_config)[index % 2], there / "config.json")
    assert not folder.with_name("out").exists()
    return tally


CORPUS = {
    "configs of model folders": (configs, 45_000),
    "headers of safetensors": (headers, 25_000),
    "answers of a hub, records of downloads": (hub_answers, 25_000),
    "pickles and archives of torch": (pickles, 21_000),
    "configs and cards of others' layouts": (layouts, 4_000),
}


def run_corpus(hostile, folder, canary, share=1.0):
    found = {}
    for number, (name, (function, count)) in enumerate(CORPUS.items()):
        mutator = hostile.Mutator(number, canary)
        with hostile.watched(canary), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tally = function(hostile, folder, mutator, max(1, round(count * share)))
        tally.cpu += time.process_time()
        found[name] = tally
        print(f"{name}: {tally.refused} refused, {tally.taken} taken, {tally.cpu:.0f} s of CPU", flush=True)
    return found


def test_a_small_part_of_the_corpus(hostile, folder, tmp_path):
    found = run_corpus(hostile, folder, tmp_path / "canary", share=0.01)
    assert sum(tally.refused + tally.taken for tally in found.values()) == 1200
    assert all(tally.refused > 0 for tally in found.values())


def broken_downloads(fake_hub, tmp_path, count):
    """Each fault at random places: the outcome is the right bytes or an error that is told."""
    chance = random.Random(0)
    content = chance.randbytes(200_000)
    commit = fake_hub.repositories["org/name"].commit({"w.bin": content})
    digest = hashlib.sha256(content).hexdigest()
    address = f"{fake_hub.address}/org/name/resolve/{commit}/w.bin"
    wanted = Wanted(address, len(content), sha256=digest, commit=commit)

    def bad():
        changed = bytearray(content)
        changed[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
        return bytes(changed)

    kinds = {
        "cut once, at any byte": lambda: {"cuts": [chance.randrange(len(content))]},
        "cut five times": lambda: {"cuts": [chance.randrange(20_000, 39_000) for _ in range(5)]},
        "cut, and another ETag after": lambda: {
            "cuts": [chance.randrange(len(content))],
            "etags": ['"a"', '"b"'],
        },
        "cut, and a server without ranges": lambda: {
            "cuts": [chance.randrange(len(content))],
            "ignore_ranges": True,
        },
        "a flipped bit, same length": lambda: {"corrupt": {"w.bin": bad()}},
        "429 or 503, then well": lambda: {"status": {"/resolve/": [(chance.choice((429, 503)), {})] * 2}},
        "another Content-Length": lambda: {"length": [chance.randrange(2 * len(content))]},
        "redirects in a loop": lambda: {"loop": True},
    }
    found = {}
    for name, make in kinds.items():
        right = refused = 0
        for index in range(count):
            for fault, value in {**type(fake_hub.faults)().__dict__, **make()}.items():
                setattr(fake_hub.faults, fault, value)
            target = tmp_path / "downloads" / str(len(found)) / f"{index}.bin"
            target.parent.mkdir(parents=True, exist_ok=True)
            error = told(download, wanted, target)
            if error is None:
                assert hashlib.sha256(target.read_bytes()).hexdigest() == digest
                target.unlink()
            assert not target.exists()
            right += error is None
            refused += error is not None
        found[name] = (right, refused)
    return found


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_the_whole_corpus_and_broken_downloads(hostile, folder, tmp_path, fake_hub):
    downloads = broken_downloads(fake_hub, tmp_path, 200)
    for name in ("a flipped bit, same length", "redirects in a loop"):
        assert downloads.pop(name) == (0, 200), name
        downloads[name] = (0, 200)
    assert {name for name, (_, refused) in downloads.items() if refused} <= {
        "a flipped bit, same length", "redirects in a loop"
    }, downloads  # fmt: skip
    found = run_corpus(hostile, folder, tmp_path / "canary")
    tried = sum(tally.refused + tally.taken for tally in found.values())
    assert tried >= 100_000
    assert max(tally.slowest for tally in found.values()) < 20
    lines = [
        "# Downloads under faults, and hostile inputs",
        "",
        "Written by `MANYHEADS_WRITE_RESULTS=1 pytest -m slow tests/core/test_hostile.py`.",
        "",
        "| fault, 200 downloads each | the right bytes | an error, told | other bytes |",
        "|---|---|---|---|",
        *(f"| {name} | {right} | {refused} | 0 |" for name, (right, refused) in downloads.items()),
        "",
        "| mutated inputs | tried | refused, told | harmless, taken | crashed | ran anything | slowest, s |",
        "|---|---|---|---|---|---|---|",
        *(
            f"| {name} | {t.refused + t.taken:,} | {t.refused:,} | {t.taken:,} | 0 | 0 | {t.slowest:.2f} |"
            for name, t in found.items()
        ),
        f"| all, in {sum(t.cpu for t in found.values()):.0f} s of CPU | {tried:,} | | | 0 | 0 | |",
        "",
    ]
    print("\n".join(["", *lines]))
    if os.environ.get("MANYHEADS_WRITE_RESULTS"):
        RESULTS.write_text("\n".join(lines), encoding="utf-8")
