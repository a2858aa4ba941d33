r"""What tools, tests of programs and a teacher are worth: the figures of RESULTS.md.

    python benchmarks/further_rl.py tools SCRATCH --gsm8k train.jsonl --svamp svamp.jsonl
    python benchmarks/further_rl.py code SCRATCH
    python benchmarks/further_rl.py distill SCRATCH

tools: a small model is taught GSM8K and SVAMP by sft, once with the calculator called in its
answers and once with the results in the text, and solves held-back problems of SVAMP; then grpo
--tools goes on from the first. gsm8k: rows of sft (messages); svamp: rows of prompt, answer, type.
code: a model that writes functions which have nothing to do with the question learns from their
tests alone to write the one that is asked for.
distill: a student goes on by sft on its teacher's answers, by the teacher's probabilities on them,
and by these on answers of its own, for the same seconds each.
"""

import argparse
import hashlib
import json
import random
import re
import shutil
import subprocess
import sys
import time
from itertools import permutations
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import standalone_transformer_lm as lm  # noqa: E402

NUMBER = r"\d+(?:\.\d+)?"
EXPRESSION = re.compile(rf"\$?({NUMBER}(?: ?[-+*/x] ?\$?{NUMBER})+) ?= ?\$?({NUMBER})")
SIGNS = {"Addition": "+", "Subtraction": "-", "Multiplication": "*", "Common-Division": "/"}


def program(*argv):
    """Run a command of the program; what it printed."""
    words = [sys.executable, str(ROOT / lm.PROGRAM), *map(str, argv)]
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(words)}\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return done.stdout


def write(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return path


def read(path):
    return [json.loads(line) for line in Path(path).read_text().split("\n") if line]


def accuracy(ckpt, rows, out, *flags, check="number"):
    """The share of rows that a checkpoint answers rightly, greedily."""
    shutil.rmtree(out, ignore_errors=True)  # which keeps what it knows of other checkpoints
    argv = ["eval", "--ckpt", ckpt, "--tasks", f"{check}={rows}", "--out_dir", out]
    program(*argv, "--temperature", 0, "--max_new_tokens", 160, *CPU, *flags)
    [tasks] = json.loads((out / "results.json").read_text())["results"].values()
    [task] = tasks.values()
    return task["acc"]


def last_reward(out):
    rows = [row for row in read(out / "metrics.jsonl") if "val/pass@1" in row]
    return [round(row["val/pass@1"], 3) for row in rows]


# ---- Tools ----


def called(expression):
    call = {"name": "calculator", "arguments": {"expression": expression}}
    return [{"type": "function", "function": call}]


def equation(row):
    """An expression of numbers of a problem of SVAMP that gives its answer, or None."""
    sign = SIGNS[row["type"]]
    numbers = list(dict.fromkeys(re.findall(NUMBER, row["prompt"])))
    for count in (2, 3):
        for chosen in permutations(numbers, count):
            text = sign.join(chosen)
            try:
                if float(lm.calculate(text)) == float(row["answer"]):
                    return text
            except ValueError:
                continue
    return None


def of_svamp(row, tools):
    text = equation(row)
    asked = {"role": "user", "content": row["prompt"]}
    if not tools:
        answer = f"{text} = {row['answer']}\n#### {row['answer']}"
        return {"messages": [asked, {"role": "assistant", "content": answer}]}
    return {
        "messages": [
            asked,
            {"role": "assistant", "content": "", "tool_calls": called(text)},
            {"role": "tool", "content": lm.calculate(text)},
            {"role": "assistant", "content": f"#### {row['answer']}"},
        ]
    }


def of_gsm8k(row, tools):
    """A row of sft, with each expression that a calculator gives the result of as a call."""
    if not tools:
        return row
    asked, answer = row["messages"]
    messages, at, text = [asked], 0, answer["content"]
    for found in EXPRESSION.finditer(text):
        expression = found[1].replace("x", "*").replace("$", "").replace(" ", "")
        try:
            value = lm.calculate(expression)
        except ValueError:
            continue
        if value != found[2]:
            continue
        said = {"role": "assistant", "content": text[at : found.start()].strip()}
        messages.append({**said, "tool_calls": called(expression)})
        messages.append({"role": "tool", "content": value})
        at = found.end()
    messages.append({"role": "assistant", "content": text[at:].strip()})
    return {"messages": messages}


def tools(args):
    place = args.scratch
    gsm8k, svamp = read(args.gsm8k), [row for row in read(args.svamp) if equation(row)]

    def order(row):
        return hashlib.sha256(row["prompt"].encode()).hexdigest()

    svamp.sort(key=order)
    held, taught = svamp[:200], svamp[200:]
    asked = write(place / "held.jsonl", [{k: row[k] for k in ("prompt", "answer")} for row in held])
    to_solve = [{k: row[k] for k in ("prompt", "answer")} for row in taught]
    to_solve = write(place / "rl.jsonl", to_solve)
    texts = [" ".join(m["content"] for m in row["messages"]) for row in gsm8k]
    texts += [row["prompt"] for row in taught]
    write(place / "text.jsonl", [{"text": text} for text in texts])
    program(
        "prep", "--text_path", place / "text.jsonl", "--vocab_size", 2048, *PREP, place / "data"
    )
    shape = ["--n_layer", 4, "--d_model", args.width, "--n_head", 4, "--seq_len", 384]
    began = ["train", "--data_dir", place / "data", "--out_dir", place / "base"]
    program(*began, *shape, "--time", args.times[0], *CPU)
    print(f"{len(gsm8k)} rows of GSM8K, {len(taught)} of SVAMP, {len(held)} held back", flush=True)
    for seed in range(1, args.seeds + 1):
        found = {}
        for name, with_tools in (("tool", True), ("text", False)):
            rows = [of_gsm8k(row, with_tools) for row in gsm8k]
            write(place / f"gsm8k_{name}.jsonl", rows)
            rows = [of_svamp(row, with_tools) for row in taught]
            write(place / f"svamp_{name}.jsonl", rows)
            out = place / f"sft_{name}_{seed}"
            parts = [f"{part}={place}/{part}_{name}.jsonl:0.5" for part in ("gsm8k", "svamp")]
            argv = ["sft", "--ckpt", place / "base", "--data", *parts, "--out_dir", out]
            program(*argv, "--time", args.times[1], "--val_split", 0, "--seed", seed, *CPU)
            flags = ["--tools", "calculator"] if with_tools else []
            found[name] = accuracy(out, asked, place / "eval", *flags)
        found["tool, not called"] = accuracy(place / f"sft_tool_{seed}", asked, place / "eval")
        out = place / f"grpo_{seed}"
        argv = ["grpo", "--ckpt", place / f"sft_tool_{seed}", "--data", to_solve, "--out_dir", out]
        argv += ["--val_data", asked, "--tools", "calculator", "--max_new_tokens", 100]
        argv += ["--prompts", 8, "--group_size", 8, "--eval_interval", 20, "--eval_samples", 1]
        program(*argv, "--time", args.times[2], "--seed", seed, *CPU)
        last = out / "ckpt_last.pt"
        found["after grpo"] = accuracy(last, asked, place / "eval", "--tools", "calculator")
        figures = ", ".join(f"{name} {value:.3f}" for name, value in found.items())
        print(f"seed {seed}: {figures}; pass@1 in grpo {last_reward(out)}", flush=True)


# ---- Programs ----

FAMILY = {"add": "+", "subtract": "-", "multiply by": "*"}


def code(args):
    """One-line functions: the question names one, its tests alone tell which is right."""
    place, rows = args.scratch, []
    for word, sign in FAMILY.items():
        for number in range(1, 5):
            right = f"def f(x): return x {sign} {number}"
            tests = [
                f"assert f({x}) == {eval(f'{x} {sign} {number}')}" for x in (13, 21, 50, 77, 101)
            ]
            prompt = f"Write f(x): {word} {number}."
            rows.append({"prompt": prompt, "response": right, "tests": tests})
    asked = [{key: row[key] for key in ("prompt", "tests")} for row in rows]
    write(place / "asked.jsonl", asked)
    rng = random.Random(0)
    for seed in range(1, args.seeds + 1):
        shuffled = []
        for row in rows * 20:
            shuffled.append({**row, "response": rng.choice(rows)["response"]})
        write(place / "form.jsonl", [{k: r[k] for k in ("prompt", "response")} for r in shuffled])
        texts = [{"text": f"{row['prompt']}\n{row['response']}"} for row in shuffled]
        write(place / "text.jsonl", texts)
        prep = ["--text_path", place / "text.jsonl", "--vocab_size", 320, *PREP]
        program("prep", *prep, place / f"data{seed}")
        shape = "--n_layer 2 --d_model 64 --n_head 4 --seq_len 64".split()
        base = ["train", "--data_dir", place / f"data{seed}", "--out_dir", place / f"base{seed}"]
        program(*base, *shape, "--max_steps", 50, "--seed", seed, *CPU)
        argv = ["sft", "--ckpt", place / f"base{seed}", "--data", place / "form.jsonl"]
        argv += ["--out_dir", place / f"sft{seed}", "--val_split", 0, "--epochs", 4]
        program(*argv, "--batch_size", 16, "--seed", seed, *CPU)
        argv = ["grpo", "--ckpt", place / f"sft{seed}", "--data", place / "asked.jsonl"]
        argv += ["--val_data", place / "asked.jsonl", "--reward", "code", "--prompts", 12]
        argv += ["--group_size", 16, "--max_new_tokens", 24, "--eval_interval", 20]
        argv += ["--out_dir", place / f"grpo{seed}", "--time", args.times[0], "--seed", seed]
        began = time.monotonic()
        program(*argv, *CPU)
        steps = read(place / f"grpo{seed}" / "metrics.jsonl")[-1]["step"]
        took = time.monotonic() - began
        curve = last_reward(place / f"grpo{seed}")
        print(f"seed {seed}: pass@1 {curve}, {steps} steps in {took:.0f} s", flush=True)


# ---- A teacher ----


def sorting(count, seed):
    """Five letters to be put in order, each row another."""
    rng, rows = random.Random(seed), {}
    while len(rows) < count:
        letters = [rng.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(5)]
        rows[f"Sort {' '.join(letters)}"] = " ".join(sorted(letters))
    return [{"prompt": prompt, "answer": answer} for prompt, answer in rows.items()]


def distill(args):
    place = args.scratch
    rows = sorting(13_000, 0)
    held, asked, taught = rows[:300], rows[300:500], rows[2300:]
    write(place / "held.jsonl", held)
    write(place / "asked.jsonl", asked)
    chats = [{"prompt": row["prompt"], "response": f"{row['answer']}"} for row in taught]
    write(place / "taught.jsonl", chats)
    write(place / "text.jsonl", [{"text": f"{r['prompt']} {r['response']}"} for r in chats])
    program("prep", "--text_path", place / "text.jsonl", *PREP, place / "data")
    for name, layers, width in (("teacher", 4, 128), ("student", 2, 64)):
        shape = ["--n_layer", layers, "--d_model", width, "--n_head", 4, "--seq_len", 48]
        base = ["train", "--data_dir", place / "data", "--out_dir", place / f"base_{name}"]
        program(*base, *shape, "--max_steps", 100, "--batch_size", 64, *CPU)
    argv = ["sft", "--ckpt", place / "base_teacher", "--data", place / "taught.jsonl"]
    program(*argv, "--out_dir", place / "teacher", "--time", args.times[0], *SFT, *CPU)
    best = accuracy(place / "teacher", place / "held.jsonl", place / "eval", check="exact")
    argv = ["generate", "--ckpt", place / "teacher", "--chat", "--temperature", 1, "--top_p", 1]
    argv += ["--prompt_file", place / "asked.jsonl", "--out", place / "answers.jsonl"]
    program(*argv, "--max_new_tokens", 16, *CPU)
    answers = [
        {"prompt": r["prompt"], "response": r["completion"]} for r in read(place / "answers.jsonl")
    ]
    write(place / "answers.jsonl", answers)
    print(f"teacher {best:.3f}", flush=True)
    ways = {
        "sft": ["sft"],
        "forward": ["distill", "--teacher", place / "teacher"],
        "own answers": ["distill", "--teacher", place / "teacher", "--on_policy", 1],
    }
    for seed in range(1, args.seeds + 1):
        start = place / f"start{seed}"
        argv = ["sft", "--ckpt", place / "base_student", "--data", place / "answers.jsonl"]
        program(*argv, "--out_dir", start, "--time", args.times[1], "--seed", seed, *SFT, *CPU)
        found = {"start": accuracy(start, place / "held.jsonl", place / "eval", check="exact")}
        for name, (command, *flags) in ways.items():
            out = place / f"{command}{len(flags)}_{seed}"
            argv = [command, "--ckpt", start, "--data", place / "answers.jsonl", *flags]
            argv += ["--out_dir", out, "--time", args.times[2], "--lr", 1e-3, "--seed", seed]
            argv += [*SFT, *CPU]
            if command == "distill":
                argv += ["--max_new_tokens", 16]
            program(*argv)
            found[name] = accuracy(
                out / "ckpt_last.pt", place / "held.jsonl", place / "eval", check="exact"
            )
        figures = ", ".join(f"{name} {value:.3f}" for name, value in found.items())
        print(f"seed {seed}: {figures}", flush=True)


PREP = ["--val_split", 0.05, "--overwrite", "--out_dir"]
SFT = "--batch_size 64 --val_split 0 --eval_interval 1000000 --pack 0".split()
CPU = ["--device", "cpu"]
TIMES = {"tools": ["3m", "4m", "5m"], "code": ["5m"], "distill": ["150s", "6s", "40s"]}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=TIMES)
    parser.add_argument("scratch", type=Path)
    parser.add_argument("--gsm8k")
    parser.add_argument("--svamp")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--times", nargs="+", help="of the parts that have one")
    args = parser.parse_args()
    args.times = args.times or TIMES[args.what]
    if args.threads:
        CPU.extend(["--threads", str(args.threads)])
    args.scratch.mkdir(parents=True, exist_ok=True)
    {"tools": tools, "code": code, "distill": distill}[args.what](args)


if __name__ == "__main__":
    main()
