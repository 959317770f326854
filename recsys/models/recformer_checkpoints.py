"""Published weights of Recformer, and of the Longformer that it begins as, into our module.

Source: AaronHeee/RecFormer, `convert_pretrain_ckpt.py` and `save_longformer_ckpt.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from manyheads.core.errors import DataError
from manyheads.core.weights import check_fit, read_tensors
from manyheads.recsys.models.recformer import Recformer
from manyheads.recsys.models.text_encoder import TYPES, TextSizes

WORDS = "longformer.embeddings.word_embeddings.weight"
_TRAINED = "_forward_module.model."  # what lightning and DeepSpeed put before every name
_COUNTING = "longformer.embeddings.position_ids"
_HEAD_DIM = 64


def from_recformer(state: Mapping[str, Tensor], words: Tensor | None = None) -> dict[str, Tensor]:
    """Turn the published layouts into our names: a bare encoder, a whole model, or a training's file.

    Args:
        state: What was read.
        words: The table of words, which a training's file lacks where it was frozen: Longformer's own.

    Raises:
        DataError: The table of words is missing, a table that should count does not, or the two biases of the
            head, which are one, differ.
    """
    found = {key.removeprefix(_TRAINED): value for key, value in state.items()}
    if not any(key.startswith("longformer.") for key in found):
        found = {f"longformer.{key}": value for key, value in found.items()}
    if words is not None and WORDS not in found:
        found[WORDS] = words
    if WORDS not in found:
        raise DataError(
            "the Recformer weights lack the table of words (it was frozen in their training): give "
            "Longformer's, too"
        )
    return _plain(found)


def from_longformer(state: Mapping[str, Tensor], max_items: int = 50) -> dict[str, Tensor]:
    """Turn Longformer's weights into what Recformer's pretraining begins with.

    Its one token type becomes four alike; the items' positions, which it has not, are drawn.

    Args:
        state: Of a `LongformerModel` or `LongformerForMaskedLM`.
        max_items: Items of a text at most.

    Raises:
        DataError: As `from_recformer`; or it has more than one token type.
    """
    found = from_recformer({key: value for key, value in state.items() if "pooler." not in key})
    key = "longformer.embeddings.token_type_embeddings.weight"
    if key not in found or len(found[key]) != 1:
        raise DataError("these are not the weights of a Longformer: it has one token type")
    found[key] = found[key].repeat(TYPES, 1)
    items = torch.empty(max_items + 1, found[WORDS].shape[1])
    found["longformer.embeddings.item_position_embeddings.weight"] = items.normal_(std=0.02)
    return found


def _plain(found: dict[str, Tensor]) -> dict[str, Tensor]:
    """Leave out what is there twice, having looked whether it is."""
    counting = found.pop(_COUNTING, None)
    if counting is not None and not torch.equal(counting.flatten(), torch.arange(counting.numel())):
        raise DataError(f"{_COUNTING} does not count")
    bias = found.pop("lm_head.decoder.bias", None)
    if bias is not None and not torch.equal(bias, found.setdefault("lm_head.bias", bias)):
        raise DataError("lm_head.bias and lm_head.decoder.bias, which are one, differ")
    return found


def read_recformer(
    path: Path, longformer: Path | None = None, heads: int | None = None, window: int = 64
) -> Recformer:
    """Read a published file into a model of its sizes, strictly.

    Args:
        path: `recformer_pretrain_ckpt.bin`, `seqrec_pretrain_ckpt.bin`, a fine-tuned model, or a training's
            file.
        longformer: The file of the words' table, where the training's file lacks it.
        heads: Heads of attention; None is one for each 64 channels.
        window: Longformer's attention_window; no weight tells.

    Raises:
        DataError: A file cannot be read, or its weights are not a Recformer's.
    """
    words = None
    if longformer is not None:
        words = from_recformer(read_tensors(longformer))[WORDS]
    state = from_recformer(read_tensors(path), words)
    model = build_like(state, heads, window)
    model.load_state_dict(state, strict=True, assign=True)
    return model.eval()


def build_like(state: Mapping[str, Tensor], heads: int | None = None, window: int = 64) -> Recformer:
    """Build, without memory, the model whose weights these are.

    Raises:
        DataError: They are no Recformer's.
    """
    inside, layers = "longformer.embeddings.", "longformer.encoder.layer."
    try:
        vocab_size, hidden = state[WORDS].shape
        sizes = TextSizes(
            vocab_size=vocab_size,
            hidden_size=hidden,
            layers=1 + max(int(key.split(".")[3]) for key in state if key.startswith(layers)),
            heads=heads or max(1, hidden // _HEAD_DIM),
            inner_size=len(state[f"{layers}0.intermediate.dense.bias"]),
            positions=len(state[f"{inside}position_embeddings.weight"]),
            max_items=len(state[f"{inside}item_position_embeddings.weight"]) - 1,
            window=window,
            dropout=0.1,
        )
    except (KeyError, ValueError) as error:
        raise DataError(f"these are no weights of a Recformer ({error})") from error
    items = state.get("item_embedding.weight")
    with torch.device("meta"):
        model = Recformer(sizes, 0 if items is None else len(items), "lm_head.bias" in state)
    check_fit(model, state, "Recformer")
    return model
