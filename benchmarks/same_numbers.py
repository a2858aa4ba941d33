"""Run every command of two versions of the program on a tiny model and compare their numbers.

    python benchmarks/same_numbers.py OLD_FOLDER NEW_FOLDER

Each folder holds standalone_transformer_lm.py and convert_to_llama.py. Both versions get the same
small inputs and the same flags, in fp32 on one CPU thread. Compared exactly: token files, every
figure of metrics.jsonl that is not a time, samples.jsonl, weights, tokenizers, generated text and
exported tensors. One line a run says `same` or what differs; the exit code is 1 where any does.
"""

import argparse
import json
import os
import random
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

import sentencepiece
import torch

TIMES = ("time", "perf/", "gpu/", "cost/")
WORDS = """harbour engine village river teacher library mountain orchard soldier painter bridge
market winter garden letter captain island forest candle window station doctor printer""".split()
PLACE = "--threads 1 --device cpu --dtype fp32"
RL = f"{PLACE} --compile 0 --eval_interval 3"
RUN = f"{RL} --log_interval 1"
SHAPE = "--n_layer 2 --d_model 32 --n_head 4 --seq_len 64 --ffn_mult 2 --batch_size 4"
TRAIN = f"train {RUN} {SHAPE} --data_dir data --max_steps 6 --warmup_steps 2 --lr 1e-2"
TUNE = f"{RUN} --max_steps 4 --batch_size 4 --lr 1e-3 --ckpt base"
GRPO = (
    f"{RL} --max_steps 3 --batch_size 4 --lr 1e-3 --ckpt base "
    "--task_rows 60 --prompts 4 --group_size 4 --max_new_tokens 6 --eval_prompts 6 "
    "--eval_samples 2"
)
CHAT = "generate --threads 1 --device cpu --dtype fp32 --ckpt sft --max_new_tokens 12 --chat"
ARCHITECTURE = (
    "--n_kv_head 2 --qk_norm --nope_every 2 --window 16 --full_every 2 --n_sink 2 --doc_mask "
    "--softcap 20 --embed_scale --trunc_init"
)
LOSSES = "sigmoid ipo hinge robust apo_zero apo_down simpo orpo".split()
ALGORITHMS = "grpo dr_grpo dapo gspo cispo ppo vapo".split()


def runs() -> list[tuple[str, str]]:
    """(name, words) of each run, in order; the name is the folder or file that it writes."""
    prep = "prep --workers 1 --vocab_size 400 --val_split 0.1"
    found = [
        ("data", f"{prep} --text_path docs.txt --out_dir data"),
        ("rows_data", f"{prep} --text_path docs.jsonl --out_dir rows_data"),
        ("blank_data", f"{prep} --text_path docs.txt --document blank --out_dir blank_data"),
        ("base", f"{TRAIN} --out_dir base"),
        ("adamw", f"{TRAIN} --out_dir adamw --optimizer adamw --schedule cosine --dropout 0.1"),
        ("ema", f"{TRAIN} --out_dir ema --ema 0.9 --z_loss 1e-3 --muon_scale shape"),
        ("architecture", f"{TRAIN} --out_dir architecture {ARCHITECTURE}"),
        ("experts", f"{TRAIN} --out_dir experts --n_expert 4 --n_expert_active 2"),
        ("bf16", f"{TRAIN} --out_dir bf16 --dtype bf16"),
        ("accumulated", f"{TRAIN} --out_dir accumulated --grad_accum_steps 2 --grad_checkpoint"),
        ("mixture", f"{TRAIN} --out_dir mixture --data_dir a=data:0.7,b=data:0.3"),
        ("resumed", f"{TRAIN} --out_dir resumed --max_steps 3"),
        ("resumed", f"{TRAIN} --out_dir resumed --max_steps 6"),
        ("sft", f"sft {TUNE} --data chats.jsonl --out_dir sft"),
        ("sft_unpacked", f"sft {TUNE} --data chats.jsonl --out_dir sft_unpacked --pack 0"),
        ("sft_lora", f"sft {TUNE} --data chats.jsonl --out_dir sft_lora --lora_rank 2"),
        ("sft_task", f"sft {TUNE} --task sort --task_rows 50 --out_dir sft_task"),
        ("judge", f"reward {TUNE} --data pairs.jsonl --out_dir judge"),
        ("verifier", f"reward {TUNE} --data labels.jsonl --out_dir verifier"),
        ("scored.jsonl", f"reward {RUN} --ckpt judge --score pairs.jsonl --out scored.jsonl"),
    ]
    for loss in LOSSES:
        found.append(
            (f"dpo_{loss}", f"dpo {TUNE} --data pairs.jsonl --out_dir dpo_{loss} --loss {loss}")
        )
    found.append(("dpo_lora", f"dpo {TUNE} --data pairs.jsonl --out_dir dpo_lora --lora_rank 2"))
    for algorithm in ALGORITHMS:
        name = f"rl_{algorithm}"
        flags = f"--out_dir {name} --task add --algo {algorithm} --value_warmup 1"
        found.append((name, f"grpo {GRPO} {flags}"))
    more = {
        "rl_kl": "--task add --kl 0.1 --reference_steps 2 --updates 2 --temperature_end 0.5",
        "rl_dense": "--task add --algo ppo --dense_reward 0.1 --updates 2",
        "rl_entropy": "--task add --entropy_target 3 --lm_loss 0.1 "
        "--reward number length:0.1 judge:0.2",
        "rl_lora": "--task add --lora_rank 2",
        "rl_countdown": "--task countdown",
    }
    for name, flags in more.items():
        found.append((name, f"grpo {GRPO} --out_dir {name} {flags}"))
    found += [
        ("greedy.jsonl", f"{CHAT} --prompt_file asked.jsonl --temperature 0 --out greedy.jsonl"),
        ("drawn.jsonl", f"{CHAT} --prompt_file asked.jsonl --num_samples 3 --top_k 20 "
         "--repetition_penalty 1.2 --no_repeat_ngram_size 3 --out drawn.jsonl"),
        ("best.jsonl", f"{CHAT} --prompt_file asked.jsonl --best_of 3 --reward_ckpt judge "
         "--out best.jsonl"),
        ("hf", "convert --ckpt base/ckpt_best.pt --out hf"),
        ("back.pt", "convert --reverse hf --out back.pt"),
    ]  # fmt: skip
    return found


def write_inputs(folder: Path) -> None:
    rng = random.Random(1)

    def sentence() -> str:
        return (
            "The " + " ".join(rng.choices(WORDS, k=rng.randint(3, 9))) + f" {rng.randint(1, 99)}."
        )

    def write(name: str, rows: list[dict]) -> None:
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))

    texts = [" ".join(sentence() for _ in range(rng.randint(1, 4))) for _ in range(500)]
    lines = [text + "\n" * (1 + (i % 5 == 0)) for i, text in enumerate(texts)]
    (folder / "docs.txt").write_text("".join(lines))
    write("docs.jsonl", [{"text": text} for text in texts])
    pairs = []
    for place in range(40):
        question = f"Where is the {rng.choice(WORDS)} {place}?"
        pairs.append({"prompt": question, "chosen": sentence(), "rejected": sentence()})
    write("pairs.jsonl", pairs)
    chats = [{"prompt": pair["prompt"], "response": pair["chosen"]} for pair in pairs]
    write("chats.jsonl", chats)
    write("asked.jsonl", chats[:5])
    write("labels.jsonl", [{**row, "label": place % 2} for place, row in enumerate(chats)])


def run_all(program: Path, folder: Path) -> dict[str, str]:
    """Run everything in `folder`; what went wrong, by the name of the run."""
    folder.mkdir(parents=True)
    write_inputs(folder)
    faults = {}
    source = (program / "standalone_transformer_lm.py").read_text(encoding="utf-8")
    shares_prompts = "share_prompts" in source  # which rounds otherwise
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    for name, words in runs():
        command, *flags = shlex.split(words)
        if command == "grpo" and shares_prompts:
            flags += ["--share_prompts", "0"]
        script = [program / "standalone_transformer_lm.py", command]
        if command == "convert":
            script = [program / "convert_to_llama.py"]
        done = subprocess.run(
            [sys.executable, *script, *flags], cwd=folder, env=env, capture_output=True, text=True
        )
        if done.returncode:
            faults[name] = f"exit code {done.returncode}: {done.stderr.strip()[-300:]}"
    return faults


def read_rows(path: Path) -> list[dict]:
    rows = [json.loads(line) for line in path.read_text().split("\n") if line]
    return [{k: v for k, v in row.items() if not k.startswith(TIMES)} for row in rows]


def row_differences(old: list[dict], new: list[dict], what: str) -> list[str]:
    if len(old) != len(new):
        return [f"{what}: {len(old)} rows, now {len(new)}"]
    found = []
    for place, (before, after) in enumerate(zip(old, new, strict=True)):
        for key, value in before.items():
            if after.get(key) != value:
                found.append(f"{what} row {place} {key}: {value!r}, now {after.get(key)!r}")
    return found


def tensor_differences(old: dict, new: dict, what: str) -> list[str]:
    if set(old) != set(new):
        return [f"{what}: other names of tensors"]
    changed = [name for name in old if not torch.equal(old[name], new[name])]
    return [f"{what}: {len(changed)} of {len(old)} tensors differ"] if changed else []


def read_tensors(path: Path) -> dict:
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    return torch.load(path, weights_only=True)["model"]


def compare(name: str, old: Path, new: Path) -> list[str]:
    """What differs between the two results of one run."""
    before, after = old / name, new / name
    if not before.exists() or not after.exists():
        return [f"{name} was not written"]
    if before.suffix == ".jsonl":
        return row_differences(read_rows(before), read_rows(after), name)
    if before.suffix == ".pt":
        return tensor_differences(read_tensors(before), read_tensors(after), name)
    found = []
    for log in ("metrics.jsonl", "samples.jsonl"):
        if (before / log).exists():
            found += row_differences(read_rows(before / log), read_rows(after / log), log)
    for weights in ("ckpt_last.pt", "model.safetensors"):
        if (before / weights).exists():
            tensors = read_tensors(before / weights), read_tensors(after / weights)
            found += tensor_differences(*tensors, weights)
    for file in ("train.bin", "val.bin", "tokenizer.json"):
        if (before / file).exists() and (before / file).read_bytes() != (after / file).read_bytes():
            found.append(f"{file} differs")
    if (before / "tokenizer.model").exists() and pieces_of(before) != pieces_of(after):
        found.append("tokenizer.model has other pieces")
    return found


def pieces_of(folder: Path) -> list[tuple[str, float]]:
    """What a tokenizer is; its file holds how it was trained, too."""
    model = sentencepiece.SentencePieceProcessor(str(folder / "tokenizer.model"))
    return [(model.id_to_piece(i), model.get_score(i)) for i in range(len(model))]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--work", type=Path, help="keep the results here; an old side is reused")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        work = args.work or Path(scratch)
        faults = {}
        for side, program in (("old", args.old), ("new", args.new)):
            if not (work / side).exists():
                faults[side] = run_all(program.resolve(), work / side)
        different = 0
        for name in dict.fromkeys(name for name, _ in runs()):
            found = [f"{side}: {what[name]}" for side, what in faults.items() if name in what]
            found = found or compare(name, work / "old", work / "new")
            different += bool(found)
            print(f"{name}: {'same' if not found else '; '.join(found[:3])}", flush=True)
    return int(different > 0)


if __name__ == "__main__":
    sys.exit(main())
