"""The front end and the tokens against the published front end's recorded numbers, and piece by piece."""

from __future__ import annotations

import json

import pytest
import torch

from manyheads.core.errors import DataError
from manyheads.speech.frontend import FrontEnd, parse_cmvn, read_cmvn, stack_frames
from manyheads.speech.tokens import Tokens, join, read_tokens, words

FBANK, FEATURES = 2e-3, 1e-3  # absolute, as the recorded case's notes ask for


def speech(golden):
    case = golden("speech", "paraformer_frontend_a")
    given = case.group("input")
    waves = [wave[:n] for wave, n in zip(given["waveform"], given["waveform_lengths"], strict=True)]
    return case, waves, bytes(given["am_mvn_text"].tolist()).decode()


def test_the_published_front_end(golden):
    case, waves, text = speech(golden)
    front, wanted = FrontEnd(parse_cmvn(text)), case.group("output")
    for i, wave in enumerate(waves):
        fbank = front.filter_bank(wave)
        assert len(fbank) == wanted["fbank_lens"][i]
        torch.testing.assert_close(fbank, wanted["fbank"][i, : len(fbank)], rtol=0, atol=FBANK)
        stacked = stack_frames(fbank, 7, 6)
        assert len(stacked) == wanted["lfr_lens"][i]
        torch.testing.assert_close(stacked, wanted["lfr"][i, : len(stacked)], rtol=0, atol=FBANK)
    features, lengths = front.batch(waves)
    assert lengths.tolist() == wanted["features_lens"].tolist()
    torch.testing.assert_close(features, wanted["features"], rtol=0, atol=FEATURES)
    for i, wave in enumerate(waves):
        assert torch.equal(front(wave), features[i, : lengths[i]])


def test_stacked_frames_are_exact_copies(golden):
    case = golden("speech", "paraformer_lfr_a")
    checked = 0
    for length in case.config["lengths"]:
        for stack, stride in case.config["m_n"]:
            got = stack_frames(case.tensors[f"input.x_{length}"], stack, stride)
            assert torch.equal(got, case.tensors[f"output.lfr_{length}_m{stack}_n{stride}"])
            checked += 1
    assert checked == 48


@pytest.mark.parametrize("piece", [1, 159, 400, 1000, 7777, 100000])
def test_pieces_give_the_wholes_rows(golden, piece):
    _, waves, text = speech(golden)
    front = FrontEnd(parse_cmvn(text))
    wave = waves[0][:3000] if piece == 1 else waves[0]
    stream = front.stream()
    rows = [stream.push(part) for part in wave.split(piece)]
    early = sum(map(len, rows))
    rows.append(stream.finish())
    torch.testing.assert_close(torch.cat(rows), front(wave), rtol=1e-5, atol=1e-5)
    assert early >= len(front(wave)) - 2  # nothing is held back that is certain
    assert len(stream.samples) < 400 and len(stream.frames) <= 13
    with pytest.raises(DataError, match="has ended"):
        stream.push(wave)


@pytest.mark.parametrize("length", [0, 2, 100, 399, 400, 401, 559, 560, 1359, 1360, 1361, 8000])
def test_pieces_of_recordings_of_every_length(length):
    wave = torch.randn(length, generator=torch.Generator().manual_seed(length)) * 0.1
    stream = FrontEnd().stream()
    rows = torch.cat([*(stream.push(part) for part in wave.split(77)), stream.finish()])
    assert rows.shape[1] == 560
    if length == 0:
        assert len(rows) == 0
    else:
        torch.testing.assert_close(rows, FrontEnd()(wave), rtol=1e-5, atol=1e-5)
    assert len(stream.finish()) == 0


def test_times():
    front = FrontEnd()
    assert (front.size, front.row_ms, front.window, front.hop) == (560, 60.0, 400, 160)
    assert len(front(torch.zeros(16000 * 10))) == 167
    assert front(torch.zeros(16000)).isfinite().all()


def test_dither_is_drawn_from_torchs_numbers():
    front, wave = FrontEnd(dither=1.0), torch.zeros(4000)
    torch.manual_seed(5)
    first = front(wave)
    assert not torch.equal(front(wave), first)
    torch.manual_seed(5)
    assert torch.equal(front(wave), first) and first.std() > 0.1


@pytest.mark.parametrize(
    ("samples", "complaint"),
    [
        (torch.zeros(1), "1 samples are too few"),
        (torch.zeros(0), "0 samples are too few"),
        (torch.zeros(2, 100), r"one floating-point row, not \[2, 100\]"),
        (torch.zeros(100).short(), "torch.int16"),
        (torch.tensor([0.0, 1.0, float("nan"), 0.0]), "sample 2 is nan"),
        (torch.tensor([0.0, float("-inf")]), "sample 1 is -inf"),
    ],
)
def test_what_is_no_recording_is_refused(samples, complaint):
    with pytest.raises(DataError, match=complaint):
        FrontEnd()(samples)


MVN = """<Nnet>
<Splice> 2 2
[ 0 ]
<AddShift> 2 2
<LearnRateCoef> 0 [ 1.5 -2 ]
<Rescale> 2 2
<LearnRateCoef> 0 [ 0.5 3e-1 ]
</Nnet>
"""


def test_cmvn_files(tmp_path):
    (tmp_path / "am.mvn").write_text(MVN)
    assert read_cmvn(tmp_path / "am.mvn").tolist() == [[1.5, -2.0], [0.5, pytest.approx(0.3)]]
    front = FrontEnd(parse_cmvn(MVN), mels=2, stack=1, stride=1)
    torch.testing.assert_close(front.normalise(torch.zeros(3, 2)), torch.tensor([[0.75, -0.6]]).expand(3, 2))
    with pytest.raises(DataError, match=r"cmvn must be \[2, 560\]"):
        FrontEnd(parse_cmvn(MVN))
    with pytest.raises(DataError, match="cannot be read"):
        read_cmvn(tmp_path / "none.mvn")


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ("<Rescale>", "<Scale>", "<Rescale> needs one row"),
        ("3e-1", "three", "no number"),
        ("[ 0.5 3e-1 ]", "[ 0.5 ]", "2 shifts and 1 scales"),
        ("3e-1", "nan", "not finite"),
    ],
)
def test_broken_cmvn_files_are_refused(old, new, complaint):
    with pytest.raises(DataError, match=complaint):
        parse_cmvn(MVN.replace(old, new))


LIST = ["<blank>", "<s>", "</s>", "你", "好", "hel@@", "lo", "world", "a", "<unk>"]


def test_tokens_and_text(tmp_path):
    (tmp_path / "tokens.json").write_text(json.dumps(LIST, ensure_ascii=False), encoding="utf-8")
    (tmp_path / "seg_dict").write_text("hello hel@@ lo\nworld world\n你 你\n好 好\n", encoding="utf-8")
    tokens = read_tokens(tmp_path)
    assert len(tokens) == 10
    assert tokens.pieces("Hello 你好 world b") == ["hel@@", "lo", "你", "好", "world", "<unk>"]
    assert tokens.ids("hello 你好x") == [5, 6, 3, 4, 9]
    assert tokens.text([3, 4, 5, 6, 7, 2]) == "你好hello world"
    assert tokens.text([]) == ""
    (tmp_path / "tokens.json").unlink()
    (tmp_path / "seg_dict").unlink()
    (tmp_path / "tokens.txt").write_text("\n".join(LIST), encoding="utf-8")
    assert read_tokens(tmp_path).ids("你 a?") == [3, 8, 9]


def test_words_and_their_times():
    spans = [(0, 60), (60, 100), (100, 180), (180, 200)]
    assert words(["hel@@", "lo", "你", "wor@@"], spans) == [
        ("hello", (0, 100)),
        ("你", (100, 180)),
        ("wor", (180, 200)),
    ]
    assert join(["<s>", "a", "b", "你", "c", "d", "</s>"]) == "a b你c d"
    with pytest.raises(ValueError, match="zip"):
        words(["a"], [])


def test_broken_token_lists_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"neither tokens\.json nor tokens\.txt"):
        read_tokens(tmp_path)
    (tmp_path / "tokens.json").write_text("[1, 2]")
    with pytest.raises(DataError, match="no list of tokens"):
        read_tokens(tmp_path)
    (tmp_path / "tokens.json").write_text("[")
    with pytest.raises(DataError, match="no JSON"):
        read_tokens(tmp_path)
    (tmp_path / "tokens.json").write_text(json.dumps(LIST))
    (tmp_path / "seg_dict").write_text("hello\n")
    with pytest.raises(DataError, match="line 1: 'hello' has no pieces"):
        read_tokens(tmp_path)
    with pytest.raises(DataError, match="'a' is there twice"):
        Tokens(["a", "b", "a"])
    with pytest.raises(DataError, match="'c' is not in the list"):
        Tokens(["a", "b"]).ids("abc")
    with pytest.raises(DataError, match="2 is no id of a list of 2"):
        Tokens(["a", "b"]).text([2])
