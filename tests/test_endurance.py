"""Whatever happens to a run: faults of numbers, memory, disks, machines and its own flags."""

import json
import math
import os
import resource
import shutil
import signal
import subprocess
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import test_distributed
import torch
from conftest import SHORT, TINY, complaint, log_rows, read_pt, signal_at, weight_bytes
from test_distributed import STEADY, torchrun, two

import standalone_transformer_lm as lm

grpo = test_distributed.grpo  # a fixture


def argv(data_dir, out, *more):
    return ["train", *TINY, *SHORT, "--data_dir", data_dir, "--out_dir", out, *more]


def events(out, kind=""):
    path = Path(out) / "events.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [row for row in rows if kind in ("", row["event"])]


def spoil_steps(program, steps, value=math.nan):
    """The loss of the micro-batches of these calls in training, counted from 1, is no number."""
    honest, calls = program.pretrain_loss, []

    def loss(model, ids, targets, z_loss=0.0):
        found = honest(model, ids, targets, z_loss)
        if model.training:
            calls.append(1)
            if len(calls) in steps:
                return found * value
        return found

    program.pretrain_loss = loss


@pytest.fixture
def spoiled(monkeypatch):
    """`spoiled(steps)` as spoil_steps, until the test ends."""
    monkeypatch.setattr(lm, "pretrain_loss", lm.pretrain_loss)
    return lambda steps, value=math.nan: spoil_steps(lm, steps, value)


# ---- Numbers ----


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_step_without_a_finite_gradient_changes_nothing(
    run, data_dir, tmp_path, spoiled, optimizer, value
):
    spoiled({6}, value)
    flags = ["--optimizer", optimizer, "--ckpt_interval", 1, "--keep_last", 20]
    code, told, err = run(argv(data_dir, tmp_path / "out", *flags))
    assert code == 0, err
    before, after, later = (read_pt(tmp_path / "out" / f"ckpt_{step:08d}.pt") for step in (5, 6, 7))
    for name, weight in before["model"].items():
        assert torch.equal(weight, after["model"][name]), name
        assert not torch.equal(weight, later["model"][name]), name
    for old, new in zip(before["optim"], after["optim"], strict=True):
        for place, state in old["state"].items():
            for name, moment in state.items():
                assert torch.equal(moment, new["state"][place][name]), name
    rows = log_rows(tmp_path / "out")
    assert [row.get("train/skipped") for row in rows].count(1) == 1
    assert rows[5]["train/skipped"] == 1 and "train/loss" not in rows[5]
    assert math.isfinite(rows[6]["train/loss"])
    (fault,) = events(tmp_path / "out", "skipped")
    assert fault["step"] == 6 and fault["samples"] == [20, 24]
    assert "1 steps skipped" in told


def test_a_few_faults_end_no_run(run, data_dir, tmp_path, spoiled):
    spoiled({2, 5, 7, 11, 12})
    code, told, err = run(argv(data_dir, tmp_path / "out"))
    assert code == 0 and "5 steps skipped" in told, err
    assert not events(tmp_path / "out", "back")


def test_too_many_faults_go_back_and_on_past_the_data(run, data_dir, tmp_path, spoiled):
    spoiled(set(range(6, 12)))
    code, told, err = run(argv(data_dir, tmp_path / "out"))
    assert code == 0, err
    (back,) = events(tmp_path / "out", "back")
    assert back["to"] == 4 and "going back to step 4" in told
    saved = read_pt(tmp_path / "out" / "ckpt_last.pt")
    assert saved["step"] == 12 and saved["samples"] == 11 * 4 + 8 * 4, "what was seen is passed"
    assert [row["step"] for row in log_rows(tmp_path / "out")] == list(range(1, 13))
    assert not any("train/skipped" in row for row in log_rows(tmp_path / "out"))


def test_a_run_that_goes_wrong_again_and_again_keeps_its_last_good_state(
    run, data_dir, tmp_path, spoiled
):
    spoiled(set(range(7, 1000)))
    out = tmp_path / "out"
    result = run(argv(data_dir, out, "--max_steps", 40))
    complaint(result, "NaN or infinite", "3 times back", "--lr")
    assert len(events(out, "back")) == 3
    assert read_pt(out / "ckpt_last.pt")["step"] == 4
    assert [p.name for p in lm.numbered(out)] == ["ckpt_00000004.pt"]
    assert run(argv(data_dir, out, "--max_steps", 12))[0] == 2, "the loss is still spoilt"


def test_without_a_checkpoint_there_is_nothing_to_go_back_to(run, data_dir, tmp_path):
    """A rate of 1e9, which was noticed at step 10 with nothing left."""
    result = run(argv(data_dir, tmp_path / "out", "--lr", "1e30", "--max_steps", 30))
    complaint(result, "no checkpoint from before", "lower --lr")


def test_a_spike_is_written_down_with_its_samples(run, data_dir, tmp_path, spoiled):
    spoiled({50}, 40.0)
    out = tmp_path / "out"
    code, told, err = run(argv(data_dir, out, "--max_steps", 60, "--log_interval", 7))
    assert code == 0, err
    (spike,) = events(out, "spike")
    assert spike["step"] == 50 and spike["samples"] == [196, 200]
    assert spike["deviations"] > lm.SPIKE_Z and spike["loss"] > 40
    assert "1 spikes" in told


def test_deviations_are_robust():
    rng = np.random.default_rng(0)
    before = [*rng.normal(3.0, 0.5, 100), 1e6, 1e9]
    assert lm.robust_z(3.0, before) == pytest.approx(0, abs=0.3)
    assert lm.robust_z(5.0, before) == pytest.approx(4.0, abs=1.0)
    assert lm.robust_z(1.1, [1.0] * 50) == pytest.approx(2.0), "a deviation is at least 5%"
    watch = lm.FaultWatch()
    steps = [lm.StepFigures(i, 4 * i, 4, float(x), 1.0) for i, x in enumerate(before[:100])]
    assert not watch.look(steps)
    assert [one.kind for one in watch.look([steps[0]._replace(loss=math.nan)])] == ["skipped"]
    assert [one.kind for one in watch.look([steps[0]._replace(norm=3.0)])] == ["spike"]
    assert not watch.too_many(100)


def test_steps_without_a_gradient_make_no_spike_of_the_others():
    watch = lm.FaultWatch()
    rows = []
    for step in range(400):  # as grpo on a hard task: one step in ten has something to learn from
        learns = step % 10 == 9
        rows.append(lm.StepFigures(step, step, 1, 0.1 * learns, (0.5 + step % 3 / 10) * learns))
    assert not watch.look(rows)
    assert watch.look([lm.StepFigures(400, 400, 1, 0.1, 500.0)])


def far_off(step, loss=2.0, norm=0.5):
    return lm.StepFigures(step, 8 * step, 8, loss, norm)


@pytest.mark.parametrize(
    ("bad", "back"),
    [
        ({"norm": 50.0}, None),  # clipped: the loss stays as it was
        ({"loss": 9.0}, None),  # every tenth step, as on a few rows learned by heart
        ({"loss": math.nan}, 100),
    ],
)
def test_single_spikes_end_no_run(bad, back):
    watch = lm.FaultWatch()
    steps = [far_off(step, 2.0 + step % 3 / 100) for step in range(100)]
    assert not watch.look(steps)
    found = watch.look(far_off(step, **bad) for step in range(100, 190, 10))
    assert len(found) == 9
    first = watch.too_many(190)
    assert first == back or first.figures.step == back


def test_a_loss_that_stays_high_goes_back():
    watch = lm.FaultWatch()
    watch.look(far_off(step) for step in range(100))
    watch.look(far_off(step, 3.0) for step in range(100, 106))
    assert watch.too_many(106).figures.step == 100
    assert watch.too_many(121) is None


def test_a_loss_near_0_may_rise_where_a_warm_up_begins_anew():
    """As sft does on rows that it knew by heart: 0.003 to 0.3, and back."""
    watch = lm.FaultWatch()
    watch.look(far_off(step, 0.003) for step in range(40))
    assert len(watch.look(far_off(step, 0.3) for step in range(40, 60))) == 20
    assert watch.too_many(60) is None


def test_small_losses_may_rise_by_little():
    watch = lm.FaultWatch()
    watch.look(far_off(step, 0.001 + step % 3 / 1e4) for step in range(100))
    assert not watch.look([far_off(100, 0.05)])
    assert watch.look([far_off(101, 0.5)])


def test_nan_on_one_rank_skips_the_step_on_both(child, data_dir, tmp_path):
    out = tmp_path / "out"
    flags = argv(data_dir, out, *STEADY, "--batch_size", 4, "--optimizer", "muon")
    for code, told in two(child, flags, (spoil_steps, {6})):
        assert code == 0, told
    ranks = [torch.load(out / f"rank{rank}.weights") for rank in range(2)]
    assert all(torch.equal(ranks[0][name], ranks[1][name]) for name in ranks[0])
    assert [row["step"] for row in events(out, "skipped")] == [6]


# ---- Memory ----


def short_of_memory(program, calls, most):
    """The objective runs out of memory in these calls, where it gets more than `most` rows."""
    forward, made = program.Objective.forward, []

    def tight(self, *batch, **more):
        made.append(1)
        if len(made) in calls and len(batch[0]) > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return forward(self, *batch, **more)

    program.Objective.forward = tight


@pytest.fixture
def tight(monkeypatch):
    monkeypatch.setattr(lm.Objective, "forward", lm.Objective.forward)
    return lambda calls, most: short_of_memory(lm, calls, most)


def same_losses(out, wanted, tolerance=1e-5):
    for a, b in zip(log_rows(out), log_rows(wanted), strict=True):
        for key in ("train/loss", "val/loss", "train/grad_norm"):
            assert a.get(key) == pytest.approx(b.get(key), abs=tolerance), (a["step"], key)


STILL = ["--dropout", "0"]


def test_a_step_short_of_memory_is_repeated_in_halves(run, data_dir, tmp_path, tight):
    assert run(argv(data_dir, tmp_path / "whole", *STILL))[0] == 0
    tight({3}, 3)
    code, told, err = run(argv(data_dir, tmp_path / "out", *STILL))
    assert code == 0, err
    assert "micro-batches of 2 instead of 4" in told and "1 times out of memory" in told
    same_losses(tmp_path / "out", tmp_path / "whole")
    assert read_pt(tmp_path / "out" / "ckpt_last.pt")["samples"] == 48


def test_memory_may_run_out_in_the_middle_of_the_backward_pass(
    run, data_dir, tmp_path, monkeypatch
):
    """What was added to the gradients until then must not be added again."""
    assert run(argv(data_dir, tmp_path / "whole", *STILL))[0] == 0
    calls, backward = [], torch.Tensor.backward

    def late(tensor, *args, **kwargs):
        backward(tensor, *args, **kwargs)
        calls.append(1)
        if len(calls) in (3, 9):
            raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(torch.Tensor, "backward", late)
    code, told, err = run(argv(data_dir, tmp_path / "out", *STILL))
    assert code == 0, err
    assert [row["batch_size"] for row in events(tmp_path / "out", "memory")] == [2, 1]
    same_losses(tmp_path / "out", tmp_path / "whole")


def test_one_row_that_does_not_fit_is_a_sentence(run, data_dir, tmp_path, tight):
    tight(set(range(1, 1000)), 0)
    result = run(argv(data_dir, tmp_path / "out"))
    complaint(result, "one sample of --seq_len 32", "not divided among devices", "--zero 3")


def test_one_rank_short_of_memory_halves_the_batches_of_both(child, data_dir, tmp_path, run):
    flags = argv(data_dir, tmp_path / "alone", *STEADY, *STILL, "--batch_size", 8)
    assert run(flags)[0] == 0
    out = tmp_path / "out"
    flags = argv(data_dir, out, *STEADY, *STILL, "--batch_size", 4)
    (code, told), (other, _) = two(child, flags, (short_of_memory, {3}, 2))
    assert code == other == 0, told
    assert "micro-batches of 2 instead of 4" in told
    same_losses(out, tmp_path / "alone")


@pytest.mark.parametrize(
    ("tensors", "groups"),
    [
        ([(6, 5), (6, 5)], [3, 3]),
        ([(5, 4), (5, 4)], [2, 3]),
        ([(10, 4), (10, 4), (5, 2)], [2, 3]),
    ],
)
def test_halves_keep_groups_together(tensors, groups):
    micro = tuple(torch.arange(math.prod(shape)).view(shape) for shape in tensors)
    parts = lm.halves(micro)
    each = len(micro[0]) // sum(groups)
    assert [len(part[0]) // each for part in parts] == groups
    for i, whole in enumerate(micro):
        assert torch.equal(torch.cat([part[i] for part in parts]), whole)
    assert lm.halves(tuple(t[:each] if t.shape[0] > 5 else t[:1] for t in micro))[1:] == []


def test_halves_share_their_prompts():
    ids, prompts, owners = (
        torch.arange(12).view(4, 3),
        torch.zeros(2, 7),
        torch.tensor([0, 1, 0, 1]),
    )
    first, second = lm.halves((ids, ids, prompts, owners))
    assert first[2] is prompts and second[2] is prompts
    assert first[3].tolist() == [0, 1] and torch.equal(second[0], ids[2:])


def test_an_evaluation_short_of_memory_gives_the_same_figures(run, data_dir, tmp_path, tight):
    flags = ["--max_steps", 4, *STILL]
    assert run(argv(data_dir, tmp_path / "whole", *flags))[0] == 0
    tight(set(range(5, 100)), 1)
    code, _, err = run(argv(data_dir, tmp_path / "out", *flags))
    assert code == 0, err
    same_losses(tmp_path / "out", tmp_path / "whole")
    assert not events(tmp_path / "out", "memory")


def short_of_rows(monkeypatch, owner, name, most):
    """A function of the program runs out of memory where its first list is longer than `most`."""
    honest = getattr(owner, name)

    def tight(self, rows, *more):
        if len(rows) > most:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return honest(self, rows, *more)

    monkeypatch.setattr(owner, name, tight)


def test_generation_short_of_memory_draws_the_same(monkeypatch):
    model = lm.Transformer(
        lm.ModelSettings(seq_len=64, n_layer=2, d_model=32, n_head=4, vocab_size=97)
    )
    model.init_weights(0)
    model.eval().requires_grad_(False)
    prompts = [[1, 5 + i, 9] for i in range(7)]
    settings = lm.SamplingSettings(12, temperature=1.0)
    logps = [[] for _ in prompts]
    whole = lm.complete(model, prompts, settings, 3, logps=logps)
    short_of_rows(monkeypatch, lm.Decoder, "begin", 2)
    again = [[] for _ in prompts]
    assert lm.complete(model, prompts, settings, 3, logps=again) == whole
    for a, b in zip(again, logps, strict=True):
        assert a == pytest.approx(b, abs=1e-5)
    short_of_rows(monkeypatch, lm.Decoder, "begin", 0)
    with pytest.raises(torch.OutOfMemoryError):
        lm.complete(model, prompts, settings, 3)


def test_scoring_short_of_memory_finds_the_same(monkeypatch, trained):
    saved = lm.load_checkpoint(trained)
    machine = lm.Machine(torch.device("cpu"), torch.float32)
    model, tokenizer = lm.build_model(saved, machine.device), lm.tokenizer_of(saved, "", "x")
    one = lm.Candidate("x", "x", model, tokenizer, machine, False, 8)
    pairs = [([1, 5, 6], [7, 8 + i]) for i in range(20)]
    whole = one.score(pairs)
    short_of_rows(monkeypatch, lm.Candidate, "score_rows", 3)
    found = one.score(pairs)
    assert [scored.logp for scored in found] == pytest.approx([one.logp for one in whole])


# ---- Disks ----


def refusing(times, number=None):
    """save_checkpoint of a disk that is full the first `times` times."""
    real, left = lm.save_checkpoint, [times]

    def save(path, checkpoint):
        if left[0]:
            left[0] -= 1
            raise OSError(number or lm.errno.ENOSPC, "No space left on device", str(path))
        real(path, checkpoint)

    return save


def test_a_full_disk_costs_no_step(run, data_dir, tmp_path, monkeypatch, trained):
    monkeypatch.setattr(lm, "save_checkpoint", refusing(1))
    code, told, err = run(argv(data_dir, tmp_path / "out"))
    assert code == 0, err
    assert "no space left" in told and "training goes on" in told
    for name in ("ckpt_last.pt", "ckpt_best.pt", "ckpt_00000012.pt"):
        assert weight_bytes(tmp_path / "out" / name) == weight_bytes(trained / name), name


def test_a_disk_that_stays_full_is_a_sentence_at_the_end(run, data_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(lm, "save_checkpoint", refusing(10**9))
    monkeypatch.setattr(lm, "PATIENCE_S", 0.5)
    complaint(run(argv(data_dir, tmp_path / "out")), "no space left", "free some space")
    assert [row["step"] for row in log_rows(tmp_path / "out")] == list(range(1, 13))


def test_a_refused_best_checkpoint_is_not_lost_to_a_newer_one(tmp_path):
    writer, written, full = lm.Writer(), [], [True]

    def work(name):
        if full[0]:
            raise OSError(lm.errno.ENOSPC, "full")
        written.append(name)

    for name, best in (("a", False), ("best", True), ("b", False), ("c", False)):
        writer.submit(work, name, best=best)
        while not writer.fault:
            time.sleep(0.01)
    full[0] = False
    writer.wait()
    assert written == ["best", "c"]


def test_what_is_being_written_is_finished_where_another_fault_ends_the_run(
    run, data_dir, tmp_path, monkeypatch
):
    real, step_batch = lm.save_checkpoint, lm.Trainer.step_batch

    def slow(path, checkpoint):
        time.sleep(1.0)
        real(path, checkpoint)

    def lost(trainer, first):
        if first >= 20:
            raise lm.UserError("the data is gone", "bring it back")
        return step_batch(trainer, first)

    monkeypatch.setattr(lm, "save_checkpoint", slow)
    monkeypatch.setattr(lm.Trainer, "step_batch", lost)
    complaint(run(argv(data_dir, tmp_path / "out")), "the data is gone")
    assert read_pt(tmp_path / "out" / "ckpt_last.pt")["step"] == 4


def test_a_bug_in_writing_is_no_full_disk():
    writer = lm.Writer()
    writer.submit(lambda: {}["missing"])
    with pytest.raises(KeyError):
        writer.wait()


def test_logs_that_cannot_be_written_end_no_run(run, data_dir, tmp_path, monkeypatch, trained):
    real = lm.Path.open

    def refused(path, mode="r", *args, **kwargs):
        if path.name == "metrics.jsonl" and "a" in mode and len(steps) < 6:
            steps.append(1)
            raise OSError(lm.errno.ENOSPC, "No space left on device", str(path))
        return real(path, mode, *args, **kwargs)

    steps = []
    monkeypatch.setattr(lm.Path, "open", refused)
    code, told, err = run(argv(data_dir, tmp_path / "out"))
    assert code == 0 and told.count("cannot be written") == 1, err
    assert log_rows(tmp_path / "out") == log_rows(trained)


def test_a_log_line_cut_short_is_not_doubled(tmp_path, monkeypatch):
    monkeypatch.setattr(lm, "say", lambda *_: None)  # pytest keeps what is said in a file too
    log = lm.LogFile(tmp_path / "log.jsonl")
    log.write({"step": 1})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30, limits[1]))
    try:
        log.write({"step": 2, "text": "x" * 100})
        log.write({"step": 3})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    log.write({"step": 4})
    steps = [json.loads(line)["step"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4]


def remove_folder(program, step):
    """The run's folder is removed when so many steps are done."""
    count = program.Trainer.count_step

    def counted(trainer):
        count(trainer)
        if trainer.step == step:
            shutil.rmtree(trainer.out)

    program.Trainer.count_step = counted


def test_a_folder_that_is_removed_is_made_again(run, data_dir, tmp_path, monkeypatch, trained):
    monkeypatch.setattr(lm.Trainer, "count_step", lm.Trainer.count_step)
    remove_folder(lm, 6)
    out = tmp_path / "out"
    code, _, err = run(argv(data_dir, out))
    assert code == 0, err
    assert weight_bytes(out / "ckpt_last.pt") == weight_bytes(trained / "ckpt_last.pt")
    wanted = (trained / "args.txt").read_text().replace(str(trained), str(out))
    assert (out / "args.txt").read_text() == wanted
    assert [row["step"] for row in log_rows(out)] == list(range(6, 13))


def test_a_data_file_cut_short_under_a_run_is_a_sentence(child, data_dir, tmp_path):
    """A memory map would have ended it with SIGBUS and no word."""
    data = shutil.copytree(data_dir, tmp_path / "data")
    code, told = child(argv(data, tmp_path / "out"), (truncate_at, str(data), 5)).end()
    assert code == 2 and "train.bin has changed" in told and "Traceback" not in told
    assert read_pt(tmp_path / "out" / "ckpt_last.pt")["step"] == 4


def truncate_at(program, data, step):
    count = program.Trainer.count_step

    def counted(trainer):
        count(trainer)
        if trainer.step == step:
            os.truncate(f"{data}/train.bin", 1000)

    program.Trainer.count_step = counted


# ---- One run a folder ----


def wait_at(program, step, path):
    """The run waits behind a step until a file is there."""
    count = program.Trainer.count_step

    def counted(trainer):
        count(trainer)
        while trainer.step == step and not os.path.exists(path):
            time.sleep(0.05)

    program.Trainer.count_step = counted


def until(true, seconds=60):
    ends = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < ends, "it never came true"
        time.sleep(0.05)


def test_a_second_run_in_a_folder_is_refused(child, run, data_dir, tmp_path, monkeypatch, trained):
    monkeypatch.setattr(lm, "LOCK_WAIT_S", 0.3)
    out, go = tmp_path / "out", tmp_path / "go"
    first = child(argv(data_dir, out), (wait_at, 6, str(go)))
    until(lambda: (out / "ckpt_00000004.pt").exists())
    result = run(argv(data_dir, out))
    complaint(result, "another run is at work", str(first.process.pid), "--out_dir")
    go.touch()
    code, told = first.end()
    assert code == 0, told
    assert log_rows(out) == log_rows(trained)
    assert not (out / ".lock").exists()


def test_a_run_that_was_killed_holds_nothing(child, run, data_dir, tmp_path):
    out = tmp_path / "out"
    code, _ = child(argv(data_dir, out), (signal_at, "seed_step", 6)).end()
    assert code == -signal.SIGKILL and (out / ".lock").exists()
    assert run(argv(data_dir, out))[0] == 0


def test_a_refused_run_leaves_no_empty_folder(run, data_dir, tmp_path):
    complaint(run(argv(data_dir, tmp_path / "out", "--mirror", "nowhere://x")), "nowhere")
    assert not (tmp_path / "out").exists()


# ---- A second place ----


def test_a_fresh_machine_goes_on_from_the_mirror(child, run, data_dir, tmp_path, trained):
    out, mirror = tmp_path / "out", tmp_path / "mirror"
    flags = argv(data_dir, out, "--mirror", mirror)
    code, told = child(flags, (signal_at, "seed_step", 10, signal.SIGTERM)).end()
    assert code == 128 + signal.SIGTERM, told
    shutil.rmtree(out)
    code, told, err = run(flags)
    assert code == 0, err
    assert "fetched ckpt_0000001" in told
    for name in ("ckpt_last.pt", "ckpt_best.pt"):
        assert weight_bytes(out / name) == weight_bytes(trained / name), name
    assert log_rows(out) == log_rows(trained)
    kept = {path.name for path in mirror.iterdir()}
    assert {"ckpt_00000012.pt", "ckpt_best.pt", "args.txt", "metrics.jsonl"} <= kept
    assert len([name for name in kept if lm.NUMBERED.fullmatch(name)]) == 2
    assert lm.load_checkpoint(mirror)["step"] == read_pt(out / "ckpt_best.pt")["step"]


def test_a_mirror_that_is_behind_is_not_gone_back_to(run, data_dir, tmp_path, trained):
    out, mirror = shutil.copytree(trained, tmp_path / "out"), tmp_path / "mirror"
    shutil.copytree(trained, mirror)
    (mirror / "ckpt_00000012.pt").unlink()
    code, told, err = run(argv(data_dir, out, "--mirror", mirror))
    assert code == 0 and "fetched" not in told, err
    assert (mirror / "ckpt_00000012.pt").exists()


def test_a_damaged_copy_is_passed_over(run, data_dir, tmp_path, trained):
    mirror = shutil.copytree(trained, tmp_path / "mirror")
    data = (mirror / "ckpt_00000012.pt").read_bytes()
    (mirror / "ckpt_00000012.pt").write_bytes(data[: len(data) // 2])
    out = tmp_path / "out"
    code, told, err = run(argv(data_dir, out, "--mirror", mirror))
    assert code == 0, err
    assert "fetched ckpt_00000008.pt" in told and "trying the one before it" in told
    assert weight_bytes(out / "ckpt_last.pt") == weight_bytes(trained / "ckpt_last.pt")


def test_a_url_is_a_mirror_too(run, data_dir, tmp_path, trained):
    fsspec = pytest.importorskip("fsspec")
    files = fsspec.filesystem("memory")
    files.store.clear()
    out, flags = tmp_path / "out", ["--mirror", "memory://bucket/run"]
    assert run(argv(data_dir, out, *flags, "--max_steps", 8))[0] == 0
    names = {path.rpartition("/")[2] for path in files.ls("/bucket/run", detail=False)}
    assert {"ckpt_00000008.pt", "ckpt_best.pt", "args.txt"} <= names
    shutil.rmtree(out)
    code, told, err = run(argv(data_dir, out, *flags, "--max_steps", 8))
    assert code == 0 and "fetched ckpt_00000008.pt" in told, err


class Gone(lm.FolderPlace):
    """A place that answers to nothing for its first calls."""

    calls = 0

    def put(self, file, name):
        Gone.calls += 1
        if Gone.calls < 4:
            raise ConnectionError("the bucket is gone")
        super().put(file, name)


def test_a_mirror_that_is_gone_for_a_while_ends_no_run(
    run, data_dir, tmp_path, monkeypatch, trained
):
    monkeypatch.setattr(lm, "FolderPlace", Gone)
    monkeypatch.setattr(Gone, "calls", 0)
    out, mirror = tmp_path / "out", tmp_path / "mirror"
    flags = argv(data_dir, out, "--mirror", mirror, "--ckpt_interval", 1)
    code, told, err = run(flags)
    assert code == 0, err
    assert "the bucket is gone" in told and "training goes on" in told
    assert weight_bytes(out / "ckpt_last.pt") == weight_bytes(trained / "ckpt_last.pt")


class Stuck(lm.FolderPlace):
    """A place that never answers."""

    def put(self, file, name):
        threading.Event().wait()


def test_a_mirror_that_hangs_holds_up_no_step(run, data_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(lm, "FolderPlace", Stuck)
    monkeypatch.setattr(lm, "MIRROR_WAIT_S", 0.2)
    code, told, err = run(argv(data_dir, tmp_path / "out", "--mirror", tmp_path / "mirror"))
    assert code == 0 and "lacks the newest files" in told, err


def test_a_mirror_that_cannot_be_read_begins_no_new_run(run, data_dir, tmp_path, monkeypatch):
    """It would be written over the run that is there."""
    (tmp_path / "file").write_text("no folder")
    result = run(argv(data_dir, tmp_path / "out", "--mirror", tmp_path / "file"))
    complaint(result, "--mirror", "cannot be read")


# ---- Preemption ----


def test_max_hours_ends_as_a_signal_does(run, data_dir, tmp_path, trained):
    out = tmp_path / "out"
    code, told, err = run(argv(data_dir, out, "--max_hours", 1e-9))
    assert code == 128 + signal.SIGTERM, err
    assert "resume with" in told and "--max_hours" not in (out / "args.txt").read_text()
    assert read_pt(out / "ckpt_last.pt")["step"] == 1
    assert run(argv(data_dir, out))[0] == 0
    assert weight_bytes(out / "ckpt_last.pt") == weight_bytes(trained / "ckpt_last.pt")


def test_ckpt_minutes_saves_between_intervals(run, data_dir, tmp_path, monkeypatch, trained):
    monkeypatch.setattr(lm, "FIRST_CKPT_S", 0.0)
    out = tmp_path / "out"
    flags = ["--ckpt_interval", 100, "--ckpt_minutes", 1e-9, "--keep_last", 100]
    assert run(argv(data_dir, out, *flags))[0] == 0
    assert len(lm.numbered(out)) == 12
    assert weight_bytes(out / "ckpt_last.pt") == weight_bytes(trained / "ckpt_last.pt")
    assert run(argv(data_dir, tmp_path / "off", *flags, "--ckpt_minutes", 0))[0] == 0
    assert len(lm.numbered(tmp_path / "off")) == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_to_one_rank_is_one_checkpoint_of_all(child, data_dir, tmp_path, number):
    out = tmp_path / "out"
    flags = argv(data_dir, out, *STEADY)
    codes = [code for code, _ in two(child, flags, (signal_at, "seed_step", 6, number))]
    assert codes[1] == 128 + number and codes[0] == 128 + signal.SIGTERM
    assert read_pt(out / "ckpt_last.pt")["step"] in (6, 7)
    assert len(log_rows(out)) == read_pt(out / "ckpt_last.pt")["step"] // 2


def sleep_at(program, step):
    count = program.Trainer.count_step

    def counted(trainer):
        count(trainer)
        if trainer.step == step:
            time.sleep(600)

    program.Trainer.count_step = counted


def test_a_stalled_run_shows_its_stacks_and_ends(child, data_dir, tmp_path):
    out = tmp_path / "out"
    code, told = child(argv(data_dir, out, "--stall_minutes", 0.05), (sleep_at, 6)).end()
    assert code == 1 and "Timeout" in told and "in counted" in told and "Thread" in told
    assert read_pt(out / "ckpt_last.pt")["step"] == 4


def test_the_watch_over_a_stall_ends_with_the_run(run, data_dir, tmp_path):
    cancelled = []
    real = lm.faulthandler.cancel_dump_traceback_later
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            lm.faulthandler, "cancel_dump_traceback_later", lambda: cancelled.append(real())
        )
        assert run(argv(data_dir, tmp_path / "out"))[0] == 0
    assert cancelled


# ---- Changed flags ----


def test_changed_flags_are_in_the_log(run, data_dir, tmp_path, trained):
    out = shutil.copytree(trained, tmp_path / "out")
    assert run(argv(data_dir, out, "--max_steps", 13, "--lr", 5e-3))[0] == 0
    (changed,) = events(out, "changed")
    assert changed["step"] == 12 and "lr 0.01 → 0.005" in changed["flags"]
    assert changed["told"].startswith("changed since step 12: ")


WSD = ["--schedule", "wsd", "--decay_share", "0.5", *STILL]


def test_a_run_is_branched_from_before_its_decay(run, data_dir, tmp_path):
    """And the branch is the longer run that it might have been."""
    out, longer = tmp_path / "out", tmp_path / "out-longer"
    assert run(argv(data_dir, out, *WSD))[0] == 0
    assert read_pt(out / lm.STABLE)["step"] == 6
    assert len(lm.numbered(out)) == 2 and lm.numbered(out)[1].name == "ckpt_00000008.pt"
    result = run(argv(data_dir, out, *WSD, "--max_steps", 20, "--resume", 0))
    complaint(result, "already holds a run")
    code, told, err = run(argv(data_dir, out, *WSD, "--max_steps", 20))
    assert code == 0 and "had begun to fall at step 6 of 12; of 20 steps it falls from 10" in told
    command = [line.strip() for line in told.split("\n") if "mkdir" in line or "train @" in line]
    mkdir, train = command
    shutil.rmtree(out)
    assert run(argv(data_dir, out, *WSD))[0] == 0
    subprocess.run(mkdir, shell=True, check=True)
    words = train.split()[2:]
    code, _, err = run(words)
    assert code == 0, err
    assert run(argv(data_dir, tmp_path / "direct", *WSD, "--max_steps", 20))[0] == 0
    names = ("ckpt_last.pt", "ckpt_00000016.pt")
    for name in names:
        assert weight_bytes(longer / name) == weight_bytes(tmp_path / "direct" / name)


def test_more_steps_before_the_decay_need_no_word(run, data_dir, tmp_path):
    out = tmp_path / "out"
    assert run(argv(data_dir, out, *WSD, "--max_hours", 1e-9))[0] == 143
    code, told, _ = run(argv(data_dir, out, *WSD, "--max_steps", 20))
    assert code == 0 and "had begun to fall" not in told


# ---- Reinforcement learning ----


@pytest.mark.parametrize("shared", [0, 1])
@pytest.mark.parametrize("algo", ["grpo", "ppo"])
def test_an_update_short_of_memory_is_the_same_update(run, grpo, tmp_path, tight, algo, shared):
    flags = ["--algo", algo, "--share_prompts", shared, "--value_warmup", 0]
    assert run(grpo(tmp_path / "whole", *flags))[0] == 0
    tight(set(range(1, 1000)), 2)
    code, told, err = run(grpo(tmp_path / "out", *flags))
    assert code == 0, err
    assert "memory ran out" in told
    for a, b in zip(log_rows(tmp_path / "out"), log_rows(tmp_path / "whole"), strict=True):
        for key in {"train/loss", "train/grad_norm", "train/entropy", "train/sampler_gap"} & {*b}:
            assert a[key] == pytest.approx(b.get(key), rel=1e-3, abs=1e-5), key


def test_a_policy_step_without_a_finite_gradient_is_skipped(run, grpo, tmp_path, monkeypatch):
    honest, calls = lm.policy_loss, []

    def loss(model, *batch, **settings):
        found = honest(model, *batch, **settings)
        calls.append(1)
        return found * math.nan if len(calls) <= 3 else found

    monkeypatch.setattr(lm, "policy_loss", loss)
    code, told, err = run(grpo(tmp_path / "out"))
    assert code == 0 and "1 steps skipped" in told, err
    assert [row.get("train/skipped") for row in log_rows(tmp_path / "out")] == [None, 1, None]


# ---- A rank that is lost ----


def test_a_lost_rank_is_a_sentence(child, data_dir, tmp_path):
    """kill -9 of rank 1 in the middle of a run: rank 0 says so, and the run goes on when both
    start again, to the bytes of a run that nothing happened to."""
    outs = tmp_path / "out", tmp_path / "calm"
    lost, calm = (argv(data_dir, out, *STEADY, "--batch_size", 4) for out in outs)
    (code, told), (killed, _) = two(child, lost, (signal_at, "seed_step", 7), keep=False)
    assert killed == -signal.SIGKILL and code == 1
    assert "error: another rank has ended" in told and "Traceback" not in told
    for flags in (lost, calm):
        for code, told in two(child, flags, keep=False):
            assert code == 0, told
    assert weight_bytes(outs[0] / "ckpt_last.pt") == weight_bytes(outs[1] / "ckpt_last.pt")


KILLED_ONCE = """
import os, signal, sys
sys.path.insert(0, {root!r})
import standalone_transformer_lm as lm

def stepped(*key, step=lm.seed_step):
    if key[1] == 6 and key[2] == 1 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os.kill(os.getpid(), signal.SIGKILL)
    step(*key)

lm.seed_step = stepped
sys.exit(lm.main())
"""


@pytest.mark.slow
def test_torchrun_restarts_a_run_once(child, data_dir, tmp_path):
    """A killed rank costs one restart, after which the run has the bytes of a calm one."""
    script = tmp_path / "killed_once.py"
    script.write_text(KILLED_ONCE.format(root=str(Path(lm.__file__).parent)))
    outs = tmp_path / "out", tmp_path / "calm"
    flags, calm = (argv(data_dir, out, *STEADY, "--batch_size", 4) for out in outs)
    process = torchrun(flags, script, "--max-restarts=1")
    told, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert "resuming" in told, told
    for code, told in two(child, calm, keep=False):
        assert code == 0, told
    assert weight_bytes(outs[0] / "ckpt_last.pt") == weight_bytes(outs[1] / "ckpt_last.pt")


# ---- Half the memory ----


def virtual(name):
    """Bytes of address space of this process: VmSize, or VmPeak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(name))


def squeeze(program, note, share):
    """Note how much address space training takes, or allow it a share of what was noted."""
    fit = program.Trainer.fit

    def fitted(trainer):
        begin = virtual("VmSize")
        if note.exists():
            room = begin + int(share * int(note.read_text()))
            resource.setrlimit(resource.RLIMIT_AS, (room, room))
            return fit(trainer)
        code = fit(trainer)
        note.write_text(str(virtual("VmPeak") - begin))
        return code

    program.Trainer.fit = fitted


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="this is measured on Linux")
def test_half_the_memory_gives_the_same_losses(child, data_dir, tmp_path):
    """--batch_size auto under a limit of address space that its micro-batches do not fit in."""
    shape = """--n_layer 2 --d_model 64 --n_head 2 --n_kv_head 2 --seq_len 1024 --batch_size auto
    --grad_accum_steps 1 --max_steps 20 --eval_interval 20 --eval_tokens 8000 --dropout 0""".split()
    outs = tmp_path / "calm", tmp_path / "tight"
    for out in outs:
        flags = argv(data_dir, out, *shape)
        code, told = child(flags, (squeeze, tmp_path / "note", 0.5)).end()
        assert code == 0, told
    assert int((tmp_path / "note").read_text()) > 100e6
    assert events(outs[1], "memory") and "memory ran out" in told
    calm, tight = map(log_rows, outs)
    assert len(calm) == 20
    for a, b in zip(calm, tight, strict=True):
        assert a["step"] == b["step"] and a["tokens"] == b["tokens"]
        for key in {"train/loss", "train/grad_norm", "val/loss"} & {*b}:
            rel = 1e-2 if "norm" in key else 1e-4
            assert a[key] == pytest.approx(b[key], rel=rel), (a["step"], key)


def test_a_checkpoint_needs_no_thread(monkeypatch):
    """Where memory is too short for one, training waits for the disk instead."""

    def refuse(_):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    writer, done = lm.Writer(), []
    writer.submit(done.append, 1)
    writer.close()
    assert done == [1] and not writer.thread
