"""Streaming and timestamps against the published code's recorded tensors, and however the rows come."""

from __future__ import annotations

from itertools import chain, pairwise

import pytest
import torch

from manyheads.core.errors import DataError, UsageError
from manyheads.speech.frontend import FrontEnd
from manyheads.speech.models.cif import peaks
from manyheads.speech.models.paraformer import greedy, paraformer
from manyheads.speech.models.paraformer_streaming import Chunks, FeatureStream, SampleStream
from manyheads.speech.models.paraformer_timestamps import REACHED, segments, timestamps

TOLERANCE = 1e-5  # relative and absolute, as the recorded cases' notes ask for


def close(found, wanted):
    torch.testing.assert_close(found.to(wanted.dtype), wanted, rtol=TOLERANCE, atol=TOLERANCE)


def begun(case, dtype):
    """The case's model and its stream."""
    config = case.config["model"]
    encoder, decoder = config["encoder_conf"], config["decoder_conf"]
    model = paraformer(
        config["vocab_size"], config["input_size"], encoder["output_size"], encoder["attention_heads"],
        encoder["linear_units"], encoder["num_blocks"], decoder["num_blocks"], streaming=True,
    )  # fmt: skip
    model.load_state_dict(case.group("param"), strict=True)
    backs = (case.config["encoder_chunk_look_back"], case.config["decoder_chunk_look_back"])
    return FeatureStream(model.to(dtype).eval(), Chunks(*case.config["chunk_size"], *backs))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", ["stream", "stream_lookback0", "stream_tail"])
def test_published_steps(golden, name, dtype):
    case = golden("speech", f"paraformer_{name}_a")
    stream, wanted = begun(case, dtype), case.group("output")
    chunks = [case.group("input")[f"chunk_{j}"].to(dtype) for j in range(len(case.group("input")))]
    if case.config["tail_chunk"]:
        chunks.append(chunks[0][:, :0])
    checked = set()
    for j, chunk in enumerate(chunks):
        step = stream.step(chunk, final=j == len(chunks) - 1)
        left = stream.fire_state.total[:, None] % 1.0
        found = {
            "encoder_out": step.encoded,
            "acoustic_embeds": step.tokens,
            "log_probs": step.logits.log_softmax(-1),
            "argmax_ids": step.logits.argmax(-1),
            "num_tokens": torch.tensor([step.tokens.shape[1]]),
            "cif_alpha_cache": left,
            "cif_hidden_cache": (stream.fire_state.partial / left)[None],
        }
        for key, value in found.items():
            close(value, wanted[f"{key}_{j}"])
            checked.add(f"{key}_{j}")
            if f"{key}_{j}_without_alias" in wanted:
                close(value, wanted[f"{key}_{j}_without_alias"])
                checked.add(f"{key}_{j}_without_alias")
        assert step.ids == [i for i in wanted[f"argmax_ids_{j}"][0].tolist() if i > 2]
    assert checked == set(wanted)


def small(**options):
    torch.manual_seed(3)
    sizes = {"dim": 32, "heads": 4, "units": 48, "encoder_blocks": 3, "decoder_blocks": 2}
    return paraformer(40, streaming=True, **sizes | options).eval()


@pytest.mark.parametrize(
    "chunks", [Chunks(), Chunks(5, 8, 4, 0, 0), Chunks(2, 6, 0, 2, 3), Chunks(0, 1, 0, 1, 1)]
)
@pytest.mark.parametrize("count", [60, 57])
def test_however_the_rows_come(chunks, count):
    model, rows = small(), torch.randn(count, 560)
    whole = FeatureStream(model, chunks)
    wanted = whole.push(rows) + whole.finish()
    assert len(wanted) > 10
    for piece in (1, 7, 23):
        stream = FeatureStream(model, chunks)
        got = [token for part in rows.split(piece) for token in stream.push(part)]
        assert got + stream.finish() == wanted
        assert stream.finish() == []


def test_samples_in_pieces_are_the_chunks_of_the_whole(golden):
    case = golden("speech", "paraformer_e2e_a")
    given = case.group("input")
    front, model = FrontEnd(given["cmvn"]), small(input_size=560)
    wave = given["waveform"][0].repeat(3)
    whole = FeatureStream(model)
    wanted = whole.push(front(wave)) + whole.finish()
    assert len(wanted) > 10
    for piece in (160, 1000, 16000):
        stream = SampleStream(model, front)
        pushed = [stream.push(part) for part in wave.split(piece)]
        assert [*chain(*pushed), *stream.finish()] == wanted
        early = next(i for i, ids in enumerate(pushed) if ids)
        assert (early + 1) * piece <= 16000 + piece  # the first chunk is written within a second
    with pytest.raises(DataError, match="has ended"):
        stream.push(wave)


def test_one_chunk_that_sees_all_is_the_whole_recording():
    """A window as long as the recording: the offline model with the same causal decoder."""
    model, rows = small(), torch.randn(30, 560)
    stream = FeatureStream(model, Chunks(0, 100, 0, 0, 0))
    with torch.no_grad():
        found = model(rows[None])
    step = stream.step(rows[None], final=True)
    torch.testing.assert_close(step.logits, found.logits, rtol=1e-4, atol=1e-5)
    assert step.ids == greedy(found.logits, found.counts)[0]


def test_streams_of_nothing_and_of_little():
    model = small()
    assert FeatureStream(model).finish() == []
    assert SampleStream(model, FrontEnd()).finish() == []
    stream = SampleStream(model, FrontEnd())
    assert stream.push(torch.zeros(100)) == []
    stream.finish()  # a clip shorter than a frame is one row
    assert stream.features.seen == 1


def test_memory_does_not_grow():
    model, stream = small(), None
    stream = FeatureStream(model)
    sizes = []
    for _ in range(12):
        stream.push(torch.randn(10, 560))
        kept = [stream.overlap, stream.pending, *(x for past in stream.encoder_past for x in past)]
        kept += [x for past in stream.decoder_past for x in past] + stream.memories
        sizes.append(sum(x.numel() for x in kept))
    assert len(set(sizes[4:])) == 1


def test_refusals():
    model = small()
    with pytest.raises(UsageError, match="evaluation mode"):
        FeatureStream(small().train())
    with pytest.raises(UsageError, match="streaming=True"):
        FeatureStream(paraformer(40, dim=32, units=48, encoder_blocks=1, decoder_blocks=1).eval())
    with pytest.raises(DataError, match=r"rows must be \[T, 560\]"):
        FeatureStream(model).push(torch.zeros(3, 80))
    with pytest.raises(UsageError, match="size must be positive"):
        Chunks(size=0)
    with pytest.raises(UsageError, match="ahead must not be negative"):
        Chunks(ahead=-1)


def written(found) -> str:
    """Segments in the published code's words."""
    return "".join(f"{token or '<sil>'} {a / 1000:.3f} {b / 1000:.3f};" for token, a, b in found)


def test_published_timestamps(golden):
    """Its text to the letter. Its list cuts float seconds, so that 1.864 s became 1863 ms: ours are whole."""
    case = golden("speech", "paraformer_timestamps_a")
    given, wanted, cut = case.group("input"), case.group("output"), 0
    for j, item in enumerate(case.config["items"]):
        tokens = [f"w{i}" for i in range(item["num_tokens"])]
        options = {"parts": item["upsample_rate"], "offset": item["vad_offset"]}
        alphas, fires = given[f"us_alphas_{j}"], given[f"us_peaks_{j}"]
        assert (
            written(segments(alphas, fires, tokens, **options))
            == bytes(wanted[f"text_bytes_{j}"].tolist()).decode()
        )
        times = torch.tensor(timestamps(alphas, fires, tokens, **options))
        off = times - wanted[f"timestamps_ms_{j}"]
        assert off.min() >= 0 and off.max() <= 1
        cut += int(off.sum())
    assert cut == 5


@pytest.mark.parametrize("name", ["infer", "train"])
def test_published_timestamps_of_the_predictor(golden, name):
    case = golden("speech", f"paraformer_bicif_{name}_a")
    given, wanted = case.group("input"), case.group("output")
    checked = 0
    for b, length in enumerate(given["lengths"].tolist()):
        count = int((wanted["timestamps_ms"][b, :, 0] != -1).sum())
        alphas, fires = wanted["us_alphas"][b, : 3 * length], wanted["us_peaks"][b, : 3 * length]
        found = torch.tensor(timestamps(alphas, fires, [f"w{i}" for i in range(count)]))
        published = wanted["timestamps_ms"][b, :count]
        off = found - published.clamp(min=0)
        assert off.min() >= 0 and off.max() <= 1
        checked += count
    assert checked > 10


@pytest.mark.parametrize("seed", range(20))
def test_times_are_in_order_and_inside(seed):
    generator = torch.Generator().manual_seed(seed)
    frames, tokens = 3 * int(torch.randint(1, 60, (), generator=generator)), 1 + seed % 9
    alphas = torch.rand(frames, generator=generator) ** (1 + seed % 5)
    if seed % 3 == 0:
        alphas = alphas * (torch.rand(frames, generator=generator) > 0.9) + 1e-6
    alphas = alphas * (tokens / alphas.sum())
    fires = peaks(alphas[None], REACHED)[0]
    names = [f"w{i}" for i in range(tokens)]
    found = segments(alphas, fires, names, offset=36_000_000)
    assert [s.token for s in found if s.token] == names
    assert all(s.start <= s.end for s in found)
    assert all(a.end == b.start for a, b in pairwise(found))
    assert found[0].start >= 36_000_000 and found[-1].end == 36_000_000 + frames * 20


def test_timestamps_of_nothing():
    assert timestamps(torch.zeros(9), torch.zeros(9), []) == []
    with pytest.raises(DataError, match=r"9 frames add up to 0\.0"):
        timestamps(torch.zeros(9), torch.zeros(9), ["a"])
    with pytest.raises(DataError, match="add up to nan"):
        timestamps(torch.full((9,), float("nan")), torch.full((9,), float("nan")), ["a"])
    with pytest.raises(UsageError, match="7 parts"):
        timestamps(torch.ones(9), torch.ones(9), ["a"], parts=7)
