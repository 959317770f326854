"""The figures of `manyheads vision knn`."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path

from manyheads.apps.explaining import BAD_RECORDS, load_predictor
from manyheads.apps.knn import KnnOptions
from manyheads.apps.progress import Count
from manyheads.core import datasets
from manyheads.core.errors import DataError, UsageError
from manyheads.vision.manifest import Manifest, read_manifest
from manyheads.vision.neighbours import evaluate, test_rows, training_rows

SHOWN = 5  # bad images that are named


def find_manifest(source: str) -> Manifest:
    """Read the manifest of a source, or of a data set by its name.

    Raises:
        UsageError: Neither.
        DataError: What is wrong with it.
    """
    path = Path(source)
    if not path.exists():
        names = [each.name for each in datasets.datasets("vision")]
        if source not in names:
            raise UsageError(f"no folder or file {source}, and no data set (data sets: {', '.join(names)})")
        path = datasets.locate(source)
    return read_manifest(path)


def run(given: KnnOptions) -> int:
    """Measure, and print.

    Returns:
        0, or 3 if images could not be used.

    Raises:
        UsageError: There is no such model or source.
        DataError: A source cannot be used, or both are the same images.
    """
    predictor = load_predictor(given.model)
    if given.batch_size is not None:
        predictor.batch_size = given.batch_size
    manifest = find_manifest(given.train)
    train = training_rows(manifest)
    test = test_rows(manifest if given.test == given.train else find_manifest(given.test), manifest.labels)
    if test.manifest is manifest and set(test.rows) & set(train.rows):
        raise DataError(f"{given.train} names no test part: give --test")
    with Count(len(train) + len(test), "images", given.quiet) as count:
        found, bad = evaluate(predictor, train, test, given.ks, given.temperature, count.advance)
    if given.json:
        about = {"train": len(train), "test": len(test), "classes": len(manifest.labels)}
        content = {**about, "temperature": given.temperature, "accuracy": [asdict(each) for each in found]}
        print(json.dumps({**content, "bad": [asdict(each) for each in bad]}))
    else:
        print(f"{len(test)} test images, {len(train)} training images, {len(manifest.labels)} classes")
        for each in found:
            print(f"k {each.k:4}  top-1 {each.top1:.4f}  top-5 {each.top5:.4f}")
    for one in bad[:SHOWN]:
        print(f"manyheads: {one.id}: {one.reason}", file=sys.stderr)
    if len(bad) > SHOWN:
        print(f"manyheads: and {len(bad) - SHOWN} other images that cannot be used", file=sys.stderr)
    return BAD_RECORDS if bad else 0
