"""How others publish weights of our speech models, and where ours by name are. Data only."""

from __future__ import annotations

from manyheads.core.dialects import Dialect, Source

_MOSSFORMER = "manyheads.speech.models.mossformer_checkpoints:convert"
_OPTIONS = ("sample_rate", "group_size", "mapping")
_FUNASR = "FunASR Model Open Source License (attribution)"
_RATE = "it needs --option sample_rate=..., which no file says"

DIALECTS: tuple[Dialect, ...] = (
    Dialect(
        name="mossformer",
        summary=f"MossFormer and MossFormer2 in three files, encoder, decoder and masknet; {_RATE}",
        files=(
            "encoder.bin|encoder.ckpt|encoder.pt|encoder.pth|encoder.safetensors",
            "decoder.bin|decoder.ckpt|decoder.pt|decoder.pth|decoder.safetensors",
            "masknet.bin|masknet.ckpt|masknet.pt|masknet.pth|masknet.safetensors",
        ),
        converter=_MOSSFORMER,
        options=_OPTIONS,
    ),
    Dialect(
        name="clearervoice",
        summary=f"MossFormer2 in the file that last_best_checkpoint names; {_RATE}",
        files=("last_best_checkpoint", "last_best_checkpoint.pt|*.pt"),
        converter=_MOSSFORMER,
        options=_OPTIONS,
    ),
    Dialect(
        name="mossformer-file",
        summary=f"MossFormer and MossFormer2 in one file; {_RATE}",
        files=("*.bin|*.ckpt|*.pt|*.pth|*.safetensors",),
        converter=_MOSSFORMER,
        options=_OPTIONS,
        named=True,
    ),
    Dialect(
        name="funasr",
        summary="FunASR's Paraformer folders",
        files=("config.yaml", "model.pt", "am.mvn", "tokens.json|tokens.txt", "seg_dict?"),
        mark=("config.yaml", "model", ("Paraformer", "BiCifParaformer", "ParaformerStreaming")),
        converter="manyheads.speech.models.paraformer_checkpoints:convert",
        licence=_FUNASR,
    ),
)

# The other published ones are alike; they are given by their references:
# alibabasglab/mossformer2-librimix-2spk, -wsj0mix-3spk (8 kHz), -whamr-2spk (8 kHz, mapping=true).
SOURCES: dict[str, Source] = {
    "mossformer2": Source("alibabasglab/MossFormer2_SS_16K", "clearervoice", options={"sample_rate": 16000}),
}
