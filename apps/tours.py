"""The five tours of `manyheads quickstart`: which commands, on which data, beside what. Data only."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Tour:
    """One domain's tour.

    Args:
        title: What is done, in a line.
        dataset: The data set, which is looked for before anything else is done.
        config: The shipped config that is trained by.
        epochs: How many of its epochs.
        options: Further options of the fit.
        source: The function of `tour_pieces` that writes what the job predicts.
        job: The job's folder.
        columns: Columns of the job's rows that are shown.
        plot: A command that draws; `{}` is the output folder.
        pictures: What to look at, with a word on it.
        figures: Figures of the test, by the heading of the table.
        beside: What others reached, or the whole run.
        baselines: The function of `tour_pieces` that measures what must be beaten.
        next: Commands to go on with; `{}` is the output folder.
    """

    title: str
    dataset: str
    config: str
    epochs: int
    source: str
    job: str
    columns: tuple[str, ...]
    figures: dict[str, str]
    beside: dict[str, tuple[float, ...]]
    baselines: str
    pictures: dict[str, str]
    next: tuple[str, ...]
    options: tuple[str, ...] = ()
    plot: tuple[str, ...] = ()


TOURS: dict[str, Tour] = {
    "timeseries": Tour(
        title="iTransformer forecasts an electricity transformer's load: 96 hours -> the next 96 (ETTh1)",
        dataset="etth1",
        config="itransformer_etth1_96",
        epochs=4,
        source="history",
        job="forecasts",
        columns=("unique_id", "ds", "yhat"),
        plot=("timeseries", "plot", "{}/model", "etth1", "-o", "{}/forecast.png", "--truth"),
        pictures={
            "forecast.png": "the job's hours as the model sees them, and what came",
            "curves.png": "losses",
        },
        figures={"MSE": "test_mse", "MAE": "test_mae"},
        beside={"published (arXiv 2310.06625)": (0.386, 0.405)},
        baselines="naive_and_linear",
        next=(
            "manyheads predict {}/model YOUR.csv -o out    # date and values, or unique_id, ds, y",
            "manyheads timeseries fit --config itransformer_etth1_96    # the whole run",
        ),
    ),
    "vision": Tour(
        title="A compact convolutional transformer learns ten kinds of clothes (a part of Fashion-MNIST)",
        dataset="fashion_mnist",
        config="cct_fashion_mnist",
        epochs=3,
        options=("--trainer.limit_train_batches", "0.4", "--model.schedule.warmup_epochs", "0"),
        source="photos",
        job="labels",
        columns=("id", "label", "probability"),
        plot=("vision", "explain", "{}/model", "{}/photos/0*.png", "-o", "{}/maps"),
        pictures={
            "confusion.png": "which classes are taken for which",
            "reliability.png": "whether its chances hold",
            "maps": "what it looks at, image by image",
        },
        figures={"top-1": "test_top1"},
        beside={"the config's whole run": (0.9254,)},
        baselines="nearest_images",
        next=(
            "manyheads predict {}/model YOUR_PHOTOS/ -o out",
            "manyheads vision fit --config cct_fashion_mnist --data.dataset FOLDERS/ --output runs/mine",
            "manyheads vision fit --config cct_fashion_mnist    # the whole run, half an hour",
        ),
    ),
    "speech": Tour(
        title="A small Paraformer learns to write down spoken digits (Free Spoken Digit Dataset)",
        dataset="fsdd",
        config="paraformer_tiny_digits",
        epochs=2,
        source="recordings",
        job="texts",
        columns=("id", "start_ms", "end_ms", "text"),
        pictures={"errors.png": "which digits are taken for which", "curves.png": "losses"},
        figures={"CER": "test_cer"},
        beside={"the config's whole run, 10 epochs": (0.0092,)},
        baselines="constant_answer",
        next=(
            "manyheads predict {}/model YOUR_RECORDINGS/ -o out --subtitles srt",
            "manyheads speech fit --config paraformer_tiny_digits    # the whole run, ten minutes",
            "manyheads speech fit --config paraformer_own_recordings --data.dataset YOURS.csv",
        ),
    ),
    "graph": Tour(
        title="A graph convolutional network sorts papers by their words and citations (Cora)",
        dataset="cora",
        config="gcn_cora",
        epochs=200,
        source="papers",
        job="classes",
        columns=("id", "label", "probability"),
        plot=("graph", "explain", "{}/model", "{}/papers", "-o", "{}/why", "--row", "1740", "1743", "1776"),
        pictures={
            "picture.png": "which classes are taken for which",
            "why/pictures": "which neighbours speak for the class of a paper (features.parquet: which words)",
        },
        figures={"accuracy": "test_accuracy"},
        beside={"published (arXiv 1609.02907)": (0.815,)},
        baselines="labels_and_citations",
        next=(
            "manyheads graph fit --config graph_transformer_cora    # attention along the citations",
            "manyheads graph fit --config gcn_cora_links    # which papers cite each other",
            "manyheads graph fit --config esol --data.dataset YOURS.csv --data.targets.names '[COLUMN]'",
        ),
    ),
    "recsys": Tour(
        title="SASRec learns what to recommend from 943 people's films (MovieLens 100K)",
        dataset="ml_100k",
        config="sasrec_ml_100k",
        epochs=8,
        options=("--trainer.check_val_every_n_epoch", "1"),
        source="log",
        job="lists",
        columns=("user_id", "rank", "item_id", "score"),
        pictures={"ranks.png": "how far up the film stands that came next", "curves.png": "losses"},
        figures={"NDCG@10": "test_ndcg@10", "HR@10": "test_hr@10", "coverage@10": "test_coverage@10"},
        beside={"the config's whole run, 60 epochs": (0.1031, 0.1919, 0.64)},
        baselines="popularity",
        next=(
            "manyheads predict {}/model YOUR_LOG.parquet -o out --top-k 20    # user_id, item_id, timestamp",
            "manyheads recsys fit --config sasrec_ml_100k --data.dataset YOUR_LOG.parquet --output runs/mine",
            "manyheads recsys fit --config sasrec_ml_100k    # the whole run, four minutes",
        ),
    ),
}
