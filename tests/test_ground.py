"""Room Ground: errors a user can act on, safe writing, and progress that tells the time left."""

import datetime
import errno
import io
import json
import math
import os
import pickle
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SHORT, TINY, complaint
from hypothesis import example, given
from hypothesis import strategies as st

import standalone_transformer_lm as lm


class Clock:
    """A clock that a test sets, in place of the real one."""

    def __init__(self, monkeypatch):
        self.now = 100.0
        monkeypatch.setattr(lm.time, "monotonic", lambda: self.now)


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


@pytest.fixture
def old(tmp_path):
    """A file with old content, alone in its folder."""
    path = tmp_path / "state.bin"
    path.write_bytes(b"old")
    return path


def alone(path):
    """Whether a folder holds this one file and no leavings."""
    return os.listdir(path.parent) == [path.name]


# ---- atomic_write ----


def test_written_file_holds_the_new_content(old):
    with lm.atomic_write(old) as file:
        file.write(b"new")
    assert old.read_bytes() == b"new" and alone(old)


def test_missing_folders_are_made(tmp_path):
    path = tmp_path / "a" / "b" / "c.txt"
    with lm.atomic_write(path, "w") as file:
        file.write("東京\n")
    assert path.read_bytes() == "東京\n".encode()


def test_a_shorter_text_leaves_no_tail_of_the_old_one(old):
    old.write_bytes(b"long old content")
    with lm.atomic_write(old, "w") as file:
        file.write("x")
    assert old.read_bytes() == b"x"


@pytest.mark.parametrize("fault", [ValueError, KeyboardInterrupt, SystemExit, MemoryError])
def test_old_content_survives_a_failure_in_the_middle(old, fault):
    with pytest.raises(fault), lm.atomic_write(old) as file:
        file.write(b"new" * 100_000)
        raise fault
    assert old.read_bytes() == b"old" and alone(old)


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_old_content_survives_a_full_disk(old, monkeypatch, step):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(lm.os, step, full)
    with pytest.raises(OSError, match="No space"), lm.atomic_write(old) as file:
        file.write(b"new")
    assert old.read_bytes() == b"old" and alone(old)


def test_a_failure_without_an_old_file_leaves_nothing(tmp_path):
    with pytest.raises(ValueError), lm.atomic_write(tmp_path / "new.bin") as file:
        file.write(b"half")
        raise ValueError
    assert os.listdir(tmp_path) == []


def test_a_reader_sees_old_content_until_the_new_is_whole_and_on_disk(old, monkeypatch):
    """At every step up to the rename the path reads `old`, and the rename follows the fsync."""
    seen, fsync, replace = [], os.fsync, os.replace

    def watched(name, step):
        def call(*args):
            seen.append((name, old.read_bytes()))
            return step(*args)

        return call

    monkeypatch.setattr(lm.os, "fsync", watched("fsync", fsync))
    monkeypatch.setattr(lm.os, "replace", watched("replace", replace))
    with lm.atomic_write(old) as file:
        file.write(b"new" * 100_000)
        file.flush()
        assert old.read_bytes() == b"old"
    assert seen[:2] == [("fsync", b"old"), ("replace", b"old")]
    assert seen[2:] == [("fsync", b"new" * 100_000)]  # of the folder


def test_a_kill_before_the_rename_keeps_the_old_file_and_blocks_no_later_write(old):
    child = os.fork()
    if child == 0:
        lm.os.replace = lambda *names: os._exit(9)
        with lm.atomic_write(old) as file:
            file.write(b"never")
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert old.read_bytes() == b"old"
    with lm.atomic_write(old) as file:
        file.write(b"new")
    assert old.read_bytes() == b"new" and alone(old)


def test_a_path_in_the_working_folder_needs_no_folder_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with lm.atomic_write("plain.txt", "w") as file:
        file.write("x")
    assert os.listdir() == ["plain.txt"]


# ---- UserError and OSError ----


def test_user_error_crosses_a_process_border_whole():
    fault = lm.UserError("a is bad", "mend a", ("b is bad", "mend b"))
    again = pickle.loads(pickle.dumps(fault))
    assert type(again) is lm.UserError and again.faults == fault.faults
    assert str(again) == "error: a is bad\nfix: mend a\nerror: b is bad\nfix: mend b"


def test_raise_all_tells_every_fault_and_nothing_of_none():
    lm.raise_all([])
    with pytest.raises(lm.UserError) as caught:
        lm.raise_all([("one", "x"), ("two", "y"), ("three", "z")])
    assert [what for what, _ in caught.value.faults] == ["one", "two", "three"]


@pytest.mark.parametrize("number", lm.DISK_FAULTS)
def test_disk_faults_become_sentences_that_name_the_path(number):
    named = lm.disk_error(OSError(number, os.strerror(number), "/some/where"), "/else/where")
    assert str(named).startswith("error: /some/where: ") and "\nfix: " in str(named)
    assert "/else/where" in str(lm.disk_error(OSError(number, "x"), "/else/where"))
    bare = str(lm.disk_error(OSError(number, "x")))
    assert bare.startswith("error: ") and not bare.startswith("error: :") and "None" not in bare


def test_an_error_of_no_disk_stays_a_bug():
    assert lm.disk_error(OSError(errno.EBADF, "Bad file descriptor")) is None
    assert lm.disk_error(OSError("no number")) is None


@pytest.mark.parametrize(
    "argv",
    [
        ["prep", "--text_path", __file__, "--out_dir", "d" * 300],
        ["prep", "--text_path", __file__, "--out_dir", "/dev/null/data"],
        ["prep", "--text_path", __file__, "--out_dir", "/proc/data"],
        ["info", "d" * 300],
        ["info", "/dev/null/x"],
        ["train", "--data_dir", "d" * 300],
        ["generate", "--ckpt", "d" * 300],
    ],
    ids=lambda argv: f"{argv[0]}-{argv[-1][:10]}",
)
def test_an_impossible_path_is_the_users_mistake_in_every_command(run, argv):
    code, _, err = run(argv)
    assert code == 2 and "error: " in err and "fix: " in err


@pytest.mark.parametrize(
    "text, what",
    [
        ("{", "not valid JSON"),
        ("", "not valid JSON"),
        ("[1]", "not a JSON object"),
        (b"\xff\xfe", "not valid JSON"),
        ("null", "not a JSON object"),
    ],
    ids=["cut", "empty", "list", "bytes", "null"],
)
def test_read_json_says_which_file_is_broken(tmp_path, text, what):
    path = tmp_path / "meta.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(lm.UserError, match=what) as caught:
        lm.read_json(path)
    assert str(path) in str(caught.value)


# ---- Numbers for people ----


@pytest.mark.parametrize(
    "number, text",
    [
        (0, "0"),
        (7, "7"),
        (999, "999"),
        (1000, "1K"),
        (12_345_678, "12.3M"),
        (1e9, "1B"),
        (2.5e12, "2.5T"),
        (-1234, "-1.23K"),
        (0.25, "0.25"),
    ],
)
def test_short_numbers(number, text):
    assert lm.short(number) == text


@given(st.floats(0.01, 9.9e14) | st.integers(1, 10**14))
@example(999.7)
@example(999_999)
@example(999_950_000)
def test_short_numbers_are_never_in_powers_of_ten_and_within_one_percent(number):
    text = lm.short(number)
    sizes = {"K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}
    value = float(text.rstrip("KMBT")) * sizes.get(text[-1], 1)
    assert math.isclose(value, number, rel_tol=0.01) and "e" not in text and len(text) <= 6


@pytest.mark.parametrize(
    "seconds, text",
    [
        (0, "0s"),
        (59.9, "59s"),
        (60, "1m00s"),
        (3599, "59m59s"),
        (3725.0, "1h02m"),
        (100 * 3600, "100h00m"),
        (math.inf, "?"),
        (math.nan, "?"),
    ],
)
def test_durations(seconds, text):
    assert lm.duration(seconds) == text


# ---- Progress ----


def test_plain_lines_carry_share_and_time_left(clock, capsys):
    """First unit at 100 s, then 10 units in 20 s: 80 units are 160 s."""
    progress = lm.Progress("encoding", 100, "B")
    progress.update(10)
    clock.now += 20
    progress.update(20, "3 tokens")
    assert capsys.readouterr().err == "encoding: 20 of 100 (20%) B, 2m40s left  3 tokens\n"


def test_the_estimate_is_of_the_mean_speed_since_the_first_unit(clock):
    progress = lm.Progress("x", 100, "B", talks=False)
    clock.now += 1000  # what comes first warms up
    for done in (10, 20, 30):
        progress.update(done)
        clock.now += 5
    assert progress.eta() == pytest.approx(70 * 15 / 20)


def test_a_resumed_job_does_not_count_what_was_done_before_as_speed(clock):
    progress = lm.Progress("x", 100, "steps", start=90, talks=False)
    progress.update(91)
    clock.now += 10
    progress.update(92)
    assert progress.eta() == pytest.approx(80)


@pytest.mark.parametrize("updates", [[], [0], [5], [5, 5]])
def test_time_left_is_unknown_before_there_is_a_speed(clock, updates):
    progress = lm.Progress("x", 10, "B", talks=False)
    for done in updates:
        progress.update(done)
        clock.now += 1
    assert progress.eta() == math.inf and "? left" in progress.line()


def test_one_line_in_ten_seconds_and_none_before(clock, capsys):
    progress = lm.Progress("x", 1000, "B")
    for second in range(61):
        progress.update(second + 1)
        clock.now += 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 60 // lm.LINE_EVERY_S


def test_an_unknown_total_shows_no_share_and_no_estimate(clock, capsys, monkeypatch):
    monkeypatch.setattr(lm, "LINE_EVERY_S", 0)
    lm.Progress("rows", None, "rows").update(5)
    lm.Progress("empty", 0, "B").update(0)
    assert capsys.readouterr().err == "rows: 5 rows\nempty: 0 B\n"


def test_a_process_that_does_not_talk_is_silent(clock, capsys, monkeypatch):
    monkeypatch.setattr(lm, "LINE_EVERY_S", 0)
    progress = lm.Progress("x", 10, "B", talks=False)
    progress.update(1)
    progress.close("done")
    assert capsys.readouterr() == ("", "")


def test_progress_stays_out_of_stdout_and_ends_with_a_line(clock, capsys):
    progress = lm.Progress("encoding", 4, "B")
    progress.update(4)
    progress.close("encoded")
    out, err = capsys.readouterr()
    assert out == "" and "4 of 4 (100%)" in err and err.endswith("encoded\n")
    assert "?" not in err  # nothing is left, and that is known


def test_a_terminal_gets_a_bar_and_no_lines(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setattr(lm, "LINE_EVERY_S", 0)
    progress = lm.Progress("encoding", 100, "B", start=40)
    progress.update(50, "note")
    assert progress.bar.n == 50 and progress.bar.total == 100
    progress.close()
    shown = sys.stderr.getvalue()
    assert "encoding" in shown and "of 100 (" not in shown


# ---- The front door's promises to the shell ----


def test_no_command_prints_every_command(run):
    code, out, _ = run([])
    assert code == 0 and all(f"  {name}" in out for name in lm.COMMANDS)


@pytest.mark.parametrize("name, hint", [("trian", "train"), ("prepare", "prep"), ("zzz", "choose")])
def test_an_unknown_command_is_corrected(run, name, hint):
    code, out, err = run([name])
    assert code == 2 and name in err and hint in err and out == ""


@pytest.mark.parametrize(
    "raised, code",
    [
        (lm.UserError("what", "how"), 2),
        (KeyboardInterrupt(), 130),
        (OSError(errno.ENOSPC, "full", "/data"), 2),
        (PermissionError(errno.EACCES, "no", "/d"), 2),
    ],
)
def test_exit_codes(run, monkeypatch, raised, code):
    def broken(settings: lm.InfoSettings) -> int:
        raise raised

    monkeypatch.setitem(lm.COMMANDS, "info", lm.Command(broken, "", ""))
    found, _, err = run(["info", "x"])
    assert found == code and "Traceback" not in err
    assert code == 130 or ("error: " in err and "fix: " in err)


def test_a_bug_keeps_its_traceback(run, monkeypatch):
    def broken(settings: lm.InfoSettings) -> int:
        return 1 // 0

    monkeypatch.setitem(lm.COMMANDS, "info", lm.Command(broken, "", ""))
    with pytest.raises(ZeroDivisionError):
        run(["info", "x"])


def test_other_ranks_do_not_talk(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    lm.say("hello")
    monkeypatch.setenv("RANK", "0")
    lm.say("one", "two")
    assert capsys.readouterr().out == "one\ntwo\n"


# ---- What is printed and written, whatever it is ----


def test_rows_with_what_json_lacks_are_written(tmp_path):
    odd = {"a": "\ud83d", "b": b"bytes", "c": datetime.date(2026, 11, 25), "d": np.float32(0.5)}
    lm.write_jsonl(tmp_path / "rows.jsonl", [odd, {"a": "é"}])
    first, second, _ = (tmp_path / "rows.jsonl").read_text(encoding="utf-8").split("\n")
    assert json.loads(first) == {"a": "\ud83d", "b": "bytes", "c": "2026-11-25", "d": 0.5}
    assert second == '{"a": "é"}'


@pytest.mark.parametrize("encoding", ["cp1252", "ascii"])
def test_printing_survives_any_encoding(encoding, monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), encoding, write_through=True)
    monkeypatch.setattr(sys, "stdout", stream)
    lm.say("你 é")
    assert stream.buffer.getvalue().decode(encoding).startswith("\\u4f60 ")


def test_a_run_goes_on_when_nobody_reads_its_output(data_dir, tmp_path):
    """`train … | head -1` ends with its checkpoint."""
    words = [*TINY, *SHORT, "--data_dir", data_dir, "--out_dir", tmp_path / "run"]
    program = Path(lm.__file__)
    command = shlex.join(map(str, [sys.executable, program, "train", *words]))
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {command} | head -1"], capture_output=True, text=True
    )
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    assert (tmp_path / "run" / "ckpt_last.pt").exists()


@pytest.mark.parametrize(
    "fault",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_memory_that_runs_out_is_a_sentence(fault, run, data_dir, monkeypatch):
    def fail(*_):
        raise fault

    monkeypatch.setattr(lm, "describe_data", fail)
    complaint(run(["info", data_dir]), "memory ran out", "--batch_size")


def test_another_runtime_error_is_a_bug(run, data_dir, monkeypatch):
    def fail(*_):
        raise RuntimeError("shapes differ")

    monkeypatch.setattr(lm, "describe_data", fail)
    with pytest.raises(RuntimeError, match="shapes differ"):
        run(["info", data_dir])


def test_an_argument_that_is_not_utf8_is_a_sentence(run):
    complaint(run(["generate", "--ckpt", "x", "--prompt", "caf\udce9"]), "not UTF-8")


def test_a_file_of_flags_may_begin_with_a_byte_order_mark(run, data_dir, tmp_path):
    flags = tmp_path / "flags.txt"
    flags.write_bytes(b"\xef\xbb\xbf--seq_len 32\r\n--preset 138m\r\n")
    code, told, err = run(["info", f"@{flags}"])
    assert code == 0 and "context 32" in told, err
