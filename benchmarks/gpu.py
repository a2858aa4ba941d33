"""Correctness and speed on a GPU, as a table (benchmarks/gpu.sh calls it).

    python benchmarks/gpu.py [--part correct|train|decode|grpo|ranks] [--small]

correct: losses and gradients of every architecture option on the GPU, eager and compiled, beside
those of the CPU; captured decoding beside eager decoding. train: MFU, tokens per second and peak
memory at the largest batch that fits. decode: prefill, and milliseconds a token by batch. grpo: a
step. ranks: training on two GPUs, under torchrun. --small: tiny models, to try the script itself.
"""

import argparse
import functools
import gc
import json
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import standalone_transformer_lm as lm  # noqa: E402

OPTIONS = {
    "plain": {},
    "untied": {"tie": False},
    "GQA": {"n_kv_head": 2},
    "qk_norm": {"qk_norm": True},
    "NoPE": {"nope_every": 2},
    "window": {"window": 48},
    "window, full_every": {"window": 48, "full_every": 2},
    "sinks": {"n_sink": 4},
    "sinks, window": {"n_sink": 4, "window": 48},
    "doc_mask": {"doc_mask": True},
    "doc_mask, sinks, window": {"doc_mask": True, "n_sink": 4, "window": 48},
    "experts": {"n_expert": 4, "n_expert_active": 2},
    "softcap, embed_scale": {"softcap": 20.0, "embed_scale": True, "trunc_init": True},
    "yarn": {"rope_scaling": "yarn", "rope_factor": 2.0},
}
SHAPE = {
    "n_layer": 2,
    "d_model": 256,
    "n_head": 4,
    "seq_len": 256,
    "vocab_size": 4096,
    "ffn_mult": 3.0,
}
MODELS = ("138m", "350m", "smollm-600m", "sparsa-xl")
TINY = {"n_layer": 2, "d_model": 64, "n_head": 4, "seq_len": 64, "vocab_size": 512}
EAGER_FP32 = 1e-4  # most relative difference of losses and gradient norms from the CPU's
COMPILED_BF16 = 3e-2


def row(*cells) -> None:
    print("| " + " | ".join(map(str, cells)) + " |", flush=True)


def head(title: str, *names: str) -> None:
    print(f"\n### {title}\n", flush=True)
    row(*names)
    row(*["---"] * len(names))


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def machine_of(small: bool, dtype: str = "auto") -> lm.Machine:
    device = "cpu" if small and not torch.cuda.is_available() else "cuda"
    return lm.open_machine(lm.DeviceSettings(device=device, dtype=dtype))


# --- is it right ----------------------------------------------------------------------------------


def loss_and_norm(model, machine: lm.Machine, compiled: bool, batch) -> tuple[float, float]:
    model = model.to(machine.device).train()
    objective = lm.Objective(model, functools.partial(lm.pretrain_loss, z_loss=1e-4))
    if compiled:
        objective = lm.compiled(objective)
    model.zero_grad()
    with machine.autocast():
        loss = objective(*(machine.to_device(part) for part in batch))[0]
    (loss / batch[1].numel()).backward()
    norm = torch.nn.utils.get_total_norm([w.grad for w in model.parameters()])
    return loss.item() / batch[1].numel(), norm.item()


def fresh(**more):
    model = lm.Transformer(lm.ModelSettings(**{**SHAPE, **more}))
    model.init_weights(7)
    return model


def correct(small: bool) -> bool:
    exact, fast = machine_of(small, "fp32"), machine_of(small, "bf16")
    torch.set_float32_matmul_precision("highest")
    cpu = lm.Machine(torch.device("cpu"), torch.float32)
    ids = torch.randint(
        4, SHAPE["vocab_size"], (2, 257), generator=torch.Generator().manual_seed(3)
    )
    ids[:, 100] = 1
    batch = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
    head(
        "Losses and gradients beside the CPU's (relative difference, loss / gradient norm)",
        "option",
        "eager fp32",
        "compiled fp32",
        "compiled bf16",
        "right",
    )
    good = True
    for name, more in list(OPTIONS.items())[: 1 if small else None]:
        want = loss_and_norm(fresh(**more), cpu, False, batch)
        cells, right = [], True
        for machine, compiled, most in (
            (exact, False, EAGER_FP32),
            (exact, True, EAGER_FP32),
            (fast, True, COMPILED_BF16),
        ):
            found = loss_and_norm(fresh(**more), machine, compiled, batch)
            apart = [abs(a - b) / abs(b) for a, b in zip(found, want, strict=True)]
            cells.append(" / ".join(f"{x:.1e}" for x in apart))
            right = right and max(apart) <= most
            torch._dynamo.reset()
        row(name, *cells, "yes" if right else "NO")
        good = good and right
    return good and decoding_is_right(small, exact)


def decoding_is_right(small: bool, machine: lm.Machine) -> bool:
    """Captured decoding writes what eager decoding writes, in fp32."""
    head("Captured decoding beside eager decoding (fp32, greedy and sampled)", "option", "same ids")
    good = True
    names = ["plain", "GQA", "window", "sinks, window", "experts"][: 1 if small else None]
    for name in names:
        model = fresh(**OPTIONS[name]).to(machine.device).eval().requires_grad_(False)
        prompts = [[1, *range(20, 20 + 7 * i)] for i in range(1, 6)]
        right = total = 0
        for temperature in (0.0, 1.0):
            settings = lm.SamplingSettings(40, temperature=temperature, top_p=1.0)
            eager, captured = (
                lm.complete(model, prompts, settings, 3, compiled=c) for c in (False, True)
            )
            right += sum(a == b for a, b in zip(eager, captured, strict=True))
            total += len(prompts)
        row(name, f"{right} of {total}")
        good = good and right == total
        torch._dynamo.reset()
    return good


# --- how fast is it -------------------------------------------------------------------------------


def settings_of(name: str, small: bool) -> tuple[lm.ModelSettings, str]:
    """The architecture of a preset, and its optimizer."""
    preset = dict(lm.PRESETS[name])
    optimizer = preset.pop("optimizer", "muon")
    preset.pop("schedule", None)
    if small:
        return lm.ModelSettings(**TINY), optimizer
    return lm.ModelSettings(**{"seq_len": 1024, "vocab_size": 32000, **preset}), optimizer


def trainer_of(name: str, machine: lm.Machine, batch: int, small: bool, out: str) -> lm.Trainer:
    config, optimizer = settings_of(name, small)
    model = lm.Transformer(config)
    model.init_weights(1)
    model.to(machine.device)
    size = (batch * 40 * machine.world + 1) * config.seq_len
    ids = np.random.default_rng(0).integers(config.vocab_size, size=size, dtype=np.uint16)
    stream = lm.Windows(ids, config.seq_len, 0)
    job = lm.Job("train", model, lm.pretrain_loss, stream, lambda *_: {}, None)
    run = lm.RunSettings(
        out_dir=out,
        batch_size=batch,
        grad_accum_steps=1,
        compile="0" if small else "1",
        max_steps=10**6,
        log_interval=10**6,
        eval_interval=10**6,
    )
    optim = lm.OptimSettings(optimizer=optimizer)
    return lm.Trainer(job, machine, run, optim, {"seed": 0}, None)


def time_training(name: str, machine: lm.Machine, batch: int, small: bool) -> dict:
    """Tokens per second and peak memory of steps at a batch; RuntimeError where it does not fit."""
    with tempfile.TemporaryDirectory() as out:
        trainer = trainer_of(name, machine, batch, small, out)
        trainer.objective.train()
        for _ in range(3):
            trainer.train_step(0)
        synchronize(machine.device)
        began, steps = time.perf_counter(), 0
        while steps < 5 or time.perf_counter() - began < (0.2 if small else 6):
            trainer.train_step(0)
            steps += 1
            if steps % 5 == 0:
                synchronize(machine.device)
        synchronize(machine.device)
        seconds = time.perf_counter() - began
    config = trainer.job.model.config
    tokens = steps * batch * config.seq_len * machine.world
    peak, memory = lm.peak_flops(machine.device), 0.0
    if machine.device.type == "cuda":
        memory = torch.cuda.max_memory_allocated() / 1e9
    speed, mfu = tokens / seconds, "unknown"
    if peak:
        mfu = f"{speed * lm.flops_per_token(config) / peak / machine.world:.1%}"
    return {"tok/s": f"{speed:,.0f}", "MFU": mfu, "GB": f"{memory:.1f}", "batch": batch}


def time_model(name: str, small: bool) -> dict:
    """The figures of the largest batch that fits, in this process."""
    machine = machine_of(small)
    config, optimizer = settings_of(name, small)
    with torch.device("meta"):
        shell = lm.Transformer(config)
    windows = lm.Windows(np.zeros(config.seq_len + 1, np.uint16), config.seq_len, 0)
    job = lm.Job("train", shell, None, windows, None, None)
    batch = 2
    if machine.device.type == "cuda":
        optim = lm.OptimSettings(optimizer=optimizer)
        batch = lm.largest_batch(job, machine, lm.RunSettings(), optim)
    while True:
        try:
            return time_training(name, machine, batch, small)
        except RuntimeError as fault:
            if not lm.out_of_memory(fault) or batch == 1:
                raise
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        torch._dynamo.reset()
        batch //= 2


def train(small: bool) -> bool:
    head("Training", "model", "batch", "tokens per second", "MFU", "peak GB")
    for name in MODELS[: 1 if small else None]:
        command = [sys.executable, __file__, "--part", f"train:{name}"]
        done = subprocess.run(
            [*command, *(["--small"] if small else [])], capture_output=True, text=True
        )
        if done.returncode:
            row(name, "failed:", done.stderr.strip().splitlines()[-1], "", "")
            continue
        found = json.loads(done.stdout.splitlines()[-1])
        row(name, found["batch"], found["tok/s"], found["MFU"], found["GB"])
    return True


def decode(small: bool) -> bool:
    machine = machine_of(small)
    config, _ = settings_of("138m", small)
    model = lm.Transformer(config)
    model.init_weights(1)
    model = lm.lower_weights(model.to(machine.device).eval().requires_grad_(False), machine.dtype)
    length, most = (16, 8) if small else (256, 256)
    head(
        f"138m: prefill of {length} tokens, and decoding of {most} after them",
        "batch",
        "prefill, tokens per second",
        "eager, ms a token",
        "captured, ms a token",
        "captured, tokens per second",
    )
    for batch in (1, 64, 256)[: 1 if small else None]:
        prompts = [
            [1, *np.random.default_rng(i).integers(4, 500, length - 1)] for i in range(batch)
        ]
        prompts = [list(map(int, prompt)) for prompt in prompts]

        def seconds(new: int, compiled: bool, prompts=prompts, batch=batch) -> float:
            settings = lm.SamplingSettings(new, temperature=1.0, top_p=1.0)
            times = []
            for _ in range(3):
                synchronize(machine.device)
                began = time.perf_counter()
                with machine.autocast():
                    lm.complete(model, prompts, settings, 0, dtype=machine.dtype, compiled=compiled)
                synchronize(machine.device)
                times.append(time.perf_counter() - began)
            return min(times)

        first = seconds(1, False)
        eager = (seconds(most, False) - first) / (most - 1)
        captured = eager
        if not small:
            captured = (seconds(most, True) - seconds(1, True)) / (most - 1)
        row(
            batch,
            f"{batch * length / first:,.0f}",
            f"{eager * 1e3:.3f}",
            f"{captured * 1e3:.3f}",
            f"{batch / captured:,.0f}",
        )
    return True


def program(*words) -> None:
    subprocess.run(
        [sys.executable, str(ROOT / lm.PROGRAM), *map(str, words)], check=True, capture_output=True
    )


def grpo(small: bool) -> bool:
    """Steps of grpo from a model that has seen little: speeds do not depend on what it learned."""
    head("grpo: 64 prompts x 8 completions of at most 128 tokens, 138m", "figure", "value")
    with tempfile.TemporaryDirectory() as folder:
        out, text = Path(folder), Path(folder) / "text.txt"
        text.write_text((ROOT / lm.PROGRAM).read_text(encoding="utf-8"), encoding="utf-8")
        program("prep", "--text_path", text, "--out_dir", out / "data", "--vocab_size", 1024)
        shape = ["--preset", "138m", "--seq_len", 512]
        sizes = ["--prompts", 64, "--group_size", 8, "--max_new_tokens", 128, "--max_steps", 8]
        if small:
            shape = "--n_layer 1 --d_model 64 --n_head 4 --seq_len 128 --device cpu".split()
            sizes = "--prompts 2 --group_size 2 --max_new_tokens 8 --max_steps 2 --device cpu"
            sizes = [*sizes.split(), "--compile", 0]
        data = ["--data_dir", out / "data", "--out_dir", out / "base"]
        program("train", *data, *shape, "--batch_size", 4, "--max_steps", 2, "--compile", 0)
        start = ["--ckpt", out / "base", "--task", "add", "--out_dir", out / "rl"]
        program("grpo", *start, *sizes, "--eval_prompts", 4)
        lines = (out / "rl" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    rows = [one for one in rows if "perf/rollout_tok_per_s" in one][1:]  # the first compiles
    for name in ("perf/rollout_tok_per_s", "perf/update_tok_per_s", "train/sampler_gap"):
        values = [one[name] for one in rows if name in one]
        if values:
            row(name, f"{np.median(values):,.4g}")
    if len(rows) > 1:
        row("seconds a step", f"{np.median(np.diff([one['time'] for one in rows])):.2f}")
    return True


def ranks(small: bool) -> bool:
    """Under torchrun: every rank trains, rank 0 tells."""
    machine = machine_of(small)
    found = time_training("138m", machine, 2 if small else 32, small)
    if machine.main:
        head(
            f"Training on {machine.world} GPUs", "model", "batch", "tokens per second", "MFU", "GB"
        )
        row("138m", found["batch"], found["tok/s"], found["MFU"], found["GB"])
    torch.distributed.destroy_process_group()
    return True


PARTS = {"correct": correct, "train": train, "decode": decode, "grpo": grpo}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--part", default="all")
    parser.add_argument("--small", action="store_true")
    args = parser.parse_args()
    if not args.small and not torch.cuda.is_available():
        print(
            "error: there is no CUDA device here\nfix: add --small to try the script",
            file=sys.stderr,
        )
        return 2
    if args.part.startswith("train:"):
        print(json.dumps(time_model(args.part.partition(":")[2], args.small)))
        return 0
    if args.part == "ranks":
        return 0 if ranks(args.small) else 1
    name = "a CPU, small models"
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
    print(f"\n## On {name}, torch {torch.__version__} ({date.today()})\n")
    print("```bash\nbash benchmarks/gpu.sh\n```")
    parts = PARTS if args.part == "all" else {args.part: PARTS[args.part]}
    began = time.monotonic()
    good = True
    for part in parts.values():
        good = part(args.small) and good
    print(f"\n{'Everything is right.' if good else 'SOMETHING IS WRONG.'} ", end="")
    print(f"{(time.monotonic() - began) / 60:.1f} minutes.")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
