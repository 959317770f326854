"""Which families of the catalogue can be exported, and why others cannot: `manyheads export --list`.

Found by trying; `pytest -m slow tests/apps/test_export_families.py` tries again.
"""

from __future__ import annotations

# By the builder's function: each format with the reason against it, none where there is none.
EXPORTS: dict[str, dict[str, str]] = {}
