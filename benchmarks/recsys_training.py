"""RecBole's BERT4Rec on MovieLens 100K by CPU time: python -m benchmarks.recsys_training --peer PYTHON.

The same 5-core, leave one out, and ranking of all items but those seen as `bert4rec_ml_100k` has; RecBole's
own model, samples (one a prefix) and default settings at the length given. One thread; it prints a line each
time it is measured, until the time is over, and at the end the test figures of the best one in validation, to
set beside those of `manyheads recsys fit|test --config bert4rec_ml_100k` and their time.

PYTHON is of an environment with recbole (see `benchmarks.recsys_data`).
"""

from __future__ import annotations

import argparse
import os
import subprocess

RECBOLE = """
import os, sys, time, warnings, json
warnings.filterwarnings("ignore")
import torch; torch.set_num_threads(1)
import recbole
from recbole.config import Config
from recbole.data import create_dataset, data_preparation
from recbole.utils import get_model, init_seed
length, batch, minutes, every = int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]), float(sys.argv[4])
root = os.path.join(os.path.dirname(recbole.__file__), "dataset_example")
split = {"split": {"LS": "valid_and_test"}, "order": "TO", "group_by": "user", "mode": "full"}
config = Config("BERT4Rec", "ml-100k", config_dict=dict(
    data_path=root, use_gpu=False, MAX_ITEM_LIST_LENGTH=length, train_neg_sample_args=None, loss_type="CE",
    load_col={"inter": ["user_id", "item_id", "timestamp"]}, eval_args=split, train_batch_size=batch,
    user_inter_num_interval="[5,inf)", item_inter_num_interval="[5,inf)", show_progress=False))
init_seed(0, True)
dataset = create_dataset(config)
histories = {}
for user, item in zip(dataset.inter_feat["user_id"].tolist(), dataset.inter_feat["item_id"].tolist()):
    histories.setdefault(user, set()).add(item)
train, valid, test = data_preparation(config, dataset)
model = get_model("BERT4Rec")(config, train.dataset)
optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
last = dict(zip(test.dataset.inter_feat["user_id"].tolist(), test.dataset.inter_feat["item_id"].tolist()))

@torch.no_grad()
def figures(data):
    model.eval()
    ranks = []
    inter = data.dataset.inter_feat
    for first in range(0, len(inter), 256):
        rows = inter[first:first + 256]
        scores = model.full_sort_predict(rows)
        scores[:, 0] = -float("inf")
        for i, (user, target) in enumerate(zip(rows["user_id"].tolist(), rows["item_id"].tolist())):
            hidden = list(histories[user] - {target, last[user]})  # all that was seen before the target
            value = scores[i, target].item()
            scores[i, hidden] = -float("inf")
            ranks.append(int((scores[i] >= value).sum()))
    model.train()
    ranks = torch.tensor(ranks, dtype=torch.float64)
    hit = ranks <= 10
    ndcg = hit / torch.log2(ranks + 1)
    return [each.double().mean().item() for each in (ndcg, hit, 1 / ranks)]

best, steps, next_time = None, 0, 60 * every
model.train()
begin, spent = time.process_time(), 0.0
epoch = 0
while spent < 60 * minutes:
    epoch += 1
    for rows in train:
        now = time.process_time()
        optimizer.zero_grad()
        model.calculate_loss(rows).backward()
        optimizer.step()
        steps += 1
        spent += time.process_time() - now
        if spent >= next_time or spent >= 60 * minutes:
            next_time += 60 * every
            found, tested = figures(valid), figures(test)
            print(f"{spent / 60:6.1f} min  step {steps:6d}  epoch {steps / len(train):6.2f}  validation"
                  f" NDCG@10 {found[0]:.4f}  test {tested[0]:.4f} HR@10 {tested[1]:.4f} MRR {tested[2]:.4f}",
                  flush=True)
            if best is None or found[0] > best[0]:
                best = (found[0], spent / 60, tested)
            if spent >= 60 * minutes:
                break
print(f"recbole {recbole.__version__}, torch {torch.__version__}, {dataset.item_num - 1} items,"
      f" length {length}, batch {batch}:"
      f" best in validation after {best[1]:.1f} CPU minutes, {best[0]:.4f};"
      f" test NDCG@10 {best[2][0]:.4f} HR@10 {best[2][1]:.4f} MRR {best[2][2]:.4f}")
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--peer", required=True, metavar="PYTHON", help="of an environment with recbole")
    parser.add_argument("--minutes", type=float, default=45.0, help="of CPU time in steps (45)")
    parser.add_argument("--every", type=float, default=4.0, help="CPU minutes between measurements (4)")
    parser.add_argument("--length", type=int, default=50, help="of histories (50, RecBole's default)")
    parser.add_argument("--batch", type=int, default=256, help="samples a step (256)")
    options = parser.parse_args()
    given = [str(x) for x in (options.length, options.batch, options.minutes, options.every)]
    subprocess.run(
        [options.peer, "-c", RECBOLE, *given], check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )


if __name__ == "__main__":
    main()
