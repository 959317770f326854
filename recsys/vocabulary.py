"""Ids of users or items, and their numbers: dense, from 0, and never changed once given."""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from manyheads.core.errors import DataError

UNKNOWN = -1
MOST_BYTES = 1 << 30  # of ids, unpacked: a config is data of others


class Vocabulary:
    """Ids in the order of their numbers. It grows at its end only.

    Ids are text; a whole number is its decimal digits.

    Args:
        ids: The first ids.

    Raises:
        DataError: An id comes twice.
    """

    def __init__(self, ids: Iterable[str] = ()) -> None:
        self.ids = list(ids)
        self._numbers = {id: number for number, id in enumerate(self.ids)}
        if len(self._numbers) != len(self.ids):
            raise DataError("an id comes twice in a vocabulary")

    def __len__(self) -> int:
        return len(self.ids)

    def __contains__(self, id: object) -> bool:
        return id in self._numbers

    def numbers(self, ids: Sequence[str]) -> NDArray[np.int64]:
        """Return the numbers of ids; `UNKNOWN` for one that is not here."""
        get = self._numbers.get
        return np.fromiter((get(id, UNKNOWN) for id in ids), np.int64, len(ids))

    def add(self, ids: Sequence[str]) -> NDArray[np.int64]:
        """Return the numbers of ids, giving the next ones to those that are new."""
        known, listed = self._numbers, self.ids
        found = np.empty(len(ids), np.int64)
        for place, id in enumerate(ids):
            number = known.get(id)
            if number is None:
                number = known[id] = len(listed)
                listed.append(id)
            found[place] = number
        return found

    def copy(self) -> Vocabulary:
        """Return one that can grow by itself."""
        return Vocabulary(self.ids)

    def select(self, numbers: NDArray[np.integer]) -> Vocabulary:
        """Return the vocabulary of these, numbered anew in this order."""
        return Vocabulary([self.ids[number] for number in numbers.tolist()])

    def to_json(self) -> str:
        """Return text for a model folder: a JSON list, packed, for a config must be small."""
        packed = zlib.compress(json.dumps(self.ids, separators=(",", ":")).encode(), 9)
        return base64.b64encode(packed).decode()

    @classmethod
    def from_json(cls, text: object) -> Vocabulary:
        """Read what `to_json` wrote.

        Raises:
            DataError: It is not that.
        """
        try:
            unpack = zlib.decompressobj()
            plain = unpack.decompress(base64.b64decode(str(text), validate=True), MOST_BYTES)
            ids = json.loads(plain)
        except (ValueError, zlib.error) as error:
            raise DataError(f"the model folder's list of ids cannot be read ({error})") from error
        if not unpack.eof or not isinstance(ids, list) or not all(isinstance(id, str) for id in ids):
            raise DataError("the model folder's list of ids is no list of text")
        return cls(ids)
