"""What bench tries, in which order, and what it says of it."""

import re

import pytest
from conftest import complaint

import standalone_transformer_lm as lm


def search(table, batch_size=4):
    """What fastest finds where table(batch, compile, grad_checkpoint) says the speed, 0 for what
    does not fit; and what it tried."""
    tried = []

    def speed(flags):
        tried.append((flags["batch_size"], flags["compile"], flags["grad_checkpoint"]))
        return table(*tried[-1])

    found, most = lm.fastest(
        speed,
        {"batch_size": batch_size, "compile": "0", "grad_checkpoint": 0},
        [{}, {"compile": "1"}],
        1 << 20,
    )
    return (found["batch_size"], found["compile"], found["grad_checkpoint"]), most, tried


def test_bench_doubles_the_batch_while_it_pays_and_follows_what_is_faster():
    found, most, tried = search(lambda batch, how, again: min(batch, 16) * (1 + int(how)))
    assert found == (16, "1", 0) and most == 32
    assert tried == [
        (4, "0", 0),
        (8, "0", 0),
        (16, "0", 0),
        (32, "0", 0),
        (16, "1", 0),
        (32, "1", 0),
    ]


def test_bench_leaves_what_is_slower():
    found, most, tried = search(lambda batch, how, again: 10.0 if how == "0" else 9.0)
    assert found == (4, "0", 0) and most == 10
    assert tried == [(4, "0", 0), (8, "0", 0), (4, "1", 0)]


def test_bench_recomputes_layers_where_memory_ended_the_climb():
    """Batches of 16 fit with recomputing alone, and are worth it."""
    found, most, tried = search(
        lambda batch, how, again: (
            batch * (0.8 if again else 1) if batch <= (16 if again else 8) else 0.0
        )
    )
    assert found == (16, "0", 1) and most == pytest.approx(12.8)
    assert tried[-2:] == [(16, "0", 1), (32, "0", 1)]
    assert (8, "1", 0) in tried


def test_bench_where_nothing_fits(monkeypatch, run):
    found, most, tried = search(lambda *flags: 0.0)
    assert most == 0 and tried == [(4, "0", 0), (4, "1", 0), (4, "0", 1)]
    monkeypatch.setattr(lm, "trial", lambda *args: 0.0)
    complaint(run(["bench", "--preset", "138m", "--device", "cpu"]), "not even", "--batch_size 1")


@pytest.mark.slow
def test_bench_as_typed(run, monkeypatch):
    """Real trials, each in a process of its own, and what they mean in hours and money."""
    monkeypatch.setattr(lm, "can_compile", lambda device: False)
    code, told, err = run(
        [
            "bench",
            "--n_layer",
            1,
            "--d_model",
            16,
            "--n_head",
            2,
            "--seq_len",
            16,
            "--vocab",
            300,
            "--batch_size",
            64,
            "--threads",
            1,
            "--device",
            "cpu",
            "--tokens",
            1e12,
            "--usd_per_hour",
            2,
        ]
    )
    assert code == 0, err
    trials = re.findall(r"^  (--.*): ([\d.]+)([KM]?) tokens per second", told, re.MULTILINE)
    sizes = [int(re.search(r"--batch_size (\d+)", flags)[1]) for flags, *_ in trials]
    assert sizes[:2] == [64, 128]
    # By all its flags: where the CPU has bf16, one batch size is timed in fp32 as well.
    speeds = {
        flags: float(speed) * {"": 1, "K": 1e3, "M": 1e6}[unit] for flags, speed, unit in trials
    }
    fastest = re.search(r"fastest: (--.*)", told)[1]
    assert speeds[fastest] == max(speeds.values())  # as rounded: two may look alike
    hours, cost = re.search(r"time: ([\d,.]+) hours .*, \$([\d,.]+)", told).groups()
    hours, cost = (float(figure.replace(",", "")) for figure in (hours, cost))
    assert cost == pytest.approx(2 * hours, rel=0.01)


def test_bench_refuses_to_be_launched_on_many_devices(run, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    complaint(run(["bench", "--preset", "138m"]), "one device", "--gpus")


def test_bench_stops_where_a_step_has_tokens_enough():
    """However fast larger batches are."""
    tried = []

    def speed(flags):
        tried.append(flags["batch_size"])
        return float(flags["batch_size"])

    lm.fastest(speed, {"batch_size": 4, "compile": "0", "grad_checkpoint": 0}, [{}], 64)
    assert max(tried) == 64


def test_the_help_says_for_what_a_number_of_gpus_is(run):
    told = " ".join(run(["bench", "--help"])[1].split())
    assert "--gpus N number of GPUs to plan for" in told
