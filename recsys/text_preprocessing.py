"""What a model folder keeps of texts: the vocabulary, how items are cut, and the catalogue's own texts."""

from __future__ import annotations

import base64
import logging
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields

import numpy as np
import torch
from torch import Tensor

from manyheads.core.errors import DataError
from manyheads.recsys.item_table import Item
from manyheads.recsys.models.text_encoder import TextSizes
from manyheads.recsys.texts import ItemTexts, TextTokens, item_texts

log = logging.getLogger(__name__)
MOST_KEPT = 4 << 20  # characters of texts in a config, which must stay small
MOST_BYTES = 1 << 28  # of them unpacked: a config is data of others


@dataclass(frozen=True)
class TextCut:
    """How items and histories become texts.

    Args:
        item: A table's column of ids.
        attributes: Its columns that are text, in order.
        max_attributes: Of an item: the first that it has.
        max_attribute_tokens: Of an attribute, its name among them.
        max_items: Of a history, the newest.
        max_tokens: Of a text.
    """

    item: str
    attributes: tuple[str, ...]
    max_attributes: int
    max_attribute_tokens: int
    max_items: int
    max_tokens: int


@dataclass(frozen=True)
class TextPreprocessing:
    """What prediction must repeat of training, of texts.

    Args:
        tokens: The vocabulary.
        cut: How items become texts.
        items: Of the catalogue, in the order of the model's items; None where they were too many to keep.
    """

    tokens: TextTokens
    cut: TextCut
    items: ItemTexts | None

    def check(self, sizes: TextSizes) -> None:
        """Look whether a model has room for such texts.

        Raises:
            DataError: It has not.
        """
        for name, found, room in (
            ("tokens of the vocabulary", len(self.tokens), sizes.vocab_size),
            ("items of a history", self.cut.max_items, sizes.max_items),
            ("tokens of a text", self.cut.max_tokens, sizes.max_tokens),
        ):
            if found > room:
                raise DataError(f"the model folder has {found} {name}, its model {room}")

    def texts(self, items: Sequence[Item]) -> ItemTexts:
        """Cut items into tokens.

        Raises:
            DataError: One has no text.
        """
        return item_texts(self.tokens, items, self.cut.max_attributes, self.cut.max_attribute_tokens)

    def to_json(self) -> dict[str, object]:
        """Return plain JSON."""
        packed = None if self.items is None else [_pack(x) for x in self.items]
        if packed is not None and sum(map(len, packed)) > MOST_KEPT:
            log.warning(
                "the texts of %d items are too long for a model folder: predict with --items, which names "
                "their table",
                len(self.items or ()),
            )
            packed = None
        cut = asdict(self.cut) | {"attributes": list(self.cut.attributes)}
        return {"tokens": self.tokens.packed(), "texts": cut, "item_texts": packed}

    @classmethod
    def from_json(cls, found: Mapping[str, object], items: int) -> TextPreprocessing:
        """Read what `to_json` wrote.

        Args:
            found: A folder's preprocessing.
            items: Of the catalogue.

        Raises:
            DataError: It is not that.
        """
        try:
            tokens, cut, packed = (found[key] for key in ("tokens", "texts", "item_texts"))
        except KeyError as error:
            raise DataError(f"the model folder's preprocessing lacks {error}") from error
        vocabulary = TextTokens.from_packed(tokens)
        texts = None if packed is None else _unpack(packed)
        if texts is not None and len(texts) != items:
            raise DataError(f"the model folder has {items} items, and texts of {len(texts)}")
        if texts is not None and len(texts.ids) and int(texts.ids.max()) >= len(vocabulary):
            raise DataError("the model folder's texts have tokens that its vocabulary has not")
        return cls(vocabulary, _check_cut(cut), texts)


def _check_cut(found: object) -> TextCut:
    names = {field.name for field in fields(TextCut)}
    if not isinstance(found, dict) or set(found) != names:
        raise DataError(f"the model folder's texts are not told by {', '.join(sorted(names))}")
    attributes = found["attributes"]
    good = isinstance(attributes, list) and all(isinstance(name, str) for name in attributes)
    numbers = [value for name, value in found.items() if name.startswith("max_")]
    if not good or not isinstance(found["item"], str) or not all(type(n) is int and n > 0 for n in numbers):
        raise DataError("the model folder's texts are told by columns, and by numbers above 0")
    return TextCut(**{**found, "attributes": tuple(attributes)})


def _pack(x: Tensor) -> str:
    plain = x.numpy().astype(x.numpy().dtype.newbyteorder("<")).tobytes()
    return base64.b64encode(zlib.compress(plain, 9)).decode()


def _unpack(packed: object) -> ItemTexts:
    """Read the three arrays of texts, and look whether they belong together."""
    if not isinstance(packed, list) or len(packed) != len(ItemTexts._fields):
        raise DataError("the model folder's texts are not three arrays")
    found = []
    try:
        for text, kind in zip(packed, ("<i4", "<i1", "<i8"), strict=True):
            unpack = zlib.decompressobj()
            plain = unpack.decompress(base64.b64decode(str(text), validate=True), MOST_BYTES)
            if not unpack.eof:
                raise DataError("the model folder's texts are cut off, or too long")
            native = np.dtype(kind).newbyteorder("=")
            found.append(torch.from_numpy(np.frombuffer(plain, kind).astype(native)))
    except (ValueError, zlib.error) as error:
        raise DataError(f"the model folder's texts cannot be read ({error})") from error
    texts = ItemTexts(*found)
    edges = texts.starts
    fits = len(edges) > 0 and int(edges[0]) == 0 and bool((texts.lengths > 0).all())
    if not fits or int(edges[-1]) != len(texts.ids) or len(texts.ids) != len(texts.types):
        raise DataError("the model folder's texts do not belong together")
    if len(texts.ids) and (
        int(texts.ids.min()) < 0 or not bool(((texts.types >= 0) & (texts.types < 4)).all())
    ):
        raise DataError("the model folder's texts have tokens that are none")
    return texts
