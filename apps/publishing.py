"""A model folder, published: verified, in one commit, with its card; then compared with the hub's list."""

from __future__ import annotations

import dataclasses
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from manyheads.core import catalog, files, hub_api
from manyheads.core.card import write_card
from manyheads.core.errors import ManyheadsError, UsageError
from manyheads.core.hub import CARD, CONFIG, WEIGHTS, read_config
from manyheads.core.references import Reference
from manyheads.core.verifying import verify

WRITERS = {"vision": "manyheads.vision.models.timm_folders:write"}  # of timm's layout


@dataclass(frozen=True)
class Push:
    """How to publish.

    Args:
        private: Make the repository, where there is none, one that others cannot read.
        timm: In timm's layout, for images.
        licence: Of the weights, for the card.
        message: Of the commit.
    """

    private: bool = False
    timm: bool = False
    licence: str = ""
    message: str = ""


@dataclass(frozen=True)
class Pushed:
    """What was published: the commit, and each file's SHA-256."""

    reference: str
    commit: str
    files: dict[str, str]


def push(folder: Path, reference: Reference, how: Push) -> Pushed:
    """Publish a model folder.

    Raises:
        UsageError: No token, or the hub may not be asked.
        ManyheadsError: The folder does not check, or the hub refuses.
    """
    if hub_api.offline():
        raise UsageError("HF_HUB_OFFLINE forbids to ask the hub")
    if hub_api.token() is None:
        raise UsageError("publishing needs a token that may write: set HF_TOKEN")
    verify(folder)
    with tempfile.TemporaryDirectory() as made:
        chosen = _files(folder, Path(made), reference, how)
        commit = _commit(chosen, reference, how)
        return _compare(chosen, reference, commit)


def _files(folder: Path, made: Path, reference: Reference, how: Push) -> dict[str, Path]:
    """Return what is published, by its name there."""
    config = read_config(folder)
    card = made / CARD
    card.write_text(_card(folder, reference, how), encoding="utf-8")
    if not how.timm:
        return {CONFIG: folder / CONFIG, WEIGHTS: folder / WEIGHTS, CARD: card}
    if config.domain not in WRITERS:
        raise UsageError(f"--timm is for models of images, and {config.name} is one of {config.domain}")
    write: Any = catalog.load_class(WRITERS[config.domain])
    write(folder, made / "timm")
    return {CONFIG: made / "timm" / CONFIG, WEIGHTS: made / "timm" / WEIGHTS, CARD: card}


def _card(folder: Path, reference: Reference, how: Push) -> str:
    """Return the card: one that a person has written is kept."""
    config = dataclasses.asdict(read_config(folder))
    given = (folder / CARD).read_text(encoding="utf-8")
    if "this/folder" not in given and not how.licence:
        return given
    if how.licence or given == write_card(config):
        text = write_card(config, licence=how.licence, use=str(reference))
    else:
        text = given.replace("this/folder", str(reference))
    return text.replace("library_name: manyheads", "library_name: timm") if how.timm else text


def _commit(chosen: dict[str, Path], reference: Reference, how: Push) -> str:
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.errors import HfHubHTTPError

    api = HfApi(endpoint=hub_api.endpoint(), token=hub_api.token(), library_name="manyheads")
    try:
        api.create_repo(reference.repository, private=how.private or None, exist_ok=True)
        if reference.revision is not None:
            api.create_branch(reference.repository, branch=reference.revision, exist_ok=True)
        made = api.create_commit(
            reference.repository,
            operations=[CommitOperationAdd(name, str(path)) for name, path in chosen.items()],
            commit_message=how.message or "A model folder of manyheads",
            revision=reference.revision,
        )
    except HfHubHTTPError as error:
        words = " ".join(str(getattr(error, "server_message", None) or error).split())[:200]
        status = getattr(error.response, "status_code", "")
        raise ManyheadsError(f"the hub refuses {reference} ({status}): {words}") from error
    except (OSError, ValueError, RuntimeError, LookupError) as error:
        raise ManyheadsError(
            f"{reference} could not be published: {' '.join(str(error).split())[:200]}"
        ) from error
    return str(made.oid)


def _compare(chosen: dict[str, Path], reference: Reference, commit: str) -> Pushed:
    """Compare what the hub lists with what was sent."""
    at = Reference(reference.repository, commit)
    listed = hub_api.list_files(at, commit).files
    hashes = {name: files.sha256(path) for name, path in chosen.items()}
    for name, path in chosen.items():
        there = listed.get(name)
        same = there is not None and there.size == path.stat().st_size
        if there is None or not same or there.sha256 not in (None, hashes[name]):
            raise ManyheadsError(f"{reference} at {commit} lists another {name} than was sent")
    return Pushed(str(reference), commit, hashes)
