"""The speech models. Data only: importing this imports no torch."""

from __future__ import annotations

from manyheads.core.catalog import Entry, Task

TASKS: tuple[Task, ...] = (
    Task(
        name="separation",
        summary="the voices of a mixture, one file each",
        training="manyheads.speech.separation.task:Separator",
        data="manyheads.speech.separation.data:SeparationData",
        predictor="manyheads.speech.separation.predictor:Predictor",
    ),
    Task(
        name="recognition",
        summary="what is said, and when",
        training="manyheads.speech.recognition.task:Recognizer",
        data="manyheads.speech.recognition.data:RecognitionData",
        predictor="manyheads.speech.recognition.predictor:Predictor",
    ),
)


def _rows(task: str, module: str, paper: str, licence: str, rows: dict[str, str]) -> tuple[Entry, ...]:
    """The rows of one file's models; each has a builder of its name."""
    return tuple(
        Entry(
            name=name,
            domain="speech",
            task=task,
            builder=f"manyheads.speech.models.{module}:{name}",
            paper=paper,
            licence=licence,
            summary=summary,
        )
        for name, summary in rows.items()
    )


MOSSFORMER: dict[str, str] = {
    "mossformer_base": "MossFormer, 25.2 million parameters: local and global attention over a waveform",
    "mossformer_large": "MossFormer, 42.1 million parameters",
    "mossformer": "MossFormer of any size",
}
MOSSFORMER2: dict[str, str] = {
    "mossformer2": "MossFormer with a recurrence without recurrent layers, 55.7 million parameters",
}
PARAFORMER: dict[str, str] = {
    "paraformer_large": "Paraformer-large, 220.1 million parameters: a whole utterance in one pass",
    "paraformer": "Paraformer of any size",
    "paraformer_conformer": "Paraformer of the AISHELL recipe: a Conformer for an encoder, any size",
}

MODELS: tuple[Entry, ...] = (
    *_rows("separation", "mossformer", "arXiv 2302.11824", "Apache-2.0", MOSSFORMER),
    *_rows("separation", "mossformer2", "arXiv 2312.11825", "Apache-2.0", MOSSFORMER2),
    *_rows(
        "recognition",
        "paraformer",
        "arXiv 2206.08317",
        "Apache-2.0; published weights: FunASR Model License 1.1",
        PARAFORMER,
    ),
)
