"""What `tests/golden/speech/paraformer_conformer_*` holds, computed again by funasr where it is installed.

With MANYHEADS_RECORD=1 in the environment the files are written anew: `pip install funasr`, then
`MANYHEADS_RECORD=1 pytest -m slow tests/speech/test_conformer_peer.py`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from manyheads.speech.models.paraformer import paraformer_conformer

pytestmark = pytest.mark.slow

GOLDEN = Path(__file__).parents[1] / "golden" / "speech"
SEEDS = {"legacy": 7, "relative": 8, "train": 10}
NOTES = {
    "legacy": "Evaluation; both recordings fill the batch, as upstream lets padding into the others. The"
    " recipe leaves rel_pos_type at its default, legacy. grad.*: of sum(cotangent * output).",
    "relative": "As legacy, with rel_pos_type latest.",
    "train": "Training forward, dropout 0, train(): batch statistics. input.sampler_permutation: see"
    " paraformer_train_ctc_a. output.running_*: the first batch norm's after the pass. The seed is one"
    " with which every target token fires.",
}


def configuration(case: str) -> dict[str, Any]:
    """That of examples/aishell/paraformer/conf/paraformer_conformer_12e_6d_2048_256.yaml, smaller."""
    sizes = {"attention_heads": 4, "linear_units": 24, "num_blocks": 2}
    rates = {"dropout_rate": 0.0, "positional_dropout_rate": 0.0}
    layers = {"pos_enc_layer_type": "rel_pos", "selfattention_layer_type": "rel_selfattn"}
    layers |= {"activation_type": "swish", "input_layer": "conv2d"}
    switches = {"normalize_before": True, "macaron_style": True, "use_cnn_module": True}
    encoder = sizes | rates | layers | switches
    encoder |= {"output_size": 16, "attention_dropout_rate": 0.0, "cnn_module_kernel": 15}
    if case == "relative":
        encoder["rel_pos_type"] = "latest"
    decoder = sizes | rates | {"self_attention_dropout_rate": 0.0, "src_attention_dropout_rate": 0.0}
    predictor = {"idim": 16, "threshold": 1.0, "l_order": 1, "r_order": 1, "tail_threshold": 0.45}
    return {
        "encoder": "ConformerEncoder", "encoder_conf": encoder, "decoder": "ParaformerSANDecoder",
        "decoder_conf": decoder, "predictor": "CifPredictor", "predictor_conf": predictor | {"dropout": 0.0},
        "ctc_weight": 0.3, "input_size": 20, "vocab_size": 31, "ignore_id": -1, "blank_id": 0, "sos": 1,
        "eos": 2, "lsm_weight": 0.1, "length_normalized_loss": False, "predictor_weight": 1.0,
        "predictor_bias": 1, "sampling_ratio": 0.4, "use_1st_decoder_loss": True,
    }  # fmt: skip


def computed(case: str, funasr: Callable[[str], Any]) -> dict[str, Tensor]:
    """The case's tensors by funasr, in float64, rounded to float32."""
    torch.manual_seed(SEEDS[case])
    model = funasr("Paraformer")(**configuration(case))
    for name, parameter in model.named_parameters():
        if "norm" in name:  # as trained: not ones and zeros
            torch.nn.init.normal_(parameter, mean=float(name.endswith("weight")), std=0.2)
    for name, buffer in model.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            buffer.add_(torch.rand(buffer.shape))
    state = {key: value.clone() for key, value in model.state_dict().items()}
    inputs = {"speech": torch.randn(2, 61, 20), "speech_lengths": torch.tensor([61, 61])}
    model.double().train(case == "train")
    speech = inputs["speech"].double().requires_grad_()
    torch.set_default_dtype(torch.float64)  # of the predictor's running sums: in float32 it misses tokens
    try:
        outputs = trained(model, speech, inputs) if case == "train" else evaluated(model, speech, inputs)
    finally:
        torch.set_default_dtype(torch.float32)
    learnt = [name for name, value in outputs.items() if value.requires_grad]
    cotangents = {name: torch.randn(outputs[name].shape) for name in learnt}
    sum((outputs[name] * cotangents[name].double()).sum() for name in learnt).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    groups = {"param": state, "input": inputs, "output": outputs, "cotangent": cotangents}
    groups |= {"grad": gradients, "grad_input": {"speech": speech.grad}}
    found = {f"{group}.{key}": value for group, part in groups.items() for key, value in part.items()}
    return {
        key: (x.float() if x.is_floating_point() else x).detach().clone().contiguous()
        for key, x in found.items()
    }


def evaluated(model: Any, speech: Tensor, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Recognition."""
    encoded, lengths = model.encode(speech, inputs["speech_lengths"])
    tokens, numbers, alphas, fires = model.calc_predictor(encoded, lengths)
    logs, _ = model.cal_decoder_with_predictor(encoded, lengths, tokens, numbers.round().long())
    return {
        "encoder_out": encoded, "encoder_out_lens": lengths, "acoustic_embeds": tokens,
        "token_num": numbers.detach(), "alphas": alphas, "cif_peak": fires, "log_probs": logs,
        "ctc_logits": model.ctc.ctc_lo(encoded),
    }  # fmt: skip


def check_fires(fires: Tensor, counts: Tensor) -> None:
    """Assert that no token is lost to rounding, which upstream's running sums do even in float64."""
    assert (fires >= 1).sum(1).tolist() == counts.tolist(), "draw another seed"


def trained(model: Any, speech: Tensor, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Losses; the text is such that the first pass has some of it right."""
    inputs["text"] = torch.randint(3, 31, (2, 6))
    inputs["text"][1, 4:] = -1
    inputs["text_lengths"] = torch.tensor([6, 4])
    drawn = [torch.randperm(int(n) + 1) for n in inputs["text_lengths"]]
    inputs["sampler_permutation"] = torch.nn.utils.rnn.pad_sequence(drawn, batch_first=True, padding_value=-1)
    model.predictor.register_forward_hook(
        lambda *given: check_fires(given[-1][3], inputs["text_lengths"] + 1)
    )
    order, draw = iter(drawn), torch.randperm
    torch.randperm = lambda size: next(order)  # type: ignore[assignment]  # one draw a recording
    try:
        loss, stats, weight = model(speech, inputs["speech_lengths"], inputs["text"], inputs["text_lengths"])
    finally:
        torch.randperm = draw
    norm = model.encoder.encoders[0].conv_module.norm
    parts = {
        key: torch.as_tensor(stats[key]).reshape(1) for key in ("loss_att", "loss_pre", "loss_ctc", "acc")
    }
    buffers = {name: getattr(norm, name).clone() for name in ("running_mean", "running_var")}
    return {"loss": loss.reshape(1), "weight": weight.reshape(1), **parts, **buffers}


@pytest.mark.parametrize("case", SEEDS)
def test_funasr_computes_what_is_recorded(case, funasr):
    found = computed(case, funasr)
    path = GOLDEN / f"paraformer_conformer_{case}_a"
    if os.environ.get("MANYHEADS_RECORD") == "1":
        about = {
            "repo": "modelscope/FunASR",
            "commit": f"none: taken from the funasr {version('funasr')} wheel",
            "package_version": f"funasr {version('funasr')}, torch {torch.__version__}",
            "class": "funasr.models.paraformer.model.Paraformer",
            "files": ["funasr/models/conformer/encoder.py", "funasr/models/paraformer/decoder.py"],
            "config": configuration(case),
            "notes": NOTES[case],
            "computed_in": "float64",
        }
        path.with_suffix(".json").write_text(json.dumps(about, indent=1) + "\n")
        save_file(found, str(path.with_suffix(".safetensors")))
    recorded = load_file(str(path.with_suffix(".safetensors")))
    assert json.loads(path.with_suffix(".json").read_text())["config"] == configuration(case)
    assert recorded.keys() == found.keys()
    for key, value in recorded.items():
        torch.testing.assert_close(found[key], value, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_the_recipe_at_its_size(funasr):
    config = configuration("legacy")
    numbers = {"linear_units": 2048, "dropout_rate": 0.1, "positional_dropout_rate": 0.1}
    config["encoder_conf"] |= numbers | {"output_size": 256, "num_blocks": 12}
    config["decoder_conf"] |= numbers | {"num_blocks": 6}
    config["predictor_conf"]["idim"] = 256
    torch.manual_seed(0)
    theirs = funasr("Paraformer")(**config | {"input_size": 80, "vocab_size": 4233}).eval()
    model = paraformer_conformer(4233).eval()
    model.load_state_dict(theirs.state_dict(), strict=True)
    assert sum(p.numel() for p in theirs.parameters()) == 46_198_547
    features, lengths = torch.randn(2, 403, 80), torch.tensor([403, 403])
    encoded, spans = theirs.encode(features, lengths)
    tokens, counts, alphas, _ = theirs.calc_predictor(encoded, spans)
    logs, _ = theirs.cal_decoder_with_predictor(encoded, spans, tokens, counts.round().long())
    found = model(features, lengths)
    assert found.counts.tolist() == counts.long().tolist() and int(found.counts.min()) > 10
    torch.testing.assert_close(found.encoded, encoded, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.alphas, alphas, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.logits.log_softmax(-1), logs, rtol=1e-4, atol=1e-4)
