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
        summary="the same from the texts of items, for new ones too",
        training="manyheads.recsys.text_task:TextRecommender",
        data="manyheads.recsys.text_data:TextData",
        predictor="manyheads.recsys.predictor:Predictor",
    ),
    Task(
        name="text_classification",
        summary="classes of texts, given who wrote them",
        training="manyheads.recsys.classification_task:TextClassifier",
        data="manyheads.recsys.classification_data:ClassificationData",
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
        "recformer_base",
        "text_recommendation",
        "recformer",
        "arXiv 2305.13731",
        "MIT",
        "Recformer, 148.1 million parameters: histories as texts of their items",
    ),
    _row(
        "recformer",
        "text_recommendation",
        "recformer",
        "arXiv 2305.13731",
        "MIT",
        "Recformer of any size",
    ),
    _row(
        "cross_attention_fusion",
        "text_classification",
        "cross_attention",
        "none (an abstract: consumer preferences by BERT and cross-attention)",
        "ours",
        "texts that attend to their customers' variables, classified",
    ),
)
