"""Published folders: read strictly, refused plainly."""

from __future__ import annotations

import json

import pytest
import torch
import yaml

from manyheads.core import catalog, hub
from manyheads.core.errors import DataError
from manyheads.speech.frontend import FrontEnd
from manyheads.speech.models.paraformer import greedy, paraformer, paraformer_conformer
from manyheads.speech.models.paraformer_checkpoints import (
    convert,
    load_published,
    load_weights,
    read_checkpoint,
)

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


def test_a_published_folder_becomes_a_model_folder(published, tmp_path):
    _, folder = published
    model, front_end, tokens = load_published(folder)
    config = convert(folder, tmp_path / "made")
    assert config.name == "paraformer" and "FunASR Model" in str(config.training["licence"])
    predictor = hub.load(tmp_path / "made")
    samples = torch.randn(16000)
    rows = front_end(samples)[None]
    assert torch.equal(predictor.front_end(samples)[None], rows)
    with torch.no_grad():
        assert torch.equal(predictor.model(rows).logits, model(rows).logits)
    assert predictor.tokens.names == tokens.names


@pytest.fixture
def conformer(published):
    """A published folder of a small model of the AISHELL recipe."""
    _, folder = published
    numbers = {"attention_heads": 4, "linear_units": 24, "num_blocks": 2}
    config = {
        "model": "Paraformer",
        "encoder": "ConformerEncoder",
        "encoder_conf": numbers | {"output_size": 16, "cnn_module_kernel": 15, "macaron_style": True},
        "decoder": "ParaformerSANDecoder",
        "decoder_conf": numbers,
        "predictor": "CifPredictor",
        "predictor_conf": {"idim": 16, "threshold": 1.0, "l_order": 1, "r_order": 1},
        "frontend_conf": {"fs": 16000, "n_mels": 80, "frame_length": 25, "frame_shift": 10}
        | {"lfr_m": 1, "lfr_n": 1},
    }  # fmt: skip
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    row = " ".join(["1.5"] * 80)
    (folder / "am.mvn").write_text(
        f"<Nnet>\n<AddShift> 80 80\n<LearnRateCoef> 0 [ {row} ]\n"
        f"<Rescale> 80 80\n<LearnRateCoef> 0 [ {row} ]\n</Nnet>\n"
    )
    model = paraformer_conformer(37, dim=16, units=24, encoder_blocks=2, decoder_blocks=2)
    for value in model.state_dict().values():
        if value.is_floating_point():
            value.uniform_(0.1, 0.2)
    torch.save(model.state_dict(), folder / "model.pt")
    return model.eval(), folder, config


def test_a_folder_of_the_aishell_recipe(conformer):
    model, folder, config = conformer
    found, front_end, tokens = load_published(folder)
    assert isinstance(front_end, FrontEnd) and front_end.size == 80 and len(tokens) == 37
    rows = front_end(torch.randn(16000))[None]
    with torch.no_grad():
        assert torch.equal(found(rows).logits, model(rows).logits)
    assert found.encoder.positions == "legacy" and found.predictor.tail == 0.45
    config["encoder_conf"] |= {"rel_pos_type": "latest"}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    assert load_published(folder).model.encoder.positions == "relative"
    config["encoder_conf"] |= {"activation_type": "relu"}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(DataError, match=r"encoder_conf\.activation_type is 'relu'; only 'swish'"):
        load_published(folder)


@pytest.mark.skipif("paraformer_conformer" not in catalog.list_models(), reason="no catalogue row yet")
def test_a_folder_of_the_aishell_recipe_becomes_a_model_folder(conformer, tmp_path):
    model, folder, _ = conformer
    assert convert(folder, tmp_path / "made").name == "paraformer_conformer"
    rows = torch.randn(1, 50, 80)
    with torch.no_grad():
        assert torch.equal(hub.load(tmp_path / "made").model(rows).logits, model(rows).logits)


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
        (
            {"encoder": "ConformerEncoder"},
            "decoder is 'ParaformerSANMDecoder'; known are ParaformerSANDecoder",
        ),
        ({"encoder": "TransformerEncoder"}, "encoder is 'TransformerEncoder'"),
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


def test_a_config_that_unfolds_without_end_is_refused(published):
    """Nine aliases of nine each, nine times: a few hundred letters, whose text would fill a disk."""
    _, folder = published
    levels = "\n".join(f"l{i}: &l{i} [{', '.join([f'*l{i - 1}'] * 9)}]" for i in range(1, 12))
    text = f"l0: &l0 [x]\n{levels}\nmodel: Paraformer\nencoder: *l11\n"
    (folder / "config.yaml").write_text(text)
    with pytest.raises(DataError, match="repeats parts of itself by aliases: refused"):
        load_published(folder)
    (folder / "config.yaml").write_text("# " + "x" * (1 << 20))
    with pytest.raises(DataError, match="is too long"):
        load_published(folder)
