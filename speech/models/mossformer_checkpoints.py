"""Published weights of MossFormer and MossFormer2: read from their files, loaded strictly, made our folders.

The two models have been published by three codes, each with names of its own: "modelscope" (both models, on
ModelScope), "clearervoice" (MossFormer2 on Hugging Face; its code, ClearerVoice-Studio, trains either
model) and "standalone" (MossFormer2 for LibriMix, WSJ0 and WHAMR!, on Hugging Face too). What a file holds
is seen by its keys; the caller of `load_weights` says what is expected, and anything else is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from manyheads.core import hub
from manyheads.core.errors import DataError, UsageError
from manyheads.core.weights import check_fit, read_tensors
from manyheads.speech.models.mossformer import MossFormer, mossformer
from manyheads.speech.models.mossformer2 import MossFormer2, mossformer2

Separator = MossFormer | MossFormer2
Names = tuple[tuple[str, str], ...]

# How keys begin in each dialect, and ours; the first that fits counts.
_MASK_NET = "mask_net.mdl."
DIALECTS: dict[type[Separator], dict[str, Names]] = {
    MossFormer: {
        "modelscope": (("masknet.", "mask_net."),),
        "clearervoice": (
            ("enc.", "encoder."),
            ("dec.", "decoder."),
            (f"{_MASK_NET}intra_mdl.norm.", f"{_MASK_NET}att_mdl.norm.norm."),
            (f"{_MASK_NET}intra_mdl.", f"{_MASK_NET}att_mdl."),
            (f"{_MASK_NET}intra_norm.", f"{_MASK_NET}att_norm."),
        ),
    },
    MossFormer2: {
        "clearervoice": (),
        "modelscope": (),
        "standalone": (
            ("encoder.", "enc."),
            ("decoder.", "dec."),
            ("masknet.dual_mdl.0.intra_mdl.mdl.flashT.", f"{_MASK_NET}intra_mdl.mossformerM."),
            ("masknet.dual_mdl.0.intra_mdl.mdl.norm.norm.", f"{_MASK_NET}intra_mdl.norm."),
            ("masknet.dual_mdl.0.intra_norm.", f"{_MASK_NET}intra_norm."),
            ("masknet.", "mask_net."),
        ),
    },
}
# A part of some key that tells a dialect, by the model it is of.
_MARKS: dict[type[Separator], tuple[tuple[str, tuple[str, ...]], ...]] = {
    MossFormer: ((".att_mdl.", ("modelscope",)), (".intra_mdl.", ("clearervoice",))),
    MossFormer2: (
        ("masknet.dual_mdl.", ("standalone",)),
        (".intra_mdl.", ("clearervoice", "modelscope")),
    ),
}
_PARTS = ("encoder", "decoder", "masknet")
_ENDINGS = (".bin", ".ckpt", ".pt", ".pth", ".safetensors")
_WHOLE = ("model.safetensors", "pytorch_model.pt", "pytorch_model.bin")


def load_weights(model: Separator, state: Mapping[str, Tensor], dialect: str) -> None:
    """Load a published state dict; every key is used and every shape checked before any is copied.

    The prefixes `module.` and `model.`, which training and wrappers leave, are taken off.

    Args:
        model: Receives the weights; build it with the sizes and the number of speakers of the checkpoint.
        state: What `read_weights` returns, or a state dict of the published code.
        dialect: Whose code it is from: "modelscope", "clearervoice" or "standalone"; see the module.

    Raises:
        UsageError: The model is not published in this dialect.
        DataError: The weights are another model's or dialect's, or their keys or shapes are not the model's.

    Example:
        >>> model = mossformer2(num_spks=3)  # doctest: +SKIP
        >>> load_weights(model, read_weights("mossformer2-wsj0mix-3spk"), "standalone")  # doctest: +SKIP
    """
    kind = type(model)
    names = DIALECTS[kind].get(dialect)
    if names is None:
        raise UsageError(f"{kind.__name__} has no dialect {dialect!r} ({', '.join(DIALECTS[kind])})")
    state = _bare(state)
    _check_origin(kind, state, dialect)
    renamed = _renamed(state, names, kind)
    check_fit(model, renamed, type(model).__name__)
    model.load_state_dict(renamed, strict=True)


def convert(
    published: str | Path,
    folder: str | Path,
    *,
    sample_rate: int,
    group_size: int = 256,
    mapping: bool = False,
) -> hub.ModelConfig:
    """Write a model folder from a published one; which model, dialect and sizes it has, its weights tell.

    Args:
        published: What `read_weights` takes.
        folder: The model folder to write.
        sample_rate: Of the recordings that the model was trained with, in Hz: no file holds it.
        group_size: Frames within which its attention is quadratic; all published models have 256.
        mapping: It gives the sources' features, not masks: the published one for WHAMR! does, and no other.

    Raises:
        UsageError: The sample rate is not positive; only a MossFormer2 can map.
        DataError: The weights cannot be read, are no such model's, or their shapes do not fit together.

    Example:
        >>> convert("MossFormer2_SS_16K", "mossformer2_16k", sample_rate=16000)  # doctest: +SKIP
    """
    if sample_rate < 1:
        raise UsageError(f"sample_rate must be positive, not {sample_rate}")
    state = _bare(read_weights(published))
    kind, dialects = _origin(state)
    if mapping and kind is not MossFormer2:
        raise UsageError("mapping: these are weights of MossFormer, which gives masks")
    arguments = _sizes(_renamed(state, DIALECTS[kind][dialects[0]], kind), kind) | {"group_size": group_size}
    if kind is MossFormer2:
        arguments["mapping"] = mapping
    name = kind.__name__.lower()
    model = {MossFormer: mossformer, MossFormer2: mossformer2}[kind](**arguments)  # type: ignore[operator]
    load_weights(model, state, dialects[0])
    return hub.save(
        folder,
        model,
        domain="speech",
        name=name,
        arguments=arguments,
        preprocessing={"sample_rate": sample_rate},
        training={"converted_from": Path(published).name, "dialect": dialects[0]},
    )


def _sizes(state: Mapping[str, Tensor], kind: type[Separator]) -> dict[str, int | bool]:
    """The builder's arguments, by the shapes of weights with our names."""
    encoder, blocks = ("encoder", "att_mdl") if kind is MossFormer else ("enc", "intra_mdl")
    layers = f"{_MASK_NET}{blocks}.mossformerM.layers."
    numbers = {key.removeprefix(layers).partition(".")[0] for key in state if key.startswith(layers)}
    wanted = {
        "filters": f"{encoder}.conv1d.weight",
        "speakers": "mask_net.conv1d_out.weight",
        "keys": f"{layers}0.qk_offset_scale.gamma",
    }
    if kind is MossFormer2:
        wanted["inner"] = f"{_MASK_NET}{blocks}.mossformerM.fsmn.0.norm1.weight"
    missing = [key for key in wanted.values() if key not in state or not state[key].numel()]
    if missing:
        raise DataError(f"these weights of {kind.__name__} are not whole: {missing[0]} is missing")
    shapes = {name: state[key].shape for name, key in wanted.items()}
    dim = shapes["filters"][0]
    found: dict[str, int | bool] = {
        "num_spks": shapes["speakers"][0] // dim,
        "dim": dim,
        "depth": len(numbers),
        "kernel_size": shapes["filters"][-1],
        "query_key_dim": shapes["keys"][-1],
    }
    return found | {"inner": shapes["inner"][0]} if kind is MossFormer2 else found


def _bare(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Keys without the prefixes that training and wrappers leave."""
    for prefix in ("module.", "model."):
        if state and all(key.startswith(prefix) for key in state):
            state = {key.removeprefix(prefix): value for key, value in state.items()}
    return dict(state)


def _renamed(state: Mapping[str, Tensor], names: Names, kind: type[Separator]) -> dict[str, Tensor]:
    renamed = {_rename(key, names): value for key, value in state.items()}
    if len(renamed) != len(state):
        raise DataError(f"two keys of these weights are one and the same in {kind.__name__}")
    return renamed


def _rename(key: str, names: Names) -> str:
    for theirs, ours in names:
        if key.startswith(theirs):
            return ours + key.removeprefix(theirs)
    return key


def _origin(
    state: Mapping[str, Tensor], wanted: str = "MossFormer"
) -> tuple[type[Separator], tuple[str, ...]]:
    """The model that weights are of, and the dialects that they may be in."""
    found: type[Separator] = MossFormer2 if any(".fsmn." in key for key in state) else MossFormer
    for mark, dialects in _MARKS[found]:
        if any(mark in key for key in state):
            return found, dialects
    raise DataError(f"these are no weights of {wanted} in any dialect that is known here")


def _check_origin(wanted: type[Separator], state: Mapping[str, Tensor], dialect: str) -> None:
    found, dialects = _origin(state, wanted.__name__)
    fits = " or ".join(f'"{each}"' for each in dialects)
    if found is not wanted:
        raise DataError(
            f"these are weights of {found.__name__}, not of {wanted.__name__}:"
            f" load them into {found.__name__.lower()}(...) with the dialect {fits}"
        )
    if dialect not in dialects:
        raise DataError(
            f'these weights of {wanted.__name__} are of another dialect than "{dialect}": load them as {fits}'
        )


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Read the weights of a published folder or file, as one state dict; nothing in it is run.

    Args:
        path: A folder with `encoder`, `decoder` and `masknet` files (.bin or .ckpt), with a text file
            `last_best_checkpoint` that names one, or with a whole model's file; or such a file.

    Raises:
        DataError: There is no such file, or it holds no weights.

    Example:
        >>> state = read_weights("speech_mossformer_separation_temporal_8k")  # doctest: +SKIP
    """
    path = Path(path)
    if path.is_file():
        return read_tensors(path, ("model",))
    if not path.is_dir():
        raise DataError(f"there is no file or folder {path}")
    parts = {
        part: [path / (part + end) for end in _ENDINGS if (path / (part + end)).is_file()] for part in _PARTS
    }
    if all(parts.values()):
        joined = ((part, read_tensors(files[0], ("model",))) for part, files in parts.items())
        return {f"{part}.{key}": value for part, state in joined for key, value in state.items()}
    named = path / "last_best_checkpoint"
    if named.is_file():
        name = named.read_text(encoding="utf-8").strip()
        if Path(name).name != name or not (path / name).is_file():
            raise DataError(f"{named} names {name!r}, which is no file beside it")
        return read_tensors(path / name, ("model",))
    for name in _WHOLE:
        if (path / name).is_file():
            return read_tensors(path / name, ("model",))
    raise DataError(f"{path} has none of the files that MossFormer is published in")
