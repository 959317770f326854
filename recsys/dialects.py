"""How others publish weights of our recommenders. Data only."""

from __future__ import annotations

from manyheads.core.dialects import Dialect, Source

DIALECTS: tuple[Dialect, ...] = ()
SOURCES: dict[str, Source] = {}
