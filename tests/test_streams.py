"""Room Streams: which tokens make up which step."""

import itertools
import random
import re
import time
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import standalone_transformer_lm as lm

PLACES = np.arange(10_000, dtype=np.uint16)  # each id is its own place, so a row shows its cut


def rows_of(micros):
    """The (input, target) rows of micro-batches, as hashable tuples."""
    return [
        (tuple(x.tolist()), tuple(y.tolist()))
        for xs, ys in micros
        for x, y in zip(xs, ys, strict=True)
    ]


def batch_of(stream, numbers):
    return stream.collate(stream.samples(numbers))


def whole_step(windows, first, batch, accum, world):
    return [
        row
        for rank in range(world)
        for row in rows_of(windows.step(first, batch, accum, rank, world).micros)
    ]


# --- the permutation ------------------------------------------------------------------------------


@given(st.integers(1, 3000), st.text(max_size=8))
def test_permute_is_a_bijection(size, key):
    assert sorted(lm.permute(np.arange(size), size, key).tolist()) == list(range(size))


@pytest.mark.parametrize("power", range(1, 17))
def test_permute_is_a_bijection_around_powers_of_two(power):
    for size in (2**power - 1, 2**power, 2**power + 1):
        assert np.array_equal(np.sort(lm.permute(np.arange(size), size, "k")), np.arange(size))


def test_permute_needs_no_table():
    size, places = 2**40 + 12345, np.arange(5000) * 219_902_325
    out = lm.permute(places, size, "k")
    assert len(set(out.tolist())) == 5000 and out.min() >= 0 and out.max() < size
    assert np.std(out / size) == pytest.approx(12**-0.5, rel=0.05)  # spread over all of it


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
    x, y = batch_of(windows, epoch * count + np.arange(count))
    assert sorted(x[:, 0].tolist()) == [w * seq_len for w in range(count)]
    assert sorted(y.flatten().tolist()) == list(range(1, count * seq_len + 1))
    assert torch.equal(y, x + 1) and x.shape == (count, seq_len)


def test_epochs_and_seeds_differ_in_order():
    def order(seed, epoch):
        x, _ = batch_of(lm.Windows(PLACES[:801], 8, seed), epoch * 100 + np.arange(100))
        return tuple(x[:, 0].tolist())

    assert len({order(seed, epoch) for seed in range(5) for epoch in range(5)}) == 25


@pytest.mark.parametrize(("length", "count"), [(16, 0), (17, 1), (32, 1), (33, 2), (48, 2)])
def test_the_last_window_is_whole(length, count):
    if not count:
        with pytest.raises(lm.UserError):
            lm.Windows(PLACES[:length], 16, 0)
        return
    windows = lm.Windows(PLACES[:length], 16, 0)
    x, y = batch_of(windows, np.arange(count))
    assert windows.count == count and x.shape == (count, 16)
    assert y.max() == count * 16 <= length - 1 < (count + 1) * 16


@given(st.integers(0, 2**31), st.integers(0, 10**12))
def test_a_sample_depends_on_seed_and_number_alone(seed, i):
    windows = lm.Windows(PLACES[:4001], 16, seed)
    alone, _ = batch_of(windows, np.array([i]))
    among, _ = batch_of(lm.Windows(PLACES[:4001], 16, seed), np.array([i + 700, 3, i, i + 1]))
    assert torch.equal(alone[0], among[2])


@given(st.integers(0, 5000), st.sampled_from([1, 2, 3, 4, 6, 12]), st.data())
def test_batch_accumulation_and_ranks_are_interchangeable(first, batch, data):
    accum = data.draw(st.sampled_from(lm.divisors(12 // batch)))
    world = 12 // batch // accum
    windows = lm.Windows(PLACES[:1009], 16, seed=5)
    want = rows_of([batch_of(windows, first + np.arange(12))])
    assert sorted(whole_step(windows, first, batch, accum, world)) == sorted(want)


def test_a_step_counts_its_samples_and_shapes():
    windows = lm.Windows(PLACES[:1009], 16, seed=5)
    step = windows.step(0, 3, 2, rank=1, world=4)
    assert (step.samples, step.tokens, step.targets) == (24, 3 * 2 * 16, 3 * 2 * 16)
    assert [tuple(t.shape) for micro in step.micros for t in micro] == [(3, 16)] * 4
    assert all(t.dtype == torch.int64 and t.is_contiguous() for m in step.micros for t in m)


def test_steps_in_turn_use_every_window_once_across_the_end_of_an_epoch():
    windows, seen = lm.Windows(PLACES[:1009], 16, seed=5), []
    while len(seen) < 2 * 63:
        seen += whole_step(windows, len(seen), 7, 1, 3)
    assert len(set(seen[:63])) == len(set(seen[63:126])) == 63 and seen[:63] != seen[63:126]


def test_large_ids_survive():
    ids = np.array([65534, 65535, 0, 65535, 1], np.uint16)
    x, y = batch_of(lm.Windows(ids, 2, 0), np.arange(2))
    assert sorted(map(tuple, torch.cat((x, y[:, -1:]), 1).tolist())) == [
        (0, 65535, 1),
        (65534, 65535, 0),
    ]
    wide = np.array([2**31, 2**32 - 1, 7], np.uint32)
    assert batch_of(lm.Windows(wide, 2, 0), np.array([0]))[1].tolist() == [[2**32 - 1, 7]]


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


# --- mixtures -------------------------------------------------------------------------------------

WEIGHTS = [0.7, 0.2, 0.1]
SHARES = [717, 205, 102]  # of 1024, the ends of the parts rounded: 716.8, 921.6, 1024


def mixture(weights=WEIGHTS, length=401, seed=5):
    """Streams of which each id tells its domain by its thousands and its place by the rest."""
    parts = [lm.Windows(PLACES[1000 * d : 1000 * d + length], 8, seed) for d in range(len(weights))]
    return lm.Mixture(parts, weights)


def domains_of(mixed, first, count):
    x, _ = batch_of(mixed, first + np.arange(count))
    return (x[:, 0] // 1000).tolist()


@pytest.mark.parametrize("block", [0, 1, 7, 10**6])
def test_each_block_of_a_mixture_holds_each_share_exactly(block):
    found = domains_of(mixture(), block * 1024, 1024)
    assert lm.MIXTURE_BLOCK == 1024 and [found.count(d) for d in range(3)] == SHARES
    thirds = np.array(found[:1023]).reshape(3, 341)  # and they are mixed, not in turn
    assert all(abs((row == d).mean() - w) < 0.1 for row in thirds for d, w in enumerate(WEIGHTS))


@given(st.lists(st.integers(1, 50), min_size=2, max_size=6), st.integers(0, 9))
def test_shares_are_the_weights_within_one_sample(weights, block):
    weights = [w / sum(weights) for w in weights]
    found = domains_of(mixture(weights), block * 1024, 1024)
    for domain, weight in enumerate(weights):
        assert abs(found.count(domain) - 1024 * weight) <= 1


def test_blocks_and_seeds_of_a_mixture_differ_in_order():
    orders = {
        tuple(domains_of(mixture(seed=seed), 1024 * block, 1024))
        for seed in range(4)
        for block in range(4)
    }
    assert len(orders) == 16


@given(st.integers(0, 10**12))
def test_a_mixtures_sample_depends_on_its_number_alone(i):
    alone, _ = batch_of(mixture(), np.array([i]))
    among, targets = batch_of(mixture(), np.array([i + 700, 3, i, i + 1]))
    assert torch.equal(alone[0], among[2]) and torch.equal(targets, among + 1)
    assert not torch.equal(
        batch_of(mixture(seed=6), np.arange(i, i + 8))[0],
        batch_of(mixture(), np.arange(i, i + 8))[0],
    )


def test_whole_blocks_use_each_domains_samples_in_turn():
    domains, numbers = mixture().domains(np.arange(4 * 1024))
    for domain, share in enumerate(SHARES):
        assert sorted(numbers[domains == domain].tolist()) == list(range(4 * share))


def test_a_domain_repeats_nothing_before_its_epoch_ends():
    mixed, seen = mixture(), {0: [], 1: [], 2: []}  # each domain has 50 windows
    for x in batch_of(mixed, np.arange(3 * 1024))[0]:
        seen[int(x[0]) // 1000].append(int(x[0]) % 1000)
    for domain, places in seen.items():
        assert len(places) == 3 * SHARES[domain]
        epochs = [places[i : i + 50] for i in range(0, len(places), 50)]
        assert all(len(set(epoch)) == len(epoch) for epoch in epochs)
        assert all(set(epoch) == set(range(0, 400, 8)) for epoch in epochs[:-1])
        assert len({tuple(epoch) for epoch in epochs}) == len(epochs)


@given(st.integers(0, 5000), st.sampled_from([1, 2, 3, 4, 6, 12]), st.data())
def test_any_split_of_a_mixture_is_the_same_step(first, batch, data):
    accum = data.draw(st.sampled_from(lm.divisors(12 // batch)))
    world = 12 // batch // accum
    want = rows_of([batch_of(mixture(), first + np.arange(12))])
    assert sorted(whole_step(mixture(), first, batch, accum, world)) == sorted(want)


def test_a_mixture_goes_on_where_it_stopped():
    mixed = mixture()
    through = [rows_of(mixed.step(k * 10, 5, 2, 0, 1).micros) for k in range(210)]
    resumed = [rows_of(mixture().step(k * 10, 5, 2, 0, 1).micros) for k in range(100, 210)]
    assert through[100:] == resumed


def test_a_part_of_less_than_one_sample_is_refused():
    with pytest.raises(lm.UserError, match="1024"):
        mixture([0.9999, 0.0001])


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("data", [("", "data", 1.0)]),
        ("some where/data:2", [("", "some where/data:2", 1.0)]),
        (
            "web=data/web:0.9,code=data/code:0.1",
            [("web", "data/web", 0.9), ("code", "data/code", 0.1)],
        ),
        ("a=x:3,b-2=y:1", [("a", "x", 0.75), ("b-2", "y", 0.25)]),
        ("a=C:/x:.5,b=y:1.5", [("a", "C:/x", 0.25), ("b", "y", 0.75)]),
        ("only=x:7", [("only", "x", 1.0)]),
    ],
)
def test_data_dir_is_a_folder_or_a_mixture(text, parts):
    settings = lm.DataSettings(text)
    assert lm.check(settings) == []
    assert [(n, f, pytest.approx(w)) for n, f, w in parts] == settings.domains()


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("a=x", ["a=x"]),
        ("a=x:", ["a=x:"]),
        ("a=x:0", ["a=x:0"]),
        ("a=x:-1", ["a=x:-1"]),
        ("a=x:two", ["a=x:two"]),
        ("=x:1", ["=x:1"]),
        ("a=:1", ["a=:1"]),
        ("a=x:1,b", ["b"]),
        ("a=x:1,", [""]),
        ("a b=x:1,c=y:nan", ["a b=x:1", "c=y:nan"]),
        ("a=x:1:inf", ["a=x:1:inf"]),
    ],
)
def test_every_mistake_in_a_mixture_is_named(text, wrong):
    faults = lm.check(lm.DataSettings(text))
    assert [what for what, _ in faults] == [
        f"--data_dir: {part} is not NAME=FOLDER:WEIGHT with a weight above 0" for part in wrong
    ]
    assert all("web=data/web:0.9" in fix for _, fix in faults)


def test_a_name_given_twice_is_refused():
    faults = lm.check(lm.DataSettings("web=x:1,web=y:1"))
    assert len(faults) == 1 and "web" in faults[0][0], "val/loss/web would be of one of them"


def test_parts_with_other_tokenizers_are_refused(run, corpus, data_dir, tmp_path):
    other = tmp_path / "other"
    assert (
        run(
            ["prep", "--text_path", corpus, "--out_dir", other, "--vocab_size", 410, "--workers", 1]
        )[0]
        == 0
    )
    with pytest.raises(lm.UserError, match="one tokenizer"):
        lm.open_domains(lm.DataSettings(f"a={data_dir}:1,b={other}:1"))
    domains = lm.open_domains(lm.DataSettings(f"a={data_dir}:1,b={data_dir}:3"))
    assert [(name, weight) for name, _, weight in domains] == [("a", 0.25), ("b", 0.75)]
    parts = [lm.Windows(folder.train, 32, seed=1) for _, folder, _ in domains]
    stream = lm.mixed(parts, [0.25, 0.75])
    assert isinstance(stream, lm.Mixture) and stream.parts == parts
    assert lm.mixed(parts[:1], [1.0]) is parts[0]


# --- evaluation -----------------------------------------------------------------------------------


@given(
    st.integers(0, 300),
    st.integers(2, 33),
    st.integers(1, 5),
    st.integers(1, 4),
    st.integers(1, 400),
)
def test_evaluation_sees_every_target_once(length, seq_len, batch, world, most):
    """And every rank as many micro-batches, some without targets."""
    ids = PLACES[100 : 100 + length]  # clear of PAD
    targets, numbers = [], []
    for rank in range(world):
        windows = lm.EvaluationWindows(ids[: most + 1], seq_len, batch)
        batches = [*windows.in_order(batch, most, rank, world)]
        numbers.append(len(batches))
        for i, ((x, y), count) in enumerate(batches):
            assert count == (y != lm.IGNORE).sum()
            real = y != lm.IGNORE
            assert x.shape == y.shape == (batch, seq_len)
            assert torch.equal(x[real] + 1, y[real])
            if real.any():
                assert (x[~real] == lm.PAD).all()
            else:
                assert rank and i + 1 == len(batches)
            targets += y[real].tolist()
    assert len(set(numbers)) == 1
    assert sorted(targets) == list(range(101, 101 + min(max(0, length - 1), most)))


def test_evaluation_windows_do_not_depend_on_batch_or_ranks():
    def windows(batch, world):
        found = []
        for rank in range(world):
            stream = lm.EvaluationWindows(PLACES[50:141], 8, batch)
            batches = stream.in_order(batch, 90, rank, world)
            found += rows_of([micro for micro, _ in batches])
        return {row for row in found if set(row[1]) != {lm.IGNORE}}

    assert windows(1, 1) == windows(5, 1) == windows(2, 3) == windows(4, 4)


# --- made rows ------------------------------------------------------------------------------------

TASKS = ("add", "countdown", "sort", "copy")


def made(task, difficulty=2, count=60, seed=0):
    return lm.task_rows(lm.TaskSettings(task, difficulty, count), seed)


def numbers_in(text):
    return [int(word) for word in re.findall(r"\d+", text)]


def add_is_right(row, difficulty):
    a, b = re.fullmatch(r"What is (\d+) \+ (\d+)\?", row["prompt"]).groups()
    assert row["answer"] == row["response"] == str(int(a) + int(b))
    assert {len(a), len(b)} <= set(range(min(2, difficulty), difficulty + 1))


def countdown_is_right(row, difficulty):
    """Every order and every choice of signs is tried, with Python's own precedence."""
    target, *numbers = numbers_in(row["prompt"])
    assert numbers == row["numbers"] and len(numbers) == max(2, difficulty)
    assert 0 < target < 100 and row["answer"] == str(target) and min(numbers) > 0
    found = set()
    for order in itertools.permutations(numbers):
        for signs in itertools.product("+-*", repeat=len(order) - 1):
            text = "".join(f"{n}{sign}" for n, sign in zip(order, (*signs, ""), strict=True))
            found.add((eval(text), text))
    solved = next(text for value, text in found if value == target)
    assert lm.REWARDS["countdown"](row["prompt"], solved, row) == 1.0
    wrong = next((text for value, text in found if value != target), None)
    assert wrong is None or lm.REWARDS["countdown"](row["prompt"], wrong, row) == 0.1
    assert sorted(numbers_in(row["response"])) == sorted(numbers)
    assert lm.REWARDS["countdown"]("", row["response"], row) == (
        1.0 if eval(row["response"]) == target else 0.1
    )


def sort_is_right(row, difficulty):
    asked, answer = numbers_in(row["prompt"]), numbers_in(row["answer"])
    assert len(asked) == difficulty + 1 and row["response"] == row["answer"]
    for number in answer:
        asked.remove(number)
    assert not asked and all(a <= b for a, b in zip(answer, answer[1:], strict=False))


def copy_is_right(row, difficulty):
    assert row["response"] == row["answer"] and len(row["answer"].split()) == difficulty + 1
    assert row["prompt"] == f"Repeat {row['answer']}." and re.fullmatch("[a-z ]+", row["answer"])


@pytest.mark.parametrize("difficulty", [1, 2, 3, 4])
@pytest.mark.parametrize("task", TASKS)
def test_made_rows_differ_and_their_answers_are_right(task, difficulty):
    rows = made(task, difficulty, 30)
    assert len(rows) == len({row["prompt"] for row in rows}) == 30
    for row in rows:
        globals()[f"{task}_is_right"](row, difficulty)


@pytest.mark.parametrize("task", TASKS)
def test_the_tasks_own_reward_knows_the_right_answer_from_a_wrong_one(task):
    assert set(lm.TASKS) == set(lm.TASK_REWARDS) == set(TASKS)
    reward = lm.REWARDS[lm.TASK_REWARDS[task]]
    for row in made(task, 3):
        if task != "countdown":
            assert reward(row["prompt"], row["response"], row) == 1.0
            assert reward(row["prompt"], "1" + row["response"], row) == 0.0
        assert reward(row["prompt"], "", row) == 0.0


@pytest.mark.parametrize("task", TASKS)
def test_made_rows_depend_on_seed_and_difficulty_alone(task):
    rows = made(task, 3)
    random.seed(7)
    assert made(task, 3) == rows and made(task, 3, 20) == rows[:20], "and not on how many are made"
    random.seed(8)
    others = [made(task, 3, seed=1), made(task, 4), made(task, 3)]
    prompts = [{row["prompt"] for row in some} for some in others]
    assert others[2] == rows and len(prompts[0] & prompts[2]) < 10 > len(prompts[1] & prompts[2])


def test_there_are_as_many_rows_as_there_are_different_ones():
    rows = made("add", 1, 200)
    assert {row["prompt"] for row in rows} == {
        f"What is {a} + {b}?" for a in range(10) for b in range(10)
    }
    assert len(made("copy", 1, 1000)) == 26**2


def test_sums_are_of_every_size_equally_often():
    sizes = [tuple(map(len, re.findall(r"\d+", row["prompt"]))) for row in made("add", 3, 2000)]
    counts = [sizes.count(pair) for pair in ((2, 2), (2, 3), (3, 2), (3, 3))]
    assert sum(counts) == 2000 and all(abs(count - 500) < 100 for count in counts)
    parts = np.array([numbers_in(row["prompt"]) for row in made("add", 2, 2000)])
    assert parts.min() == 10 and parts.max() == 99 and abs(parts.mean() - 54.5) < 2


@pytest.mark.parametrize(("difficulty", "least", "most"), [(2, 0.2, 0.6), (3, 0.02, 0.3)])
def test_countdowns_responses_are_right_by_chance_alone(difficulty, least, most):
    rows = made("countdown", difficulty, 400)
    right = sum(eval(row["response"]) == int(row["answer"]) for row in rows)
    assert least < right / len(rows) < most, "what SFT learns from them is the form"


# --- arithmetic -----------------------------------------------------------------------------------


def joined(parts):
    """An expression in brackets of two others, with its value or None where that is undefined."""
    (a, x), sign, (b, y) = parts
    gap = " " if len(a) % 2 else ""
    known = x is not None and y is not None and (sign != "/" or y)
    value = {"+": lambda: x + y, "-": lambda: x - y, "*": lambda: x * y, "/": lambda: x / y}
    return f"({a}{gap}{sign}{gap}{b})", value[sign]() if known else None


EXPRESSIONS = st.recursive(
    st.integers(0, 99).map(lambda n: (str(n), Fraction(n))),
    lambda inner: st.one_of(
        st.tuples(inner, st.sampled_from("+-*/"), inner).map(joined),
        inner.map(lambda part: (f"-{part[0]}", None if part[1] is None else -part[1])),
    ),
    max_leaves=8,
)


@given(EXPRESSIONS)
def test_arithmetic_is_exact(expression):
    text, value = expression
    if value is None:
        with pytest.raises(ValueError, match="arithmetic"):
            lm.arithmetic(text)
    else:
        assert lm.arithmetic(f" {text}\n") == value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1 + 2 * 3", 7),
        ("(1 + 2) * 3", 9),
        ("2 - 3 - 4", -5),
        ("8 / 4 / 2", 1),
        ("1/3 + 1/6", 0.5),
        ("- 2 * -3", 6),
        ("+5", 5),
        ("0 * 7", 0),
        ("10 - (2 - 3)", 11),
    ],
)
def test_arithmetic_knows_precedence(text, value):
    assert lm.arithmetic(text) == value


@pytest.mark.parametrize(
    "text",
    """
x|a + 1|abs(3)|__import__("os")|exit()|(1).real|[1][0]|[1]|(1, 2)|1, 2|{1}|1 if 1 else 2|lambda: 1
1 == 1|1 < 2|1 and 2|not 1|~1|1 // 2|7 % 4|2 ** 3|2 ** 9 ** 9 ** 9|1 << 9|1 << 99999999999
1 & 2|1 ^ 2|2 @ 3|1.5|.5|1e3|2j|True|None|...|"1"|"a" * 9|f"{1}"|(x := 1)|await 1|1; 2|1 +|+|* 2
(1|1)|)(||1 2|2(3)|1 / 0|1 / (2 - 2)|1 % 0|\x00|1\x00|٣|²|½|1 − 2|3 × 4|1 = 1|1 + 2 = 3|1!|3,4|$5
0x1f|0b11|0o7|1_000|1 # 2|# 1""".replace("\n", "|").split("|")
    + ["1 | 2"],
)
def test_nothing_but_arithmetic_is_computed(text):
    with pytest.raises(ValueError, match="arithmetic"):
        lm.arithmetic(text)


@pytest.mark.parametrize(
    "text",
    [
        "9" * 5000,
        "(" * 5000 + "1" + ")" * 5000,
        "-" * 20000 + "1",
        "1" + "+1" * 20000,
        "9" * 4000 + "*9" * 20000,
        "(" * 99999,
    ],
)
def test_arithmetic_without_end_is_refused_at_once(text):
    began = time.monotonic()
    with pytest.raises(ValueError, match="arithmetic"):
        lm.arithmetic(text)
    assert time.monotonic() - began < 5
