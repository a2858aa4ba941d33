"""Kill a training run with SIGKILL again and again; it must end as one left alone.

    python benchmarks/kill_and_resume.py --data_dir data --kills 20

Trains a small model twice on the CPU with the same flags: once alone, once killed at random
moments, every third of them while a checkpoint is being written. Then compares the final weights
byte by byte and the lines of metrics.jsonl.
"""

import argparse
import json
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch

PROGRAM = Path(__file__).resolve().parents[1] / "standalone_transformer_lm.py"
SHAPE = """--n_layer 4 --d_model 256 --n_head 4 --seq_len 128 --batch_size 4 --dropout 0.1
--warmup_steps 20 --eval_interval 20 --eval_tokens 4096 --ckpt_interval 5 --log_interval 3
--compile 0 --device cpu --threads 2""".split()
TIMED = ("time", "perf/tok_per_s", "cost/usd")  # what two runs cannot share


def start(out: Path, data: str, steps: int) -> subprocess.Popen:
    command = [
        sys.executable,
        str(PROGRAM),
        "train",
        "--data_dir",
        data,
        "--out_dir",
        str(out),
        "--max_steps",
        str(steps),
        *SHAPE,
    ]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def writing(out: Path) -> bool:
    """Whether a checkpoint is half written."""
    return any(out.glob(".ckpt_*.tmp"))


def kill_once(run: subprocess.Popen, out: Path, while_writing: bool, after: float) -> str:
    """SIGKILL the run; what it was doing, or '' where it ended first."""
    began = time.monotonic()
    while run.poll() is None:
        if time.monotonic() - began >= after and (not while_writing or writing(out)):
            doing = "writing a checkpoint" if writing(out) else "running"
            run.kill()
            run.wait()
            return doing
        time.sleep(0.0005 if while_writing else 0.01)
    return ""


def log(out: Path) -> list[dict]:
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in TIMED} for row in rows]


def same_bytes(a: Path, b: Path) -> bool:
    one, two = (torch.load(p / "ckpt_last.pt", weights_only=True) for p in (a, b))
    weights = [one["model"], two["model"]]
    return weights[0].keys() == weights[1].keys() and all(
        w.numpy().tobytes() == weights[1][k].numpy().tobytes() for k, w in weights[0].items()
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data_dir", required=True)
    parser.add_argument("--out_dir", default="runs/kill", help="folder for the two runs")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng, out = random.Random(args.seed), Path(args.out_dir)
    shutil.rmtree(out, ignore_errors=True)
    began = time.monotonic()
    assert start(out / "alone", args.data_dir, args.steps).wait() == 0, "the run left alone failed"
    alone = time.monotonic() - began
    done = 0
    while done < args.kills:
        run = start(out / "killed", args.data_dir, args.steps)
        after = rng.uniform(4, 6 + alone / args.kills)
        for half in (out / "killed").glob(".ckpt_*.tmp"):
            half.unlink()  # of the kill before, lest it be taken for one being written
        doing = kill_once(run, out / "killed", done % 3 == 2, after)
        if not doing:
            assert run.returncode == 0, run.stderr.read().decode()
            break
        done += 1
        last = (
            (log(out / "killed") or [{"step": 0}])[-1]["step"]
            if (out / "killed/metrics.jsonl").exists()
            else 0
        )
        print(f"kill {done}: {doing}, last line of the log at step {last}", flush=True)
    run = start(out / "killed", args.data_dir, args.steps)
    assert run.wait() == 0, run.stderr.read().decode()
    weights = same_bytes(out / "alone", out / "killed")
    logs = log(out / "alone") == log(out / "killed")
    print(
        f"{done} kills; weights {'the same bytes' if weights else 'DIFFER'}, "
        f"log {'the same' if logs else 'DIFFERS'}"
    )
    return 0 if weights and logs else 1


if __name__ == "__main__":
    sys.exit(main())
