"""Items as text: tokens of their attributes, cut once, and histories of items put together from them.

Recformer reads an item as the tokens of its attributes' names and values, and a history as its items, newest
first (Li et al. 2023, arXiv 2305.13731).
"""

from __future__ import annotations

import base64
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from manyheads.core.errors import DataError, UsageError
from manyheads.recsys.masking import newest
from manyheads.recsys.models.encoder import FIRST, Packed, starts_of

if TYPE_CHECKING:
    from tokenizers import Tokenizer

START, PAD, MASK = "<s>", "<pad>", "<mask>"
SPECIAL = (START, PAD, "</s>", "<unk>", MASK)
START_ID, PAD_ID = 0, 1  # as in every vocabulary of this family
NAME, VALUE, PAD_TYPE = 1, 2, 3  # token types; that of <s> is 0
MOST_BYTES = 1 << 26  # of a vocabulary, unpacked: a config is data of others


class TextBatch(NamedTuple):
    """Texts of histories, or of single items.

    Args:
        input_ids: Tokens, <s> first.
        token_type_ids: 0 for <s>, 1 in a name, 2 in a value, 3 for a pad.
        item_position_ids: 0 for <s>, 1 in the newest item, and so on; of a pad the last that there is.

    Shape:
        `[B, N]`.
    """

    input_ids: Tensor
    token_type_ids: Tensor
    item_position_ids: Tensor

    @property
    def real(self) -> Tensor:
        """True where there is no pad."""
        return self.input_ids != PAD_ID

    def to(self, device: torch.device | str) -> TextBatch:
        """Return it on a device."""
        return TextBatch(*(x.to(device) for x in self))


class ItemTexts(NamedTuple):
    """Tokens of all items, one behind the other.

    Shape:
        ids `[total]`, int32; types `[total]`, int8; starts `[items + 1]`, int64.
    """

    ids: Tensor
    types: Tensor
    starts: Tensor

    def __len__(self) -> int:
        return len(self.starts) - 1

    @property
    def lengths(self) -> Tensor:
        """Tokens of each item."""
        return self.starts.diff()

    def to(self, device: torch.device | str) -> ItemTexts:
        """Return them on a device."""
        return ItemTexts(*(x.to(device) for x in self))

    def select(self, items: Tensor) -> ItemTexts:
        """Return the texts of these numbers, in this order."""
        lengths = self.lengths[items]
        starts = starts_of(lengths).long()
        which = torch.repeat_interleave(lengths)
        source = torch.arange(len(which), device=which.device) + (self.starts[items] - starts[:-1])[which]
        return ItemTexts(self.ids[source], self.types[source], starts)

    @classmethod
    def join(cls, parts: Sequence[ItemTexts]) -> ItemTexts:
        """Return the items of all, in order."""
        lengths = torch.cat([part.lengths for part in parts])
        ids, types = (torch.cat([getattr(part, name) for part in parts]) for name in ("ids", "types"))
        return cls(ids, types, starts_of(lengths).long())


class TextTokens:
    """A byte-level vocabulary of pieces of words, as RoBERTa's and Longformer's.

    Args:
        tokenizer: With the tokens of `SPECIAL`, <s> and <pad> the first two.

    Raises:
        DataError: It lacks one of those, or they have other ids.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        for token in SPECIAL:
            if tokenizer.token_to_id(token) is None:
                raise DataError(f"the vocabulary has no {token}")
        if (tokenizer.token_to_id(START), tokenizer.token_to_id(PAD)) != (START_ID, PAD_ID):
            raise DataError(f"the vocabulary's first two tokens are not {START} and {PAD}")
        tokenizer.no_padding()
        tokenizer.no_truncation()
        tokenizer.encode_special_tokens = True  # a title with "<pad>" in it is a title
        self.tokenizer = tokenizer

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int = 8192) -> TextTokens:
        """Find the pieces that texts are made of; the same for the same texts.

        Args:
            texts: Names and values of attributes.
            vocab_size: Tokens at most: the 256 bytes and five special ones among them.

        Raises:
            UsageError: `vocab_size` has no room for those.
        """
        from tokenizers import Tokenizer, models, trainers

        least = 256 + len(SPECIAL)
        if vocab_size < least:
            raise UsageError(f"a vocabulary has at least {least} tokens, not {vocab_size}")
        tokenizer = Tokenizer(models.BPE())
        _make_byte_level(tokenizer)
        tokenizer.train_from_iterator(
            texts,
            trainers.BpeTrainer(
                vocab_size=vocab_size,
                special_tokens=list(SPECIAL),
                initial_alphabet=sorted(_byte_alphabet()),
                show_progress=False,
            ),
        )
        return cls(tokenizer)

    @classmethod
    def read(cls, path: Path) -> TextTokens:
        """Read a `tokenizer.json`, or a folder with that or with `vocab.json` and `merges.txt`.

        Raises:
            DataError: A file is missing or cannot be used.
        """
        from tokenizers import Tokenizer, models

        whole = path / "tokenizer.json" if path.is_dir() else path
        try:
            if whole.is_file():
                return cls(Tokenizer.from_file(str(whole)))
            model = models.BPE.from_file(str(path / "vocab.json"), str(path / "merges.txt"))
        except DataError:
            raise
        except Exception as error:  # tokenizers has no exception of its own
            raise DataError(f"{path} holds no vocabulary that can be read ({error})") from error
        tokenizer = Tokenizer(model)
        _make_byte_level(tokenizer)
        tokenizer.add_special_tokens([token for token in SPECIAL if model.token_to_id(token) is not None])
        return cls(tokenizer)

    def to_json(self) -> str:
        """Return all of it as text."""
        return self.tokenizer.to_str()

    @classmethod
    def from_json(cls, text: str) -> TextTokens:
        """Read what `to_json` wrote.

        Raises:
            DataError: It is not that.
        """
        from tokenizers import Tokenizer

        try:
            return cls(Tokenizer.from_str(text))
        except DataError:
            raise
        except Exception as error:
            raise DataError(f"this is no vocabulary ({error})") from error

    def packed(self) -> str:
        """Return all of it, packed, for a model folder's config."""
        return base64.b64encode(zlib.compress(self.to_json().encode(), 9)).decode()

    @classmethod
    def from_packed(cls, text: object) -> TextTokens:
        """Read what `packed` wrote.

        Raises:
            DataError: It is not that.
        """
        try:
            unpack = zlib.decompressobj()
            plain = unpack.decompress(base64.b64decode(str(text), validate=True), MOST_BYTES).decode()
        except (ValueError, zlib.error) as error:
            raise DataError(f"the model folder's vocabulary of texts cannot be read ({error})") from error
        if not unpack.eof:
            raise DataError("the model folder's vocabulary of texts is cut off, or too large")
        return cls.from_json(plain)

    def __len__(self) -> int:
        return self.tokenizer.get_vocab_size()

    @property
    def mask_id(self) -> int:
        """The id of <mask>."""
        found = self.tokenizer.token_to_id(MASK)
        assert found is not None  # looked for when this was made
        return found

    def names(self) -> list[str]:
        """Return the tokens in the order of their ids."""
        found = self.tokenizer.get_vocab()
        return sorted(found, key=found.__getitem__)

    def ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Cut texts into tokens, without any before or behind them."""
        cut = self.tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [each.ids for each in cut]


def _make_byte_level(tokenizer: Tokenizer) -> None:
    from tokenizers import decoders, pre_tokenizers

    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()


def _byte_alphabet() -> list[str]:
    from tokenizers import pre_tokenizers

    return pre_tokenizers.ByteLevel.alphabet()


def item_texts(
    tokens: TextTokens,
    items: Sequence[Mapping[str, str | None]],
    max_attributes: int = 3,
    max_attribute_tokens: int = 32,
) -> ItemTexts:
    """Cut items into tokens: of each its first attributes, of each of these the name and then the value.

    Args:
        tokens: The vocabulary.
        items: Attributes of each item by name; one whose value is None is left out, as if it were not there.
        max_attributes: Of an item.
        max_attribute_tokens: Of an attribute, its name among them.

    Raises:
        DataError: An item has no text.
    """
    kept = [
        [(name, value) for name, value in item.items() if value is not None][:max_attributes]
        for item in items
    ]
    texts = [text for item in kept for pair in item for text in pair]
    known = list(dict.fromkeys(texts))
    cut = dict(zip(known, tokens.ids(known), strict=True))
    ids: list[int] = []
    types: list[int] = []
    lengths: list[int] = []
    for number, item in enumerate(kept):
        before = len(ids)
        for name, value in item:
            named, valued = cut[name], cut[value]
            ids += (named + valued)[:max_attribute_tokens]
            types += ([NAME] * len(named) + [VALUE] * len(valued))[:max_attribute_tokens]
        lengths.append(len(ids) - before)
        if not lengths[-1]:
            raise DataError(f"item {number} has no text")
    return ItemTexts(
        torch.tensor(ids, dtype=torch.int32),
        torch.tensor(types, dtype=torch.int8),
        starts_of(torch.tensor(lengths, dtype=torch.int64)).long(),
    )


def text_batch(items: ItemTexts, histories: Packed, max_items: int = 50, max_tokens: int = 1024) -> TextBatch:
    """Put histories together as texts, newest item first.

    Args:
        items: The catalogue's tokens.
        histories: In order of time, as BERT4Rec takes them: n + 1 is item number n. A history may be empty,
            or a single item.
        max_items: The newest of a history that are read; the model has as many item positions.
        max_tokens: Of a text, <s> among them; the last item may be cut.
    """
    kept = newest(histories, max_items)
    rows, device = kept.rows(), kept.tokens.device
    backwards = (kept.starts[1:] + kept.starts[:-1])[rows] - 1 - torch.arange(len(rows), device=device)
    numbers = kept.tokens[backwards].long() - FIRST
    lengths = items.lengths[numbers]
    begins = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])  # of occurrences, in all texts put together
    before = begins[:-1] - begins[kept.starts[:-1].long()][rows]  # tokens of the same text
    which = torch.repeat_interleave(lengths)  # token -> occurrence
    within = torch.arange(len(which), device=device) - begins[which]
    column = 1 + before[which] + within
    totals = 1 + begins[kept.starts[1:].long()] - begins[kept.starts[:-1].long()]
    size = (len(totals), int(totals.clamp(max=max_tokens).max()) if len(totals) else 1)
    inside = column < max_tokens
    which, column = which[inside], column[inside]
    source, place = items.starts[numbers[which]] + within[inside], (rows[which], column)
    found = []
    for start, pad, values in (
        (START_ID, PAD_ID, items.ids[source]),
        (0, PAD_TYPE, items.types[source]),
        (0, max_items, kept.places()[which] + 1),
    ):
        filled = torch.full(size, pad, dtype=torch.int64, device=device)
        filled[:, 0] = start
        filled[place] = values.long()
        found.append(filled)
    return TextBatch(*found)
