"""Names of pictures: of a record's id, safe as a file's name, and no two the same."""

from __future__ import annotations

import re
from itertools import chain, count
from pathlib import Path


def picture_name(name: str, taken: set[str]) -> str:
    """Return a file name for the picture of a record, none of those taken, which it joins."""
    plain = re.sub(r"[^\w.-]+", "_", re.sub(r"\.\w{1,5}$", "", name))
    last = re.sub(r"\.\w{1,5}$", "", re.sub(r"[^\w.-]+", "_", Path(name).name))
    stems = [stem.strip("._")[-120:] or "image" for stem in (last, plain)]  # the whole id if need be
    numbered = (f"{stems[1]}-{number}" for number in count(2))
    found = next(f"{stem}.png" for stem in chain(stems, numbered) if f"{stem}.png" not in taken)
    taken.add(found)
    return found
