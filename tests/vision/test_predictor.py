"""Images in, rows out: every output kind, batches against single images, and what a model folder says."""

from __future__ import annotations

import pickle
import threading

import numpy as np
import pandas as pd
import pytest
import timm
import torch
from PIL import Image

import manyheads
from manyheads.core import hub
from manyheads.core import predictor as core
from manyheads.core.errors import BadRecord, DataError, UsageError
from manyheads.core.hub import ModelConfig
from manyheads.vision.predictor import Predictor
from manyheads.vision.preprocessing import Preprocessing

LABELS = ["ant", "bee", "cat", "dog", "eel", "fox", "gnu"]
SMALL = {"embed_dim": 32, "depth": 2, "num_heads": 2, "img_size": 32}


def save(folder, labels=LABELS, in_chans=3, preprocessing=None, **extra):
    """Write a model folder of a small CCT with random weights."""
    arguments = {**SMALL, "num_classes": len(labels), "in_chans": in_chans}
    torch.manual_seed(3)
    model = manyheads.create_model("cct", **arguments)
    of = Preprocessing((32, 32), in_chans, (0.5,) * in_chans, (0.25,) * in_chans, crop_pct=1.0)
    saved = {**of.to_json(), **extra} if preprocessing is None else preprocessing
    options = {"domain": "vision", "name": "cct", "arguments": arguments}
    hub.save(folder, model, **options, preprocessing=saved, labels=labels or None)
    return folder


@pytest.fixture
def photos(tmp_path):
    """Twelve images of several sizes and modes."""
    rng = np.random.default_rng(0)
    (tmp_path / "photos").mkdir()
    for i in range(12):
        shape = (30 + 7 * i, 90 - 5 * i) if i % 3 == 0 else (30 + 7 * i, 90 - 5 * i, 3)
        image = Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8))
        image.save(tmp_path / "photos" / f"{i:02d}.{('png', 'jpg')[i % 2]}")
    return tmp_path / "photos"


@pytest.fixture
def model(tmp_path):
    return save(tmp_path / "model")


def logits_of(folder, photos):
    """Logits by the plain way: one image after the other through transform and model."""
    module, config = hub.load_model(folder)
    of = Preprocessing.from_json(config.preprocessing)
    with torch.inference_mode():
        return torch.cat([module(of.load(path)[None]) for path in sorted(photos.iterdir())])


def test_labels(model, photos):
    frame = manyheads.load(model).predict(str(photos))
    ranks = [f"{name}{end}" for end in ("", "_2", "_3", "_4", "_5") for name in ("label", "probability")]
    assert list(frame.columns) == ["id", *ranks]
    assert frame["id"].tolist() == sorted(path.name for path in photos.iterdir())
    wanted = logits_of(model, photos).double().softmax(dim=1)
    for rank, end in enumerate(("", "_2", "_3", "_4", "_5")):
        top = wanted.sort(dim=1, descending=True)
        assert frame[f"label{end}"].tolist() == [LABELS[i] for i in top.indices[:, rank]]
        np.testing.assert_allclose(frame[f"probability{end}"], top.values[:, rank], rtol=1e-5)


@pytest.mark.parametrize("kind", ["probabilities", "logits", "features"])
def test_lists(model, photos, kind):
    frame = manyheads.load(model).predict(photos, output_kind=kind)
    assert list(frame.columns) == ["id", kind]
    found = np.stack(frame[kind].tolist())
    assert found.dtype == np.float32
    module, config = hub.load_model(model)
    of = Preprocessing.from_json(config.preprocessing)
    images = torch.stack([of.load(path) for path in sorted(photos.iterdir())])
    with torch.inference_mode():
        wanted = {
            "logits": module(images),
            "probabilities": module(images).softmax(dim=1),
            "features": module.forward_head(module.forward_features(images), pre_logits=True),
        }[kind]
    assert found.shape == (12, 32 if kind == "features" else len(LABELS))
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "kind"),
    [("cct", "label"), ("cct", "features"), ("convolutions", "probabilities"), ("convolutions", "features")],
)
def test_a_batch_equals_its_images_one_by_one(model, photos, kind, name):
    predictor = manyheads.load(model)
    if name == "convolutions":  # batch norm, and kernels that depend on the batch's size
        torch.manual_seed(0)
        network = timm.create_model("resnet10t", num_classes=len(LABELS), pretrained=False)
        predictor = Predictor(network, Preprocessing((64, 64)), predictor.outputs)
    predictor = predictor.configure({"output_kind": kind})
    together = core.predict(predictor, photos, batch_size=12)
    for size in (1, 5):
        alone = core.predict(predictor, photos, batch_size=size)
        for column in together:
            if column in ("label", "id") or column.startswith("label_"):
                assert alone[column].tolist() == together[column].tolist()
            else:
                one, many = (np.stack(frame[column].tolist()).astype(float) for frame in (alone, together))
                scale = np.abs(many).max(axis=-1, keepdims=True)
                assert (np.abs(one - many) / scale).max() < 1e-5


def test_top_k_and_its_limits(model, photos):
    predictor = manyheads.load(model)
    assert list(predictor.predict(photos, top_k=1)) == ["id", "label", "probability"]
    assert len(predictor.predict(photos, top_k=7).columns) == 15
    with pytest.raises(UsageError, match="--top-k 8: the model has 7 labels"):
        predictor.predict(photos, top_k=8)
    with pytest.raises(UsageError, match="--top-k 0"):
        predictor.configure({"top_k": 0})
    with pytest.raises(UsageError, match="goes with --output-kind label, not with features"):
        predictor.configure({"output_kind": "features", "top_k": 2})
    with pytest.raises(UsageError, match="no output kind 'feature'; did you mean 'features'"):
        predictor.predict(photos, output_kind="feature")
    assert predictor.settings == {"output_kind": "label", "top_k": 5}


def test_fewer_classes_than_five(tmp_path, photos):
    frame = manyheads.load(save(tmp_path / "two", ["no", "yes"])).predict(photos)
    assert list(frame.columns) == ["id", "label", "probability", "label_2", "probability_2"]
    np.testing.assert_allclose(frame["probability"] + frame["probability_2"], 1.0, rtol=1e-6)


def test_temperature(tmp_path, photos):
    folder = save(tmp_path / "warm", temperature=2.5)
    found = np.stack(manyheads.load(folder).predict(photos, output_kind="probabilities")["probabilities"])
    wanted = (logits_of(folder, photos).double() / 2.5).softmax(dim=1)
    np.testing.assert_allclose(found, wanted, rtol=1e-5)
    raw = np.stack(manyheads.load(folder).predict(photos, output_kind="logits")["logits"])
    np.testing.assert_allclose(raw, logits_of(folder, photos), rtol=1e-4, atol=1e-5)


def test_multi_label(tmp_path, photos):
    folder = save(tmp_path / "many", multi_label=True)
    found = np.stack(manyheads.load(folder).predict(photos, output_kind="probabilities")["probabilities"])
    np.testing.assert_allclose(found, logits_of(folder, photos).sigmoid(), rtol=1e-5)
    frame = manyheads.load(folder).predict(photos, top_k=2)
    np.testing.assert_allclose(frame["probability"], found.max(axis=1), rtol=1e-6)


def test_grey_images(tmp_path, photos):
    frame = manyheads.load(save(tmp_path / "grey", in_chans=1)).predict(photos)
    assert len(frame) == 12


def test_sources(model, photos, tmp_path):
    predictor = manyheads.load(model)
    wanted = predictor.predict(photos)
    paths = sorted(photos.iterdir())
    pd.testing.assert_frame_equal(predictor.predict([str(path) for path in paths]), wanted)
    frame = pd.DataFrame({"image": [path.read_bytes() for path in paths], "id": wanted["id"]})
    pd.testing.assert_frame_equal(predictor.predict(frame), wanted)
    frame.to_parquet(tmp_path / "t.parquet", row_group_size=5)
    pd.testing.assert_frame_equal(predictor.predict(tmp_path / "t.parquet"), wanted)


def test_shards_cut_the_source_the_same_way_each_time(model, photos):
    predictor = manyheads.load(model)
    shards = predictor.shards(photos, 5)
    assert [len(list(predictor.read(shard))) for shard in shards] == [5, 5, 2]
    sent = [pickle.loads(pickle.dumps(shard)) for shard in shards]
    again = predictor.shards(photos, 5)
    for one, two, three in zip(shards, sent, again, strict=True):
        assert list(predictor.read(one)) == list(predictor.read(two)) == list(predictor.read(three))


def test_a_bad_image_is_named(model, photos):
    predictor = manyheads.load(model)
    (photos / "03.jpg").write_bytes(b"words, not pixels")
    with pytest.raises(DataError, match=r"record '03\.jpg': text, not an image"):
        predictor.predict(photos)
    records = list(predictor.read(predictor.shards(photos, 100)[0]))
    with pytest.raises(BadRecord, match="text, not an image"):
        predictor.prepare(records[3])


def test_threads_prepare_in_order_and_give_up_with_the_stream(model, photos):
    predictor = manyheads.load(model)
    records = list(predictor.read(predictor.shards(photos, 100)[0]))

    class Threaded(Predictor):
        prepare_threads = 3

    class Alone(Predictor):
        prepare_threads = 1

    parts = (predictor.model, predictor.preprocessing, predictor.outputs)
    one, many = Alone(*parts), Threaded(*parts)
    (photos / "05.jpg").unlink()
    spent = core.Spent()
    found = list(core.run(many, iter(records), 4, spent))
    assert found == list(core.run(one, iter(records), 4))
    assert [bad[0].id for _, bad, _ in found if bad] == ["05.jpg"]
    assert 0 < spent.preparing < 60
    stream = core.run(many, iter(records), 2)
    next(stream)
    stream.close()
    assert not [each for each in threading.enumerate() if each.name.startswith("manyheads-prepare")]


def config(preprocessing, labels=None):
    return ModelConfig(1, "vision", "cct", {}, preprocessing, labels, {}, "")


def test_a_folder_without_preprocessing_takes_the_models_own():
    module = manyheads.create_model("cct", **SMALL, num_classes=3)
    predictor = Predictor.from_folder(module, config({}))
    assert predictor.preprocessing == Preprocessing.from_timm(module.pretrained_cfg)
    assert predictor.outputs.labels == ("0", "1", "2")
    assert Predictor.from_folder(module, config({}, list("abc"))).outputs.labels == ("a", "b", "c")
    saved = {**predictor.preprocessing.to_json(), "labels": list("xyz")}
    assert Predictor.from_folder(module, config(saved)).outputs.labels == ("x", "y", "z")


@pytest.mark.parametrize(
    ("saved", "labels", "says"),
    [
        ({}, ["a"], "1 labels, its model 3 classes"),
        ({"temperature": 0.0}, None, "temperature = 0.0"),
        ({"size": [224]}, None, "size"),
        ({"std": [0, 1, 1]}, None, "std"),
    ],
)
def test_folders_that_do_not_fit(saved, labels, says):
    module = manyheads.create_model("cct", **SMALL, num_classes=3)
    saved = {**Preprocessing((32, 32)).to_json(), **saved}
    with pytest.raises(DataError, match=says):
        Predictor.from_folder(module, config(saved, labels))


def test_a_model_without_a_classifier_has_features_only(photos):
    module = manyheads.create_model("cct", **SMALL, num_classes=0)
    predictor = Predictor.from_folder(module, config({}))
    assert list(predictor.predict(photos)) == ["id", "features"]
    with pytest.raises(UsageError, match="no classifier: --output-kind features"):
        predictor.configure({"output_kind": "label"})
