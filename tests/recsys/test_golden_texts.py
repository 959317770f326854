"""Recformer and its texts against tensors recorded from the published code, weights copied."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from manyheads.core.errors import DataError
from manyheads.recsys.losses import cross_entropy, sampled_softmax
from manyheads.recsys.models.encoder import Packed, starts_of
from manyheads.recsys.models.recformer import Recformer, pretraining
from manyheads.recsys.models.recformer_checkpoints import from_longformer, from_recformer
from manyheads.recsys.models.text_encoder import Embeddings, TextSizes
from manyheads.recsys.recformer_figures import recformer_figures
from manyheads.recsys.texts import ItemTexts, TextBatch, TextTokens, item_texts, text_batch
from manyheads.recsys.word_masking import MaskedText, WordMasks

DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
INPUTS = ("input_ids", "token_type_ids", "item_position_ids")


def sizes(config: dict) -> TextSizes:
    return TextSizes(
        config["vocab_size"],
        config["hidden_size"],
        config["num_hidden_layers"],
        config["num_attention_heads"],
        config["intermediate_size"],
        config["max_position_embeddings"],
        config.get("max_item_embeddings", 2) - 1,
        config["attention_window"] if isinstance(config["attention_window"], int) else 8,
        0.0,
        config.get("pooler_type", "cls"),
    )


def batch(given: dict, side: str = "") -> TextBatch:
    found = TextBatch(*(given[f"{name}{side}"] for name in INPUTS))
    assert torch.equal(found.real, given[f"attention_mask{side}"].bool())
    assert given[f"global_attention_mask{side}"].sum(1).tolist() == [1] * len(found.real)
    assert given[f"global_attention_mask{side}"][:, 0].all()
    return found


def counted(model, case) -> None:
    """The published modules' parameters, which hold two or one beside ours."""
    assert sum(p.numel() for p in model.parameters()) == case.about["param_count"]


@DTYPES
def test_embeddings(recorded, dtype):
    case = recorded("recformer_embeddings", dtype)
    given = case.group("input.")

    def convert(state):
        return {key: value for key, value in state.items() if key != "position_ids"}

    model = case.load(Embeddings(sizes(case.about["config"])), convert)
    counted(model, case)
    case.check({"out": model(TextBatch(*(given[name] for name in INPUTS)))}, model, convert)


@DTYPES
@pytest.mark.parametrize("name", ["recformer_model", "recformer_model_avgpool"])
def test_encoder(recorded, name, dtype):
    case = recorded(name, dtype)
    model, given = Recformer(sizes(case.about["config"])), case.group("input.")
    counted(model, case)
    case.load(model, from_recformer)
    texts = batch(given)
    states = model.longformer(texts)
    found = {"last_hidden_state": states.tokens * texts.real[..., None], "pooler_output": states.pooled}
    case.check(found, model, from_recformer)


@DTYPES
def test_pretraining(recorded, dtype):
    case = recorded("recformer_pretrain", dtype)
    model, given = Recformer(sizes(case.about["config"]), language_head=True), case.group("input.")
    counted(model, case)
    case.load(model, from_recformer)
    masked = []
    for side in ("_a", "_b"):
        labels = given[f"mlm_labels{side}"].flatten()
        at = (labels >= 0).nonzero()[:, 0]
        hidden = batch(given, side)._replace(input_ids=given[f"mlm_input_ids{side}"])
        masked.append(MaskedText(hidden, at, labels[at]))
    found = pretraining(model, batch(given, "_a"), batch(given, "_b"), tuple(masked))
    correct = (found.scores.argmax(1) == torch.arange(len(found.scores))).sum()
    outputs = {"loss": found.loss, "loss_contrastive": found.contrastive, "correct_num": correct}
    case.check(outputs | {"cos_sim_over_temp": found.scores}, model, from_recformer)


def test_a_side_without_a_hidden_token(recorded):
    """Upstream its loss is NaN."""
    case = recorded("recformer_pretrain")
    model = case.load(Recformer(sizes(case.about["config"]), language_head=True), from_recformer)
    given = case.group("input.")
    none = MaskedText(
        batch(given, "_a"), torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.int64)
    )
    found = pretraining(model, batch(given, "_a"), batch(given, "_b"), (none,))
    assert found.loss == found.contrastive
    found.loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@DTYPES
def test_scores_of_items(recorded, dtype):
    case = recorded("recformer_seqrec", dtype)
    model, given = Recformer(sizes(case.about["config"]), num_items=11), case.group("input.")
    counted(model, case)
    case.load(model, from_recformer)
    queries, items = model.queries(batch(given)), model.items()
    scores = queries @ items.weight.T
    found = {"scores": scores, "candidate_scores": scores.gather(1, given["candidates"])}
    found["loss"] = cross_entropy(queries, given["labels"], items)
    case.check(found, model, from_recformer)


@DTYPES
def test_loss_of_drawn_items(recorded, dtype):
    case = recorded("recformer_seqrec_sampled", dtype)
    model, given = Recformer(sizes(case.about["config"]), num_items=11), case.group("input.")
    case.load(model, from_recformer)
    queries = model.queries(batch(given))
    loss = sampled_softmax(queries, given["labels"], model.items(), given["negatives"], leave_out=False)
    case.check({"loss": loss}, model, from_recformer)


@DTYPES
def test_longformer(recorded, dtype):
    """The encoder is Longformer with the first token global, where items have no say."""
    case = recorded("longformer_global0", dtype)
    state = case.group("param.")
    model = Recformer(sizes(case.about["config"]))
    model.load_state_dict(from_longformer(state, max_items=1), strict=True)
    torch.nn.init.zeros_(model.longformer.embeddings.item_position_embeddings.weight)
    model.to(dtype).eval()
    ids = case.group("input.")["input_ids"]
    texts = TextBatch(ids, torch.zeros_like(ids), torch.zeros_like(ids))
    states = model.longformer(texts)
    wanted = case.group("output.")
    pooled = torch.tanh(
        torch.nn.functional.linear(states.pooled, state["pooler.dense.weight"], state["pooler.dense.bias"])
    )
    found = {"last_hidden_state": states.tokens * texts.real[..., None], "pooler_output": pooled}
    case.same(found, {key: wanted[key] for key in found}, "output")
    sum((found[k] * v).sum() for k, v in case.group("cotangent.").items()).backward()
    grads = {key.removeprefix("longformer."): p.grad for key, p in model.named_parameters()}
    grads["embeddings.token_type_embeddings.weight"] = grads["embeddings.token_type_embeddings.weight"][:1]
    grads.pop("embeddings.item_position_embeddings.weight")
    case.same(grads, {k: v for k, v in case.group("grad.").items() if "pooler" not in k}, "grad")


def catalogue(about: dict) -> tuple[ItemTexts, Packed]:
    """The recorded users' items as a catalogue, and their histories."""
    limit, most = about["config"]["max_attr_length"], about["config"]["max_attr_num"]
    ids, types, lengths, counts = [], [], [], []
    for user in about["users_oldest_first"]:
        counts.append(len(user))
        for item in user:
            before = len(ids)
            for each in item[:most]:
                named, valued = each["name_ids"], each["value_ids"]
                ids += (named + valued)[:limit]
                types += ([1] * len(named) + [2] * len(valued))[:limit]
            lengths.append(len(ids) - before)
    items = ItemTexts(torch.tensor(ids), torch.tensor(types), starts_of(torch.tensor(lengths)).long())
    return items, Packed(torch.arange(1, len(items) + 1), starts_of(torch.tensor(counts)))


def vocabulary(about: dict) -> TextTokens:
    """The recorded vocabulary; its merges are those of its later tokens, in order."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    numbers = {token: int(number) for number, token in about["vocabulary"].items()}
    later = [token for token in numbers if len(token) > 1 and not token.startswith("<")]
    merges = []
    for token in later:
        cuts = ((token[:at], token[at:]) for at in range(len(token) - 1, 0, -1))
        merges.append(next(pair for pair in cuts if pair[0] in numbers and pair[1] in numbers))
    tokenizer = Tokenizer(models.BPE(vocab=numbers, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return TextTokens(tokenizer)


def test_texts(recorded):
    about = recorded("recformer_tokens").about
    case, config = recorded("recformer_tokens"), about["config"]
    items, histories = catalogue(about)
    limits = {"max_items": config["max_item_embeddings"] - 1, "max_tokens": config["max_token_num"]}
    found = text_batch(items, histories, **limits)
    wanted = case.group("batch.")
    for name in INPUTS:
        assert torch.equal(getattr(found, name), wanted[name]), name
    for user in range(3):
        first, end = histories.starts[user : user + 2].tolist()
        alone = Packed(histories.tokens[first:end], torch.tensor([0, end - first], dtype=torch.int32))
        for name, row in zip(INPUTS, text_batch(items, alone, **limits), strict=True):
            assert torch.equal(row[0], case.group(f"user{user}.")[name]), name


def test_tokens(recorded):
    """The library cuts names and values as the published code does, and so do whole items."""
    about = recorded("recformer_tokens").about
    tokens, config = vocabulary(about), about["config"]
    assert (len(tokens), tokens.mask_id) == (88, config["mask_token_id"])
    users = about["users_oldest_first"]
    parts = [each for user in users for item in user for each in item]
    assert tokens.ids([each["name"] for each in parts]) == [each["name_ids"] for each in parts]
    assert tokens.ids([each["value"] for each in parts]) == [each["value_ids"] for each in parts]
    plain = [{each["name"]: each["value"] for each in item} for user in users for item in user]
    found = item_texts(tokens, plain, config["max_attr_num"], config["max_attr_length"])
    for have, want in zip(found, catalogue(about)[0], strict=True):
        assert torch.equal(have.long(), want.long())
    again = TextTokens.from_json(tokens.to_json())
    assert again.ids(["title Red bottle"]) == tokens.ids(["title Red bottle"])


def test_words(recorded):
    case = recorded("recformer_tokens")
    masks = WordMasks(vocabulary(case.about), rate=case.about["config"]["mlm_probability"])
    texts = TextBatch(*(case.group("batch.")[name] for name in INPUTS))
    for ids, real, groups in zip(
        texts.input_ids, texts.real, case.about["word_groups_of_batch_rows"], strict=True
    ):
        length = int(real.sum())
        found = [word.tolist() for word in masks.words(ids[real].numpy())]
        assert found == [group for group in groups if group[0] < length]


def test_masks(recorded):
    """What the published collator hides is what ours may hide; ours keeps its budget and its shares."""
    case = recorded("recformer_tokens")
    masks = WordMasks(vocabulary(case.about), rate=0.15)
    texts = TextBatch(*(case.group("batch.")[name] for name in INPUTS))
    rng, fates, counts = np.random.default_rng(0), [], []
    for _ in range(300):
        before = texts.input_ids.clone()
        found = masks(texts, rng)
        assert torch.equal(texts.input_ids, before)
        assert torch.equal(found.targets, before.flatten()[found.at])
        now = found.batch.input_ids.flatten()
        untouched = torch.ones(before.numel(), dtype=torch.bool).index_fill(0, found.at, False)
        assert torch.equal(now[untouched], before.flatten()[untouched])
        assert not (before.flatten()[found.at] < 4).any()
        rows = found.at // 47
        counts.append(torch.bincount(rows, minlength=3))
        fates.append(now[found.at] == 4)
    most = torch.stack(counts).amax(0).tolist()
    assert most[0] <= 7 and most[1] <= 7 and most[2] <= 2  # round(0.15 * 47), and of 12 tokens
    share = torch.cat(fates).float()
    assert abs(share.mean() - 0.8 - 0.1 / 88) < 5 * (0.16 / len(share)) ** 0.5
    a, b = masks(texts, np.random.default_rng(5)), masks(texts, np.random.default_rng(5))
    assert torch.equal(a.batch.input_ids, b.batch.input_ids)


def test_a_vocabulary_without_what_is_needed():
    from tokenizers import Tokenizer, models

    with pytest.raises(DataError, match="has no <pad>"):
        TextTokens(Tokenizer(models.BPE(vocab={"<s>": 0}, merges=[])))
    swapped = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3, "<mask>": 4}
    with pytest.raises(DataError, match="first two tokens are not <s> and <pad>"):
        TextTokens(Tokenizer(models.BPE(vocab=swapped, merges=[])))
    with pytest.raises(DataError, match="this is no vocabulary"):
        TextTokens.from_json("{}")


def test_ranker(recorded):
    case = recorded("recformer_ranker", torch.float32)
    given = case.group("input.")
    found = recformer_figures(given["scores"], given["labels"])
    names = ("ndcg@10", "recall@10", "ndcg@50", "recall@50", "mrr", "auc", "loss")
    wanted = case.group("output.")["result"].tolist()
    assert [found[name] for name in names] == pytest.approx(wanted, abs=1e-6)
