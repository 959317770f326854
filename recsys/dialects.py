"""How others publish weights of our recommenders. Data only."""

from __future__ import annotations

from manyheads.core.dialects import Dialect, Source

DIALECTS: tuple[Dialect, ...] = (
    Dialect(
        name="recformer",
        summary="Recformer's authors' files: pretrained, fine-tuned, or a training's",
        files=("recformer_*.bin|seqrec_*.bin",),
        converter="manyheads.recsys.models.recformer_folders:convert",
        options=("longformer", "heads", "window"),
    ),
)

# The authors' files are on a drive that has no commits and no hashes: they are converted from a path.
SOURCES: dict[str, Source] = {}
