"""What scores a catalogue for histories: by the items' numbers, or by their texts."""

from __future__ import annotations

from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from manyheads.core.errors import DataError, UsageError
from manyheads.recsys.item_table import ItemTable, read_items
from manyheads.recsys.models.bert4rec import BERT4Rec
from manyheads.recsys.models.encoder import Items, Packed
from manyheads.recsys.models.recformer import Recformer, unit
from manyheads.recsys.models.sasrec import SASRec
from manyheads.recsys.text_encoding import encode, place_items
from manyheads.recsys.text_preprocessing import TextPreprocessing
from manyheads.recsys.texts import ItemTexts
from manyheads.recsys.vocabulary import Vocabulary


class Scorer(Protocol):
    """Scores items for histories: `queries @ items.weight.T + items.bias`, in float32."""

    @property
    def ids(self) -> Vocabulary:
        """The items."""

    @property
    def device(self) -> torch.device:
        """Where histories are wanted."""

    def check(self) -> None:
        """Refuse what nothing can be scored with."""

    def queries(self, histories: Packed) -> Tensor:
        """What stands for histories, `[B, H]`."""

    def items(self) -> Items:
        """What queries are compared with."""


class ByNumber:
    """A model that has learned each item.

    Args:
        model: A BERT4Rec or a SASRec.
        ids: Its items.
    """

    def __init__(self, model: BERT4Rec | SASRec, ids: Vocabulary) -> None:
        self.model, self.ids = model, ids

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.model.items().weight.device

    def check(self) -> None:
        """Nothing is missing."""

    def queries(self, histories: Packed) -> Tensor:
        """Read histories."""
        return self.model.queries(histories).float()

    def items(self) -> Items:
        """Return the model's items."""
        weight, bias = self.model.items()
        return Items(weight.float(), None if bias is None else bias.float())


class ByText:
    """A model that reads items: those of its table, and new ones, which are encoded once.

    Args:
        model: A Recformer with a table.
        known: The items of its table.
        kept: What its folder says of texts.
        path: A table of items, of whatever has new ones; empty for none. What a known item is, the folder
            says, if it keeps that.

    Raises:
        DataError: The table cannot be read, or lacks an attribute that the model was trained on.
        UsageError: There is no such table.
    """

    def __init__(self, model: Recformer, known: Vocabulary, kept: TextPreprocessing, path: str = "") -> None:
        self.model, self.known, self.kept, self.path = model, known, kept, path
        self.table = ItemTable(kept.cut.attributes, {})
        if path:
            self.table = read_items(path, kept.cut.item, kept.cut.attributes)
        self.new = [id for id in self.table.items if id not in known]
        self.ids = Vocabulary([*known.ids, *self.new])

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.model.items().weight.device

    def check(self) -> None:
        """Look whether all texts are at hand.

        Raises:
            UsageError: The folder keeps none, and no table was named.
            DataError: The table that was named lacks some.
        """
        if self.kept.items is not None:
            return
        if not self.path:
            raise UsageError("this model folder keeps no texts of its items: name their table with --items")
        gone = [id for id in self.known.ids if id not in self.table.items]
        if gone:
            raise DataError(f"{self.path} has no text of {len(gone)} items of the model, such as {gone[0]!r}")

    @cached_property
    def texts(self) -> ItemTexts:
        """Texts of all items, the new ones last."""
        self.check()
        new = self.kept.texts([self.table.items[id] for id in self.new])
        known = self.kept.items
        if known is None:
            known = self.kept.texts([self.table.items[id] for id in self.known.ids])
        return ItemTexts.join([known, new]).to(self.device)

    @cached_property
    def _weight(self) -> Tensor:
        weight = self.model.items().weight.float()
        if not self.new:
            return weight
        numbers = torch.arange(len(self.ids), device=self.device)
        known, new = (self.texts.select(each) for each in numbers.tensor_split([len(self.known)]))
        places = place_items(self.model, known, new, self.kept.cut.max_tokens)
        return torch.cat([weight, places / self.model.temperature])

    def queries(self, histories: Packed) -> Tensor:
        """Read histories."""
        cut = self.kept.cut
        return unit(encode(self.model, self.texts, histories, cut.max_items, cut.max_tokens))

    def items(self) -> Items:
        """Return the table, and the new items behind it."""
        return Items(self._weight)
