"""The table of the speech data sets."""

from __future__ import annotations

from manyheads.core.datasets import DataSet, File
from manyheads.speech.checksums import FILES


def _files(name: str) -> tuple[File, ...]:
    """The files of a data set; the first is its table, in whose folder the others lie."""
    rows = (line.rsplit(" ", 2) for line in FILES[name].split("\n") if line)
    return tuple(File(f"speech/{name}/{path}", int(size), sha256) for path, size, sha256 in rows)


_CLIPS = ("file", "speaker", "sample_rate", "num_samples", "seconds", "text", "source_path")

DATASETS: tuple[DataSet, ...] = (
    DataSet(
        name="fsdd",
        domain="speech",
        summary="Free Spoken Digit Dataset: 6 speakers say each digit 50 times, 8 kHz, 3,000 clips in a tar",
        licence="CC BY-SA 4.0 (its contributors)",
        files=_files("fsdd"),
        split="given",
        shape=(3000,),
        columns=("file", "digit", "speaker", "take", "split", "sample_rate", "num_samples"),
    ),
    DataSet(
        name="librispeech_speakers",
        domain="speech",
        summary="LibriSpeech clips of 100 speakers, and of 10 others for the test, 16 kHz, without text",
        licence="CC BY 4.0 (V. Panayotov et al., from LibriVox)",
        files=_files("librispeech_speakers"),
        split="by folder",
        shape=(200,),
        columns=("file", "speaker", "sex", *_CLIPS[2:]),
    ),
    DataSet(
        name="ljspeech_samples",
        domain="speech",
        summary="LJ Speech, a part: one reader, 22.05 kHz, 32 clips with text, 4 minutes",
        licence="public domain",
        files=_files("ljspeech_samples"),
        split="none",
        shape=(32,),
        columns=_CLIPS,
    ),
    DataSet(
        name="speechbrain_samples",
        domain="speech",
        summary="Two speakers with 6 short sentences each, 16 kHz, the text of 10, 28 seconds",
        licence="Apache-2.0 (SpeechBrain)",
        files=_files("speechbrain_samples"),
        split="none",
        shape=(12,),
        columns=_CLIPS,
    ),
    DataSet(
        name="libri2mix_debug",
        domain="speech",
        summary="8 noisy mixtures of two LibriSpeech speakers with their sources, 8 kHz, for evaluation",
        licence="CC BY-NC-SA 4.0 (for non-commercial use only)",
        files=_files("libri2mix_debug"),
        split="test only",
        shape=(8,),
        columns=_CLIPS,
    ),
)
