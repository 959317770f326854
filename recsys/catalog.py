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
    Task(
        name="text_recommendation",
        summary="what users will choose next, read as texts: items that nobody has chosen yet, too",
        training="manyheads.recsys.text_task:TextRecommender",
        data="manyheads.recsys.text_data:TextData",
        predictor="manyheads.recsys.predictor:Predictor",
    ),
    Task(
        name="text_classification",
        summary="which class a customer's text is of, or which labels it has, from it and from variables",
        training="manyheads.recsys.classification_task:TextClassifier",
        data="manyheads.recsys.classification_data:TextData",
        predictor="manyheads.recsys.classification_predictor:Predictor",
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
    _row(
        "cross_attention_fusion",
        "text_classification",
        "cross_attention",
        "none: layers of our own",
        "Apache-2.0",
        "texts whose tokens attend to customers' variables, classified; any size",
    ),
    _row(
        "recformer",
        "text_recommendation",
        "recformer",
        "arXiv 2305.13731",
        "Apache-2.0",
        "Recformer of any size: histories and items read as texts, by a Longformer",
    ),
    _row(
        "recformer_base",
        "text_recommendation",
        "recformer",
        "arXiv 2305.13731",
        "Apache-2.0",
        "Recformer as published, 148.1 M parameters: a Longformer-base with a window of 64",
    ),
)
