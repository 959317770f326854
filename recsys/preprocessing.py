"""What a model folder keeps of a log: its columns, the items of the numbers, how often each was chosen."""

from __future__ import annotations

import base64
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray

from manyheads.core.errors import DataError
from manyheads.recsys.logs import Columns
from manyheads.recsys.vocabulary import Vocabulary


@dataclass(frozen=True)
class Preprocessing:
    """What prediction must repeat of training.

    Args:
        columns: Names of a log's columns.
        item_ids: The catalogue, in the order of the model's items.
        counts: How often each item was chosen in training.

    Shape:
        counts `[items]`.
    """

    columns: Columns
    item_ids: Vocabulary
    counts: NDArray[np.int64]

    def to_json(self) -> dict[str, object]:
        """Return plain JSON; counts are packed, as the items are."""
        packed = zlib.compress(self.counts.astype("<i8").tobytes(), 9)
        return {
            "columns": asdict(self.columns),
            "items": self.item_ids.to_json(),
            "counts": base64.b64encode(packed).decode(),
        }

    @classmethod
    def from_json(cls, found: Mapping[str, object]) -> Preprocessing:
        """Read what `to_json` wrote.

        Raises:
            DataError: It is not that.
        """
        try:
            columns, items, counts = (found[key] for key in ("columns", "items", "counts"))
        except KeyError as error:
            raise DataError(f"the model folder's preprocessing lacks {error}") from error
        names = {"user", "item", "timestamp", "rating"}
        if not isinstance(columns, dict) or set(columns) != names:
            raise DataError(f"the model folder's columns are not {', '.join(sorted(names))}")
        if not all(isinstance(v, str) or (k == "timestamp" and v is None) for k, v in columns.items()):
            raise DataError("the model folder's columns are no names")
        item_ids = Vocabulary.from_json(items)
        try:
            unpack = zlib.decompressobj()
            plain = unpack.decompress(base64.b64decode(str(counts), validate=True), 8 * len(item_ids) + 1)
            chosen = np.frombuffer(plain, "<i8").astype(np.int64)
        except (ValueError, zlib.error) as error:
            raise DataError(f"the model folder's counts cannot be read ({error})") from error
        if len(chosen) != len(item_ids) or (chosen < 0).any():
            raise DataError(f"the model folder has {len(item_ids)} items, and {len(chosen)} counts")
        return cls(Columns(**columns), item_ids, chosen)
