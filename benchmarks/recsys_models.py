"""Steps of the recommenders beside their peers.

- BERT4Rec's training step, RecBole's and ours: the same batches of 64 of RecBole's samples of MovieLens 100K
  at a length of 200, the same sizes, dropout 0.2, mask rate 0.2, cross-entropy over all items, Adam; hiding
  the items is counted in both.
- The loss over 20,000 items: of the hidden places alone, and of all places with the others left out after.
- Recformer's encoding of items of films at the base width and all 12 layers, and transformers' Longformer on
  the same tokens with the same weights; each tenth of 5,000 items, for they take minutes.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import cycle
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.measure import Case, Note, difference, missing
from benchmarks.recsys_peer import configure, installed, quiet, version
from manyheads.core.datasets import locate
from manyheads.recsys.losses import cross_entropy
from manyheads.recsys.masking import mask_items
from manyheads.recsys.models.bert4rec import bert4rec
from manyheads.recsys.models.encoder import Items, Packed, pack

ITEMS, EVERY, LAYERS = 5000, 10, 12
STEP, LOSS, ENCODING = "BERT4Rec training step", "loss over 20,000 items", "Recformer encoding"


def cases(device: str) -> Iterator[Case | Note]:
    """Lines: the step, the loss, the encoding."""
    shape = "64 histories of ML-100K, length 200"
    yield training_step(shape) if installed() else missing(STEP, shape, "recbole")
    yield loss()
    shape = f"{ITEMS // EVERY:,} of {ITEMS:,} items, {LAYERS} layers of 768"
    yield encoding(shape) if installed("transformers") else missing(ENCODING, shape, "transformers")


def training_step(shape: str) -> Case:
    """RecBole's batches, one a call, and ours of the same rows."""
    from recbole.data import create_dataset, data_preparation
    from recbole.utils import get_model, init_seed

    config = configure(
        200, transform="mask_itemseq", train_batch_size=64, hidden_dropout_prob=0.2, attn_dropout_prob=0.2,
        ft_ratio=0.0, mask_ratio=0.2,
    )  # fmt: skip
    with quiet():
        init_seed(0, True)
        dataset = create_dataset(config)
        train, _, _ = data_preparation(config, dataset)
        peer = get_model("BERT4Rec")(config, train.dataset).train()
    loaded = iter(train)
    batches = [next(loaded) for _ in range(16)]  # of a shuffled epoch
    model = bert4rec(dataset.item_num - 1, max_len=200).train()
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in peer.parameters())
    theirs, ours = (torch.optim.Adam(each.parameters(), lr=1e-3) for each in (peer, model))
    mine, other = cycle([pack(batch["item_id_list"]) for batch in batches]), cycle(batches)

    def step() -> None:
        asked = mask_items(next(mine), model.mask_token, 0.2, 40)
        ours.zero_grad()
        cross_entropy(model(asked.batch, asked.at), asked.targets, model.items()).backward()
        ours.step()

    def peer_step() -> None:
        batch = _hidden(train, next(other))
        theirs.zero_grad()
        peer.calculate_loss(batch).backward()
        theirs.step()

    return Case(STEP, shape, version("recbole"), step, peer_step, 2.0)


def _hidden(train: Any, batch: Any) -> Any:
    """Hide items of a batch anew, as RecBole's loader does when it makes one."""
    return train.transform(train._dataset, batch)


def loss() -> Case:
    """The loss and its gradients at all places, and at the hidden ones alone."""
    states = torch.randn(16 * 200, 64, requires_grad=True)
    table = torch.randn(20_000, 64, requires_grad=True)
    bias = torch.zeros(20_000, requires_grad=True)
    at = torch.rand(3200).argsort()[:640]
    targets = torch.randint(0, 20_000, (640,))
    labels = torch.full((3200,), -100).index_copy(0, at, targets)
    leaves = (states, table, bias)

    def everywhere() -> tuple[Tensor, ...]:
        return torch.autograd.grad(F.cross_entropy(F.linear(states, table, bias), labels), leaves)

    def gathered() -> tuple[Tensor, ...]:
        return torch.autograd.grad(cross_entropy(states[at], targets, Items(table, bias)), leaves)

    shape = "640 of 3,200 places hidden, width 64"
    peer = f"torch {torch.__version__}, all places"
    return Case(LOSS, shape, peer, gathered, everywhere, 4.0, difference(gathered, everywhere))


def encoding(shape: str) -> Case:
    """Items of films as text: batches of like lengths, and in their order as they come."""
    from transformers import LongformerConfig, LongformerModel

    from manyheads.recsys.models.recformer import recformer
    from manyheads.recsys.models.recformer_checkpoints import from_longformer
    from manyheads.recsys.published import read_titles
    from manyheads.recsys.texts import TextTokens, item_texts

    films = list(read_titles("ml_latest_small", locate("ml_latest_small")).values())[:ITEMS]
    tokens = TextTokens.train([text for film in films for text in (*film, *film.values())], 8192)
    config = LongformerConfig(
        attention_window=64, vocab_size=8192, num_hidden_layers=LAYERS, max_position_embeddings=1026,
        type_vocab_size=1, pad_token_id=1, layer_norm_eps=1e-5,
    )  # fmt: skip
    peer = LongformerModel(config, add_pooling_layer=False).eval()
    model = recformer(8192, hidden_size=768, layers=LAYERS, heads=12, inner_size=3072).eval()
    model.load_state_dict(from_longformer(peer.state_dict()))
    nn.init.zeros_(model.longformer.embeddings.item_position_embeddings.weight)  # which the peer has not
    items = item_texts(tokens, films[::EVERY])

    def batches(order: Tensor) -> list[Packed]:
        return [Packed(part + 1, torch.arange(len(part) + 1).int()) for part in order.split(32)]

    @torch.inference_mode()
    def ours() -> Tensor:
        order = items.lengths.argsort()
        found = torch.cat([model(model.texts(items, batch)) for batch in batches(order)])
        return found[order.argsort()]

    @torch.inference_mode()
    def theirs() -> Tensor:
        found = []
        for batch in batches(torch.arange(len(items))):
            texts = model.texts(items, batch)
            everywhere = torch.zeros_like(texts.input_ids).index_fill(1, torch.tensor([0]), 1)
            mask = texts.real.long()
            states = peer(texts.input_ids, attention_mask=mask, global_attention_mask=everywhere)
            found.append(states.last_hidden_state[:, 0])
        return torch.cat(found)

    return Case(
        ENCODING, shape, f"{version('transformers')} Longformer", ours, theirs, 3.0,
        difference(ours, theirs), rounds=2,
    )  # fmt: skip
