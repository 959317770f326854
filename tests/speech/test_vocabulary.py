"""Units: characters and pieces of words, on real sentences; what a model folder says of them."""

import csv
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from manyheads.core.errors import DataError, UsageError
from manyheads.speech.recognition.preprocessing import Features, Preprocessing
from manyheads.speech.tokens import Tokens
from manyheads.speech.vocabulary import FIRST, Characters, Pieces, Vocabulary

DATA = os.environ.get("MANYHEADS_DATA")
needs_data = pytest.mark.skipif(not DATA, reason="MANYHEADS_DATA names no folder of shared data")


@pytest.fixture(scope="module")
def sentences() -> list[str]:
    """LJ Speech's first."""
    table = Path(str(DATA)) / "speech" / "ljspeech_samples" / "metadata.csv"
    with table.open(encoding="utf-8") as file:
        return [row["text"] for row in csv.DictReader(file)]


def test_digits_have_no_spaces() -> None:
    digits = Characters.of(["42", "0123456789"])
    assert digits.names == (*FIRST, *"0123456789")
    assert digits.ids("4 2") == [8, 6]
    assert digits.text([1, 8, 6, 2, 0]) == "42"
    assert digits.ids("4x") == [8, 3]
    assert digits.words([8, 6], [(0, 90), (120, 200)]) == [("4", (0, 90)), ("2", (120, 200))]


@needs_data
@pytest.mark.parametrize("make", [Characters.of, lambda texts: Pieces.train(texts, 200)])
def test_text_comes_back(make: Callable[[list[str]], Vocabulary], sentences: list[str]) -> None:
    units = make(sentences)
    assert units.names[:4] == FIRST
    for text in sentences:
        ids = units.ids(text)
        assert min(ids) > 3
        assert units.text([1, *ids, 2]) == text
        assert [word for word, _ in units.words(ids)] == text.split()


@needs_data
def test_words_have_their_units_times(sentences: list[str]) -> None:
    units = Pieces.train(sentences, 200)
    ids = units.ids("the press-man")
    spans = [(10 * i, 10 * i + 5) for i in range(len(ids))]
    (first, (a, b)), (second, (c, d)) = units.words(ids, spans)
    assert (first, second) == ("the", "press-man")
    assert (a, d) == (0, spans[-1][1])
    assert b < c
    with pytest.raises(ValueError, match="zip"):
        units.words(ids, spans[1:])


@needs_data
def test_pieces_of_another_models_ids(sentences: list[str], tmp_path: Path) -> None:
    """A model with the library's own ids: unknown 0, start 1, end 2."""
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences), model_prefix=str(tmp_path / "m"), vocab_size=150, minloglevel=2
    )
    units = Pieces.load((tmp_path / "m.model").read_bytes())
    assert len(units) == 150 - 3 + 4
    assert units.text(units.ids(sentences[0])) == sentences[0]
    assert units.ids("ю")[-1] == 3


@needs_data
@pytest.mark.parametrize(("size", "says"), [(9, "9 pieces"), (5000, "5000 pieces")])
def test_sizes_that_cannot_be(sentences: list[str], size: int, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        Pieces.train(sentences, size)


def test_what_is_no_model_or_no_text() -> None:
    with pytest.raises(DataError, match="no sentencepiece model"):
        Pieces.load(b"not a model")
    with pytest.raises(DataError, match="no character"):
        Characters.of(["", " "])


def folder(units: Vocabulary) -> Preprocessing:
    cmvn = torch.randn(2, 80)
    return Preprocessing.of(8000, Features(mels=20, stack=4, stride=3), cmvn, units)


@needs_data
def test_a_folder_says_all_of_it(sentences: list[str]) -> None:
    published = Tokens(("<blank>", "<s>", "</s>", "a@@", "b", "<unk>"), {"ab": ("a@@", "b")})
    samples = torch.randn(4000) * 0.1
    for units in (Characters.of(sentences), Pieces.train(sentences, 150), published):
        made = folder(units)
        read = Preprocessing.from_json(json.loads(json.dumps(made.to_json())))
        assert read == made
        assert read.tokens().names == units.names
        assert read.tokens().ids("ab the") == units.ids("ab the")
        assert read.front_end()(samples).equal(made.front_end()(samples))
        assert read.front_end().row_ms == 30


def change(path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def apply(saved: dict[str, Any]) -> None:
        *parents, last = path.split(".")
        for name in parents:
            saved = saved[name]
        saved[last] = value

    return apply


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("sample_rate", 8000.5),
        ("sample_rate", 1e9),
        ("sample_rate", True),
        ("front_end", None),
        ("front_end.stride", 0),
        ("front_end.mels", 21),
        ("front_end.hop_ms", "10"),
        ("front_end.more", 1),
        ("cmvn", [[0.0] * 80]),
        ("cmvn", [[0.0] * 80, [float("inf")] * 80]),
        ("tokens.kind", "words"),
        ("tokens.names", ["a", "b", "c", 4]),
        ("tokens.names", ["a", "b", "c", "c"]),
        ("tokens.model", "AAAA"),
        ("tokens.spelling", {"a": ["b"]}),
    ],
)
def test_a_folder_is_data_from_elsewhere(path: str, value: object) -> None:
    saved: dict[str, Any] = folder(Characters.of(["abc"])).to_json()
    Preprocessing.from_json(saved)
    change(path, value)(saved)
    with pytest.raises(DataError, match=r"preprocessing: |tokens: "):
        Preprocessing.from_json(saved)
