"""Two processes over gloo: the same step as one, the same weights, one voice."""

import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import SHORT, TINY, log_rows, read_pt, signal_at, weight_bytes

import standalone_transformer_lm as lm

ROOT = Path(__file__).resolve().parents[1]
STEADY = ["--dropout", "0", "--log_interval", "2"]  # dropout is drawn by each rank for itself


def flags(data_dir, out, batch):
    return ["train", *TINY, *SHORT, *STEADY, "--data_dir", data_dir, "--out_dir", out,
            "--batch_size", batch]


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def torchrun(argv):
    """The program under torch.distributed.run on two processes, started."""
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port"]
    command = [sys.executable, *launcher, free_port(), ROOT / lm.PROGRAM, *argv]
    return subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, text=True,
                            stderr=subprocess.PIPE)


def two(child, argv, *hooks):
    """The program as two ranks without a launcher, to its end; hooks are for rank 1 alone."""
    env = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
           "MASTER_PORT": str(free_port())}
    ranks = [child(argv, (keep_weights, rank), *(hooks if rank else ()), RANK=str(rank),
                   LOCAL_RANK=str(rank), **env) for rank in range(2)]
    return [rank.end() for rank in ranks]


def keep_weights(program, rank):
    """Write the weights that this rank holds at its end beside the run."""
    fit = program.Trainer.fit

    def fitted(trainer):
        code = fit(trainer)
        torch.save(trainer.job.model.state_dict(), trainer.out / f"rank{rank}.weights")
        return code

    program.Trainer.fit = fitted


@pytest.fixture(scope="module")
def alone(data_dir, tmp_path_factory, run):
    """The run on one rank that all others must equal: a batch of eight."""
    out = tmp_path_factory.mktemp("alone") / "run"
    assert run(flags(data_dir, out, 8))[0] == 0
    return out


def assert_same_curve(out, wanted, tolerance):
    for a, b in zip(log_rows(out), log_rows(wanted), strict=True):
        assert a.keys() == b.keys() and (a["step"], a["tokens"]) == (b["step"], b["tokens"])
        for key in ("train/loss", "train/grad_norm", "train/lr", "val/loss"):
            assert a.get(key) == pytest.approx(b.get(key), abs=tolerance), (a["step"], key)


def test_torchrun_on_two_ranks_of_four_is_one_rank_of_eight(data_dir, tmp_path, alone):
    process = torchrun(flags(data_dir, tmp_path / "run", 4))
    told, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert told.count("parameters") == 1 and "2 x cpu" in told  # rank 0 alone talks
    assert_same_curve(tmp_path / "run", alone, 1e-5)
    a, b = (read_pt(out / "ckpt_last.pt") for out in (tmp_path / "run", alone))
    assert a["samples"] == b["samples"] == 96
    for name in a["model"]:
        assert torch.allclose(a["model"][name], b["model"][name], atol=1e-5), name


def stopped_on_two(child, argv, out, step):
    """Two ranks that stop after `step`, of which rank 1 alone got the signal."""
    codes, told = zip(*two(child, argv, (signal_at, "seed_step", step - 1, signal.SIGUSR1)),
                      strict=True)
    assert codes[1] == 128 + signal.SIGUSR1 and codes[0] > 128
    assert "torchrun --nproc_per_node=2" in told[0]
    assert read_pt(out / "ckpt_last.pt")["step"] == step


@pytest.mark.parametrize("step", [4, 5])  # at a line of the log, and between two
def test_stopped_on_two_ranks_it_goes_on_with_two(child, data_dir, tmp_path, alone, step):
    out, argv = tmp_path / "run", flags(data_dir, tmp_path / "run", 4)
    stopped_on_two(child, argv, out, step)
    ended = two(child, argv)
    assert [code for code, _ in ended] == [0, 0], ended
    ranks = [read_pt(out / f"rank{rank}.weights") for rank in range(2)]
    assert all(torch.equal(ranks[0][name], ranks[1][name]) for name in ranks[0])
    assert_same_curve(out, alone, 1e-4)


@pytest.mark.parametrize("step", [4, 5])
@pytest.mark.parametrize("stop_again", [False, True])
def test_stopped_on_two_ranks_it_goes_on_with_one(
        child, run, data_dir, tmp_path, alone, monkeypatch, step, stop_again):
    out, argv = tmp_path / "run", flags(data_dir, tmp_path / "run", 4)
    stopped_on_two(child, argv, out, step)
    if stop_again:
        with monkeypatch.context() as patch:
            patch.setattr(lm, "seed_step", lm.seed_step)  # so that leaving puts it back
            signal_at(lm, "seed_step", 7 - step, signal.SIGUSR1)
            code, told, err = run(argv)
        assert code == 128 + signal.SIGUSR1 and "keeps a step at 8 sequences" in told, err
        assert "on 1 ranks: --batch_size 4 --grad_accum_steps 2 " in told
    assert run(argv)[0] == 0
    assert read_pt(out / "ckpt_last.pt")["samples"] == 96
    assert_same_curve(out, alone, 1e-4)


def test_two_ranks_of_experts_and_muon_agree_and_are_one_rank(child, run, data_dir, tmp_path):
    more = ["--n_expert", 4, "--optimizer", "muon", "--ema", 0.5, "--router_z_loss", 0,
            "--balance_loss", 0, "--data_dir", f"a={data_dir}:0.6,b={data_dir}:0.4"]
    both, lone = tmp_path / "both", tmp_path / "lone"  # side losses are a rank's own, hence 0
    ended = two(child, [*flags(data_dir, both, 4), *more])
    assert [code for code, _ in ended] == [0, 0], ended
    ranks = [read_pt(both / f"rank{rank}.weights") for rank in range(2)]
    assert all(torch.equal(ranks[0][name], ranks[1][name]) for name in ranks[0])
    assert run([*flags(data_dir, lone, 8), *more])[0] == 0
    assert_same_curve(both, lone, 1e-3)
    assert all({"val/loss/a", "val/loss/b"} <= set(row) for row in log_rows(both)[1::2])


def test_two_ranks_of_experts_agree_with_side_losses(child, data_dir, tmp_path):
    ended = two(child, [*flags(data_dir, tmp_path / "run", 4), "--n_expert", 4, "--optimizer",
                        "muon", "--grad_accum_steps", 2, "--max_steps", 4])
    assert [code for code, _ in ended] == [0, 0], ended
    ranks = [read_pt(tmp_path / "run" / f"rank{rank}.weights") for rank in range(2)]
    assert all(torch.equal(ranks[0][name], ranks[1][name]) for name in ranks[0])


def test_only_rank_0_talks(child, data_dir, tmp_path):
    ended = two(child, [*flags(data_dir, tmp_path / "run", 4), "--max_steps", 2])
    assert [code for code, _ in ended] == [0, 0] and "Warning" not in ended[0][1], ended
    assert not ended[1][1]


def test_one_rank_goes_on_as_two(child, run, data_dir, tmp_path, alone):
    out = tmp_path / "run"
    shutil.copytree(alone, out)
    for name in ("ckpt_last.pt", "ckpt_00000012.pt"):
        (out / name).unlink()
    ended = two(child, flags(data_dir, out, 8))
    assert [code for code, _ in ended] == [0, 0], ended
    assert_same_curve(out, alone, 1e-4)


def test_a_step_that_ranks_cannot_share_is_refused(child, run, data_dir, tmp_path):
    out = tmp_path / "run"
    assert run(flags(data_dir, out, 3))[0] == 0
    before = weight_bytes(out / "ckpt_last.pt")
    ended = two(child, [*flags(data_dir, out, 3), "--max_steps", 20])
    assert [code for code, _ in ended] == [2, 2] and "3 sequences" in ended[0][1]
    assert weight_bytes(out / "ckpt_last.pt") == before


def test_a_mistake_is_told_once_however_many_ranks_make_it(data_dir, tmp_path):
    (tmp_path / "file").write_text("in the way")
    everyone = torchrun(flags(tmp_path / "nowhere", tmp_path / "run", 4))
    rank_0 = torchrun(flags(data_dir, tmp_path / "file" / "run", 4))
    for process in (everyone, rank_0):
        _, err = process.communicate(timeout=120)
        assert process.returncode != 0
        ours = err.split("torch/distributed/elastic")[0].split("ChildFailedError")[0]
        assert ours.count("error: ") == ours.count("fix: ") == 1, err
        assert "standalone_transformer_lm.py\", line" not in err, err
