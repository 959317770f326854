"""Steps of the recommenders beside their peers: python -m benchmarks.recsys_models [--peer PYTHON].

One thread, CPU time, medians. PYTHON is of an environment with recbole (see `benchmarks.recsys_data`);
without it the step is left out.

- BERT4Rec's training step, RecBole's and ours: the same batches of 64 of RecBole's samples of MovieLens 100K
  at a length of 200, the same sizes, dropout 0.2, mask rate 0.2, cross-entropy over all items, Adam; making
  the batch is counted in both.
- The loss over 20,000 items: of the hidden places alone, and of all places with the others left out after.
- Recformer's encoding of 5,000 items of films, at the base width and two of its layers, and transformers'
  Longformer on the same tokens with the same weights.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

from manyheads.core.datasets import locate

RECBOLE = """
import os, sys, time, warnings, json
warnings.filterwarnings("ignore")
import numpy, torch; torch.set_num_threads(1)
import recbole
from recbole.config import Config
from recbole.data import create_dataset, data_preparation
from recbole.utils import get_model, init_seed
root = os.path.join(os.path.dirname(recbole.__file__), "dataset_example")
split = {"split": {"LS": "valid_and_test"}, "order": "TO", "group_by": "user", "mode": "full"}
config = Config("BERT4Rec", "ml-100k", config_dict=dict(
    data_path=root, use_gpu=False, MAX_ITEM_LIST_LENGTH=200, train_neg_sample_args=None, loss_type="CE",
    load_col={"inter": ["user_id", "item_id", "timestamp"]}, eval_args=split, train_batch_size=64,
    user_inter_num_interval="[5,inf)", item_inter_num_interval="[5,inf)", show_progress=False,
    transform="mask_itemseq", hidden_dropout_prob=0.2, attn_dropout_prob=0.2, ft_ratio=0.0, mask_ratio=0.2))
init_seed(0, True)
dataset = create_dataset(config)
train, _, _ = data_preparation(config, dataset)
model = get_model("BERT4Rec")(config, train.dataset).train()
optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
batches, seconds, rows = iter(train), [], []
for _ in range(int(sys.argv[2])):
    begin = time.process_time()
    batch = next(batches)
    optimizer.zero_grad()
    model.calculate_loss(batch).backward()
    optimizer.step()
    seconds.append(time.process_time() - begin)
    rows.append(batch["item_id_list"].numpy())
numpy.save(sys.argv[1], numpy.stack(rows))
print(json.dumps([seconds, dataset.item_num - 1, sum(p.numel() for p in model.parameters())]))
"""


def timed(function: Callable[[], object], rounds: int) -> float:
    """Return the median seconds of several rounds, one for warming up left out."""
    seconds = []
    for _ in range(rounds + 1):
        begin = time.process_time()
        function()
        seconds.append(time.process_time() - begin)
    return statistics.median(seconds[1:])


def training_step(python: str, rounds: int) -> tuple[float, float]:
    """Return RecBole's seconds of a step and ours, on the same batches."""
    import numpy as np

    from manyheads.recsys.losses import cross_entropy
    from manyheads.recsys.masking import mask_items
    from manyheads.recsys.models.bert4rec import bert4rec
    from manyheads.recsys.models.encoder import pack

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.npy"
        command = [python, "-c", RECBOLE, str(path), str(rounds + 1)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        rows = torch.from_numpy(np.load(path))
    theirs, items, parameters = json.loads(done.stdout.splitlines()[-1])
    torch.manual_seed(0)
    model = bert4rec(items, max_len=200).train()
    assert sum(p.numel() for p in model.parameters()) == parameters
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    batches = iter(rows)

    def step() -> None:
        asked = mask_items(pack(next(batches)), model.mask_token, 0.2, 40)
        optimizer.zero_grad()
        cross_entropy(model(asked.batch, asked.at), asked.targets, model.items()).backward()
        optimizer.step()

    ours = timed(step, rounds)
    return statistics.median(theirs[1:]), ours


def losses(rounds: int) -> tuple[float, float]:
    """Return the seconds of the loss and its gradients at all places, and at the hidden ones alone."""
    from manyheads.recsys.losses import cross_entropy
    from manyheads.recsys.models.encoder import Items

    states = torch.randn(16 * 200, 64, requires_grad=True)
    table = torch.randn(20_000, 64, requires_grad=True)
    bias = torch.zeros(20_000, requires_grad=True)
    at = torch.rand(3200).argsort()[:640]
    targets = torch.randint(0, 20_000, (640,))
    labels = torch.full((3200,), -100).index_copy(0, at, targets)

    def everywhere() -> None:
        F.cross_entropy(F.linear(states, table, bias), labels).backward()

    def gathered() -> None:
        cross_entropy(states[at], targets, Items(table, bias)).backward()

    return timed(everywhere, rounds), timed(gathered, rounds)


def encoding(rounds: int, count: int) -> tuple[float, float]:
    """Return the seconds of transformers' Longformer for items, and ours."""
    from transformers import LongformerConfig, LongformerModel

    from manyheads.recsys.models.encoder import Packed
    from manyheads.recsys.models.recformer import recformer
    from manyheads.recsys.models.recformer_checkpoints import from_longformer
    from manyheads.recsys.published import read_titles
    from manyheads.recsys.texts import TextTokens, item_texts

    folder = locate("ml_latest_small")
    films = list(read_titles("ml_latest_small", folder).values())[:count]
    tokens = TextTokens.train([text for film in films for text in (*film, *film.values())], 8192)
    config = LongformerConfig(
        attention_window=64, vocab_size=8192, num_hidden_layers=2, max_position_embeddings=1026,
        type_vocab_size=1, pad_token_id=1, layer_norm_eps=1e-5,
    )  # fmt: skip
    peer = LongformerModel(config, add_pooling_layer=False).eval()
    model = recformer(8192, hidden_size=768, layers=2, heads=12, inner_size=3072).eval()
    model.load_state_dict(from_longformer(peer.state_dict()))
    items = item_texts(tokens, films)

    def batches(order: torch.Tensor) -> list[Packed]:
        return [Packed(part + 1, torch.arange(len(part) + 1).int()) for part in order.split(32)]

    @torch.inference_mode()
    def ours() -> None:
        for batch in batches(items.lengths.argsort()):  # of like lengths
            model(model.texts(items, batch))

    @torch.inference_mode()
    def theirs() -> None:
        for batch in batches(torch.arange(len(items))):
            texts = model.texts(items, batch)
            everywhere = torch.zeros_like(texts.input_ids).index_fill(1, torch.tensor([0]), 1)
            mask = texts.real.long()
            peer(texts.input_ids, attention_mask=mask, global_attention_mask=everywhere)

    return timed(theirs, rounds), timed(ours, rounds)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--peer", metavar="PYTHON", help="of an environment with recbole")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--items", type=int, default=5000, help="that Recformer encodes")
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = {"loss over 20,000 items, all places": (4.0, losses(options.rounds))}
    if options.peer:
        name = "BERT4Rec's training step, recbole 1.2.1"
        found[name] = (2.0, training_step(options.peer, options.rounds))
    name = f"{options.items:,} items encoded, transformers"
    found[name] = (3.0, encoding(max(1, options.rounds // 4), options.items))
    missed = False
    for name, (least, (theirs, ours)) in found.items():
        missed |= theirs / ours < least
        times = f"{1000 * theirs:,.0f} ms, ours {1000 * ours:,.0f} ms: {theirs / ours:.1f}x"
        print(f"{name} {times} (least {least:.0f}x)", flush=True)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
