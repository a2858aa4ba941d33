"""What a run tells: its log, its cost, its speed, and the moment the loss is lost."""

import json
import math
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import SHORT, TINY, log_rows, read_pt

import standalone_transformer_lm as lm

KEYS = {
    "step",
    "tokens",
    "time",
    "train/loss",
    "train/grad_norm",
    "train/lr",
    "perf/tok_per_s",
    "perf/wall_tok_per_s",
    "perf/mfu",
}
VAL = {"val/loss", "val/ppl", "val/bpb"}


@pytest.fixture
def train(run, data_dir, tmp_path):
    """`train(*flags)` runs SHORT into tmp_path / "out": (exit code, stdout, stderr)."""
    return lambda *flags: run(
        ["train", *TINY, *SHORT, "--data_dir", data_dir, "--out_dir", tmp_path / "out", *flags]
    )


# ---- The log ----


def test_every_line_has_the_promised_keys(trained):
    rows = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 13))
    for row in rows:
        assert set(row) == KEYS | (VAL if row["step"] % 4 == 0 else set())
        assert row["tokens"] == row["step"] * 4 * 32
        assert row["perf/mfu"] is None and row["perf/tok_per_s"] > 0
    assert [row["time"] for row in rows] == sorted(row["time"] for row in rows)
    assert rows[-1]["val/ppl"] == pytest.approx(math.exp(rows[-1]["val/loss"]))
    assert rows[-1]["train/loss"] < rows[0]["train/loss"] - 0.5


def test_a_line_is_the_mean_since_the_line_before(train, trained, tmp_path):
    code, _, err = train("--log_interval", 5)
    assert code == 0, err
    single, rows = log_rows(trained), log_rows(tmp_path / "out")
    assert [row["step"] for row in rows if "train/loss" in row] == [5, 10, 12]
    assert [row["step"] for row in rows if "val/loss" in row] == [4, 8, 12]
    start = 0
    for row in (row for row in rows if "train/loss" in row):
        for key in ("train/loss", "train/grad_norm"):
            mean = sum(r[key] for r in single[start : row["step"]]) / (row["step"] - start)
            assert row[key] == pytest.approx(mean, rel=1e-5)
        start = row["step"]


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ('{"step": 1}\n{"step": 2}\n{"step": 3}\n', [1, 2]),
        ('{"step": 1}\n{"step": 2}\n{"step": 3, "train/lo', [1, 2]),
        ('{"step": 1}\n{"step": 2', [1]),
        ('{"step": 1}\n{"step": 2}', [1, 2]),
        ('{"step": 1}\n\n\x00\x00\x00\n[3]\n{"time": 4}\n{"step": null}\n{"step": 2}\n', [1, 2]),
        ("", []),
    ],
)
def test_cut_log_keeps_whole_lines_up_to_the_step(tmp_path, text, kept):
    path = tmp_path / "metrics.jsonl"
    path.write_text(text)
    lm.cut_log(path, 2)
    assert path.read_text() == "".join(f'{{"step": {step}}}\n' for step in kept)


def test_cut_log_survives_bytes_that_are_no_text(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n\xff\xfe\x80\n')
    lm.cut_log(path, 5)
    assert path.read_bytes() == b'{"step": 1}\n'
    lm.cut_log(tmp_path / "none.jsonl", 5)
    assert not (tmp_path / "none.jsonl").exists()


def test_resume_repeats_and_loses_no_line(train, trained, tmp_path):
    out = shutil.copytree(trained, tmp_path / "out")
    (out / "ckpt_last.pt").unlink()
    (out / "ckpt_00000012.pt").unlink()  # the run goes back to step 8, its log is at 12
    with (out / "metrics.jsonl").open("a") as file:
        file.write('{"step": 13, "train/loss": 1.')
    code, told, err = train()
    assert code == 0 and "after step 8" in told, err
    assert log_rows(out) == log_rows(trained)


# ---- Speed and money ----


def metrics(tmp_path, device="cpu", **flags):
    run = lm.RunSettings(out_dir=str(tmp_path), **flags)
    return lm.Metrics(tmp_path, run, lm.Machine(torch.device(device), torch.float32), 1000, {})


def test_mfu_says_unknown_where_it_is(tmp_path):
    gauge = metrics(tmp_path)
    gauge.add(1, torch.tensor(2.0), torch.tensor(1.0), 64)
    row = gauge.row(1e-3)
    assert row["perf/mfu"] is None and "mfu" not in gauge.note
    assert "cost/usd" not in row and "gpu/memory_gb" not in row


def test_mfu_is_flops_over_peak(tmp_path, monkeypatch):
    gauge = metrics(tmp_path)
    monkeypatch.setattr(lm, "peak_flops", lambda device: 1e6)
    gauge.add(1, torch.tensor(2.0), torch.tensor(1.0), 64)
    row = gauge.row(1e-3)
    assert row["perf/mfu"] == pytest.approx(row["perf/tok_per_s"] * 1000 / 1e6, rel=1e-2)
    assert f"mfu {row['perf/mfu']:.1%}" in gauge.note


@pytest.mark.parametrize(
    "name",
    [
        "NVIDIA RTX A4000",
        "NVIDIA RTX A1000 Laptop GPU",
        "NVIDIA T400",
        "NVIDIA RTX A3000 Laptop GPU",
        "NVIDIA GeForce GTX 1080",
    ],
)
def test_a_device_we_do_not_know_gets_no_made_up_peak(name, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert lm.peak_flops(torch.device("cuda", 0)) is None


def test_cost_is_time_times_price_and_goes_on_over_a_resume(train, tmp_path):
    assert train("--usd_per_hour", 3600, "--max_steps", 8)[0] == 0
    assert train("--usd_per_hour", 3600)[0] == 0
    lines = (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert [row["step"] for row in rows] == list(range(1, 13))
    costs = [row["cost/usd"] for row in rows]
    assert costs == sorted(costs) and costs[0] > 0
    assert all(row["cost/usd"] == pytest.approx(row["time"], abs=0.5) for row in rows)


def test_time_aside_is_not_training_time(tmp_path, monkeypatch):
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(lm.time, "monotonic", lambda: clock.now)
    gauge = metrics(tmp_path)
    clock.now += 2
    with gauge.aside():
        clock.now += 50
    gauge.add(1, torch.tensor(2.0), torch.tensor(1.0), 64)
    assert gauge.row(1e-3)["perf/tok_per_s"] == pytest.approx(32)
    assert gauge.elapsed() == pytest.approx(52)


# ---- A loss that is no number ----


def spoiled_at(step, spoil):
    """pretrain_loss, spoiled from its `step`-th micro-batch on in training."""
    calls, honest = [], lm.pretrain_loss

    def loss(model, ids, targets, z_loss=0.0):
        value = honest(model, ids, targets, z_loss)
        if model.training:
            calls.append(1)
            return spoil(value) if len(calls) >= step else value
        return value

    return loss


def nan_gradient(value):
    """The same loss, whose gradient is no number."""
    return Broken.apply(value)


class Broken(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value):
        return value.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * math.nan


@pytest.mark.parametrize(
    "spoil",
    [lambda v: v * math.nan, lambda v: v * math.inf, nan_gradient],
    ids=["nan", "inf", "nan gradient"],
)
def test_a_lost_loss_stops_and_saves_nothing_bad(train, tmp_path, monkeypatch, spoil):
    monkeypatch.setattr(lm, "pretrain_loss", spoiled_at(6, spoil))
    code, _, err = train("--log_interval", 100)
    assert code == 2 and err.count("error:") == 1 and "NaN or infinite" in err
    assert "--lr" in err and "Traceback" not in err
    for path in (tmp_path / "out").glob("ckpt_*.pt"):
        assert all(w.isfinite().all() for w in read_pt(path)["model"].values()), path
    assert read_pt(tmp_path / "out" / "ckpt_last.pt")["step"] == 4


def test_the_log_stays_json_when_the_loss_is_lost(train, tmp_path, monkeypatch):
    monkeypatch.setattr(lm, "pretrain_loss", spoiled_at(6, lambda value: value * math.nan))
    assert train("--log_interval", 100)[0] == 2
    assert "NaN" not in (tmp_path / "out" / "metrics.jsonl").read_text()


# ---- Services ----


@pytest.mark.parametrize(
    ("flags", "module", "package"),
    [
        (["--wandb", "p"], "wandb", "wandb"),
        (["--tensorboard"], "torch.utils.tensorboard", "tensorboard"),
    ],
)
def test_a_missing_service_is_one_sentence(train, monkeypatch, flags, module, package):
    monkeypatch.setitem(sys.modules, module, None)
    code, _, err = train(*flags)
    assert code == 2 and err.count("error:") == 1 and "Traceback" not in err
    assert f"pip install {package}\n" in err


def test_wandb_gets_every_row_at_its_step(train, tmp_path, monkeypatch):
    asked, logged = [], []

    def init(**kwargs):
        asked.append(kwargs)
        return SimpleNamespace(log=lambda row, step: logged.append((step, row["step"])))

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    assert train("--wandb", "project", "--max_steps", 8)[0] == 0
    assert train("--wandb", "project")[0] == 0
    assert logged == [(step, step) for step in range(1, 13)]
    assert asked[0]["project"] == "project" and asked[0]["id"] == asked[1]["id"]
    told = asked[0]["config"]  # of every group: run, data, model, optimiser, device
    assert {"max_steps", "data_dir", "n_layer", "vocab_size", "lr", "seed"} <= {*told}
    assert told["lr"] > 0 and told["max_steps"] == 8


def test_a_text_with_line_separators_of_unicode_survives_a_resume(tmp_path):
    log = tmp_path / "samples.jsonl"
    rows = [{"step": 1, "answer": f"a{end}b"} for end in "\u2028\u2029\x85"]
    log.write_text("".join(lm.json_line(row) for row in rows), encoding="utf-8")
    lm.cut_log(log, 1)
    kept = log.read_text(encoding="utf-8").split("\n")[:-1]
    assert [json.loads(line) for line in kept] == rows


def test_wandb_without_a_key_is_one_sentence(train, monkeypatch):
    class Fault(Exception):
        pass

    def init(**_):
        raise Fault("api_key not configured (no-tty). call wandb login\nmore")

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init, Error=Fault))
    code, _, err = train("--wandb", "project")
    assert code == 2 and "Traceback" not in err
    assert "api_key not configured" in err and "wandb login" in err and "more" not in err


def test_the_loss_that_is_shown_is_of_the_last_steps(tmp_path):
    """Between two rows of the log too, where --log_interval is long."""
    machine = lm.Machine(torch.device("cpu"), torch.float32, 0, 1)
    run = lm.RunSettings(out_dir=str(tmp_path), max_steps=100, log_interval=1000)
    metrics = lm.Metrics(tmp_path, run, machine, 1, {})
    for step in range(1, 41):
        metrics.noted -= lm.LINE_EVERY_S  # so much time goes by
        metrics.add(step, torch.tensor(1.0 if step < 21 else 0.0), torch.tensor(1.0), 4)
        wanted = min(step, 20) / step
        assert metrics.note.startswith(f"loss {wanted:.4f} ")
