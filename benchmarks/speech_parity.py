"""Parity of the speech models: python -m benchmarks.speech_parity [--only GLOB] [--json FILE].

A line a model, ours beside the published code's: at its real size, with the same random weights, outputs for
half a second of sound (separation) or five seconds of features (recognition), in float32 on one recording.
The peers must be installed: see `benchmarks.peers`. Differences are relative to the largest value where that
is above 1; trained parameters, and the tokens found, must be as many. Exits with 1 where a line fails, with 2
where a peer is missing.
"""

from __future__ import annotations

import argparse
import datetime
import fnmatch
import json
import platform
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks import peers
from benchmarks.peers import Kind
from manyheads.speech.models import mossformer, mossformer2, paraformer
from manyheads.speech.models.mossformer_checkpoints import Separator, load_weights
from manyheads.speech.models.paraformer import Paraformer

ALLOWED = 1e-4
SAMPLES, ROWS, FRAMES = 4000, 83, 500
PACKAGES = ("funasr", "clearvoice")


@dataclass(frozen=True)
class Line:
    """What was found for a model."""

    name: str
    peer: str
    parameters: int
    peer_parameters: int
    outputs: dict[str, float]
    tokens: int | None
    peer_tokens: int | None

    @property
    def ok(self) -> bool:
        """Whether everything is equal, or near enough."""
        same = self.parameters == self.peer_parameters and self.tokens == self.peer_tokens
        return same and all(value <= ALLOWED for value in self.outputs.values())

    def text(self) -> str:
        """The line of the printed table."""
        found = ", ".join(f"{key} {value:.0e}" for key, value in self.outputs.items())
        tokens = "" if self.tokens is None else f"{self.tokens} = {self.peer_tokens} tokens"
        return (
            f"{self.name:<24} {self.parameters:>12,} {self.peer_parameters:>12,} "
            f"{'ok' if self.ok else 'FAILS':<6} {self.peer:<18} {found} {tokens}"
        )


def separation(name: str, model: Separator, dim: int, depth: int, first: bool) -> Line:
    """MossFormer2, or the first MossFormer, against ClearerVoice's."""
    module = peers.clearvoice()
    theirs = module.MossFormer(in_channels=dim, out_channels=dim, num_blocks=depth).eval()
    if first:
        theirs.mask_net.mdl.intra_mdl = module.MossFormerM2(num_blocks=depth, d_model=dim).eval()
    liven(theirs)
    load_weights(model.eval(), theirs.state_dict(), "clearervoice")
    mixture = torch.randn(1, SAMPLES)
    with torch.no_grad():
        wanted = torch.stack(theirs(mixture), 1)
        outputs = {"voices": difference(model(mixture), wanted)}
    return Line(name, peers.label("clearvoice"), count(model), count(theirs), outputs, None, None)


def recognition(name: str, model: Paraformer, kind: Kind, size: int, rows: int) -> Line:
    """A Paraformer against funasr's."""
    theirs = peers.funasr_paraformer(kind)
    model.eval().load_state_dict(theirs.state_dict(), strict=True)
    features, lengths = torch.randn(1, rows, size), torch.tensor([rows])
    with torch.no_grad():
        encoded, spans = theirs.encode(features, lengths)
        tokens, number, alphas, _ = theirs.calc_predictor(encoded, spans)[:4]
        logs, _ = theirs.cal_decoder_with_predictor(encoded, spans, tokens, number.round().long())[:2]
        found = model(features, lengths)
        outputs = {
            "encoder": difference(found.encoded, encoded),
            "weights": difference(found.alphas, alphas),
            "logs": difference(found.logits.log_softmax(-1), logs),
        }
        if kind == "timestamps":
            fine, fires = model.predictor.places(found.encoded, spans, found.counts)
            peer = theirs.calc_predictor_timestamp(encoded, spans, number.round().long())
            outputs |= {"fine weights": difference(fine, peer[2]), "peaks": difference(fires, peer[3])}
    counts = (int(found.counts), int(number.round()))
    return Line(name, peers.label("funasr"), count(model), count(theirs), outputs, *counts)


def liven(model: nn.Module) -> None:
    """Make what begins as next to nothing or as a constant count, as in a trained model."""
    for name, parameter in model.named_parameters():
        if name.endswith("qk_offset_scale.gamma"):
            nn.init.normal_(parameter)
        elif "norm" in name:
            nn.init.normal_(parameter, mean=float(name.endswith("weight")), std=0.1)


def difference(found: Tensor, wanted: Tensor) -> float:
    """The largest difference, relative to the largest value where that is above 1."""
    if found.shape != wanted.shape:
        return float("inf")
    return ((found - wanted).abs().max() / wanted.abs().max().clamp(min=1)).item()


def count(model: nn.Module) -> int:
    """Trained parameters, each once; the peer's rotary frequencies are parameters that are not."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


LINES: dict[str, Callable[[str], Line]] = {
    "mossformer_base": lambda name: separation(name, mossformer.mossformer_base(), 384, 25, first=True),
    "mossformer_large": lambda name: separation(name, mossformer.mossformer_large(), 512, 24, first=True),
    "mossformer2": lambda name: separation(name, mossformer2.mossformer2(), 512, 24, first=False),
    "paraformer_large": lambda name: recognition(name, paraformer.paraformer_large(), "plain", 560, ROWS),
    "paraformer_large, times": lambda name: recognition(
        name, paraformer.paraformer_large(timestamps=True), "timestamps", 560, ROWS
    ),
    "paraformer_conformer": lambda name: recognition(
        name, paraformer.paraformer_conformer(4233), "conformer", 80, FRAMES
    ),
}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="*", metavar="GLOB", help="these lines alone")
    parser.add_argument("--json", type=Path, metavar="FILE", help="store the table")
    options = parser.parse_args()
    missing = [name for name in PACKAGES if not peers.is_installed(name)]
    if missing:
        print(f"{', '.join(missing)}: not installed, see benchmarks/peers.py", file=sys.stderr)
        return 2
    torch.manual_seed(0)
    lines = []
    for name in fnmatch.filter(LINES, options.only):
        lines.append(LINES[name](name))
        print(lines[-1].text(), flush=True)
    if options.json:
        facts = {"date": datetime.date.today().isoformat(), "python": platform.python_version()}
        rows = [asdict(line) | {"ok": line.ok} for line in lines]
        facts |= {"torch": torch.__version__, "allowed": str(ALLOWED)}
        options.json.write_text(json.dumps({"facts": facts, "rows": rows}, indent=1) + "\n")
    good = sum(line.ok for line in lines)
    print(f"{good} of {len(lines)} models compute what the published code computes")
    return 0 if good == len(lines) and lines else 1


if __name__ == "__main__":
    sys.exit(main())
