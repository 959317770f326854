"""The recommenders. Data only: importing this imports no torch."""

from __future__ import annotations

from manyheads.core.catalog import Entry, Task

TASKS: tuple[Task, ...] = (
    Task(
        name="recommendation",
        summary="what users will choose next, from what they chose before",
        training="manyheads.recsys.task:Recommender",
        data="manyheads.recsys.data:RecommendationData",
        predictor="manyheads.recsys.predictor:Predictor",
    ),
)


def _row(name: str, task: str, module: str, paper: str, licence: str, summary: str) -> Entry:
    return Entry(
        name=name,
        domain="recsys",
        task=task,
        builder=f"manyheads.recsys.models.{module}:{name}",
        paper=paper,
        licence=licence,
        summary=summary,
    )


# The models of texts (`models/recformer.py`, `models/cross_attention.py`) come with the tasks that train
# them.
MODELS: tuple[Entry, ...] = (
    _row(
        "bert4rec",
        "recommendation",
        "bert4rec",
        "arXiv 1904.06690",
        "Apache-2.0",
        "BERT4Rec of any size: a history read from both sides, hidden items guessed",
    ),
    _row(
        "sasrec",
        "recommendation",
        "sasrec",
        "arXiv 1808.09781",
        "Apache-2.0",
        "SASRec of any size: a history read forwards, each item foretelling the next",
    ),
)
