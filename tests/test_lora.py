"""Room LoRA: low-rank adapters, alone and in the runs that train them."""

import dataclasses
import json
import shutil

import pytest
import torch
from conftest import ADJECTIVES, NOUNS, VERBS, complaint, read_pt
from test_model import build, some_ids

import standalone_transformer_lm as lm

ALL = "qkv,proj,w1,w2,w3"
TUNE = """--batch_size 4 --seq_len 64 --lr 1e-2 --warmup_steps 2 --log_interval 1 --eval_interval 3
--ckpt_interval 3 --keep_last 9 --dtype fp32 --device cpu --threads 1 --compile 0""".split()


def save_base(path, tokenizer, seed=3, **changes):
    """Write the checkpoint of a tiny untrained model, which every tuning may start from."""
    shape = {
        "seq_len": 64,
        "n_layer": 2,
        "d_model": 32,
        "n_head": 4,
        "n_kv_head": 2,
        "ffn_mult": 2.0,
        "vocab_size": 400,
        "bos_id": lm.Tokenizer(tokenizer).bos,
    }
    model = lm.Transformer(lm.ModelSettings(**shape | changes))
    model.init_weights(seed)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.mul_(4)
    lm.save_checkpoint(
        path,
        {
            "format": 1,
            "kind": "train",
            "step": 0,
            "samples": 0,
            "best_val": 9.0,
            "model": model.state_dict(),
            "config": dataclasses.asdict(model.config),
            "tokenizer": tokenizer,
        },
    )
    return path


def question(i):
    return f"Why was the {NOUNS[i % 17]} {ADJECTIVES[i // 17 % 17]}?"


def answer(i):
    return f"The {NOUNS[-1 - i % 13]} {VERBS[i % 16]} it."


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def chat_rows(count):
    return [{"prompt": question(i), "response": answer(i)} for i in range(count)]


def pair_rows(count):
    return [
        {"prompt": question(i), "chosen": answer(i), "rejected": f"No {NOUNS[i % 5]}, no."}
        for i in range(count)
    ]


@pytest.fixture(scope="module")
def base(tiny_tokenizer, tmp_path_factory):
    """The model that is adapted; read only."""
    return save_base(tmp_path_factory.mktemp("base") / "base.pt", tiny_tokenizer)


@pytest.fixture(scope="module")
def adapted(base, tmp_path_factory, run):
    """(folder of a finished sft run with adapters, the model it adapts); read only."""
    folder = tmp_path_factory.mktemp("adapted")
    own = shutil.copy(base, folder / "base.pt")
    rows = write_rows(folder / "chats.jsonl", chat_rows(24))
    code, _, err = run(
        [
            "sft",
            *TUNE,
            "--ckpt",
            own,
            "--data",
            rows,
            "--out_dir",
            folder / "run",
            "--lora_rank",
            2,
            "--lora_merge",
            1,
            "--max_steps",
            6,
        ]
    )
    assert code == 0, err
    return folder / "run", own


def adapt(model, targets=ALL, rank=3, alpha=0.0, dropout=0.0):
    """Attach adapters and give them weights that matter."""
    settings = lm.LoraSettings(
        lora_rank=rank, lora_alpha=alpha, lora_targets=targets, lora_dropout=dropout
    )
    lm.attach_lora(model, settings, seed=5)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("lora_b"):
                weight.normal_(std=0.2)
    return settings


def adapters(model):
    return [part for part in model.modules() if isinstance(part, lm.LoraLinear)]


# ---- The adapters themselves ----


def test_adapters_change_nothing_when_attached():
    model, ids = build(), some_ids()
    before = model(ids)
    lm.attach_lora(model, lm.LoraSettings(lora_rank=3), seed=5)
    assert len(adapters(model)) == 10 and torch.equal(model(ids), before)
    assert all(part.lora_a.abs().max() > 0 for part in adapters(model))


@pytest.mark.parametrize("shape", [{}, {"n_expert": 4}])
def test_what_is_frozen_in_bf16_computes_the_same(shape):
    kept, lowered, ids = build(**shape), build(**shape), some_ids()
    targets = "qkv,proj" if shape else ALL
    settings = lm.LoraSettings(lora_rank=3, lora_targets=targets)
    found = []
    for model, dtype in ((kept, torch.float32), (lowered, torch.bfloat16)):
        lm.attach_lora(model, settings, 5, dtype)
        for part in adapters(model):
            torch.nn.init.constant_(part.lora_b, 0.01)
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(ids)
        logits.float().square().mean().backward()
        grads = [weight.grad for weight in model.parameters() if weight.requires_grad]
        found.append([logits, *grads])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert {part.weight.dtype for part in adapters(lowered)} == {torch.bfloat16}
    assert {weight.dtype for weight in lm.trained_weights(lowered).values()} == {torch.float32}
    assert lowered.tok_emb.weight.dtype == torch.float32


def test_merging_into_a_bf16_base_is_done_in_fp32():
    model = build()
    weights = {name: w.clone().bfloat16() for name, w in model.state_dict().items()}
    adapt(model, ALL)
    trained, changed = lm.trained_weights(model), 0
    merged = lm.merge_lora(weights, trained, 1e-3)
    for name, weight in merged.items():
        stem = name.removesuffix("weight")
        if f"{stem}lora_a" in trained:
            change = trained[f"{stem}lora_b"].double() @ trained[f"{stem}lora_a"].double()
            wanted = weights[name].double() + 1e-3 * change
            assert (weight.double() - wanted).abs().max() < 1e-6
            changed += 1
    assert changed == 10


@pytest.mark.parametrize("targets", [ALL, "qkv", "proj,w3"])
def test_merged_is_unmerged(targets):
    model, ids = build(), some_ids()
    weights = {name: w.clone() for name, w in model.state_dict().items()}
    settings = adapt(model, targets, alpha=5.0)
    whole = build()
    whole.load_state_dict(lm.merge_lora(weights, lm.trained_weights(model), settings.scale))
    assert len(adapters(model)) == 2 * len(targets.split(","))
    assert (whole(ids) - model(ids)).abs().max() <= 1e-5 * model(ids).abs().max()
    assert (whole(ids) - build()(ids)).abs().max() > 0.1


def test_an_adapter_is_w_plus_scale_b_a_in_float64():
    base, x = torch.nn.Linear(7, 5, bias=False), torch.randn(4, 7)
    part = lm.LoraLinear(base, lm.LoraSettings(lora_rank=2, lora_alpha=3.0), torch.Generator())
    torch.nn.init.normal_(part.lora_b)
    w, a, b, x64 = (t.detach().double() for t in (base.weight, part.lora_a, part.lora_b, x))
    want = [
        [
            sum(w[o, i] * row[i] for i in range(7))
            + 1.5 * sum(b[o, r] * a[r, i] * row[i] for r in range(2) for i in range(7))
            for o in range(5)
        ]
        for row in x64
    ]
    assert torch.allclose(part(x).double(), torch.tensor(want, dtype=torch.float64), atol=1e-5)


def test_alpha_zero_is_twice_the_rank():
    assert lm.LoraSettings(lora_rank=8).scale == 2.0
    assert lm.LoraSettings(lora_rank=8, lora_alpha=8).scale == 1.0


def test_only_adapters_are_trained_and_they_are_few():
    model = build(dry=True, d_model=256, vocab_size=512)
    lm.attach_lora(model, lm.LoraSettings(lora_rank=2), seed=5)
    trained = {name for name, w in model.named_parameters() if w.requires_grad}
    assert trained == set(lm.trained_weights(model)) and len(trained) == 20
    assert all(name.endswith(("lora_a", "lora_b")) for name in trained)
    few = sum(w.numel() for w in lm.trained_weights(model).values())
    assert few < 0.05 * sum(w.numel() for w in model.parameters())


def test_a_judges_new_head_is_trained_with_its_adapters():
    model = build(dry=True, scalar_head=True)
    lm.attach_lora(model, lm.LoraSettings(lora_rank=2, lora_targets="qkv"), seed=5)
    assert len(lm.trained_weights(model)) == 5 and "score.weight" in lm.trained_weights(model)


def test_a_seed_repeats_the_adapters_and_another_differs():
    made = []
    for seed in (1, 1, 2):
        model = build()
        lm.attach_lora(model, lm.LoraSettings(lora_rank=2), seed)
        made.append(model.blocks[0].attn.qkv.lora_a)
    assert torch.equal(made[0], made[1]) and not torch.equal(made[0], made[2])


def test_dropout_is_before_the_adapters_and_in_training_alone():
    model, ids = build(), some_ids()
    adapt(model, dropout=0.5)
    model.eval()
    assert torch.equal(model(ids), model(ids))
    model.train()
    assert not torch.equal(model(ids), model(ids))
    for part in adapters(model):
        part.lora_b.data.zero_()
    assert torch.equal(model(ids), model(ids))


def test_experts_take_no_adapter():
    model = build(n_expert=2)
    with pytest.raises(lm.UserError, match="no such matrix"):
        lm.attach_lora(model, lm.LoraSettings(lora_rank=2, lora_targets="w1,w3"), seed=5)
    lm.attach_lora(model, lm.LoraSettings(lora_rank=2), seed=5)
    assert len(adapters(model)) == 4  # qkv and proj of two layers


def test_adapters_are_those_of_peft():
    peft = pytest.importorskip("peft")
    model, other, ids = build(), build(), some_ids()
    settings = adapt(model, rank=4, alpha=6.0)
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=ALL.split(","), lora_dropout=0.0)
    other = peft.inject_adapter_in_model(config, other).eval()
    parts = dict(other.named_modules())
    with torch.no_grad():
        for name, part in model.named_modules():
            if isinstance(part, lm.LoraLinear):
                parts[name].lora_A["default"].weight.copy_(part.lora_a)
                parts[name].lora_B["default"].weight.copy_(part.lora_b)
    want = other(ids)
    assert (want - model(ids)).abs().max() <= 1e-5 * want.abs().max()
    for each in (model, other):
        each(ids).logsumexp(-1).sum().backward()
    for name, part in model.named_modules():
        if isinstance(part, lm.LoraLinear):
            theirs = parts[name].lora_A["default"].weight.grad
            assert torch.allclose(part.lora_a.grad, theirs, rtol=1e-4, atol=1e-4), name
    plain = build()
    weights = {n: w.clone() for n, w in plain.state_dict().items()}
    plain.load_state_dict(lm.merge_lora(weights, lm.trained_weights(model), settings.scale))
    assert (want - plain(ids)).abs().max() <= 1e-5 * want.abs().max()


# ---- Runs of adapters ----


def test_a_run_stores_adapters_alone_and_leaves_the_model_as_it_was(adapted, base):
    out, own = adapted
    saved = read_pt(out / "ckpt_last.pt")
    assert len(saved["model"]) == 20 and own.read_bytes() == base.read_bytes()
    assert all(name.endswith(("lora_a", "lora_b")) for name in saved["model"])
    assert all(w.abs().max() > 0 for w in saved["model"].values())
    assert (
        sum(w.numel() for w in saved["model"].values())
        < sum(w.numel() for w in read_pt(own)["model"].values()) / 4
    )
    assert not (out / "pytorch_model.bin").exists()


def test_loading_adapters_merges_them(adapted):
    out, own = adapted
    loaded, before = lm.load_checkpoint(out), lm.load_checkpoint(own)
    saved = read_pt(out / "ckpt_best.pt")
    model = lm.build_model(before, torch.device("cpu"))
    lm.attach_lora(model, lm.LoraSettings(lora_rank=2), seed=0)
    model.load_state_dict(saved["model"], strict=False)
    ids = some_ids(2, 30, 400)
    logits = lm.build_model(loaded, torch.device("cpu"))(ids)
    assert (logits - model(ids)).abs().max() <= 1e-5 * logits.abs().max()
    frozen = [n for n in before["model"] if n.endswith(("norm1.weight", "tok_emb.weight"))]
    assert len(frozen) == 3
    assert all(torch.equal(loaded["model"][n], before["model"][n]) for n in frozen)
    assert not torch.equal(
        loaded["model"]["blocks.0.mlp.w1.weight"], before["model"]["blocks.0.mlp.w1.weight"]
    )


def test_frozen_weights_are_untouched_by_a_step():
    model = build(dry=True)
    before = {n: w.detach().clone() for n, w in model.named_parameters()}
    lm.attach_lora(model, lm.LoraSettings(lora_rank=2), seed=5)
    optimizers = lm.make_optimizers(
        model,
        lm.OptimSettings(lr=0.01, optimizer="muon", weight_decay=0.5),
        lm.Machine(torch.device("cpu"), torch.float32),
    )
    for _ in range(3):
        lm.pretrain_loss(model, some_ids(), some_ids()).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    after = dict(model.named_parameters())
    assert all(torch.equal(after[name], weight) for name, weight in before.items())
    assert all(part.lora_b.abs().max() > 0 for part in adapters(model))


def test_the_merged_file_stands_alone(adapted, tmp_path):
    out, _ = adapted
    alone = lm.load_checkpoint(shutil.copy(out / "merged.pt", tmp_path))
    whole = lm.load_checkpoint(out)
    assert not alone.get("lora") and alone["config"] == whole["config"]
    assert all(torch.equal(alone["model"][n], w) for n, w in whole["model"].items())


def test_a_missing_model_is_a_sentence(adapted, tmp_path, run):
    shutil.copytree(adapted[0].parent, tmp_path / "copy")
    folder, own = tmp_path / "copy" / "run", adapted[1]
    (tmp_path / "copy" / own.name).unlink()  # which would be found beside the run
    other = own.rename(own.with_suffix(".away"))
    try:
        complaint(run(["generate", "--ckpt", folder, "--prompt", "x"]), str(own), "does not exist")
        shutil.copy(other, folder / own.name)  # what the sentence advises
        assert lm.load_checkpoint(folder)["model"]
    finally:
        other.rename(own)


def test_a_changed_model_is_a_sentence(adapted, tiny_tokenizer, tmp_path, run):
    own = adapted[1]
    kept = shutil.copy(own, tmp_path / "kept.pt")
    try:
        save_base(own, tiny_tokenizer, seed=4)
        complaint(
            run(["generate", "--ckpt", adapted[0], "--prompt", "x"]),
            str(own),
            "no longer the model",
        )
    finally:
        shutil.copy(kept, own)


def test_advice_about_a_missing_model_does_not_overwrite_the_adapters(base, tmp_path, run):
    first = tmp_path / "first"
    first.mkdir()
    own = shutil.copy(base, first / "ckpt_best.pt")
    rows = write_rows(tmp_path / "chats.jsonl", chat_rows(12))
    out = tmp_path / "second"
    assert (
        run(
            [
                "sft",
                *TUNE,
                "--ckpt",
                first,
                "--data",
                rows,
                "--out_dir",
                out,
                "--lora_rank",
                2,
                "--max_steps",
                3,
                "--samples",
                0,
                "--val_split",
                0.4,
            ]
        )[0]
        == 0
    )
    own.rename(tmp_path / "away.pt")
    assert (out / "ckpt_best.pt").exists()
    for name in ("ckpt_best.pt", "ckpt_last.pt"):
        with pytest.raises(lm.UserError, match="does not exist") as told:
            lm.load_checkpoint(out / name)
        assert f"copy it into {out}" not in str(told.value)  # it would replace ckpt_best.pt


def test_adapters_upon_adapters(adapted, tmp_path, run):
    rows = write_rows(tmp_path / "pairs.jsonl", pair_rows(12))
    assert (
        run(
            [
                "dpo",
                *TUNE,
                "--ckpt",
                adapted[0],
                "--data",
                rows,
                "--out_dir",
                tmp_path / "dpo",
                "--lora_rank",
                2,
                "--max_steps",
                3,
            ]
        )[0]
        == 0
    )
    below, above = lm.load_checkpoint(adapted[0]), lm.load_checkpoint(tmp_path / "dpo")
    name = "blocks.1.attn.qkv.weight"
    change = above["model"][name] - below["model"][name]
    assert 0 < torch.linalg.matrix_rank(change, atol=1e-5) <= 2
    assert read_pt(tmp_path / "dpo" / "ckpt_last.pt")["lora"]["base"] == str(
        (adapted[0] / "ckpt_best.pt").resolve()
    )


def test_adapters_upon_adapters_load_on_a_processor_that_rounds_otherwise(
    adapted, tmp_path, run, monkeypatch
):
    rows = write_rows(tmp_path / "chats.jsonl", chat_rows(12))
    assert (
        run(
            [
                "sft",
                *TUNE,
                "--ckpt",
                adapted[0],
                "--data",
                rows,
                "--out_dir",
                tmp_path / "sft",
                "--lora_rank",
                2,
                "--max_steps",
                3,
            ]
        )[0]
        == 0
    )
    original = lm.merge_lora

    def rounded(*args):
        return {
            name: torch.nextafter(weight, torch.tensor(9.0)) if ".mlp." in name else weight
            for name, weight in original(*args).items()
        }

    monkeypatch.setattr(lm, "merge_lora", rounded)
    assert lm.load_checkpoint(tmp_path / "sft")["model"]


def test_a_run_goes_on_only_upon_its_own_model_and_shape(adapted, tiny_tokenizer, tmp_path, run):
    shutil.copytree(adapted[0], tmp_path / "run")
    rows = adapted[0].parent / "chats.jsonl"
    other = save_base(tmp_path / "other.pt", tiny_tokenizer, seed=8)

    def again(*flags):
        return run(
            [
                "sft",
                *TUNE,
                "--ckpt",
                adapted[1],
                "--data",
                rows,
                "--out_dir",
                tmp_path / "run",
                "--lora_rank",
                2,
                "--max_steps",
                6,
                *flags,
            ]
        )

    complaint(again("--ckpt", other), "adapts another model")
    complaint(again("--lora_rank", 0), "adapts another model")
    complaint(again("--lora_rank", 4), "--lora_rank 2 (now 4)")
    complaint(again("--lora_targets", "qkv"), "--lora_targets")
    complaint(again("--lora_alpha", 40), "--lora_alpha")
    assert again()[0] == 0


def test_an_unknown_target_is_a_sentence(base, tmp_path, run):
    result = run(
        [
            "sft",
            "--ckpt",
            base,
            "--data",
            "x.jsonl",
            "--lora_rank",
            2,
            "--lora_targets",
            "qkv,w9",
            "--out_dir",
            tmp_path / "run",
        ]
    )
    complaint(result, "--lora_targets w9", "qkv,proj,w1,w2,w3")
    assert not (tmp_path / "run").exists()


def test_adapters_may_be_moved_together_with_their_base(tmp_path, tiny_tokenizer, run):
    """Both files are called ckpt_best.pt, each in the folder of its run."""
    base = tmp_path / "old" / "base" / "ckpt_best.pt"
    base.parent.mkdir(parents=True)
    save_base(base, tiny_tokenizer)
    rows = write_rows(tmp_path / "rows.jsonl", chat_rows(12))
    words = ["sft", *TUNE, "--ckpt", base.parent, "--data", rows, "--lora_rank", 2]
    code, _, err = run([*words, "--max_steps", 2, "--out_dir", tmp_path / "old" / "adapters"])
    assert code == 0, err
    (tmp_path / "old").rename(tmp_path / "new")
    moved = lm.load_checkpoint(tmp_path / "new" / "adapters")
    assert set(moved["model"]) == set(lm.load_checkpoint(tmp_path / "new" / "base")["model"])
