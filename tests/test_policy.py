"""The arithmetic of `grpo`: objectives, advantages and whole steps against float64 from papers."""

import copy
import math
import statistics
import zlib
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from conftest import log_rows, read_pt
from test_lora import answer, question, save_base, write_rows
from test_model import build
from test_rollouts import EVERY, SMALL, sums

import standalone_transformer_lm as lm

CLIPS = {
    "grpo": (0.2, 0.2),
    "dr_grpo": (0.2, 0.2),
    "dapo": (0.2, 0.28),
    "gspo": (3e-4, 4e-4),
    "cispo": (1.0, 4.0),
    "ppo": (0.2, 0.2),
    "vapo": (0.2, 0.28),
}
BY_VALUE = ("ppo", "vapo")
GRPO = """--prompts 4 --group_size 3 --max_new_tokens 12 --batch_size 5 --temperature 0.8
--reward exact --eval_prompts 2 --max_steps 2 --value_warmup 0 --dtype fp32 --device cpu
--threads 1 --compile 0 --warmup_steps 10""".split()
# What the ratios of a case's tokens are; gspo's are a sequence's, with tokens far to either side.
RATIOS = (0.62, 1.9, 0.83, 1.24, 1.0, 1.17, 6.5, 0.77)
SEQUENCE_RATIOS = (1.002, 0.9995, 0.9994, 1.0006, 1.00035, 1.00045, 0.99965, 0.99975)


@pytest.fixture(scope="module")
def base(tiny_tokenizer, tmp_path_factory):
    """The model that the runs start from, which ends an answer now and then; read only."""
    path = save_base(tmp_path_factory.mktemp("base") / "base.pt", tiny_tokenizer)
    saved = read_pt(path)
    emb = saved["model"]["tok_emb.weight"].add_(0.05)
    emb[lm.Tokenizer(tiny_tokenizer).eos].add_(0.3)
    lm.save_checkpoint(path, saved)
    return path


@dataclass
class Answer:
    """A completion of a prompt: its ids, and in float64 what is known of each token (n,)."""

    prompt: list
    ids: list
    advantages: torch.Tensor
    right: bool = False
    old: torch.Tensor | None = None
    reference: torch.Tensor | None = None


def own_logps(model, one, temperature):
    """Log-probabilities of an answer's tokens and entropies (n,), alone and without padding."""
    logits = model(torch.tensor([one.prompt + one.ids[:-1]]))[0, len(one.prompt) - 1 :].double()
    logps = (logits / temperature).log_softmax(-1)
    return logps[torch.arange(len(one.ids)), one.ids], -(logps.exp() * logps).sum(-1)


def clipped(ratio, advantage, low, high):
    """min(r A, g(A)): Schulman et al. 2017, eq. 7, with g as OpenAI's Spinning Up has it."""
    return torch.minimum(ratio * advantage, advantage * (1 + high if advantage > 0 else 1 - low))


def gains(name, logps, one):
    """What each token of an answer adds to the objective, before it is normalised (n,)."""
    low, high = CLIPS[name]
    ratios = (logps - one.old).exp()
    if name == "cispo":  # MiniMax 2025, eq. 4 and 5: sg(clip(r)) A log pi, with no lower bound
        return ratios.detach().clamp(max=1 + high) * one.advantages * logps
    if name == "gspo":  # Zheng et al. 2025, eq. 5 and 7
        ratio = (logps.exp().prod() / one.old.exp().prod()) ** (1 / len(one.ids))
        return clipped(ratio, one.advantages[0], low, high).expand(len(one.ids))
    pairs = zip(ratios, one.advantages, strict=True)
    return torch.stack([clipped(ratio, advantage, low, high) for ratio, advantage in pairs])


def paper_loss(name, model, answers, temperature, most, kl=0.0, bonus=0.0):
    """The loss of a whole step, to be minimised, in float64 with a gradient.

    Shao et al. 2024 (DeepSeekMath), eq. 3 and 4; Liu et al. 2025 (Dr. GRPO), section 3.2, with the
    most tokens of an answer as its constant; Yu et al. 2025 (DAPO), eq. 8; Yue et al. 2025 (VAPO),
    with 0.1 times the mean log-loss of right answers' tokens.
    """
    objective, tokens = 0.0, sum(len(one.ids) for one in answers)
    right_tokens = sum(len(one.ids) for one in answers if one.right)
    for one in answers:
        logps, entropy = own_logps(model, one, temperature)
        each = gains(name, logps, one)
        if kl:
            ratio = (one.reference - logps).exp()
            each = each - kl * (ratio - ratio.log() - 1)
        if name in ("grpo", "gspo"):
            objective = objective + each.mean() / len(answers)
        else:
            objective = objective + each.sum() / (
                len(answers) * most if name == "dr_grpo" else tokens
            )
        # The bonus is the mean entropy of all tokens, however the loss itself is normalised.
        objective = objective + bonus * entropy.sum() / tokens
        if name == "vapo" and one.right:
            objective = objective + 0.1 * logps.sum() / right_tokens
    return -objective


def gradients(loss, model):
    return torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad])


def assert_same(found, wanted, within=1e-5):
    """Gradients agree to a share of the largest entry of all."""
    largest = max(grad.abs().max() for grad in wanted)
    assert largest > 1e-4
    for one, want in zip(found, wanted, strict=True):
        assert (one - want).abs().max() <= within * largest


def some_answers(name, model, temperature):
    """Answers of many lengths, whose ratios leave the bounds of `name` on both sides."""
    answers = []
    for i, length in enumerate((1, 5, 8, 2, 8, 3, 6, 7)):
        advantages = torch.full((length,), (-1) ** (i // 2) * (0.3 + 0.2 * i), dtype=torch.float64)
        if name in BY_VALUE:
            advantages = torch.randn(length, dtype=torch.float64)
        one = Answer(
            torch.randint(3, 61, (1 + i % 3,)).tolist(),
            torch.randint(3, 61, (length,)).tolist(),
            advantages,
            right=i % 3 == 0,
        )
        ratios = torch.tensor((RATIOS[i:] + RATIOS[:i])[:length], dtype=torch.float64)
        if name == "gspo":
            ratios = ratios / ratios.prod() ** (1 / length) * SEQUENCE_RATIOS[i]
        with torch.no_grad():
            logps, _ = own_logps(model, one, temperature)
        one.old = (logps - ratios.log()).float().double()
        one.reference = (logps + 0.7 * torch.randn(length)).float().double()
        answers.append(one)
    return answers


def micro_batch(answers, length, weights, scalars):
    """What policy_loss takes beside model and settings, in rows of `length`."""
    ids, targets = (
        torch.zeros(len(answers), length).long(),
        torch.full((len(answers), length), lm.IGNORE),
    )
    old, advantages, reference = (torch.zeros(len(answers), length) for _ in range(3))
    importance = torch.ones(len(answers), length)
    for row, one in enumerate(answers):
        whole, start = one.prompt + one.ids, len(one.prompt) - 1
        ids[row, : len(whole) - 1] = torch.tensor(whole[:-1])
        place = slice(start, start + len(one.ids))
        targets[row, place] = torch.tensor(one.ids)
        advantages[row, place] = one.advantages.float()
        old[row, place] = 0.0 if one.old is None else one.old.float()
        reference[row, place] = 0.0 if one.reference is None else one.reference.float()
    unmoved = float(answers[0].old is None)
    scalars = torch.tensor([*scalars, unmoved]).expand(len(answers), 3)
    return ids, targets, old, advantages, reference, importance, weights, scalars


METRICS = len(lm.POLICY_METRICS)  # behind them stand the log-probabilities


def program_metrics(name, model, answers, temperature, most, kl=0.0, bonus=0.0):
    """POLICY_METRICS of a step in three micro-batches of other widths, the loss divided by rows."""
    settings = lm.PolicySettings(
        kl=kl,
        entropy_target=float(bonus > 0),
        **{
            key: value
            for key, value in lm.ALGORITHMS[name].items()
            if key in lm.PolicySettings.__dataclass_fields__
        },
    )
    lengths = torch.tensor([float(len(one.ids)) for one in answers])
    tokens, right = lengths.sum(), torch.tensor([float(one.right) for one in answers])
    each = lm.row_weights(lengths, settings.normalise, len(answers), tokens.item(), most)
    plain = settings.lm_loss * right * len(answers) / (lengths * right).sum().clamp(min=1)
    mean = torch.full_like(each, len(answers) / tokens.item())
    weights, found = torch.stack((each, plain, mean), 1), []
    for begin, end, length in ((0, 3, 11), (3, 4, 4), (4, len(answers), 16)):
        micro = micro_batch(answers[begin:end], length, weights[begin:end], (temperature, bonus))
        found.append(lm.policy_loss(model, *micro, settings=settings)[:METRICS])
    found = torch.stack(found)
    ends = found[:, -2].max(), found[:, -1].min()
    loss, *sums = found[:, :-2].sum(0)
    return dict(zip(lm.POLICY_METRICS, (loss / len(answers), *sums, *ends), strict=True))


@pytest.mark.parametrize("name", lm.ALGORITHMS)
@pytest.mark.parametrize("kl, bonus, temperature", [(0.0, 0.0, 1.0), (0.3, 0.2, 0.7)])
def test_objectives_and_their_gradients_against_the_papers(name, kl, bonus, temperature):
    model = build()
    answers = some_answers(name, model, temperature)
    found = program_metrics(name, model, answers, temperature, 10, kl, bonus)
    wanted = paper_loss(name, model, answers, temperature, 10, kl, bonus)
    assert found["loss"].item() == pytest.approx(wanted.item(), rel=1e-4)
    assert_same(gradients(found["loss"], model), gradients(wanted, model), 2e-5)


@pytest.mark.parametrize("name", lm.ALGORITHMS)
def test_policy_metrics_are_sums_over_tokens_and_extremes(name):
    model, (low, high) = build(), CLIPS[name]
    answers = some_answers(name, model, 0.7)
    with torch.no_grad():
        found = program_metrics(name, model, answers, 0.7, 10)
        kl, entropies, lows, highs, ratios = 0.0, 0.0, 0, 0, []
        for one in answers:
            logps, entropy = own_logps(model, one, 0.7)
            ratio = (logps - one.old).exp()
            if name == "gspo":
                ratio = ratio.prod() ** (1 / len(ratio)) * torch.ones(len(ratio))
            apart = one.reference - logps
            kl, entropies = kl + (apart.exp() - apart - 1).sum(), entropies + entropy.sum()
            lows += ((ratio < 1 - low) & (one.advantages < 0)).sum().item()
            highs += ((ratio > 1 + high) & (one.advantages > 0)).sum().item()
            ratios += ratio.tolist()
    assert highs and (lows or name == "cispo")  # the case leaves the bounds on both sides
    assert (found["clip_low"], found["clip_high"]) == (lows, highs)
    assert found["entropy"].item() == pytest.approx(entropies.item(), rel=1e-5)
    assert found["ratio_most"].item() == pytest.approx(max(ratios), rel=1e-5)
    assert found["ratio_least"].item() == pytest.approx(min(ratios), rel=1e-5)
    assert program_metrics(name, model, answers, 0.7, 10, kl=0.1)["kl"].item() == pytest.approx(
        kl.item(), rel=1e-4
    )


@pytest.mark.parametrize("name", ["grpo", "dapo", "gspo"])
def test_a_clipped_answer_moves_nothing_and_the_other_side_does(name):
    model = build()
    for ratio, sign in ((2.0, 1), (0.5, -1), (2.0, -1), (0.5, 1)):
        one = Answer([5, 9], [7, 11, 4], sign * torch.ones(3).double())
        with torch.no_grad():
            one.old = own_logps(model, one, 1.0)[0] - math.log(ratio)
        loss = program_metrics(name, model, [one] * 5, 1.0, 10)["loss"]
        largest = max(grad.abs().max() for grad in gradients(loss, model))
        held = (ratio > 1) == (sign > 0)
        assert largest == 0 if held else largest > 1e-3


def test_the_weight_of_cispo_is_bounded_and_still_moves_the_policy():
    model, found = build(), []
    for ratio in (5.0, 50.0):
        one = Answer([5, 9], [7, 11, 4], torch.ones(3).double())
        with torch.no_grad():
            one.old = own_logps(model, one, 1.0)[0] - math.log(ratio)
        found.append(gradients(program_metrics("cispo", model, [one] * 5, 1.0, 10)["loss"], model))
    assert_same(*found)


def test_an_unlikely_token_without_a_reference_is_no_nan():
    model = build(tie=False)
    with torch.no_grad():
        model.lm_head.weight.mul_(50)
    one = Answer([5, 9], [7, 11, 4], torch.ones(3).double())
    assert own_logps(model, one, 1.0)[0].min() < -100
    loss = program_metrics("grpo", model, [one] * 5, 1.0, 10)["loss"]
    assert loss.isfinite() and all(grad.isfinite().all() for grad in gradients(loss, model))


@pytest.mark.parametrize("ratio", ["token", "sequence", "weight"])
@pytest.mark.parametrize("rubbish", [(9.0, -9.0, 9.0), (-9.0, 9.0, -9.0), (math.nan, 1.0, 0.0)])
def test_padding_and_prompts_have_no_say(ratio, rubbish):
    model, settings = build(), lm.PolicySettings(ratio=ratio, kl=0.1, entropy_target=1.0)
    answers = some_answers("grpo", model, 1.0)
    micro = micro_batch(answers, 16, torch.rand(len(answers), 3), (1.0, 0.2))
    silent = micro[1] == lm.IGNORE
    other = [
        torch.where(silent, x, numbers) for x, numbers in zip(rubbish, micro[2:5], strict=True)
    ]
    for a, b in zip(
        lm.policy_loss(model, *micro, settings=settings),
        lm.policy_loss(model, *micro[:2], *other, *micro[5:], settings=settings),
        strict=True,
    ):
        assert torch.equal(a, b)


# ---- The first update ----


@pytest.mark.parametrize("name", lm.ALGORITHMS)
def test_the_first_update_is_reinforce_with_a_baseline(name):
    model = build()
    answers = some_answers(name, model, 0.8)
    for one in answers:
        one.old = None
    found = program_metrics(name, model, answers, 0.8, 10)
    assert found["ratio_most"] == found["ratio_least"] == 1.0
    assert found["clip_low"] == found["clip_high"] == 0
    wanted, tokens = 0.0, sum(len(one.ids) for one in answers)
    right = sum(len(one.ids) for one in answers if one.right)
    for one in answers:  # Williams 1992: the gradient is that of -A log pi
        n, logps = len(one.ids), own_logps(model, one, 0.8)[0]
        shares = {"grpo": 1 / n / 8, "gspo": 1 / n / 8, "dr_grpo": 1 / 10 / 8}
        a = one.advantages.mean() if name == "gspo" else one.advantages
        wanted = wanted - (shares.get(name, 1 / tokens) * a * logps).sum()
        wanted = wanted - (0.1 * logps.sum() / right if name == "vapo" and one.right else 0)
    assert_same(gradients(found["loss"], model), gradients(wanted, model))


# ---- Advantages ----


def test_group_advantages_against_the_papers_and_trl():
    groups = [[1.0, 0.0, 0.0, 1.0], [0.2, 0.9, -3.0, 4.0], [5.0, 5.0, 5.0, 5.0]]
    rewards = torch.tensor(groups, dtype=torch.float64)
    for group, scaled, plain in zip(
        groups,
        lm.group_advantages(rewards, True).tolist(),
        lm.group_advantages(rewards, False).tolist(),
        strict=True,
    ):
        mean, spread = statistics.mean(group), statistics.stdev(group)  # unbiased, as TRL's
        assert plain == pytest.approx([reward - mean for reward in group])
        assert scaled == pytest.approx([(reward - mean) / (spread + 1e-4) for reward in group])
    assert lm.group_advantages(rewards, True)[2].tolist() == [0, 0, 0, 0]


def some_values(rows=4, longest=9):
    """Rewards and values (B, N), the mask of answers of many lengths; rubbish behind their ends."""
    lengths = torch.tensor([9, 1, 4, 6])
    mask = torch.arange(longest) < lengths.unsqueeze(1)
    rewards, values = torch.randn(2, rows, longest, dtype=torch.float64).unbind()
    return rewards.masked_fill(~mask, 7), values.masked_fill(~mask, -5), mask, lengths.tolist()


def discounted(rewards, values, lam, gamma=1.0):
    """The generalised advantages of an answer's tokens (Schulman et al. 2016, eq. 16)."""
    after = [*values[1:], 0.0]
    surprises = [r + gamma * b - a for r, a, b in zip(rewards, values, after, strict=True)]
    return [
        sum((gamma * lam) ** (k - t) * surprises[k] for k in range(t, len(values)))
        for t in range(len(values))
    ]


def gains_in_value(values, smoothing, gamma=1.0):
    """Dense rewards of an answer's tokens, potentials being smoothed values."""
    smooth = values[:1]
    for value in values[1:]:
        smooth.append(smoothing * smooth[-1] + (1 - smoothing) * value)
    return [gamma * b - a for a, b in zip(smooth, [*smooth[1:], 0.0], strict=True)]


@pytest.mark.parametrize("gamma, lams", [(1.0, [1.0] * 4), (0.9, [0.0, 0.5, 0.95, 1.0])])
def test_generalised_advantages_are_a_double_sum(gamma, lams):
    rewards, values, mask, lengths = some_values()
    found = lm.gae(rewards, values, mask, gamma, torch.tensor(lams, dtype=torch.float64))
    for row, (n, lam) in enumerate(zip(lengths, lams, strict=True)):
        want = discounted(rewards[row, :n].tolist(), values[row, :n].tolist(), lam, gamma)
        assert found[row].tolist() == pytest.approx(want + [0.0] * (9 - n))


def test_with_lambda_1_the_advantage_is_what_came_less_what_was_thought():
    rewards, values, mask, lengths = some_values()
    found = lm.gae(rewards, values, mask, 1.0, torch.ones(4).double())
    for row, n in enumerate(lengths):
        ahead = [sum(rewards[row, t:n].tolist()) for t in range(n)]
        assert (found + values)[row, :n].tolist() == pytest.approx(ahead)


def test_lambda_grows_with_length():
    lengths = torch.tensor([1.0, 20.0, 40.0, 200.0, 4000.0], dtype=torch.float64)
    assert lm.length_adaptive(lengths, 0.05).tolist() == pytest.approx([0, 0, 0.5, 0.9, 0.995])


@pytest.mark.parametrize("gamma, smoothing", [(1.0, 0.5), (0.9, 0.8), (1.0, 0.0)])
def test_dense_rewards_are_gains_of_smoothed_value(gamma, smoothing):
    _, values, mask, lengths = some_values()
    found = lm.dense_rewards(values, mask, gamma, smoothing)
    for row, n in enumerate(lengths):
        want = gains_in_value(values[row, :n].tolist(), smoothing, gamma)
        assert found[row].tolist() == pytest.approx(want + [0.0] * (9 - n))
        told = sum(gamma**t * paid for t, paid in enumerate(found[row].tolist()))
        assert told == pytest.approx(-values[row, 0].item())  # whatever the answer says


@pytest.mark.parametrize(
    "length, most, share, want",
    [
        (1, 100, 0.2, 0),
        (80, 100, 0.2, 0),
        (85, 100, 0.2, -0.25),
        (100, 100, 0.2, -1),
        (16385, 20480, 0.2, -1 / 4096),
        (18432, 20480, 0.2, -0.5),
        (8, 8, 0.01, -1),
        (7, 8, 0.01, 0),
    ],
)
def test_overlong_penalty(length, most, share, want):
    assert lm.overlong_penalty(torch.tensor([float(length)]), most, share).item() == pytest.approx(
        want
    )


# ---- Values ----


@pytest.mark.parametrize("clip", [0.0, 0.2])
def test_value_loss_against_float64(clip):
    critic = build(scalar_head=True)
    with torch.no_grad():
        critic.score.weight.normal_(std=0.3)
    ids, targets = torch.randint(3, 61, (3, 12)), torch.full((3, 12), lm.IGNORE)
    for row, (begin, end) in enumerate(((2, 12), (0, 1), (4, 9))):
        targets[row, begin:end] = 1
    values = torch.stack([critic.score(critic.hidden(row[None]))[0, :, 0] for row in ids])
    moved = torch.tensor([-0.5, 0.1, 0.5, -0.1, 0.3]).repeat(8)[:36].view(3, 12)
    old = values.detach() - moved
    returns = values.detach() + torch.tensor([0.6, -0.7, 0.05, 1.5, -0.4, -0.2, 0.9]).repeat(6)[
        :36
    ].view(3, 12)
    wanted, held = 0.0, 0
    for row, t in (targets != lm.IGNORE).nonzero().tolist():
        value, before, told = values[row, t].double(), old[row, t].item(), returns[row, t].item()
        error, bounded = (value - told) ** 2 / 2, value
        if clip and abs(value.item() - before) > clip:
            bounded = torch.tensor(before + math.copysign(clip, value.item() - before))
        far = (bounded - told) ** 2 / 2
        held += far.item() > error.item() and bounded is not value
        wanted = wanted + (far if far > error else error)
    loss, count = lm.value_loss(critic, ids, targets, old, returns, clip=clip)
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-5)
    assert count.item() == held and held < 16 and (held > 0) == (clip > 0)
    assert_same(gradients(loss, critic), gradients(wanted, critic))


# ---- Whole steps ----


def worth(prompt, completion, row):
    """A reward that spreads a group."""
    return zlib.crc32(completion.encode()) % 101 / 100


class Watch:
    """What a run draws, and its models with their gradients as each update finds them."""

    def __init__(self, monkeypatch):
        self.events = []
        draw, update = lm.Sampler.draw, lm.Trainer.update

        def drawn(sampler, *args, **kwargs):
            groups = draw(sampler, *args, **kwargs)
            self.events.append([one for group in groups for one in group])
            return groups

        def updated(trainer, model, optimizers):
            self.events.append(copy.deepcopy(model))
            self.events[-1].found = [p.grad.clone() for p in model.parameters()]
            return update(trainer, model, optimizers)

        monkeypatch.setattr(lm.Sampler, "draw", drawn)
        monkeypatch.setattr(lm.Trainer, "update", updated)

    def last_step(self):
        """The completions of the last step, and the models that its updates found."""
        drawn = [i for i, event in enumerate(self.events) if isinstance(event, list)]
        models = [i for i, event in enumerate(self.events) if not isinstance(event, list)]
        begin = max(i for i in drawn if i < models[-1])
        return self.events[begin], self.events[begin + 1 : models[-1] + 1]


@pytest.fixture
def grpo(run, base, tmp_path, monkeypatch):
    """`grpo(*flags)` runs to its end and gives (what it drew and updated, rows of its log)."""

    def call(*flags):
        watch = Watch(monkeypatch)
        monkeypatch.setitem(lm.REWARDS, "exact", worth)
        rows = [{"prompt": question(i), "answer": answer(i)} for i in range(24)]
        code, _, err = run(
            [
                "grpo",
                *GRPO,
                "--ckpt",
                base,
                "--out_dir",
                tmp_path / "run",
                "--data",
                write_rows(tmp_path / "rows.jsonl", rows),
                *flags,
            ]
        )
        assert code == 0, err
        return watch, [row for row in log_rows(tmp_path / "run") if "train/loss" in row]

    return call


def paid(name, one):
    """An answer's reward, by DAPO less what it is too long (eq. 13)."""
    over = max(0.0, len(one.ids) - 0.8 * 12) / (0.2 * 12) if name == "dapo" else 0.0
    return worth("", one.text, {}) - over


def own_values(critic, one):
    """What a critic expects before each token of a completion (n,), alone and without padding."""
    whole = one.problem.ids.tolist() + one.ids.tolist()
    hidden = critic.hidden(torch.tensor([whole[:-1]]))[0, -len(one.ids) :]
    return (hidden @ critic.score.weight[0]).double()


def advantages_of(name, rows, critic):
    """Advantages of each answer's tokens [(n,)], by groups of three or by a critic's values."""
    if name not in BY_VALUE:
        found = []
        for i in range(0, len(rows), 3):
            rewards = [paid(name, one) for one in rows[i : i + 3]]
            mean, spread = statistics.mean(rewards), statistics.stdev(rewards) + 1e-4
            found += [(r - mean) / (1 if name == "dr_grpo" else spread) for r in rewards]
        return [torch.full((len(one.ids),), a).double() for one, a in zip(rows, found, strict=True)]
    found = []
    for one in rows:
        values = own_values(critic, one).tolist()
        lam = 0.95 if name == "ppo" else max(0.0, 1 - 1 / (0.05 * len(values)))
        rewards = [0.0] * (len(values) - 1) + [worth("", one.text, {})]
        found.append(discounted(rewards, values, lam))
    every = [a for row in found for a in row]
    mean, spread = statistics.mean(every), statistics.pstdev(every) + 1e-4
    return [torch.tensor([(a - mean) / spread for a in row]).double() for row in found]


@pytest.mark.parametrize("name", lm.ALGORITHMS)
def test_a_step_with_two_updates_is_the_papers_from_rewards_to_gradients(grpo, base, name):
    watch, log = grpo(
        "--algo", name, "--updates", 2, "--kl", 0.2, "--entropy_target", 9, "--lr", 3e-3
    )
    drawn, models = watch.last_step()
    critic, (first, second) = models[0], models[-2:]
    start = lm.build_model(lm.load_checkpoint(base), torch.device("cpu"))
    advantages = advantages_of(name, drawn, critic)
    answers = [
        Answer(one.problem.ids.tolist(), one.ids.tolist(), each, worth("", one.text, {}) > 0.5)
        for one, each in zip(drawn, advantages, strict=True)
    ]
    assert len(answers) == 12 and len({len(one.ids) for one in answers}) > 1
    with torch.no_grad():
        for one in answers:
            one.reference, one.old = (own_logps(m, one, 0.8)[0] for m in (start, first))
        news = torch.cat([own_logps(second, one, 0.8)[0] - one.old for one in answers]).exp()
    assert news.max() > 1.05 and news.min() < 0.95
    wanted = [paper_loss(name, m, answers, 0.8, 12, kl=0.2, bonus=0.005) for m in (first, second)]
    for model, loss in zip((first, second), wanted, strict=True):
        assert_same(model.found, gradients(loss, model), 3e-5)
    assert log[-1]["train/loss"] == pytest.approx(sum(wanted).item() / 2, rel=1e-3)
    assert log[-1]["train/entropy_bonus"] == pytest.approx(0.01)
    if name != "gspo":
        assert log[-1]["train/ratio_most"] == pytest.approx(news.max().item(), rel=1e-4)


@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "vapo"])
def test_a_run_with_one_update_has_ratio_1_and_the_gradient_of_reinforce(grpo, name):
    watch, log = grpo("--algo", name)
    drawn, models = watch.last_step()
    assert (
        [row["train/ratio_most"] for row in log]
        == [row["train/ratio_least"] for row in log]
        == [1, 1]
    )
    model, loss = models[-1], 0.0
    right = sum(len(one.ids) for one in drawn if worth("", one.text, {}) > 0.5)
    for one, each in zip(drawn, advantages_of(name, drawn, models[0]), strict=True):
        logps, _ = own_logps(model, Answer(one.problem.ids.tolist(), one.ids.tolist(), each), 0.8)
        counts = {"grpo": len(each), "dr_grpo": 12}.get(name, sum(len(o.ids) for o in drawn) / 12)
        loss = loss - (each * logps).sum() / counts / 12
        if name == "vapo" and worth("", one.text, {}) > 0.5:
            loss = loss - 0.1 * logps.sum() / right
    assert_same(model.found, gradients(loss, model))


@pytest.mark.parametrize("name, lam", [("ppo", 0.95), ("vapo", 1.0)])
def test_the_value_model_learns_returns_by_its_own_lambda(grpo, name, lam):
    watch, log = grpo(
        "--algo",
        name,
        "--updates",
        2,
        "--value_lr",
        0.05,
        "--value_clip",
        0.02,
        "--dense_reward",
        0.5,
        "--dense_smoothing",
        0.7,
    )
    drawn, (first, second, *_) = watch.last_step()
    losses, held, truth, error = [0.0, 0.0], 0, [], []
    for one in drawn:
        old, new = own_values(first, one), own_values(second, one)
        before = old.tolist()
        rewards = [0.5 * gain for gain in gains_in_value(before, 0.7)]
        rewards[-1] += worth("", one.text, {})
        ahead = torch.tensor(discounted(rewards, before, lam)).double() + old.detach()
        far = (new.detach() - old.detach()).abs() > 0.02
        bounded = torch.where(far, old.detach() + 0.02 * (new - old).detach().sign(), new)
        worse = (bounded - ahead).abs() > (new - ahead).abs()
        losses[0] += (old - ahead).square().sum() / 2
        losses[1] += torch.where(worse, bounded - ahead, new - ahead).square().sum() / 2
        held += worse.sum().item()
        truth, error = truth + ahead.tolist(), error + (ahead - old).tolist()
    for critic, loss in zip((first, second), losses, strict=True):
        assert_same(critic.found, gradients(loss / len(truth), critic), 3e-5)
    row = log[-1]
    assert held and row["train/value_clipped"] == pytest.approx(held / len(truth))
    assert row["train/value_loss"] == pytest.approx(losses[1].item() / len(truth), rel=1e-4)
    assert row["train/value_explained"] == pytest.approx(
        1 - statistics.pvariance(error) / statistics.pvariance(truth), abs=1e-4
    )


# ---- Several optimizer steps on a batch, and what corrects them ----


def answers_of(rows, advantages):
    """The completions of a run as answers, right by the reward of these tests."""
    return [
        Answer(one.problem.ids.tolist(), one.ids.tolist(), each, worth("", one.text, {}) > 0.5)
        for one, each in zip(rows, advantages, strict=True)
    ]


@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "dapo", "gspo", "cispo", "ppo"])
def test_minibatches_are_the_papers_with_ratios_to_the_rollout(grpo, name):
    lr = 3e-5 if name == "gspo" else 3e-3  # its bounds are narrow
    flags = ["--minibatches", 2, "--updates", 2, "--lr", lr, "--seed", 5]
    watch, log = grpo("--algo", name, *flags)
    drawn, models = watch.last_step()
    critic, policies = models[0], models[-4:]
    assert len(models) == (8 if name == "ppo" else 4)
    answers = answers_of(drawn, advantages_of(name, drawn, critic))
    with torch.no_grad():
        for one in answers:
            one.old = own_logps(policies[0], one, 0.8)[0]
    assert len(answers) == 12
    losses = []
    for i, model in enumerate(policies):
        part = answers[:6] if i % 2 == 0 else answers[6:]  # two of the four prompts
        losses.append(paper_loss(name, model, part, 0.8, 12))
        assert_same(model.found, gradients(losses[-1], model), 3e-5)
    assert log[-1]["train/loss"] == pytest.approx(sum(losses).item() / 4, rel=1e-3, abs=1e-6)
    assert log[-1]["train/ratio_most"] > 1 > log[-1]["train/ratio_least"]


def test_the_entropy_of_minibatches_is_that_of_all_tokens(grpo):
    """Two halves of equal rows, measured before any of them moved the policy by much."""
    watch, log = grpo("--minibatches", 2, "--lr", 1e-9)
    drawn, (first, _) = watch.last_step()
    answers = answers_of(drawn, advantages_of("grpo", drawn, first))
    means = []
    for part in (answers[:6], answers[6:]):
        each = torch.cat([own_logps(first, one, 0.8)[1] for one in part])
        means.append(each.mean().item())
    assert log[-1]["train/entropy"] == pytest.approx(sum(means) / 2, rel=1e-5)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ["grpo", "gspo"])
def test_the_ratio_of_an_unmoved_policy_is_1_in_every_update(grpo, name, dtype):
    flags = ["--updates", 2, "--minibatches", 2, "--lr", 1e-30, "--warmup_steps", 0]
    _, log = grpo("--algo", name, *flags, "--dtype", dtype)
    for row in log:
        assert row["train/ratio_most"] == row["train/ratio_least"] == 1
        assert row["train/clip_low"] == row["train/clip_high"] == 0


@pytest.mark.slow
def test_compiled_the_ratio_of_an_unmoved_policy_is_1_too(grpo):
    if not lm.can_compile(torch.device("cpu")):
        pytest.skip("there is no C++ compiler")
    _, log = grpo("--updates", 2, "--lr", 1e-30, "--compile", 1, "--dtype", "bf16")
    for row in log:
        assert row["train/ratio_most"] == row["train/ratio_least"] == 1


def strayed(monkeypatch):
    """The sampler's log-probs are off by what this gives for a token (n,), in either direction."""
    generate = lm.Sampler.generate

    def wrong(sampler, *args):
        found, logps = generate(sampler, *args)
        return found, [
            [value + shift for value, shift in zip(row, shifts(len(row)).tolist(), strict=True)]
            for row in logps
        ]

    monkeypatch.setattr(lm.Sampler, "generate", wrong)

    def shifts(length):
        return torch.linspace(-0.5, 0.4, length + 1)[1:]

    return shifts


@pytest.mark.parametrize("cap", [1.2, 5.0])
def test_truncated_importance_sampling_against_its_formula(grpo, monkeypatch, cap):
    shifts = strayed(monkeypatch)
    watch, log = grpo("--tis_cap", cap)
    drawn, models = watch.last_step()
    model, loss, apart = models[-1], 0.0, []
    for one in answers_of(drawn, advantages_of("grpo", drawn, None)):
        shift = shifts(len(one.ids)).double()
        weights = (-shift).exp().clamp(max=cap)  # trainer's over sampler's probability
        logps = own_logps(model, one, 0.8)[0]
        loss = loss - (weights * one.advantages * logps).mean() / len(drawn)
        apart += shift.abs().tolist()
    assert_same(model.found, gradients(loss, model), 3e-5)
    assert log[-1]["train/sampler_gap"] == pytest.approx(statistics.mean(apart), abs=1e-4)
    assert log[-1]["train/sampler_gap_most"] == pytest.approx(max(apart), abs=1e-4)


@pytest.mark.parametrize("flags", [[], ["--updates", 2]])
def test_the_gap_to_the_sampler_is_told_whatever_the_updates(grpo, flags):
    _, log = grpo(*flags)
    for row in log:
        assert 0 <= row["train/sampler_gap"] <= row["train/sampler_gap_most"] < 1e-4


@pytest.mark.parametrize("ratio, sign, moves", [(9.0, -1, False), (2.0, -1, True), (0.9, 1, True)])
def test_the_dual_clip_bounds_the_loss_of_a_negative_advantage(ratio, sign, moves):
    """Ye et al. 2020, eq. 5: max(min(r A, clip(r) A), c A) where A < 0."""
    model = build()
    one = Answer([5, 9], [7, 11, 4], sign * torch.ones(3).double())
    with torch.no_grad():
        one.old = own_logps(model, one, 1.0)[0] - math.log(ratio)
    micro = micro_batch([one], 8, torch.tensor([[1 / 3, 0.0, 0.0]]), (1.0, 0.0))
    loss = lm.policy_loss(model, *micro, settings=lm.PolicySettings(clip_dual=3.0))[0]
    assert loss.item() == pytest.approx(min(ratio, 3.0) if sign < 0 else -ratio, rel=1e-4)
    assert (max(grad.abs().max() for grad in gradients(loss, model)) > 1e-3) == moves


@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "vapo"])
def test_divergence_in_the_reward_is_taken_from_it_token_by_token(grpo, base, name):
    flags = ["--kl", 0.3, "--kl_in_reward", 1, "--lr", 1e-2, "--max_steps", 3]
    watch, log = grpo("--algo", name, *flags)
    drawn, models = watch.last_step()
    critic, model = models[0], models[-1]
    start = lm.build_model(lm.load_checkpoint(base), torch.device("cpu"))
    penalties, zeros = [], [torch.zeros(len(one.ids)) for one in drawn]
    for one in answers_of(drawn, zeros):
        with torch.no_grad():
            now, reference = (own_logps(m, one, 0.8)[0] for m in (model, start))
        penalties.append(0.3 * (reference - now))
    assert max(abs(p.sum().item()) for p in penalties) > 0.05
    if name == "vapo":
        found = []
        for one, penalty in zip(drawn, penalties, strict=True):
            rewards = penalty.tolist()
            rewards[-1] += worth("", one.text, {})
            lam = max(0.0, 1 - 1 / (0.05 * len(rewards)))
            found.append(discounted(rewards, own_values(critic, one).tolist(), lam))
        every = [a for row in found for a in row]
        mean, spread = statistics.mean(every), statistics.pstdev(every) + 1e-4
        advantages = [torch.tensor([(a - mean) / spread for a in row]).double() for row in found]
    else:
        totals = []
        for one, penalty in zip(drawn, penalties, strict=True):
            totals.append(worth("", one.text, {}) + penalty.sum().item())
        advantages = []
        for i, one in enumerate(drawn):
            group = totals[i // 3 * 3 :][:3]
            spread = 1 if name == "dr_grpo" else statistics.stdev(group) + 1e-4
            a = (totals[i] - statistics.mean(group)) / spread
            advantages.append(torch.full((len(one.ids),), a).double())
    answers = answers_of(drawn, advantages)
    with torch.no_grad():
        for one in answers:
            one.old = own_logps(model, one, 0.8)[0]
    assert_same(model.found, gradients(paper_loss(name, model, answers, 0.8, 12), model), 1e-4)
    assert "train/kl" in log[-1]


@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "dapo"])
def test_truncated_completions_have_no_loss_with_mask_truncated(grpo, name):
    """As TRL masks them: their rows count in a mean over rows, their tokens nowhere."""
    short = ["--max_new_tokens", 3]
    watch, log = grpo("--algo", name, "--mask_truncated", 1, "--overlong", 0, *short)
    drawn, models = watch.last_step()
    plain = "grpo" if name == "dapo" else name  # without the penalty of length
    pairs = list(zip(drawn, advantages_of(plain, drawn, None), strict=True))
    kept = [len(one.ids) for one in drawn if one.ended]
    assert 0 < len(kept) < len(drawn)
    model, loss = models[-1], 0.0
    for one, each in pairs:
        if not one.ended:
            continue
        share = {"grpo": len(one.ids) * 12, "dr_grpo": 3 * 12, "dapo": sum(kept)}[name]
        logps = own_logps(model, Answer(one.problem.ids.tolist(), one.ids.tolist(), each), 0.8)[0]
        loss = loss - (each * logps).sum() / share
    assert_same(model.found, gradients(loss, model), 3e-5)
    assert log[-1]["train/truncated"] == pytest.approx(1 - len(kept) / 12)


def test_a_policy_far_away_is_no_overflow():
    model = build()
    one = Answer([5, 9], [7, 11, 4], -torch.ones(3).double())
    one.old = torch.full((3,), -500.0).double()
    one.reference = torch.full((3,), -500.0).double()
    micro = micro_batch([one], 8, torch.tensor([[1 / 3, 0.0, 0.0]]), (1.0, 0.0))
    loss = lm.policy_loss(model, *micro, settings=lm.PolicySettings(kl=0.1))[0]
    assert loss.isfinite() and all(grad.isfinite().all() for grad in gradients(loss, model))


def test_padding_has_no_part_in_the_loss_of_the_experts():
    model = build(n_expert=4, n_expert_active=2).train()
    ids, targets = torch.randint(3, 61, (2, 12)), torch.randint(3, 61, (2, 12))
    targets[0, :3] = lm.IGNORE  # a prompt counts
    targets[0, 7:] = lm.IGNORE
    other = ids.clone()
    other[0, 7:] = 0
    losses = [lm.hidden_and_aux_loss(model, x, targets)[1].item() for x in (ids, other)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6) and losses[0] > 0
    alone = lm.hidden_and_aux_loss(model, ids[:1, :7], targets[:1, :7])[1].item()
    assert lm.hidden_and_aux_loss(model, ids[:1], targets[:1])[1].item() == pytest.approx(alone)


def test_with_fp32_head_logits_are_fp32_in_sampling_and_training(grpo):
    model = build()
    ids = torch.randint(3, 61, (2, 9))
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        hidden = model.hidden(ids)
        assert model.logits(hidden).dtype == torch.bfloat16
        model.fp32_head = True
        assert model.logits(hidden).dtype == torch.float32
        want = hidden.double() @ model.lm_head.weight.double().T
    assert torch.allclose(model.logits(hidden).double(), want, atol=1e-5)
    watch, log = grpo("--fp32_head", 1, "--dtype", "bf16")
    assert watch.last_step()[1][-1].fp32_head and log[-1]["train/ratio_most"] == 1


# ---- The curriculum ----


class Numbered(lm.Stream):
    """A stream of numbers."""

    def __init__(self, count, seed=3):
        self.count = self.tokens = count
        self.seed = seed
        self.rows = list(range(count))


def test_solved_problems_are_left_out_and_come_back():
    stream = Numbered(10)
    one = lm.Curriculum(stream, 2, False, 0)
    drawn = []
    for step in range(60):
        places = one.choose(5, 5 * step)
        drawn.append(set(places.tolist()))
        assert len(drawn[-1]) == 5
        right = np.array([1.0 if place in (0, 1, 2) else 0.5 for place in places])
        one.learn(places, right, 5 * step + 5)
    solved = [sum(place in step for step in drawn) for place in (0, 1, 2)]
    others = [sum(place in step for step in drawn) for place in range(3, 10)]
    assert max(solved) <= 7 and min(solved) >= 4, "twice, then after 1, 2, 4, 8 … passes"
    assert min(others) > 35 and max(others) - min(others) <= 8
    assert 0 < one.left_out(300) < 0.31
    again = lm.Curriculum(stream, 2, False, 0)
    again.restore(one.state())
    assert again.choose(5, 300).tolist() == one.choose(5, 300).tolist()


def test_a_problem_that_is_failed_again_is_back_at_once():
    one = lm.Curriculum(Numbered(4), 1, False, 0)
    one.learn(np.array([2]), np.array([1.0]), 0)
    assert one.due[2] == 4 and one.left_out(0) == 0.25
    one.learn(np.array([2]), np.array([0.75]), 8)
    assert one.streak[2] == 0 and one.due[2] <= 8


def test_where_all_are_solved_those_that_come_back_first_are_drawn():
    one = lm.Curriculum(Numbered(4), 1, False, 0)
    for number, place in enumerate((3, 1, 0, 2)):
        one.learn(np.array([place]), np.array([1.0]), number)
    assert one.choose(3, 4).tolist() == [3, 1, 0]
    assert one.choose(6, 4).tolist() == [3, 1, 0, 2, 3, 1]


def test_informative_problems_come_more_often():
    one = lm.Curriculum(Numbered(30), 0, True, 0)
    counts = np.zeros(30)
    for step in range(400):
        places = one.choose(3, 3 * step)
        counts[places] += 1
        one.learn(places, np.where(places < 10, 0.5, np.where(places < 20, 0.0, 1.0)), 3 * step)
    informative, failed, solved = counts.reshape(3, 10).mean(1)
    assert informative > 5 * failed > 0 and informative > 5 * solved > 0


def test_mixtures_have_places_of_their_own():
    parts = [Numbered(6), Numbered(3)]
    for part in parts:
        part.collate = part.targets = None
    mixed = lm.Mixture(parts, [0.5, 0.5])
    numbers = np.arange(200)
    places = mixed.places(numbers)
    assert set(places.tolist()) == set(range(9))
    wanted = [place if place < 6 else place - 6 for place in places]
    assert mixed.samples(numbers) == mixed.items(places) == wanted


@pytest.mark.parametrize("flags", [["--skip_solved", 1], ["--skip_solved", 1, "--curriculum", 1]])
def test_a_run_with_a_curriculum_goes_on_to_the_same_bytes(run, base, tmp_path, flags):
    rows = write_rows(tmp_path / "rows.jsonl", sums())
    argv = ["grpo", *SMALL, "--ckpt", base, "--data", rows, *EVERY, *flags, "--lr", 1e-3]
    argv += ["--max_steps", 6, "--eval_interval", 3, "--out_dir"]
    assert run([*argv, tmp_path / "a"])[0] == 0
    assert run([*argv, tmp_path / "b", "--max_steps", 3])[0] == 0
    assert run([*argv, tmp_path / "b"])[0] == 0
    first, second = (read_pt(tmp_path / name / "ckpt_last.pt") for name in "ab")
    for name, weight in first["model"].items():
        assert torch.equal(weight, second["model"][name]), name
    assert all(torch.equal(v, second["curriculum"][k]) for k, v in first["curriculum"].items())
    rows = log_rows(tmp_path / "a")
    assert max(row.get("train/left_out", 0) for row in rows) > 0
