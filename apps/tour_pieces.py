"""What the tours of `manyheads quickstart` have of their own: the job's input, and what must be beaten.

A source takes the output folder and returns what the job predicts. Baselines take that folder and the seed,
and return figures by name, in the order of the tour's table.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from manyheads.core import datasets

Figures = Mapping[str, tuple[float, ...]]
AHEAD = 96  # rows of ETTh1 that the job forecasts
SHOWN = 40  # images and recordings of the job
NEIGHBOURS = 5
TRAINED = 10_000  # images that neighbours are looked for among


def history(output: Path) -> Path:
    """Write ETTh1 but for its last rows, which the job forecasts."""
    import pandas as pd

    pd.read_csv(datasets.locate("etth1"))[:-AHEAD].to_csv(output / "history.csv", index=False)
    return output / "history.csv"


def naive_and_linear(output: Path, seed: int) -> Figures:
    """Measure repeating the day before, and one linear map after ten epochs."""
    from lightning.pytorch import Trainer, seed_everything

    from manyheads.timeseries.data import ForecastData
    from manyheads.timeseries.task import Forecaster

    data = ForecastData("etth1", AHEAD, AHEAD, seed=seed)
    seed_everything(seed)
    tasks = {
        "seasonal naive": (Forecaster("seasonal_naive", {"season_length": 24}, AHEAD, AHEAD), 0),
        "DLinear, 10 epochs": (Forecaster("dlinear", None, AHEAD, AHEAD, learning_rate=1e-3), 10),
    }
    quiet: dict[str, Any] = dict.fromkeys(
        ("logger", "enable_checkpointing", "enable_model_summary", "enable_progress_bar"), False
    )
    found = {}
    for name, (task, epochs) in tasks.items():
        trainer = Trainer(max_epochs=epochs, devices=1, num_sanity_val_steps=0, deterministic=True, **quiet)
        if epochs:
            trainer.fit(task, data)
        figures = trainer.test(task, data, verbose=False)[0]
        found[name] = (figures["test_mse"], figures["test_mae"])
    return found


def photos(output: Path) -> Path:
    """Write test images as files that are named by their classes."""
    from manyheads.vision import idx

    pixels, labels, first = idx.read_folder(datasets.locate("fashion_mnist"))
    names = json.loads((output / "model/config.json").read_text())["labels"]
    folder = output / "photos"
    folder.mkdir()
    for index in range(SHOWN):
        name = re.sub(r"\W+", "-", names[labels[first + index]].lower())
        pixels.image(first + index, channels=1).save(folder / f"{index:02}_{name}.png")
    return folder


def nearest_images(output: Path, seed: int) -> Figures:
    """Measure the vote of the training images that are most like a test image, pixel by pixel."""
    import torch

    from manyheads.vision import idx

    pixels, labels, first = idx.read_folder(datasets.locate("fashion_mnist"))
    chosen = np.random.default_rng(seed).permutation(first)[:TRAINED]
    known, asked = (
        torch.from_numpy(pixels.pixels[i].reshape(len(i), -1) / np.float32(255))
        for i in (chosen, np.arange(first, len(labels)))
    )
    closest = torch.cdist(asked, known).topk(NEIGHBOURS, largest=False).indices
    votes = torch.from_numpy(labels[chosen])[closest].mode(dim=1).values
    share = float((votes == torch.from_numpy(labels[first:])).double().mean())
    return {f"{NEIGHBOURS} nearest of {TRAINED:,} images, by pixels": (share,)}


def recordings(output: Path) -> Path:
    """Write test utterances as sound files with a table."""
    from manyheads.speech.recognition.digits import Joining, read_digits, write_recordings

    digits = read_digits(datasets.locate("fsdd"), "test", Joining(test=SHOWN), seed=0)
    return write_recordings(digits, output / "recordings")


def constant_answer(output: Path, seed: int) -> Figures:
    """Measure the best of the answers that are always the same: a digit, so many times."""
    import pandas as pd

    from manyheads.speech.recognition.metrics import compare, total
    from manyheads.speech.recognition.report import TEXTS

    said = pd.read_csv(output / TEXTS, dtype=str)["reference"].tolist()
    frequent = max("0123456789", key="".join(said).count)
    answers = [frequent * count for count in range(1, 9)]
    rates = {each: total(compare(said, [each] * len(said), "character").edits).rate for each in answers}
    best = min(answers, key=rates.__getitem__)
    return {f"always {best!r}": (rates[best],)}


def papers(output: Path) -> Path:
    """Write Cora as tables of nodes and edges."""
    import pandas as pd

    from manyheads.graph.published import load

    graphs = load("cora").graphs
    folder = output / "papers"
    folder.mkdir()
    nodes = pd.DataFrame({"id": graphs.node_ids, "x": list(graphs.x.numpy())})
    nodes.to_parquet(folder / "nodes.parquet", index=False)
    edges = graphs.edge_index[
        :, : graphs.edge_index.shape[1] // 2
    ]  # the other half are the same, turned around
    ids = np.array(graphs.node_ids)
    pd.DataFrame({"source": ids[edges[0]], "target": ids[edges[1]]}).to_parquet(
        folder / "edges.parquet", index=False
    )
    return folder


def labels_and_citations(output: Path, seed: int) -> Figures:
    """Measure the most frequent class, and labels that spread along citations, without words.

    Source: D. Zhou et al., Learning with Local and Global Consistency (2003).
    """
    from scipy.sparse import coo_array, diags_array

    from manyheads.graph.published import load

    loaded = load("cora")
    assert loaded.graphs.y is not None
    truth = loaded.graphs.y[:, 0].long().numpy()
    train, test = (np.isin(np.arange(len(truth)), loaded.parts[part]) for part in ("train", "test"))
    (source, target), size = loaded.graphs.edge_index.numpy(), len(truth)
    links = coo_array((np.ones(len(source)), (source, target)), (size, size)).tocsr()
    root = diags_array(np.maximum(links.sum(0), 1) ** -0.5)
    known = np.eye(truth.max() + 1)[truth] * train[:, None]
    spread = known
    for _ in range(50):
        spread = 0.9 * (root @ links @ root @ spread) + 0.1 * known
    frequent = np.bincount(truth[test]).argmax()
    return {
        "labels spread along citations": (float((spread.argmax(1) == truth)[test].mean()),),
        "the most frequent class": (float((truth[test] == frequent).mean()),),
    }


def log(output: Path) -> Path:
    """Write who saw what when as a table."""
    from manyheads.recsys.published import read_ratings

    table = read_ratings(datasets.locate("ml_100k"))
    table.drop(columns="rating").to_csv(output / "log.csv", index=False)
    return output / "log.csv"


def popularity(output: Path, seed: int) -> Figures:
    """Return what the test found for the most popular films."""
    figures = json.loads((output / "test.json").read_text())
    names = ("ndcg@10", "hr@10", "coverage@10")
    return {"the most popular films": tuple(figures[f"test_popularity_{name}"] for name in names)}
