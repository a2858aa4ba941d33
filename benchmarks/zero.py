"""Memory of each rank under --zero 0, 1, 2 and 3: its peak within a step, and between two.

python benchmarks/zero.py [RANKS], on Linux; prints a table. Ranks are processes of this machine
that exchange over gloo; the model (AdamW, fp32) is small enough for a laptop.
"""

import json
import multiprocessing
import os
import socket
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import standalone_transformer_lm as lm  # noqa: E402

SHAPE = "--n_layer 12 --d_model 512 --n_head 8 --seq_len 64 --ffn_mult 4 --tie 1".split()
RUN = """--batch_size 1 --grad_accum_steps 2 --max_steps 6 --compile 0 --dtype fp32 --device cpu
--optimizer adamw --threads 1 --eval_interval 100 --ckpt_interval 100 --log_interval 100
--ckpt_minutes 0""".split()
SETTLED = 3  # steps before memory is measured


def resident(name):
    """MB of this process: VmRSS, or VmHWM since the last `forget_peak`."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) / 1024
    raise LookupError(name)


def forget_peak():
    Path("/proc/self/clear_refs").write_text("5")


def watch_memory():
    """Have every step of training note the memory that it took."""
    count_step, between = lm.Trainer.count_step, []

    def counted(trainer):
        count_step(trainer)
        if trainer.step <= SETTLED:
            forget_peak()
            return
        between.append(resident("VmRSS"))
        found = {"peak": resident("VmHWM"), "between": min(between)}
        (trainer.out / f"rank{trainer.machine.rank}.json").write_text(json.dumps(found))

    lm.Trainer.count_step = counted


def rank_of(rank, ranks, port, folder, zero):
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    lm.prepare_cpu = torch.set_num_threads  # without it freed memory is given back
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(1, 2)
    watch_memory()
    out = Path(folder) / f"zero{zero}"
    argv = ["train", *SHAPE, *RUN, "--data_dir", Path(folder) / "data", "--out_dir", out]
    sys.exit(lm.main([*map(str, argv), "--zero", str(zero)]))


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def main():
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"  # what ranks free is given back at once
    ranks = int(sys.argv[1]) if len(sys.argv) > 1 else 2
    words = np.random.default_rng(0).integers(0, 10**6, 60000)
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder) / "text.txt"
        text.write_text("\n\n".join(f"The number {a:x} follows {a - 1:x}." for a in words))
        prep = ["prep", "--text_path", text, "--out_dir", Path(folder) / "data"]
        assert lm.main([*map(str, prep), "--vocab_size", "3000"]) == 0
        empty = resident("VmRSS")
        print(f"{ranks} ranks; MB a rank, less {empty:.0f} of the process itself")
        print("| --zero | peak in a step | between steps |\n|---|---|---|")
        for zero in range(4):
            port = free_port()
            context = multiprocessing.get_context("spawn")
            processes = [
                context.Process(target=rank_of, args=(rank, ranks, port, folder, zero))
                for rank in range(ranks)
            ]
            for process in processes:
                process.start()
            for process in processes:
                process.join()
                assert process.exitcode == 0
            found = [
                json.loads((Path(folder) / f"zero{zero}" / f"rank{rank}.json").read_text())
                for rank in range(ranks)
            ]
            peak, between = (max(one[key] for one in found) - empty for key in ("peak", "between"))
            print(f"| {zero} | {peak:.0f} | {between:.0f} |", flush=True)


if __name__ == "__main__":
    main()
