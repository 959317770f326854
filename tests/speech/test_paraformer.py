"""Paraformer against the published code's recorded tensors: outputs, counts and every gradient."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from manyheads.speech.frontend import FrontEnd
from manyheads.speech.models import cif
from manyheads.speech.models.cif import CifPredictor
from manyheads.speech.models.glancing import glance
from manyheads.speech.models.paraformer import greedy, paraformer
from manyheads.speech.models.paraformer_losses import Objective, with_end
from manyheads.speech.models.sanm import SanmEncoder
from manyheads.speech.models.sanm_decoder import SanmDecoder

TOLERANCE = 1e-5  # relative and absolute, as the recorded cases' notes ask for
DOUBLE = torch.float64  # what the cases were computed in
BOTH = [torch.float64, torch.float32]  # the second runs the kernels


def close(found: Tensor, wanted: Tensor, tolerance: float = TOLERANCE) -> None:
    found = found.detach().to(wanted.dtype)
    torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)


def inside(lengths: Tensor, size: int) -> Tensor:
    return (torch.arange(size) < lengths[:, None])[..., None]


def inputs(case, dtype=DOUBLE) -> dict[str, Tensor]:
    """The inputs in a dtype, requiring gradients where the case has one."""
    wanted = case.group("grad_input")
    given = {k: v.to(dtype) if v.is_floating_point() else v for k, v in case.group("input").items()}
    return {k: v.requires_grad_() if k in wanted else v for k, v in given.items()}


def loaded(case, module: nn.Module, dtype=DOUBLE) -> nn.Module:
    module.load_state_dict(case.group("param"), strict=True)
    return module.to(dtype).eval()


def check_gradients(case, given, outputs, module, without=()) -> None:
    """Backpropagate the recorded cotangents; every parameter's and every input's gradient, none left out."""
    sum((outputs[k] * v).sum() for k, v in case.group("cotangent").items()).backward()
    wanted = case.group("grad")
    trained = {k: p.grad for k, p in module.named_parameters()}
    assert {k for k, g in trained.items() if g is None} == set(without)
    assert set(trained) - set(without) == set(wanted)
    for name, gradient in wanted.items():
        close(trained[name], gradient)
    for name, gradient in case.group("grad_input").items():
        close(given[name].grad, gradient)


def sizes(config) -> dict:
    """A recorded configuration as our arguments."""
    encoder, decoder = config["encoder_conf"], config["decoder_conf"]
    assert (
        encoder["kernel_size"] == decoder["kernel_size"]
        and encoder["linear_units"] == decoder["linear_units"]
    )
    return {
        "vocab_size": config["vocab_size"],
        "input_size": config["input_size"],
        "dim": encoder["output_size"],
        "heads": encoder["attention_heads"],
        "units": encoder["linear_units"],
        "encoder_blocks": encoder["num_blocks"],
        "decoder_blocks": decoder["num_blocks"],
        "width": encoder["kernel_size"],
        "dropout": encoder["dropout_rate"],
        "streaming": decoder["sanm_shfit"] > 0,
        "ctc": config["ctc_weight"] > 0,
        # upstream adds the tail as a float32 number, also in float64
        "tail": float(torch.tensor(config["predictor_conf"]["tail_threshold"])),
    }


@pytest.fixture
def published_padding(monkeypatch):
    """What the published code does with padding in a batch: its predictor reads what lies behind the ends."""
    monkeypatch.setattr(cif, "clear", lambda hidden, lengths: hidden)
    monkeypatch.setattr(cif, "run_lstm", lambda lstm, x, lengths: lstm(x)[0])


@pytest.fixture
def published_sums(monkeypatch):
    """Running sums of weights rounded to float32, as the published code has them even in float64.

    The greedy case feels it: without it one entry of the gradients is off by 1.1e-5, and none with it.
    """
    fire = cif.continuous_integrate_and_fire

    def rounded(hidden, alphas, **options):
        sums = alphas.detach().cumsum(1)
        off = sums.float().to(sums.dtype) - sums
        return fire(hidden, alphas + off.diff(dim=1, prepend=torch.zeros(len(off), 1)), **options)

    monkeypatch.setattr(cif, "continuous_integrate_and_fire", rounded)


@pytest.mark.parametrize("dtype", BOTH)
def test_encoder(golden, dtype):
    case = golden("speech", "paraformer_encoder_a")
    config, wanted = case.config, case.group("output")
    names = ("attention_heads", "linear_units", "num_blocks", "kernel_size")
    encoder = SanmEncoder(config["input_size"], config["output_size"], *(config[k] for k in names))
    given = inputs(case, dtype)
    encoded = loaded(case, encoder, dtype)(given["speech"], given["speech_lengths"])
    valid = encoded * inside(given["speech_lengths"], encoded.shape[1])
    close(encoded, wanted["encoder_out"])
    close(valid, wanted["encoder_out_valid"])
    assert torch.equal(given["speech_lengths"], wanted["encoder_out_lens"])
    check_gradients(case, given, {"encoder_out_valid": valid}, encoder)


@pytest.mark.parametrize("dtype", BOTH)
def test_decoder(golden, dtype):
    case = golden("speech", "paraformer_decoder_a")
    config, wanted = case.config, case.group("output")
    names = ("encoder_output_size", "attention_heads", "linear_units", "num_blocks", "kernel_size")
    decoder = loaded(case, SanmDecoder(config["vocab_size"], *(config[k] for k in names)), dtype)
    given = inputs(case, dtype)
    call = (given["embeds"], given["embeds_lens"], given["encoder_out"], given["encoder_out_lens"])
    mask = inside(given["embeds_lens"], given["embeds"].shape[1])
    hidden, logits = decoder.hidden(*call), decoder(*call)
    close(logits, wanted["logits"])
    found = {"logits_valid": logits * mask, "hidden_valid": hidden * mask}
    for name, value in found.items():
        close(value, wanted[name])
    assert torch.equal(given["embeds_lens"].float(), wanted["olens"][:, 0])
    check_gradients(case, given, found, decoder, without=["embed.0.weight"])


@pytest.mark.parametrize("name", ["train", "infer", "v1_train"])
def test_predictor(golden, published_padding, name):
    case = golden("speech", f"paraformer_predictor_{name}_a")
    config, wanted, given = case.config, case.group("output"), inputs(case)
    predictor = CifPredictor(
        config["idim"], config["l_order"], config["r_order"], depthwise="v1" in name,
        threshold=config["threshold"], smooth=config["smooth_factor"], noise=config["noise_threshold"],
        tail=config["tail_threshold"],
    )  # fmt: skip
    loaded(case, predictor)
    targets = (given["target_label"] >= 0).sum(1) if "train" in name else None
    found = predictor(given["hidden"], given["lengths"], targets)
    numbers = found.totals if "train" in name else found.counts.to(DOUBLE)
    outputs = {
        "acoustic_embeds": found.tokens,
        "token_num": numbers,
        "alphas": found.alphas,
        "cif_peak": found.fires,
    }
    assert set(outputs) == set(wanted)
    for key, value in outputs.items():
        close(value, wanted[key])
    if targets is not None:
        assert torch.equal(found.counts, targets)
    check_gradients(case, given, outputs, predictor)


def test_predictor_with_weights_above_the_threshold(golden, published_padding):
    """Upstream fires once a frame at most, so weights above 1 pile up: its tokens until then, all weights."""
    case = golden("speech", "paraformer_predictor_v1_infer_a")
    config, wanted, given = case.config, case.group("output"), inputs(case)
    predictor = CifPredictor(
        16, depthwise=True, smooth=config["smooth_factor"], noise=config["noise_threshold"]
    )
    found = loaded(case, predictor)(given["hidden"], given["lengths"])
    close(found.alphas, wanted["alphas"])
    close(found.counts.to(DOUBLE), wanted["token_num"])
    sums = found.alphas.detach().cumsum(1).floor()
    steps = sums.diff(dim=1, prepend=torch.zeros(3, 1))
    until = [int(s[: int((row > 1).nonzero()[0])][-1]) if (row > 1).any() else int(s[-1])
             for s, row in zip(sums, steps, strict=True)]  # fmt: skip
    assert sum(until) > 10
    for b, tokens in enumerate(until):
        close(found.tokens[b, :tokens], wanted["acoustic_embeds"][b, :tokens])


@pytest.mark.parametrize("name", ["train", "infer"])
def test_predictor_for_timestamps(golden, published_padding, name):
    case = golden("speech", f"paraformer_bicif_{name}_a")
    config, wanted, given = case.config, case.group("output"), inputs(case)
    predictor = CifPredictor(
        config["idim"], tail=config["tail_threshold"], parts=config["upsample_times"],
        smooth2=config["smooth_factor2"], noise2=config["noise_threshold2"],
    )  # fmt: skip
    loaded(case, predictor)
    targets = (given["target_label"] >= 0).sum(1) if name == "train" else None
    hidden, lengths = given["hidden"], given["lengths"]
    found = predictor(hidden, lengths, targets)
    fine = predictor.fine_weights(hidden, lengths)
    us_alphas, us_peaks = predictor.places(hidden, lengths, wanted["ts_token_num"])
    ds_alphas = us_alphas.unflatten(1, (-1, 3)).sum(-1)
    outputs = {
        "acoustic_embeds": found.tokens,
        "token_num": found.totals if name == "train" else found.counts.to(DOUBLE),
        "alphas": found.alphas,
        "cif_peak": found.fires,
        "token_num2": fine.sum(1),
        "ds_alphas": ds_alphas,
        "ds_peaks": cif.peaks(ds_alphas, 1 - 1e-4),
        "us_alphas": us_alphas,
        "us_peaks": us_peaks,
    }
    assert set(outputs) == set(wanted) - {"timestamps_ms", "ts_token_num"}
    for key, value in outputs.items():
        close(value, wanted[key])
    check_gradients(case, given, outputs, predictor)


def test_recognition(golden, published_padding, published_sums):
    case = golden("speech", "paraformer_greedy_a")
    model, given, wanted = loaded(case, paraformer(**sizes(case.config))), inputs(case), case.group("output")
    lengths = given["speech_lengths"]
    found = model(given["speech"], lengths)
    outputs = {
        "encoder_out_valid": found.encoded * inside(lengths, found.encoded.shape[1]),
        "acoustic_embeds": model.predictor(found.encoded, lengths).tokens,
        "token_num": found.counts.to(DOUBLE),
        "alphas": found.alphas,
        "cif_peak": found.fires,
        "log_probs_valid": found.logits.log_softmax(-1) * inside(found.counts, found.logits.shape[1]),
    }
    assert set(outputs) == set(wanted) - {"argmax_ids", "token_int"}
    for key, value in outputs.items():
        close(value, wanted[key])
    best = found.logits.argmax(-1).masked_fill(~inside(found.counts, found.logits.shape[1])[..., 0], -1)
    assert torch.equal(best, wanted["argmax_ids"])
    assert greedy(found.logits, found.counts) == listed(wanted["token_int"])
    check_gradients(case, given, outputs, model, without=["decoder.embed.0.weight"])


def listed(ids: Tensor) -> list[list[int]]:
    return [[token for token in row if token >= 0] for row in ids.tolist()]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_from_the_waveform_to_the_tokens(golden, published_padding, dtype):
    case = golden("speech", "paraformer_e2e_a")
    given, wanted = case.group("input"), case.group("output")
    front = FrontEnd(given["cmvn"])
    waves = [wave[:n] for wave, n in zip(given["waveform"], given["waveform_lengths"], strict=True)]
    features, lengths = front.batch(waves)
    assert torch.equal(lengths, wanted["features_lens"])
    close(features, wanted["features"], 1e-3)
    model = loaded(case, paraformer(**sizes(case.config["model"])), dtype)
    with torch.no_grad():
        found = model(features.to(dtype), lengths)
    mask = inside(found.counts, found.logits.shape[1])
    outputs = {
        "encoder_out_valid": found.encoded * inside(lengths, found.encoded.shape[1]),
        "alphas": found.alphas,
        "cif_peak": found.fires,
        "acoustic_embeds": model.predictor(found.encoded, lengths).tokens,
        "log_probs_valid": found.logits.log_softmax(-1) * mask,
    }
    for key, value in outputs.items():
        close(value, wanted[key], 1e-3)
    assert found.counts.tolist() == wanted["token_num"].tolist()
    assert torch.equal(found.logits.argmax(-1).masked_fill(~mask[..., 0], -1), wanted["argmax_ids"])
    assert greedy(found.logits, found.counts) == listed(wanted["token_int"])


@pytest.mark.parametrize("dtype", BOTH)
@pytest.mark.parametrize("name", ["train", "train_ctc"])
def test_training(golden, published_padding, name, dtype):
    case = golden("speech", f"paraformer_{name}_a")
    config, given, wanted = case.config, inputs(case, dtype), case.group("output")
    model = loaded(case, paraformer(**sizes(config)), dtype).train()
    objective = Objective(
        smoothing=config["lsm_weight"], glancing=config["sampling_ratio"], count=config["predictor_weight"],
        ctc=config["ctc_weight"], per_token=config["length_normalized_loss"],
    )  # fmt: skip
    speech, lengths, text, sizes_ = (given[k] for k in ("speech", "speech_lengths", "text", "text_lengths"))
    order = given["sampler_permutation"]
    found = model.losses(speech, lengths, text, sizes_, objective, order)
    for ours, theirs in {"loss": "loss", "decoder": "loss_att", "count": "loss_pre", "ctc": "loss_ctc",
                         "accuracy": "acc"}.items():  # fmt: skip
        assert (ours in found) == (theirs in wanted)
        if ours in found:
            close(found[ours].reshape(1), wanted[theirs])
    targets = with_end(text, sizes_, 2)
    assert torch.equal(targets, wanted["ys_pad"]) and int((sizes_ + 1).sum()) == int(wanted["weight"])
    with torch.no_grad():
        encoded = model.encoder(speech, lengths)
        tokens = model.predictor(encoded, lengths, targets=sizes_ + 1).tokens
        mixed, guessed = model.show(tokens, targets, sizes_ + 1, encoded, lengths, objective.glancing, order)
    real = targets >= 0
    close(tokens, wanted["acoustic_embeds"])
    close(mixed * real[..., None], wanted["sematic_embeds"])
    assert torch.equal(guessed[real], wanted["pred_1st"][real])
    assert torch.equal(((guessed == targets) & real).sum(1), wanted["same_num"])
    assert torch.equal(glance(guessed, targets, objective.glancing, order).sum(1), wanted["target_num"])
    check_gradients(case, given, {"loss": found["loss"].reshape(1)}, model)
