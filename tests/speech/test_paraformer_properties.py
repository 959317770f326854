"""What must hold of any Paraformer: a batch's rows are its recordings one by one; sizes."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from manyheads.core.errors import UsageError
from manyheads.core.testing import nan_filled_empties
from manyheads.speech.models.cif import CifPredictor
from manyheads.speech.models.glancing import glance
from manyheads.speech.models.paraformer import Paraformer, greedy, paraformer, paraformer_large
from manyheads.speech.models.paraformer_losses import Objective, count_error, smoothed_cross_entropy, with_end
from manyheads.speech.models.paraformer_timestamps import timestamps
from manyheads.speech.models.sanm import Rows, SanmEncoder, positions, remember
from manyheads.speech.models.sanm_decoder import SanmDecoder

LENGTHS = [60, 41, 7, 1]
SIZES = (157_975_648, 61_321_428, 787_457)  # published: 157.98, 61.32 and .787 M, 220.08 M together


def small(**options) -> Paraformer:
    sizes = {"dim": 32, "heads": 4, "units": 48, "encoder_blocks": 3, "decoder_blocks": 2, "input_size": 40}
    return paraformer(30, **sizes | options).eval()


def recordings(padding: float = 0.0) -> tuple[list[Tensor], Tensor, Tensor]:
    """Recordings of unequal lengths, and the batch of them."""
    each = [torch.randn(n, 40) for n in LENGTHS]
    batch = torch.full((len(each), max(LENGTHS), 40), padding)
    for row, one in zip(batch, each, strict=True):
        row[: len(one)] = one
    return each, batch, torch.tensor(LENGTHS)


OPTIONS = [{}, {"streaming": True}, {"predictor": "depthwise"}, {"tail": 0.0}, {"timestamps": True}]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("packed", [False, True])
def test_a_batch_gives_the_rows_of_its_recordings_one_by_one(options, packed):
    model = small(**options)
    each, batch, lengths = recordings(math.nan if packed else 9.0)
    with torch.no_grad(), nan_filled_empties():
        found = model.packed(batch, lengths) if packed else model(batch, lengths)
        rows = greedy(found.logits, found.counts)
        assert max(map(len, rows)) > 10
        for b, features in enumerate(each):
            alone = model(features[None])
            count, size = int(alone.counts), len(features)
            assert found.counts[b] == count
            torch.testing.assert_close(found.encoded[b, :size], alone.encoded[0], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(found.logits[b, :count], alone.logits[0], rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(
                found.alphas[b, : alone.alphas.shape[1]], alone.alphas[0], rtol=1e-4, atol=1e-5
            )
            assert rows[b] == greedy(alone.logits, alone.counts)[0]


def test_times_of_a_batch_are_those_of_its_recordings():
    model = small(timestamps=True)
    each, batch, lengths = recordings(9.0)

    def times(features, lengths):
        found = model(features, lengths)
        alphas, fires = model.predictor.places(found.encoded, lengths, found.counts)
        return [
            timestamps(a[: 3 * n], f[: 3 * n], [str(i) for i in range(int(count) - 1)])
            for a, f, n, count in zip(alphas, fires, lengths.tolist(), found.counts, strict=True)
        ]

    with torch.no_grad():
        together = times(batch, lengths)
        assert together == [times(one[None], torch.tensor([len(one)]))[0] for one in each]
    assert len(together[0]) > 10 and together[0][-1][1] == 60 * 60


def test_losses_and_gradients_of_a_batch_are_those_of_its_recordings():
    """No padding in a loss or a gradient; the sums are those of the recordings."""
    model = small(ctc=True, timestamps=True).double()
    each, batch, lengths = recordings(5.0)
    text = torch.randint(3, 30, (4, 9))
    sizes = torch.tensor([9, 6, 3, 0])
    objective = Objective(glancing=0.0, ctc=0.3, per_token=False)
    found = model.losses(batch.double(), lengths, text, sizes, objective)
    found["loss"].backward()
    gradients = {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    alone = [
        model.losses(
            one[None].double(), lengths[b : b + 1], text[b : b + 1, : sizes[b]], sizes[b : b + 1], objective
        )
        for b, one in enumerate(each)
    ]
    for key in ("loss", "decoder", "count", "ctc", "fine_count"):
        torch.testing.assert_close(found[key], sum(one[key] for one in alone) / 4)
    (sum(one["loss"] for one in alone) / 4).backward()
    for key, parameter in model.named_parameters():
        if key in gradients:
            torch.testing.assert_close(gradients[key], parameter.grad, rtol=1e-6, atol=1e-9)
    assert set(dict(model.named_parameters())) - set(gradients) == {"decoder.embed.0.weight"}


def test_training_with_the_sampler_reaches_every_parameter():
    torch.manual_seed(1)
    model = small(ctc=True, timestamps=True, dropout=0.1).train()
    _, batch, lengths = recordings()
    lengths[3] = 5
    text, sizes = torch.randint(3, 30, (4, 9)), torch.tensor([9, 6, 3, 1])
    found = model.losses(batch, lengths, text, sizes, Objective(ctc=0.3))
    found["loss"].backward()
    assert found["loss"].isfinite() and 0 <= float(found["accuracy"]) <= 1
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.any(), key
    assert set(found) == {"loss", "accuracy", "decoder", "count", "ctc", "fine_count"}


def test_silence_gives_no_tokens():
    """No weight anywhere, alone and beside a recording that speaks."""
    model = small(timestamps=True)
    with torch.no_grad():
        model.predictor.cif_output.bias.fill_(-200.0)
        found = model(torch.randn(2, 20, 40), torch.tensor([20, 3]))
        assert model.packed(torch.randn(2, 20, 40), torch.tensor([20, 3])).logits.shape == (2, 0, 30)
    assert found.counts.tolist() == [0, 0] and found.logits.shape == (2, 0, 30)
    assert greedy(found.logits, found.counts) == [[], []]
    loss = model.losses(
        torch.randn(1, 20, 40), torch.tensor([20]), torch.tensor([[4, 5]]), torch.tensor([2]), Objective()
    )["loss"]
    loss.backward()
    assert loss.isfinite() and all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_weights_are_not_rounded_under_autocast():
    model = small(timestamps=True)
    hidden, lengths = torch.randn(2, 60, 32), torch.tensor([60, 30])
    with torch.no_grad():
        want = (model.predictor(hidden, lengths), model.predictor.fine_weights(hidden, lengths))
        with torch.autocast("cpu", torch.bfloat16):
            got = (model.predictor(hidden, lengths), model.predictor.fine_weights(hidden, lengths))
            whole = model(torch.randn(2, 60, 40), lengths)
    torch.testing.assert_close(got, want, rtol=0, atol=0)
    assert whole.logits.isfinite().all() and whole.alphas.dtype == torch.float32


def test_packed_recordings_are_for_evaluation():
    _, batch, lengths = recordings()
    with pytest.raises(UsageError, match="for evaluation"):
        small().train().packed(batch, lengths)


def test_greedy_leaves_blank_start_and_end_out():
    logits = torch.nn.functional.one_hot(torch.tensor([[3, 0, 4, 1, 2, 5], [6, 2, 7, 7, 7, 7]]), 9).float()
    assert greedy(logits, torch.tensor([6, 2])) == [[3, 4, 5], [6]]


@pytest.mark.parametrize("shift", range(6))
def test_the_memory_reaches_back_by_its_shift(shift):
    x, weight = torch.randn(2, 20, 8), torch.randn(8, 1, 11)
    lengths = torch.tensor([20, 13])
    got = remember(x, weight, shift, Rows.padded(lengths, 20))
    for b, n in enumerate(lengths):
        row = torch.nn.functional.pad(x[b : b + 1, :n].transpose(1, 2), (5 + shift, 5 - shift))
        want = torch.nn.functional.conv1d(row, weight, groups=8).transpose(1, 2)[0] + x[b, :n]
        torch.testing.assert_close(got[b, :n], want, rtol=1e-4, atol=1e-5)


def test_positions():
    table = positions(0, 100, 40, torch.device("cpu"))
    assert torch.equal(table[30:], positions(30, 70, 40, torch.device("cpu")))
    torch.testing.assert_close(table[4, 0], torch.tensor(5.0).double().sin())
    torch.testing.assert_close(table[4, 39], torch.tensor(5.0 / 10000).double().cos())


def test_glancing_shows_as_many_as_it_should():
    targets = with_end(torch.randint(3, 30, (64, 20)), torch.randint(0, 21, (64,)), 2)
    real = targets >= 0
    guessed = torch.where(torch.rand(64, 21) < 0.5, targets, 1)
    shown = glance(guessed, targets, 0.75)
    wrong = ((guessed != targets) & real).sum(1)
    assert shown.sum(1).tolist() == [int(n * 0.75) for n in wrong.tolist()]
    assert not (shown & ~real).any()
    assert not torch.equal(shown, glance(guessed, targets, 0.75))
    assert glance(targets.clamp(min=0), targets, 0.75).sum() == 0
    # every place is shown equally often
    many = sum(glance(torch.zeros(1, 8).long(), torch.ones(1, 8).long(), 0.5).float() for _ in range(600))
    assert (many / 600 - 0.5).abs().max() < 0.1


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_smoothed_cross_entropy_is_torchs_divergence(smoothing):
    logits, targets = torch.randn(3, 7, 11).double(), torch.randint(0, 11, (3, 7))
    targets[1, 4:] = -1
    goal = torch.full((3, 7, 11), smoothing / 10).double()
    goal.scatter_(2, targets.clamp(min=0)[..., None], 1 - smoothing)
    want = torch.nn.functional.kl_div(logits.log_softmax(-1), goal, reduction="none").sum(-1)
    want = want[targets >= 0].sum()
    torch.testing.assert_close(smoothed_cross_entropy(logits, targets, smoothing), want / 18)
    torch.testing.assert_close(smoothed_cross_entropy(logits, targets, smoothing, per_token=False), want / 3)
    perfect = goal.clamp(min=1e-30).log()
    assert abs(float(smoothed_cross_entropy(perfect, targets, smoothing))) < 1e-6


def test_the_count_error():
    totals, counts = torch.tensor([3.5, 2.0]), torch.tensor([3, 4])
    assert float(count_error(totals, counts)) == pytest.approx(2.5 / 7)
    assert float(count_error(totals, counts, per_token=False)) == pytest.approx(1.25)


def test_the_large_ones_sizes():
    with torch.device("meta"):
        model = paraformer_large()
        stamped, online, ctc = (
            paraformer_large(timestamps=True),
            paraformer_large(streaming=True),
            paraformer(8404, ctc=True),
        )

    def count(module):
        return sum(p.numel() for p in module.parameters())

    assert (count(model.encoder), count(model.decoder), count(model.predictor)) == SIZES
    assert count(model) == sum(SIZES)
    assert set(online.state_dict()) == set(model.state_dict())
    extra = set(stamped.state_dict()) - set(model.state_dict())
    assert {k.split(".")[1] for k in extra} == {"upsample_cnn", "blstm", "cif_output2"}
    assert set(ctc.state_dict()) - set(model.state_dict()) == {"ctc.ctc_lo.weight", "ctc.ctc_lo.bias"}
    shapes = {k: list(v.shape) for k, v in model.state_dict().items()}
    assert shapes["encoder.encoders0.0.self_attn.linear_q_k_v.weight"] == [1536, 560]
    assert shapes["encoder.encoders.48.self_attn.fsmn_block.weight"] == [512, 1, 11]
    assert shapes["decoder.decoders.15.src_attn.linear_k_v.weight"] == [1024, 512]
    assert "decoder.decoders3.0.feed_forward.w_2.bias" not in shapes
    assert shapes["decoder.embed.0.weight"] == [8404, 512] and len(shapes) == 956


def test_on_the_meta_device_outputs_have_shapes():
    with torch.device("meta"):
        model = paraformer_large().eval()
        found = model(torch.empty(2, 50, 560), torch.empty(2, dtype=torch.int64), max_tokens=12)
    assert found.logits.shape == (2, 12, 8404) and found.encoded.shape == (2, 50, 512)


@pytest.mark.parametrize("options", [{}, {"streaming": True}])
def test_exports(options):
    """With a given number of tokens the model is one graph, for any number and length of recordings."""
    model = small(**options)
    _, batch, lengths = recordings()
    rows, frames = torch.export.Dim("rows", min=2, max=64), torch.export.Dim("frames", min=8, max=4096)
    shapes = {"features": {0: rows, 1: frames}, "lengths": {0: rows}, "max_tokens": None}
    program = torch.export.export(model, (batch, lengths), {"max_tokens": 40}, dynamic_shapes=shapes)
    graph = program.module()
    with torch.no_grad():
        for call in ((batch, lengths), (torch.randn(3, 90, 40), torch.tensor([90, 2, 50]))):
            got, want = graph(*call, max_tokens=40), model(*call, max_tokens=40)
            assert torch.equal(got.counts, want.counts) and int(want.counts.max()) > 5
            for b, count in enumerate(want.counts.tolist()):
                found, wanted = got.logits[b, :count], want.logits[b, :count]
                torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("build", "complaint"),
    [
        (lambda: paraformer(30, dim=30, heads=4), "4 heads do not divide 30"),
        (lambda: paraformer(30, encoder_blocks=0), "blocks must be positive"),
        (lambda: paraformer(2), "blank, start and end"),
        (lambda: paraformer(30, input_size=81), "input_size must be even"),
        (lambda: paraformer(30, dropout=1.0), "dropout must be from 0"),
        (lambda: paraformer(30, predictor="v1"), "'full' or 'depthwise'"),
        (lambda: paraformer(30, predictor="depthwise", timestamps=True), "timestamps need"),
        (lambda: SanmDecoder(30, 32, shift=6), "cannot be shifted by 6"),
        (lambda: SanmEncoder(40, 32, units=0), "units must be positive"),
        (lambda: CifPredictor(8, tail=-1.0), "must be 0 or more"),
        (lambda: CifPredictor(8).fine_weights(torch.zeros(1, 3, 8), torch.tensor([3])), "parts=3"),
        (lambda: Objective(smoothing=1.0), "smoothing must be from 0"),
        (lambda: Objective(glancing=-0.1), "glancing must not be negative"),
    ],
)
def test_refusals(build, complaint):
    with torch.device("meta"), pytest.raises(UsageError, match=complaint):
        build()


def test_ctc_without_its_head_is_refused():
    _, batch, lengths = recordings()
    with pytest.raises(UsageError, match="ctc=True"):
        small().losses(batch, lengths, torch.ones(4, 2).long() + 3, torch.tensor([2] * 4), Objective(ctc=0.3))
