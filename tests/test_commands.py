"""The commands as their users type them, from text to samples, and what they say when misled."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import TINY, documents

import standalone_transformer_lm as lm

ROOT = Path(__file__).resolve().parents[1]
NO_FLAGS = ("vocab_size", "bos_id", "rope_layout")  # read off the tokenizer, or fixed


@pytest.fixture
def generate(run, trained):
    """`generate(*flags)` samples from the tiny trained run."""

    def call(*flags):
        return run(
            [
                "generate",
                "--ckpt",
                trained,
                "--device",
                "cpu",
                "--dtype",
                "fp32",
                "--threads",
                1,
                "--max_new_tokens",
                30,
                *flags,
            ]
        )

    return call


def complaint(result, *words):
    """Assert that a result is one of the user's mistakes, told with these words."""
    code, out, err = result
    assert code == 2 and err.startswith("error: ") and "\nfix: " in err
    assert "Traceback" not in err and not out
    assert all(word in err for word in words), err


# ---- From text to samples ----


def test_prep_train_generate_info(run, corpus, tmp_path):
    data, out = tmp_path / "data", tmp_path / "run"
    code, told, err = run(
        [
            "prep",
            "--text_path",
            corpus,
            "--out_dir",
            data,
            "--vocab_size",
            400,
            "--val_split",
            0.1,
            "--workers",
            1,
        ]
    )
    assert code == 0 and "documents" in told and f"train --data_dir {data}" in told, err
    code, told, err = run(
        [
            "train",
            *TINY,
            "--data_dir",
            data,
            "--out_dir",
            out,
            "--max_steps",
            60,
            "--eval_tokens",
            500,
        ]
    )
    assert code == 0 and "done after 60 steps" in told, err
    example = next(line for line in told.splitlines() if " generate " in line)
    code, told, err = run([*shlex.split(example)[2:], "--max_new_tokens", 5])
    assert code == 0 and told.startswith("…"), err
    for path in (out, out / "ckpt_last.pt"):
        code, told, _ = run(["info", path])
        assert code == 0 and "n_layer=2" in told and "step 60" in told and "parameters" in told
    code, told, _ = run(["info", data])
    assert code == 0 and "vocabulary 400" in told and "train:" in told and "val:" in told


def test_the_lone_file_works_in_an_empty_folder(tmp_path):
    shutil.copy(ROOT / lm.PROGRAM, tmp_path)
    (tmp_path / "docs.txt").write_text("".join(t + "\n" for t in documents(300, seed=5)))
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}

    def start(*argv):
        return subprocess.Popen(
            [sys.executable, lm.PROGRAM, *argv],
            cwd=tmp_path,
            env=env,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    for argv in (
        [
            "prep",
            "--text_path",
            "docs.txt",
            "--out_dir",
            "data",
            "--vocab_size",
            "400",
            "--workers",
            "1",
        ],
        ["train", *TINY, "--max_steps", "3", "--out_dir", "run"],
    ):
        process = start(*argv)
        told, err = process.communicate(timeout=100)
        assert process.returncode == 0, err
    process = start(
        "generate",
        "--ckpt",
        "run",
        "--prompt",
        "The",
        "--max_new_tokens",
        "3000",
        "--stop_at_eos",
        "0",
    )
    assert process.stdout.read(1) == "T"
    process.stdout.close()  # as `| head -c 1` does
    err = process.stderr.read()
    assert process.wait(100) == 0 and not err


# ---- generate ----


def test_a_seed_repeats_and_another_differs(generate):
    same = [generate("--prompt", "The", "--seed", 3)[1] for _ in range(2)]
    assert same[0] == same[1] and same[0].startswith("The")
    assert generate("--prompt", "The", "--seed", 4)[1] != same[0]


def test_samples_differ_and_the_first_is_the_one_alone(generate, tmp_path):
    out = tmp_path / "deep" / "rows.jsonl"
    code, told, err = generate("--prompt", "The tower", "--num_samples", 3, "--out", out)
    assert code == 0 and "3 completions" in told, err
    rows = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert [set(row) for row in rows] == [{"prompt", "completion", "ended"}] * 3
    assert {row["prompt"] for row in rows} == {"The tower"}
    assert len({row["completion"] for row in rows}) == 3
    assert generate("--prompt", "The tower")[1] == f"The tower{rows[0]['completion']}\n"
    told = generate("--prompt", "The tower", "--num_samples", 3)[1]
    assert all(f"The tower{row['completion']}" in told for row in rows)


def test_prompts_come_from_a_file(generate, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("The 東京 tower\n\nIn 1950 a\n", encoding="utf-8")
    code, _, err = generate(
        "--prompt_file", prompts, "--out", tmp_path / "o.jsonl", "--num_samples", 2
    )
    assert code == 0, err
    rows = [json.loads(line) for line in (tmp_path / "o.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in rows] == ["The 東京 tower"] * 2 + ["In 1950 a"] * 2


class Spy:
    """A stdout that remembers each piece written."""

    def __init__(self):
        self.pieces = []

    def write(self, text):
        self.pieces.append(text)

    def flush(self):
        pass


@pytest.mark.parametrize("text", [" 🙂 naïve 東京塔 𝄞", "é", "\n\n  x  \n", "plain words only"])
def test_streamed_characters_come_whole_and_give_the_text(tiny_tokenizer, monkeypatch, text):
    tokenizer = lm.Tokenizer(tiny_tokenizer)
    ids = [tokenizer.bos, *tokenizer.encode("So")]
    new = tokenizer.encode("So" + text)[len(ids) - 1 :]
    by_bytes = [tokenizer.sp.piece_to_id(f"<0x{byte:02X}>") for byte in text.encode()]
    for tokens in (new, by_bytes):
        spy = Spy()
        monkeypatch.setattr(sys, "stdout", spy)
        drawn = iter([(0, t) for t in [*tokens, tokenizer.eos]])
        lm.print_stream(drawn, "So", lm.TextStream(tokenizer, ids))
        monkeypatch.undo()
        assert "".join(spy.pieces) == "So" + text + "\n"
        assert not any("\ufffd" in piece for piece in spy.pieces)
    assert len([piece for piece in spy.pieces if piece]) > min(len(text), 2)


def test_a_character_never_finished_is_shown_at_the_end(tiny_tokenizer, capsys):
    tokenizer = lm.Tokenizer(tiny_tokenizer)
    broken = [tokenizer.sp.piece_to_id(f"<0x{byte:02X}>") for byte in "東".encode()[:2]]
    text = lm.TextStream(tokenizer, [tokenizer.bos, *tokenizer.encode("So")])
    lm.print_stream(iter([(0, t) for t in broken]), "So", text)
    assert capsys.readouterr().out.startswith("So\ufffd")


def test_streamed_text_equals_the_text_in_one_piece(generate, tmp_path):
    flags = [
        "--prompt",
        "Zürich 🙂",
        "--temperature",
        5,
        "--top_p",
        1,
        "--stop_at_eos",
        0,
        "--max_new_tokens",
        60,
    ]
    for seed in range(3):
        told = generate(*flags, "--seed", seed)[1]
        assert generate(*flags, "--seed", seed, "--out", tmp_path / "o.jsonl")[0] == 0
        row = json.loads((tmp_path / "o.jsonl").read_text(encoding="utf-8"))
        assert told == f"Zürich 🙂{row['completion']}\n"


def test_no_prompt_writes_from_nothing(generate):
    code, told, err = generate("--temperature", 0)
    assert code == 0 and told.strip() and not err


@pytest.mark.parametrize("seed", [2**31, 2**63 - 1, 10**14])
def test_any_seed_samples(generate, seed):
    assert generate("--seed", seed)[0] == 0


def test_ctrl_c_stops_quietly(generate, monkeypatch):
    push, calls = lm.Decoder.push, []

    def third(decoder, tokens):
        calls.append(1)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        push(decoder, tokens)

    monkeypatch.setattr(lm.Decoder, "push", third)
    code, told, err = generate("--prompt", "The", "--stop_at_eos", 0)
    assert code == 130 and told.startswith("The") and "Traceback" not in err
    assert len(calls) == 3


# ---- Mistakes ----


def test_mistakes_of_generate(generate, run, tmp_path):
    empty, latin = tmp_path / "empty.txt", tmp_path / "latin.txt"
    empty.write_text("\n  \n")
    latin.write_bytes("café\n".encode("latin-1"))
    complaint(run(["generate"]), "--ckpt is missing")
    complaint(run(["generate", "--ckpt", tmp_path / "no.pt"]), "no.pt", "does not exist")
    complaint(run(["generate", "--ckpt", tmp_path]), str(tmp_path))
    complaint(generate("--prompt_file", tmp_path / "none.txt"), "none.txt")
    complaint(generate("--prompt_file", tmp_path), str(tmp_path))
    complaint(generate("--prompt_file", empty), "empty.txt", "no prompt")
    complaint(generate("--prompt", "a", "--prompt_file", empty), "--prompt and --prompt_file")
    complaint(generate("--tokenizer", empty), "empty.txt")
    complaint(generate("--tokenizer", tmp_path / "none.model"), "none.model")


def test_a_prompt_file_that_is_no_utf8_is_a_sentence(generate, tmp_path):
    (tmp_path / "latin.txt").write_bytes("café\n".encode("latin-1"))
    complaint(generate("--prompt_file", tmp_path / "latin.txt"), "latin.txt", "UTF-8")


def test_a_place_for_samples_that_cannot_be_written_is_told(generate, tmp_path):
    (tmp_path / "file").write_text("")
    code, _, err = generate("--out", tmp_path / "file" / "o.jsonl")
    assert code == 2 and "file" in err and "Traceback" not in err


def test_mistakes_of_train(run, data_dir, tmp_path):
    complaint(run(["train", *TINY, "--data_dir", tmp_path / "no"]), "does not exist", "prep")
    complaint(run(["train", *TINY, "--data_dir", tmp_path]), "not finished", "prep")
    (tmp_path / "file").write_text("in the way")
    for out in (tmp_path / "file", tmp_path / "file" / "run"):
        complaint(run(["train", *TINY, "--data_dir", data_dir, "--out_dir", out]), "file")
    assert (tmp_path / "file").read_text() == "in the way"
    complaint(
        run(
            [
                "train",
                *TINY,
                "--data_dir",
                data_dir,
                "--out_dir",
                tmp_path / "r",
                "--seq_len",
                10**6,
            ]
        ),
        "too few",
        "--seq_len",
    )
    assert not (tmp_path / "r").exists()


def test_an_unwritable_place_is_told_before_any_step(run, data_dir, tmp_path, monkeypatch):
    def never(*_):
        raise AssertionError("a step was trained")

    monkeypatch.setattr(lm.Trainer, "train_step", never)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "metrics.jsonl").mkdir()
    complaint_of = run(["train", *TINY, "--data_dir", data_dir, "--out_dir", tmp_path / "out"])
    assert complaint_of[0] == 2 and "metrics.jsonl" in complaint_of[2]


def test_mistakes_of_info(run, tmp_path):
    complaint(run(["info"]), "something to describe", "--preset")
    complaint(run(["info", tmp_path / "no"]), "does not exist")
    complaint(run(["info", tmp_path]), "not finished")
    (tmp_path / "a.txt").write_text("words")
    complaint(run(["info", tmp_path / "a.txt"]), "a.txt")


# ---- What a run would take ----


def planned(result):
    """The figures of a plan: its lines by their first word, numbers unseparated."""
    code, told, err = result
    assert code == 0 and not err, err
    return {line.split(":")[0].split()[0]: line.replace(",", "") for line in told.splitlines()}


def figure(line, pattern):
    return float(re.search(pattern, line)[1])


@pytest.mark.parametrize(
    ("flags", "tokens", "peak", "gpus", "mfu", "price"),
    [
        (["--gpu", "H100"], 0, 989e12, 1, 0.4, 0),
        (["--gpu", "A100", "--gpus", 8, "--mfu", 0.5, "--usd_per_hour", 12], 0, 312e12, 8, 0.5, 12),
        (
            ["--gpu", "H200", "--tokens", 1e12, "--gpus", 64, "--usd_per_hour", 200],
            1e12,
            989e12,
            64,
            0.4,
            200,
        ),
    ],
)
def test_a_plan_is_tokens_times_flops_over_speed(run, flags, tokens, peak, gpus, mfu, price):
    plan = planned(run(["info", "--preset", "138m", "--seq_len", 1024, *flags]))
    layer = 4 * 768**2 + 3 * 768 * 4 * 768 + 2 * 768
    blocks, embedding = 12 * layer + 768, 32000 * 768
    assert figure(plan["138m"], r"(\d+) parameters") == blocks + embedding
    cost = 6 * (blocks + embedding) + 12 * 12 * 768 * 1024  # flops a token: tied, so once
    tokens = tokens or 20 * (blocks + embedding)
    hours = tokens * cost / (peak * mfu * gpus) / 3600
    assert figure(plan["time"], r"time: ([\d.]+) hours") == pytest.approx(hours, abs=0.051)
    if price:
        dollars = figure(plan["time"], r"\$([\d.]+)")
        assert dollars == pytest.approx(hours * price, abs=0.0051)
    assert ("$" in plan["time"]) == bool(price)
    steps = figure(plan["compute"], r"(\d+) steps of")
    assert steps == pytest.approx(tokens / (8 * gpus * 1024), abs=0.51)


def test_a_plan_with_a_known_speed_needs_no_device(run):
    plan = planned(
        run(
            [
                "info",
                "--preset",
                "350m",
                "--tokens",
                36e9,
                "--tok_per_s",
                1e5,
                "--gpus",
                4,
                "--usd_per_hour",
                3,
            ]
        )
    )
    assert "100.0 hours at 100K" in plan["time"] and "$300.00" in plan["time"]
    assert planned(run(["info", "--preset", "350m"]))["time"] == (
        "time: unknown; give --gpu NAME or --tok_per_s N"
    )


def test_a_plans_memory_is_its_sum_and_follows_what_it_should(run):
    def memory(*flags):
        line = planned(run(["info", "--preset", "138m", *flags]))["memory"]
        parts = {
            name: float(size)
            for name, size in re.findall(r"(\w+) ([\d.]+)[ )]", line + " ")
            if name in ("weights", "gradients", "optimizer", "activations")
        }
        assert figure(line, r"about: ([\d.]+) GB") == pytest.approx(sum(parts.values()), abs=0.021)
        return parts

    plain, total = memory("--optimizer", "adamw"), 137_841_408
    assert plain["gradients"] == pytest.approx(4 * total / 1e9, abs=0.0051)
    assert plain["weights"] == pytest.approx(6 * total / 1e9, abs=0.0051)
    assert plain["optimizer"] == pytest.approx(8 * total / 1e9, abs=0.0051)
    assert memory("--optimizer", "muon")["optimizer"] < plain["optimizer"]
    assert memory("--grad_checkpoint", 1)["activations"] < plain["activations"] / 2
    wide = memory("--batch_size", 80, "--optimizer", "adamw")
    assert 5 < wide["activations"] / plain["activations"] <= 10.1
    assert {k: v for k, v in wide.items() if k != "activations"} == {
        k: v for k, v in plain.items() if k != "activations"
    }


@pytest.mark.parametrize(("moments", "flags"), [(8, ["--optimizer", "adamw"]), (4, [])])
def test_a_plans_optimiser_is_what_is_really_kept(run, moments, flags):
    """Moments of every weight for AdamW; of Muon one of its own weights, two of the rest."""
    line = planned(run(["info", "--preset", "138m", *flags]))["memory"]
    with torch.device("meta"):
        model = lm.Transformer(lm.ModelSettings(**lm.PRESETS["138m"], vocab_size=32000))
    kinds = lm.split_parameters(model)
    matrices = sum(w.numel() for kind in ("qkv", "hidden") for w in kinds[kind])
    rest = sum(w.numel() for w in model.parameters()) - matrices
    want = (moments * matrices + 8 * rest) / 1e9
    assert figure(line, r"optimizer ([\d.]+)") == pytest.approx(want, rel=0.01)


def test_a_plan_of_experts_counts_the_active_ones(run):
    plan = planned(
        run(["info", "--preset", "138m", "--n_expert", 8, "--n_expert_active", 2, "--gpu", "H100"])
    )
    expert, attention = 3 * 768 * 3072, 4 * 768**2 + 2 * 768
    rest = 768 + 32000 * 768 + 12 * (attention + 8 * 768)
    total, active = rest + 12 * 8 * expert, rest + 12 * 2 * expert
    assert figure(plan["138m"], r"(\d+) parameters") == total
    assert figure(plan["138m"], r"(\d+) active") == active
    flops = 6 * active + 12 * 12 * 768 * 512
    hours = 20 * active * flops / (989e12 * 0.4) / 3600
    assert figure(plan["time"], r"time: ([\d.]+) hours") == pytest.approx(hours, abs=0.051)


@pytest.mark.parametrize("name", lm.PRESETS)
def test_every_preset_plans_and_its_vocabulary_can_be_named(run, name):
    plan = planned(run(["info", "--preset", name, "--vocab", 1234, "--gpu", "H100"]))
    assert "vocabulary 1234" in plan[name] and "hours" in plan["time"]


def test_mistakes_of_plans(run, trained):
    complaint(run(["info", "--preset", "139m"]), "--preset 139m", "138m")
    complaint(run(["info", trained, "--preset", "138m"]), "--preset")
    complaint(run(["info", "--preset", "138m", "--gpu", "Z9"]), "--gpu Z9", "--tok_per_s")
    complaint(run(["info", "--preset", "138m", "--n_head", 7]), "--n_head 7")
    complaint(run(["info", "--preset", "138m", "--gpus", 0]), "--gpus 0")
    for mfu in (0, 1, 40):
        complaint(run(["info", "--preset", "138m", "--mfu", mfu]), "--mfu")


# ---- Front door ----


@pytest.mark.parametrize(
    ("word", "meant"),
    [("trian", "train"), ("generat", "generate"), ("preps", "prep"), ("TRAIN", ""), ("xyzzy", "")],
)
def test_an_unknown_command_gets_a_hint(run, word, meant):
    complaint(run([word]), f"did you mean {meant}?" if meant else "train", word)


@pytest.mark.parametrize("argv", [[], ["-h"], ["--help"], ["help"]])
def test_usage_lists_every_command(run, argv):
    code, told, err = run(argv)
    assert code == 0 and not err
    assert all(f"  {name} " in told and row.about in told for name, row in lm.COMMANDS.items())


@pytest.mark.parametrize("name", lm.COMMANDS)
def test_help_explains_flags_and_shows_an_example_that_parses(run, name):
    code, told, err = run([name, "--help_all"])
    command = lm.COMMANDS[name]
    assert code == 0 and not err and command.example in told
    assert all(group.__doc__.rstrip(".") in told for group in lm.settings_of(command.run))
    program, ours, *argv = shlex.split(command.example)[1:]
    assert (program, ours) == (lm.PROGRAM, name)
    assert lm.read_command(command.run, argv)


def test_help_shows_real_defaults(run):
    told = run(["train", "--help_all"])[1].split("example:")[0].split("\n  --")[1:]
    told = {text.split()[0]: " ".join(text.split()) for text in told}
    for group in lm.settings_of(lm.cmd_train):
        for name, default in vars(group()).items():
            if default not in ("", False) and name not in NO_FLAGS:
                assert f"(default: {default})" in told[name], name


def test_two_mistakes_are_told_together(run):
    code, _, err = run(["train", "--d_model", 1024, "--n_head", 20, "--lr", "fast", "--bogus", 1])
    assert code == 2 and err.count("error: ") == err.count("fix: ") == 3
    assert "--n_head 20" in err and "--lr fast" in err and "--bogus" in err and "16" in err


def test_a_bug_is_no_mistake_of_the_user(run, monkeypatch, tmp_path):
    def broken(path):
        raise ZeroDivisionError

    monkeypatch.setattr(lm, "describe_data", broken)
    with pytest.raises(ZeroDivisionError):
        run(["info", tmp_path])


@pytest.mark.skipif(sys.platform != "linux", reason="ulimit -v is Linux's")
def test_too_little_memory_is_a_sentence(data_dir, tmp_path):
    """A model far beyond what the process may have."""
    words = "--n_layer 8 --d_model 8192 --n_head 64 --seq_len 32 --batch_size 1 --compile 0"
    program = Path(lm.__file__)
    command = f"ulimit -v 6000000; exec {sys.executable} {program} train --data_dir {data_dir} "
    command += f"--out_dir {tmp_path / 'run'} {words} --device cpu --threads 1 --max_steps 2"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr[-500:]
    assert "memory ran out" in done.stderr and "--batch_size" in done.stderr
