"""Room Batches: which tokens make up which step."""

import re

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import standalone_transformer_lm as lm

PLACES = np.arange(10_000, dtype=np.uint16)  # each id is its own place, so a row shows its cut


def rows_of(micros):
    """The (input, target) rows of micro-batches, as hashable tuples."""
    return [(tuple(x.tolist()), tuple(y.tolist()))
            for xs, ys in micros for x, y in zip(xs, ys, strict=True)]


def whole_step(windows, first, batch, accum, world):
    return [row for rank in range(world)
            for row in rows_of(windows.step(first, batch, accum, rank, world).micros)]


# --- the permutation ------------------------------------------------------------------------------


@given(st.integers(1, 3000), st.text(max_size=8))
def test_permute_is_a_bijection(size, key):
    assert sorted(lm.permute(np.arange(size), size, key).tolist()) == list(range(size))


@pytest.mark.parametrize("power", range(1, 17))
def test_permute_is_a_bijection_around_powers_of_two(power):
    for size in (2 ** power - 1, 2 ** power, 2 ** power + 1):
        assert np.array_equal(np.sort(lm.permute(np.arange(size), size, "k")), np.arange(size))


def test_permute_needs_no_table():
    size, places = 2 ** 40 + 12345, np.arange(5000) * 219_902_325
    out = lm.permute(places, size, "k")
    assert len(set(out.tolist())) == 5000 and out.min() >= 0 and out.max() < size
    assert np.std(out / size) == pytest.approx(12 ** -0.5, rel=0.05)  # spread over all of it


def test_permute_does_not_depend_on_what_is_asked_beside_it_and_leaves_its_input_alone():
    index = np.arange(77)
    whole = lm.permute(index, 77, "k")
    assert [int(lm.permute(np.array([i]), 77, "k")[0]) for i in range(77)] == whole.tolist()
    assert np.array_equal(index, np.arange(77))


def test_permute_differs_by_key():
    orders = {tuple(lm.permute(np.arange(50), 50, f"{seed}/0").tolist()) for seed in range(300)}
    assert len(orders) == 300


def test_permute_puts_every_window_first_equally_often():
    firsts = [int(lm.permute(np.zeros(1, int), 20, f"{seed}/0")[0]) for seed in range(4000)]
    counts = np.bincount(firsts, minlength=20)
    assert ((counts - 200) ** 2 / 200).sum() < 60  # chi-square, 19 degrees: 1e-5 of chance
    places = lm.permute(np.arange(2000), 2000, "1/0")
    assert abs(np.corrcoef(places, np.arange(2000))[0, 1]) < 0.1


# --- windows --------------------------------------------------------------------------------------


@given(st.integers(3, 700), st.integers(2, 40), st.integers(0, 5))
def test_every_window_comes_once_an_epoch(length, seq_len, epoch):
    if length <= seq_len:
        return
    windows = lm.Windows(PLACES[:length], seq_len, seed=9)
    count = (length - 1) // seq_len
    x, y = windows.batch(epoch * count + np.arange(count))
    assert sorted(x[:, 0].tolist()) == [w * seq_len for w in range(count)]
    assert sorted(y.flatten().tolist()) == list(range(1, count * seq_len + 1))
    assert torch.equal(y, x + 1) and x.shape == (count, seq_len)


def test_epochs_and_seeds_differ_in_order():
    def order(seed, epoch):
        return tuple(lm.Windows(PLACES[:801], 8, seed).window(epoch * 100 + np.arange(100)))

    assert len({order(seed, epoch) for seed in range(5) for epoch in range(5)}) == 25


@pytest.mark.parametrize(("length", "count"), [(16, 0), (17, 1), (32, 1), (33, 2), (48, 2)])
def test_the_last_window_is_whole(length, count):
    if not count:
        with pytest.raises(lm.UserError):
            lm.Windows(PLACES[:length], 16, 0)
        return
    windows = lm.Windows(PLACES[:length], 16, 0)
    x, y = windows.batch(np.arange(count))
    assert windows.count == count and x.shape == (count, 16)
    assert y.max() == count * 16 <= length - 1 < (count + 1) * 16


@given(st.integers(0, 2 ** 31), st.integers(0, 10 ** 12))
def test_a_sample_depends_on_seed_and_number_alone(seed, i):
    windows = lm.Windows(PLACES[:4001], 16, seed)
    alone, _ = windows.batch(np.array([i]))
    among, _ = lm.Windows(PLACES[:4001], 16, seed).batch(np.array([i + 700, 3, i, i + 1]))
    assert torch.equal(alone[0], among[2])


@given(st.integers(0, 5000), st.sampled_from([1, 2, 3, 4, 6, 12]), st.data())
def test_batch_accumulation_and_ranks_are_interchangeable(first, batch, data):
    accum = data.draw(st.sampled_from(lm.divisors(12 // batch)))
    world = 12 // batch // accum
    windows = lm.Windows(PLACES[:1009], 16, seed=5)
    want = rows_of([windows.batch(first + np.arange(12))])
    assert sorted(whole_step(windows, first, batch, accum, world)) == sorted(want)


def test_a_step_counts_its_samples_and_shapes():
    windows = lm.Windows(PLACES[:1009], 16, seed=5)
    step = windows.step(0, 3, 2, rank=1, world=4)
    assert (step.samples, step.tokens, step.targets) == (24, 24 * 16, 3 * 2 * 16)
    assert [tuple(t.shape) for micro in step.micros for t in micro] == [(3, 16)] * 4
    assert all(t.dtype == torch.int64 and t.is_contiguous() for m in step.micros for t in m)


def test_steps_in_turn_use_every_window_once_across_the_end_of_an_epoch():
    windows, seen = lm.Windows(PLACES[:1009], 16, seed=5), []
    while len(seen) < 2 * 63:
        seen += whole_step(windows, len(seen), 7, 1, 3)
    assert len(set(seen[:63])) == len(set(seen[63:126])) == 63 and seen[:63] != seen[63:126]


def test_large_ids_survive():
    ids = np.array([65534, 65535, 0, 65535, 1], np.uint16)
    x, y = lm.Windows(ids, 2, 0).batch(np.arange(2))
    assert sorted(map(tuple, torch.cat((x, y[:, -1:]), 1).tolist())) == [
        (0, 65535, 1), (65534, 65535, 0)]
    wide = np.array([2 ** 31, 2 ** 32 - 1, 7], np.uint32)
    assert lm.Windows(wide, 2, 0).batch(np.array([0]))[1].tolist() == [[2 ** 32 - 1, 7]]


@pytest.mark.parametrize("length", [3, 4, 100, 512])
def test_too_little_data_names_the_largest_seq_len_that_works(length):
    with pytest.raises(lm.UserError) as error:
        lm.Windows(PLACES[:length], 512, 0)
    named = int(re.search(r"--seq_len (\d+) or less", error.value.faults[0][1])[1])
    assert lm.Windows(PLACES[:length], named, 0).count == 1
    with pytest.raises(lm.UserError):
        lm.Windows(PLACES[:length], named + 1, 0)


@pytest.mark.parametrize("length", [0, 1, 2])
def test_too_little_data_for_any_seq_len_names_none(length):
    with pytest.raises(lm.UserError) as error:
        lm.Windows(PLACES[:length], 512, 0)
    assert not re.search(r"--seq_len \d", error.value.faults[0][1]), "no --seq_len works"


# --- evaluation -----------------------------------------------------------------------------------


@given(st.integers(0, 300), st.integers(2, 33), st.integers(1, 5), st.integers(1, 4),
       st.integers(1, 400))
def test_evaluation_sees_every_target_once(length, seq_len, batch, world, most):
    ids = PLACES[100:100 + length]  # clear of PAD
    targets = []
    for rank in range(world):
        for x, y in lm.evaluation_batches(ids, seq_len, batch, most, rank, world):
            real = y != lm.IGNORE
            assert x.shape == y.shape == (batch, seq_len) and real.any()
            assert torch.equal(x[real] + 1, y[real]) and (x[~real] == lm.PAD).all()
            targets += y[real].tolist()
    assert sorted(targets) == list(range(101, 101 + min(max(0, length - 1), most)))


def test_evaluation_windows_do_not_depend_on_batch_or_ranks():
    def windows(batch, world):
        found = []
        for rank in range(world):
            found += rows_of(lm.evaluation_batches(PLACES[50:150], 8, batch, 90, rank, world))
        return {row for row in found if set(row[1]) != {lm.IGNORE}}

    assert windows(1, 1) == windows(5, 1) == windows(2, 3) == windows(4, 4)
