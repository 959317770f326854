"""A recogniser's units beside the published lists: characters, and sentencepiece's pieces of words.

All begin with blank, start and end, as the model expects. Source of the pieces: Kudo and Richardson 2018
(arXiv 1808.06226), by the sentencepiece library.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from typing import Protocol

from manyheads.core.errors import DataError, UsageError
from manyheads.speech.tokens import SPECIAL, Span, Tokens

FIRST = ("<blank>", "<s>", "</s>", "<unk>")
SPACE = "<space>"
_BEGINS = "\u2581"  # sentencepiece's mark of a word's first piece

Timed = list[tuple[str, Span]]  # words, with start and end in milliseconds


class Vocabulary(Protocol):
    """What all lists of units offer."""

    @property
    def names(self) -> tuple[str, ...]:
        """The units, in the order of their ids."""

    def __len__(self) -> int: ...

    def ids(self, text: str) -> list[int]:
        """Cut text into units."""

    def text(self, ids: Iterable[int]) -> str:
        """Write units as text."""

    def words(self, ids: Iterable[int], spans: Sequence[Span] | None = None) -> Timed:
        """Put units together to words, with the time from the first unit's start to the last one's end."""


class Characters:
    """Every character a unit; a space too, if the list has `<space>`, else spaces are lost.

    Args:
        names: The units, in the order of their ids.

    Example:
        >>> digits = Characters((*FIRST, *"0123456789"))
        >>> digits.ids("4 2"), digits.text([8, 6])
        ([8, 6], '42')
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(names)
        self._listed = Tokens(self.names)
        self.spaced = SPACE in self._listed.numbers

    @classmethod
    def of(cls, texts: Iterable[str]) -> Characters:
        """The list of all characters of some texts, in the order of their code points.

        Raises:
            DataError: The texts have none.
        """
        found = {SPACE if each.isspace() else each for text in texts for each in text.strip()}
        if not found - {SPACE}:
            raise DataError("tokens: the texts have no character")
        return cls((*FIRST, *sorted(found & {SPACE}), *sorted(found - {SPACE})))

    def __len__(self) -> int:
        return len(self.names)

    def ids(self, text: str) -> list[int]:
        """Cut text into characters; what the list does not have becomes <unk>.

        Raises:
            DataError: The list lacks a character and has no <unk>.
        """
        numbers, unknown = self._listed.numbers, self._listed.unknown
        parts = text.split()
        units = [unit for part in parts for unit in (*part, SPACE)][:-1] if self.spaced else "".join(parts)
        found = []
        for unit in units:
            number = numbers.get(unit, unknown)
            if number is None:
                raise DataError(f"tokens: {unit!r} is not in the list, which has no <unk>")
            found.append(number)
        return found

    def text(self, ids: Iterable[int]) -> str:
        """Write ids as text.

        Raises:
            DataError: An id is not one of the list's.
        """
        names = (name for name in self._listed.tokens(ids) if name not in SPECIAL)
        return "".join(" " if name == SPACE else name for name in names).strip()

    def words(self, ids: Iterable[int], spans: Sequence[Span] | None = None) -> Timed:
        """What stands between spaces; without spaces every character is a word.

        Raises:
            DataError: An id is not one of the list's.
            ValueError: There are not as many spans as ids.
        """
        return _grouped(self._listed.tokens(ids), spans, self.spaced, ends=(SPACE,))


class Pieces:
    """Pieces of words, as a sentencepiece model cuts them.

    Args:
        names: The units, in the order of their ids: blank, start, end, <unk>, then the model's own pieces.
        model: The bytes of the sentencepiece model.

    Raises:
        DataError: The bytes are no such model, or the names are not its pieces.
    """

    def __init__(self, names: Sequence[str], model: bytes) -> None:
        import sentencepiece

        self.names, self.model = tuple(names), model
        self._listed = Tokens(self.names)
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except (RuntimeError, OSError) as error:
            raise DataError(f"tokens: no sentencepiece model ({error})") from error
        if self.names != _names_of(self._processor):
            raise DataError("tokens: the names are not the sentencepiece model's pieces")

    @classmethod
    def load(cls, model: bytes) -> Pieces:
        """The pieces of a sentencepiece model, whatever its own ids.

        Raises:
            DataError: The bytes are no such model.
        """
        import sentencepiece

        try:
            processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except (RuntimeError, OSError) as error:
            raise DataError(f"tokens: no sentencepiece model ({error})") from error
        return cls(_names_of(processor), model)

    @classmethod
    def train(cls, texts: Iterable[str], size: int, seed: int = 0) -> Pieces:
        """Find the pieces of some texts (unigram model), with the library's own normaliser.

        Args:
            size: Units, the first four among them.

        Raises:
            UsageError: The texts do not have that many pieces, or need more.
        """
        import sentencepiece

        sentencepiece.set_random_generator_seed(seed)
        written = io.BytesIO()
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(texts),
                model_writer=written,
                vocab_size=size,
                pad_id=0,
                bos_id=1,
                eos_id=2,
                unk_id=3,
                pad_piece=FIRST[0],
                character_coverage=1.0,
                num_threads=1,
                minloglevel=2,
            )
        except RuntimeError as error:
            why = str(error).rsplit("]", 1)[-1].strip() or str(error)
            raise UsageError(f"tokens: no {size} pieces can be found in these texts: {why}") from error
        return cls.load(written.getvalue())

    def __len__(self) -> int:
        return len(self.names)

    def ids(self, text: str) -> list[int]:
        """Cut text into pieces; what the model does not know becomes <unk>."""
        numbers = self._listed.numbers
        return [numbers.get(piece, 3) for piece in self._processor.encode(text, out_type=str)]

    def text(self, ids: Iterable[int]) -> str:
        """Write ids as text.

        Raises:
            DataError: An id is not one of the list's.
        """
        pieces = [name for name in self._listed.tokens(ids) if name not in SPECIAL]
        written: str = self._processor.decode_pieces(pieces)
        return written

    def words(self, ids: Iterable[int], spans: Sequence[Span] | None = None) -> Timed:
        """What begins with sentencepiece's mark of a word.

        Raises:
            DataError: An id is not one of the list's.
            ValueError: There are not as many spans as ids.
        """
        return _grouped(self._listed.tokens(ids), spans, True, begins=_BEGINS)


def _names_of(processor: object) -> tuple[str, ...]:
    """List a model's pieces behind the first four units; its own special ones are left out."""
    count: int = processor.get_piece_size()  # type: ignore[attr-defined]
    kept = (
        processor.id_to_piece(number)  # type: ignore[attr-defined]
        for number in range(count)
        if not processor.is_control(number) and not processor.is_unknown(number)  # type: ignore[attr-defined]
    )
    return (*FIRST, *kept)


def _grouped(
    units: Sequence[str],
    spans: Sequence[Span] | None,
    joined: bool,
    ends: tuple[str, ...] = (),
    begins: str | None = None,
) -> Timed:
    """Put units to words: until a unit of `ends`, which is dropped, or one that starts with `begins`."""
    times = [(0, 0)] * len(units) if spans is None else list(spans)
    found: Timed = []
    fresh = True
    for unit, (start, end) in zip(units, times, strict=True):
        if unit in SPECIAL:
            continue
        if unit in ends:
            fresh = True
            continue
        fresh = fresh or not joined or (begins is not None and unit.startswith(begins))
        part = unit if begins is None else unit.replace(begins, "")
        if fresh and part:
            found.append((part, (start, end)))
        elif part:
            word, (first, _) = found[-1]
            found[-1] = (word + part, (first, end))
        fresh = fresh and not part
    return found
