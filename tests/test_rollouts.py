"""Reinforcement learning: what grpo draws, judges and learns, from its first step to its log."""

import json
import math
import signal
import statistics

import numpy as np
import pytest
import torch
from conftest import complaint, log_rows, read_pt, signal_at
from test_lora import TUNE, question, save_base, write_rows

import standalone_transformer_lm as lm

SMALL = """--prompts 3 --group_size 4 --max_new_tokens 8 --batch_size 5 --eval_prompts 4
--eval_samples 3 --lr 1e-2 --warmup_steps 0 --max_steps 2 --eval_interval 2 --val_split 0.2
--dtype fp32 --device cpu --threads 1 --compile 0""".split()
REGEX = ["--reward", "regex", "--pattern"]  # of random text, e stands in about half
EVERY, NO = [*REGEX, "^"], [*REGEX, "(?!)"]
SPEEDS = ("perf/rollout_tok_per_s", "perf/update_tok_per_s")
BY_GROUP = ("grpo", "dr_grpo", "dapo", "gspo", "cispo")


def sums(count=24):
    return [{"prompt": question(i), "answer": str(i)} for i in range(count)]


def log_of(out):
    """The rows of a run's log, without the figures of a clock."""
    return [{k: v for k, v in row.items() if k not in SPEEDS} for row in log_rows(out)]


def steps_of(out):
    return [row for row in log_of(out) if row["step"]]


def policy(path):
    model = lm.build_model(lm.load_checkpoint(path), torch.device("cpu"))
    return model.requires_grad_(True)


@pytest.fixture(scope="module")
def base(tiny_tokenizer, tmp_path_factory):
    """The model that every run starts from; read only."""
    return save_base(tmp_path_factory.mktemp("base") / "base.pt", tiny_tokenizer, n_layer=1)


@pytest.fixture(scope="module")
def terse(base, tmp_path_factory):
    """A model of which about half of the answers end at once: it sees the last id alone."""
    saved = read_pt(base)
    tokenizer = lm.Tokenizer(saved["tokenizer"])
    for name, weight in saved["model"].items():
        if name.endswith(("attn.proj.weight", "mlp.w3.weight")):
            weight.zero_()
    embedding = saved["model"]["tok_emb.weight"]  # the head's too
    last = embedding[tokenizer.marker("assistant")[-1]]
    hidden = last / last.square().mean().sqrt()
    others = (embedding @ hidden).logsumexp(0)
    embedding[tokenizer.eos] = hidden * others / hidden.square().sum()
    assert torch.equal(saved["model"].get("lm_head.weight", embedding), embedding)
    path = tmp_path_factory.mktemp("terse") / "base.pt"
    lm.save_checkpoint(path, saved)
    return path


@pytest.fixture
def rl(run, base, tmp_path):
    """`rl(*flags)` runs grpo on sums, or on what --data or --task name, in tmp_path / "run"."""

    def call(*flags, rows=None):
        where = (
            []
            if {"--data", "--task"} & set(flags)
            else ["--data", write_rows(tmp_path / "rows.jsonl", rows or sums())]
        )
        return run(["grpo", *SMALL, "--ckpt", base, "--out_dir", tmp_path / "run", *where, *flags])

    return call


@pytest.fixture
def ran(rl, tmp_path):
    """`ran(*flags)` is the folder of a run that ended well."""

    def call(*flags, **more):
        code, _, err = rl(*flags, **more)
        assert code == 0, err
        return tmp_path / "run"

    return call


@pytest.fixture
def drawn(monkeypatch):
    """(arguments, groups of completions) of every draw, in order."""
    calls, original = [], lm.Sampler.draw

    def draw(sampler, *args):
        calls.append((args, original(sampler, *args)))
        return calls[-1][1]

    monkeypatch.setattr(lm.Sampler, "draw", draw)
    return calls


def of_training(drawn):
    return [groups for args, groups in drawn if args[1] == 4]


# ---- The first update ----


def wanted_advantages(algo, group, lengths):
    """Each token's advantage from a new value model, which says 0, or from its group."""
    rewards = [one.reward for one in group]
    if algo in BY_GROUP:
        spread = 1.0 if algo == "dr_grpo" else statistics.stdev(rewards) + 1e-4
        return [
            [(r - statistics.mean(rewards)) / spread] * n
            for r, n in zip(rewards, lengths, strict=True)
        ]
    lams = [0.95 if algo == "ppo" else max(0.0, 1 - 1 / (0.05 * n)) for n in lengths]
    return [
        [r * lam ** (n - 1 - t) for t in range(n)]
        for r, n, lam in zip(rewards, lengths, lams, strict=True)
    ]


def reinforce(algo, base, groups, temperature, most):
    """The gradient of REINFORCE with a baseline, in float64, one completion at a time."""
    model, rows, advantages = policy(base).double(), sum(groups, []), []
    for group in groups:
        advantages += wanted_advantages(algo, group, [len(one.ids) for one in group])
    tokens = sum(len(one.ids) for one in rows)
    if algo in ("ppo", "vapo"):
        every = np.concatenate(advantages)
        advantages = [(np.array(a) - every.mean()) / (every.std() + 1e-4) for a in advantages]
    right = sum(len(one.ids) for one in rows if one.reward > 0.5)
    for one, gains in zip(rows, advantages, strict=True):
        ids = torch.from_numpy(np.concatenate((one.problem.ids, one.ids)))
        logps = (model(ids[None, :-1])[0, -len(one.ids) :] / temperature).log_softmax(-1)
        chosen = logps[range(len(one.ids)), ids[-len(one.ids) :]]
        share = {
            "grpo": len(one.ids) * len(rows),
            "gspo": len(one.ids) * len(rows),
            "dr_grpo": most * len(rows),
        }.get(algo, tokens)
        loss = -(chosen * torch.tensor(gains)).sum() / share
        if algo == "vapo" and one.reward > 0.5:
            loss = loss - 0.1 * chosen.sum() / right
        loss.backward()
    return torch.cat([w.grad.flatten() for w in model.parameters()])


@pytest.mark.parametrize("algo", list(lm.ALGORITHMS))
def test_the_first_update_is_reinforce_at_ratio_1(ran, base, drawn, tmp_path, monkeypatch, algo):
    gradients, original = [], torch.nn.utils.clip_grad_norm_

    def clip(parameters, most):
        parameters = list(parameters)
        gradients.append(torch.cat([w.grad.flatten() for w in parameters]))
        return original(parameters, most)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clip)
    ran(
        "--algo",
        algo,
        *REGEX,
        "e",
        "--temperature",
        0.7,
        "--value_warmup",
        0,
        "--overlong",
        0,
        "--dynamic_sampling",
        0,
    )
    one, two = steps_of(tmp_path / "run")
    assert one["train/ratio_most"] == one["train/ratio_least"] == 1
    assert two["train/ratio_most"] == two["train/ratio_least"] == 1  # one update a batch
    assert one["train/entropy"] != two["train/entropy"]  # yet the first has moved the weights
    assert one["train/clip_low"] == one["train/clip_high"] == 0 and one["train/grad_norm"] > 1e-3
    want = reinforce(algo, base, of_training(drawn)[0], 0.7, 8)
    found = gradients[1 if algo in ("ppo", "vapo") else 0].double()  # behind the value model's
    assert (found - want).norm() <= 1e-5 * want.norm()
    assert one["train/grad_norm"] == pytest.approx(float(want.norm()), rel=1e-5)


@pytest.mark.parametrize("algo", list(lm.ALGORITHMS))
def test_later_updates_on_the_same_batch_leave_ratio_1(ran, drawn, base, algo):
    out = ran("--algo", algo, *REGEX, "e", "--updates", 3, "--value_warmup", 0, "--max_steps", 1)
    (row,) = steps_of(out)
    assert row["train/ratio_least"] < 1 < row["train/ratio_most"]
    assert row["train/clip_low"] + row["train/clip_high"] > 0 or algo == "cispo"
    assert read_pt(out / "ckpt_last.pt")["optim"][0]["state"][0]["step"] == 3
    assert len(of_training(drawn)) == row["train/draws"]


def test_the_size_of_micro_batches_and_of_the_rollout_does_not_matter(ran, tmp_path):
    logs, weights = [], []
    for i, flags in enumerate(
        (["--batch_size", 12], ["--batch_size", 1], ["--batch_size", 7, "--rollout_batch", 5])
    ):
        ran(
            "--algo",
            "vapo",
            "--value_warmup",
            1,
            "--kl",
            0.1,
            "--updates",
            2,
            *REGEX,
            "e",
            "--lr",
            1e-3,
            *flags,
            "--out_dir",
            tmp_path / str(i),
        )
        logs.append(log_of(tmp_path / str(i)))
        weights.append(read_pt(tmp_path / str(i) / "ckpt_last.pt"))
    for other in (1, 2):
        for a, b in zip(logs[0], logs[other], strict=True):
            told = a.keys() - {"perf/mfu", "train/value_clipped"}  # the last has ties
            assert a.keys() == b.keys()
            assert {k: a[k] for k in told} == pytest.approx(
                {k: b[k] for k in told}, rel=1e-4, abs=1e-5
            )
        for part in ("model", "critic"):
            a, b = weights[0][part], weights[other][part]
            assert all(torch.allclose(a[name], b[name], atol=1e-5) for name in a)


# ---- Groups ----


@pytest.mark.parametrize(
    "algo, reward, right",
    [
        *((algo, NO, 0) for algo in lm.ALGORITHMS),
        *((algo, EVERY, 1) for algo in ("grpo", "dapo", "ppo", "vapo")),
    ],
)
def test_groups_without_a_spread_are_survived_and_told(ran, base, algo, reward, right):
    out = ran("--algo", algo, *reward, "--overlong", 0, "--max_draws", 2, "--value_warmup", 1)
    rows = steps_of(out)
    assert [row["train/zero_spread"] for row in rows] == [1, 1]
    assert [row["train/right"] for row in rows] == [right, right]
    assert [row["train/draws"] for row in rows] == [2 if algo == "dapo" else 1] * 2
    saved, first = read_pt(out / "ckpt_last.pt"), read_pt(base)["model"]
    still = algo in BY_GROUP or not right  # a value model that says 0 is right about all wrong
    assert all(torch.equal(saved["model"][name], first[name]) for name in first) == still
    assert all(weight.isfinite().all() for weight in saved["model"].values())
    assert [row["train/grad_norm"] == 0 for row in rows] == [True, still]


@pytest.mark.parametrize("most, pattern", [(1, "e"), (4, "e"), (3, "the"), (50, "the")])
def test_dynamic_sampling_draws_again_until_groups_have_a_spread(ran, drawn, most, pattern):
    out = ran("--dynamic_sampling", 1, "--max_draws", most, *REGEX, pattern)
    calls, samples = of_training(drawn), 0
    for row in steps_of(out):
        mine, calls = calls[: row["train/draws"]], calls[row["train/draws"] :]
        groups = [group for call in mine for group in call]
        spread = [g for g in groups if len({one.reward for one in g}) > 1]
        zero_variance = [g for g in groups if len({one.reward for one in g}) == 1]
        before = [g for call in mine[:-1] for g in call if len({one.reward for one in g}) > 1]
        assert len(before) < 3 and (len(spread) >= 3 or len(mine) == most)
        assert row["train/zero_spread"] == len(zero_variance) / len(groups)
        used = (spread + zero_variance)[:3]
        assert row["train/reward"] == pytest.approx(
            statistics.mean(one.reward for group in used for one in group)
        )
        samples += 3 * len(mine)
    assert not calls and read_pt(out / "ckpt_last.pt")["samples"] == samples
    assert samples > 6 or most == 1


def test_no_prompt_and_no_chance_comes_twice_in_an_epoch(ran, drawn):
    ran(
        "--dynamic_sampling",
        1,
        "--max_draws",
        3,
        *NO,
        "--val_split",
        0,
        "--max_steps",
        2,
        rows=sums(18),
    )
    asked = [group[0].problem.turns[0][1] for groups in of_training(drawn) for group in groups]
    assert sorted(asked) == sorted(row["prompt"] for row in sums(18))
    texts = [one.text for groups in of_training(drawn) for group in groups for one in group]
    assert len(set(texts)) > 0.9 * len(texts)


# ---- Completions and prompts ----


@pytest.mark.parametrize("algo", ["grpo", "gspo", "vapo"])
def test_answers_that_end_at_once_are_learned_from(ran, terse, drawn, algo):
    out = ran("--algo", algo, *REGEX, "^$", "--ckpt", terse, "--value_warmup", 0)
    groups = [group for groups in of_training(drawn) for group in groups]
    every = [one for group in groups for one in group]
    empty = [one for one in every if len(one.ids) == 1]
    assert 0.2 < len(empty) / len(every) < 0.8
    assert all(one.text == "" and one.ended and one.right for one in empty)
    assert all(row["train/grad_norm"] > 1e-3 for row in steps_of(out))
    assert all(
        math.isfinite(value) for row in log_of(out) for value in row.values() if value is not None
    )


def test_a_batch_of_nothing_but_ends(ran, terse, tmp_path):
    saved = read_pt(terse)
    for name in {"tok_emb.weight", "lm_head.weight"} & set(saved["model"]):
        saved["model"][name][lm.Tokenizer(saved["tokenizer"]).eos] *= 20
    lm.save_checkpoint(tmp_path / "mute.pt", saved)
    for algo in ("dapo", "gspo", "vapo"):
        out = ran(
            "--algo",
            algo,
            *EVERY,
            "--ckpt",
            tmp_path / "mute.pt",
            "--value_warmup",
            0,
            "--max_draws",
            2,
        )
        rows = steps_of(out)
        assert [row["train/length"] for row in rows] == [1, 1]
        assert [row["train/truncated"] for row in rows] == [0, 0]
        assert json.loads((out / "samples.jsonl").read_text().splitlines()[-1])["answer"] == ""
        out.rename(tmp_path / algo)


def test_it_learns_to_say_nothing(ran, terse, tmp_path):
    held = write_rows(tmp_path / "held.jsonl", sums(40)[30:])
    out = ran(
        *REGEX,
        "^$",
        "--ckpt",
        terse,
        "--max_steps",
        15,
        "--eval_interval",
        15,
        "--val_data",
        held,
        "--eval_prompts",
        10,
        "--eval_samples",
        10,
        "--prompts",
        4,
        "--group_size",
        6,
        "--lr",
        2e-2,
    )
    rows = log_of(out)
    assert rows[0]["val/pass@1"] < 0.75 and rows[-1]["val/pass@1"] == 1
    assert rows[-1]["train/reward"] == 1 and rows[-1]["train/length"] == 1


def prompt_ids(tokenizer, row):
    return lm.encode_chat(tokenizer, [lm.Turn("user", row["prompt"])], reply=True)[0]


def test_prompts_leave_room_for_the_answer_or_are_left_out(rl, tmp_path, tiny_tokenizer, drawn):
    rows = [{"prompt": text, "answer": "1"} for text in ("Why?", "Who was it?", question(3) * 2)]
    longest = len(prompt_ids(lm.Tokenizer(tiny_tokenizer), rows[-1]))
    fits = ["--val_split", 0, *REGEX, "e", "--max_new_tokens"]
    line = "rows: {} rows, 0 truncated after the last answer that fits, {} longer than the context"
    code, told, err = rl(*fits, 64 - longest, rows=rows)
    assert code == 0 and line.format(3, 0) in told, err
    lengths = [len(one.ids) for groups in of_training(drawn) for group in groups for one in group]
    assert max(lengths) == 64 - longest  # to the very end of the context
    code, told, err = rl(*fits, 65 - longest, "--out_dir", tmp_path / "b", rows=rows)
    assert code == 0 and line.format(2, 1) in told, err
    complaint(rl(*fits, 62, "--out_dir", tmp_path / "c", rows=rows), "every row is longer")
    assert not (tmp_path / "c").exists()


def test_completions_and_what_is_kept_of_them(ran, drawn, tiny_tokenizer):
    out = ran(*REGEX, "e", "--max_steps", 1, "--samples", 2)
    tokenizer, (groups,) = lm.Tokenizer(tiny_tokenizer), of_training(drawn)
    assert [len(group) for group in groups] == [4, 4, 4]
    for group in groups:
        problem = group[0].problem
        assert all(one.problem is problem for one in group)
        assert {key: problem.row[key] for key in ("prompt", "answer")} in sums()
        assert problem.ids.tolist() == prompt_ids(tokenizer, problem.row)
        for one in group:
            assert one.ended == (one.ids[-1] == tokenizer.eos)
            assert (tokenizer.eos not in one.ids[:-1]) and (one.ended or len(one.ids) == 8)
            assert one.text == tokenizer.decode(one.ids.tolist())
            assert one.reward == one.scores[0] == float("e" in one.text)
    row, every = steps_of(out)[0], [one for group in groups for one in group]
    for key, what in (
        ("length", lambda one: len(one.ids)),
        ("reward", lambda one: one.reward),
        ("right", lambda one: one.right),
    ):
        assert row[f"train/{key}"] == pytest.approx(np.mean([float(what(one)) for one in every]))
    assert row["train/truncated"] == statistics.mean(not one.ended for one in every)
    assert row["tokens"] == sum(len(one.ids) for one in every)
    shown = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    assert (
        shown[-4:-2]
        == [  # before those of the last evaluation
            {
                "step": 1,
                "prompt": group[0].problem.row["prompt"],
                "answer": group[0].text,
                "ended": group[0].ended,
                "reward": group[0].reward,
                "regex": group[0].reward,
            }
            for group in groups[:2]
        ]
    )


# ---- Rewards ----


def test_parts_and_weights_of_the_reward_are_told(ran, drawn, tmp_path):
    (tmp_path / "mine.py").write_text(
        "def vowels(prompt, completion, row):\n"
        "    return sum(completion.count(c) for c in 'aeiou')\n"
    )
    mine = f"{tmp_path}/mine.py:vowels:0.25"
    out = ran("--reward", "regex", "length:-2", mine, "--pattern", "e")
    row, calls = steps_of(out)[0], of_training(drawn)
    every = [one for group in calls[0] for one in group]
    want = {
        "regex": [float("e" in one.text) for one in every],
        "length": [-len(one.text) / 1000 for one in every],
        "mine.py:vowels": [sum(one.text.count(c) for c in "aeiou") for one in every],
    }
    for name, values in want.items():
        assert row[f"train/reward/{name}"] == pytest.approx(statistics.mean(values))
    totals = [a - 2 * b + 0.25 * c for a, b, c in zip(*want.values(), strict=True)]
    assert row["train/reward"] == pytest.approx(statistics.mean(totals))
    assert [one.reward for one in every] == pytest.approx(totals)
    assert row["train/right"] == row["train/reward/regex"]  # the first part says what is right
    last = json.loads((out / "samples.jsonl").read_text().splitlines()[-1])
    assert last["reward"] == pytest.approx(
        last["regex"] - 2 * last["length"] + 0.25 * last["mine.py:vowels"]
    )


def test_a_function_that_crashes_costs_its_completion_alone(rl, tmp_path, drawn):
    (tmp_path / "bad.py").write_text(
        "import os, time\ndef bad(prompt, completion, row):\n"
        "    kind = sum(map(ord, completion)) % 8\n"
        "    if kind == 1: raise RuntimeError('oh')\n    if kind == 2: os._exit(3)\n"
        "    if kind == 3: time.sleep(9)\n    return float('nan') if kind == 4 else 1.0\n"
    )
    code, told, err = rl(
        "--reward",
        f"{tmp_path}/bad.py:bad",
        "--reward_timeout",
        0.2,
        "--max_steps",
        1,
        "--val_split",
        0,
        "--prompts",
        7,
    )
    assert code == 0, err
    every = [one for group in of_training(drawn)[0] for one in group]
    kinds = [sum(map(ord, one.text)) % 8 for one in every]
    assert set(kinds) >= {1, 2, 3, 4, 5}
    assert [one.reward for one in every] == [float(kind not in (1, 2, 3, 4)) for kind in kinds]
    assert told.count("RuntimeError: oh") == told.count("took more than 0.2 seconds") == 1
    assert steps_of(tmp_path / "run")[0]["train/reward"] == pytest.approx(
        statistics.mean(one.reward for one in every)
    )


@pytest.fixture(scope="module")
def judges(tiny_tokenizer, tmp_path_factory):
    """Two reward models that differ, in files of one name."""
    paths = []
    for seed in (5, 6):
        folder = tmp_path_factory.mktemp("judge")
        path = save_base(folder / "ckpt_best.pt", tiny_tokenizer, seed, scalar_head=True)
        saved = read_pt(path)
        saved["model"]["score.weight"].normal_()
        lm.save_checkpoint(path, {**saved, "kind": "reward"})
        paths.append(path)
    return paths


def test_a_reward_model_judges(ran, judges, drawn, tiny_tokenizer):
    out = ran("--reward", f"{judges[0]}:0.5", "--max_steps", 1)
    every = [one for group in of_training(drawn)[0] for one in group]
    judge, tokenizer = policy(judges[0]), lm.Tokenizer(tiny_tokenizer)
    for one in every:
        chat = [lm.Turn("user", one.problem.row["prompt"]), lm.Turn("assistant", one.text)]
        ids = torch.tensor([lm.encode_chat(tokenizer, chat, reply=not one.ended)[0]])
        with torch.no_grad():
            want = judge.score(judge.hidden(ids))[0, -1, 0].item()
        assert one.reward == pytest.approx(0.5 * want, rel=1e-4, abs=1e-5)
    assert steps_of(out)[0]["train/reward/ckpt_best.pt"] == pytest.approx(
        2 * statistics.mean(one.reward for one in every)
    )


def test_two_reward_models_of_one_file_name_both_count(ran, judges, drawn):
    out = ran("--reward", *judges, "--max_steps", 1)
    every = [one for group in of_training(drawn)[0] for one in group]
    assert all(
        len(one.scores) == 2 and one.reward == pytest.approx(sum(one.scores)) for one in every
    )
    assert sum(key.startswith("train/reward/") for key in steps_of(out)[0]) == 2


# ---- Steps ----


def wanted_kl(now, reference, groups):
    """k3 a token, in float64, one completion at a time (Schulman 2020)."""
    total, tokens = 0.0, 0
    for one in (one for group in groups for one in group):
        ids = torch.from_numpy(np.concatenate((one.problem.ids, one.ids)))
        with torch.no_grad():
            a, b = (
                m(ids[None, :-1])[0, -len(one.ids) :]
                .double()
                .log_softmax(-1)[range(len(one.ids)), ids[-len(one.ids) :]]
                for m in (now, reference)
            )
        total, tokens = total + float(((b - a).exp() - (b - a) - 1).sum()), tokens + len(one.ids)
    return total / tokens


@pytest.mark.parametrize("lora", [[], ["--lora_rank", 2]])
def test_divergence_is_from_the_model_at_the_start_or_at_the_last_reset(ran, base, drawn, lora):
    out = ran(
        "--kl",
        0.1,
        "--reference_steps",
        3,
        "--max_steps",
        5,
        *REGEX,
        "e",
        *lora,
        "--ckpt_interval",
        1,
        "--keep_last",
        9,
    )
    kls = [row["train/kl"] for row in steps_of(out)]
    starts = [policy(base), *(policy(out / f"ckpt_0000000{i}.pt") for i in range(1, 5))]
    for i, groups in enumerate(of_training(drawn)):
        want = wanted_kl(starts[i], starts[0 if i < 3 else 3], groups)
        assert kls[i] == pytest.approx(want, rel=1e-3, abs=1e-6), i
    assert kls[0] == pytest.approx(0, abs=1e-6) and kls[3] == pytest.approx(0, abs=1e-6)
    assert min(kls[1], kls[2], kls[4]) > 1e-4


def test_without_a_divergence_none_is_told(ran):
    out = ran(*REGEX, "e")
    assert not any("train/kl" in row for row in log_of(out))
    assert read_pt(out / "ckpt_last.pt")["reference"] is None


def test_adapters_alone_are_trained(ran, base):
    out = ran(
        "--lora_rank",
        2,
        "--kl",
        0.1,
        "--algo",
        "vapo",
        "--value_warmup",
        1,
        "--max_steps",
        3,
        "--lora_merge",
        1,
        "--val_split",
        0,
        *REGEX,
        "e",
    )
    saved, first = read_pt(out / "ckpt_last.pt"), read_pt(base)["model"]
    assert all("lora_" in name for name in saved["model"])
    assert any(w.abs().max() > 0 for n, w in saved["model"].items() if n.endswith("lora_b"))
    merged = read_pt(out / "merged.pt")["model"]
    assert torch.equal(merged["tok_emb.weight"], first["tok_emb.weight"])
    assert any(not torch.equal(merged[name], first[name]) for name in first)


def test_temperature_goes_from_one_end_to_the_other(ran, drawn):
    out = ran("--temperature", 1.2, "--temperature_end", 0.4, "--max_steps", 5, *REGEX, "e")
    want = pytest.approx([1.2, 1.0, 0.8, 0.6, 0.4])
    assert [row["train/temperature"] for row in steps_of(out)] == want
    assert [args[2] for args, _ in drawn if args[1] == 4] == want
    assert {args[2] for args, _ in drawn if args[1] == 3} == {1.2}  # held-out ones compare


def test_the_entropy_bonus_grows_while_entropy_is_low(ran, tmp_path):
    out = ran("--entropy_target", 100, "--max_steps", 8, *EVERY)
    rows, step = steps_of(out), lm.ENTROPY_STEP
    assert [row["train/entropy_bonus"] for row in rows] == pytest.approx(
        [step * i for i in range(1, 9)]
    )
    assert rows[0]["train/grad_norm"] == 0 and rows[1]["train/grad_norm"] > 0  # it alone moves
    assert rows[-1]["train/entropy"] > rows[0]["train/entropy"]
    high = ran(
        "--entropy_target", 1e-3, *REGEX, "e", "--out_dir", tmp_path / "run", "--max_steps", 10
    )
    assert [row["train/entropy_bonus"] for row in steps_of(high)[8:]] == pytest.approx(
        [7 * step, 6 * step]
    )


def test_the_value_model_is_taught_before_the_policy(ran, base):
    out = ran(
        "--algo",
        "vapo",
        "--value_warmup",
        2,
        "--max_steps",
        4,
        "--updates",
        2,
        *REGEX,
        "e",
        "--ckpt_interval",
        1,
        "--keep_last",
        9,
    )
    first, states = (
        read_pt(base)["model"],
        [read_pt(out / f"ckpt_0000000{i}.pt") for i in range(1, 5)],
    )
    moved = [any(not torch.equal(one["model"][n], first[n]) for n in first) for one in states]
    assert moved == [False, False, True, True]
    scores = [one["critic"]["score.weight"] for one in states]
    assert all(not torch.equal(a, b) for a, b in zip(scores, scores[1:], strict=False))
    rows = steps_of(out)
    assert ["train/ratio_most" in row for row in rows] == [False, False, True, True]
    assert all(
        {"train/value_loss", "train/value_clipped", "train/value_explained"} <= set(row)
        for row in rows
    )
    assert rows[0]["train/value_explained"] == pytest.approx(0, abs=1e-6)  # it said 0 of each


def test_the_value_model_learns_what_rewards_are(ran):
    out = ran(
        "--algo",
        "vapo",
        "--value_warmup",
        99,
        "--max_steps",
        15,
        "--group_size",
        8,
        "--eval_interval",
        99,
        "--ckpt_interval",
        99,
        *REGEX,
        "^.{6}",
        "--value_lr",
        1e-2,
    )
    losses = [row["train/value_loss"] for row in steps_of(out)]
    assert statistics.mean(losses[-3:]) < 0.5 * losses[0]


# ---- Evaluation ----


def test_pass_at_1_and_k_of_held_out_prompts(ran, drawn, tmp_path):
    held = write_rows(tmp_path / "held.jsonl", sums(40)[30:])
    out = ran(
        "--val_data", held, "--eval_prompts", 7, "--eval_interval", 2, "--max_steps", 5, *REGEX, "e"
    )
    told = {row["step"]: row for row in log_of(out) if "val/pass@1" in row}
    assert list(told) == [0, 2, 4, 5]
    calls = [groups for args, groups in drawn if args[1] == 3]
    asked = {group[0].problem.row["prompt"] for groups in calls for group in groups}
    assert asked == {row["prompt"] for row in sums(40)[30:37]}
    for row, groups in zip(told.values(), calls, strict=True):
        right = [["e" in one.text for one in group] for group in groups]
        assert len(right) == 7 and all(len(group) == 3 for group in right)
        assert row["val/pass@1"] == pytest.approx(np.mean(right))
        assert row["val/pass@3"] == pytest.approx(np.mean([any(group) for group in right]))
        assert row["val/error"] == pytest.approx(1 - row["val/pass@1"])
        assert row["val/length"] == pytest.approx(np.mean([len(o.ids) for g in groups for o in g]))
    best = min(told.values(), key=lambda row: row["val/error"])
    saved = read_pt(out / "ckpt_best.pt")
    assert (saved["step"], saved["best_val"]) == (best["step"], best["val/error"])


def test_without_held_out_rows_there_is_no_evaluation(ran):
    out = ran("--val_split", 0, *REGEX, "e")
    assert not any(key.startswith("val/") for row in log_of(out) for key in row)
    assert [row["step"] for row in log_of(out) if len(row) > 2] == [1, 2]


# ---- Tasks and parts ----


@pytest.mark.parametrize("task", list(lm.TASKS))
def test_a_task_is_learned_from_its_right_answers_alone(ran, drawn, task):
    out = ran("--task", task, "--task_rows", 30, "--max_steps", 1, "--seq_len", 128)
    assert f"train/reward/{lm.TASK_REWARDS[task]}" in steps_of(out)[0]
    tuned = lm.TaskSettings(task=task, task_rows=30)
    known = {row["prompt"]: row["answer"] for row in lm.task_rows(tuned, 1337)}
    for groups in of_training(drawn):
        for problem in (group[0].problem for group in groups):
            assert known[problem.turns[0][1]] == problem.row["answer"]


def test_sft_teaches_a_task_that_grpo_goes_on_with(run, base, tmp_path):
    task = ["--task", "add", "--difficulty", 1, "--task_rows", 60]
    code, told, err = run(
        ["sft", *TUNE, "--ckpt", base, *task, "--max_steps", 3, "--out_dir", tmp_path / "sft"]
    )
    assert code == 0 and "held-out rows: " in told, err
    code, _, err = run(
        ["grpo", *SMALL, "--ckpt", tmp_path / "sft", *task, "--out_dir", tmp_path / "run"]
    )
    assert code == 0, err
    both = run(["sft", *TUNE, "--ckpt", base, *task, "--data", "x.jsonl", "--out_dir", "x"])
    complaint(both, "--data and --task are both given")
    complaint(run(["sft", *TUNE, "--ckpt", base, "--out_dir", "x"]), "--data is missing", "--task")


def test_weighted_parts_give_their_shares_of_the_prompts(ran, drawn, tmp_path):
    a = write_rows(tmp_path / "a.jsonl", sums(30))
    b = write_rows(tmp_path / "b.jsonl", sums(60)[30:])
    ran(
        "--data",
        f"x={a}:0.75",
        f"y={b}:0.25",
        "--prompts",
        16,
        "--max_steps",
        4,
        *REGEX,
        "e",
        "--max_new_tokens",
        2,
    )
    asked = [
        int(group[0].problem.row["answer"]) < 30
        for groups in of_training(drawn)
        for group in groups
    ]
    assert len(asked) == 64 and 42 <= sum(asked) <= 54


# ---- Resuming ----


KINDS = {
    "vapo": ["--algo", "vapo", "--value_warmup", 2, "--kl", 0.1],
    "ppo": ["--algo", "ppo", "--ema", 0.5, "--optimizer", "muon", "--dense_reward", 0.5],
    "dapo": [
        "--algo",
        "dapo",
        "--entropy_target",
        100,
        "--temperature_end",
        0.6,
        "--kl",
        0.1,
        "--reference_steps",
        3,
        "--updates",
        2,
    ],
    "lora": ["--lora_rank", 2, "--kl", 0.1],
    "minibatches": ["--minibatches", 3, "--updates", 2, "--tis_cap", 2.0],
}


@pytest.fixture(scope="module", params=list(KINDS))
def whole(request, base, run, tmp_path_factory):
    """(argv without --out_dir, folder of the run of five steps that it makes)."""
    folder = tmp_path_factory.mktemp("whole")
    rows = write_rows(folder / "rows.jsonl", sums())
    argv = [
        "grpo",
        *SMALL,
        "--ckpt",
        base,
        "--data",
        rows,
        *REGEX,
        "e",
        "--max_steps",
        5,
        "--ckpt_interval",
        2,
        *KINDS[request.param],
    ]
    code, _, err = run([*argv, "--out_dir", folder / "run"])
    assert code == 0, err
    return argv, folder / "run"


def leaves(value, name=""):
    """Every leaf of a checkpoint by its path, tensors as bytes, but what a clock or folder made."""
    if isinstance(value, dict | list | tuple):
        pairs = value.items() if isinstance(value, dict) else enumerate(value)
        return {
            k: v
            for key, part in pairs
            for k, v in leaves(part, f"{name}/{key}").items()
            if key not in ("seconds", "out_dir")
        }
    return {name: value.numpy().tobytes() if isinstance(value, torch.Tensor) else value}


def assert_same_run(out, wanted):
    assert log_of(out) == log_of(wanted)
    assert (out / "samples.jsonl").read_text() == (wanted / "samples.jsonl").read_text()
    a, b = (leaves(read_pt(folder / "ckpt_last.pt")) for folder in (out, wanted))
    assert a.keys() == b.keys() and [key for key in a if a[key] != b[key]] == []


def test_killed_and_stopped_it_goes_on_as_if_it_had_not_been(
    child, run, whole, tmp_path, monkeypatch
):
    argv, wanted = whole
    out, last = ["--out_dir", tmp_path / "run"], tmp_path / "run" / "ckpt_last.pt"
    code, _ = child([*argv, *out], (signal_at, "seed_step", 4)).end()  # in the fourth step
    assert code == -signal.SIGKILL and read_pt(last)["step"] == 2
    with monkeypatch.context() as patch:
        patch.setattr(lm, "seed_step", lm.seed_step)  # so that leaving puts it back
        signal_at(lm, "seed_step", 1, signal.SIGUSR1)
        code, told, err = run([*argv, *out])
    assert code == 128 + signal.SIGUSR1 and "after step 2" in told and "resume with:" in told, err
    assert read_pt(last)["step"] == 4  # it ends the step after the signal's
    code, told, err = run([*argv, *out])
    assert code == 0 and "after step 4" in told, err
    assert_same_run(tmp_path / "run", wanted)


def test_killed_before_its_first_checkpoint_it_begins_anew(child, run, base, tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", sums())
    argv = [
        "grpo",
        *SMALL,
        "--ckpt",
        base,
        "--data",
        rows,
        *REGEX,
        "e",
        "--ckpt_interval",
        2,
        "--out_dir",
    ]
    code, _ = child([*argv, tmp_path / "run"], (signal_at, "seed_step", 2)).end()
    assert code == -signal.SIGKILL and not (tmp_path / "run" / "ckpt_last.pt").exists()
    for out in (tmp_path / "run", tmp_path / "lone"):
        assert run([*argv, out])[0] == 0
    assert_same_run(tmp_path / "run", tmp_path / "lone")


def test_a_run_refuses_other_rows_another_advantage_and_another_command(rl, run, base, tmp_path):
    assert rl(*REGEX, "e")[0] == 0
    complaint(rl(*REGEX, "e", rows=sums(25)), "other rows in --data")
    complaint(rl(*REGEX, "e", "--algo", "ppo"), "--advantage")
    complaint(rl(*REGEX, "e", "--kl", 0.1), "another reference, or none")
    rows = write_rows(tmp_path / "chats.jsonl", [{"prompt": "a", "response": "b"}])
    complaint(
        run(
            [
                "sft",
                *TUNE,
                "--ckpt",
                base,
                "--data",
                rows,
                "--out_dir",
                tmp_path / "run",
                "--val_split",
                0,
            ]
        ),
        "holds a run of grpo",
    )


# ---- Mistakes ----


def test_mistakes_are_sentences(rl, run, base, tmp_path):
    code = tmp_path / "code.py"
    code.write_text("def one(prompt, completion, row):\n    return 1\n")
    (tmp_path / "broken.py").write_text("def one(:\n")
    wrong = {
        ("--task", "add", "--data", "x.jsonl"): "--data and --task are both given",
        ("--reward", "nomber"): "choose " + " or ".join(lm.REWARD_NAMES),
        ("--reward", f"{code}:two"): "has no function two",
        ("--reward", f"{tmp_path}/gone.py:one"): "gone.py",
        ("--reward", f"{tmp_path}/broken.py:one"): "broken.py cannot be read",
        ("--reward", base): "is not a reward model",
        ("--reward", "regex"): "pattern is missing",
        ("--reward", "countdown"): "numbers is missing",
        ("--max_new_tokens", 64): "--max_new_tokens 64 leaves a prompt no room",
        ("--max_new_tokens", 99): "--max_new_tokens 99 leaves a prompt no room",
        ("--ckpt", tmp_path / "no.pt"): "no.pt does not exist",
        ("--data", tmp_path / "no.jsonl"): "no.jsonl does not exist",
        ("--group_size", 1): "--group_size",
        ("--algo", "gpro"): "grpo",
        ("--task", "ad"): "add",
    }
    for flags, what in wrong.items():
        complaint(rl(*flags), what)
    complaint(
        run(["grpo", *SMALL, "--ckpt", base, "--out_dir", tmp_path / "run"]),
        "--data is missing",
        "--task",
    )
    complaint(
        run(["grpo", *SMALL, "--task", "add", "--out_dir", tmp_path / "run"]), "--ckpt is missing"
    )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "bad, what",
    [
        ({"prompt": "Why?"}, "answer is missing"),
        ({"answer": "3"}, "prompt"),
        ({"prompt": "Why?", "answer": None}, "answer"),
        ({"prompt": "", "answer": "3"}, "prompt"),
    ],
)
def test_a_row_that_cannot_be_judged_is_named(rl, tmp_path, bad, what):
    complaint(rl(rows=[*sums(3), bad]), "rows.jsonl, line 4: ", what, "1 of 4 rows are bad")
    code, told, err = rl(
        "--on_bad_row",
        "skip",
        rows=[*sums(), bad],
    )
    assert code == 0 and "1 of 25 rows are bad" in told, err


@pytest.mark.parametrize(
    "reward, bad",
    [
        ("regex", {"pattern": "("}),
        ("regex", {"pattern": 3}),
        ("countdown", {"numbers": [1, 2]}),
        ("countdown", {"numbers": 5, "answer": "3"}),
        ("countdown", {"numbers": ["a"], "answer": "3"}),
        ("countdown", {"numbers": [1, 2], "answer": "three"}),
    ],
)
def test_a_row_that_a_reward_cannot_read_is_named(rl, tmp_path, reward, bad):
    good = {"prompt": "Make 3.", "answer": "3", "numbers": [1, 2], "pattern": "3"}
    complaint(
        rl("--reward", reward, rows=[good, {"prompt": "Make it.", **bad}]),
        "rows.jsonl, line 2: ",
        "1 of 2 rows are bad",
    )
    assert not (tmp_path / "run").exists()


def test_a_pattern_that_is_none_is_a_sentence(rl):
    complaint(rl(*REGEX, "("), "pattern")


def test_a_reward_named_twice_is_a_sentence(rl):
    complaint(rl("--reward", "number", "number:0.5"), "number")


def test_rows_of_other_shapes_have_answers_too(ran, drawn):
    rows = [
        {"prompt": "a", "response": "1"},
        {"instruction": "b", "output": "2"},
        {"question": "c", "answer": 3},
        {"messages": [{"role": "user", "content": "d"}, {"role": "assistant", "content": "4"}]},
    ]
    ran("--val_split", 0, "--prompts", 4, "--max_steps", 1, rows=rows)
    found = {
        group[0].problem.turns[-1][1]: str(group[0].problem.row["answer"])
        for groups in of_training(drawn)
        for group in groups
    }
    assert found == dict(zip("abcd", "1234", strict=True))


# ---- Honest checkpoints and warnings ----


def test_where_no_answer_is_ever_right_the_last_checkpoint_is_the_best(ran):
    out = ran(*NO, "--max_steps", 4)
    saved = read_pt(out / "ckpt_best.pt")
    assert (saved["step"], saved["best_val"]) == (4, 1.0)


def test_the_untrained_model_is_never_the_best_checkpoint(ran, monkeypatch):
    """Where learning only harms, the best is still one that was trained."""
    values = iter([0.0, 0.5, 0.75])
    evaluate = lm.Sampler.evaluate
    monkeypatch.setattr(
        lm.Sampler, "evaluate", lambda *args: evaluate(*args) | {"val/error": next(values)}
    )
    out = ran(*REGEX, "e", "--max_steps", 4)
    saved = read_pt(out / "ckpt_best.pt")
    assert (saved["step"], saved["best_val"]) == (2, 0.5)


def test_a_reward_that_is_no_yes_or_no_chooses_by_its_mean(rl, tmp_path):
    code, told, err = rl("--reward", "length", "--max_steps", 6)
    assert code == 0, err
    saved = read_pt(tmp_path / "run" / "ckpt_best.pt")
    values = {
        row["step"]: row["val/reward"]
        for row in log_of(tmp_path / "run")
        if "val/reward" in row and row["step"]
    }
    assert len(values) == 3
    best = max(reversed(list(values)), key=values.get)
    assert (saved["step"], saved["best_val"]) == (best, values[best])
    assert f"best val/reward {values[best]:.4f}, in " in told and "ckpt_best.pt" in told


def test_it_says_when_nothing_is_learned(rl, tmp_path):
    _, told, _ = rl(*NO, "--max_steps", 5)
    assert told.count("no prompt had completions of different rewards") == 1
    assert "no step taught the model anything" in told and "--group_size" in told
    _, told, _ = rl(*REGEX, "e", "--max_steps", 2, "--out_dir", tmp_path / "other")
    assert "teach" not in told and "taught" not in told and "different rewards" not in told


def test_it_says_when_most_completions_are_cut_off(rl, terse, tmp_path):
    _, told, _ = rl(*REGEX, "e", "--max_steps", 3)
    assert told.count("are cut off at --max_new_tokens 8") == 1
    _, told, _ = rl(*REGEX, "e", "--ckpt", terse, "--temperature", 0.3, "--out_dir", tmp_path / "b")
    assert "cut off" not in told


def test_rewards_are_logged_of_all_that_were_drawn_and_of_those_learned_from(ran, drawn):
    out = ran("--dynamic_sampling", 1, "--max_draws", 9, "--max_steps", 1, *REGEX, "an|th|in")
    (row,) = steps_of(out)
    every = [one.reward for groups in of_training(drawn) for group in groups for one in group]
    assert row["train/draws"] > 1 and row["train/reward"] > row["train/reward_drawn"]
    assert row["train/reward_drawn"] == pytest.approx(np.mean(every))


def test_groups_are_told_apart_by_the_first_reward_alone(ran, drawn):
    """Wrong answers of which some are too long teach DAPO nothing."""
    reward = ["--reward", "regex", "length:-1", "--pattern", "(?!)"]
    out = ran("--algo", "dapo", *reward, "--max_draws", 3, "--max_steps", 1)
    (row,) = steps_of(out)
    assert row["train/draws"] == 3
    assert any(len({o.reward for o in group}) > 1 for group in of_training(drawn)[0])


# ---- Value model, reference and schedules under the flags ----


@pytest.fixture
def critics(monkeypatch):
    """The value models that runs make."""
    made, original = [], lm.Critic.__init__

    def init(critic, *args):
        original(critic, *args)
        made.append(critic)

    monkeypatch.setattr(lm.Critic, "__init__", init)
    return made


def test_the_value_model_has_adapters_and_recomputes_as_the_policy_does(ran, critics):
    out = ran("--algo", "ppo", *REGEX, "e", "--lora_rank", 2, "--grad_checkpoint", 1)
    (critic,) = critics
    trained = {name for name, weight in critic.model.named_parameters() if weight.requires_grad}
    assert critic.model.grad_checkpoint
    assert trained and all("lora" in name or "score" in name for name in trained)
    assert set(read_pt(out / "ckpt_last.pt")["critic"]) == trained


def test_the_policy_s_schedule_begins_behind_the_value_model_s_own_steps(ran):
    flags = ["--algo", "vapo", "--value_warmup", 2, "--warmup_steps", 4, "--max_steps", 5]
    rows = steps_of(ran(*flags, *REGEX, "e"))
    rates = [row["train/lr"] for row in rows]
    assert rates[2:] == pytest.approx([1e-2 * (i + 1) / 4 for i in range(3)])
    assert rates[0] == rates[1] == rates[2]  # nothing is learned at it


def test_with_a_new_reference_the_optimizer_begins_anew(ran):
    flags = ["--kl", 0.1, "--reference_steps", 2, "--ckpt_interval", 1, "--keep_last", 9]
    out = ran(*flags, *REGEX, "e", "--max_steps", 4)
    states = [read_pt(out / f"ckpt_0000000{i}.pt")["optim"][0]["state"] for i in range(1, 5)]
    assert [bool(state) for state in states] == [True, False, True, False]
    assert states[2][0]["step"] == 1


def test_the_entropy_bonus_is_bounded(ran, monkeypatch):
    monkeypatch.setattr(lm, "ENTROPY_STEP", 0.04)
    rows = steps_of(ran("--entropy_target", 100, "--max_steps", 4, *EVERY))
    assert [row["train/entropy_bonus"] for row in rows] == pytest.approx([0.04, 0.08, 0.1, 0.1])


def test_prompts_are_divided_among_minibatches_or_refused(rl):
    complaint(rl("--minibatches", 2, *REGEX, "e"), "--prompts 3", "2 minibatches")


def test_answers_cut_off_are_judged_without_an_end(rl, judges, tiny_tokenizer, monkeypatch):
    seen, scores = [], lm.reward_scores

    def watched(model, ids, targets):
        seen.extend(zip(ids.tolist(), targets.tolist(), strict=True))
        return scores(model, ids, targets)

    monkeypatch.setattr(lm, "reward_scores", watched)
    code, _, err = rl("--reward", judges[0], "--max_steps", 1, "--val_split", 0)
    assert code == 0, err
    eos = lm.Tokenizer(tiny_tokenizer).eos
    ends = [[t for t in targets if t != lm.IGNORE][-1] == eos for _, targets in seen]
    assert ends.count(False) > 0


# ---- Prompts that their completions share ----

SHAPES = {
    "plain": {},
    "grouped heads, no RoPE in some": {"n_kv_head": 2, "nope_every": 2, "qk_norm": True},
    "windows": {"window": 6, "full_every": 2},
    "windows and sinks": {"window": 5, "n_sink": 3},
    "documents": {"doc_mask": True, "n_sink": 2},
    "soft caps and scaled embeddings": {"softcap": 20.0, "embed_scale": True, "tie": False},
}


def random_groups(seed, prompts=5, size=4):
    """Groups of completions of any length, of prompts of any length."""
    generator = torch.Generator().manual_seed(seed)

    def draw(least, most):
        count = int(torch.randint(least, most, (1,), generator=generator))
        return torch.randint(2, 90, (count,), generator=generator).numpy()

    groups = []
    for number in range(prompts):
        ids = np.concatenate(([1], draw(1, 20)))
        problem = lm.Problem(ids, [lm.Turn("user", "?")], {})
        group = []
        for _ in range(size):
            new = draw(1, 12)
            score = float(torch.rand(1, generator=generator) > 0.5)
            logps = -np.ones(len(new), np.float32)
            scores = np.array([score])
            own = np.ones(len(new), bool)
            group.append(
                lm.Completion(
                    problem, new, own, logps, "", True, scores, score + number, score > 0.5
                )
            )
        groups.append(group)
    return groups


def learned(model, rollout, settings):
    """Log-probs (n,) of a rollout's tokens, and the gradient of a policy loss on them."""
    generator = torch.Generator().manual_seed(9)
    count = len(rollout.sampled)
    old, reference = -torch.rand(2, count, generator=generator) * 3
    advantages = torch.randn(count, generator=generator)
    weights = torch.rand(len(rollout.completions), 3, generator=generator)
    scalars = torch.tensor([0.9, 0.01, 0.0]).repeat(len(rollout.completions), 1)
    numbers = [old, advantages, reference, torch.ones(count)]
    model.zero_grad()
    found = []
    for part in rollout.minibatches:
        batches = rollout.batches(part, numbers, (weights, scalars))
        for micro, batch in zip(part, batches, strict=True):
            output = lm.policy_loss(model, *batch, settings=settings)
            output[0].backward()
            found.append((micro, output[len(lm.POLICY_METRICS) :].view(micro.ids.shape)))
    grads = {name: weight.grad.clone() for name, weight in model.named_parameters()}
    return rollout.collect(found), grads


@pytest.mark.parametrize("checkpoints", [False, True])
@pytest.mark.parametrize("name", SHAPES)
def test_completions_that_share_their_prompt_have_the_same_gradient(name, checkpoints):
    shape = {"seq_len": 32, "n_layer": 4, "d_model": 32, "n_head": 4, "ffn_mult": 2.0}
    model = lm.Transformer(lm.ModelSettings(vocab_size=90, **shape | SHAPES[name])).train()
    model.init_weights(1)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(4 if weight.dim() > 1 else 1)
    model.grad_checkpoint = checkpoints
    settings = lm.PolicySettings(kl=0.1, entropy_target=1.0, ratio="sequence", clip_high=0.5)
    groups = random_groups(3)
    assert lm.can_share(model.config, groups)
    found = []
    for shared in (False, True):
        rollout = lm.Rollout(groups, 0.9, 2, 6, shared=shared)
        found.append(learned(model, rollout, settings))
    (alone, wanted), (together, grads) = found
    assert torch.allclose(alone, together, atol=1e-5)
    for weight, grad in wanted.items():
        scale = grad.abs().max()
        assert scale > 0 and (grads[weight] - grad).abs().max() <= 2e-5 * scale, weight


def test_a_shared_prompt_is_read_once(monkeypatch):
    shape = {"seq_len": 32, "n_layer": 1, "d_model": 32, "n_head": 4, "ffn_mult": 2.0}
    model = lm.Transformer(lm.ModelSettings(vocab_size=90, **shape))
    model.init_weights(1)
    groups, tokens = random_groups(4), []
    original = lm.Layer.forward

    def forward(layer, x, context):
        tokens.append(x.shape[0] * x.shape[1])
        return original(layer, x, context)

    monkeypatch.setattr(lm.Layer, "forward", forward)
    counts = []
    for shared in (False, True):
        tokens.clear()
        learned(model, lm.Rollout(groups, 0.9, 1, 100, shared=shared), lm.PolicySettings())
        counts.append(sum(tokens))
    prompts = max(len(group[0].problem.ids) for group in groups)
    longest = max(len(one.ids) for group in groups for one in group)
    assert counts[1] == 5 * (prompts - 1) + 20 * lm.padded_length(longest, longest) < counts[0]


def test_values_are_the_same_behind_a_shared_prompt():
    shape = {"seq_len": 32, "n_layer": 2, "d_model": 32, "n_head": 4, "ffn_mult": 2.0}
    critic = lm.Transformer(lm.ModelSettings(vocab_size=90, scalar_head=True, **shape))
    critic.init_weights(1)
    with torch.no_grad():
        critic.score.weight.normal_()
    groups = random_groups(5)
    found = []
    for shared in (False, True):
        rollout = lm.Rollout(groups, 1.0, 1, 7, shared=shared)
        values = []
        for micro in rollout.micros():
            laid = lm.token_values(critic, micro.ids, micro.targets, *micro.shared)
            values.append((micro, laid.detach()))
        found.append(rollout.collect(values))
    assert torch.allclose(*found, atol=1e-5)


def test_what_cannot_share_its_prompt_is_known():
    groups = random_groups(6)
    plain = lm.ModelSettings(vocab_size=90)
    assert lm.can_share(plain, groups)
    assert not lm.can_share(lm.ModelSettings(vocab_size=90, n_expert=4), groups)
    groups[1][2].ids[0] = 1  # a document begins within an answer
    assert lm.can_share(plain, groups)
    assert not lm.can_share(lm.ModelSettings(vocab_size=90, doc_mask=True), groups)


@pytest.mark.parametrize("flags", [(), ("--algo", "ppo"), ("--updates", 2, "--kl", 0.1)])
def test_sharing_changes_no_figure_of_a_step(flags, rl, tmp_path):
    rows = []
    for shared in (0, 1):
        out = tmp_path / f"shared{shared}"
        words = ["--max_steps", 1, "--share_prompts", shared, *EVERY, *flags]
        code, _, err = rl(*words, "--out_dir", out)
        assert code == 0, err
        rows.append({k: v for k, v in steps_of(out)[0].items() if isinstance(v, (int, float))})
    assert rows[0].keys() == rows[1].keys()
    for key, value in rows[0].items():
        assert rows[1][key] == pytest.approx(value, rel=1e-3, abs=1e-4), key
