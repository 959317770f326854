"""A separator that is exact, local, and gives its speakers in any order; as a script, `manyheads` with it.

`python bands.py predict MODEL INPUT -o OUT` runs it whatever MODEL is, and prints its peak memory in MiB.
"""

import functools
import sys

import torch
import torch.nn.functional as F
from torch import nn

RATE = 8000


class Bands(nn.Module):
    """Separates low from high sounds, exactly and locally; which comes first differs from call to call.

    Args:
        shuffled: The order comes from the content of the chunk; else the low ones are first.
    """

    REACH = 64

    def __init__(self, shuffled: bool = True) -> None:
        super().__init__()
        place = torch.arange(-self.REACH, self.REACH + 1)
        window = torch.hamming_window(2 * self.REACH + 1, periodic=False)
        taps = torch.special.sinc(2 * 1800 / RATE * place) * window
        self.taps = nn.Parameter((taps / taps.sum())[None, None], requires_grad=False)
        self.shuffled = shuffled

    def forward(self, mixture, lengths=None):
        if lengths is not None:
            mixture = mixture * (torch.arange(mixture.shape[1]) < lengths[:, None])
        low = F.conv1d(mixture[:, None], self.taps, padding=self.REACH)[:, 0]
        turned = (mixture.double().abs().sum(1) * 1e4).long() % 2 == 1
        bands = torch.stack([low, mixture - low], 1)
        return torch.where((turned & self.shuffled)[:, None, None], bands.flip(1), bands)


def load(reference):
    """Return its predictor, and what identifies it."""
    from manyheads.speech.separation.predictor import Predictor

    return Predictor(Bands(), RATE), {"name": "bands", "sha256": "0"}


def main():
    """Run the command line with it."""
    from manyheads.apps import cli, jobs

    jobs.run_job = functools.partial(jobs.run_job, load=load)
    code = cli.main(sys.argv[1:])
    with open("/proc/self/status") as file:
        status = dict(line.split(":", 1) for line in file)
    print(int(status["VmHWM"].split()[0]) / 1024)
    return code


if __name__ == "__main__":
    sys.exit(main())
