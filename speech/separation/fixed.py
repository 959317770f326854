"""Mixtures that are files: a folder with `mix`, `s1`, `s2` and so on, one file of one name in each."""

from __future__ import annotations

from pathlib import Path

import torch

from manyheads.core.errors import BadRecord, DataError
from manyheads.speech.audio import read
from manyheads.speech.separation.mixing import Mixture
from manyheads.speech.sources import list_audio

MIX = "mix"


def is_fixed(folder: Path) -> bool:
    """Whether a folder holds mixtures with their sources."""
    return (folder / MIX).is_dir() and (folder / "s1").is_dir()


class FixedMixtures:
    """The mixtures of a folder, in the order of their names.

    Args:
        folder: Holds `mix`, `s1`, `s2`, ...
        speakers: Voices of a mixture.
        sample_rate: Of what is read, in Hz.

    Raises:
        DataError: The folders do not hold the same names, or not as many voices.
    """

    def __init__(self, folder: Path, speakers: int, sample_rate: int) -> None:
        self.folder, self.sample_rate = folder, sample_rate
        voices = [f"s{n}" for n in range(1, speakers + 1)]
        for name in voices:
            if not (folder / name).is_dir():
                raise DataError(
                    f"{folder} has no folder {name}, and mixtures of {speakers} voices are wanted"
                )
        if (folder / f"s{speakers + 1}").is_dir():
            raise DataError(f"{folder} has mixtures of more than {speakers} voices")
        listed = [{ref.id: ref for ref in list_audio(folder / name)} for name in (MIX, *voices)]
        for name, refs in zip(voices, listed[1:], strict=True):
            other = sorted(set(refs) ^ set(listed[0]))
            if other:
                raise DataError(f"{folder}: {other[0]} is not in both {MIX} and {name}")
        self.names = list(listed[0])
        self._paths = [[Path(str(refs[name].place)) for refs in listed] for name in self.names]

    @property
    def source(self) -> str:
        """The folder."""
        return str(self.folder)

    def __len__(self) -> int:
        return len(self.names)

    def sample(self, index: int, epoch: int = 0) -> Mixture:
        """Read a mixture and its sources, cut to the shortest of them.

        Raises:
            DataError: A file cannot be used.
        """
        found = []
        for path in self._paths[index]:
            try:
                found.append(read(path, self.sample_rate))
            except BadRecord as error:
                raise DataError(f"{path} cannot be used ({error})") from None
        length = min(map(len, found))
        mixture, *sources = (each[:length] for each in found)
        return Mixture(self.names[index].rsplit(".", 1)[0], mixture, torch.stack(sources))
