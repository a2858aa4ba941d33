"""Room Engine: sampling and cached generation."""

import contextlib

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
    window = history if len(history) <= context else history[-(context // 2):]
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
            window = history[-(context // 2):]
    return out


def all_by_hand(model, prompts, s, **kwargs):
    return [write_by_hand(model, p, s, row=r, **kwargs) for r, p in enumerate(prompts)]


# --- one row alone --------------------------------------------------------------------------------


def test_cached_logits_equal_uncached(model):
    ids = some_ids(2, CONTEXT)
    cache = lm.KVCache(model.config, 2, torch.device("cpu"), torch.float32)
    whole, pieces, at = model(ids), [], 0
    for size in (3, 1, 1, 5, 1, 5):  # first pass, single steps, and several ids at once
        pieces.append(model(ids[:, at:at + size], cache))
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


# --- the distribution -----------------------------------------------------------------------------

CUTS = [{}, {"temperature": 0.5}, {"temperature": 3.0}, {"top_k": 1}, {"top_k": 7}, {"top_k": 29},
        {"top_k": 30}, {"top_k": 1000}, {"top_p": 0.9}, {"top_p": 0.3}, {"top_p": 0.999},
        {"top_k": 9, "top_p": 0.6, "temperature": 0.8}]


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
    for edge in (0.0, 2 ** -24, 0.5, 1 - 2 ** -24, 1.0):
        ids = lm.draw(logits, torch.full((4, 1), edge), sampling(**cut))
        assert ids.shape == (4,) and ids.dtype == torch.int64
        assert logits[torch.arange(4), ids].isfinite().all(), edge


@pytest.mark.parametrize("top_p", [0.0, 1e-9, 1e-3])
@pytest.mark.parametrize("top_k", [0, 5])
def test_a_tiny_top_p_keeps_the_likeliest(top_p, top_k):
    logits = torch.randn(50, 30)
    for edge in (0.0, 0.7, 1 - 2 ** -24):
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
    histories = [[3], [1, 2], [1, 2, 1], [7, 7, 7, 7], [0, 1, 2, 3, 0, 1, 2, 3, 0, 1],
                 [9] * 12, torch.randint(0, 4, (40,)).tolist()]
    logits = torch.randn(len(histories), 10) * 3
    logits[:, 0] = 0.0
    want = torch.cat([processed(row[None], h, s)
                      for row, h in zip(logits, histories, strict=True)])
    assert torch.allclose(lm.penalise(logits.clone(), histories, s), want)


@pytest.mark.parametrize("n", [1, 2, 3])
def test_no_ngram_comes_twice(model, n):
    s = sampling(no_repeat_ngram_size=n, max_new_tokens=40, temperature=0.3)
    for prompt, row in zip(RAGGED, lm.complete(model, RAGGED, s, 0), strict=True):
        text = prompt + row
        grams = [tuple(text[i:i + n]) for i in range(len(text) - n + 1)]
        assert len(grams) == len(set(grams))
