r"""Wall-clock to nanoGPT's validation loss: its train.py beside this program with --time alone.

    python benchmarks/learning.py NANOGPT DATA SCRATCH [--seeds 3] [--rates 1e-3 3e-3 6e-3] \
        [--parts 12 10 8]

NANOGPT: a checkout of github.com/karpathy/nanoGPT; DATA: a folder written by prep. Both train the
same shape on the same token ids in fp32 on the CPU: nanoGPT for 300 iterations of 4,096 tokens, at
each rate with the first seed and at the best one with all; this program for these parts of the
seconds that nanoGPT's iterations took, at its own rates. Both are evaluated by the same code on all
of the validation split. Seconds are of training, without starting Python and without evaluation.
"""

import argparse
import json
import pickle
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import standalone_transformer_lm as lm  # noqa: E402

CONTEXT, LAYERS, HEADS, WIDTH = 256, 4, 4, 256
ITERATIONS, SEQUENCES = 300, 16


@torch.no_grad()
def loss_of(logits, val):
    """Nats a token over the windows of a split; logits: ids (B, T) to (B, T, V)."""
    count = (len(val) - 1) // CONTEXT
    x = val[: count * CONTEXT].view(count, CONTEXT)
    y = val[1 : count * CONTEXT + 1].view(count, CONTEXT)
    total = 0.0
    for a, b in zip(x.split(16), y.split(16), strict=True):
        total += float(F.cross_entropy(logits(a).flatten(0, 1), b.flatten(), reduction="sum"))
    return total / y.numel()


def nanogpt(place, folder, out, rate, seed):
    """(validation loss, seconds of its iterations)."""
    data = place / "data" / "bench"
    data.mkdir(parents=True, exist_ok=True)
    for split in ("train", "val"):
        getattr(folder, split)[:].astype(np.uint16).tofile(data / f"{split}.bin")
    (data / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": folder.tokenizer.vocab_size}))
    source = (place / "train.py").read_text()
    source = source.replace("torch.manual_seed(1337 + seed_offset)", f"torch.manual_seed({seed})")
    (place / "train_bench.py").write_text(source)
    flags = {
        "dataset": "bench",
        "out_dir": str(out),
        "device": "cpu",
        "dtype": "float32",
        "compile": False,
        "n_layer": LAYERS,
        "n_head": HEADS,
        "n_embd": WIDTH,
        "block_size": CONTEXT,
        "batch_size": SEQUENCES,
        "gradient_accumulation_steps": 1,
        "max_iters": ITERATIONS,
        "lr_decay_iters": ITERATIONS,
        "warmup_iters": 30,
        "learning_rate": rate,
        "min_lr": rate / 10,
        "eval_interval": ITERATIONS,
        "eval_iters": 1,
        "always_save_checkpoint": True,
        "log_interval": 1,
    }
    argv = [sys.executable, "train_bench.py", *(f"--{k}={v}" for k, v in flags.items())]
    told = subprocess.run(argv, cwd=place, capture_output=True, text=True, check=True).stdout
    seconds = [float(ms) / 1000 for ms in re.findall(r"iter \d+: .* time ([\d.]+)ms", told)]
    sys.path.insert(0, str(place))
    import model as theirs

    saved = torch.load(out / "ckpt.pt", map_location="cpu", weights_only=True)
    network = theirs.GPT(theirs.GPTConfig(**saved["model_args"]))
    network.load_state_dict(saved["model"])
    network.eval()
    val = torch.from_numpy(folder.val[:].astype(np.int64))

    def logits(ids):
        return network(ids, targets=ids)[0]

    return loss_of(logits, val), sum(seconds[1:-1]) * ITERATIONS / len(seconds[1:-1])


def ours(data, folder, out, span, seed):
    """(validation loss, seconds, steps, tokens)."""
    shutil.rmtree(out, ignore_errors=True)
    argv = [sys.executable, str(ROOT / lm.PROGRAM), "train", "--data_dir", str(data)]
    argv += ["--out_dir", str(out), "--time", f"{span:.2f}s", "--seed", str(seed)]
    argv += ["--n_layer", str(LAYERS), "--d_model", str(WIDTH), "--n_head", str(HEADS)]
    argv += ["--seq_len", str(CONTEXT), "--tie", "0", "--dtype", "fp32", "--device", "cpu"]
    subprocess.run(argv, capture_output=True, text=True, check=True)
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    saved = lm.load_checkpoint(out / "ckpt_last.pt")
    model = lm.Transformer(lm.ModelSettings(**saved["config"]))
    model.load_state_dict(saved["model"])
    model.eval()
    val = torch.from_numpy(folder.val[:].astype(np.int64))

    def logits(ids):
        return model.logits(model.hidden_and_aux_loss(ids)[0])

    return loss_of(logits, val), rows[-1]["time"], rows[-1]["step"], rows[-1]["tokens"]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("nanogpt", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("scratch", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-3, 3e-3, 6e-3])
    parser.add_argument("--parts", type=float, nargs="+", default=[12, 10, 8])
    args = parser.parse_args()
    folder = lm.TokenFolder(args.data)
    args.scratch.mkdir(parents=True, exist_ok=True)

    found = {}
    for rate in args.rates:
        found[rate, 1] = nanogpt(args.nanogpt, folder, args.scratch / "nanogpt", rate, 1)
        print(f"nanoGPT {rate:g}: {found[rate, 1][0]:.4f} in {found[rate, 1][1]:.1f} s", flush=True)
    best = min(args.rates, key=lambda rate: found[rate, 1][0])
    for seed in range(1, args.seeds + 1):
        if (best, seed) not in found:
            found[best, seed] = nanogpt(args.nanogpt, folder, args.scratch / "nanogpt", best, seed)
        loss, seconds = found[best, seed]
        print(f"seed {seed}: nanoGPT at {best:g} {loss:.4f} in {seconds:.1f} s", flush=True)
        for part in args.parts:
            span = seconds / part
            began = time.monotonic()
            mine, took, steps, tokens = ours(args.data, folder, args.scratch / "ours", span, seed)
            print(
                f"  1/{part:g}: ours {mine:.4f} in {took:.1f} s, with starting and stopping "
                f"{time.monotonic() - began:.1f} s; {steps} steps, {tokens:,} tokens",
                flush=True,
            )


if __name__ == "__main__":
    main()
