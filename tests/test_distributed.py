"""Two processes over gloo: the same step as one, the same weights, one voice."""

import contextlib
import functools
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import SHORT, TINY, complaint, log_rows, read_pt, signal_at, weight_bytes
from test_lora import question, save_base, write_rows

import standalone_transformer_lm as lm

ROOT = Path(__file__).resolve().parents[1]
STEADY = ["--dropout", "0", "--log_interval", "2"]  # dropout is drawn by each rank for itself


def flags(data_dir, out, batch):
    return [
        "train",
        *TINY,
        *SHORT,
        *STEADY,
        "--data_dir",
        data_dir,
        "--out_dir",
        out,
        "--batch_size",
        batch,
    ]


def free_port():
    """A port below those that connections take, so that none has it by the time it is used."""
    while True:
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", random.randrange(20000, 32000)))
            return probe.getsockname()[1]


def torchrun(argv, script=ROOT / lm.PROGRAM, *options):
    """The program under torch.distributed.run on two processes, started."""
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node=2", *options, "--master_port"]
    command = [sys.executable, *launcher, free_port(), script, *argv]
    return subprocess.Popen(
        list(map(str, command)), stdout=subprocess.PIPE, text=True, stderr=subprocess.PIPE
    )


def two(child, argv, *hooks, each=(), keep=True):
    """The program as two ranks without a launcher, to its end; hooks are for rank 1 alone, and
    those of `each` for both, which get the rank; each may `keep` the weights that it ends with."""
    env = {
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
    ranks = [
        child(
            argv,
            *([(keep_weights, rank)] if keep else ()),
            *((hook, rank) for hook in each),
            *(hooks if rank else ()),
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            **env,
        )
        for rank in range(2)
    ]
    return [rank.end() for rank in ranks]


def keep_weights(program, rank):
    """Write the weights that this rank holds at its end beside the run."""
    fit = program.Trainer.fit

    def fitted(trainer):
        code = fit(trainer)
        torch.save(trainer.job.model.state_dict(), trainer.out / f"rank{rank}.weights")
        return code

    program.Trainer.fit = fitted


@pytest.fixture(scope="module")
def alone(data_dir, tmp_path_factory, run):
    """The run on one rank that all others must equal: a batch of eight."""
    out = tmp_path_factory.mktemp("alone") / "run"
    assert run(flags(data_dir, out, 8))[0] == 0
    return out


def assert_same_curve(out, wanted, tolerance):
    for a, b in zip(log_rows(out), log_rows(wanted), strict=True):
        assert a.keys() == b.keys() and (a["step"], a["tokens"]) == (b["step"], b["tokens"])
        for key in ("train/loss", "train/grad_norm", "train/lr", "val/loss"):
            assert a.get(key) == pytest.approx(b.get(key), abs=tolerance), (a["step"], key)


def test_torchrun_on_two_ranks_of_four_is_one_rank_of_eight(data_dir, tmp_path, alone):
    process = torchrun(flags(data_dir, tmp_path / "run", 4))
    told, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert told.count("parameters") == 1 and "2 x cpu" in told  # rank 0 alone talks
    assert_same_curve(tmp_path / "run", alone, 1e-5)
    a, b = (read_pt(out / "ckpt_last.pt") for out in (tmp_path / "run", alone))
    assert a["samples"] == b["samples"] == 96
    for name in a["model"]:
        assert torch.allclose(a["model"][name], b["model"][name], atol=1e-5), name


def stopped_on_two(child, argv, out, step):
    """Two ranks that stop after `step`, of which rank 1 alone got the signal."""
    codes, told = zip(
        *two(child, argv, (signal_at, "seed_step", step - 1, signal.SIGUSR1)), strict=True
    )
    assert codes[1] == 128 + signal.SIGUSR1 and codes[0] > 128
    assert "torchrun --nproc_per_node=2" in told[0]
    assert read_pt(out / "ckpt_last.pt")["step"] == step


@pytest.mark.parametrize("step", [4, 5])  # at a line of the log, and between two
def test_stopped_on_two_ranks_it_goes_on_with_two(child, data_dir, tmp_path, alone, step):
    out, argv = tmp_path / "run", flags(data_dir, tmp_path / "run", 4)
    stopped_on_two(child, argv, out, step)
    ended = two(child, argv)
    assert [code for code, _ in ended] == [0, 0], ended
    ranks = [read_pt(out / f"rank{rank}.weights") for rank in range(2)]
    assert all(torch.equal(ranks[0][name], ranks[1][name]) for name in ranks[0])
    assert_same_curve(out, alone, 1e-4)


@pytest.mark.parametrize("step", [4, 5])
@pytest.mark.parametrize("stop_again", [False, True])
def test_stopped_on_two_ranks_it_goes_on_with_one(
    child, run, data_dir, tmp_path, alone, monkeypatch, step, stop_again
):
    out, argv = tmp_path / "run", flags(data_dir, tmp_path / "run", 4)
    stopped_on_two(child, argv, out, step)
    if stop_again:
        with monkeypatch.context() as patch:
            patch.setattr(lm, "seed_step", lm.seed_step)  # so that leaving puts it back
            signal_at(lm, "seed_step", 7 - step, signal.SIGUSR1)
            code, told, err = run(argv)
        assert code == 128 + signal.SIGUSR1 and "keeps a step at 8 sequences" in told, err
        assert "on 1 ranks: --batch_size 4 --grad_accum_steps 2 " in told
    assert run(argv)[0] == 0
    assert read_pt(out / "ckpt_last.pt")["samples"] == 96
    assert_same_curve(out, alone, 1e-4)


def test_two_ranks_of_experts_and_muon_agree_and_are_one_rank(child, run, data_dir, tmp_path):
    more = [
        "--n_expert",
        4,
        "--optimizer",
        "muon",
        "--ema",
        0.5,
        "--router_z_loss",
        0,
        "--balance_loss",
        0,
        "--data_dir",
        f"a={data_dir}:0.6,b={data_dir}:0.4",
    ]
    both, lone = tmp_path / "both", tmp_path / "lone"  # side losses are a rank's own, hence 0
    ended = two(child, [*flags(data_dir, both, 4), *more])
    assert [code for code, _ in ended] == [0, 0], ended
    ranks = [read_pt(both / f"rank{rank}.weights") for rank in range(2)]
    assert all(torch.equal(ranks[0][name], ranks[1][name]) for name in ranks[0])
    assert run([*flags(data_dir, lone, 8), *more])[0] == 0
    assert_same_curve(both, lone, 1e-3)
    assert all({"val/loss/a", "val/loss/b"} <= set(row) for row in log_rows(both)[1::2])


def test_two_ranks_of_experts_agree_with_side_losses(child, data_dir, tmp_path):
    ended = two(
        child,
        [
            *flags(data_dir, tmp_path / "run", 4),
            "--n_expert",
            4,
            "--optimizer",
            "muon",
            "--grad_accum_steps",
            2,
            "--max_steps",
            4,
        ],
    )
    assert [code for code, _ in ended] == [0, 0], ended
    ranks = [read_pt(tmp_path / "run" / f"rank{rank}.weights") for rank in range(2)]
    assert all(torch.equal(ranks[0][name], ranks[1][name]) for name in ranks[0])


def test_only_rank_0_talks(child, data_dir, tmp_path):
    ended = two(child, [*flags(data_dir, tmp_path / "run", 4), "--max_steps", 2])
    assert [code for code, _ in ended] == [0, 0] and "Warning" not in ended[0][1], ended
    assert not ended[1][1]


def test_one_rank_goes_on_as_two(child, run, data_dir, tmp_path, alone):
    out = tmp_path / "run"
    shutil.copytree(alone, out)
    for name in ("ckpt_last.pt", "ckpt_00000012.pt"):
        (out / name).unlink()
    ended = two(child, flags(data_dir, out, 8))
    assert [code for code, _ in ended] == [0, 0], ended
    assert_same_curve(out, alone, 1e-4)


def test_a_step_that_ranks_cannot_share_is_refused(child, run, data_dir, tmp_path):
    out = tmp_path / "run"
    assert run(flags(data_dir, out, 3))[0] == 0
    before = weight_bytes(out / "ckpt_last.pt")
    ended = two(child, [*flags(data_dir, out, 3), "--max_steps", 20])
    assert [code for code, _ in ended] == [2, 2] and "3 sequences" in ended[0][1]
    assert weight_bytes(out / "ckpt_last.pt") == before


def test_a_mistake_is_told_once_however_many_ranks_make_it(data_dir, tmp_path):
    (tmp_path / "file").write_text("in the way")
    everyone = torchrun(flags(tmp_path / "nowhere", tmp_path / "run", 4))
    rank_0 = torchrun(flags(data_dir, tmp_path / "file" / "run", 4))
    for process in (everyone, rank_0):
        _, err = process.communicate(timeout=120)
        assert process.returncode != 0
        ours = err.split("torch/distributed/elastic")[0].split("ChildFailedError")[0]
        assert ours.count("error: ") == ours.count("fix: ") == 1, err
        assert 'standalone_transformer_lm.py", line' not in err, err


# ---- Reinforcement learning ----


def grpo_command(tokenizer, folder):
    """`grpo(out, *flags)`, the command line of two steps, in groups of three."""
    base = save_base(folder / "base.pt", tokenizer)
    saved = read_pt(base)
    for name in {"tok_emb.weight", "lm_head.weight"} & set(saved["model"]):
        saved["model"][name][lm.Tokenizer(tokenizer).eos] *= 6  # answers of many lengths
    lm.save_checkpoint(base, saved)
    rows = write_rows(
        folder / "rows.jsonl", [{"prompt": question(i), "answer": str(i)} for i in range(40)]
    )
    fixed = """--prompts 4 --group_size 3 --max_new_tokens 16 --batch_size 4 --eval_prompts 5
    --eval_samples 2 --lr 1e-3 --warmup_steps 0 --max_steps 2 --eval_interval 2 --dtype fp32
    --val_split 0.2 --device cpu --threads 1 --compile 0 --reward regex --pattern ^.*e""".split()
    return lambda out, *flags: [
        "grpo",
        *fixed,
        "--ckpt",
        base,
        "--data",
        rows,
        "--out_dir",
        out,
        *flags,
    ]


@pytest.fixture(scope="module")
def grpo(tiny_tokenizer, tmp_path_factory):
    return grpo_command(tiny_tokenizer, tmp_path_factory.mktemp("grpo"))


def keep_gradients(program, rank):
    """Write each update's gradient, the number of collectives and the lengths of completions."""
    seen, clip = {"calls": 0, "lengths": [], "gradients": []}, torch.nn.utils.clip_grad_norm_
    fit, draw, reduce = program.Trainer.fit, program.Sampler.draw, torch.distributed.all_reduce

    def clipped(parameters, *more):
        parameters = list(parameters)
        seen["gradients"].append(
            torch.cat([w.grad.flatten() for w in parameters if w.requires_grad])
        )
        return clip(parameters, *more)

    def reduced(*args, **kwargs):
        seen["calls"] += 1
        return reduce(*args, **kwargs)

    def drawn(*args):
        groups = draw(*args)
        seen["lengths"].append([len(one.ids) for group in groups for one in group])
        return groups

    def fitted(trainer):
        seen.update(calls=0, lengths=[], gradients=[])
        code = fit(trainer)
        torch.save(seen, trainer.out / f"rank{rank}.seen")
        return code

    torch.nn.utils.clip_grad_norm_, torch.distributed.all_reduce = clipped, reduced
    program.Sampler.draw, program.Trainer.fit = drawn, fitted


def in_turn(runs, program, rank):
    """Have main run these command lines instead, each on a port of its own."""
    main = program.main

    def each(_):
        for port, argv in runs:
            os.environ["MASTER_PORT"] = str(port)
            if code := main([str(word) for word in argv]):
                return code
        return 0

    program.main = each


def assert_ranks_agree(out):
    """That both made as many collectives, and have the same gradients and weights."""
    a, b = (read_pt(out / f"rank{rank}.seen") for rank in range(2))
    assert a["calls"] == b["calls"] > 0 and len(a["gradients"]) == len(b["gradients"])
    assert all(map(torch.equal, a["gradients"], b["gradients"]))
    ranks = [read_pt(out / f"rank{rank}.weights") for rank in range(2)]
    assert all(torch.equal(ranks[0][name], ranks[1][name]) for name in ranks[0])
    return a["lengths"], b["lengths"]


def two_in_turn(child, runs, *hooks):
    """Two ranks that make these runs one after the other."""
    runs = [(free_port(), argv) for argv in runs]
    ended = two(child, runs[0][1], *hooks, each=[keep_gradients, functools.partial(in_turn, runs)])
    assert [code for code, _ in ended] == [0, 0], ended


@pytest.fixture
def lone(run, monkeypatch):
    """`lone(argv)` is the run on one rank, with its gradients."""

    def call(argv):
        with monkeypatch.context() as patch:
            for owner, name in (
                (torch.nn.utils, "clip_grad_norm_"),
                (lm.Sampler, "draw"),
                (torch.distributed, "all_reduce"),
                (lm.Trainer, "fit"),
            ):
                patch.setattr(owner, name, getattr(owner, name))  # so that leaving puts it back
            keep_gradients(lm, "lone")
            code, _, err = run(argv)
        assert code == 0, err

    return call


def apart(a, b, start):
    """How far two models are from each other, of how far they came."""
    far, way = (
        sum((one[name] - other[name]).square().sum() for name in one)
        for one, other in ((a, b), (a, start))
    )
    return float((far / way).sqrt())


def assert_near(out, wanted, tolerance):
    for a, b in zip(log_rows(out), log_rows(wanted), strict=True):
        assert a.keys() == b.keys() and a["tokens"] == b["tokens"]
        for key in a:
            if key.startswith("train/") and not key.startswith(("train/clip", "train/value_cl")):
                assert a[key] == pytest.approx(b[key], rel=tolerance, abs=tolerance), key


def test_two_ranks_of_every_algorithm_are_one(child, grpo, lone, tmp_path):
    runs = [algo.split() for algo in [*lm.ALGORITHMS, "grpo --lora_rank 2"]]
    more = ["--kl", 0.1, "--updates", 2, "--value_warmup", 1, "--dynamic_sampling", 0]
    both, one = (
        [grpo(tmp_path / name / "-".join(run), *more, "--algo", *run) for run in runs]
        for name in ("both", "one")
    )
    two_in_turn(child, both)
    for run, argv in zip(runs, one, strict=True):
        lone(argv)
        outs = [tmp_path / name / "-".join(run) for name in ("both", "one")]
        lengths, alone = assert_ranks_agree(outs[0]), read_pt(outs[1] / "ranklone.seen")
        shares = [[rank[1] for rank in lengths], alone["lengths"][1]]  # behind the evaluation
        assert sum(shares[0], []) == shares[1] and sum(shares[0][0]) != sum(shares[0][1]), run
        pairs = zip(read_pt(outs[0] / "rank0.seen")["gradients"], alone["gradients"], strict=True)
        for i, (a, b) in enumerate(pairs):
            assert (a - b).norm() <= (1e-2 if i else 1e-5) * b.norm(), (run, i)
        assert_near(*outs, 1e-3)
        a, b = (read_pt(out / "ckpt_last.pt")["model"] for out in outs)
        start = read_pt(argv[argv.index("--ckpt") + 1])["model"]
        start = {name: start.get(name, 0 * w) for name, w in a.items()}
        assert apart(a, b, start) < 0.02, run


def test_ranks_that_draw_again_wait_for_each_other(child, grpo, tmp_path):
    patterns = {"some": "^.*e", "few": "^.*the", "none": "(?!)"}
    two_in_turn(
        child,
        [
            grpo(
                tmp_path / name,
                "--algo",
                "dapo",
                "--overlong",
                0,
                "--max_draws",
                3,
                "--pattern",
                pattern,
                "--eval_prompts",
                1,
            )
            for name, pattern in patterns.items()
        ],
    )
    for name in patterns:
        assert_ranks_agree(tmp_path / name)  # where rank 1 has nothing to evaluate
        draws = [row["train/draws"] for row in log_rows(tmp_path / name)[1:]]
        assert max(draws) > 1 and (name != "none" or draws == [3, 3])
        assert read_pt(tmp_path / name / "ckpt_last.pt")["samples"] == 4 * sum(draws)


@pytest.mark.parametrize("minibatches", [1, 2])
def test_groups_are_chosen_over_all_ranks(child, grpo, lone, tmp_path, minibatches):
    """Where one rank draws most groups with a spread, two learn from the same ones as one does."""
    flags = "--algo dapo --overlong 0 --prompts 8 --max_draws 4 --max_steps 3 --lr 1e-4".split()
    flags += ["--pattern", "e", "--minibatches", minibatches]
    outs = tmp_path / "both", tmp_path / "one"
    two_in_turn(child, [grpo(outs[0], *flags)])
    lone(grpo(outs[1], *flags))
    assert_ranks_agree(outs[0])
    both, one = (log_rows(out)[1:] for out in outs)
    assert [row["train/draws"] for row in both] == [row["train/draws"] for row in one]
    assert max(row["train/draws"] for row in one) > 1
    for name in ("train/reward", "train/reward_drawn", "train/right", "train/zero_spread"):
        assert [row[name] for row in both] == pytest.approx([row[name] for row in one]), name
    a, b = (read_pt(out / "ckpt_last.pt") for out in outs)
    assert a["samples"] == b["samples"]
    assert all(torch.allclose(a["model"][n], b["model"][n], atol=1e-5) for n in a["model"])


def test_stopped_on_two_ranks_vapo_goes_on_with_one(child, grpo, run, tmp_path):
    flags = ["--algo", "vapo", "--value_warmup", 1, "--kl", 0.1, "--max_steps", 4, "--lr", 1e-4]
    both, one = (grpo(tmp_path / name, *flags) for name in ("both", "one"))
    stopped_on_two(child, both, tmp_path / "both", 2)
    assert run(both)[0] == run(one)[0] == 0
    assert_near(tmp_path / "both", tmp_path / "one", 1e-3)


def test_prompts_that_ranks_cannot_share_are_refused(child, grpo, tmp_path):
    ended = two(child, grpo(tmp_path / "run", "--prompts", 5))
    assert [code for code, _ in ended] == [2, 2]
    complaint(
        (2, "", ended[0][1]), "--prompts 5 cannot be divided among 2 ranks", "a multiple of 2"
    )
    assert not (tmp_path / "run").exists()


def test_ranks_meet_in_a_store_that_dead_ones_have_used():
    """torchrun keeps its store through a restart: what is in it must not be read as new, whichever
    rank comes first."""
    store = dist.HashStore()
    for first in (0, 1, 2, 0):
        found = {}

        def meet(rank, found=found):
            found[rank] = lm.fresh_store(store, rank, 3)

        order = [first, *({0, 1, 2} - {first})]
        threads = [threading.Thread(target=meet, args=(rank,)) for rank in order]
        for thread in threads:
            thread.start()
            time.sleep(0.05)
        for thread in threads:
            thread.join(20)
        assert found.keys() == {0, 1, 2}
        assert not found[0].check(["address"])
        found[0].set("address", "new")
        assert found[1].get("address") == found[2].get("address") == b"new"
