"""Tokens per second of cached generation, of this program beside another copy of it.

    python benchmarks/decode.py OLD.py [--rounds 5] [--bf16]

Both are timed in turn in one process, greedy and sampled, with 1 and 64 rows, at 15M and 110M
parameters, in fp32 and, where the CPU is faster in it or with --bf16, bf16. Prints medians and
their ratio.
"""

import argparse
import importlib.util
import statistics
import sys
import time
from pathlib import Path

import torch

SIZES = {
    "15M": {"n_layer": 6, "d_model": 288, "n_head": 6, "vocab_size": 32000, "seq_len": 256},
    "110M": {"n_layer": 12, "d_model": 768, "n_head": 12, "vocab_size": 32000, "seq_len": 1024},
}

TOKENS = {1: 64, 64: 24}  # drawn in a timing, by rows


def load(path: Path):
    name = f"program_{abs(hash(path))}"
    spec = importlib.util.spec_from_file_location(name, path)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def timed(lm, shape: dict, rows: int, dtype: torch.dtype, rounds: int):
    """A function that generates once and gives the tokens per second."""
    model = lm.Transformer(lm.ModelSettings(**shape))
    model.init_weights(1)
    model.eval().requires_grad_(False)
    if hasattr(lm, "lower_weights"):
        model = lm.lower_weights(model, dtype)
    machine = lm.Machine(torch.device("cpu"), dtype)
    most = TOKENS[rows]
    settings = lm.SamplingSettings(most, temperature=1.0, top_p=1.0)
    prompts = [[1, *range(10 + i, 40 + i)] for i in range(rows)]

    def once() -> float:
        began = time.perf_counter()
        with machine.autocast():
            found = lm.complete(model, prompts, settings, 0, frozenset(), dtype)
        return sum(map(len, found)) / (time.perf_counter() - began)

    return once


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("old", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--bf16", action="store_true", help="time bf16 on any CPU")
    args = parser.parse_args()
    here = Path(__file__).parent.parent / "standalone_transformer_lm.py"
    programs = [load(args.old.resolve()), load(here.resolve())]
    torch.set_num_threads(programs[1].cores_here())
    dtypes = [torch.float32]
    if args.bf16 or programs[1].bf16_cpu():
        dtypes.append(torch.bfloat16)
    for name, shape in SIZES.items():
        for rows in TOKENS:
            for dtype in dtypes:
                runs = [timed(lm, shape, rows, dtype, args.rounds) for lm in programs]
                for run in runs:
                    run()
                speeds: list[list[float]] = [[], []]
                for i in range(args.rounds):
                    for which in (0, 1) if i % 2 else (1, 0):
                        speeds[which].append(runs[which]())
                before, after = map(statistics.median, speeds)
                label = str(dtype).removeprefix("torch.")
                print(
                    f"{name} rows {rows} {label}: {before:.1f} -> {after:.1f} tok/s, "
                    f"{after / before:.2f} times",
                    flush=True,
                )
    return 0


if __name__ == "__main__":
    sys.exit(main())
