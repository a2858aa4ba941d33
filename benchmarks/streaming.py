"""Perplexity of a model that reads far past its context with a bounded cache.

    python benchmarks/streaming.py --ckpt run/ckpt_best.pt --data_dir data --contexts 10

Feeds the validation stream a token at a time through the key/value cache. When it is full, the
oldest tokens behind the learned sinks are forgotten (`KVCache.forget`), never recomputed.
`--drop_sinks` forgets the sinks too, as a cache without them would; `--keep_all` forgets nothing,
and positions run past the trained ones. Prints perplexity by context length and resident memory.
"""

import argparse
import dataclasses
import math
import resource
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import standalone_transformer_lm as lm  # noqa: E402


def forget(model: lm.Transformer, cache: lm.KVCache, count: int, drop_sinks: bool) -> None:
    unit = model.cos[0]
    cos, sin = model.cos[count] / unit, model.sin[count] / unit
    if drop_sinks:  # the cache holds no sinks from here on: all that is old goes
        cache.config = dataclasses.replace(cache.config, n_sink=0)
    rows = list(range(len(cache.lengths)))
    cache.forget(rows, count, cos, sin)


@torch.inference_mode()
def stream(
    model: lm.Transformer, rows: torch.Tensor, contexts: int, keep: int, drop_sinks: bool
) -> list[float]:
    """Perplexity over rows (B, contexts * T + 1) in each stretch of one context length T; of a full
    cache the newest `keep` tokens stay, or all where that is 0."""
    T, losses, result = rows.shape[1] // contexts, [], []
    cache = lm.KVCache(model.config, len(rows), model.device, torch.float32)
    for t in range(contexts * T):
        logits = model(rows[:, t : t + 1], cache)[:, -1]
        losses.append(torch.nn.functional.cross_entropy(logits, rows[:, t + 1]))
        if keep and max(cache.lengths) >= cache.size:
            forget(model, cache, T - keep, drop_sinks)
        if (t + 1) % T == 0:
            result.append(math.exp(torch.stack(losses).mean()))
            losses = []
            memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
            print(
                f"{(t + 1) // T:3d} x context: perplexity {result[-1]:8.2f}, "
                f"peak memory {memory:.0f} MB",
                flush=True,
            )
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--ckpt", required=True)
    parser.add_argument("--data_dir", required=True)
    parser.add_argument("--contexts", type=int, default=10)
    parser.add_argument("--keep", type=int, default=0, help="tokens kept; 0: half the context")
    parser.add_argument("--rows", type=int, default=8, help="streams read side by side")
    parser.add_argument("--drop_sinks", action="store_true")
    parser.add_argument("--keep_all", action="store_true")
    args = parser.parse_args()
    saved = lm.load_checkpoint(args.ckpt)
    T = saved["config"]["seq_len"]
    if args.keep_all:  # the rotary tables and the cache go on
        saved["config"]["seq_len"] *= args.contexts
    model = lm.build_model(saved, torch.device("cpu"))
    ids = torch.from_numpy(lm.TokenFolder(args.data_dir).val[:].astype("int64"))
    length = args.contexts * T + 1
    count = min(args.rows, len(ids) // length)
    assert count, "the validation split is too short for so many contexts"
    rows = torch.stack([ids[i * length : (i + 1) * length] for i in range(count)])
    keep = 0 if args.keep_all else args.keep or T // 2
    found = stream(model, rows, args.contexts, keep, args.drop_sinks)
    print(f"last / first: {found[-1] / found[0]:.3f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
