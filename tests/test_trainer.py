"""The one training loop: steps that mean the same however they are cut, stopped or killed."""

import gzip
import json
import math
import os
import re
import shlex
import shutil
import signal

import pytest
import torch
import torch.nn.functional as F
from conftest import SHORT, TINY, complaint, log_rows, read_pt, signal_at, weight_bytes

import standalone_transformer_lm as lm


def flags(data_dir, out, *more):
    return ["train", *TINY, *SHORT, "--data_dir", data_dir, "--out_dir", out, *more]


@pytest.fixture
def trainer(run, data_dir, tmp_path, monkeypatch):
    """`trainer(*flags)` is the Trainer that the train command would start."""

    def make(*more):
        made = []
        with monkeypatch.context() as patch:
            patch.setattr(lm.Trainer, "fit", lambda one: made.append(one) or 77)
            code, _, err = run(flags(data_dir, tmp_path / "out", *more))
        assert code == 77, err
        return made[0]

    return make


def accumulated(trainer, steps=0):
    """The gradients of a trainer's next step, and its loss."""
    run = trainer.run
    trainer.objective.train()
    batch = trainer.job.stream.step(8 * steps, run.batch_size, run.grad_accum_steps, 0, 1)
    losses = trainer.accumulate(trainer.wrapped, batch.micros, 1 / batch.targets)
    return float(sum(losses)), {n: w.grad.clone() for n, w in trainer.job.model.named_parameters()}


# ---- What a step is ----


@pytest.mark.parametrize(("batch", "accum"), [(8, 1), (4, 2), (2, 4), (1, 8)])
def test_any_accumulation_has_the_gradient_of_the_mean_token_loss(trainer, batch, accum):
    one = trainer("--dropout", 0, "--batch_size", batch, "--grad_accum_steps", accum)
    loss, found = accumulated(one)
    model = one.job.model
    model.zero_grad()
    x, y = one.job.stream.collate(one.job.stream.samples(torch.arange(8).numpy()))
    wanted = F.cross_entropy(model(x).reshape(-1, 400), y.reshape(-1))
    wanted.backward()
    assert loss == pytest.approx(wanted.item(), abs=1e-5)
    for name, weight in model.named_parameters():
        assert torch.allclose(found[name], weight.grad, atol=1e-5), name
    assert max(float(g.abs().max()) for g in found.values()) > 1e-2


def test_whole_runs_agree_on_any_accumulation(run, data_dir, tmp_path):
    logs = []
    for batch, accum in ((8, 1), (2, 4)):
        out = tmp_path / f"{batch}"
        assert (
            run(
                flags(
                    data_dir,
                    out,
                    "--dropout",
                    0,
                    "--batch_size",
                    batch,
                    "--grad_accum_steps",
                    accum,
                )
            )[0]
            == 0
        )
        logs.append(log_rows(out))
    for a, b in zip(*logs, strict=True):
        assert a.keys() == b.keys() and a == pytest.approx(b, abs=1e-4)


def test_clipping_bounds_the_step_and_reports_the_norm_before_it(trainer, monkeypatch):
    for clip in (0.01, 0.0):
        one = trainer("--grad_clip", clip)
        _, grads = accumulated(one)
        whole = math.sqrt(sum(float(g.square().sum()) for g in grads.values()))
        seen = []
        weights = list(one.job.model.parameters())
        monkeypatch.setattr(
            one.optimizers[0],
            "step",
            lambda *a, w=weights, s=seen: s.append(
                math.sqrt(sum(float(p.grad.square().sum()) for p in w))
            ),
        )
        assert float(one.update(one.job.model, one.optimizers)) == pytest.approx(whole, rel=1e-4)
        assert seen == [pytest.approx(clip or whole, rel=1e-3)]
        assert all(w.grad is None for w in weights)


def test_learning_rate_trace_is_its_formula_from_the_first_step(trained):
    trace = [row["train/lr"] for row in log_rows(trained)]
    warm = [0.01 * (step + 1) / 3 for step in range(3)]
    cosine = [
        0.01 * (0.1 + 0.9 * (1 + math.cos(math.pi * (step - 3) / 9)) / 2) for step in range(3, 12)
    ]
    assert trace == pytest.approx(warm + cosine, rel=1e-6)


@pytest.mark.parametrize(
    ("schedule", "shape"),
    [
        ("constant", lambda step: 1.0),
        ("wsd", lambda step: 1 - 0.9 * max(0.0, (step - 6) / 6)),
    ],
)
def test_other_schedules_reach_the_optimiser(trainer, schedule, shape):
    one = trainer("--schedule", schedule, "--decay_share", 0.5)
    for step in range(12):
        one.train_step(0)
        want = 0.01 * ((step + 1) / 3 if step < 3 else shape(step))
        [used] = {g["lr"] for g in one.optimizers[0].param_groups}
        assert used == log_rows(one.out)[-1]["train/lr"] == pytest.approx(want)


def test_dropout_is_in_training_and_not_in_evaluation(trainer):
    one = trainer("--dropout", 0.5)
    one.objective.train()
    first, second = one.evaluate(), one.evaluate()
    assert first == second and one.objective.training and one.job.model.blocks[0].attn.training
    losses = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        losses.append(accumulated(one)[0])
    assert losses[0] != losses[1]


def test_evaluation_moves_nothing_in_training(run, data_dir, tmp_path, trained):
    assert run(flags(data_dir, tmp_path / "o", "--eval_interval", 1))[0] == 0
    assert weight_bytes(tmp_path / "o/ckpt_last.pt") == weight_bytes(trained / "ckpt_last.pt")


def test_best_and_last_are_different_files(run, data_dir, tmp_path, monkeypatch):
    losses = iter([3.0, 2.0, 4.0])
    monkeypatch.setattr(lm, "perplexity", lambda *a, **k: {"val/loss": next(losses)})
    out = tmp_path / "out"
    assert run(flags(data_dir, out))[0] == 0
    best, last = read_pt(out / "ckpt_best.pt"), read_pt(out / "ckpt_last.pt")
    assert (best["step"], last["step"]) == (8, 12) and best["best_val"] == last["best_val"] == 2.0
    assert not os.path.samefile(out / "ckpt_best.pt", out / "ckpt_last.pt")
    assert not torch.equal(best["model"]["norm.weight"], last["model"]["norm.weight"])


# ---- Compile or not ----


def test_compile_is_decided_by_length_alone_and_said(monkeypatch, capsys):
    machine = lm.Machine(torch.device("cpu"), torch.float32)
    monkeypatch.setattr(lm.shutil, "which", lambda name: "/usr/bin/" + name)
    short, long = 1e9, 1e18
    assert lm.wants_compile("1", short, machine) and not lm.wants_compile("0", long, machine)
    capsys.readouterr()
    for flops, wanted, words in ((short, False, "not compiling"), (long, True, "--compile 0")):
        for _ in range(3):
            assert lm.wants_compile("auto", flops, machine) is wanted
            assert words in capsys.readouterr().out
    monkeypatch.setattr(lm.shutil, "which", lambda name: None)
    assert not lm.wants_compile("auto", long, machine)
    assert "compiler" in capsys.readouterr().out


# ---- Stopped and gone on with ----


def test_a_signal_saves_and_the_printed_command_goes_on_to_the_same_bytes(
    run, data_dir, tmp_path, child, trained
):
    out = tmp_path / "a folder"
    argv = flags(data_dir, out, "--log_interval", 4)
    for number, code in ((signal.SIGTERM, 143), (signal.SIGUSR1, 138), (signal.SIGINT, 130)):
        found, told = child(argv, (signal_at, "seed_step", 2, number)).end()
        assert found == code and "Traceback" not in told, told
        assert "stopped at step" in told
    assert read_pt(out / "ckpt_last.pt")["step"] < 12
    command = shlex.split(re.search(r"resume with:\n(.*)", told)[1])
    assert command[:2] == ["python", lm.PROGRAM]
    assert run(command[2:])[0] == 0
    alone = tmp_path / "alone"
    assert run(flags(data_dir, alone, "--log_interval", 4))[0] == 0
    assert weight_bytes(out / "ckpt_last.pt") == weight_bytes(alone / "ckpt_last.pt")
    assert weight_bytes(out / "ckpt_last.pt") == weight_bytes(trained / "ckpt_last.pt")
    assert log_rows(out) == log_rows(alone)


def test_a_run_begun_with_resume_0_prints_a_command_that_works(
    run, data_dir, tmp_path, monkeypatch
):
    with monkeypatch.context() as patch:
        patch.setattr(lm, "seed_step", lm.seed_step)  # so that leaving puts it back
        signal_at(lm, "seed_step", 5, signal.SIGUSR1)
        code, told, _ = run(flags(data_dir, tmp_path / "out", "--resume", 0))
    assert code == 128 + signal.SIGUSR1
    command = shlex.split(re.search(r"resume with:\n(.*)", told)[1])
    code, _, err = run(command[2:])
    assert code == 0, err


MIXED = "a={0}:0.7,b={0}:0.3"
KINDS = {  # none may lose a byte when its run is stopped and gone on with
    "muon": ["--optimizer", "muon"],
    "muon_shape": [
        "--optimizer",
        "muon",
        "--muon_lr",
        0.02,
        "--muon_scale",
        "shape",
        "--muon_warmup",
        9,
        "--schedule",
        "wsd_sqrt",
    ],
    "ema": ["--ema", 0.9],
    "mixture": ["--data_dir", MIXED],
    "everything": [
        "--data_dir",
        MIXED,
        "--optimizer",
        "muon",
        "--ema",
        0.5,
        "--n_expert",
        4,
        "--n_sink",
        2,
        "--qk_norm",
        1,
        "--z_loss",
        1e-3,
        "--grad_checkpoint",
        1,
        "--grad_accum_steps",
        2,
        "--schedule",
        "inverse_sqrt",
    ],
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_run_goes_on_to_the_same_bytes(run, data_dir, tmp_path, monkeypatch, kind):
    more = [str(word).format(data_dir) for word in KINDS[kind]]
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    assert run(flags(data_dir, whole, *more))[0] == 0
    for done, step in ((0, 3), (3, 8)):  # between two evaluations, and at the second
        with monkeypatch.context() as patch:
            patch.setattr(lm, "seed_step", lm.seed_step)  # so that leaving puts it back
            signal_at(lm, "seed_step", step - done - 1, signal.SIGUSR1)
            assert run(flags(data_dir, parted, *more))[0] == 128 + signal.SIGUSR1
        assert read_pt(parted / "ckpt_last.pt")["step"] == step
    assert run(flags(data_dir, parted, *more))[0] == 0
    for name in ("ckpt_last.pt", "ckpt_best.pt", "ckpt_00000008.pt"):
        assert weight_bytes(parted / name) == weight_bytes(whole / name), name
    assert (
        read_pt(parted / "pytorch_model.bin").keys()
        == read_pt(whole / "ckpt_last.pt")["model"].keys()
    )
    assert log_rows(parted) == log_rows(whole)


def test_muon_and_an_average_learn_otherwise_than_without(run, data_dir, tmp_path, trained):
    """Else the bytes of the test above would prove nothing."""
    last = []
    for kind in ("muon", "muon_shape", "mixture"):
        more = [str(word).format(data_dir) for word in KINDS[kind]]
        assert run(flags(data_dir, tmp_path / kind, *more))[0] == 0
        last.append(log_rows(tmp_path / kind)[-1]["val/loss"])
    last.append(log_rows(trained)[-1]["val/loss"])
    assert len(set(last)) == 4 and max(last) < math.log(400) - 0.5


def test_the_average_is_what_is_evaluated_kept_as_best_and_exported(
    run, data_dir, tmp_path, trained
):
    out = tmp_path / "out"
    assert run(flags(data_dir, out, "--ema", 0.9))[0] == 0
    last, best, plain = (
        read_pt(out / n) for n in ("ckpt_last.pt", "ckpt_best.pt", "pytorch_model.bin")
    )
    then = read_pt(out / f"ckpt_{best['step']:08d}.pt")
    names = [name for name in last["model"] if name != "lm_head.weight"]  # tied
    average, at_best = (dict(zip(names, one["ema"], strict=True)) for one in (last, then))
    assert read_pt(trained / "ckpt_last.pt")["model"].keys() == last["model"].keys()
    for name in names:  # training itself goes on as if there were none
        assert torch.equal(last["model"][name], read_pt(trained / "ckpt_last.pt")["model"][name])
        assert torch.equal(plain[name], average[name]), name
        assert not torch.equal(plain[name], last["model"][name]), name
        assert torch.equal(best["model"][name], at_best[name]), name
    model = lm.build_model(lm.load_checkpoint(out / "ckpt_best.pt"), torch.device("cpu"))
    row = lm.perplexity(
        lm.Objective(model, lm.pretrain_loss),
        [("", lm.TokenFolder(data_dir), 1.0)],
        4,
        lm.Machine(torch.device("cpu"), torch.float32),
        32,
        500,
    )
    assert row["val/loss"] == pytest.approx(best["best_val"], rel=1e-6)
    logged = {r["step"]: r["val/loss"] for r in log_rows(out) if "val/loss" in r}
    assert logged[best["step"]] == best["best_val"]


def test_an_average_may_be_begun_later_and_given_up(run, data_dir, tmp_path, trained):
    out = shutil.copytree(trained, tmp_path / "out")
    for steps, more, kept in ((14, ["--ema", 0.9], True), (16, [], False)):
        code, _, err = run(flags(data_dir, out, "--max_steps", steps, *more))
        assert code == 0, err
        assert (read_pt(out / "ckpt_last.pt")["ema"] is not None) == kept


@pytest.mark.parametrize("kind", ["adamw", "muon"])
@pytest.mark.parametrize("value", [math.inf, math.nan])
@pytest.mark.parametrize("spoilt", ["blocks.0.mlp.w1.weight", "tok_emb.weight"])
def test_a_gradient_out_of_fp16s_range_skips_the_step_of_every_weight(trainer, kind, value, spoilt):
    one = trainer("--dtype", "fp16", "--optimizer", kind, "--tie", 0)
    weights = dict(one.job.model.named_parameters())
    before = {n: w.detach().clone() for n, w in weights.items()}
    for name, weight in weights.items():
        weight.grad = torch.ones_like(weight)
        if name == spoilt:
            weight.grad[0, 0] = value
    one.scaler.scale(torch.zeros(()))  # so that it knows its scale
    one.update(one.job.model, one.optimizers)
    assert [n for n, w in weights.items() if not torch.equal(before[n], w)] == []


def test_another_optimiser_on_resume_is_one_sentence(run, data_dir, tmp_path, trained):
    out = shutil.copytree(trained, tmp_path / "out")
    code, _, err = run(flags(data_dir, out, "--optimizer", "muon", "--max_steps", 20))
    assert code == 2 and err.count("error:") == 1 and "--optimizer" in err and "adamw" in err


def test_a_signal_sent_twice_still_saves(child, data_dir, tmp_path):
    """Schedulers and torchrun both pass SIGTERM on."""
    hooks = [
        (signal_at, "seed_step", 2, signal.SIGTERM),
        (signal_at, "Trainer.update", 2, signal.SIGTERM),
    ]
    code, _ = child(flags(data_dir, tmp_path / "out"), *hooks).end()
    assert code == 128 + signal.SIGTERM
    assert lm.read_checkpoint(tmp_path / "out" / "ckpt_last.pt")["step"] >= 2


def kill_in_save(program, nth):
    """kill -9 in the middle of writing the nth file that torch.save writes."""
    calls, save = [], program.torch.save

    def half(content, file):
        calls.append(1)
        if len(calls) == nth:
            file.write(b"PK" + bytes(50_000))
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        save(content, file)

    program.torch.save = half


MOMENTS = [  # in turn; each run goes on where the one before was killed
    (signal_at, "seed_step", 3),
    (kill_in_save, 1),
    (signal_at, "os.link", 1),
    (signal_at, "Metrics.write", 3),
    (signal_at, "os.replace", 2),
    (signal_at, "fsync_folder", 3),
    (kill_in_save, 2),
    (signal_at, "save_weights", 1),
]


def test_killed_at_any_moment_a_run_ends_with_the_same_bytes(
    child, run, data_dir, tmp_path, trained
):
    out = tmp_path / "out"
    for moment in MOMENTS:
        code, told = child(flags(data_dir, out), moment).end()
        assert code == -signal.SIGKILL, (moment, told)
    code, told = child(flags(data_dir, out)).end()
    assert code == 0, told
    assert "damaged" not in told
    for name in ("ckpt_last.pt", "ckpt_best.pt", "ckpt_00000008.pt"):
        assert weight_bytes(out / name) == weight_bytes(trained / name), name
    assert log_rows(out) == log_rows(trained)
    assert not list(out.glob(".*")), "a killed write leaves nothing behind at the end"


def test_more_steps_go_on(run, data_dir, tmp_path, trained):
    out = shutil.copytree(trained, tmp_path / "out")
    code, told, err = run(["train", f"@{out}/args.txt", "--out_dir", out, "--max_steps", 15])
    assert code == 0 and "after step 12" in told, err
    assert [row["step"] for row in log_rows(out)] == list(range(1, 16))
    assert log_rows(out)[:12] == log_rows(trained)
    assert read_pt(out / "ckpt_last.pt")["samples"] == 60


@pytest.mark.parametrize("steps", [12, 5])
def test_a_finished_run_says_so_and_is_left_alone(run, data_dir, tmp_path, trained, steps):
    out = shutil.copytree(trained, tmp_path / "out")
    before = weight_bytes(out / "ckpt_last.pt"), log_rows(out)
    code, told, err = run(flags(data_dir, out, "--max_steps", steps))
    assert code == 0 and "12 steps" in told and not err
    assert (weight_bytes(out / "ckpt_last.pt"), log_rows(out)) == before


def test_args_txt_repeats_the_run(trained, run, tmp_path):
    code, _, err = run(["train", f"@{trained}/args.txt", "--out_dir", tmp_path / "twin"])
    assert code == 0, err
    assert log_rows(tmp_path / "twin") == log_rows(trained)


def test_without_validation_text_the_run_names_a_checkpoint_that_exists(run, corpus, tmp_path):
    data, out = tmp_path / "data", tmp_path / "out"
    assert (
        run(
            [
                "prep",
                "--text_path",
                corpus,
                "--out_dir",
                data,
                "--vocab_size",
                400,
                "--val_split",
                0,
                "--workers",
                1,
            ]
        )[0]
        == 0
    )
    code, told, err = run(flags(data, out, "--max_steps", 3))
    assert code == 0, err
    named = set(re.findall(r"--ckpt (\S+)", told))
    assert named and all(os.path.exists(path) for path in named)


def test_profile_writes_a_trace_and_names_the_dearest_operations(run, data_dir, tmp_path):
    out = tmp_path / "out"
    code, told, err = run(
        ["train", *TINY, *SHORT, "--data_dir", data_dir, "--out_dir", out, "--profile", 3]
    )
    assert code == 0, err
    assert "aten::mm" in told and "profile.json.gz" in told
    events = json.loads(gzip.decompress((out / "profile.json.gz").read_bytes()))["traceEvents"]
    steps = {e["name"] for e in events if e.get("name", "").startswith("ProfilerStep")}
    assert steps == {"ProfilerStep#4", "ProfilerStep#5", "ProfilerStep#6"}
    assert "--profile" not in (out / "args.txt").read_text()


def test_an_evaluation_that_gives_no_number_is_one_sentence(run, data_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(lm, "perplexity", lambda *args: {"val/loss": math.nan})
    out = tmp_path / "out"
    complaint(run(flags(data_dir, out)), "NaN or infinity", "--lr")
    assert not (out / "ckpt_best.pt").exists()
