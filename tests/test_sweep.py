"""sweep: every combination once, mistakes before the first run, and on from where it stopped."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import SHORT, TINY, complaint, log_rows

import standalone_transformer_lm as lm


@pytest.fixture
def base(data_dir, tmp_path):
    """A file of flags."""
    path = tmp_path / "base.txt"
    flags = [*TINY, *SHORT, "--data_dir", data_dir, "--threads", 1]
    path.write_text("\n".join(map(str, flags)))
    return path


def test_flags_of_several_values_are_axes():
    words = "--lr=1e-2 --pack 1 --lr 1e-3 3e-3 --data a b --optimizer muon adamw --resume".split()
    shared, axes = lm.sweep_axes(lm.cmd_sft, words)
    assert axes == {"lr": ["1e-3", "3e-3"], "optimizer": ["muon", "adamw"]}
    assert shared == ["--pack=1", "--data", "a", "b", "--resume"]


@pytest.mark.slow
def test_every_combination_is_run_once(base, run, tmp_path):
    out = tmp_path / "sweep"
    argv = ["sweep", f"@{base}", "--lr", "1e-3", "1e-2", "--tie", 1]
    argv += ["--out_dir", out, "--max_steps", 4, "--eval_interval", 2]
    code, told, err = run(argv)
    assert code == 0, err
    names = ["lr=1e-3", "lr=1e-2"]
    assert "2 runs, 2 of them to make" in told
    best = {}
    for name in names:
        best[name] = min(row["val/loss"] for row in log_rows(out / name) if "val/loss" in row)
    lines = told.splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith("run "))
    assert [line.split()[0] for line in lines[at + 1 : at + 3]] == sorted(names, key=best.get)
    assert f"{best[min(names, key=best.get)]:.5g}" in lines[at + 1]
    assert (out / "sweep.png").stat().st_size > 5000
    stamps = [(out / name / "metrics.jsonl").stat().st_mtime_ns for name in names]
    code, told, err = run([*argv, "--lr", "1e-3", "1e-2", "2e-2"])
    assert code == 0 and "3 runs, 1 of them to make" in told, err
    assert stamps == [(out / name / "metrics.jsonl").stat().st_mtime_ns for name in names]


def test_mistakes_are_told_before_the_first_run(base, run, tmp_path):
    out = tmp_path / "sweep"
    argv = ["sweep", f"@{base}", "--out_dir", out]
    complaint(run(argv), "no flag has several values")
    complaint(run([*argv, "--lr", "1e-3", "x"]), "--lr x is not a number")
    odd = [*argv, "--lr", "1e-3", "2e-3", "--no_such", "1"]
    complaint(run(odd), "--no_such=1 is not a known flag")
    complaint(run([*argv, "--d_model", "31", "32"]), "--n_head 4 does not divide")
    assert not out.exists()


@pytest.mark.slow
def test_a_run_that_fails_does_not_end_the_others(base, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "sweep"
    argv = ["sweep", f"@{base}", "--out_dir", out, "--max_steps", 2, "--jobs", 2]
    code, told, _ = run([*argv, "--mirror", "nosuch://x", "mirror"])
    assert code == 1 and "mirror=nosuch___x: ended with exit code 2" in told
    assert "mirror=mirror: done" in told
    assert list(json.loads((out / "sweep.json").read_text())) == ["mirror=mirror"]


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_a_sweep_that_is_stopped_goes_on(base, run, tmp_path):
    out = tmp_path / "sweep"
    argv = ["sweep", f"@{base}", "--out_dir", out, "--max_steps", 100_000, "--lr", "1e-3", "2e-3"]
    process = subprocess.Popen(
        [sys.executable, lm.__file__, *map(str, argv)], stdout=subprocess.PIPE, text=True
    )
    until = time.monotonic() + 60
    log = out / "lr=1e-3" / "metrics.jsonl"
    while not log.exists() and time.monotonic() < until:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    told, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM, told
    assert "lr=1e-3: ended with exit code 143" in told and not (out / "lr=2e-3").exists()
    saved = max(int(path.stem[-8:]) for path in (out / "lr=1e-3").glob("ckpt_0*.pt"))
    code, told, err = run([*argv[:-4], saved + 2, *argv[-3:]])
    assert code == 0 and "2 runs, 2 of them to make" in told, err
    assert "resuming" in (out / "lr=1e-3.log").read_text()
    assert Path(out / "lr=2e-3" / "ckpt_last.pt").exists()
