"""Learning rates by size, the first weights from a text, runs by the clock, models that fit."""

import json
import math
import time

import numpy as np
import pytest
import torch
from conftest import complaint, log_rows, read_pt

import standalone_transformer_lm as lm


def timed_rows(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


SHAPE = "--n_layer 1 --d_model 32 --n_head 2 --seq_len 32 --device cpu --compile 0".split()


def train(run, data_dir, out, *more):
    return run(
        ["train", "--data_dir", str(data_dir), "--out_dir", str(out), *SHAPE, *map(str, more)]
    )


# ---- Embedding and head from a text ----


def some_ids(count=4000, vocab=60, seed=0):
    """Ids of a random chain, in which each is followed by few others, and one never occurs."""
    rng = np.random.default_rng(seed)
    chances = rng.dirichlet(np.full(vocab, 0.05), vocab)
    ids = [0]
    for _ in range(count):
        ids.append(int(rng.choice(vocab, p=chances[ids[-1]])))
    ids = np.array(ids)
    ids[ids == 7] = 8
    return torch.from_numpy(ids)


def dense(ids, vocab):
    """What Bigrams says it is, in float64, one number at a time."""
    counts = np.zeros((vocab, vocab))
    for a, b in zip(ids[:-1].tolist(), ids[1:].tolist(), strict=True):
        counts[a, b] += 1
    share = (np.bincount(ids, minlength=vocab) + 1) / (len(ids) + vocab)
    prior = lm.BIGRAM_PRIOR * share
    logs = np.log((counts + prior) / (counts.sum(1, keepdims=True) + lm.BIGRAM_PRIOR))
    return torch.from_numpy(logs - (logs * share).sum(1, keepdims=True)), torch.from_numpy(share)


def test_bigrams_equal_a_loop_in_float64():
    ids = some_ids()
    made, (wanted, share) = lm.Bigrams(ids, 60), dense(ids, 60)
    x = torch.randn(60, 5)
    assert torch.allclose(made.share.double(), share, atol=1e-7)
    assert torch.allclose(made.times(x).double(), wanted @ x.double(), atol=1e-3)
    assert torch.allclose(made.turned_times(x).double(), wanted.T @ x.double(), atol=1e-3)


def test_factors_are_as_near_as_any_of_their_rank(monkeypatch):
    monkeypatch.setattr(lm, "BIGRAM_ROUNDS", 6)
    ids = some_ids()
    (wanted, share), rank = dense(ids, 60), 12
    x, head = lm.Bigrams(ids, 60).factors(rank, 3)
    weight = share.sqrt().unsqueeze(1) * share.sqrt()
    missed = ((x @ head.T).double() - wanted) * weight
    best = torch.linalg.svdvals(wanted * weight)[rank:].square().sum().sqrt()
    assert missed.norm() == pytest.approx(float(best), rel=1e-3)


@pytest.mark.parametrize("changes", [{}, {"embed_scale": True}, {"n_expert": 2}, {"n_sink": 2}])
def test_a_model_begins_with_what_the_text_says(changes):
    ids = some_ids()
    config = lm.ModelSettings(
        seq_len=64, n_layer=2, d_model=64, n_head=2, vocab_size=60, tie=False, **changes
    )
    model = lm.Transformer(config)
    model.init_weights(1)
    lm.begin_with_bigrams(model, ids, 1)
    wanted, share = dense(ids, 60)
    row = ids[:64].unsqueeze(0)
    hidden, _ = model.hidden_and_aux_loss(row)
    found = model.logits(hidden)[0].double().log_softmax(-1)
    right = wanted[ids[:64]].log_softmax(-1)
    worst = (found - right).abs() * share.sqrt()  # of full rank; rare rows are cut to length
    assert worst.max() < 0.05, worst.max()
    assert not any(
        bool(weight.any())
        for name, weight in model.named_parameters()
        if lm.is_residual_output(name)
    )


def test_the_beginning_depends_on_the_seed_alone():
    ids, made = some_ids(), []
    for seed in (1, 1, 2):
        config = lm.ModelSettings(
            seq_len=8, n_layer=1, d_model=16, n_head=2, vocab_size=60, tie=False
        )
        model = lm.Transformer(config)
        lm.begin_with_bigrams(model, ids, seed)
        made.append(model.lm_head.weight.detach().clone())
    assert torch.equal(made[0], made[1]) and not torch.equal(made[0], made[2])


def test_a_run_begins_with_the_text_and_a_resumed_one_does_not(run, data_dir, tmp_path):
    losses = {}
    for init in ("normal", "bigram", "auto"):
        out = tmp_path / init
        code, _, err = train(run, data_dir, out, "--tie", 0, "--init", init, "--max_steps", 1)
        assert code == 0, err
        losses[init] = log_rows(out)[-1]["train/loss"]
    assert losses["bigram"] == losses["auto"] < losses["normal"] - 0.5
    out = tmp_path / "auto"
    before = read_pt(out / "ckpt_last.pt")["model"]["tok_emb.weight"]
    code, _, err = train(
        run, data_dir, out, "--tie", 0, "--max_steps", 2, "--lr", 1e-12, "--resume", 1
    )
    assert code == 0, err
    assert torch.allclose(read_pt(out / "ckpt_last.pt")["model"]["tok_emb.weight"], before)
    complaint(
        train(run, data_dir, tmp_path / "tied", "--init", "bigram", "--max_steps", 1), "--tie 0"
    )


# ---- Rates ----


def rates(kind="train", width=256, layers=4, tokens=1e8, **more):
    config = lm.ModelSettings(
        n_layer=layers, d_model=width, n_head=width // 64 or 1, vocab_size=4096, tie=False
    )
    where = {key: more.pop(key) for key in ("adapters", "init") if key in more}
    model = lm.Transformer(config)
    model.init_weights(1)
    return lm.with_rates(lm.OptimSettings(**more), model, kind, tokens, 1000, **where)


def test_muons_rate_is_that_of_published_runs():
    # modded-nanogpt at 768 and nanochat at 1,280 move by 0.02 in spectral norm
    for width in (64, 768, 1280):
        found = rates(width=width, optimizer="muon")
        matrix = lm.MUON_SCALES["rms"](width, width)
        assert found.lr * matrix == pytest.approx(
            0.02 * lm.MUON_SCALES["shape"](width, width), rel=1e-6
        )
        assert rates(width=width, optimizer="muon", muon_scale="shape").lr == 0.02


def test_adamws_rate_is_near_published_ones():
    # width, parameters without the ends, tokens, published peak
    for width, parameters, tokens, published in (
        (576, 106e6, 2e12, 3e-3),  # SmolLM2-135M
        (2048, 1.6e9, 1e12, 5e-4),  # SmolLM-1.7B
        (768, 85e6, 2.5e9, 1.8e-3),  # modded-nanogpt's AdamW baseline, GPT-2 124M
    ):
        assert published / 2 < lm.adamw_rate(width, parameters, tokens) < published * 2


def test_tuning_rates_are_near_published_ones():
    assert lm.tuning_rate(4096, "sft", False) == pytest.approx(2e-5, rel=0.1)
    assert lm.tuning_rate(4096, "sft", True) == pytest.approx(2e-4, rel=0.1)  # QLoRA, 7B
    assert lm.tuning_rate(3584, "grpo", False) < 5e-6
    assert lm.tuning_rate(128, "sft", False) == pytest.approx(3e-3)
    assert lm.tuning_rate(64, "sft", True) == lm.LARGEST_RATE


def test_a_flag_wins_and_the_others_follow_in_proportion():
    chosen = rates(init="bigram")
    given = rates(init="bigram", lr=2 * chosen.lr)
    assert given.embed_lr == pytest.approx(2 * chosen.embed_lr)
    assert given.head_lr == pytest.approx(2 * chosen.head_lr)
    given = rates(init="bigram", embed_lr=0.5, head_lr=0.25, warmup_steps=7)
    assert (given.lr, given.embed_lr, given.head_lr, given.warmup_steps) == (
        chosen.lr,
        0.5,
        0.25,
        7,
    )


def test_the_ends_learn_slowly_in_a_short_run_that_begins_with_its_text():
    found = [lm.end_rates("bigram", steps) for steps in (50, 150, 1000, 10**6)]
    assert found == sorted(found) and found[-1] == found[-2] == (2.0, 0.5)
    assert found[0] == pytest.approx((0.25, 0.0075), rel=0.05)
    assert lm.end_rates("normal", 50) == (1.0, 1.0)


def test_the_warm_up_is_a_share_of_the_run():
    model = lm.Transformer(lm.ModelSettings(vocab_size=512, n_layer=1, d_model=64, n_head=2))
    for steps, wanted in ((10, 1), (60, 3), (1000, 50), (10**6, 100)):
        assert lm.with_rates(lm.OptimSettings(), model, "sft", 1e6, steps).warmup_steps == wanted


def test_large_embeddings_learn_faster_in_tuning():
    small, large = rates("sft"), lm.end_factor(torch.full((9, 9), 1.0))
    assert small.lr == small.embed_lr == small.head_lr
    assert large == pytest.approx(25) and lm.end_factor(torch.full((9, 9), -0.1)) == 1


def test_a_run_keeps_the_rates_that_it_has_begun_with(run, data_dir, tmp_path):
    flags = "--optimizer", "adamw", "--log_interval", 1, "--epochs"
    begun = train(run, data_dir, tmp_path / "a", *flags, 0.1)
    assert begun[0] == 0, begun[2]
    code, _, err = train(run, data_dir, tmp_path / "a", *flags, 0.2)
    assert code == 0, err
    rows = [row["train/lr"] for row in log_rows(tmp_path / "a") if "train/lr" in row]
    peaks = [read_pt(tmp_path / "a" / "ckpt_last.pt")["args"]["rates"][0]] * len(rows)
    assert max(rows) == pytest.approx(peaks[0])
    code, _, err = train(run, data_dir, tmp_path / "a", *flags, 0.3, "--lr", 1e-3)
    assert code == 0, err
    assert read_pt(tmp_path / "a" / "ckpt_last.pt")["args"]["rates"][:3] == [1e-3] * 3


def test_each_group_has_its_rate():
    config = lm.ModelSettings(
        n_layer=1, d_model=32, n_head=2, vocab_size=61, tie=False, qk_norm=True
    )
    model = lm.Transformer(config)
    names = {id(weight): name for name, weight in model.named_parameters()}
    settings = lm.OptimSettings(lr=1.0, embed_lr=0.5, head_lr=0.25, warmup_steps=1)
    for optimizer in ("adamw", "muon"):
        machine = lm.Machine(torch.device("cpu"), torch.float32, 0, 1)
        made = lm.make_optimizers(model, lm.replace(settings, optimizer=optimizer), machine)
        lm.set_step(made, settings, 0, 10)
        found = {
            names[id(p)]: group["lr"]
            for one in made
            for group in one.param_groups
            for p in group["params"]
        }
        wanted = dict.fromkeys(found, 1.0)
        wanted |= {"tok_emb.weight": 0.5, "lm_head.weight": 0.25}
        assert found == wanted


def test_the_rates_are_told_and_stay_after_a_restart(run, data_dir, tmp_path):
    code, out, err = train(run, data_dir, tmp_path / "a", "--max_steps", 2, "--log_interval", 1)
    assert code == 0, err
    assert "learning rate: 0.018" in out and "by the model's size" in out
    code, _, err = train(run, data_dir, tmp_path / "a", "--max_steps", 4, "--log_interval", 1)
    assert code == 0, err
    assert log_rows(tmp_path / "a")[1]["train/lr"] == pytest.approx(0.1 / math.sqrt(32))
    code, out, _ = train(
        run,
        data_dir,
        tmp_path / "b",
        "--max_steps",
        1,
        "--lr",
        1e-3,
        "--embed_lr",
        1e-3,
        "--head_lr",
        1,
    )
    assert "by the model's size" not in out


# ---- Runs by the clock ----


@pytest.mark.parametrize(
    ("text", "seconds"), [("90s", 90), ("20m", 1200), ("1.5h", 5400), ("2", 7200), ("1d", 86400)]
)
def test_a_time_is_read(text, seconds):
    assert lm.RunSettings(time=text).budget == seconds


def test_mistakes_with_the_time_are_told(run, data_dir, tmp_path):
    for flags, word in (
        (["--time", "soon"], "20m"),
        (["--time", "0m"], "20m"),
        (["--time", "9m", "--max_steps", 5], "both given"),
        (["--time", "9m", "--epochs", 2], "both given"),
    ):
        complaint(train(run, data_dir, tmp_path / "no", *flags), word)


def test_the_schedule_ends_when_the_time_does(run, data_dir, tmp_path):
    began = time.monotonic()
    code, out, err = train(run, data_dir, tmp_path / "a", "--hours", "6s", "--log_interval", 1)
    took = time.monotonic() - began
    assert code == 0, err
    rows = [row for row in timed_rows(tmp_path / "a") if "train/lr" in row]
    assert took > 4 and rows[-1]["time"] < 8 and took < 25  # loading is a part of it
    peak = max(row["train/lr"] for row in rows)
    assert rows[-1]["train/lr"] < 0.35 * peak  # it has come down
    decaying = [
        row for row in rows if row["train/lr"] < 0.99 * peak and row["step"] > len(rows) / 2
    ]
    assert 0.05 * len(rows) < len(decaying) < 0.4 * len(rows)
    assert "val/loss" in timed_rows(tmp_path / "a")[-1]
    assert (tmp_path / "a" / "ckpt_stable.pt").exists()
    steps = rows[-1]["step"]

    code, out, err = train(run, data_dir, tmp_path / "a", "--hours", "6s", "--log_interval", 1)
    assert code == 0 and f"done after {steps} steps" in out, err

    code, out, err = train(run, data_dir, tmp_path / "a", "--hours", "9s", "--log_interval", 1)
    assert code == 0, err
    rows = timed_rows(tmp_path / "a")
    assert rows[-1]["step"] > steps and 6 < rows[-1]["time"] < 12


@pytest.mark.slow
@pytest.mark.parametrize("command", ["sft", "dpo", "reward", "grpo"])
def test_every_trainer_ends_with_its_time(run, trained, tmp_path, command):
    pairs = [
        {
            "prompt": f"say {i}",
            "response": f"{i}",
            "chosen": f"{i}",
            "rejected": "no",
            "answer": "3",
        }
        for i in range(40)
    ]
    kept = {
        "sft": ("prompt", "response"),
        "dpo": ("prompt", "chosen", "rejected"),
        "reward": ("prompt", "chosen", "rejected"),
        "grpo": ("prompt", "answer"),
    }[command]
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({k: row[k] for k in kept}) + "\n" for row in pairs))
    out = tmp_path / "run"
    argv = [command, "--ckpt", trained, "--data", rows, "--out_dir", out, "--time", "5s"]
    argv += ["--device", "cpu", "--compile", "0", "--log_interval", "1"][
        : 4 if command == "grpo" else 6
    ]
    if command == "grpo":
        argv += ["--prompts", "2", "--group_size", "2", "--max_new_tokens", "4"]
    began = time.monotonic()
    code, told, err = run([str(word) for word in argv])
    assert code == 0, err
    assert time.monotonic() - began > 3 and timed_rows(out)[-1]["time"] < 9


def test_a_mixture_of_rows_has_a_time_too(run, trained, tmp_path):
    for name in "ab":
        rows = [{"prompt": f"say {name}{i}", "response": f"{i}"} for i in range(20)]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / f"{name}.jsonl").write_text(text)
    parts = [f"{name}={tmp_path / name}.jsonl:0.5" for name in "ab"]
    argv = ["sft", "--ckpt", trained, "--data", *parts, "--out_dir", tmp_path / "run"]
    code, _, err = run([*argv, "--time", "2s", "--device", "cpu", "--compile", 0])
    assert code == 0, err


def test_small_runs_have_small_steps():
    assert lm.step_tokens_for(1e3) == 1024
    assert lm.step_tokens_for(1e7) == pytest.approx(0.58 * 1e7**0.571)
    assert lm.step_tokens_for(1e15) == 65536


# ---- Models that fit ----


def test_presets_have_the_size_in_their_name():
    for name, parameters in lm.CHOSEN_PRESETS.items():
        shape = {k: v for k, v in lm.PRESETS[name].items() if hasattr(lm.ModelSettings, k)}
        config = lm.ModelSettings(vocab_size=512, **shape)
        assert not list(config.faults())
        assert lm.parameter_counts(config)["blocks"] == pytest.approx(parameters, rel=0.15)


def test_a_preset_fits_time_and_text(monkeypatch):
    cpu = torch.device("cpu")
    found = [lm.fitting_preset(1e9, seconds, cpu) for seconds in (60, 1200, 3600 * 24)]
    assert found == ["1m", "1m", "5m"]
    assert lm.fitting_preset(1e9, 3600 * 24 * 30, cpu) == "50m"
    assert lm.fitting_preset(5e5, 1200, cpu) == "5m"  # read many times over, more learn more
    assert lm.fitting_preset(5e4, 3600, cpu) == "1m"  # too little text for more
    monkeypatch.setattr(lm, "peak_flops", lambda device: 1e15)
    assert lm.fitting_preset(1e10, 0, torch.device("cuda")) == "138m"


def test_train_chooses_a_preset_and_keeps_it(run, data_dir, tmp_path, monkeypatch):
    tiny = {"1m": {"tie": False, "seq_len": 16, "n_layer": 1, "d_model": 16, "n_head": 2}}
    monkeypatch.setattr(lm, "PRESETS", {**lm.PRESETS, **tiny})
    base = ["train", "--data_dir", str(data_dir), "--device", "cpu", "--compile", "0"]
    argv = [*base, "--out_dir", str(tmp_path / "a"), "--max_steps"]
    code, out, err = run([*argv, "2"])
    assert code == 0 and "model: 1m" in out, err
    assert read_pt(tmp_path / "a" / "ckpt_last.pt")["config"]["d_model"] == 16
    monkeypatch.setattr(lm, "fitting_preset", lambda *_: "5m")  # as another machine might choose
    code, _, err = run([*argv, "3"])
    assert code == 0, err
    saved = read_pt(tmp_path / "a" / "ckpt_last.pt")
    assert saved["step"] == 3 and saved["config"]["d_model"] == 16
    code, out, err = run(
        [
            *base,
            "--out_dir",
            str(tmp_path / "b"),
            "--max_steps",
            "1",
            "--d_model",
            "32",
            "--n_layer",
            "1",
            "--n_head",
            "2",
            "--seq_len",
            "16",
        ]
    )
    assert code == 0, err
    assert read_pt(tmp_path / "b" / "ckpt_last.pt")["config"]["d_model"] == 32


def test_a_written_0_is_no_warm_up(run, data_dir, tmp_path):
    flags = "--max_steps", 3, "--warmup_steps", 0, "--log_interval", 1, "--lr", 1e-3
    code, _, err = train(run, data_dir, tmp_path / "a", *flags, "--schedule", "constant")
    assert code == 0, err
    assert [row["train/lr"] for row in log_rows(tmp_path / "a")[:3]] == [1e-3] * 3
    complaint(train(run, data_dir, tmp_path / "b", "--lr", 0), "--lr 0 is too small", "auto")
