"""The units that a recogniser writes: characters, words, or pieces of words with `@@` where they go on.

Text becomes tokens by characters, or by a `seg_dict` that spells each word in pieces; tokens become text with
spaces between words and none between Chinese characters.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from manyheads.core.errors import DataError

BLANK, START, END = 0, 1, 2  # ids of the published lists' first three
SPECIAL = ("<blank>", "<s>", "</s>", "<unk>", "<OOV>")
MORE = "@@"  # ends a piece that the next goes on
_SPELLED = re.compile(r"[\u4E00-\u9FA5A-Za-z0-9]")  # spelled by characters where seg_dict lacks the word
_CHINESE = re.compile(r"[\u4E00-\u9FFF\u3400-\u4DBF\uF900-\uFAFF]")

Span = tuple[int, int]  # start and end, in milliseconds


class Tokens:
    """A list of tokens, and how text is cut into them.

    Args:
        names: The tokens, in the order of their ids.
        spelling: The pieces of each word, in lower case; None means characters.

    Raises:
        DataError: A token is there twice, or one that a spelling uses is not there.
    """

    def __init__(self, names: Sequence[str], spelling: Mapping[str, tuple[str, ...]] | None = None) -> None:
        self.names = tuple(names)
        self.numbers = {name: number for number, name in enumerate(self.names)}
        if len(self.numbers) != len(self.names):
            twice = next(name for number, name in enumerate(self.names) if self.numbers[name] != number)
            raise DataError(f"tokens: {twice!r} is there twice")
        self.unknown = self.numbers.get("<unk>")
        self.spelling = None if spelling is None else dict(spelling)

    def __len__(self) -> int:
        return len(self.names)

    def ids(self, text: str) -> list[int]:
        """Cut text into tokens; what the list does not have becomes <unk>.

        Raises:
            DataError: The list lacks a token and has no <unk>.
        """
        found = []
        for piece in self.pieces(text):
            number = self.numbers.get(piece, self.unknown)
            if number is None:
                raise DataError(f"tokens: {piece!r} is not in the list, which has no <unk>")
            found.append(number)
        return found

    def pieces(self, text: str) -> list[str]:
        """Cut text into pieces: every character but spaces, or as the spelling has each word."""
        if self.spelling is None:
            return [character for character in text if not character.isspace()]
        found: list[str] = []
        for word in text.lower().split():
            if word in self.spelling:
                found += self.spelling[word]
            elif _SPELLED.match(word):
                for character in word:
                    found += self.spelling.get(character, ("<unk>",))
            else:
                found.append("<unk>")
        return found

    def text(self, ids: Iterable[int]) -> str:
        """Write ids as text.

        Raises:
            DataError: An id is not one of the list's.
        """
        return join(self.tokens(ids))

    def words(self, ids: Iterable[int], spans: Sequence[Span] | None = None) -> list[tuple[str, Span]]:
        """Put ids together to words, as the function `words` does.

        Raises:
            DataError: An id is not one of the list's.
            ValueError: There are not as many spans as ids.
        """
        return words(self.tokens(ids), spans)

    def tokens(self, ids: Iterable[int]) -> list[str]:
        """Name ids.

        Raises:
            DataError: An id is not one of the list's.
        """
        found = []
        for number in ids:
            if not 0 <= number < len(self.names):
                raise DataError(f"tokens: {number} is no id of a list of {len(self.names)}")
            found.append(self.names[number])
        return found


def words(tokens: Sequence[str], spans: Sequence[Span] | None = None) -> list[tuple[str, Span]]:
    """Put pieces together to words, with the time from the first piece's start to the last one's end.

    Special tokens are left out. Without spans all times are 0.

    Raises:
        ValueError: There are not as many spans as tokens.
    """
    times = [(0, 0)] * len(tokens) if spans is None else list(spans)
    found: list[tuple[str, Span]] = []
    part, begin = "", 0
    for token, (start, end) in zip(tokens, times, strict=True):
        if token in SPECIAL:
            continue
        begin = begin if part else start
        part += token.removesuffix(MORE)
        if not token.endswith(MORE):
            found.append((part, (begin, end)))
            part = ""
        last = end
    if part:
        found.append((part, (begin, last)))
    return found


def join(tokens: Sequence[str]) -> str:
    """Write tokens as text: words apart, Chinese characters together.

    Example:
        >>> join(["你", "好", "hel@@", "lo", "world", "</s>"])
        '你好hello world'
    """
    text, chinese = "", True
    for word, _ in words(tokens):
        this = _CHINESE.match(word) is not None
        text += word if chinese or this else f" {word}"
        chinese = this
    return text


def read_tokens(folder: Path) -> Tokens:
    """Read the list of a published folder: `tokens.json` or `tokens.txt`, and `seg_dict` if it is there.

    Raises:
        DataError: A file is missing or cannot be used.
    """
    listed, lines = folder / "tokens.json", folder / "tokens.txt"
    if listed.is_file():
        names = _read_json(listed)
    elif lines.is_file():
        names = [line.split()[0] for line in _read(lines).splitlines() if line.strip()]
    else:
        raise DataError(f"{folder} has neither tokens.json nor tokens.txt")
    spelled = folder / "seg_dict"
    return Tokens(names, read_spelling(spelled) if spelled.is_file() else None)


def read_spelling(path: Path) -> dict[str, tuple[str, ...]]:
    """Read a `seg_dict`: on each line a word, then its pieces.

    Raises:
        DataError: The file cannot be read, or a line has a word alone.
    """
    found = {}
    for number, line in enumerate(_read(path).splitlines(), 1):
        word, *pieces = line.split() or [""]
        if not word:
            continue
        if not pieces:
            raise DataError(f"{path}, line {number}: {word!r} has no pieces")
        found[word] = tuple(pieces)
    return found


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read ({error})") from error


def _read_json(path: Path) -> list[str]:
    try:
        names = json.loads(_read(path))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is no JSON ({error})") from error
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise DataError(f"{path} is no list of tokens")
    return names
