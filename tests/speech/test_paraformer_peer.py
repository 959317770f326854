"""Against funasr itself, at real size with random weights, where it is installed (`pip install funasr`)."""

from __future__ import annotations

import importlib

import pytest
import torch

from manyheads.speech.models.paraformer import paraformer_large
from manyheads.speech.models.paraformer_streaming import Chunks, FeatureStream

pytestmark = pytest.mark.slow

LAYERS = {"attention_heads": 4, "linear_units": 2048, "kernel_size": 11}
PREDICTOR = {"idim": 512, "threshold": 1.0, "l_order": 1, "r_order": 1, "tail_threshold": 0.45}


def official(streaming: bool = False, timestamps: bool = False) -> torch.nn.Module:
    """The published classes with the large model's numbers."""
    pytest.importorskip("funasr")
    for name in (
        "bicif_paraformer.cif_predictor", "bicif_paraformer.model", "paraformer.cif_predictor",
        "paraformer.decoder", "paraformer.model", "paraformer_streaming.model", "sanm.encoder",
        "scama.encoder",
    ):  # fmt: skip
        importlib.import_module(f"funasr.models.{name}")
    tables = importlib.import_module("funasr.register").tables
    encoder = {"output_size": 512, "num_blocks": 50, "input_layer": "pe", "sanm_shfit": 0} | LAYERS
    decoder = {"num_blocks": 16, "att_layer_num": 16, "sanm_shfit": 5 if streaming else 0} | LAYERS
    predictor = dict(PREDICTOR)
    if streaming:
        encoder |= {"input_layer": "pe_online", "chunk_size": [12, 15], "stride": [8, 10], "pad_left": [0, 0]}
        encoder |= {"encoder_att_look_back_factor": [4, 4], "decoder_att_look_back_factor": [1, 1]}
        predictor["tail_mask"] = False
    if timestamps:
        predictor |= {"smooth_factor2": 0.25, "noise_threshold2": 0.01, "upsample_times": 3}
        predictor |= {"use_cif1_cnn": False, "upsample_type": "cnn_blstm"}
    name = "ParaformerStreaming" if streaming else "BiCifParaformer" if timestamps else "Paraformer"
    torch.manual_seed(0)
    model = tables.model_classes[name](
        encoder="SANMEncoderChunkOpt" if streaming else "SANMEncoder", encoder_conf=encoder,
        decoder="ParaformerSANMDecoder", decoder_conf=decoder,
        predictor="CifPredictorV3" if timestamps else "CifPredictorV2", predictor_conf=predictor,
        ctc_weight=0.0, input_size=560, vocab_size=8404, ignore_id=-1, blank_id=0, sos=1, eos=2,
        lsm_weight=0.1, length_normalized_loss=True, predictor_weight=1.0, predictor_bias=1,
        sampling_ratio=0.75, share_embedding=False,
    )  # fmt: skip
    return model.eval()


def ours(theirs: torch.nn.Module, **options):
    """Our large model with the same weights, every key of which it takes."""
    model = paraformer_large(**options).eval()
    model.load_state_dict(theirs.state_dict(), strict=True)
    return model


def scale(rows: int) -> torch.Tensor:
    return torch.randn(2, rows, 560, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_the_large_model():
    theirs = official()
    features, lengths = scale(100), torch.tensor([100, 100])
    encoded, _ = theirs.encode(features, lengths)
    tokens, numbers, alphas, _ = theirs.calc_predictor(encoded, lengths)
    logs, _ = theirs.cal_decoder_with_predictor(encoded, lengths, tokens, numbers.long())
    found = ours(theirs)(features, lengths)
    assert found.counts.tolist() == numbers.long().tolist() and int(found.counts.min()) > 10
    torch.testing.assert_close(found.encoded, encoded, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.alphas, alphas, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.logits.log_softmax(-1), logs, rtol=1e-4, atol=1e-4)
    assert torch.equal(found.logits.argmax(-1), logs.argmax(-1))


@torch.no_grad()
def test_the_large_models_timestamps():
    theirs = official(timestamps=True)
    hidden, lengths = (
        torch.randn(2, 100, 512, generator=torch.Generator().manual_seed(2)),
        torch.tensor([100, 100]),
    )
    numbers = torch.tensor([30, 12])
    _, _, alphas, peaks = theirs.calc_predictor_timestamp(hidden, lengths, numbers)
    found = ours(theirs, timestamps=True).predictor.places(hidden, lengths, numbers)
    torch.testing.assert_close(found[0], alphas, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found[1], peaks, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_the_large_online_model():
    theirs, chunks = official(streaming=True), Chunks()
    stream = FeatureStream(ours(theirs, streaming=True), chunks)
    cache = theirs.init_cache(
        {}, chunk_size=[0, 10, 5], encoder_chunk_look_back=4, decoder_chunk_look_back=1,
        encoder_conf={"output_size": 512}, frontend_conf={"n_mels": 80, "lfr_m": 7},
    )  # fmt: skip
    parts, written = scale(47)[:1].split(10, 1), 0
    for number, part in enumerate(parts):
        final = number == len(parts) - 1
        step = stream.step(part, final)
        size = torch.tensor([part.shape[1]])
        encoded, sizes = theirs.encode_chunk(part.clone(), size, cache=cache, is_final=final)
        torch.testing.assert_close(step.encoded, encoded, rtol=1e-4, atol=1e-4)
        tokens, count, _, _ = theirs.calc_predictor_chunk(encoded, sizes, cache=cache, is_final=final)
        assert int(count) == step.tokens.shape[1]
        if int(count):
            torch.testing.assert_close(step.tokens, tokens, rtol=1e-4, atol=1e-4)
            logs, _ = theirs.cal_decoder_with_predictor_chunk(encoded, sizes, tokens, count, cache=cache)
            torch.testing.assert_close(step.logits.log_softmax(-1), logs, rtol=1e-4, atol=1e-4)
            written += int(count)
    assert written > 10
