"""Runs under random faults end as runs that nothing happens to.

`python tests/test_soak.py 500 [SEED]` is the long form: so many faults over train, sft, dpo and
grpo. A run on the same ranks, under kills, signals, full disks and damaged checkpoints, must end
with the same bytes; one whose ranks, ZeRO stage and micro-batches change, with the same weights
but for rounding.
"""

import collections
import errno
import json
import math
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch
from conftest import NOUNS, SHORT, TINY, VERBS, Child, signal_at, weight_bytes
from test_distributed import free_port, grpo_command
from test_lora import chat_rows, pair_rows, save_base, write_rows

import standalone_transformer_lm as lm

SPOILT = 5  # the step whose gradient is no number, in every run

TUNED = """--max_steps 8 --eval_interval 4 --dtype fp32 --device cpu --lr 2e-4 --threads 1
--compile 0 --val_split 0.2 --warmup_steps 0""".split()


# ---- Faults: hooks of a process, by the calls they are due after ----


def spoil_step(program):
    """The gradient of one step is NaN, whenever it is made."""
    seed_step, forward, at = program.seed_step, program.Objective.forward, []

    def noted(seed, step, rank):
        at[:] = [step]
        seed_step(seed, step, rank)

    def spoilt(self, *batch, **more):
        found = forward(self, *batch, **more)
        return found * math.nan if self.model.training and at == [SPOILT] else found

    program.seed_step, program.Objective.forward = noted, spoilt


def kill(program, nth):
    signal_at(program, "seed_step", nth, signal.SIGKILL)


def kill_in_writing(program, nth):
    signal_at(program, "fsync_folder", nth, signal.SIGKILL)


def terminate(program, nth):
    signal_at(program, "seed_step", nth, signal.SIGTERM)


def interrupt(program, nth):
    signal_at(program, "seed_step", nth, signal.SIGUSR1)


def exhaust(program, nth):
    """Memory runs out once in training, before gradients are exchanged; then a kill."""
    forward, calls = program.Objective.forward, []

    def tight(self, *batch, **more):
        calls.append(1)
        if len(calls) == 2 * nth and self.model.training and len(batch[0]) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(self, *batch, **more)

    program.Objective.forward = tight
    kill(program, nth + 2)


def fill_disk(program, nth):
    """The disk refuses two checkpoints; then a kill."""
    save, calls = program.save_checkpoint, []

    def refused(path, checkpoint):
        calls.append(1)
        if nth <= len(calls) < nth + 2:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        return save(path, checkpoint)

    program.save_checkpoint, program.RETRY_S = refused, 0.02
    kill(program, nth + 2)


def damage(out, rng):
    """Flip bytes of the newest checkpoint, where an older one is left."""
    files = lm.numbered(out)
    if len(files) < 2:
        return
    if (parts := lm.parts_of(files[0])) and rng.random() < 0.7:
        shard = rng.choice(sorted((out / parts).iterdir()))
        data = bytearray(shard.read_bytes())
        for _ in range(20):
            data[rng.randrange(len(data))] ^= 0xFF
        shard.write_bytes(data)
        return
    data = bytearray(files[0].read_bytes())
    for _ in range(20):
        data[rng.randrange(len(data))] ^= 0xFF
    files[0].unlink()
    files[0].write_bytes(data)
    (out / "ckpt_last.pt").unlink(missing_ok=True)
    os.link(files[0], out / "ckpt_last.pt")


ONE_RANK = (kill, kill_in_writing, terminate, interrupt, fill_disk)


# ---- Runs ----


def start(argv, ranks, hooks, folder):
    """The exit codes of ranks that run to their end, `hooks` a list a rank."""
    port = str(free_port())
    made = []
    for rank in range(ranks):
        env = {}
        if ranks > 1:
            env = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_PORT": port}
            env |= {"LOCAL_WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1"}
        env = {name: str(value) for name, value in env.items()}
        made.append(Child(argv, folder / f"log{rank}", env, [(spoil_step,), *hooks[rank]]))
    ended = [one.end() for one in made]
    for code, told in ended:
        assert "Traceback" not in told, told
        said = "memory ran out" in told or "no space left" in told
        assert code in (0, 1, -9, 128 + 15, 128 + 10) or (code == 2 and said), (code, told[-900:])
    return [code for code, _ in ended], ended[0][1]


def survive(rng, command, out, ranks, changing, folder, counts):
    """Make a run under faults until it is done; `command(out, ranks)` is its command line."""
    now, stage = ranks, 0
    for _ in range(60):
        if changing:
            now, stage = rng.choice(((1, 0), (2, 0), (2, 1), (2, 2), (2, 3)))
        fault = rng.choice((*ONE_RANK, damage, "all", *([exhaust] * changing), None))
        nth = rng.randrange(1, 4)
        hooks = [[] for _ in range(now)]
        if fault == "all":
            hooks = [[(kill, nth)] for _ in range(now)]
        elif fault is damage:
            damage(out, rng)
        elif fault in (fill_disk, kill_in_writing):  # of rank 0, which writes
            hooks[0] = [(fault, nth)]
        elif fault is exhaust:
            hooks = [[(fault, nth)] for _ in range(now)]
        elif fault:
            hooks[rng.randrange(now)] = [(fault, nth)]
        shards = int(stage and rng.random() < 0.5)
        more = ["--zero", stage, "--sharded_ckpt", shards]
        codes, told = start([*command(out, now), *more], now, hooks, folder)
        name = getattr(fault, "__name__", fault)
        counts[name] += 1
        if codes == [0] * now:
            return
    raise AssertionError(f"never done: {told}")


def make_commands(folder):
    """(kind, ranks, changing, command), of which each run is made."""
    folder.mkdir()
    text = folder / "text.txt"
    text.write_text(
        "\n\n".join(f"The {a} {v} the {b}." for a in NOUNS for v in VERBS for b in NOUNS)
    )
    prep = ["prep", "--text_path", text, "--out_dir", folder / "ids", "--vocab_size", 400]
    assert lm.main([*map(str, prep)]) == 0
    tokenizer = (folder / "ids" / "tokenizer.model").read_bytes()
    base = save_base(folder / "base.pt", tokenizer)
    chats = write_rows(folder / "chats.jsonl", chat_rows(40))
    pairs = write_rows(folder / "pairs.jsonl", pair_rows(40))
    grpo = grpo_command(tokenizer, folder)
    kept = ["--ckpt_interval", 1, "--keep_last", 4, "--dropout", 0]

    def train(optimizer):
        more = [
            "--max_steps",
            12,
            "--eval_interval",
            6,
            "--optimizer",
            optimizer,
            "--ema",
            0.5,
            "--lr",
            5e-4,
        ]

        def command(out, ranks):
            sizes = ["--batch_size", 4 // ranks, "--grad_accum_steps", 2]
            ids = ["--data_dir", folder / "ids", "--out_dir", out]
            return ["train", *TINY, *SHORT, *ids, *kept, *more, *sizes]

        return command

    def tuned(kind, rows, *more):
        def command(out, ranks):
            files = ["--ckpt", base, "--data", rows, "--out_dir", out]
            return [kind, *files, *TUNED, *kept, *more, "--batch_size", 4 // ranks]

        return command

    def policy(out, _):
        more = ["--max_steps", 5, "--eval_interval", 5, "--kl", 0.1, "--updates", 2, "--lr", 1e-4]
        return grpo(out, *more, *kept[:4], "--share_prompts", 0)

    return {
        "train": train("adamw"),
        "train muon": train("muon"),
        "sft": tuned("sft", chats),
        "sft lora": tuned("sft", chats, "--lora_rank", 2),
        "dpo": tuned("dpo", pairs),
        "grpo": policy,
    }


def farthest(a, b):
    a, b = (lm.read_checkpoint(out / "ckpt_last.pt")["model"] for out in (a, b))
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)


def soak(folder, faults, seed):
    """At least so many faults, and what came of them: (counts, runs, the farthest weights)."""
    rng = random.Random(seed)
    commands = make_commands(folder / "input")
    calm, counts, runs, far = {}, collections.Counter(), 0, 0.0
    while sum(n for name, n in counts.items() if name) < faults:
        kind = list(commands)[runs % len(commands)]
        changing = rng.random() < 0.5
        ranks = 1 if changing else rng.choice((1, 2))
        if (kind, ranks) not in calm:
            calm[kind, ranks] = folder / f"calm-{kind}-{ranks}"
            argv = commands[kind](calm[kind, ranks], ranks)
            codes, told = start(argv, ranks, [[]] * ranks, folder)
            assert codes == [0] * ranks, told
        out = folder / "out"
        shutil.rmtree(out, ignore_errors=True)
        survive(rng, commands[kind], out, ranks, changing, folder, counts)
        if changing:
            apart = farthest(out, calm[kind, ranks])
            far = max(far, apart)
            assert apart < 1e-5 * (100 if kind == "grpo" else 1), (kind, apart)
        else:
            mine, wanted = (weight_bytes(o / "ckpt_last.pt") for o in (out, calm[kind, ranks]))
            assert mine == wanted, kind
        runs += 1
        told = {str(getattr(name, "__name__", name)): n for name, n in counts.items()}
        print(f"{runs} runs, {told}, {far:.2g}", flush=True)
    return counts, runs, far


@pytest.mark.slow
def test_runs_survive_faults(tmp_path):
    counts, *_ = soak(tmp_path, 6, 0)
    assert sum(counts.values()) >= 6


def main(faults, seed=0):
    os.environ["OMP_NUM_THREADS"] = "1"
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        counts, runs, far = soak(Path(folder), faults, seed)
    told = {str(name): count for name, count in counts.most_common()}
    print(f"{sum(counts.values())} starts of {runs} runs in {time.monotonic() - began:.0f} s")
    print(f"{json.dumps(told)}; weights differ by at most {far:.2g} where ranks or stages changed")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
