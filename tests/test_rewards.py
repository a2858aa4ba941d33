"""Rewards on hostile texts, and perplexity, on any batch size and ranks, against a slow count."""

import contextlib
import dataclasses
import importlib.util
import json
import math
import multiprocessing
import os
import socket
import sys
import time
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from test_lora import save_base

import standalone_transformer_lm as lm

CPU = lm.Machine(torch.device("cpu"), torch.float32)
ALL = 1 << 40


@pytest.fixture(scope="module")
def objective(trained):
    model = lm.build_model(lm.load_checkpoint(trained), torch.device("cpu"))
    return lm.Objective(model, lm.pretrain_loss).eval()


@pytest.fixture(scope="module")
def folder(data_dir):
    return lm.TokenFolder(data_dir)


def by_hand(model, ids, seq_len, most):
    """Mean nats a target over stride-seq_len windows, one at a time."""
    ids = torch.from_numpy(ids[:].astype("int64"))[: most + 1]
    total = 0.0
    for start in range(0, len(ids) - 1, seq_len):
        piece = ids[start : start + seq_len + 1]
        logits = model(piece[None, :-1])[0]
        total += float(F.cross_entropy(logits.double(), piece[1:], reduction="sum"))
    return total / (len(ids) - 1)


@torch.no_grad()
@pytest.mark.parametrize("batch_size", [1, 3, 8, 500])
@pytest.mark.parametrize("most", [ALL, 100, 96, 31, 1])
def test_perplexity_is_the_same_on_any_batch_size(objective, folder, batch_size, most):
    found = lm.perplexity(objective, [("", folder, 1.0)], batch_size, CPU, 32, most)
    wanted = by_hand(objective.model, folder.val, 32, most)
    assert found["val/loss"] == pytest.approx(wanted, rel=1e-5)
    assert found["val/ppl"] == pytest.approx(math.exp(wanted), rel=1e-4)


@torch.no_grad()
def test_ranks_share_every_target_once(objective, folder):
    whole, parts = [], []

    class Lone(lm.Machine):
        def all_reduce_sum(self, *numbers):
            (whole if self.world == 1 else parts).append(numbers)
            return list(numbers)

    for world in (1, 3):
        for rank in range(world):
            machine = Lone(torch.device("cpu"), torch.float32, rank, world)
            lm.perplexity(objective, [("", folder, 1.0)], 4, machine, 32, 5000)
    assert sum(n for _, n in parts) == whole[0][1] == min(5000, len(folder.val) - 1)
    assert sum(loss for loss, _ in parts) == pytest.approx(whole[0][0], rel=1e-6)


@torch.no_grad()
def test_a_model_that_knows_nothing_has_the_perplexity_of_its_vocabulary(folder):
    model = lm.Transformer(
        lm.ModelSettings(vocab_size=400, n_layer=1, d_model=8, n_head=1, seq_len=32)
    )
    for weight in model.parameters():
        weight.zero_()
    objective = lm.Objective(model, lm.pretrain_loss)
    row = lm.perplexity(objective, [("", folder, 1.0)], 8, CPU, 32, ALL)
    assert row["val/ppl"] == pytest.approx(400, rel=1e-4)
    documents, ids = [], folder.val[:].tolist()
    for i in ids:
        documents.append([]) if i == 1 else documents[-1].append(i)
    size = sum(len(folder.tokenizer.decode(d[:-1]).encode()) for d in documents)
    assert row["val/bpb"] == pytest.approx(math.log2(400) * (len(ids) - 1) / size, rel=1e-4)


def test_no_validation_text_is_no_figure(objective):
    empty = SimpleNamespace(val=torch.zeros(0).numpy(), bytes_per_token=lambda split: 0.0)
    assert lm.perplexity(objective, [("", empty, 1.0)], 4, CPU, 32, ALL) == {}


@torch.no_grad()
def test_hopeless_losses_do_not_overflow(folder):
    class Hopeless(torch.nn.Module):
        model = SimpleNamespace(blocks=[])

        def forward(self, x, y):
            return torch.tensor(1e6) * (y != lm.IGNORE).sum()

    row = lm.perplexity(Hopeless(), [("", folder, 1.0)], 4, CPU, 32, 1000)
    assert row["val/loss"] == pytest.approx(1e6) and math.isfinite(row["val/ppl"])


# ---- Mixtures ----


@pytest.fixture(scope="module")
def second(corpus, data_dir, tmp_path_factory, run):
    """Other text under the same tokenizer."""
    out = tmp_path_factory.mktemp("second") / "data"
    text = out.parent / "text.txt"
    text.write_text(corpus.read_text(encoding="utf-8")[::-1], encoding="utf-8")
    code, _, err = run(
        [
            "prep",
            "--text_path",
            text,
            "--out_dir",
            out,
            "--tokenizer",
            data_dir / "tokenizer.model",
            "--val_split",
            0.1,
            "--workers",
            1,
        ]
    )
    assert code == 0, err
    return lm.TokenFolder(out)


@torch.no_grad()
def test_a_mixture_has_each_domains_loss_and_their_weighted_mean(objective, folder, second):
    domains = [("web", folder, 0.7), ("code", second, 0.3)]
    row = lm.perplexity(objective, domains, 5, CPU, 32, 700)
    web, code = (by_hand(objective.model, f.val, 32, 700) for f in (folder, second))
    assert abs(web - code) > 0.1
    assert row["val/loss/web"] == pytest.approx(web, rel=1e-5)
    assert row["val/loss/code"] == pytest.approx(code, rel=1e-5)
    mean = 0.7 * web + 0.3 * code
    assert row["val/loss"] == pytest.approx(mean, rel=1e-5)
    assert row["val/ppl"] == pytest.approx(math.exp(mean), rel=1e-4)
    web_bytes, code_bytes = (
        f.meta["splits"]["val"]["bytes"] / f.meta["splits"]["val"]["tokens"]
        for f in (folder, second)
    )
    bits = mean / math.log(2) / (0.7 * web_bytes + 0.3 * code_bytes)
    assert row["val/bpb"] == pytest.approx(bits, rel=1e-2)  # marks between documents are no bytes
    assert set(row) == {"val/loss", "val/ppl", "val/bpb", "val/loss/web", "val/loss/code"}


@torch.no_grad()
def test_a_domain_without_validation_text_is_left_out_of_the_mean(objective, folder):
    empty = SimpleNamespace(val=torch.zeros(0).numpy(), bytes_per_token=lambda split: 0.0)
    row = lm.perplexity(objective, [("a", folder, 0.2), ("b", empty, 0.8)], 5, CPU, 32, 300)
    alone = lm.perplexity(objective, [("", folder, 1.0)], 5, CPU, 32, 300)
    assert row == pytest.approx({**alone, "val/loss/a": alone["val/loss"]})


@torch.no_grad()
def test_use_of_experts_counts_the_evaluation_alone(folder):
    model = lm.Transformer(
        lm.ModelSettings(
            vocab_size=400,
            n_layer=2,
            d_model=8,
            n_head=1,
            seq_len=32,
            n_expert=4,
            n_expert_active=2,
        )
    )
    model.init_weights(0)
    for block in model.blocks:  # all scores alike: two experts get every token
        block.mlp.router.weight.zero_()
        block.mlp.usage += 1000
    row = lm.perplexity(
        lm.Objective(model, lm.pretrain_loss).eval(), [("", folder, 1.0)], 4, CPU, 32, 300
    )
    assert (row["moe/least"], row["moe/most"]) == (0.0, 2.0)
    assert not any(block.mlp.usage.any() for block in model.blocks)


# ---- Rewards ----

ANSWERS = {  # a text and the number it answers with
    "": None,
    "none at all": None,
    "12/0": None,
    "seventy-two": None,
    "$1,234.50": 1234.5,
    "72.0": 72,
    "72.": 72,
    ".5": 0.5,
    "£3": 3,
    "0": 0,
    "007": 7,
    "3/4": Fraction(3, 4),
    "a sixth, or 1 / 6": Fraction(1, 6),
    "6/3 of them": 2,
    r"\frac{3}{4}": Fraction(3, 4),
    r"\dfrac{-3}{4}": Fraction(-3, 4),
    r"It is $\frac{10}{4}$ metres": Fraction(5, 2),
    "-5": -5,
    "x=-5": -5,
    "-$5": -5,
    "$-5": -5,
    "it fell to - 3 degrees": -3,
    "-3/4": -0.75,
    "12,345,678 people": 12345678,
    "1, 2 and 3": 3,
    "(4) apples": 4,
    "First 3, then 4, so 7.": 7,
    "5 + 6 = 11": 11,
    "7 apples and 2 pears make 9 fruits": 9,
    "so 5\n#### 72": 72,
    "#### -1,234 dollars, not 9": -1234,
    "####72.50": 72.5,
    "#### 1\nno:\n#### 2\nor 3": 2,
    r"\boxed{5} is more than 4": 5,
    r"\boxed{\frac{1}{2}} or 3": Fraction(1, 2),
    r"\boxed{72\text{ cm}^2}": 72,
    r"\boxed{x = -7}, 8": -7,
    r"\boxed{1} but then \boxed{2}": 2,
    "<answer>42</answer> 43": 42,
    "<answer>\n 42 of 50\n</answer>": 42,
    "The answer is $18. I am 90% sure": 18,
    "Answer: 6 of 7": 6,
    "the ANSWER IS 8 (not 9)": 8,
}
TRAPS = {  # numbers whose neighbours are easily misread
    "10-15": 15,
    "between 3-5 kg": 5,
    "3\u20135 kg": 5,
    "on 2024-05-17": 17,
    "10-5 = 5": 5,
    "5/6/2024": 2024,
    r"-\frac{7}{9}": Fraction(-7, 9),
    r"$-\dfrac{1}{2}$": Fraction(-1, 2),
    r"\tfrac{1}{2}": Fraction(1, 2),
    "1,2,3": 3,
    "(3,4)": 4,
    "\u22125": -5,
    "My first answer is 5, but the right answer is 7": 7,
    "To answer this we need 3 steps: 4 + 4 = 8": 8,
}


PLAIN = {  # a row's answer -> its value; each must be read alike in a box, behind #### and in prose
    "42": 42,
    "-42": -42,
    "−42": -42,
    "–42": -42,
    "+42": 42,
    "0": 0,
    "-0": 0,
    "007": 7,
    "3.50": Fraction(7, 2),
    ".5": Fraction(1, 2),
    "-.25": Fraction(-1, 4),
    "72.": 72,
    "1,000": 1000,
    "1,234,567.89": Fraction("1234567.89"),
    "1{,}000": 1000,
    "10,\\!000": 10000,
    "1\\,000\\,000": 10**6,
    "1 000 000": 10**6,
    "1\u00a0000": 1000,
    "1\u202f234": 1234,
    "1'000": 1000,
    "1’000’000": 10**6,
    "1_000": 1000,
    "12,34,567": 1234567,
    "1.000.000": 10**6,
    "1.234,56": Fraction("1234.56"),
    "3{,}5": Fraction(7, 2),
    "$18": 18,
    "\\$18": 18,
    "$18.00": 18,
    "-$5": -5,
    "$-5": -5,
    "€3": 3,
    "£2.50": Fraction(5, 2),
    "¥300": 300,
    "18 dollars": 18,
    "$1,200 per month": 1200,
    "$5 million": 5 * 10**6,
    "2.5 million": 2500000,
    "3 billion people": 3 * 10**9,
    "12 thousand": 12000,
    "12%": 12,
    "12 %": 12,
    "12\\%": 12,
    "12 percent": 12,
    "12 per cent": 12,
    "0.5\\%": Fraction(1, 2),
    "3/4": Fraction(3, 4),
    "-3/4": Fraction(-3, 4),
    "3 / 4": Fraction(3, 4),
    "\\frac{3}{4}": Fraction(3, 4),
    "\\dfrac{3}{4}": Fraction(3, 4),
    "\\tfrac34": Fraction(3, 4),
    "\\cfrac{3}{4}": Fraction(3, 4),
    "\\frac34": Fraction(3, 4),
    "\\frac{3}4": Fraction(3, 4),
    "\\frac3{4}": Fraction(3, 4),
    "-\\frac{3}{4}": Fraction(-3, 4),
    "\\frac{-3}{4}": Fraction(-3, 4),
    "\\frac{ 10 }{ 4 }": Fraction(5, 2),
    "½": Fraction(1, 2),
    "¾ cup": Fraction(3, 4),
    "1 1/2": Fraction(3, 2),
    "1\\frac12": Fraction(3, 2),
    "1\\frac{1}{2}": Fraction(3, 2),
    "1 \\frac{1}{2}": Fraction(3, 2),
    "2½": Fraction(5, 2),
    "-1 1/2": Fraction(-3, 2),
    "-2\\frac13": Fraction(-7, 3),
    "10 3/4 inches": Fraction(43, 4),
    "1.5e3": 1500,
    "1.5E3": 1500,
    "2e-3": Fraction(1, 500),
    "1.5e+3": 1500,
    "1.5 \\times 10^3": 1500,
    "1.5 \\times 10^{3}": 1500,
    "6.02 \\cdot 10^{23}": 602 * 10**21,
    "3 × 10⁵": 300000,
    "3*10^5": 300000,
    "3 x 10^-2": Fraction(3, 100),
    "-4 \\times 10^{-2}": Fraction(-1, 25),
    "3*10**5": 300000,
    "10^{3}": 1000,
    "10^3": 1000,
    "2^{10}": 1024,
    "10⁶": 10**6,
    "5^2": 25,
    "x = 7": 7,
    "x=-7": -7,
    "n = 3/4": Fraction(3, 4),
    "f(2) = 9": 9,
    "8 * 9 = 72": 72,
    "\\pi \\approx 3.14": Fraction("3.14"),
    "x_1 = 5": 5,
    "P(A) = 0.25": Fraction(1, 4),
    "12\\text{ cm}^2": 12,
    "12 cm^2": 12,
    "12\\,\\text{cm}^{2}": 12,
    "12\\text{cm}": 12,
    "12 m/s": 12,
    "12 km/h": 12,
    "9.8\\ \\mathrm{m/s^2}": Fraction("9.8"),
    "12 m^3": 12,
    "90^\\circ": 90,
    "90^{\\circ}": 90,
    "90°": 90,
    "90 degrees": 90,
    "37 °C": 37,
    "5 apples": 5,
    "5\\text{ apples}": 5,
    "72 square feet": 72,
    "3 hours": 3,
    "5ft": 5,
    "15 mph": 15,
    "6\\text{ units}": 6,
    "5-year-old": 5,
    "12 cm²": 12,
    "7 kg": 7,
    "$42$": 42,
    "$$42$$": 42,
    "\\(42\\)": 42,
    "\\[42\\]": 42,
    "**42**": 42,
    "__42__": 42,
    "*42*": 42,
    "(42)": 42,
    "{42}": 42,
    "\\text{42}": 42,
    "\\mathbf{42}": 42,
    "\\boxed{42}": 42,
    "\\left(42\\right)": 42,
    "42 .": 42,
    "42!": 42,
    "42\n": 42,
    " 42 ": 42,
    "~42": 42,
    "The total is 42": 42,
    "Total: 42": 42,
    "about 42": 42,
}
NOT_PLAIN = [  # expressions, lists and several numbers: golds for --reward math
    "3\\sqrt{2}",
    "2\\sqrt{3}",
    "\\sqrt{2}",
    "sqrt(2)",
    "sqrt 2",
    "(3,5)",
    "(3, 5)",
    "[3,5)",
    "[0,1]",
    "\\{1,2,3\\}",
    "1, 2, 3",
    "1 and 2",
    "3 or 5",
    "3-5",
    "3–5",
    "between 3 and 5",
    "\\pi",
    "3\\pi",
    "2π",
    "3x",
    "3x + 2",
    "x^2",
    "x+1",
    "2 + 3i",
    "7i",
    "\\frac{x}{2}",
    "\\frac{\\sqrt{2}}{2}",
    "\\frac{3}{x}",
    "\\log 5",
    "log(5)",
    "\\ln 2",
    "\\infty",
    "none",
    "",
    "A",
    "(A)",
    "\\text{B}",
    "x",
    "y = 2x + 1",
    "x = 2 \\text{ or } x = 3",
    "3:5",
    "2 - \\sqrt{3}",
    "5!+x",
    "10:30",
    "3 \\pm 1",
    "\\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix}",
    "1/0",
    "\\frac{1}{0}",
    "5/6/2024",
    "2024-05-17",
    "12ab3",
    "n^{3}",
    "2^{x}",
    "2^n",
    "e^2",
    "3e",
    "x \\le 5",
    "x > 5",
    "\\ge 3",
    "p/q",
    "3\\cdot 5",
    "6 \\div 2",
    "9" * 5000,
    "1e999999999",
    "10^{999999999}",
    "9^{9^9}",
]
COMPLETIONS = {  # how completions answer
    "\\boxed{42}. I am sure this answer is right.": 42,
    "#### 42\nThe answer is above.": 42,
    "<answer>42</answer> The answer is unique.": 42,
    "\\boxed{1}, no, \\boxed{2}": 2,
    "\\boxed{no idea} The answer is 3": 3,
    "####\nThe answer is 4.": 4,
    "\\boxed{\\frac{1}{\\text{\\textbf{2}}}} so 1/2": Fraction(1, 2),
    "\\boxed{\\boxed{\\boxed{5}}}": 5,
    "\\boxed{\\text{\\textbf{7}}}": 7,
    "$\\boxed{x = {-7}}$": -7,
    "\\fbox{9}": 9,
    "\\boxed {8}": 8,
    "\\boxed{5": 5,
    "\\boxed{(3,5)} so 5": None,
    "\\boxed{3\\sqrt{2}} = 3": None,
    "The answer is (3,5).": None,
    "The answer is 3 or 5": None,
    "The answer is 8. Check: 4 + 4 = 9": 8,
    "The answer is 3.5. Done": Fraction(7, 2),
    "The answer is: $1,200.50.": Fraction("1200.5"),
    "answer: **12**": 12,
    "Final answer: 12 (twelve)": 12,
    "The area is 12 cm^2.": 12,
    "The area is 12 cm²": 12,
    "so it is $x_2$ = 5": 5,
    "So a_1 + a_2 = 9.": 9,
    "9 m/s^{2}": 9,
    "She pays $5 for 3.": 3,
    "That is 1.5e3 metres.": 1500,
    "about 6.02 \\times 10^{23} atoms": 602 * 10**21,
    "He has 2 1/2 pizzas left.": Fraction(5, 2),
    "It's 12:30": 30,
    "I think 5, maybe 6": 6,
    "it costs 3 €": 3,
    "1st place": 1,
    "The answer is 50%.": 50,
    "It rose by 12.5 percent.": Fraction(25, 2),
    "The price is 3.99.": Fraction("3.99"),
    "In 2019, 100 people came": 100,
    "#### $1,000 (a thousand)": 1000,
    "Answer: 6 × 7 = 42": 42,
    "<ANSWER> 7 </ANSWER>": 7,
    "<answer>\n12 apples\n</answer>": 12,
    "answer is\n\n12": 12,
    "The answer isn't 5 but 6": 6,
    "0.1 + 0.2 = 0.3": Fraction(3, 10),
    "a) 5": 5,
    "5)": 5,
    "Step 1: 2+2. Step 2: 4": 4,
    "1/2 + 1/3 = 5/6": Fraction(5, 6),
    "5/6/2024": 2024,
}

FORMS = (
    "{}",
    r"\boxed{{{}}}",
    "#### {}",
    "<answer>{}</answer>",
    "The answer is {}",
    "so 5 and\n#### {}\nThe answer is 3.",
)


def test_the_tables_are_long_enough():
    assert len(PLAIN) + len(COMPLETIONS) >= 150


@pytest.mark.parametrize("text", PLAIN)
def test_a_plain_number_is_read_alike_in_a_row_and_in_every_mark(text):
    assert lm.gold_number(text).value == PLAIN[text]
    for form in FORMS:
        assert lm.final_number(form.format(text)).value == PLAIN[text], form
        assert lm.number_reward("", form.format(text), {"answer": text}) == 1, form


@pytest.mark.parametrize("text", NOT_PLAIN, ids=lambda text: text[:20])
def test_what_is_no_plain_number_is_neither_a_gold_nor_a_right_answer(text):
    assert lm.gold_number(text) is None
    if any(character.isdigit() for character in text):
        assert lm.final_number(rf"so 5, \boxed{{{text}}}") is None
    with pytest.raises(ValueError, match="no plain number: use --reward math"):
        opened("number").check({"answer": text})


@pytest.mark.parametrize("text", COMPLETIONS)
def test_marks_rank_above_prose_and_the_number_is_the_answer_s(text):
    found = lm.final_number(text)
    assert (found and found.value) == COMPLETIONS[text]


HOSTILE = [
    piece * times + end
    for piece in (
        "9",
        "1,",
        "(",
        "{",
        "\\frac{",
        "\\boxed{",
        "####",
        "answer is ",
        "-",
        "1 ",
        "1/",
        ".",
    )
    for times, end in ((1, ""), (7, "5"), (5000, ""), (5000, "5}"))
] + [
    lead + body
    for lead in ("#### ", "\\boxed{", "<answer>", "The answer is ", "")
    for body in (
        "1e" + "9" * 30,
        "9^{9^{9^{9}}}",
        "\\frac{1}{0}",
        "1/0",
        "0/0",
        "\x00\ud800\u2028",
        "٣٤",
        "²³¹",
        "--5",
        "1.2.3.4",
        "$$$",
        "½½½",
    )
]


@pytest.mark.timeout(60)
def test_hostile_texts_end_in_a_score():
    assert len(HOSTILE) >= 100
    rows = {"answer": "5", "pattern": "5", "numbers": [2, 3]}
    for text in HOSTILE:
        for name, reward in lm.REWARDS.items():
            began = time.monotonic()
            assert isinstance(reward("", text, rows), float)
            assert time.monotonic() - began < 2, (name, text[:40])
        assert lm.number_reward("", "5", {"answer": text}) in (0.0, 1.0)


@pytest.mark.parametrize(
    ("text", "number"), [*ANSWERS.items(), *TRAPS.items()], ids=lambda value: str(value)[:30]
)
def test_the_number_that_a_text_answers_with(text, number):
    found = lm.final_number(text)
    assert (found if found is None else found[0]) == number


@pytest.mark.parametrize("text", ["12%", "12 %", r"12\%", "12.0% of it", r"\boxed{12\%}"])
def test_a_percentage_is_told(text):
    assert lm.final_number(text) == (12, True) and lm.final_number("12 or so") == (12, False)


@pytest.mark.parametrize(
    ("completion", "answer", "points"),
    [
        ("It costs $1,234.50 in all.", "1234.5", 1),
        ("72.0", "72", 1),
        ("72", 72, 1),
        ("0.75", "3/4", 1),
        (r"\boxed{\frac{3}{4}}", "0.75", 1),
        ("12%", "0.12", 1),
        ("12", "12%", 1),
        ("0.12", "12%", 1),
        ("12%", "12", 1),
        ("12%", "12%", 1),
        ("0.12%", "12%", 0),
        ("1200%", "12%", 0),
        ("0.3333333", "1/3", 1),
        ("0.333", "1/3", 0),
        ("-5", "5", 0),
        ("5", "-5", 0),
        ("0", "0", 1),
        ("0.0000001", "0", 0),
        ("72 or 73", "72", 0),
        ("", "72", 0),
        ("no idea", "72", 0),
        ("72", "none", 0),
        ("none", "none", 0),
        ("1,000,001", "1000000", 1),
        ("100,001", "100000", 0),
        ("#### 72", "so 8 * 9\n#### 72", 1),
    ],
)
def test_number_reward(completion, answer, points):
    assert lm.number_reward("", completion, {"answer": answer}) == points


@pytest.mark.parametrize("form", ["{}", "1/{}", "{}.5", r"\frac{{1}}{{{}}}", "1.{}%", "#### {}"])
def test_a_model_that_writes_digits_without_end_is_wrong_and_no_crash(form):
    """Python refuses to read whole numbers of more than 4,300 digits."""
    text = form.format("9" * 5000)
    assert lm.number_reward("", text, {"answer": "72"}) == 0
    assert lm.number_reward("", "72", {"answer": text}) == 0
    assert lm.REWARDS["countdown"]("", text, {"answer": "72", "numbers": [9]}) == 0


@settings(max_examples=50)
@given(
    st.fractions(max_denominator=999),
    st.sampled_from(["", "So ", "The answer is ", "#### "]),
    st.sampled_from(["", ".", " apples", " %", "\n", "!"]),
)
def test_every_way_to_write_a_number_is_read_back(number, before, after):
    ways = [str(number), f"{number.numerator:,}" + f"/{number.denominator}"]
    if number >= 0 or "answer" in before:
        ways.append(f"\\frac{{{number.numerator}}}{{{number.denominator}}}")
    if number == int(number):
        ways += [f"{int(number):,}.00", f"${int(number)}"]
    assert {lm.final_number(before + way + after)[0] for way in ways} == {number}


@given(st.text(st.sampled_from("0123456789,./$%-−\\frac{}boxed#answer is<>ABI ()\n"), max_size=60))
def test_no_text_breaks_a_reward(text):
    row = {"answer": "5", "pattern": "5", "numbers": [2, 3]}
    for name, reward in lm.REWARDS.items():
        points = reward("", text, row)
        assert isinstance(points, float) and (name == "length" or 0 <= points <= 1), name


LETTERS = {  # answers to a question of four choices, as models and rows write them
    "B": "B",
    " (B)": "B",
    "B.": "B",
    "B) Cholesterol embolization": "B",
    "B: Cholesterol embolization": "B",
    "B Cholesterol embolization": "B",
    "**B**": "B",
    "**C. Aspirin**": "C",
    "The answer is D": "D",
    "The correct answer is (A).": "A",
    "Answer: A": "A",
    "<answer>C</answer>": "C",
    r"\boxed{B}": "B",
    r"\boxed{\text{D}}": "D",
    "#### C": "C",
    "It is option D": "D",
    "D, since A) is wrong and so is B)": "D",
    "Not (A), as he has fever; so (C).": "C",
    "vitamin C, hence B": "B",
    "He has hepatitis.\nThe answer is C. Not D.": "C",
    "": None,
    "cholesterol": None,
    "Aspirin": None,
    "b": "B",
    "(c)": "C",
    "b) Cholesterol embolization": "B",
    "the answer is d": "D",
    "Answer: (a)": "A",
    "option C because the others are wrong": "C",
    "I choose option b, since A fails": "B",
    "Choice D it is": "D",
    "a good question": None,
    "i do not know": None,
    "It's": None,
}
SENTENCES = {  # A and I are also words
    "I think it is (C).": "C",
    "I would choose B.": "B",
    "The answer is: I believe D.": "D",
    "A 40-year-old patient with fever: D.": "D",
    "A man with gout, so the choice is (B)": "B",
    "The answer is B, not C": "B",
}


@pytest.mark.parametrize(("text", "letter"), [*LETTERS.items(), *SENTENCES.items()])
def test_the_letter_that_a_text_chooses(text, letter):
    assert lm.choice_letter(text) == letter


@pytest.mark.parametrize(
    ("name", "completion", "row", "points"),
    [
        ("number", "so 7", {"answer": "7"}, 1),
        ("number", "so 8", {"answer": "7"}, 0),
        ("choice", "The answer is B.", {"answer": "B"}, 1),
        ("choice", "C", {"answer": "B"}, 0),
        ("choice", "B", {"answer": "B. Cholesterol embolization"}, 1),
        ("choice", "", {"answer": ""}, 0),
        ("choice", "", {"answer": "B"}, 0),
        ("choice", "none", {"answer": "none"}, 0),
        ("exact", " 1 2 3\n", {"answer": "1 2 3"}, 1),
        ("exact", "1 2", {"answer": "1 2 3"}, 0),
        ("exact", "7", {"answer": 7}, 1),
        ("exact", "abc", {"answer": "ABC"}, 0),
        ("regex", "say hello", {"pattern": r"\bhel+o$"}, 1),
        ("regex", "help", {"pattern": "hel+o"}, 0),
        ("format", "#### 7", {}, 1),
        ("format", "<answer>x</answer>", {}, 1),
        ("format", "7", {}, 0),
        ("format", "", {}, 0),
        ("format", r"\boxed{7}", {}, 1),
        ("format", "####", {}, 0),
        ("length", "", {}, 0),
        ("length", "x" * 500, {}, -0.5),
        ("countdown", "3 * 4 - 2", {"numbers": [2, 3, 4], "answer": "10"}, 1),
        ("countdown", "3 * 4 - 2 = 10", {"numbers": [2, 3, 4], "answer": 10}, 1),
        ("countdown", "<answer>(4 + 1) / 5</answer>", {"numbers": [5, 1, 4], "answer": "1"}, 1),
        ("countdown", "1 / 3 * 3", {"numbers": [3, 1, 3], "answer": "1"}, 1),  # exactly, no float
        ("countdown", "3 + 4 - 2", {"numbers": [2, 3, 4], "answer": "10"}, 0.1),
        ("countdown", "10", {"numbers": [2, 3, 4], "answer": "10"}, 0),
        ("countdown", "3 * 4 - 2 - 2", {"numbers": [2, 3, 4], "answer": "8"}, 0),
        ("countdown", "3 * 4", {"numbers": [2, 3, 4], "answer": "12"}, 0),
        ("countdown", "34 - 2", {"numbers": [2, 3, 4], "answer": "32"}, 0),
        ("countdown", "3 ** 4 - 2", {"numbers": [2, 3, 4], "answer": "79"}, 0),
        ("countdown", "4 / (3 - 3)", {"numbers": [3, 3, 4], "answer": "1"}, 0),
        ("countdown", "", {"numbers": [3], "answer": "3"}, 0),
        ("countdown", "x = 3", {"numbers": [3], "answer": "3"}, 1),
        ("countdown", "3 × 4 − 2", {"numbers": [2, 3, 4], "answer": "10"}, 1),
        ("countdown", r"$3 \times 4 - 2$", {"numbers": [2, 3, 4], "answer": "10"}, 1),
        ("countdown", r"\boxed{3 \cdot 4 - 2}", {"numbers": [2, 3, 4], "answer": "10"}, 1),
        ("countdown", "6 ÷ 2 + 4.", {"numbers": [2, 6, 4], "answer": "7"}, 1),
        ("countdown", r"\frac{6}{2} + 4", {"numbers": [2, 6, 4], "answer": "7"}, 1),
        ("countdown", "10 = 3 * 4 - 2", {"numbers": [2, 3, 4], "answer": "10"}, 1),
        ("countdown", "The answer is 3 * 4 - 2.", {"numbers": [2, 3, 4], "answer": "10"}, 1),
        ("countdown", "10 = 10", {"numbers": [2, 3, 4], "answer": "10"}, 0),
        ("choice", "b", {"answer": "B"}, 1),
        ("choice", "B", {"answer": "b"}, 1),
        ("countdown", "3_4", {"numbers": [3, 4], "answer": "34"}, 0),  # two numbers, read as one
        ("countdown", "34 # 2 5", {"numbers": [2, 5, 34], "answer": "34"}, 0),  # a comment
    ],
)
def test_each_reward_gives_its_points(name, completion, row, points):
    assert lm.REWARDS[name]("prompt", completion, row) == pytest.approx(points)


def opened(*specs, seconds=5.0):
    return lm.Rewards(tuple(map(str, specs)), seconds, 2, CPU)


def shut(rewards):
    """End the processes of the user's functions now, not with the tests."""
    for part in rewards.parts.values():
        if isinstance(part, lm.CallReward):
            part.close()


def problem(row, prompt="?"):
    return lm.Problem(np.array([1]), [lm.Turn("system", "Be brief."), lm.Turn("user", prompt)], row)


def test_parts_are_scored_one_by_one_and_weighed():
    rewards = opened("number:2", "format", "length:-.5", "exact:0")
    asked = [problem({"answer": "7"}), problem({"answer": "8"}), problem({"answer": "9"})]
    scores = rewards.score(asked, ["#### 7", "8", "x" * 100])
    assert list(rewards.parts) == ["number", "format", "length", "exact"]
    assert scores.tolist() == [[1, 1, -0.006, 0], [1, 0, -0.001, 1], [0, 0, -0.1, 0]]
    assert (scores @ rewards.weights).tolist() == pytest.approx([3.003, 2.0005, 0.05])


@pytest.mark.parametrize(
    "spec",
    [
        "numbr",
        "number:",
        "number:x",
        "nothing",
        "",
        ":2",
        "gone.pt",
        "gone.py:score",
        "gone/run:0.5",
    ],
)
def test_what_names_no_reward_is_refused(spec):
    with pytest.raises(lm.UserError) as error:
        opened(spec)
    what, fix = error.value.faults[0]
    assert spec.partition(":")[0] in what
    assert all(name in fix for name in lm.REWARDS), "what may be chosen"


@pytest.mark.parametrize(
    ("source", "told"),
    [
        ("def other(p, c, r): return 1\n", "no function score"),
        ("score = 1\n", "no function score"),
        ("def score(p, c, r) return 1\n", "cannot be read"),
        ("def score():\n\0", "cannot be read"),
    ],
)
def test_a_file_without_the_function_is_refused(tmp_path, source, told):
    (tmp_path / "mine.py").write_text(source)
    with pytest.raises(lm.UserError, match=told):
        opened(tmp_path / "mine.py:score")


def test_a_part_given_twice_keeps_one_weight_a_part(tmp_path):
    """Also two files of one name; two of the same are either refused or both counted."""
    for folder, points in (("a", 1), ("b", 2)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "mine.py").write_text(f"def score(p, c, r): return {points}\n")
    rewards = opened(*(tmp_path / folder / "mine.py:score" for folder in "ab"))
    assert rewards.score([problem({})], [""]).tolist() == [[1, 2]]
    assert len(rewards.parts) == len(rewards.weights) == 2
    shut(rewards)
    try:
        rewards = opened("length", "length:2")
    except lm.UserError:
        return
    assert rewards.score([problem({})], ["x" * 1000]) @ rewards.weights == pytest.approx([-3])


@pytest.mark.parametrize(
    ("spec", "row", "lacking"),
    [
        ("number", {}, "answer"),
        ("choice", {"pattern": "x"}, "answer"),
        ("exact", {}, "answer"),
        ("regex", {"answer": "7"}, "pattern"),
        ("countdown", {"answer": "7"}, "numbers"),
        ("countdown", {"numbers": [3, 4]}, "answer"),
        ("regex", {"pattern": "("}, "unterminated"),
    ],
)
def test_a_row_without_what_a_part_needs_is_a_fault_of_the_row(spec, row, lacking):
    whole = {"answer": "7", "pattern": "7", "numbers": [3, 4]}
    assert opened(spec, "length").check(whole) == whole
    with pytest.raises(ValueError, match=lacking):
        opened("length", spec).check(row)


def test_what_needs_nothing_takes_any_row():
    assert opened("format", "length").check({}) == {}
    with pytest.raises(ValueError, match="(answer|pattern) is missing"):
        opened("regex", "number:2").check({})


# ---- Functions of the user's ----

MINE = """
import os, sys, threading, time

def score(prompt, completion, row):
    if completion == "raises":
        raise KeyError("no such thing")
    if completion == "hangs":
        while True:
            pass
    if completion == "dies":
        os._exit(3)
    if completion == "dies later":
        threading.Timer(0.05, os._exit, [3]).start()
        return 1
    if completion == "quits":
        sys.exit(1)
    if completion == "odd error":
        class Odd(Exception):
            def __init__(self, a, b):
                super().__init__("odd")
        raise Odd(1, 2)
    if completion == "complex":
        return 1j
    words = {"nan": float("nan"), "inf": -float("inf"), "none": None, "text": "many", "list": [1]}
    return words[completion] if completion in words else len(prompt) + row["more"]

def short(prompt):
    return 1.0

def spoils(prompt, completion, row):
    return row.pop("answer") == completion
"""
PAUSE = """
import os, time

def score(prompt, completion, row):
    time.sleep(0.2)
    return len(completion) + os.getpid() / 1e9
"""
FAULTS = {  # a completion, and what is told of it
    "raises": "no such thing",
    "hangs": "more than 2 seconds",
    "dies": "warning",
    "quits": "SystemExit",
    "nan": "nan",
    "inf": "-inf",
    "none": "TypeError",
    "text": "many",
    "list": "TypeError",
    "complex": "TypeError",
    "odd error": "warning",
}


@pytest.fixture
def mine(tmp_path):
    """`mine(function)` opens it as the rewards' only part, with two seconds to spare."""
    path, every = tmp_path / "mine.py", []
    path.write_text(MINE)

    def start(name):
        every.append(opened(f"{path}:{name}:0.5", seconds=2.0))
        return every[-1]

    yield start
    for rewards in every:
        shut(rewards)


def test_a_function_gets_the_last_question_the_completion_and_the_row(mine):
    rewards = mine("score")
    asked = [problem({"more": 3}, "?"), problem({"more": 0.25}, "four")]
    assert rewards.score(asked, ["", "x"]).tolist() == [[4], [4.25]]
    assert list(rewards.parts) == ["mine.py:score"] and rewards.weights == [0.5]
    row = {"answer": "7"}
    assert mine("spoils").score([problem(row)], ["7"]).tolist() == [[1]] and row == {"answer": "7"}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_of_a_function_costs_that_completion_alone_and_is_told(mine, capsys, fault):
    asked = [problem({"more": n}) for n in range(4)]
    began = time.monotonic()
    scores = mine("score").score(asked, ["fine", fault, fault if fault != "hangs" else "", "fine"])
    assert scores[[0, 1, 3], 0].tolist() == [1, 0, 4] and time.monotonic() - began < 20
    told = capsys.readouterr().out
    assert told.count("warning") == 1 and "mine.py:score" in told and FAULTS[fault] in told


def test_a_function_of_other_arguments_is_told_once(mine, capsys):
    assert mine("short").score([problem({})] * 3, ["a", "b", "c"]).tolist() == [[0]] * 3
    told = capsys.readouterr().out
    assert told.count("warning") == 1 and "mine.py:short" in told and "argument" in told


def test_a_process_that_dies_between_two_completions_is_replaced(mine):
    rewards = mine("score")
    assert rewards.score([problem({})], ["dies later"]).tolist() == [[1]]
    time.sleep(0.5)
    found = rewards.score([problem({"more": n}) for n in range(3)], ["fine"] * 3)[:, 0].tolist()
    assert found[1:] == [2, 3] and found[0] in (0, 1), "at most the one that found it dead is lost"


def test_many_different_faults_do_not_flood_the_terminal(tmp_path, capsys):
    path = tmp_path / "mine.py"
    path.write_text("def score(p, completion, r): raise ValueError(completion)\n")
    rewards = opened(f"{path}:score")
    assert not rewards.score([problem({})] * 30, [f"completion {n}" for n in range(30)]).any()
    shut(rewards)
    assert 1 <= capsys.readouterr().out.count("warning") <= 10


def test_a_process_that_hangs_does_not_stay_behind(mine):
    rewards, before = mine("score"), set(multiprocessing.active_children())
    rewards.score([problem({"more": 1})] * 2, ["fine", "hangs"])
    rewards.score([problem({"more": 1})], ["fine"])
    (one,) = rewards.parts.values()
    left = {child.pid for child in set(multiprocessing.active_children()) - before}
    assert left == {pid for worker in one.workers if worker.pool for pid in worker.pool._processes}


GREEDY = """
import subprocess, sys

def score(prompt, completion, row):
    if completion == "memory":
        return len(bytearray(12 << 30)) * 0.0
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"])
    open(row["note"], "a").write(f"{child.pid}\\n")
    if completion == "hangs":
        child.wait()
    return 1.0
"""


def alive(pid):
    """Whether a process runs; one that has ended and waits for its parent does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="this is looked up on Linux")
def test_memory_and_processes_of_a_function_are_bounded(tmp_path, capsys):
    (tmp_path / "greedy.py").write_text(GREEDY)
    note = tmp_path / "note"
    rewards = opened(f"{tmp_path}/greedy.py:score", seconds=2.0)
    asked = [problem({"note": str(note)}) for _ in range(3)]
    scores = rewards.score(asked, ["memory", "hangs", "fine"])
    assert scores[:, 0].tolist() == [0, 0, 1]
    told = capsys.readouterr().out
    assert "MemoryError" in told and "took more than" in told
    shut(rewards)
    pids = [int(line) for line in note.read_text().split()]
    until = time.monotonic() + 10
    while any(map(alive, pids)) and time.monotonic() < until:
        time.sleep(0.1)
    assert len(pids) == 2 and not any(map(alive, pids))


def test_calls_are_made_in_several_processes_and_give_the_same(tmp_path, monkeypatch):
    (tmp_path / "slow.py").write_text(PAUSE)
    texts, found, seconds = ["x" * i for i in range(12)], [], []
    for cores in (1, 4):
        monkeypatch.setattr(lm, "cores_here", lambda cores=cores: cores)
        rewards = opened(f"{tmp_path}/slow.py:score")
        rewards.score([problem({})] * 4, texts[:4])  # starts the processes
        began = time.monotonic()
        found.append(rewards.score([problem({})] * 12, texts)[:, 0])
        seconds.append(time.monotonic() - began)
        shut(rewards)
    assert [scores.astype(int).tolist() for scores in found] == [list(range(12))] * 2
    assert [len(set((scores % 1).round(9))) for scores in found] == [1, 4]
    assert seconds[1] < 0.5 * seconds[0]


# ---- Expressions ----

math_verify = pytest.mark.skipif(
    importlib.util.find_spec("math_verify") is None, reason="math-verify is not installed"
)
GOLDS = [r"12\text{ cm}^2", "(3,5)", "10^{3}", r"10,\!000", "1 1/2", r"2\sqrt{3}", "[3,5)"]
GOLDS += [r"\{1,2\}", "x=3", r"\pi", r"\frac{\sqrt{3}}{2}", "2x+1", "42", r"$\frac{1}{2}$"]
UNLIKE = [r"3\sqrt{2}", "5", "3", "7", "(5,3)", "[3,5]", "2x-1"]


@math_verify
def test_math_knows_expressions_and_tells_them_apart():
    rewards = opened("math")
    asked, texts, wanted = [], [], []
    for gold in GOLDS:
        rewards.check({"answer": gold})
        for form in (r"so \boxed{%s}.", "#### %s", "<answer>%s</answer>"):
            asked.append(problem({"answer": gold}))
            texts.append(form % gold)
            wanted.append(1)
        for other in UNLIKE:
            asked.append(problem({"answer": gold}))
            texts.append(rf"\boxed{{{other}}}")
            wanted.append(int((gold, other) == ("x=3", "3")))
    asked += [problem({"answer": r"\frac{1}{2}"})] * 2 + [problem({"answer": r"\sqrt{8}"})]
    texts += ["0.5", r"\boxed{\frac{2}{4}}", r"\boxed{2\sqrt{2}}"]
    found = rewards.score(asked, texts)[:, 0].tolist()
    assert found == wanted + [1, 1, 1]
    shut(rewards)


@math_verify
@pytest.mark.parametrize("text", ["", "  "])
def test_an_answer_that_math_cannot_read_is_a_bad_row(text):
    rewards = opened("math")
    with pytest.raises(ValueError, match="reads nothing in the answer"):
        rewards.check({"answer": text})
    shut(rewards)


@math_verify
def test_an_expression_that_takes_forever_gets_0(capsys):
    rewards = opened("math", seconds=3.0)
    asked = [problem({"answer": r"\sqrt{2}"})] * 3
    texts = [r"\boxed{\sqrt{2}}", r"\boxed{9^{9^{9^{9}}}}", r"\boxed{\sqrt{2}}"]
    began = time.monotonic()
    assert rewards.score(asked, texts)[:, 0].tolist() == [1, 0, 1]
    assert time.monotonic() - began < 15
    shut(rewards)


def test_without_its_package_math_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(lm.UserError, match="math-verify"):
        opened("math")


# ---- Reward models ----


@pytest.fixture(scope="module")
def judge(tiny_tokenizer, tmp_path_factory):
    """The folder of a reward model whose scores spread, its model, and its tokenizer."""
    model = lm.Transformer(
        lm.ModelSettings(
            vocab_size=400, n_layer=1, d_model=16, n_head=2, seq_len=48, scalar_head=True
        )
    ).eval()
    model.init_weights(3)
    torch.nn.init.normal_(model.score.weight)
    folder, tokenizer = tmp_path_factory.mktemp("judge"), lm.Tokenizer(tiny_tokenizer)
    lm.save_checkpoint(
        folder / "ckpt_last.pt",
        {
            "model": model.state_dict(),
            "config": dataclasses.asdict(model.config),
            "tokenizer": tiny_tokenizer,
        },
    )
    return folder, model, tokenizer


@torch.no_grad()
def test_a_reward_model_is_a_part_beside_others(judge):
    folder, model, tokenizer = judge
    texts = ["a quiet harbour", "", "7", "the village and the river " * 20]
    asked = [lm.Problem(np.array([1]), [lm.Turn("user", q)], {"answer": "7"}) for q in "abcd"]
    rewards = opened("exact", f"{folder}:0.25")
    scores = rewards.score(asked, texts)
    assert rewards.weights == [1, 0.25] and scores[:, 0].tolist() == [0, 0, 1, 0]
    for one, text, found in zip(asked, texts, scores[:, 1], strict=True):
        ids, _ = lm.encode_chat(tokenizer, [*one.turns, lm.Turn("assistant", text)])
        assert ids[-1] == tokenizer.eos and (len(ids) > 48) == (len(text) > 50)
        hidden, _ = model.hidden_and_aux_loss(torch.tensor([ids[-48:]]))
        assert found == pytest.approx(float(model.score(hidden[0, -1])), abs=1e-5)
    assert len(set(scores[:, 1].round(4))) == 4


def test_a_language_model_is_no_judge(trained):
    with pytest.raises(lm.UserError, match="is not a reward model"):
        opened("number", f"{trained}:2")


# ---- Programs that pass their tests ----

HUMAN_EVAL = {
    "task_id": "x/0",
    "prompt": "from typing import List\n\n\ndef total(values: List[int]) -> int:\n"
    '    """The sum."""\n',
    "entry_point": "total",
    "canonical_solution": "    return sum(values)\n",
    "test": "def check(candidate):\n    assert candidate([1, 2]) == 3\n"
    "    assert candidate([]) == 0\n",
}
MBPP = {
    "text": "Write a function to add.",
    "code": "def add(a, b):\n    return a + b",
    "test_list": ["assert add(1, 2) == 3", "assert add(-1, 1) == 0"],
    "test_setup_code": "",
}
WHOLE = "def total(values: List[int]) -> int:\n    return sum(values)\n"
PROGRAMS = {
    "a body": (HUMAN_EVAL, "    return sum(values)\n", 1),
    "a body and what follows it": (HUMAN_EVAL, "    return sum(values)\n\nprint(total(5))\n", 1),
    "a wrong body": (HUMAN_EVAL, "    return len(values)\n", 0),
    "no code": (HUMAN_EVAL, "the sum of the values", 0),
    "a fenced function": (HUMAN_EVAL, f"Here:\n```python\n{WHOLE}```\nDone.", 1),
    "a bare function": (HUMAN_EVAL, WHOLE, 1),
    "an early exit": (HUMAN_EVAL, "    import os\n    os._exit(0)\n", 0),
    "an exit with success": (HUMAN_EVAL, "    raise SystemExit(0)\n", 0),
    "MBPP's own": (MBPP, MBPP["code"], 1),
    "MBPP in marks": (MBPP, MBPP["code"] + "\n[DONE]\nmore", 1),
    "MBPP, wrong": (MBPP, "def add(a, b):\n    return a - b", 0),
    "tests of one's own": ({"prompt": "f?", "tests": "assert f() == 1"}, "f = lambda: 1", 1),
    "bytes that are no text": (MBPP, "\ud800", 0),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_is_right_where_its_tests_pass(name):
    row, completion, wanted = PROGRAMS[name]
    lm.check_code_row(row)
    assert lm.CodeReward(10.0).score([("", completion, row)]) == [wanted]


def test_rows_without_tests_are_refused():
    for row in ({}, {"test_list": []}, {"entry_point": "f", "prompt": "x"}, {"tests": 5}):
        with pytest.raises(ValueError, match="it has no tests"):
            lm.check_code_row(row)


def passes(code, seconds=4.0):
    return lm.run_program(code, [""], seconds).passed == 1


def test_a_program_has_limits():
    assert passes("x = 1")
    began = time.monotonic()
    assert not passes("while True: pass", 1.0)
    assert not passes("import time; time.sleep(60)", 1.0)
    assert time.monotonic() - began < 8
    assert not passes("x = bytearray(3 << 30)")
    assert not passes("open('x', 'wb').write(bytes(1 << 26))")
    assert passes("open('x', 'w').write('small')")
    assert passes("print('x' * 10 ** 7)")  # nobody reads it
    assert not passes("import sys; sys.stdin.read(); raise ValueError")


def test_what_a_program_starts_ends_with_it(tmp_path):
    """A grandchild that leaves its session lives on only where there are no namespaces."""
    mark = f"left-by-{os.getpid()}"
    child = (
        "import os, sys\nif os.fork() == 0:\n    os.setsid()\n"
        f"    os.execv(sys.executable, ['python', '-c', 'import time; time.sleep(9)', '{mark}'])\n"
    )
    assert passes(child)
    time.sleep(0.5)
    if lm.has_namespaces():
        assert not running(mark)


def running(mark):
    """The processes whose command line has a mark."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it has just ended
            if mark.encode() in path.read_bytes():
                found.append(path)
    return found


@pytest.mark.skipif(not lm.has_namespaces(), reason="this system gives no namespaces")
def test_a_program_sees_no_network_no_processes_and_writes_nowhere_else(tmp_path):
    server = socket.create_server(("127.0.0.1", 0))
    port = server.getsockname()[1]
    reach = f"import socket; socket.create_connection(('127.0.0.1', {port}), 2)"
    assert not passes(reach)
    with socket.create_connection(("127.0.0.1", port), 2):
        pass
    server.close()
    target = tmp_path / "written"
    assert not passes(f"open({str(target)!r}, 'w')") and not target.exists()
    assert not passes(f"import os; os.kill({os.getpid()}, 0)")
    assert passes("import os; assert not [n for n in os.environ if 'KEY' in n]")


def test_programs_are_tried_side_by_side():
    calls = [("", "import time\ntime.sleep(0.5)\nf = lambda: 1", {"tests": "assert f()"})] * 4
    began = time.monotonic()
    assert lm.CodeReward(20.0).score(calls) == [1.0] * 4
    assert time.monotonic() - began < 0.5 * 4 * 3


def test_code_is_a_reward_and_a_task(run, tiny_tokenizer, tmp_path):
    save_base(tmp_path / "base.pt", tiny_tokenizer, seq_len=512)
    rows = [{"prompt": f"f{i}?", "tests": "assert f() == 1"} for i in range(8)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = "--prompts 2 --group_size 2 --max_new_tokens 4 --max_steps 1 --eval_prompts 2"
    words = ["--reward", "code", "--data", tmp_path / "rows.jsonl", "--out_dir", tmp_path / "rl"]
    place = "--device cpu --threads 1 --dtype fp32 --compile 0".split()
    code, out, err = run(
        [
            "grpo",
            "--ckpt",
            tmp_path / "base.pt",
            *flags.split(),
            *words,
            *place[:-2],
            "--compile",
            0,
        ]
    )
    assert code == 0 and "rewards: code" in out, err
    (tmp_path / "human.jsonl").write_text(json.dumps(HUMAN_EVAL) + "\n")
    (tmp_path / "mbpp.jsonl").write_text(json.dumps(MBPP) + "\n")
    tasks = [f"{tmp_path}/human.jsonl", f"mbpp@1={tmp_path}/mbpp.jsonl,{tmp_path}/mbpp.jsonl"]
    words = ["--tasks", *tasks, "--out_dir", tmp_path / "eval", "--max_new_tokens", 8]
    code, out, err = run(["eval", "--ckpt", tmp_path / "base.pt", *place[:-2], *words])
    assert code == 0 and "read as humaneval" in out, err
    results = json.loads((tmp_path / "eval" / "results.json").read_text())["results"]
    assert [found["acc"] for found in results[str(tmp_path / "base.pt")].values()] == [0.0, 0.0]
