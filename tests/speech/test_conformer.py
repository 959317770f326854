"""The AISHELL recipe's Paraformer: against the published code's recorded tensors, and alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from manyheads.core.errors import UsageError
from manyheads.speech.models.conformer import ConformerEncoder
from manyheads.speech.models.paraformer import Paraformer, paraformer_conformer
from manyheads.speech.models.paraformer_losses import Objective
from manyheads.speech.models.paraformer_streaming import FeatureStream

TOLERANCE = 1e-5
DTYPES = [torch.float64, torch.float32]
KINDS = ["legacy", "relative"]
SMALL = {"dim": 16, "units": 24, "encoder_blocks": 2, "decoder_blocks": 2, "dropout": 0.0}


def close(found: Tensor, wanted: Tensor, tolerance: float = TOLERANCE) -> None:
    torch.testing.assert_close(found.detach().to(wanted.dtype), wanted, rtol=tolerance, atol=tolerance)


def small(positions: str = "legacy", **options) -> Paraformer:
    """A small model, as the recorded ones; the tail as upstream adds it, rounded to float32."""
    tail = float(torch.tensor(0.45))
    return paraformer_conformer(31, 20, **SMALL, positions=positions, tail=tail, **options)


def loaded(case, positions: str, dtype: torch.dtype) -> tuple[Paraformer, dict[str, Tensor]]:
    model = small(positions)
    model.load_state_dict(case.group("param"), strict=True)
    given = {k: v.to(dtype) if v.is_floating_point() else v for k, v in case.group("input").items()}
    given["speech"].requires_grad_()
    return model.to(dtype), given


def check_gradients(case, outputs, model, speech, tolerance, unused=()) -> None:
    sum((outputs[k] * v.to(outputs[k].dtype)).sum() for k, v in case.group("cotangent").items()).backward()
    found = {k: p.grad for k, p in model.named_parameters() if p.grad is not None}
    wanted = case.group("grad")
    assert set(found) == set(wanted) and set(dict(model.named_parameters())) - set(found) == set(unused)
    for key, value in wanted.items():
        close(found[key], value, tolerance)
    close(speech.grad, case.group("grad_input")["speech"], tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("positions", KINDS)
def test_recognition(golden, positions, dtype):
    case = golden("speech", f"paraformer_conformer_{positions}_a")
    model, given = loaded(case, positions, dtype)
    speech, lengths, wanted = given["speech"], given["speech_lengths"], case.group("output")
    found = model.eval()(speech, lengths)
    assert torch.equal(model.encoder.spans(lengths), wanted["encoder_out_lens"])
    tokens = model.predictor(found.encoded, model.encoder.spans(lengths)).tokens
    outputs = {
        "encoder_out": found.encoded,
        "acoustic_embeds": tokens,
        "alphas": found.alphas,
        "cif_peak": found.fires,
        "log_probs": found.logits.log_softmax(-1),
        "ctc_logits": model.ctc(found.encoded),
    }
    assert set(outputs) == set(wanted) - {"encoder_out_lens", "token_num"}
    assert found.counts.tolist() == wanted["token_num"].tolist()
    for key, value in outputs.items():
        close(value, wanted[key])
    unused = ["decoder.embed.0.weight"]
    check_gradients(case, outputs, model, speech, 1e-5 if dtype == torch.float64 else 1e-4, unused)


def test_training(golden):
    case = golden("speech", "paraformer_conformer_train_a")
    model, given = loaded(case, "legacy", torch.float64)
    objective = Objective(glancing=0.4, ctc=0.3, per_token=False)
    found = model.train().losses(
        given["speech"], given["speech_lengths"], given["text"], given["text_lengths"], objective,
        given["sampler_permutation"],
    )  # fmt: skip
    wanted = case.group("output")
    names = {"loss": "loss", "decoder": "loss_att", "count": "loss_pre", "ctc": "loss_ctc", "accuracy": "acc"}
    for ours, theirs in names.items():
        close(found[ours].reshape(1), wanted[theirs])
    norm = model.encoder.encoders[0].conv_module.norm
    close(norm.running_mean, wanted["running_mean"])
    close(norm.running_var, wanted["running_var"])
    check_gradients(case, {"loss": found["loss"].reshape(1)}, model, given["speech"], 1e-5)


@pytest.fixture
def unequal() -> tuple[Tensor, Tensor]:
    """Recordings of unequal lengths, one too short for a row; what lies behind them is no number."""
    lengths = torch.tensor([61, 40, 5, 7, 52])
    features = torch.randn(5, 61, 20, dtype=torch.float64)
    features[torch.arange(61) >= lengths[:, None]] = 1e4
    return features, lengths


@pytest.mark.parametrize("way", ["padded", "packed"])
@pytest.mark.parametrize("positions", KINDS)
def test_a_batch_is_its_recordings_one_by_one(unequal, positions, way):
    model = small(positions).double().eval()
    features, lengths = unequal
    with torch.no_grad():
        found = model(features, lengths) if way == "padded" else model.packed(features, lengths)
        assert model.encoder.spans(lengths).tolist() == [14, 9, 0, 1, 12]
        for row, length in enumerate(lengths.tolist()):
            alone = model(features[row : row + 1, :length], torch.tensor([length]))
            count, span = int(alone.counts), model.encoder.spans(lengths)[row]
            assert int(found.counts[row]) == count
            close(found.encoded[row, :span], alone.encoded[0, :span], 1e-9)
            close(found.logits[row, :count], alone.logits[0, :count], 1e-9)
    assert int(found.counts.max()) > 3


def test_padding_has_no_part_in_training(unequal):
    """Losses, gradients and batch statistics are the same whatever lies behind a recording's end."""
    features, lengths = unequal
    text = torch.randint(3, 31, (5, 3))
    model, results = small().double().train(), []
    start = {k: v.clone() for k, v in model.state_dict().items()}
    for fill in (1e4, -3.0):
        model.load_state_dict(start)
        given = features.masked_fill((torch.arange(61) >= lengths[:, None])[..., None], fill)
        found = model.losses(given, lengths, text, torch.full((5,), 3), Objective(glancing=0.0, ctc=0.3))
        gradients = torch.autograd.grad(found["loss"], model.parameters(), allow_unused=True)
        results.append([found["loss"], *(g for g in gradients if g is not None), *model.buffers()])
    for first, second in zip(*results, strict=True):
        close(first.double(), second.double(), 1e-12)


@pytest.mark.parametrize("positions", KINDS)
def test_scores_by_distance(positions):
    """The second term of the scores, written out one by one."""
    encoder = ConformerEncoder(20, 16, 2, 24, 1, 3, 0.0, positions).double()
    attention, size = encoder.encoders[0].self_attn, 6
    q = torch.randn(1, size, 2, 8, dtype=torch.float64)
    places = encoder._places(size, None, q)
    found = attention._distances(q, places)

    def product(row: int, waves: Tensor) -> Tensor:
        return (q[0, row] * attention.linear_pos(waves).view(2, 8)).sum(-1)

    for i in range(size):
        for j in range(size):
            if j <= i:
                wanted = product(i, places.left[0, size - 1 - (i - j)])
            elif positions == "relative":
                wanted = product(i, places.right[0, j - i - 1])
            else:
                wanted = product(i + 1, places.right[0, j - i - 2]) if j > i + 1 else torch.zeros(2)
            close(found[0, :, i, j], wanted.double(), 1e-12)


def test_dropout_and_gradients_reach_everything():
    model = paraformer_conformer(31, 20, **(SMALL | {"dropout": 0.5})).train()
    lengths, text = torch.tensor([61, 61]), torch.randint(3, 31, (2, 4))
    features = torch.randn(2, 61, 20)
    losses = [
        model.losses(features, lengths, text, torch.tensor([4, 3]), Objective(ctc=0.3))["loss"]
        for _ in range(2)
    ]
    assert losses[0] != losses[1]
    losses[0].backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_the_recipes_size():
    with torch.device("meta"):
        model = paraformer_conformer(4233)
    assert model.encoder.dim == 256 and model.encoder.stride == 4 and len(model.encoder.encoders) == 12
    assert sum(p.numel() for p in model.parameters()) == 46_198_547


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (lambda: paraformer_conformer(31, 6), "input_size"),
        (lambda: paraformer_conformer(31, width=14), "odd"),
        (lambda: paraformer_conformer(31, dim=15, heads=3), "even"),
        (lambda: paraformer_conformer(31, dim=16, heads=3), "3 heads do not divide 16"),
        (lambda: paraformer_conformer(2), "must be 3 or more"),
        (lambda: paraformer_conformer(31, positions="absolute"), "'legacy' or 'relative'"),
        (lambda: FeatureStream(small().eval()), "streaming: this model cannot"),
    ],
)
def test_wrong_sizes_are_refused(make, complaint):
    with pytest.raises(UsageError, match=complaint):
        make()


@pytest.mark.parametrize("positions", KINDS)
def test_exports(positions):
    """For any number of recordings; that of frames, of which every fourth is a row, is fixed."""
    model = small(positions).eval()
    rows = torch.export.Dim("rows", min=2, max=64)
    shapes = {"features": {0: rows}, "lengths": {0: rows}, "max_tokens": None}
    given = torch.randn(3, 61, 20), torch.tensor([61, 40, 33])
    program = torch.export.export(model, given, {"max_tokens": 20}, dynamic_shapes=shapes)
    for call in (given, (torch.randn(5, 61, 20), torch.tensor([9, 61, 47, 60, 33]))):
        with torch.no_grad():
            found, wanted = program.module()(*call, max_tokens=20), model(*call, max_tokens=20)
        assert torch.equal(found.counts, wanted.counts) and int(wanted.counts.max()) > 3
        for b, count in enumerate(wanted.counts.tolist()):
            close(found.logits[b, :count], wanted.logits[b, :count], 1e-4)
