"""Hold `eval` against lm-evaluation-harness: within this program, and on the exported folder.

    python benchmarks/harness.py --ckpt runs/lm --context 256 --text valid.txt --rows arc_easy.jsonl

Each file of rows (question, choices, answer) is written as a task of the harness; its name says
which prompt it has. Three ways to the same figures: `eval --tasks`, `eval --harness`, and the
harness's own `lm_eval --model hf` on the folder that convert_to_llama.py writes. The exit code is 1
where two of them differ by more than 1e-4. Needs lm-eval and transformers.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PROGRAM = ROOT / "standalone_transformer_lm.py"
PLACE = ["--device", "cpu", "--dtype", "fp32"]
CHOICE = """task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {path}
test_split: test
output_type: multiple_choice
doc_to_text: {text}
doc_to_choice: {choices}
doc_to_target: answer
metric_list:
  - metric: acc
  - metric: acc_norm
"""
ROLLING = """task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {path}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{page}}}}"
metric_list:
  - metric: word_perplexity
  - metric: byte_perplexity
  - metric: bits_per_byte
"""
QUESTION = '"Question: {{question}}\\nAnswer:"'
LISTED = '"{{choices}}"'


def clean(text: str) -> str:
    """HellaSwag's texts as the harness's own task cleans them."""
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ")


def write_task(folder: Path, path: Path, limit: int) -> str:
    """One file of rows as a task of the harness; its name."""
    name = f"local_{path.stem}"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
    rows = rows[:limit] if limit else rows
    text = QUESTION
    if path.stem.startswith("hellaswag"):
        text = '"{{question}}"'
        for row in rows:
            row["question"] = clean(f"{row['activity_label']}: {row['question']}")
            row["choices"] = [clean(choice) for choice in row["choices"]]
    keep = ("question", "choices", "answer")
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps({k: row[k] for k in keep}) + "\n" for row in rows))
    task = CHOICE.format(name=name, path=data, text=text, choices=LISTED)
    (folder / f"{name}.yaml").write_text(task)
    return name


def write_pages(folder: Path, path: Path) -> tuple[str, Path]:
    """A text cut into pages at WikiText's headings, as a rolling task; its name and its rows."""
    text = path.read_text(encoding="utf-8")
    pages = [page for page in re.split(r"(?m)^(?= = [^=])", text) if page.strip()]
    data = folder / "pages.jsonl"
    data.write_text("".join(json.dumps({"page": page}) + "\n" for page in pages))
    (folder / "pages.yaml").write_text(ROLLING.format(name="local_pages", path=data))
    return "local_pages", data


def run(*words: object) -> None:
    print("$", *words, flush=True)
    subprocess.run([str(word) for word in words], check=True)


def ours(args: argparse.Namespace, folder: Path, pages: Path, context: int) -> dict:
    """Figures of `eval --tasks`, and of `eval --harness`, by the harness's names."""
    tasks = [f"{path.stem}={path}" for path in args.rows] + [f"ppl={pages}"]
    names = [f"local_{path.stem}" for path in args.rows] + ["local_pages"]
    command = [sys.executable, PROGRAM, "eval", "--ckpt", args.ckpt, *PLACE]
    own = [*command, "--out_dir", folder / "own", "--stride", context]
    if args.limit:
        run(*own, "--limit", args.limit, "--tasks", *tasks[:-1])
        run(*own, "--tasks", tasks[-1])
    else:
        run(*own, "--tasks", *tasks)
    run(
        *command, "--harness", ",".join(names), "--harness_path", folder, "--out_dir", folder / "in"
    )
    own = json.loads((folder / "own" / "results.json").read_text())["results"][args.ckpt]
    inside = json.loads((folder / "in" / "results.json").read_text())["results"][args.ckpt]
    own = {name: own[name.removeprefix("local_").replace("pages", "ppl")] for name in names}
    return {"eval": own, "eval --harness": inside}


def lm_eval(folder: Path, names: list[str], bos: bool) -> dict:
    """Figures of the harness's own command on the exported folder."""
    model = f"pretrained={folder / 'hf'},add_bos_token={bos},dtype=float32"
    command = [sys.executable, "-m", "lm_eval", "--model", "hf", "--model_args", model]
    command += ["--tasks", ",".join(names), "--include_path", folder, "--device", "cpu"]
    run(*command, "--batch_size", 32, "--output_path", folder / f"{bos}.json")
    (found,) = folder.glob(f"{bos}*.json")
    results = json.loads(found.read_text())["results"]
    return {
        task: {name.partition(",")[0]: value for name, value in figures.items()}
        for task, figures in results.items()
    }


def theirs(args: argparse.Namespace, folder: Path, names: list[str], pages: str) -> dict:
    """Both kinds of tasks: a rolling one has <s> as its first context in any case, and would
    predict a second one where add_bos_token writes it into the text."""
    run(sys.executable, ROOT / "convert_to_llama.py", "--ckpt", args.ckpt, "--out", folder / "hf")
    return lm_eval(folder, names, True) | lm_eval(folder, [pages], False)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--ckpt", required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--rows", type=Path, nargs="+", required=True)
    parser.add_argument("--limit", type=int, default=0)
    parser.add_argument("--context", type=int, required=True, help="of the checkpoint, in tokens")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        names = [write_task(folder, path, args.limit) for path in args.rows]
        name, pages = write_pages(folder, args.text)
        found = ours(args, folder, pages, args.context)
        found["lm_eval"] = theirs(args, folder, names, name)
    worst = 0.0
    for task in [*names, name]:
        for metric in ("acc", "acc_norm", "word_perplexity", "byte_perplexity", "bits_per_byte"):
            values = [figures[task].get(metric) for figures in found.values()]
            if None in values:
                continue
            gap = (max(values) - min(values)) / max(1.0, abs(values[0]))
            worst = max(worst, gap)
            shown = "  ".join(
                f"{how} {value:.6f}" for how, value in zip(found, values, strict=True)
            )
            print(f"{task} {metric}: {shown}")
    print(f"largest difference: {worst:.1e}")
    return int(worst > 1e-4)


if __name__ == "__main__":
    sys.exit(main())
