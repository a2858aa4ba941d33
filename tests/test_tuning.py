"""Tuning: the losses of sft, dpo and reward, and the three commands from rows to answers."""

import json
import math
import shutil
import signal

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import complaint, log_rows, read_pt, signal_at, weight_bytes
from test_distributed import two
from test_lora import TUNE, answer, chat_rows, pair_rows, question, save_base, write_rows
from test_model import build

import standalone_transformer_lm as lm

LOSSES = ("sigmoid", "ipo", "hinge", "robust", "apo_zero", "apo_down", "simpo", "orpo")
KINDS = ("sft", "dpo", "reward")
LONG = "the harbour and the engine and the village and the river " * 5


@pytest.fixture(scope="module")
def base(tiny_tokenizer, tmp_path_factory):
    """The model that all tuning starts from; read only."""
    return save_base(tmp_path_factory.mktemp("base") / "base.pt", tiny_tokenizer)


@pytest.fixture(scope="module")
def tokenizer(tiny_tokenizer):
    return lm.Tokenizer(tiny_tokenizer)


@pytest.fixture
def tune(run, base, tmp_path):
    """`tune(kind, rows or files, *flags)` runs sft, dpo or reward in tmp_path / "run"."""

    def call(kind, rows, *flags):
        paths = [write_rows(tmp_path / "rows.jsonl", rows)] if isinstance(rows, list) else rows
        return run(
            [
                kind,
                *TUNE,
                "--ckpt",
                base,
                "--out_dir",
                tmp_path / "run",
                "--max_steps",
                3,
                "--data",
                *paths,
                *flags,
            ]
        )

    return call


def rows_of(kind, count=24):
    return chat_rows(count) if kind == "sft" else pair_rows(count)


# ---- Losses of preference ----


def sig(x):
    return 1 / (1 + math.exp(-x))


def wanted_loss(name, policy, reference, lengths, beta, smoothing, gamma):
    """One pair's loss in Python's floats, as the papers and TRL write it."""
    (pc, pr), (rc, rr), (nc, nr) = policy, reference, lengths
    chosen, rejected = pc - rc, pr - rr
    logits = chosen - rejected
    if name == "sigmoid":  # conservative DPO: TRL's label_smoothing
        return (
            -math.log(sig(beta * logits)) * (1 - smoothing)
            - math.log(sig(-beta * logits)) * smoothing
        )
    if name == "ipo":  # on log-probs averaged over tokens, (h - 1 / (2 beta))^2
        return ((pc / nc - pr / nr) - (rc / nc - rr / nr) - 1 / (2 * beta)) ** 2
    if name == "hinge":
        return max(0.0, 1 - beta * logits)
    if name == "robust":
        return (
            -math.log(sig(beta * logits)) * (1 - smoothing)
            + math.log(sig(-beta * logits)) * smoothing
        ) / (1 - 2 * smoothing)
    if name == "apo_zero":
        return (1 - sig(beta * chosen)) + sig(beta * rejected)
    if name == "apo_down":
        return sig(beta * chosen) + (1 - sig(beta * (chosen - rejected)))
    if name == "simpo":
        gap = pc / nc - pr / nr - gamma / beta
        return -math.log(sig(beta * gap)) * (1 - smoothing) - math.log(sig(-beta * gap)) * smoothing
    assert name == "orpo"
    odds = [math.exp(p / n) / (1 - math.exp(p / n)) for p, n in ((pc, nc), (pr, nr))]
    return -pc / nc - beta * math.log(sig(math.log(odds[0] / odds[1])))


def some_pairs(pairs=5, length=12):
    """ids and targets (2B, T) of answers of many lengths, and a reference (B, 2)."""
    ids, targets = torch.randint(3, 61, (2 * pairs, length)), torch.full((2 * pairs, length), -100)
    for row in range(2 * pairs):
        end = 4 + (5 * row + 1) % 7
        targets[row, 3:end] = ids[row, 4 : end + 1]
    return ids, targets, -20 * torch.rand(pairs, 2) - 5


def slow_logps(model, ids, targets):
    """Summed log-probability of each row in float64, one row at a time and unpadded."""
    found = []
    for row, aims in zip(ids, targets, strict=True):
        shares = model(row[None])[0].double().log_softmax(-1)
        found.append(sum(float(shares[t, aim]) for t, aim in enumerate(aims) if aim != lm.IGNORE))
    return found


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_preference_losses_against_float64(name, smoothing):
    assert set(lm.PREFERENCE_LOSSES) == set(LOSSES)
    model, (ids, targets, reference) = build(dry=True), some_pairs()
    settings = lm.DpoSettings(loss=name, beta=0.3, label_smoothing=smoothing, simpo_gamma=0.7)
    with torch.no_grad():
        found = lm.preference_loss(model, ids, targets, reference, settings).tolist()
        logps = slow_logps(model, ids, targets)
    lengths = (targets != lm.IGNORE).sum(1).tolist()
    policy, sizes = ([*zip(each[::2], each[1::2], strict=True)] for each in (logps, lengths))
    total, margins, longer = 0.0, [], 0
    for p, r, n in zip(policy, reference.double().tolist(), sizes, strict=True):
        total += wanted_loss(name, p, r, n, 0.3, smoothing, 0.7)
        free = name in ("simpo", "orpo")
        rewards = [
            0.3 * (p[i] - (0 if free else r[i])) / (n[i] if name in lm.BY_LENGTH else 1)
            for i in range(2)
        ]
        margins.append(rewards[0] - rewards[1])
        longer += math.copysign(n[0] - n[1], (n[0] - n[1]) * margins[-1])
    want = {
        "loss": total,
        "margin": sum(margins),
        "accuracy": sum(m > 0 for m in margins),
        "chosen_logp": sum(p[0] for p in policy),
        "rejected_logp": sum(p[1] for p in policy),
        "length_bias": longer,
    }
    assert list(want) == list(lm.PAIR_METRICS)
    assert 0 < want["accuracy"] < 5 or free
    assert found == pytest.approx(list(want.values()), rel=1e-4)


@pytest.mark.parametrize("name", LOSSES)
def test_preference_losses_where_answers_are_likely(name):
    settings = lm.DpoSettings(loss=name, beta=0.8, label_smoothing=0.1, simpo_gamma=0.4)
    lengths, reference = torch.tensor([3.0, 5.0]).expand(20, 2), -4 * torch.rand(20, 2)
    means = -2 * torch.rand(20, 2) - 0.02
    ratios = means * lengths - (0 if name in lm.REFERENCE_FREE else reference)
    rewards = 0.8 * (ratios / lengths if name in lm.BY_LENGTH else ratios)
    want = [
        wanted_loss(name, *map(torch.Tensor.tolist, pair), 0.8, 0.1, 0.4)
        for pair in zip(means * lengths, reference, lengths, strict=True)
    ]
    found = lm.PREFERENCE_LOSSES[name](rewards, means, settings).tolist()
    assert found == pytest.approx(want, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("name", LOSSES)
def test_every_preference_loss_prefers_the_chosen(name):
    model, (ids, targets, _) = build(dry=True), some_pairs()
    with torch.no_grad():
        reference = lm.sequence_logps(model, ids, targets)[0].view(-1, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    settings, told = lm.DpoSettings(loss=name, beta=0.5), []
    for _ in range(6):
        metrics = lm.preference_loss(model, ids, targets, reference, settings)
        told.append(metrics.detach())
        optimizer.zero_grad()
        metrics[0].backward()
        optimizer.step()
    assert told[-1][0] < told[0][0] and told[-1][1] > told[0][1]
    if name in ("sigmoid", "apo_zero"):
        assert told[-1][4] < told[0][4]  # the rejected log-prob falls


def test_sigmoid_starts_at_log_2_and_dpo_lowers_the_rejected(tune, tmp_path):
    code, _, err = tune("dpo", pair_rows(24), "--lr", 3e-3, "--max_steps", 8, "--beta", 0.5)
    assert code == 0, err
    rows = log_rows(tmp_path / "run")
    assert rows[0]["train/loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert rows[0]["train/margin"] == pytest.approx(0, abs=1e-4)
    assert rows[-1]["train/loss"] < 0.6 and rows[-1]["train/accuracy"] > 0.9
    assert rows[-1]["train/rejected_logp"] < rows[0]["train/rejected_logp"] - 1
    keys = {f"train/{name}" for name in lm.PAIR_METRICS}
    assert keys <= set(rows[0])


@pytest.mark.parametrize("name", LOSSES)
def test_every_preference_loss_runs(tune, tmp_path, name):
    assert tune("dpo", pair_rows(12), "--loss", name, "--max_steps", 2)[0] == 0
    assert all(math.isfinite(row["train/loss"]) for row in log_rows(tmp_path / "run"))
    kept = list((tmp_path / "run").glob("reference_*.npy"))
    assert len(kept) == (name not in ("simpo", "orpo"))


def test_settings_of_dpo_reach_the_loss(tune, tmp_path):
    assert tune("dpo", pair_rows(12), "--loss", "ipo", "--beta", 0.25, "--max_steps", 1)[0] == 0
    assert log_rows(tmp_path / "run")[0]["train/loss"] == pytest.approx(4.0, rel=1e-4)


def test_side_losses_are_in_the_training_of_pairs_alone():
    model = build(dry=True, n_expert=4, scalar_head=True)
    ids, targets, reference = some_pairs()
    with torch.no_grad():
        aux_loss = 5 * model.hidden_and_aux_loss(ids)[1].item()
        for loss, *more in (
            (lm.preference_loss, reference, lm.DpoSettings()),
            (lm.judge_loss, reference),
        ):
            still = loss(model.eval(), ids, targets, *more)[0].item()
            moving = loss(model.train(), ids, targets, *more)[0].item()
            assert moving - still == pytest.approx(aux_loss, rel=1e-3) and aux_loss > 0.01


# ---- Losses of judges ----


def bins_by_hand(logits):
    """Confidence less success, summed by ten bins of confidence from 0.5 to 1."""
    bins = [0.0] * 10
    for logit in logits:
        confidence = max(sig(logit), sig(-logit))
        place = next(b for b in range(10) if confidence < 0.5 + (b + 1) / 20 or b == 9)
        bins[place] += confidence - (logit > 0)
    return bins


def judge(scale=3.0):
    model = build(dry=True, scalar_head=True)
    torch.nn.init.normal_(model.score.weight, std=scale)
    return model


def slow_scores(model, ids, targets):
    """The scalar head at each row's last answered id, read alone and unpadded."""
    found = []
    for row, aims in zip(ids, targets, strict=True):
        end = int((aims != lm.IGNORE).nonzero().max()) + 1  # where the last target stands as input
        hidden = model.hidden(row[None, : end + 1])[0, end].double()
        found.append(float(hidden @ model.score.weight[0].double()))
    return found


@pytest.mark.parametrize("scale", [0.05, 0.5, 3.0])
def test_judge_loss_of_pairs_is_bradley_terry(scale):
    model, (ids, targets, numbers) = judge(scale), some_pairs(9)
    with torch.no_grad():
        found = lm.judge_loss(model, ids, targets, numbers).tolist()
        scores = slow_scores(model, ids, targets)
    margins = [a - b for a, b in zip(scores[::2], scores[1::2], strict=True)]
    want = [sum(-math.log(sig(m)) for m in margins), sum(margins), sum(m > 0 for m in margins)]
    assert found == pytest.approx([*want, *bins_by_hand(margins)], rel=1e-4, abs=1e-4)
    assert len(found) == len(lm.JUDGE_METRICS)


@pytest.mark.parametrize("scale", [0.05, 0.5, 3.0])
def test_judge_loss_of_answers_is_the_cross_entropy_of_the_label(scale):
    model, (ids, targets, _) = judge(scale), some_pairs(9)
    labels = torch.tensor([[float(i % 3 == 0)] for i in range(18)])
    with torch.no_grad():
        found = lm.judge_loss(model, ids, targets, labels).tolist()
        scores = slow_scores(model, ids, targets)
    right = [s if label else -s for s, label in zip(scores, labels[:, 0].tolist(), strict=True)]
    loss = sum(max(0.0, -r) + math.log1p(math.exp(-abs(r))) for r in right)  # -log sigmoid(r)
    want = [loss, sum(right), sum(r > 0 for r in right)]
    assert found == pytest.approx([*want, *bins_by_hand(right)], rel=1e-4, abs=1e-4)


def test_calibration_error_is_that_of_guo_2017():
    logits = torch.linspace(-4, 4, 41)
    sums = lm.judge_metrics(logits, 0.0)
    row = lm.report("val", lm.JUDGE_METRICS, (sums / 41).tolist())
    want = sum(abs(b) for b in bins_by_hand(logits.tolist())) / 41
    assert row["val/calibration_error"] == pytest.approx(want, rel=1e-5)
    assert set(row) == {"val/loss", "val/margin", "val/accuracy", "val/calibration_error"}
    perfect = lm.judge_metrics(torch.tensor([50.0, 50.0]), 0.0)
    assert perfect[3:].abs().max() < 1e-6


@pytest.mark.parametrize("labels", [False, True])
def test_a_reward_model_starts_undecided_and_learns(tune, tmp_path, labels):
    rows = (
        [
            {"prompt": question(i), "response": answer(i) if i % 2 else "No, no.", "label": i % 2}
            for i in range(24)
        ]
        if labels
        else pair_rows(24)
    )
    code, _, err = tune("reward", rows, "--max_steps", 30, "--val_split", 0.2)
    assert code == 0, err
    told = log_rows(tmp_path / "run")
    assert told[0]["train/loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert told[-1]["train/loss"] < 0.4
    assert {"val/accuracy", "val/margin", "val/calibration_error"} <= set(told[2])


# ---- Rows ----


def encoded(tokenizer, row, limit=10**6):
    return lm.example(tokenizer, lm.conversation(row), limit)


def test_labels_are_the_assistants_text_and_its_end(tokenizer):
    turns = [
        lm.Turn("system", "Be brief."),
        lm.Turn("user", "Why?"),
        lm.Turn("assistant", "The river."),
        lm.Turn("user", "And the café 🙂?"),
        lm.Turn("assistant", "It cost 2.50.\n\nNo."),
    ]
    row = {"messages": [{"role": role, "content": text} for role, text, *_ in turns]}
    one = encoded(tokenizer, row)
    targets = one.targets()
    want = [
        [*tokenizer.encode(text), tokenizer.eos] for role, text, *_ in turns if role == "assistant"
    ]
    assert [t for t in targets if t != lm.IGNORE] == want[0] + want[1]
    at = np.flatnonzero(targets != lm.IGNORE)
    assert (targets[at] == one.ids[at + 1]).all() and (one.ids == tokenizer.bos).sum() == 1
    markers = [tokenizer.marker("assistant")[-1]] * 2
    assert [one.ids[at[0]], one.ids[at[len(want[0])]]] == markers  # each answer follows its marker
    last = lm.last_answer(tokenizer, turns, 10**6)
    assert [t for t in last.targets() if t != lm.IGNORE] == want[1]
    assert (last.ids == one.ids).all()


def test_rows_are_cut_behind_a_turn_or_left_out(tokenizer):
    turns = [
        lm.Turn("user", "Why?"),
        lm.Turn("assistant", "The river."),
        lm.Turn("user", "And?"),
        lm.Turn("assistant", "No."),
    ]
    whole = lm.encode_chat(tokenizer, turns)[0]
    first = lm.encode_chat(tokenizer, turns[:2])[0]
    for limit in range(1, len(whole) + 2):
        one = lm.example(tokenizer, turns, limit)
        want = whole if limit >= len(whole) else first if limit >= len(first) else None
        assert (one is None) == (want is None) and (want is None or one.ids.tolist() == want)
        assert (lm.last_answer(tokenizer, turns, limit) is None) == (limit < len(whole))


def test_cut_and_left_out_rows_are_counted(tune, tmp_path):
    no = {"role": "assistant", "content": "No."}
    cut = {
        "messages": [{"role": "user", "content": "Why?"}, no, {"role": "user", "content": LONG}, no]
    }
    rows = [
        *chat_rows(6),
        cut,
        {"prompt": LONG, "response": "No."},
        {"prompt": "Why?", "response": LONG},
    ]
    code, told, err = tune("sft", rows, "--val_split", 0)
    assert (
        code == 0
        and "7 rows, 1 truncated after the last answer that fits, 2 longer than the context" in told
    ), err
    complaint(
        tune("sft", rows[-2:], "--val_split", 0, "--out_dir", tmp_path / "other"),
        "every row is longer than the context",
        "--seq_len",
    )
    long = [{"prompt": LONG, "chosen": "A.", "rejected": "B."}]
    for kind in ("dpo", "reward"):
        complaint(
            tune(kind, long, "--val_split", 0, "--out_dir", tmp_path / "other"),
            "every row is longer",
        )


TURN = "do not speak in turn"
LAST = "the last message"
BAD_CHATS = {
    "{": "not JSON",
    "[1]": "not a JSON object",
    "{}": "neither messages nor prompt nor instruction",
    '{"messages": []}': TURN,
    '{"messages": 3}': "messages is missing",
    '{"messages": ["a"]}': "something else than messages",
    '{"messages": [{"role": "bot", "content": "a"}]}': "unknown role 'bot'",
    '{"messages": [{"role": ["user"], "content": "a"}]}': "unknown role",
    '{"messages": [{"role": "user", "content": 3}]}': "a user message is missing, empty or no text",
    '{"messages": [{"role": "user", "content": "a"}]}': "not the assistant's",
    '{"messages": [{"role": "assistant", "content": "a"}]}': TURN,
    '{"messages": [{"role": "user", "content": "a"}, {"role": "user", "content": "a"}]}': LAST,
    '{"messages": [{"role": "user", "content": "a"}, {"role": "system", "content": "a"}]}': TURN,
    '{"prompt": "a"}': "response is missing",
    '{"prompt": " ", "response": "a"}': "prompt is miss",
    '{"prompt": "a", "response": ""}': "response is missing, empty or no text",
    '{"prompt": null, "response": "a"}': "neither messages nor prompt",
    '{"instruction": "a", "output": null}': "output is missing",
}
BAD_PAIRS = {
    '{"prompt": "a", "chosen": "b"}': "rejected is missing",
    '{"prompt": "a", "chosen": "b", "rejected": "b"}': "identical",
    '{"chosen": "b", "rejected": "c"}': TURN,
    (
        '{"chosen": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "x"}], '
        '"rejected": [{"role": "user", "content": "b"}, {"role": "assistant", "content": "y"}]}'
    ): "different prompts",
}
BAD_JUDGED = {
    '{"prompt": "a", "response": "b", "label": "yes"}': "label 'yes' is not 0 or 1",
    '{"prompt": "a", "response": "b", "label": [1]}': "is not 0 or 1",
    '{"prompt": "a", "response": "b", "label": null}': "chosen is missing",
}


@pytest.mark.parametrize(
    "kind, line, what",
    [
        *(("sft", *bad) for bad in BAD_CHATS.items()),
        *(("dpo", *bad) for bad in BAD_PAIRS.items()),
        *(("reward", *bad) for bad in (BAD_PAIRS | BAD_JUDGED).items()),
    ],
)
def test_a_bad_row_is_named_by_file_and_line(tune, tmp_path, kind, line, what):
    good = [json.dumps(row) for row in rows_of(kind, 2)]
    path = tmp_path / "some rows.jsonl"
    path.write_text("\n".join([good[0], "", line, good[1]]))
    complaint(tune(kind, (path,)), f"{path}, line 3: ", what, "1 of 3 rows are bad", "--on_bad_row")
    assert not (tmp_path / "run").exists()


def test_bad_rows_are_all_counted_and_may_be_passed_over(tune, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join([*map(json.dumps, chat_rows(5)), *BAD_CHATS]))
    bad = len(BAD_CHATS)
    result = tune("sft", (path,))
    complaint(result, f"{bad} of {bad + 5} rows are bad", "the first: ", "line 6: ", "line 10: ")
    code, told, err = tune("sft", (path,), "--on_bad_row", "skip", "--val_split", 0)
    assert code == 0 and f"warning: {bad} of {bad + 5} rows are bad" in told, err
    assert "rows: 5 rows" in told
    path.write_text("{\n{}\n")
    complaint(tune("sft", (path,), "--on_bad_row", "skip"), "there is no row")


def test_every_shape_of_a_row_is_the_same_conversation():
    want = [lm.Turn("user", "a\n\nb"), lm.Turn("assistant", "c")]
    shapes = [
        {"prompt": "a\n\nb", "response": "c"},
        {"prompt": "a\n\nb", "completion": "c"},
        {"instruction": "a", "input": "b", "output": "c"},
        {"instruction": "a\n\nb", "input": "", "output": "c"},
        {
            "messages": [
                {"role": "user", "content": "a\n\nb"},
                {"role": "assistant", "content": "c"},
            ]
        },
        {"conversations": [{"from": "human", "value": "a\n\nb"}, {"from": "gpt", "value": "c"}]},
        {
            "prompt": [{"role": "user", "content": "a\n\nb"}],
            "completion": [{"role": "assistant", "content": "c"}],
        },
    ]
    assert all(lm.conversation(row) == want for row in shapes)
    asked, other = [{"role": "user", "content": "q"}], [{"role": "assistant", "content": "n"}]
    said = [{"role": "assistant", "content": "y"}]
    pairs = [
        {"prompt": "q", "chosen": "y", "rejected": "n"},
        {"prompt": asked, "chosen": said, "rejected": other},
        {"prompt": "q", "chosen": asked + said, "rejected": asked + other},
        {"chosen": asked + said, "rejected": asked + other},
    ]
    wanted = (
        [lm.Turn("user", "q"), lm.Turn("assistant", "y")],
        [lm.Turn("user", "q"), lm.Turn("assistant", "n")],
    )
    assert all(lm.preference(row) == wanted for row in pairs)


def test_a_json_array_is_rows_too(tune, tmp_path):
    for text in (
        json.dumps(chat_rows(6)),
        json.dumps(chat_rows(6), indent=1),
        "\n" + "\n".join(map(json.dumps, chat_rows(6))),
    ):
        path = tmp_path / "rows.json"
        path.write_text(text)
        assert lm.read_rows([str(path)], lm.conversation, "error") == list(
            map(lm.conversation, chat_rows(6))
        )
    path.write_text(json.dumps([*chat_rows(1), 3]))
    complaint(tune("sft", (path,)), f"{path}, line 2: not a JSON object")
    path.write_text(json.dumps(chat_rows(6))[:-9])
    complaint(tune("sft", (path,)), "rows.json is not JSON")
    path.write_text("[" * 100000)
    complaint(tune("sft", (path,)), "rows.json is not JSON")


def test_one_first_question_is_on_one_side(tokenizer):
    turns = [
        lm.conversation({"prompt": question(i % 40), "response": answer(i)}) for i in range(400)
    ]
    sides = {}
    for one in turns:
        sides.setdefault(one[0][1], set()).add(lm.held_out(one, 0.2))
        assert lm.held_out([lm.Turn("system", "Be brief."), *one], 0.2) == lm.held_out(one, 0.2)
        assert not lm.held_out(one, 0.0)
    assert len(sides) == 40 and all(len(side) == 1 for side in sides.values())
    held = sum(True in side for side in sides.values())
    assert 2 <= held <= 16


def test_rows_held_out_are_not_trained_on(tune, tmp_path, monkeypatch):
    seen, original = [], lm.fit_rows
    monkeypatch.setattr(
        lm,
        "fit_rows",
        lambda rows, *more: (
            seen.append([turns[0][1] for (turns,) in rows]),
            original(rows, *more),
        )[1],
    )
    assert tune("sft", chat_rows(30) * 2, "--val_split", 0.3)[0] == 0
    train, val = seen
    assert len(train) + len(val) == 60 and val and not set(train) & set(val)
    held = write_rows(tmp_path / "held.jsonl", chat_rows(3))
    assert tune("sft", chat_rows(9), "--val_data", held, "--out_dir", tmp_path / "b")[0] == 0
    assert [len(side) for side in seen[2:]] == [9, 3]


@pytest.mark.parametrize("kind", KINDS)
def test_every_row_held_out_is_a_sentence(tune, kind):
    row = next(
        r
        for r in rows_of(kind, 50)
        if lm.held_out([lm.Turn("user", r["prompt"]), lm.Turn("assistant", "x")], 0.05)
    )
    complaint(tune(kind, [row]), "--val_split")


# ---- Sequences ----


def gradients(model, stream, places):
    model.zero_grad()
    ids, targets = stream.collate(stream.items(np.array(places)))
    lm.pretrain_loss(model, ids, targets).backward()
    return [w.grad.clone() for w in model.parameters()]


def test_packed_and_unpacked_rows_give_equal_gradients(tokenizer):
    rows = [encoded(tokenizer, row) for row in chat_rows(9)]
    packed, lone = lm.Chats(rows, 64, 0, True), lm.Chats(rows, 64, 0, False)
    assert packed.count < 9 == lone.count
    assert sorted(i for one in packed.bins for i in one) == list(range(9))
    shape = {"dry": True, "vocab_size": 400, "seq_len": 64, "bos_id": tokenizer.bos}
    a = gradients(build(doc_mask=True, **shape), packed, range(packed.count))
    b = gradients(build(**shape), lone, range(9))
    for one, other in zip(a, b, strict=True):
        assert (one - other).abs().max() <= 1e-5 * max(1.0, other.abs().max())


def test_packed_conversations_do_not_see_each_other(tokenizer):
    rows = [encoded(tokenizer, row) for row in chat_rows(3)]
    stream = lm.Chats(rows, 64, 0, True)
    model = build(doc_mask=True, vocab_size=400, seq_len=64, bos_id=tokenizer.bos)
    place = next(i for i, one in enumerate(stream.bins) if len(one) > 1)
    ids, targets = stream.collate(stream.items(np.array([place])))
    first = len(rows[stream.bins[place][0]].ids) - 1
    other = ids.clone()
    other[0, 1:first] = (ids[0, 1:first] + 7) % 300 + 50
    a, b = model(ids), model(other)
    assert torch.equal(a[0, first:], b[0, first:]) and not torch.allclose(a[0, 2], b[0, 2])
    assert ids[0, first] == tokenizer.bos
    assert targets[0, first - 1] == tokenizer.eos  # a target that no input follows


def test_every_target_of_every_row_is_in_the_sequences_once(tokenizer):
    rows = [encoded(tokenizer, row) for row in chat_rows(20)]
    want = sum((one.targets() != lm.IGNORE).sum() for one in rows)
    for pack in (True, False):
        stream = lm.Chats(rows, 64, 5, pack)
        step = stream.step(0, stream.count, 1, 0, 1)
        ids, targets = step.micros[0]
        assert step.targets == want == (targets != lm.IGNORE).sum() and ids.shape[1] <= 64
        read = sum(targets for _, targets in stream.in_order(3, 10**9, 0, 1))
        assert read == want


def test_pairs_stand_side_by_side_with_their_numbers(tokenizer):
    groups = [
        [lm.last_answer(tokenizer, turns, 64) for turns in lm.preference(row)]
        for row in pair_rows(5)
    ]
    stream = lm.Groups(groups, np.arange(10.0).reshape(5, 2), 64, 0)
    micro = stream.collate(stream.samples(np.arange(5)))
    ids, targets, numbers = micro
    assert ids.shape == targets.shape and len(ids) == 10
    assert stream.targets(micro) == 5
    for i, (chosen, rejected) in enumerate(numbers.tolist()):
        assert rejected == chosen + 1
        for row, one in zip(ids[2 * i : 2 * i + 2], groups[int(chosen) // 2], strict=True):
            assert row[: len(one.ids)].tolist() == one.ids.tolist()


def test_pad_reaches_no_log_prob():
    model, (ids, targets, _) = build(dry=True), some_pairs()
    wider = F.pad(ids, (0, 4)), F.pad(targets, (0, 4), value=lm.IGNORE)
    with torch.no_grad():
        a, b = (lm.sequence_logps(model, *pair)[0] for pair in ((ids, targets), wider))
    assert torch.allclose(a, b, atol=1e-5)


# ---- Runs ----


@pytest.mark.parametrize("kind", KINDS)
def test_weighted_parts(tune, tmp_path, kind):
    a = write_rows(tmp_path / "a.jsonl", rows_of(kind, 24))
    b = write_rows(tmp_path / "b.jsonl", rows_of(kind, 48)[24:])
    code, told, err = tune(kind, (f"x={a}:0.75", f"y={b}:0.25"), "--val_split", 0.3)
    assert code == 0 and "rows of x: " in told and "rows of y: " in told, err
    last = [row for row in log_rows(tmp_path / "run") if "val/loss" in row][-1]
    assert {"val/loss/x", "val/loss/y"} <= set(last)
    parts = [last["val/loss/x"], last["val/loss/y"]]
    assert last["val/loss"] == pytest.approx(0.75 * parts[0] + 0.25 * parts[1], rel=1e-5)
    complaint(tune(kind, (f"x={a}:0.75", b)), "--data")


def test_a_part_whose_rows_are_all_held_out_is_a_sentence(tune, tmp_path):
    lone = next(
        r
        for r in chat_rows(50)
        if lm.held_out([lm.Turn("user", r["prompt"]), lm.Turn("assistant", "x")], 0.1)
    )
    a = write_rows(tmp_path / "a.jsonl", chat_rows(24))
    b = write_rows(tmp_path / "b.jsonl", [lone])
    complaint(tune("sft", (f"x={a}:0.5", f"y={b}:0.5"), "--val_split", 0.1), "--val_split")


@pytest.fixture(scope="module", params=[*KINDS, "sft --lora_rank 2", "dpo --lora_rank 2"])
def whole(request, base, run, tmp_path_factory):
    """(argv without --out_dir, folder of the run of six steps that it makes)."""
    folder = tmp_path_factory.mktemp("whole")
    kind, *flags = request.param.split()
    rows = write_rows(folder / "rows.jsonl", rows_of(kind))
    argv = [
        kind,
        *TUNE,
        "--ckpt",
        base,
        "--data",
        rows,
        "--dropout",
        0.1,
        "--val_split",
        0.2,
        "--max_steps",
        6,
        *flags,
    ]
    code, _, err = run([*argv, "--out_dir", folder / "run"])
    assert code == 0, err
    return argv, folder / "run"


def assert_same_run(out, wanted):
    assert log_rows(out) == log_rows(wanted)
    assert weight_bytes(out / "ckpt_last.pt") == weight_bytes(wanted / "ckpt_last.pt")


def test_resumed_from_the_middle_it_is_the_run_that_never_stopped(run, whole, tmp_path):
    argv, wanted = whole
    out = tmp_path / "run"
    out.mkdir()
    shutil.copy(wanted / "ckpt_00000003.pt", out / "ckpt_last.pt")
    for log in ("metrics.jsonl", "samples.jsonl"):
        if (wanted / log).exists():
            shutil.copy(wanted / log, out)
    code, told, err = run([*argv, "--out_dir", out])
    assert code == 0 and "after step 3" in told, err
    assert_same_run(out, wanted)
    if (wanted / "samples.jsonl").exists():
        assert (out / "samples.jsonl").read_text() == (wanted / "samples.jsonl").read_text()


def test_killed_it_goes_on_as_if_it_had_not_been(child, base, run, tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", pair_rows(24))
    argv = [
        "dpo",
        *TUNE,
        "--ckpt",
        base,
        "--data",
        rows,
        "--max_steps",
        6,
        "--val_split",
        0.2,
        "--ckpt_interval",
        2,
        "--out_dir",
    ]
    code, _ = child([*argv, tmp_path / "run"], (signal_at, "seed_step", 6)).end()
    assert code == -signal.SIGKILL
    assert read_pt(tmp_path / "run" / "ckpt_last.pt")["step"] == 4
    for out in (tmp_path / "run", tmp_path / "lone"):
        assert run([*argv, out])[0] == 0
    assert_same_run(tmp_path / "run", tmp_path / "lone")


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_refuses_other_rows_and_another_kind(tune, tmp_path, kind):
    assert tune(kind, rows_of(kind, 12))[0] == 0
    complaint(tune(kind, rows_of(kind, 13)), "other rows in --data")
    others = [other for other in KINDS if other != kind]
    for other in others:
        complaint(tune(other, rows_of(other, 12)), f"holds a run of {kind}")


def test_a_dpo_run_does_not_go_on_upon_another_reference(tune, tmp_path, tiny_tokenizer):
    assert tune("dpo", pair_rows(12))[0] == 0
    other = save_base(tmp_path / "other.pt", tiny_tokenizer, seed=9)
    complaint(tune("dpo", pair_rows(12), "--ckpt", other, "--max_steps", 6), "run holds another")


def test_reference_log_probs_are_kept_reused_and_made_again(
    tune, tmp_path, tiny_tokenizer, monkeypatch
):
    made, original = [], lm.row_logps
    monkeypatch.setattr(lm, "row_logps", lambda *args: made.append(1) or original(*args))

    def kept(out):
        return sorted((tmp_path / out).glob("reference_*.npy"))

    assert tune("dpo", pair_rows(24), "--val_split", 0.2)[0] == 0
    (first,) = kept("run")
    assert len(made) == 1 and np.load(first).shape == (24, 2)
    assert tune("dpo", pair_rows(24), "--val_split", 0.2, "--max_steps", 6)[0] == 0
    assert len(made) == 1, "a resumed run computes them anew"
    other = save_base(tmp_path / "other.pt", tiny_tokenizer, seed=9)
    more = ["--ckpt", other, "--out_dir", tmp_path / "other"]
    assert tune("dpo", pair_rows(24), "--val_split", 0.2, *more)[0] == 0 and len(made) == 2
    assert kept("other")[0].name != first.name
    assert tune("dpo", pair_rows(25), "--out_dir", tmp_path / "rows")[0] == 0 and len(made) == 3
    # Nothing is left beside the user's data.
    assert {path.name for path in tmp_path.iterdir() if path.is_file()} == {
        "rows.jsonl",
        "other.pt",
    }


def test_reference_log_probs_are_those_of_the_rows(tokenizer, base):
    model = lm.build_model(lm.load_checkpoint(base), torch.device("cpu"))
    groups = [
        [lm.last_answer(tokenizer, turns, 64) for turns in lm.preference(row)]
        for row in pair_rows(5)
    ]
    stream = lm.Groups(groups, np.zeros((5, 2)), 64, 0)
    device = lm.DeviceSettings(device="cpu", dtype="fp32", threads=1)
    found = lm.row_logps(model, stream, 2, lm.open_machine(device))
    flat = [one for group in groups for one in group]
    want = [
        slow_logps(model, *(torch.from_numpy(t)[None] for t in (one.ids, one.targets())))[0]
        for one in flat
    ]
    assert found.flatten().tolist() == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_two_ranks_are_one(child, base, run, tmp_path, kind):
    outs = []
    for name, batch in (("both", 2), ("lone", 4)):
        rows = write_rows(tmp_path / f"{name}.jsonl", rows_of(kind))
        argv = [
            kind,
            *TUNE,
            "--ckpt",
            base,
            "--data",
            rows,
            "--out_dir",
            tmp_path / name,
            "--max_steps",
            3,
            "--batch_size",
            batch,
            "--val_split",
            0.2,
            "--lr",
            1e-3,
        ]
        if name == "both":
            ended = two(child, argv)
            assert [code for code, _ in ended] == [0, 0], ended
        else:
            assert run(argv)[0] == 0
        outs.append(tmp_path / name)
    both, lone = outs
    for a, b in zip(log_rows(both), log_rows(lone), strict=True):
        assert a.keys() == b.keys()
        assert all(a[key] == pytest.approx(b[key], abs=1e-3, rel=1e-4) for key in a if a[key])
    a, b = (read_pt(out / "ckpt_last.pt")["model"] for out in outs)
    assert all(torch.allclose(a[name], b[name], atol=1e-4) for name in a)


def test_sft_learns_its_rows_and_shows_answers(tune, tmp_path, run):
    rows = [
        {"prompt": "Why?", "response": "The river."},
        {"prompt": "Who?", "response": "A sailor."},
    ]
    held = write_rows(tmp_path / "held.jsonl", rows)
    code, told, err = tune(
        "sft",
        rows,
        "--val_data",
        held,
        "--pack",
        0,
        "--max_steps",
        60,
        "--eval_interval",
        60,
        "--ckpt_interval",
        60,
        "--batch_size",
        2,
    )
    assert code == 0 and "'Why?' -> 'The river.'" in told and "--chat" in told, err
    shown = [
        json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()
    ]
    assert shown[-2:] == [
        {"step": 60, "prompt": row["prompt"], "answer": row["response"], "ended": True}
        for row in rows
    ]
    flags = [
        "--ckpt",
        tmp_path / "run",
        "--chat",
        1,
        "--temperature",
        0,
        "--device",
        "cpu",
        "--dtype",
        "fp32",
        "--threads",
        1,
    ]
    assert run(["generate", *flags, "--prompt", "Who?"])[1] == "A sailor.\n"
    out = tmp_path / "o.jsonl"
    code, told, err = run(["generate", *flags, "--prompt_file", held, "--out", out])
    assert code == 0 and "100.0% equal the expected answer" in told, err
    found = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["completion"] for row in found] == ["The river.", "A sailor."]


def test_epochs_set_the_steps(tune, tmp_path):
    assert tune("dpo", pair_rows(10), "--max_steps", 0, "--epochs", 2, "--val_split", 0)[0] == 0
    assert read_pt(tmp_path / "run" / "ckpt_last.pt")["step"] == 5  # 2 x 10 rows by 4


# ---- Judges at work ----


@pytest.fixture(scope="module")
def reward_model(base, run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("reward")
    rows = write_rows(folder / "rows.jsonl", pair_rows(24))
    code, _, err = run(
        [
            "reward",
            *TUNE,
            "--ckpt",
            base,
            "--data",
            rows,
            "--out_dir",
            folder / "run",
            "--max_steps",
            10,
        ]
    )
    assert code == 0, err
    return folder / "run"


SCORE = ["--device", "cpu", "--dtype", "fp32", "--threads", 1]


def test_score_writes_the_rows_again_with_their_scores(reward_model, run, tmp_path, tokenizer):
    rows = [*pair_rows(5), {"prompt": question(3), "response": answer(3), "id": 7}]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    code, told, err = run(
        [
            "reward",
            "--ckpt",
            reward_model,
            "--score",
            path,
            "--out",
            tmp_path / "out.jsonl",
            "--batch_size",
            3,
            *SCORE,
        ]
    )
    assert code == 0 and "6 rows scored" in told and "100.0% of 5 pairs" in told, err
    found = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    keys = {"reward", "chosen_reward", "rejected_reward"}
    assert [{k: v for k, v in row.items() if k not in keys} for row in found] == rows
    model = lm.build_model(lm.load_checkpoint(reward_model), torch.device("cpu"))
    one = lm.last_answer(tokenizer, lm.conversation(rows[5]), 64)
    (want,) = slow_scores(model, *(torch.from_numpy(t)[None] for t in (one.ids, one.targets())))
    assert found[5]["reward"] == pytest.approx(want, rel=1e-4, abs=1e-5)
    assert found[3]["chosen_reward"] == pytest.approx(want, rel=1e-4, abs=1e-5)


def test_best_of_shows_what_the_judge_likes_best(base, reward_model, run, tmp_path, tokenizer):
    flags = [
        "generate",
        "--ckpt",
        base,
        "--chat",
        1,
        "--prompt_file",
        tmp_path / "q.txt",
        "--max_new_tokens",
        8,
        "--num_samples",
        2,
        *SCORE,
    ]
    (tmp_path / "q.txt").write_text("Why?\nWho was it?\n")

    def drawn(name, *more):
        code, _, err = run([*flags, "--out", tmp_path / name, *more])
        assert code == 0, err
        return [json.loads(line) for line in (tmp_path / name).read_text().splitlines()]

    best = drawn("best.jsonl", "--best_of", 3, "--reward_ckpt", reward_model)
    every = drawn("all.jsonl", "--num_samples", 6)
    assert [row["prompt"] for row in best] == ["Why?"] * 2 + ["Who was it?"] * 2
    chats = [
        [lm.Turn("user", row["prompt"]), lm.Turn("assistant", row["completion"])] for row in every
    ]
    model = lm.build_model(lm.load_checkpoint(reward_model), torch.device("cpu"))
    for i, row in enumerate(best):
        group, scores = every[3 * i : 3 * i + 3], []
        for turns in chats[3 * i : 3 * i + 3]:
            ids = torch.tensor([lm.encode_chat(tokenizer, turns)[0]])
            scores.append(model.score(model.hidden(ids))[0, -1, 0].item())
        assert row["completion"] == group[scores.index(max(scores))]["completion"]


def test_a_system_turn_reaches_the_model(base, run, monkeypatch, tmp_path):
    asked, original = [], lm.encode_chat
    monkeypatch.setattr(
        lm,
        "encode_chat",
        lambda tokenizer, turns, reply=False: (
            asked.append(list(turns)),
            original(tokenizer, turns, reply),
        )[1],
    )
    flags = [
        "generate",
        "--ckpt",
        base,
        "--chat",
        1,
        "--system",
        "Be brief.",
        "--max_new_tokens",
        2,
        *SCORE,
    ]
    rows = write_rows(tmp_path / "q.jsonl", [{"prompt": "Why?"}])
    (tmp_path / "q.txt").write_text("Why?\n")
    for where in (
        ["--prompt", "Why?"],
        ["--prompt_file", tmp_path / "q.txt"],
        ["--prompt_file", rows],
    ):
        asked.clear()
        assert run([*flags, *where])[0] == 0
        assert asked == [[lm.Turn("system", "Be brief."), lm.Turn("user", "Why?")]], where


# ---- Mistakes ----


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_missing_is_said(run, base, tmp_path, kind):
    out = tmp_path / "run"
    complaint(run([kind, "--ckpt", base, "--out_dir", out]), "--data is missing")
    complaint(run([kind, "--data", "x.jsonl", "--out_dir", out]), "--ckpt is missing")
    complaint(
        run([kind, "--ckpt", base, "--data", tmp_path / "x.jsonl", "--out_dir", out]),
        "x.jsonl does not exist",
    )
    complaint(
        run([kind, "--ckpt", tmp_path / "no.pt", "--data", "x", "--out_dir", out]),
        "no.pt does not exist",
    )
    empty = write_rows(tmp_path / "empty.jsonl", [])
    complaint(run([kind, "--ckpt", base, "--data", empty, "--out_dir", out]), "there is no row")
    assert not out.exists()


def test_a_model_that_is_no_judge_is_refused(base, run, tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", pair_rows(2))
    complaint(run(["reward", "--ckpt", base, "--score", rows, *SCORE]), "is not a reward model")
    complaint(
        run(
            [
                "generate",
                "--ckpt",
                base,
                "--prompt",
                "x",
                "--best_of",
                2,
                "--reward_ckpt",
                base,
                *SCORE,
            ]
        ),
        "is not a reward model",
    )


def test_a_missing_file_is_named_with_its_own_flag(reward_model, base, run, tmp_path):
    gone = tmp_path / "gone.jsonl"
    complaint(run(["reward", "--ckpt", reward_model, "--score", gone, *SCORE]), f"--score {gone}")
    complaint(
        run(["generate", "--ckpt", base, "--prompt_file", gone, *SCORE]), f"--prompt_file {gone}"
    )


def test_pairs_and_labels_together_are_refused(tune):
    rows = [*pair_rows(3), {"prompt": "a", "response": "b", "label": 1}]
    complaint(tune("reward", rows, "--val_split", 0), "both pairs and labelled answers")
