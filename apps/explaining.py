"""The pictures of `manyheads vision explain`."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from manyheads.apps.explain import ExplainOptions
from manyheads.apps.picture_names import picture_name
from manyheads.core import files, hub
from manyheads.core.errors import BadRecord, UsageError, did_you_mean
from manyheads.core.predictor import AnyPredictor
from manyheads.vision.explain import explain, methods_for
from manyheads.vision.pictures import Pixels, draw_explanation, overlay
from manyheads.vision.predictor import Predictor
from manyheads.vision.preprocessing import Preprocessing

BAD_RECORDS = 3
SIDE = 384  # pixels of a picture's width


def load_predictor(reference: Path) -> Predictor:
    """Load a vision model's folder.

    Raises:
        UsageError: There is none, or its model is of another domain.
    """
    folder = hub.find_folder(reference)
    config = hub.read_config(folder)
    if config.domain != "vision":
        raise UsageError(f"{folder} holds {config.name}, a model of {config.domain}, not of vision")
    return Predictor.from_folder(*hub.load_model(folder))


def run(given: ExplainOptions) -> int:
    """Draw a picture of each image.

    Returns:
        0, or 3 if images could not be used.

    Raises:
        UsageError: The model has not got the method, layer or class, or a source is not there.
    """
    predictor = load_predictor(given.model)
    labels = predictor.outputs.labels
    target = None if given.label is None else find_class(given.label, labels)
    method = _method(given, predictor)
    shards = predictor.shards(list(given.images), 1024)
    given.output.mkdir(parents=True, exist_ok=True)
    found: list[dict[str, object]] = []
    bad: list[dict[str, str]] = []
    names: set[str] = set()
    for record in (record for shard in shards for record in predictor.read(shard)):
        try:
            sample = predictor.prepare(record)
        except BadRecord as error:
            bad.append({"id": record.id, "reason": str(error)})
            print(f"manyheads: {record.id}: {error}", file=sys.stderr)
            continue
        path = given.output / picture_name(record.id, names)
        shown = _draw(replace(given, method=method), predictor, sample, target, record.id, path)
        found.append({"id": record.id, "picture": str(path), **shown})
        if not given.json:
            print(path)
    if given.json:
        print(json.dumps({"images": found, "bad": bad}))
    return BAD_RECORDS if bad else 0


def picture(predictor: AnyPredictor, content: bytes) -> bytes:
    """Return a PNG of an encoded image under the map of what the model looks at, by the method it has.

    Raises:
        BadRecord: The image cannot be read.
    """
    import pandas as pd
    from PIL import Image

    assert isinstance(predictor, Predictor)
    (shard,) = predictor.shards(pd.DataFrame({"image": [content]}), 1)
    (record,) = predictor.read(shard)
    sample = predictor.prepare(record)
    method: Literal["rollout", "gradcam"] = (
        "rollout" if "rollout" in methods_for(predictor.model) else "gradcam"
    )
    heat = explain(predictor.model, sample[None], method)
    out = io.BytesIO()
    drawn = overlay(pixels(sample, predictor.preprocessing), heat.numpy())
    Image.fromarray(drawn).resize((SIDE, SIDE * drawn.shape[0] // drawn.shape[1])).save(out, "PNG")
    return out.getvalue()


def find_class(text: str, labels: Sequence[str]) -> int:
    """Return the number of a class by its name, or by its number.

    Raises:
        UsageError: There is none.
    """
    if text in labels:
        if labels.count(text) > 1:
            numbers = ", ".join(str(i) for i, label in enumerate(labels) if label == text)
            raise UsageError(f"--class: classes {numbers} are all named {text!r}; give a number")
        return labels.index(text)
    if text.isdecimal() and int(text) < len(labels):
        return int(text)
    if text.isdecimal():
        raise UsageError(f"--class {text}: the model has {len(labels)} classes, from 0")
    raise UsageError(f"--class: the model has no class {text!r}{did_you_mean(text, labels)}")


def pixels(sample: Tensor, preprocessing: Preprocessing) -> Pixels:
    """Return the pixels of a model's input.

    Shape:
        sample `[C, H, W]`; the result `[H, W, 3]`.
    """
    mean, std = (torch.tensor(each)[:, None, None] for each in (preprocessing.mean, preprocessing.std))
    levels = ((sample * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)
    return np.ascontiguousarray(levels.expand(3, -1, -1).permute(1, 2, 0).numpy())


def _method(given: ExplainOptions, predictor: Predictor) -> Literal["rollout", "gradcam"]:
    """Return the method that is meant, which this model has."""
    method = given.method
    if method == "auto":
        asked = given.label is not None or isinstance(given.layer, str)
        method = "rollout" if not asked and "rollout" in methods_for(predictor.model) else "gradcam"
    if method == "gradcam" and not predictor.outputs.labels:
        raise UsageError("gradcam explains a class, and the model has no classifier")
    return method


def _draw(
    given: ExplainOptions, predictor: Predictor, sample: Tensor, target: int | None, name: str, path: Path
) -> dict[str, object]:
    """Draw one picture, and return what it shows."""
    labels, top, explained = predictor.outputs.labels, [], None
    if labels:
        (chances,) = predictor.outputs.probabilities(predictor.forward(sample[None]))
        order = chances.sort(descending=True, stable=True).indices[: given.top].tolist()
        top = [(labels[k], float(chances[k])) for k in order]
        explained = labels[order[0] if target is None else target] if given.method == "gradcam" else None
    heat = explain(
        predictor.model,
        sample[None],
        given.method,
        target,
        layer=given.layer,
        fusion=given.heads,
        discard=given.discard,
    )
    what = explained or ("all layers" if given.layer is None else f"layer {given.layer}")
    if not heat.max() > 0:
        what += " (nothing speaks for it)"
    written = files.temporary(path)
    try:
        photo = pixels(sample, predictor.preprocessing)
        draw_explanation(photo, heat.numpy(), top, written, Path(name).name, f"{given.method}: {what}")
        files.commit(written, path)
    finally:
        written.unlink(missing_ok=True)
    ranked = [{"label": label, "probability": chance} for label, chance in top]
    return {"method": given.method, "class": explained, "top": ranked}
