"""Seconds that an epoch of sft takes with conversations packed, and one a sequence.

    python benchmarks/packing.py --ckpt run --data chats.jsonl --rows 256

Gradients of the same rows, both ways in turn, three times; prints medians and their ratio.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import standalone_transformer_lm as lm  # noqa: E402


def epoch(model: lm.Transformer, stream: lm.Chats, batch_size: int) -> float:
    model.config.doc_mask = stream.pack
    model.zero_grad()
    began = time.monotonic()
    for i in range(0, stream.count, batch_size):
        places = np.arange(i, min(stream.count, i + batch_size))
        lm.pretrain_loss(model, *stream.collate(stream.items(places))).backward()
    return time.monotonic() - began


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--ckpt", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--batch_size", type=int, default=8)
    args = parser.parse_args()
    lm.open_machine(lm.DeviceSettings(device="cpu"))
    saved = lm.load_checkpoint(args.ckpt)
    tokenizer = lm.tokenizer_of(saved, "", args.ckpt)
    model = lm.build_model(saved, "cpu").requires_grad_(True).train()
    T = model.config.seq_len
    rows = lm.read_rows([args.data], lm.conversation, "error")[: args.rows]
    examples = [one for turns in rows if (one := lm.example(tokenizer, turns, T))]
    streams = {pack: lm.Chats(examples, T, 0, pack) for pack in (True, False)}
    times = {pack: [] for pack in streams}
    for _ in range(3):
        for pack, stream in streams.items():
            times[pack].append(epoch(model, stream, args.batch_size))
    packed, alone = (statistics.median(times[pack]) for pack in (True, False))
    print(
        f"{len(examples)} rows: packed into {streams[True].count} sequences {packed:.1f} s, "
        f"one a sequence {alone:.1f} s: {alone / packed:.2f} times as long"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
