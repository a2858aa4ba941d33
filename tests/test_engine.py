"""Room Engine: sampling and cached generation."""

import contextlib
import random

import numpy as np
import pytest
import torch
from test_model import build, some_ids
from transformers import (
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

import standalone_transformer_lm as lm

CONTEXT = 16  # of the tiny model
RAGGED = [[5], [9, 8, 7, 6, 5, 4, 3], [1, 60, 0, 2], [11, 12, 13, 14, 15, 16, 17, 18, 19, 20]]
GREEDY = {"temperature": 0.0}
SAMPLED = {"temperature": 1.3, "top_k": 40, "top_p": 0.97}
FUSSY = {"temperature": 0.9, "top_p": 0.9, "repetition_penalty": 1.4, "no_repeat_ngram_size": 2}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(1)
    return build(n_kv_head=2, tie=False)


def sampling(**changes):
    off = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "max_new_tokens": 12}
    return lm.SamplingSettings(**off | changes)


def processed(scores, history, s):
    """transformers' processors on scores (1, V), in the documented order."""
    steps = []
    if s.repetition_penalty != 1:
        steps.append(RepetitionPenaltyLogitsProcessor(s.repetition_penalty))
    if s.no_repeat_ngram_size:
        steps.append(NoRepeatNGramLogitsProcessor(s.no_repeat_ngram_size))
    if s.temperature not in (0, 1):
        steps.append(TemperatureLogitsWarper(s.temperature))
    if s.temperature and 0 < s.top_k < scores.shape[-1]:
        steps.append(TopKLogitsWarper(s.top_k))
    if s.temperature and s.top_p < 1:
        steps.append(TopPLogitsWarper(s.top_p))
    for step in steps:
        scores = step(torch.tensor([history]), scores)
    return scores


def draw_by_hand(scores, u, s):
    """Invert the cumulative distribution at u in float64: by falling score where scores are cut."""
    if s.temperature == 0:
        return int(scores.argmax())
    shares = scores[0].double().softmax(0)
    cut = s.top_p < 1 or 0 < s.top_k < len(shares)
    order = sorted(range(len(shares)), key=lambda i: -shares[i]) if cut else range(len(shares))
    mass = 0.0
    for i in order:
        mass += float(shares[i])
        if u < mass:
            return i
    return order[-1]


def write_by_hand(model, prompt, s, seed=0, row=0, stop=(), context=CONTEXT):
    """No cache, no batch: each id from a whole forward pass over what the context holds.

    A text longer than the context is read from its newest half, and grows again from there.
    """
    history, out = list(prompt), []
    window = history if len(history) <= context else history[-(context // 2) :]
    chances = lm.uniforms(seed, row, s.max_new_tokens)
    for u in chances.tolist():
        with torch.no_grad():
            scores = model(torch.tensor([window]))[:, -1]
        out.append(draw_by_hand(processed(scores, history, s), u, s))
        history = history + out[-1:]
        window = window + out[-1:]
        if out[-1] in stop:
            return out
        if len(window) > context:
            window = history[-(context // 2) :]
    return out


def all_by_hand(model, prompts, s, **kwargs):
    return [write_by_hand(model, p, s, row=r, **kwargs) for r, p in enumerate(prompts)]


# --- one row alone --------------------------------------------------------------------------------


def test_cached_logits_equal_uncached(model):
    ids = some_ids(2, CONTEXT)
    cache = lm.KVCache(model.config, 2, torch.device("cpu"), torch.float32)
    whole, pieces, at = model(ids), [], 0
    for size in (3, 1, 1, 5, 1, 5):  # first pass, single steps, and several ids at once
        pieces.append(model(ids[:, at : at + size], cache))
        at += size
        assert cache.lengths == [at, at]
    assert torch.allclose(torch.cat(pieces, 1), whole, atol=1e-4)


def test_prefill_gives_each_prompts_own_logits(model):
    logits, cache = lm.prefill(model, RAGGED, torch.float32)
    for row, prompt in zip(logits, RAGGED, strict=True):
        assert torch.allclose(row, model(torch.tensor([prompt]))[0, -1], atol=1e-4)
    assert cache.lengths == [1, 7, 4, 10]


@pytest.mark.parametrize("how", [GREEDY, SAMPLED, FUSSY], ids=["greedy", "sampled", "fussy"])
@pytest.mark.parametrize("length", [1, 2, 7, CONTEXT - 1, CONTEXT, CONTEXT + 1, 50])
def test_a_prompt_of_any_length_continues_past_the_context(model, how, length):
    prompt, s = some_ids(1, length)[0].tolist(), sampling(max_new_tokens=40, **how)
    assert lm.complete(model, [prompt], s, 5) == all_by_hand(model, [prompt], s, seed=5)


def test_going_on_equals_prompting_with_what_was_written(model):
    s = sampling(temperature=0.0, max_new_tokens=12)
    (out,) = lm.complete(model, [RAGGED[2]], s, 0)
    for k in range(1, 12):
        rest = sampling(temperature=0.0, max_new_tokens=12 - k)
        assert lm.complete(model, [RAGGED[2] + out[:k]], rest, 0) == [out[k:]], k


def test_the_smallest_context(model):
    tiny = build(seq_len=2, tie=False)
    s = sampling(temperature=0.0, max_new_tokens=9)
    prompts = [[4], [5, 6], [7, 8, 9]]
    assert lm.complete(tiny, prompts, s, 0) == all_by_hand(tiny, prompts, s, context=2)


# --- many rows ------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", [GREEDY, SAMPLED, FUSSY], ids=["greedy", "sampled", "fussy"])
def test_a_row_writes_the_same_alone_and_in_a_batch(model, how):
    s = sampling(max_new_tokens=6, **how)
    assert lm.complete(model, RAGGED, s, 3) == all_by_hand(model, RAGGED, s, seed=3)


@pytest.mark.parametrize("how", [GREEDY, SAMPLED, FUSSY], ids=["greedy", "sampled", "fussy"])
def test_a_row_writes_the_same_in_a_batch_past_the_context(model, how):
    prompts = [*RAGGED, some_ids(1, 15)[0].tolist(), some_ids(1, 40)[0].tolist()]
    s = sampling(max_new_tokens=30, **how)
    assert lm.complete(model, prompts, s, 3) == all_by_hand(model, prompts, s, seed=3)


def test_equal_prompts_share_a_prefill_and_differ_in_what_they_draw(model, monkeypatch):
    sizes, prefill = [], lm.prefill
    monkeypatch.setattr(lm, "prefill", lambda *a: sizes.append(len(a[1])) or prefill(*a))
    prompts, s = [RAGGED[1], RAGGED[0]] * 4, sampling(max_new_tokens=6)
    rows = lm.complete(model, prompts, s, 2)
    assert sizes == [2] and len(set(map(tuple, rows))) == 8
    assert rows == all_by_hand(model, prompts, s, seed=2)


def test_stop_ids_end_rows_which_leave_without_changing_the_others(model, monkeypatch):
    sizes, real, stop = [], model.hidden, frozenset(range(6))
    monkeypatch.setattr(model, "hidden", lambda i, *r: sizes.append(len(i)) or real(i, *r))
    prompts, s = [[p] for p in range(20, 32)], sampling(max_new_tokens=14, temperature=2.0)
    rows = lm.complete(model, prompts, s, 4, stop)
    monkeypatch.undo()
    assert rows == all_by_hand(model, prompts, s, seed=4, stop=stop)
    ended = [row for row in rows if row[-1] in stop]
    assert len(ended) > 4 and len({len(row) for row in ended}) > 2, "rows end at different times"
    assert all(not stop & set(row[:-1]) for row in rows), "nothing follows a stop id"
    assert sizes == sorted(sizes, reverse=True) and sizes[-1] < sizes[0] == 12


def test_generation_ends_when_every_row_has(model, monkeypatch):
    calls, real = [], model.hidden
    monkeypatch.setattr(model, "hidden", lambda i, *r: calls.append(len(i)) or real(i, *r))
    everything = frozenset(range(61))
    rows = lm.complete(model, RAGGED, sampling(), 0, everything)
    assert [len(row) for row in rows] == [1] * 4 and calls == [4]


def test_ids_stream_as_they_are_drawn(model):
    stream = lm.generate(model, RAGGED, sampling(max_new_tokens=3), 0)
    assert [row for row, _ in stream] == [0, 1, 2, 3] * 3
    assert not torch.is_inference_mode_enabled()


def test_seeds(model):
    s = sampling()
    assert lm.complete(model, RAGGED, s, 1) == lm.complete(model, RAGGED, s, 1)
    assert lm.complete(model, RAGGED, s, 1) != lm.complete(model, RAGGED, s, 2)
    numbers = torch.stack([lm.uniforms(seed, row, 4) for seed in range(40) for row in range(40)])
    assert len(set(numbers.flatten().tolist())) > 6390 and numbers.max() < 1 <= numbers.min() + 1
    for column in numbers.T:  # neighbouring rows and seeds must not draw alike
        counts = torch.histc(column, 10, 0, 1)
        assert ((counts - 160) ** 2 / 160).sum() < 40
        assert abs(np.corrcoef(column[:-1], column[1:])[0, 1]) < 0.1


def test_the_callers_prompts_are_left_alone(model):
    prompts = [[5, 6], [5, 6], [7]]
    lm.complete(model, prompts, sampling(), 0)
    assert prompts == [[5, 6], [5, 6], [7]]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_whole_vocabulary_may_be_banned(temperature):
    small = build(vocab_size=5, tie=False)
    s = sampling(no_repeat_ngram_size=1, temperature=temperature, max_new_tokens=9)
    (row,) = lm.complete(small, [[4]], s, 0)
    assert sorted(row[:4]) == [0, 1, 2, 3] and len(row) == 9 and set(row) <= set(range(5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_generation_under_autocast(model, dtype):
    with torch.autocast("cpu", dtype) if dtype != torch.float32 else contextlib.nullcontext():
        rows = lm.complete(model, RAGGED, sampling(max_new_tokens=20), 1, dtype=dtype)
    assert [len(row) for row in rows] == [20] * 4
    assert all(0 <= token < 61 for row in rows for token in row)


# --- rows in turn ---------------------------------------------------------------------------------

KINDS = {
    "plain": {},
    "gqa": {"n_kv_head": 2},
    "window": {"window": 5},
    "sinks": {"n_sink": 3},
    "gqa+sinks+window": {"n_kv_head": 2, "n_sink": 2, "window": 6},
}
QUEUE = [
    RAGGED[1],
    [33],
    [5, 6] * 20,
    RAGGED[3],
    RAGGED[1],
    [1, 2, 3] * 5,
    [7] * 16,
    [44, 2],
    [44, 2],
    list(range(40, 57)),
]


def alone(model, prompts, s, seed, stop=frozenset(), first=0):
    return [
        lm.complete(model, [p], s, seed, stop, numbers=[first + r])[0]
        for r, p in enumerate(prompts)
    ]


def ended(rows, stop):
    """The rows, each up to its first id of `stop`."""
    ends = [next((i + 1 for i, t in enumerate(row) if t in stop), len(row)) for row in rows]
    return [row[:end] for row, end in zip(rows, ends, strict=True)]


TURNS = {"greedy": ({}, GREEDY), "fussy": ({}, FUSSY)} | {
    kind: (shape, SAMPLED) for kind, shape in KINDS.items()
}


@pytest.fixture(params=TURNS, scope="module")
def line(request):
    """A model, settings, stop ids by which rows end at different times, and what rows write."""
    shape, how = TURNS[request.param]
    network, s = build(tie=False, **shape), sampling(max_new_tokens=18, **how)
    whole = alone(network, QUEUE, s, 11)
    stop = frozenset({whole[2][0], whole[0][3], whole[7][4]})
    want = ended(whole, stop)
    lengths = {len(row) for row in want}
    assert 1 in lengths and len(lengths) > 3 and max(lengths) > 9, "the test needs such rows"
    return network, s, stop, want


def test_rows_that_wait_write_the_same_as_alone(line):
    network, s, stop, want = line
    for at_once in (2, 5):
        assert lm.complete(network, QUEUE, s, 11, stop, at_once=at_once) == want, at_once


def run_as_it_is(monkeypatch, network, sizes, ends):
    """What would be compiled runs as it is; its batch sizes and ends are noted."""
    real = lm.Transformer.next_logits

    def step(model, ids, positions, cache, end):
        sizes.append(len(ids))
        ends.append(end)
        assert positions.tolist() == [[length] for length in cache.lengths]
        return real(model, ids, positions, cache, end)

    monkeypatch.setattr(lm, "compiled_once", lambda function, **options: {real: step}[function])
    monkeypatch.setattr(lm, "LEAST_END", 4)
    monkeypatch.setattr(lm, "LEAST_ROWS", 2)


@pytest.mark.parametrize("cuda", [False, True])
def test_steps_of_fixed_shapes_write_the_same(line, monkeypatch, cuda):
    """What is compiled, run as it is: few sizes, padded with ended rows and unseen keys; on CUDA
    several ids are drawn before one is looked at."""
    network, s, stop, want = line
    sizes, ends, looks = [], [], []
    run_as_it_is(monkeypatch, network, sizes, ends)
    real = lm.Decoder.run

    def run(self, *args):
        drawn, logps = real(self, *args)
        looks.append(len(drawn))
        return drawn, logps

    monkeypatch.setattr(lm.Decoder, "run", run)
    monkeypatch.setattr(lm, "on_cuda", lambda x: cuda)
    logps = [[] for _ in QUEUE]
    found = lm.complete(network, QUEUE, s, 11, stop, at_once=6, compiled=True, logps=logps)
    assert found == want
    assert sizes[0] == 8 and sizes == sorted(sizes, reverse=True)
    assert {8, 4} <= set(sizes) <= {8, 4, 2}
    assert set(ends) <= {4, 8, 16, CONTEXT + network.config.n_sink}
    assert (max(looks) > 1) == (cuda and not s.penalises), "penalties need each id at once"
    alone = [[] for _ in QUEUE]
    monkeypatch.setattr(lm, "on_cuda", lambda x: False)
    lm.complete(network, QUEUE, s, 11, stop, logps=alone)
    for mine, theirs in zip(logps, alone, strict=True):
        assert mine == pytest.approx(theirs, abs=1e-4, nan_ok=s.temperature == 0)


def test_compiled_batches_share_one_memory(monkeypatch):
    """A captured graph writes to addresses: those of one batch are those of the next."""
    network, s = build(tie=False), sampling(max_new_tokens=6)
    run_as_it_is(monkeypatch, network, [], [])
    seen, real = [], lm.Decoder.step

    def step(self, ids):
        seen.append([tensor.data_ptr() for tensor in self.cache.tensors])
        assert all(tensor._dynamo_static_input_type for tensor in self.cache.tensors)
        return real(self, ids)

    monkeypatch.setattr(lm.Decoder, "step", step)
    for seed in range(3):
        lm.complete(network, QUEUE, s, seed, compiled=True)
    assert len(seen) > 12 and all(addresses == seen[0] for addresses in seen)
    monkeypatch.setattr(lm.Decoder, "step", real)
    pairs = []
    for compiled in (True, False):  # two at a time never write to one memory
        first, other = (
            lm.generate(network, prompts, s, 0, compiled=compiled)
            for prompts in (QUEUE[:2], QUEUE[2:4])
        )
        pairs.append(list(zip(first, other, strict=False)))
    assert pairs[0] == pairs[1]


def test_a_compiled_running_batch_writes_the_same_and_moves_seldom(monkeypatch):
    """Texts join and leave, also from outside inference mode; a batch that could not become
    smaller is left as it is."""
    network, s = build(tie=False), sampling(max_new_tokens=9)
    sizes, moves = [], []
    run_as_it_is(monkeypatch, network, sizes, [])
    monkeypatch.setattr(lm, "LEAST_ROWS", 4)
    real = lm.RunningBatch.resize

    def resize(self, rows):
        moves.append((len(self.rows), rows))
        real(self, rows)
        assert len(self.rows) != moves[-1][0], "nothing is moved for nothing"

    monkeypatch.setattr(lm.RunningBatch, "resize", resize)
    batch = lm.RunningBatch(network, 8, torch.float32, compiled=True)
    texts = [lm.Generation(list(prompt), s, 5, i) for i, prompt in enumerate(QUEUE)]
    waiting, found = list(texts), {one: [] for one in texts}
    gone = texts[1]
    while waiting or batch.live():
        while waiting and not batch.full:
            batch.join(waiting.pop(0))
        for one, drawn in batch.step():
            found[one].append(drawn.token)
        if len(found[gone]) == 3:
            batch.leave(gone)
    want = lm.complete(network, QUEUE, s, 5)
    for i, one in enumerate(texts):
        assert found[one] == want[i][: len(found[one])] and (one is gone or len(found[one]) == 9)
    assert set(sizes) <= {1, 4, 8} and len(set(sizes)) > 1
    batch.close()
    assert network.memory is not None, "it is kept for the next"


def under_way(model, prompts, s, at_once, stop=frozenset(range(0, 61, 9))):
    """Of a run: what it yielded, and by each pass through the model which rows were under way."""
    rows, moments, passes, real = [[] for _ in prompts], [], [], model.hidden

    def hidden(ids, *rest):
        passes.append(len(ids))
        return real(ids, *rest)

    model.hidden = hidden
    try:
        for row, token in lm.generate(model, prompts, s, 4, stop, at_once=at_once):
            rows[row].append(token)
            live = {
                r
                for r, out in enumerate(rows)
                if out and out[-1] not in stop and len(out) < s.max_new_tokens
            }
            moments.append(live | {row})
    finally:
        del model.hidden
    return rows, moments, passes


@pytest.mark.parametrize("at_once", [1, 2, 3, 5])
def test_no_more_rows_than_asked_are_under_way(model, at_once):
    rows, moments, passes = under_way(model, QUEUE, sampling(max_new_tokens=14), at_once)
    assert max(map(len, moments)) == at_once == max(passes)
    assert all(rows) and len(moments) == sum(map(len, rows))


def test_waiting_rows_enter_while_others_run(model):
    """One row of 60 beside 40 of three: no one waits for the slowest."""
    prompts, s = [[5, 6, 7]] + [[9, 8]] * 40, sampling(temperature=0.0, max_new_tokens=60)
    (long,), (brief,) = (lm.complete(model, [p], s, 0) for p in prompts[:2])
    stop = frozenset({next(t for t in brief[2:] if t not in long)})
    want = alone(model, prompts[:2], s, 0, stop)
    assert len(want[0]) == 60 > 12 >= len(want[1]), "the test needs a long row and a short one"
    rows, moments, passes = under_way(model, prompts, s, 5, stop)
    assert rows == [want[0]] + [want[1]] * 40
    began = [min(i for i, live in enumerate(moments) if row in live) for row in range(41)]
    assert began == sorted(began), "first come, first served"
    steps = 10 * len(want[1])  # four places beside the long row, a tenth of 40 rows each
    assert len(passes) <= max(60, steps) + 41 + 20
    assert sum(0 in live and len(live) > 1 for live in moments) > len(moments) / 2


def test_rows_that_end_at_their_first_token_make_room_without_a_step(model):
    everything = frozenset(range(61))
    for at_once in (1, 3, 50):
        rows, moments, passes = under_way(model, QUEUE, sampling(), at_once, everything)
        assert [len(row) for row in rows] == [1] * len(QUEUE)
        assert len(passes) == -(-len(QUEUE) // at_once), "prompts are read, and nothing else"
    one = sampling(max_new_tokens=1)
    assert lm.complete(model, QUEUE, one, 3, at_once=4) == alone(model, QUEUE, one, 3)


def test_equal_prompts_that_enter_together_are_read_once(model, monkeypatch):
    read, prefill = [], lm.prefill
    monkeypatch.setattr(
        lm,
        "prefill",
        lambda m, texts, *rest: (
            read.append([tuple(text) for text in texts]) or prefill(m, texts, *rest)
        ),
    )
    prompts = [p for p in ([5, 6, 7], [9], [1, 2, 3, 4]) for _ in range(4)]
    rows = lm.complete(model, prompts, sampling(max_new_tokens=5), 0, at_once=8)
    assert read == [[(5, 6, 7), (9,)], [(1, 2, 3, 4)]] and len(set(map(tuple, rows))) == 12
    assert all(len(row) == 5 for row in rows)


def test_a_share_of_the_rows_draws_as_within_the_whole(model):
    s = sampling(max_new_tokens=9, **SAMPLED)
    whole = lm.complete(model, QUEUE, s, 6, at_once=4)
    assert lm.complete(model, QUEUE[5:], s, 6, numbers=range(5, len(QUEUE)), at_once=3) == whole[5:]
    assert (
        lm.complete(model, QUEUE[5:], s, 6, numbers=range(4, len(QUEUE) - 1), at_once=3)
        != whole[5:]
    )


def test_put_begins_rows_anew_and_leaves_the_others(model):
    """What follows a row is what follows the one it was begun with; the rest go on."""
    texts, others = [[3, 4, 5, 6], [7, 8], [9] * 9, [10]], [[20, 21, 22], [30] * 6]
    cache = lm.KVCache(model.config, len(texts), torch.device("cpu"), torch.float32, CONTEXT)
    cache.put([0, 1, 2, 3], lm.prefill(model, texts, torch.float32)[1], [0, 1, 2, 3])
    _, other = lm.prefill(model, others, torch.float32)
    kept = [tensor.clone() for tensor in other.tensors], list(other.lengths)
    cache.put([2, 0], other, [0, 1])
    now = [others[1], texts[1], others[0], texts[3]]
    assert cache.lengths == [len(text) for text in now]
    after = model(torch.full((4, 1), 50), cache)[:, -1]
    for row, text in zip(after, now, strict=True):
        assert torch.allclose(row, model(torch.tensor([[*text, 50]]))[0, -1], atol=1e-4)
    assert all(map(torch.equal, other.tensors, kept[0]))
    assert other.lengths == kept[1] == [3, 6]
    cache.put([0, 1, 2, 3], other, [1, 1, 0, 0])  # one row may begin several
    assert cache.lengths == [6, 6, 3, 3]
    for mine, theirs in zip(cache.tensors, other.tensors, strict=True):
        assert torch.equal(mine[0, :, :6], theirs[1]) and torch.equal(mine[1, :, :6], theirs[1])


def test_a_compiled_step_writes_the_same():
    """One compile of one layer for two rows, the slowest test here."""
    network = build(n_layer=1, n_kv_head=2, n_sink=2, window=9, tie=False)
    s, prompts = sampling(max_new_tokens=20), [[33], [5, 6] * 20, RAGGED[1]]
    whole = alone(network, prompts, s, 0)
    stop = frozenset({whole[0][3], whole[2][15]})
    want = ended(whole, stop)
    assert [len(row) for row in want] == [4, 20, 16], "in two places until the last step"
    found = lm.complete(network, prompts, s, 0, stop, at_once=2, compiled=True)
    assert found == want


# --- the distribution -----------------------------------------------------------------------------

CUTS = [
    {},
    {"temperature": 0.5},
    {"temperature": 3.0},
    {"top_k": 1},
    {"top_k": 7},
    {"top_k": 29},
    {"top_k": 30},
    {"top_k": 1000},
    {"top_p": 0.9},
    {"top_p": 0.3},
    {"top_p": 0.999},
    {"top_k": 9, "top_p": 0.6, "temperature": 0.8},
]


@pytest.mark.parametrize("cut", CUTS, ids=str)
def test_draw_follows_transformers_distribution(cut):
    s, count = sampling(**cut), 20_000
    logits = torch.randn(1, 30) * 2
    shares = processed(logits.double(), [0], s).softmax(-1)[0]
    grid = ((torch.arange(count) + 0.5) / count).unsqueeze(1)
    found = torch.bincount(lm.draw(logits.repeat(count, 1), grid, s), minlength=30)
    assert set(found.nonzero().flatten().tolist()) <= set(shares.nonzero().flatten().tolist())
    assert (found - count * shares).abs().max() <= 2  # an even grid leaves no room for chance


def test_draw_on_random_numbers_passes_chi_square():
    logits, s, count = torch.randn(1, 12), sampling(), 50_000
    found = torch.bincount(lm.draw(logits.repeat(count, 1), torch.rand(count, 1), s), minlength=12)
    want = count * logits.softmax(-1)[0]
    assert ((found - want) ** 2 / want).sum() < 45  # 11 degrees of freedom: 5e-6 of chance


@pytest.mark.parametrize("cut", CUTS, ids=str)
@pytest.mark.parametrize("width", [40, 50_000])
def test_draw_never_takes_an_impossible_id(cut, width):
    logits = torch.randn(4, width) * 3
    logits[0, :5] = logits[1, -5:] = logits[2, ::2] = -torch.inf
    logits[3, 1:] = -torch.inf
    for edge in (0.0, 2**-24, 0.5, 1 - 2**-24, 1.0):
        ids = lm.draw(logits, torch.full((4, 1), edge), sampling(**cut))
        assert ids.shape == (4,) and ids.dtype == torch.int64
        assert logits[torch.arange(4), ids].isfinite().all(), edge


@pytest.mark.parametrize("top_p", [0.0, 1e-9, 1e-3])
@pytest.mark.parametrize("top_k", [0, 5])
def test_a_tiny_top_p_keeps_the_likeliest(top_p, top_k):
    logits = torch.randn(50, 30)
    for edge in (0.0, 0.7, 1 - 2**-24):
        ids = lm.draw(logits, torch.full((50, 1), edge), sampling(top_p=top_p, top_k=top_k))
        assert torch.equal(ids, logits.argmax(-1))


@pytest.mark.parametrize("temperature", [0.0, 1e-4, 1e-30, 1e-45, 1e-300])
def test_a_cold_temperature_takes_the_likeliest(temperature):
    logits = torch.randn(20, 30) * 3
    for cut in ({}, {"top_k": 4}, {"top_p": 0.5}):
        ids = lm.draw(logits, torch.rand(20, 1), sampling(temperature=temperature, **cut))
        assert torch.equal(ids, logits.argmax(-1)), cut


def test_equal_logits_are_drawn_equally():
    grid = ((torch.arange(8000) + 0.5) / 8000).unsqueeze(1)
    for cut in ({}, {"top_p": 0.999999}, {"top_k": 8}):
        ids = lm.draw(torch.zeros(8000, 8), grid, sampling(**cut))
        assert torch.bincount(ids).tolist() == [1000] * 8


# --- penalties ------------------------------------------------------------------------------------


@pytest.mark.parametrize("penalty", [0.5, 1.0, 1.3, 100.0])
@pytest.mark.parametrize("n", [0, 1, 2, 3, 4])
def test_penalise_equals_transformers(penalty, n):
    s = sampling(repetition_penalty=penalty, no_repeat_ngram_size=n)
    histories = [
        [3],
        [1, 2],
        [1, 2, 1],
        [7, 7, 7, 7],
        [0, 1, 2, 3, 0, 1, 2, 3, 0, 1],
        [9] * 12,
        torch.randint(0, 4, (40,)).tolist(),
    ]
    logits = torch.randn(len(histories), 10) * 3
    logits[:, 0] = 0.0
    want = torch.cat([processed(row[None], h, s) for row, h in zip(logits, histories, strict=True)])
    assert torch.allclose(lm.penalise(logits.clone(), histories, s), want)


@pytest.mark.parametrize("n", [1, 2, 3])
def test_no_ngram_comes_twice(model, n):
    s = sampling(no_repeat_ngram_size=n, max_new_tokens=40, temperature=0.3)
    for prompt, row in zip(RAGGED, lm.complete(model, RAGGED, s, 0), strict=True):
        text = prompt + row
        grams = [tuple(text[i : i + n]) for i in range(len(text) - n + 1)]
        assert len(grams) == len(set(grams))


# ---- A batch that texts join and leave ----


def drawn_alone(model, generation):
    stop = generation.stop
    (ids,) = lm.complete(
        model,
        [generation.ids],
        generation.sampling,
        generation.seed,
        stop,
        numbers=[generation.number],
    )
    return ids


def test_texts_that_join_and_leave_draw_what_they_draw_alone(model):
    """Prompts of any length, at any time, each with sampling of its own, beyond the context too."""
    generator = random.Random(4)
    kinds = [
        sampling(max_new_tokens=12, temperature=0.0),
        sampling(max_new_tokens=30, temperature=1.0),
        sampling(max_new_tokens=7, temperature=0.9, top_k=9),
        sampling(max_new_tokens=60, temperature=1.2, top_p=0.8),
        sampling(max_new_tokens=20, temperature=1.0, repetition_penalty=1.3),
        sampling(max_new_tokens=15, temperature=1.0, no_repeat_ngram_size=2),
    ]
    waiting = []
    for number in range(24):
        ids = [generator.randrange(2, 50) for _ in range(generator.randrange(1, 30))]
        stop = frozenset({3, 7}) if number % 3 else frozenset()
        waiting.append(lm.Generation(ids, kinds[number % 6], number // 4, number % 4, stop))
    batch, got, cancelled = lm.RunningBatch(model, 6, torch.float32), {}, set()
    everyone, sizes = list(waiting), set()
    while waiting or batch.live():
        while waiting and not batch.full and generator.random() < 0.4:
            batch.join(waiting.pop(0))
        if not batch.live():
            continue
        sizes.add(len(batch.rows))
        for generation, drawn in batch.step():
            got.setdefault(id(generation), []).append(drawn.token)
            if generation is everyone[5] and generation.drawn == 3:
                cancelled.add(id(generation))
                batch.leave(generation)
    assert len(sizes) > 2 and max(sizes) <= 6
    for generation in everyone:
        wanted = drawn_alone(model, generation)
        if id(generation) in cancelled:
            wanted = wanted[:3]
        assert got[id(generation)] == wanted
    assert batch.rows == [None]


def test_log_probabilities_are_told_with_the_likeliest(model):
    batch = lm.RunningBatch(model, 2, torch.float32)
    generation = lm.Generation([5, 6, 7], sampling(max_new_tokens=4, temperature=0), 0, likeliest=3)
    batch.join(generation)
    ids = [5, 6, 7]
    while not generation.ended:
        [(_, drawn)] = batch.step()
        with torch.no_grad():
            logps = model(torch.tensor([ids]))[0, -1].log_softmax(-1)
        values, best = logps.topk(3)
        assert drawn.token == int(best[0]) == drawn.likeliest[0][0]
        assert drawn.logp == pytest.approx(float(values[0]), abs=1e-4)
        assert [i for i, _ in drawn.likeliest] == best.tolist()
        ids.append(drawn.token)
