"""Systems that are not at hand, as far as they can be simulated: Windows, macOS, other locales."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import PRELOADED, SHORT, TINY, complaint
from test_convert import convert

import standalone_transformer_lm as lm

ROOT = Path(lm.__file__).parent

# What Windows lacks, taken away once torch is loaded; workers begin anew, as they do there.
WINDOWS = """
import importlib, os, signal, sys
for name in {preloaded}:
    importlib.import_module(name)
sys.modules |= {{"fcntl": None, "resource": None}}
for name in ("fork", "killpg", "setsid", "sched_getaffinity", "statvfs", "mkfifo", "getuid"):
    delattr(os, name)
here = sys.platform
sys.platform = "win32"
import standalone_transformer_lm as lm
assert lm.START_METHOD == "spawn"
sys.platform = here  # as multiprocessing needs it

class Windows:
    platform = "win32"
    __getattr__ = staticmethod(lambda name: getattr(sys, name))

lm.sys = Windows()
if __name__ == "__main__":
    sys.exit(lm.main(sys.argv[1:]))
"""


@pytest.fixture
def on_windows(tmp_path):
    """`on_windows(argv)`: the result of a command, as `run` gives it, where POSIX is missing and
    files are not UTF-8 unless the program says so."""
    script = tmp_path / "windows.py"
    script.write_text(WINDOWS.format(preloaded=PRELOADED))

    def call(*argv):
        command = [sys.executable, "-X", "warn_default_encoding"]
        command += ["-W", "error::EncodingWarning:standalone_transformer_lm", script]
        more = {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "cp1252", "PYTHONUTF8": "0"}
        done = subprocess.run(
            [*map(str, command), *map(str, argv)],
            env=os.environ | more,
            capture_output=True,
            timeout=200,
        )
        return done.returncode, *(text.decode("cp1252") for text in (done.stdout, done.stderr))

    return call


@pytest.mark.slow
def test_a_run_without_posix(on_windows, corpus, tmp_path):
    data, out = tmp_path / "data", tmp_path / "run"
    argv = ["--text_path", corpus, "--vocab_size", 400, "--workers", 2, "--out_dir", data]
    code, _, err = on_windows("prep", *argv)
    assert code == 0, err
    short = [*SHORT, "--max_steps", 4]
    code, _, err = on_windows("train", *TINY, *short, "--data_dir", data, "--out_dir", out)
    assert code == 0, err
    assert json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])["step"] == 4
    argv = ["--ckpt", out, "--prompt", "東京 café", "--max_new_tokens", 4, "--device", "cpu"]
    code, told, err = on_windows("generate", *argv)
    assert code == 0 and "caf" in told, err


def test_code_is_not_run_without_a_way_to_end_it(on_windows, trained, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"prompt": "x", "tests": ["assert True"]}) + "\n")
    argv = ["--ckpt", trained, "--data", rows, "--reward", "code", "--out_dir", tmp_path / "run"]
    complaint(
        on_windows("grpo", *argv, "--device", "cpu", "--max_new_tokens", 4), "Linux or macOS", "WSL"
    )


def test_workers_begin_anew_where_copies_are_unsafe(monkeypatch):
    source = Path(lm.__file__).read_text(encoding="utf-8")
    assert '"fork" if sys.platform == "linux" else "spawn"' in source, "macOS too"
    monkeypatch.setattr(lm, "START_METHOD", "spawn")
    with lm.worker_pool(1) as pool:
        assert pool.submit(os.getpid).result() != os.getpid()


@pytest.mark.slow
def test_a_run_on_apples_gpu_asks_for_no_more_than_it_has(run, data_dir, tmp_path, monkeypatch):
    """MPS is simulated by its rules: fp32, nothing compiled, no float64 and no pinned memory."""
    assert not lm.can_compile(torch.device("mps"))
    assert not lm.compiles_generation("auto", torch.device("mps"))
    machine = lm.Machine(torch.device("mps"), lm.pick_dtype("auto", torch.device("mps")))
    assert machine.dtype is torch.float32
    with machine.autocast():
        assert not torch.is_autocast_enabled("mps")
    assert not lm.wants_compile("auto", 1e20, machine)
    monkeypatch.setattr(torch.Tensor, "pin_memory", None)
    monkeypatch.setattr(lm, "can_compile", lambda _: False)
    code, _, err = run(["train", *TINY, *SHORT, "--data_dir", data_dir, "--out_dir", tmp_path])
    assert code == 0, err


def test_numbers_leave_the_device_before_they_are_float64():
    lines = Path(lm.__file__).read_text(encoding="utf-8").splitlines()
    assert not [line for line in lines if ".double().cpu()" in line]


def test_a_run_that_chose_bf16_is_exported_in_bf16(run, data_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(lm, "bf16_cpu", lambda: True)
    argv = [*TINY, *SHORT, "--dtype", "auto", "--max_steps", 2]
    code, _, err = run(["train", *argv, "--data_dir", data_dir, "--out_dir", tmp_path / "run"])
    assert code == 0, err
    convert("--ckpt", tmp_path / "run", "--out", tmp_path / "hf")
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["torch_dtype"] == "bfloat16"
