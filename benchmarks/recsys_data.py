"""Preparing MovieLens 100K for BERT4Rec, ours and RecBole's: python -m benchmarks.recsys_data --peer PYTHON.

Both read RecBole's own `ml-100k.inter`, take the 5-core, leave one out, and have training, validation and
test ready; CPU time of one thread, medians of several rounds, imports left out. RecBole makes a padded row of
every prefix of every history, ours are windows cut when a batch is made: one epoch of batches is counted too.
PYTHON is of an environment with recbole, which is no dependency of ours and pins old packages:

    pip install torch 'numpy<2' 'pandas<3' scipy scikit-learn pyyaml tqdm colorama colorlog==4.7.2 tabulate \\
        texttable psutil tensorboard thop
    pip install --no-deps recbole==1.2.1
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

LENGTHS = (50, 200)
TARGET = 10.0


def ours(path: Path, length: int) -> tuple[float, float, int, int]:
    """Return the seconds until training could begin, those of an epoch's batches, windows and items."""
    from manyheads.recsys.logs import Columns, read_log
    from manyheads.recsys.sequences import Sequences, cells, k_core, packed, windows
    from manyheads.recsys.splits import leave_one_out

    begin = time.process_time()
    log = read_log(path, Columns("user_id:token", "item_id:token", "timestamp:float"))
    found, _ = k_core(Sequences.of(log), 5, 5)
    split = leave_one_out(found)
    cut = windows(*split.span("train"), length, length // 2)
    for part in ("val", "test"):
        questions = split.questions(part)  # type: ignore[arg-type]
        cells(found.items, questions.first, questions.end)
    split.counts()
    ready = time.process_time()
    for first in range(0, len(cut.users), 64):
        packed(found.items, cut.first[first : first + 64], cut.end[first : first + 64], 1)
    return ready - begin, time.process_time() - ready, len(cut.users), found.num_items


RECBOLE = """
import json, os, sys, time, warnings
warnings.filterwarnings("ignore")
import torch; torch.set_num_threads(1)
import recbole
from recbole.config import Config
from recbole.data import create_dataset, data_preparation
root = os.path.join(os.path.dirname(recbole.__file__), "dataset_example")
length = int(sys.argv[1])
split = {"split": {"LS": "valid_and_test"}, "order": "TO", "group_by": "user", "mode": "full"}
config = Config("BERT4Rec", "ml-100k", config_dict=dict(
    data_path=root, use_gpu=False, MAX_ITEM_LIST_LENGTH=length, train_neg_sample_args=None, loss_type="CE",
    load_col={"inter": ["user_id", "item_id", "timestamp"]}, eval_args=split,
    user_inter_num_interval="[5,inf)", item_inter_num_interval="[5,inf)", show_progress=False))
begin = time.process_time()
dataset = create_dataset(config)
train, _, _ = data_preparation(config, dataset)
seconds = time.process_time() - begin
path = os.path.join(root, "ml-100k", "ml-100k.inter")
print(json.dumps([seconds, len(train.dataset), dataset.item_num - 1, path]))
"""


def theirs(python: str, length: int) -> tuple[float, int, int, Path]:
    """Return RecBole's seconds, samples and items, and where its log lies."""
    done = subprocess.run([python, "-c", RECBOLE, str(length)], capture_output=True, text=True, check=True)
    seconds, samples, items, path = json.loads(done.stdout.splitlines()[-1])
    return seconds, samples, items, Path(path)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--peer", required=True, metavar="PYTHON", help="of an environment with recbole")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    missed = False
    for length in LENGTHS:
        *_, path = theirs(options.peer, length)
        ours(path, length)  # imports
        found = [(ours(path, length), theirs(options.peer, length)) for _ in range(options.rounds)]
        assert found[0][0][3] == found[0][1][2], "other items than recbole's"
        ready, epoch = (statistics.median(our[place] for our, _ in found) for place in (0, 1))
        peer = statistics.median(their[0] for _, their in found)
        ratio = peer / (ready + epoch)
        missed |= ratio < TARGET
        print(
            f"length {length}: ours {1000 * ready:.0f} ms and {1000 * epoch:.1f} ms for an epoch's batches "
            f"({found[0][0][2]:,} windows), recbole 1.2.1 {1000 * peer:.0f} ms ({found[0][1][1]:,} samples): "
            f"{ratio:.0f}x (least {TARGET:.0f}x)",
            flush=True,
        )
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
