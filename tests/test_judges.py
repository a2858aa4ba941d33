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
    found = lm.perplexity(objective, [("", folder, 1.0)], batch_size, CPU, 32, most)
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
            lm.perplexity(objective, [("", folder, 1.0)], 4, machine, 32, 5000)
    assert sum(n for _, n in parts) == whole[0][1] == min(5000, len(folder.val) - 1)
    assert sum(loss for loss, _ in parts) == pytest.approx(whole[0][0], rel=1e-6)


@torch.no_grad()
def test_a_model_that_knows_nothing_has_the_perplexity_of_its_vocabulary(folder):
    model = lm.Transformer(lm.ModelSettings(vocab_size=400, n_layer=1, d_model=8, n_head=1,
                                            seq_len=32))
    for weight in model.parameters():
        weight.zero_()
    objective = lm.Objective(model, lm.pretrain_loss)
    row = lm.perplexity(objective, [("", folder, 1.0)], 8, CPU, 32, ALL)
    assert row["val/ppl"] == pytest.approx(400, rel=1e-4)
    documents, ids = [], folder.val.tolist()
    for i in ids:
        documents.append([]) if i == 1 else documents[-1].append(i)
    size = sum(len(folder.tokenizer.decode(d[:-1]).encode()) for d in documents)
    assert row["val/bpb"] == pytest.approx(math.log2(400) * (len(ids) - 1) / size, rel=1e-4)


def test_no_validation_text_is_no_figure(objective):
    empty = SimpleNamespace(val=torch.zeros(0).numpy(), bytes_per_token=lambda split: 0.0)
    assert lm.perplexity(objective, [("", empty, 1.0)], 4, CPU, 32, ALL) == {}


@torch.no_grad()
def test_hopeless_losses_do_not_overflow(folder):
    class Hopeless(torch.nn.Module):
        model = SimpleNamespace(blocks=[])

        def forward(self, x, y):
            return torch.tensor(1e6) * (y != lm.IGNORE).sum()

    row = lm.perplexity(Hopeless(), [("", folder, 1.0)], 4, CPU, 32, 1000)
    assert row["val/loss"] == pytest.approx(1e6) and math.isfinite(row["val/ppl"])


# ---- Mixtures ----


@pytest.fixture(scope="module")
def second(corpus, data_dir, tmp_path_factory, run):
    """Other text under the same tokenizer."""
    out = tmp_path_factory.mktemp("second") / "data"
    text = out.parent / "text.txt"
    text.write_text(corpus.read_text(encoding="utf-8")[::-1], encoding="utf-8")
    code, _, err = run(["prep", "--text_path", text, "--out_dir", out, "--spm",
                        data_dir / "tokenizer.model", "--val_split", 0.1, "--workers", 1])
    assert code == 0, err
    return lm.TokenFolder(out)


@torch.no_grad()
def test_a_mixture_has_each_domains_loss_and_their_weighted_mean(objective, folder, second):
    domains = [("web", folder, 0.7), ("code", second, 0.3)]
    row = lm.perplexity(objective, domains, 5, CPU, 32, 700)
    web, code = (by_hand(objective.model, f.val, 32, 700) for f in (folder, second))
    assert abs(web - code) > 0.1
    assert row["val/loss/web"] == pytest.approx(web, rel=1e-5)
    assert row["val/loss/code"] == pytest.approx(code, rel=1e-5)
    mean = 0.7 * web + 0.3 * code
    assert row["val/loss"] == pytest.approx(mean, rel=1e-5)
    assert row["val/ppl"] == pytest.approx(math.exp(mean), rel=1e-4)
    web_bytes, code_bytes = (f.meta["splits"]["val"]["bytes"] / f.meta["splits"]["val"]["tokens"]
                             for f in (folder, second))
    bits = mean / math.log(2) / (0.7 * web_bytes + 0.3 * code_bytes)
    assert row["val/bpb"] == pytest.approx(bits, rel=1e-2)  # marks between documents are no bytes
    assert set(row) == {"val/loss", "val/ppl", "val/bpb", "val/loss/web", "val/loss/code"}


@torch.no_grad()
def test_a_domain_without_validation_text_is_left_out_of_the_mean(objective, folder):
    empty = SimpleNamespace(val=torch.zeros(0).numpy(), bytes_per_token=lambda split: 0.0)
    row = lm.perplexity(objective, [("a", folder, 0.2), ("b", empty, 0.8)], 5, CPU, 32, 300)
    alone = lm.perplexity(objective, [("", folder, 1.0)], 5, CPU, 32, 300)
    assert row == pytest.approx({**alone, "val/loss/a": alone["val/loss"]})


@torch.no_grad()
def test_use_of_experts_counts_the_evaluation_alone(folder):
    model = lm.Transformer(lm.ModelSettings(vocab_size=400, n_layer=2, d_model=8, n_head=1,
                                            seq_len=32, n_expert=4, n_expert_active=2))
    model.init_weights(0)
    for block in model.blocks:  # all scores alike: two experts get every token
        block.mlp.router.weight.zero_()
        block.mlp.usage += 1000
    row = lm.perplexity(lm.Objective(model, lm.pretrain_loss).eval(), [("", folder, 1.0)], 4, CPU,
                        32, 300)
    assert (row["moe/least"], row["moe/most"]) == (0.0, 2.0)
    assert not any(block.mlp.usage.any() for block in model.blocks)
