"""The image models. Data only: importing this imports no torch."""

from __future__ import annotations

from manyheads.core.catalog import Entry, Task

TASKS: tuple[Task, ...] = (
    Task(
        name="classification",
        summary="which class an image is of, or which of several labels it has",
        training="manyheads.vision.task:ImageClassifier",
        data="manyheads.vision.data:ImageData",
        predictor="manyheads.vision.predictor:Predictor",
    ),
)

MODELS: tuple[Entry, ...] = ()
