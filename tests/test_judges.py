"""Perplexity against a slow count by hand, on any batch size, share of ranks and cut."""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import standalone_transformer_lm as lm

CPU = lm.Machine(torch.device("cpu"), torch.float32)
ALL = 1 << 40


@pytest.fixture(scope="module")
def objective(trained):
    model = lm.build_model(lm.load_checkpoint(trained), torch.device("cpu"))
    return lm.Objective(model, lm.pretrain_loss).eval()


@pytest.fixture(scope="module")
def folder(data_dir):
    return lm.TokenFolder(data_dir)


def by_hand(model, ids, seq_len, most):
    """Mean nats a target over stride-seq_len windows, one at a time."""
    ids = torch.from_numpy(ids.astype("int64"))[:most + 1]
    total = 0.0
    for start in range(0, len(ids) - 1, seq_len):
        piece = ids[start:start + seq_len + 1]
        logits = model(piece[None, :-1])[0]
        total += float(F.cross_entropy(logits.double(), piece[1:], reduction="sum"))
    return total / (len(ids) - 1)


@torch.no_grad()
@pytest.mark.parametrize("batch_size", [1, 3, 8, 500])
@pytest.mark.parametrize("most", [ALL, 100, 96, 31, 1])
def test_perplexity_is_the_same_on_any_batch_size(objective, folder, batch_size, most):
    found = lm.perplexity(objective, folder, batch_size, CPU, 32, most)
    wanted = by_hand(objective.model, folder.val, 32, most)
    assert found["val/loss"] == pytest.approx(wanted, rel=1e-5)
    assert found["val/ppl"] == pytest.approx(math.exp(wanted), rel=1e-4)


@torch.no_grad()
def test_ranks_share_every_target_once(objective, folder):
    whole, parts = [], []

    class Lone(lm.Machine):
        def total(self, *numbers):
            (whole if self.world == 1 else parts).append(numbers)
            return list(numbers)

    for world in (1, 3):
        for rank in range(world):
            machine = Lone(torch.device("cpu"), torch.float32, rank, world)
            lm.perplexity(objective, folder, 4, machine, 32, 5000)
    assert sum(n for _, n in parts) == whole[0][1] == min(5000, len(folder.val) - 1)
    assert sum(loss for loss, _ in parts) == pytest.approx(whole[0][0], rel=1e-6)


@torch.no_grad()
def test_a_model_that_knows_nothing_has_the_perplexity_of_its_vocabulary(folder):
    model = lm.Transformer(lm.ModelSettings(vocab_size=400, n_layer=1, d_model=8, n_head=1,
                                            seq_len=32))
    for weight in model.parameters():
        weight.zero_()
    row = lm.perplexity(lm.Objective(model, lm.pretrain_loss), folder, 8, CPU, 32, ALL)
    assert row["val/ppl"] == pytest.approx(400, rel=1e-4)
    documents, ids = [], folder.val.tolist()
    for i in ids:
        documents.append([]) if i == 1 else documents[-1].append(i)
    size = sum(len(folder.tokenizer.decode(d[:-1]).encode()) for d in documents)
    assert row["val/bpb"] == pytest.approx(math.log2(400) * (len(ids) - 1) / size, rel=1e-4)


def test_no_validation_text_is_no_figure(objective):
    empty = SimpleNamespace(val=torch.zeros(0).numpy(), bytes_per_token=lambda split: 0.0)
    assert lm.perplexity(objective, empty, 4, CPU, 32, ALL) == {}


@torch.no_grad()
def test_hopeless_losses_do_not_overflow(folder):
    class Hopeless(torch.nn.Module):
        def forward(self, x, y):
            return torch.tensor(1e6) * (y != lm.IGNORE).sum()

    row = lm.perplexity(Hopeless(), folder, 4, CPU, 32, 1000)
    assert row["val/loss"] == pytest.approx(1e6) and math.isfinite(row["val/ppl"])
