"""Published folders: read strictly, refused plainly."""

from __future__ import annotations

import json

import pytest
import torch
import yaml

from manyheads.core.errors import DataError
from manyheads.speech.models.paraformer import greedy, paraformer
from manyheads.speech.models.paraformer_checkpoints import load_published, load_weights, read_checkpoint

NAMES = ["<blank>", "<s>", "</s>", *(f"t{i}" for i in range(33)), "<unk>"]


def configuration(case, **model) -> dict:
    """A recorded configuration in the layout of a published config.yaml."""
    config = case.config["model"]
    sections = ("encoder", "decoder", "predictor", "encoder_conf", "decoder_conf", "predictor_conf")
    kept = {k: config[k] for k in sections}
    rest = {k: config[k] for k in ("ctc_weight", "lsm_weight", "predictor_weight", "sampling_ratio")}
    return {
        "model": "Paraformer",
        **kept,
        "model_conf": rest,
        "frontend_conf": case.config["frontend"],
    } | model


@pytest.fixture
def published(golden, tmp_path):
    """A published folder of the recorded tiny model."""
    case = golden("speech", "paraformer_e2e_a")
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(configuration(case)))
    (tmp_path / "tokens.json").write_text(json.dumps(NAMES))
    shift, scale = (" ".join(map(repr, row)) for row in case.tensors["input.cmvn"].tolist())
    (tmp_path / "am.mvn").write_text(
        f"<Nnet>\n<AddShift> 560 560\n<LearnRateCoef> 0 [ {shift} ]\n"
        f"<Rescale> 560 560\n<LearnRateCoef> 0 [ {scale} ]\n</Nnet>\n"
    )
    torch.save(case.group("param"), tmp_path / "model.pt")
    return case, tmp_path


def test_a_published_folder_recognises(published):
    case, folder = published
    model, front_end, tokens = load_published(folder)
    assert not model.training and len(tokens) == model.vocab_size == 37
    given, wanted = case.group("input"), case.group("output")
    count = int(given["waveform_lengths"].argmax())
    wave = given["waveform"][count][: given["waveform_lengths"][count]]
    with torch.no_grad():
        found = model(front_end(wave)[None])
    ids = greedy(found.logits, found.counts)[0]
    assert ids == [token for token in wanted["token_int"][count].tolist() if token >= 0]
    assert tokens.text(ids) == " ".join(NAMES[i] for i in ids)
    assert all(p.requires_grad and p.device.type == "cpu" for p in model.parameters())


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: {"state_dict": state, "epoch": 3},
        lambda state: {"model": {f"module.{k}": v for k, v in state.items()}},
        lambda state: {k: v.half() for k, v in state.items()},
    ],
)
def test_wrapped_weights(published, wrap):
    case, folder = published
    torch.save(wrap(case.group("param")), folder / "model.pt")
    state = load_published(folder).model.state_dict()
    for key, value in case.group("param").items():
        torch.testing.assert_close(state[key], value, rtol=1e-3, atol=1e-3)


def test_a_folder_with_timestamps_and_ctc(published):
    case, folder = published
    model = paraformer(37, dim=16, units=24, encoder_blocks=3, decoder_blocks=2, timestamps=True, ctc=True)
    torch.save(model.state_dict(), folder / "model.pt")
    changed = configuration(case, model="BiCifParaformer", predictor="CifPredictorV3")
    (folder / "config.yaml").write_text(yaml.safe_dump(changed))
    loaded = load_published(folder).model
    hidden, lengths = torch.randn(1, 20, 16), torch.tensor([20])
    assert torch.equal(
        loaded.predictor.fine_weights(hidden, lengths), model.predictor.fine_weights(hidden, lengths)
    )
    assert torch.equal(loaded.ctc(hidden), model.ctc(hidden))


@pytest.mark.parametrize(
    ("spoil", "complaint"),
    [
        (lambda s: s.pop("decoder.after_norm.bias"), r"missing \(decoder.after_norm.bias"),
        (lambda s: s.update({"decoder.extra": torch.zeros(1)}), r"left over \(decoder.extra"),
        (lambda s: s.update({"ctc.ctc_lo.weight": torch.zeros(37, 16)}), r"missing \(ctc.ctc_lo.bias"),
        (
            lambda s: s.update({"decoder.embed.0.weight": torch.zeros(38, 16)}),
            r"decoder.embed.0.weight is \[38, 16\], not \[37, 16\]",
        ),
        (lambda s: s.update({"decoder.after_norm.bias": torch.zeros(16).long()}), "is torch.int64"),
        (lambda s: s.update({"bias_encoder.weight_ih_l0": torch.zeros(1)}), "contextual Paraformer"),
        (lambda s: s.update({"seaco_decoder.x": torch.zeros(1)}), "SeACo"),
        (lambda s: s.update({"encoder.embed.conv.0.weight": torch.zeros(1)}), "Conformer"),
        (lambda s: s.update({"decoder.decoders2.0.norm1.weight": torch.zeros(1)}), "without attention"),
        (lambda s: s.update({"epoch": 3}), "no state dict of tensors"),
        (lambda s: s.clear(), "no state dict of tensors"),
    ],
)
def test_weights_of_others_are_refused(published, spoil, complaint):
    case, folder = published
    state = case.group("param")
    spoil(state)
    torch.save(state, folder / "model.pt")
    with pytest.raises(DataError, match=complaint):
        load_published(folder)


def test_nothing_is_copied_when_weights_do_not_fit(golden):
    state = golden("speech", "paraformer_e2e_a").group("param")
    model = paraformer(37, dim=16, units=24, encoder_blocks=3, decoder_blocks=2)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(DataError, match="1 missing"):
        load_weights(model, {k: v for k, v in state.items() if k != "predictor.cif_output.bias"})
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    load_weights(model, state)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"model": "SeacoParaformer"}, "model is 'SeacoParaformer'; known are Paraformer"),
        ({"encoder": "ConformerEncoder"}, "encoder is 'ConformerEncoder'"),
        ({"decoder": "ParaformerDecoderSAN"}, "decoder is 'ParaformerDecoderSAN'"),
        ({"encoder_conf": {"sanm_shfit": 3}}, "encoder_conf.sanm_shfit is 3; only 0 is known"),
        ({"encoder_conf": {"kernel_size": 9}}, "kernel_size differs"),
        ({"encoder_conf": {"output_size": "16"}}, "output_size must be a positive whole number, not '16'"),
        ({"encoder_conf": {"output_size": 32}}, "of another shape"),
        ({"decoder_conf": {"att_layer_num": 1}}, "2 decoder layers, of which 1 attend"),
        ({"decoder_conf": {"sanm_shfit": 2}}, "sanm_shfit is 2 with filters of 11"),
        ({"predictor_conf": {"threshold": 0.9}}, "predictor_conf.threshold is 0.9"),
        ({"predictor_conf": {"tail_threshold": "a"}}, "must be numbers"),
        ({"frontend_conf": {"window": "povey"}}, "frontend_conf.window is 'povey'"),
        ({"frontend_conf": {"lfr_m": 5}}, r"cmvn must be \[2, 400\]"),
        ({"model_conf": {"share_embedding": True}}, "share_embedding is True"),
        ({"frontend_conf": 3}, "frontend_conf is not an object"),
    ],
)
def test_configurations_of_others_are_refused(published, changes, complaint):
    case, folder = published
    config = configuration(case)
    for key, value in changes.items():
        config[key] = config[key] | value if isinstance(value, dict) else value
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(DataError, match=complaint):
        load_published(folder)


@pytest.mark.parametrize("name", ["config.yaml", "am.mvn", "tokens.json", "model.pt"])
def test_missing_and_broken_files_are_refused(published, name):
    _, folder = published
    content = (folder / name).read_bytes()
    (folder / name).unlink()
    with pytest.raises(DataError, match=name.replace(".", r"\.")):
        load_published(folder)
    (folder / name).write_bytes(content[: len(content) // 2] + b"\xff{[")
    with pytest.raises(DataError, match=name.replace(".", r"\.")):
        load_published(folder)


def test_no_code_is_run(tmp_path):
    class Spy:
        def __reduce__(self):
            return (print, ("run",))

    torch.save({"a": Spy()}, tmp_path / "model.pt")
    with pytest.raises(DataError, match="does not hold tensors alone"):
        read_checkpoint(tmp_path / "model.pt")
