"""Tokens a second of sampling, beside Hugging Face `generate` of the exported model.

    python convert_to_llama.py --ckpt run/ckpt_best.pt --out hf
    python benchmarks/rollouts.py --ckpt run --hf hf --batch 64 --prompt_tokens 32 --new_tokens 96

The same prompts, batch and number of new tokens, none ending early, in turn, five times; prints the
medians and their ratio. With --share, as a group of `grpo` does, every eight rows have one prompt.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import standalone_transformer_lm as lm  # noqa: E402


def timed(work) -> float:
    began = time.monotonic()
    work()
    return time.monotonic() - began


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--ckpt", required=True)
    parser.add_argument("--hf", required=True)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--prompt_tokens", type=int, default=32)
    parser.add_argument("--new_tokens", type=int, default=96)
    parser.add_argument("--ragged", action="store_true", help="prompts of unequal length")
    parser.add_argument("--share", action="store_true")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    from transformers import AutoModelForCausalLM

    machine = lm.open_machine(lm.DeviceSettings(device="cpu"))
    model = lm.build_model(lm.load_checkpoint(args.ckpt), machine.device)
    theirs = AutoModelForCausalLM.from_pretrained(args.hf, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(0)
    distinct = args.batch // 8 if args.share else args.batch
    ids = torch.randint(
        20, model.config.vocab_size, (distinct, args.prompt_tokens), generator=generator
    )
    ids = ids.repeat_interleave(args.batch // distinct, 0)
    cuts = [i % (args.prompt_tokens // 2) if args.ragged else 0 for i in range(args.batch)]
    mask = torch.ones_like(ids)
    for row, cut in zip(mask, cuts, strict=True):
        row[:cut] = 0  # padded from the left, as Hugging Face wants it
    prompts = [row[cut:].tolist() for row, cut in zip(ids, cuts, strict=True)]
    settings = lm.SamplingSettings(args.new_tokens, 1.0, 0, 1.0)

    @torch.inference_mode()
    def hugging_face() -> None:
        out = theirs.generate(
            ids,
            attention_mask=mask,
            do_sample=True,
            top_k=0,
            top_p=1.0,
            temperature=1.0,
            max_new_tokens=args.new_tokens,
            min_new_tokens=args.new_tokens,
            pad_token_id=3,
        )
        assert out.shape[1] == args.prompt_tokens + args.new_tokens, "it ended early"

    def ours() -> None:
        with machine.autocast():
            rows = lm.complete(
                model, prompts, settings, 0, dtype=machine.dtype, compiled=args.compile
            )
        assert all(len(row) == args.new_tokens for row in rows), "it ended early"

    ours(), hugging_face()  # warm
    times = [(timed(ours), timed(hugging_face)) for _ in range(args.rounds)]
    speeds = [
        args.batch * args.new_tokens / statistics.median(column)
        for column in zip(*times, strict=True)
    ]
    print(
        f"batch {args.batch}: this program {speeds[0]:,.0f} tokens a second, Hugging Face "
        f"{speeds[1]:,.0f}: {speeds[0] / speeds[1]:.2f} times"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
