"""The commands as their users type them, from text to samples, and what they say when misled."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import TINY, documents

import standalone_transformer_lm as lm

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def generate(run, trained):
    """`generate(*flags)` samples from the tiny trained run."""
    def call(*flags):
        return run(["generate", "--ckpt", trained, "--device", "cpu", "--dtype", "fp32",
                    "--threads", 1, "--max_new_tokens", 30, *flags])

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
    code, told, err = run(["prep", "--text_path", corpus, "--out_dir", data, "--vocab_size", 400,
                           "--val_split", 0.1, "--workers", 1])
    assert code == 0 and "documents" in told and f"train --data_dir {data}" in told, err
    code, told, err = run(["train", *TINY, "--data_dir", data, "--out_dir", out,
                           "--max_steps", 60, "--eval_tokens", 500])
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
        return subprocess.Popen([sys.executable, lm.PROGRAM, *argv], cwd=tmp_path, env=env,
                                text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    for argv in (["prep", "--text_path", "docs.txt", "--out_dir", "data", "--vocab_size", "400",
                  "--workers", "1"],
                 ["train", *TINY, "--max_steps", "3", "--out_dir", "run"]):
        process = start(*argv)
        told, err = process.communicate(timeout=100)
        assert process.returncode == 0, err
    process = start("generate", "--ckpt", "run", "--prompt", "The", "--max_new_tokens", "3000",
                    "--stop_at_eos", "0")
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
    assert [set(row) for row in rows] == [{"prompt", "completion"}] * 3
    assert {row["prompt"] for row in rows} == {"The tower"}
    assert len({row["completion"] for row in rows}) == 3
    assert generate("--prompt", "The tower")[1] == f"The tower{rows[0]['completion']}\n"
    told = generate("--prompt", "The tower", "--num_samples", 3)[1]
    assert all(f"The tower{row['completion']}" in told for row in rows)


def test_prompts_come_from_a_file(generate, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("The 東京 tower\n\nIn 1950 a\n", encoding="utf-8")
    code, _, err = generate("--prompt_file", prompts, "--out", tmp_path / "o.jsonl",
                            "--num_samples", 2)
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
    new = tokenizer.encode("So" + text)[len(ids) - 1:]
    by_bytes = [tokenizer.sp.piece_to_id(f"<0x{byte:02X}>") for byte in text.encode()]
    for tokens in (new, by_bytes):
        spy = Spy()
        monkeypatch.setattr(sys, "stdout", spy)
        lm.print_stream(iter([(0, t) for t in [*tokens, tokenizer.eos]]), "So", ids, tokenizer)
        monkeypatch.undo()
        assert "".join(spy.pieces) == "So" + text + "\n"
        assert not any("\ufffd" in piece for piece in spy.pieces)
    assert len([piece for piece in spy.pieces if piece]) > min(len(text), 2)


def test_a_character_never_finished_is_shown_at_the_end(tiny_tokenizer, capsys):
    tokenizer = lm.Tokenizer(tiny_tokenizer)
    broken = [tokenizer.sp.piece_to_id(f"<0x{byte:02X}>") for byte in "東".encode()[:2]]
    lm.print_stream(iter([(0, t) for t in broken]), "So", [tokenizer.bos,
                    *tokenizer.encode("So")], tokenizer)
    assert capsys.readouterr().out.startswith("So\ufffd")


def test_streamed_text_equals_the_text_in_one_piece(generate, tmp_path):
    flags = ["--prompt", "Zürich 🙂", "--temperature", 5, "--top_p", 1, "--stop_at_eos", 0,
             "--max_new_tokens", 60]
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
    complaint(generate("--spm", empty), "empty.txt")
    complaint(generate("--spm", tmp_path / "none.model"), "none.model")


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
    complaint(run(["train", *TINY, "--data_dir", data_dir, "--out_dir", tmp_path / "r",
                   "--seq_len", 10**6]), "too few", "--seq_len")
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
    complaint(run(["info"]), "nothing to describe")
    complaint(run(["info", tmp_path / "no"]), "does not exist")
    complaint(run(["info", tmp_path]), "not finished")
    (tmp_path / "a.txt").write_text("words")
    complaint(run(["info", tmp_path / "a.txt"]), "a.txt")


# ---- Front door ----


@pytest.mark.parametrize(("word", "meant"), [("trian", "train"), ("generat", "generate"),
                                             ("preps", "prep"), ("TRAIN", ""), ("xyzzy", "")])
def test_an_unknown_command_gets_a_hint(run, word, meant):
    complaint(run([word]), f"did you mean {meant}?" if meant else "train", word)


@pytest.mark.parametrize("argv", [[], ["-h"], ["--help"], ["help"]])
def test_usage_lists_every_command(run, argv):
    code, told, err = run(argv)
    assert code == 0 and not err
    assert all(f"  {name} " in told and row.about in told for name, row in lm.COMMANDS.items())


@pytest.mark.parametrize("name", lm.COMMANDS)
def test_help_explains_flags_and_shows_an_example_that_parses(run, name):
    code, told, err = run([name, "--help"])
    command = lm.COMMANDS[name]
    assert code == 0 and not err and command.example in told
    assert all(group.__doc__.rstrip(".") in told for group in lm.settings_of(command.run))
    program, ours, *argv = shlex.split(command.example)[1:]
    assert (program, ours) == (lm.PROGRAM, name)
    assert lm.read_command(command.run, argv)


def test_help_shows_real_defaults(run):
    told = run(["train", "--help"])[1].split("example:")[0].split("\n  --")[1:]
    told = {text.split()[0]: " ".join(text.split()) for text in told}
    for group in lm.settings_of(lm.cmd_train):
        for name, default in vars(group()).items():
            if default not in ("", False) and name not in ("vocab_size", "rope_layout"):
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
