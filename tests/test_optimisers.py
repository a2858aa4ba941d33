"""Room Optimisers: parameter groups and schedules."""

import math

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from test_model import build

import standalone_transformer_lm as lm

CPU = torch.device("cpu")
SCHEDULED = st.builds(
    lm.OptimSettings, schedule=st.sampled_from(["cosine", "wsd", "constant"]),
    warmup_steps=st.integers(0, 120), decay_share=st.floats(0.01, 0.99), min_lr=st.floats(0, 1))


def formula(s, step, max_steps):
    """The documented course of the learning rate, in plain arithmetic."""
    if step < s.warmup_steps:
        return (step + 1) / s.warmup_steps
    left = (max_steps - step) / (max_steps - s.warmup_steps)  # 1 after the warm-up, 0 at the end
    if s.schedule == "cosine":  # (1 + cos(pi (1 - left))) / 2 = sin(pi left / 2)^2
        return s.min_lr + (1 - s.min_lr) * math.sin(math.pi * left / 2) ** 2
    if s.schedule == "wsd":
        return s.min_lr + (1 - s.min_lr) * min(1, (max_steps - step) / (s.decay_share * max_steps))
    return 1.0


@pytest.mark.parametrize("schedule", ["cosine", "wsd", "constant"])
@pytest.mark.parametrize(("warmup", "steps"), [(0, 50), (1, 50), (10, 100), (7, 1000)])
def test_trace_equals_its_formula_from_step_0(schedule, warmup, steps):
    s = lm.OptimSettings(schedule=schedule, warmup_steps=warmup, min_lr=0.05, decay_share=0.3)
    trace = [lm.lr_scale(step, s, steps) for step in range(steps + 1)]
    assert trace == pytest.approx([formula(s, step, steps) for step in range(steps + 1)])


def test_known_points():
    s = lm.OptimSettings(warmup_steps=4, min_lr=0.1)
    assert [lm.lr_scale(k, s, 24) for k in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert lm.lr_scale(14, s, 24) == pytest.approx(0.55)  # half of the cosine
    s = lm.OptimSettings(schedule="wsd", warmup_steps=4, min_lr=0.0, decay_share=0.25)
    assert [lm.lr_scale(k, s, 16) for k in range(11, 16)] == [1.0, 1.0, 0.75, 0.5, 0.25]


@given(SCHEDULED, st.integers(1, 300))
def test_scale_is_bounded_and_the_first_step_learns(s, steps):
    trace = [lm.lr_scale(step, s, steps) for step in range(steps)]
    assert trace[0] > 0 and max(trace) <= 1 + 1e-12
    assert min(trace[s.warmup_steps:], default=1) >= s.min_lr - 1e-12
    warm = trace[:s.warmup_steps]
    assert warm == sorted(warm)
    assert trace[s.warmup_steps:] == sorted(trace[s.warmup_steps:], reverse=True)


@given(SCHEDULED, st.integers(1, 300))
@example(lm.OptimSettings(schedule="wsd", warmup_steps=90, decay_share=0.2), 100)
def test_scale_never_jumps(s, steps):
    span = max(1, steps - s.warmup_steps)
    course = {"cosine": math.pi / 2 / span, "constant": 0.0,
              "wsd": 1 / max(1e-9, min(span, s.decay_share * steps))}[s.schedule]
    bound = max(1 / max(1, s.warmup_steps), (1 - s.min_lr) * min(1.0, course)) + 1e-9
    trace = [lm.lr_scale(step, s, steps) for step in range(steps)]
    assert all(abs(b - a) <= bound for a, b in zip(trace, trace[1:], strict=False))


@given(SCHEDULED, st.integers(1, 300))
def test_the_end_reaches_the_minimum(s, steps):
    if s.schedule == "constant" or s.warmup_steps >= steps:
        return
    assert lm.lr_scale(steps, s, steps) == pytest.approx(s.min_lr, abs=1e-9)
    assert lm.lr_scale(10 * steps, s, steps) == pytest.approx(s.min_lr, abs=1e-9)
    decay = min(steps - s.warmup_steps, s.decay_share * steps) if s.schedule == "wsd" else (
        steps - s.warmup_steps) / (math.pi / 2)
    last = lm.lr_scale(steps - 1, s, steps)
    assert last - s.min_lr <= (1 - s.min_lr) / max(1.0, decay) + 1e-9  # one step away at most


def test_wsd_without_a_decay_stays_at_the_peak():
    s = lm.OptimSettings(schedule="wsd", decay_share=0.0, warmup_steps=2)
    assert [lm.lr_scale(step, s, 6) for step in range(6)] == [0.5, 1, 1, 1, 1, 1]


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("wrapped", [True, False])
def test_decay_is_on_matrices_alone(tie, wrapped):
    model = build(tie=tie)
    module = lm.Objective(model, lm.pretrain_loss) if wrapped else model
    optimizer = lm.make_optimizer(module, lm.OptimSettings(weight_decay=0.3), CPU)
    names = {id(weight): name for name, weight in model.named_parameters()}
    decay = {names[id(p)]: g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    assert set(decay) == set(names.values()), "each parameter is in one group"
    assert sum(len(g["params"]) for g in optimizer.param_groups) == len(names)
    for name, share in decay.items():
        assert share == (0.0 if "norm" in name or "tok_emb" in name else 0.3), name
    assert ("lm_head.weight" in decay) != tie


def test_steps_equal_a_float64_adamw():
    model = build()
    s = lm.OptimSettings(lr=0.02, weight_decay=0.2, beta1=0.8, beta2=0.9)
    optimizer, rates = lm.make_optimizer(model, s, CPU), [0.02, 0.01, 0.003]
    names = ["tok_emb.weight", "norm.weight", "blocks.0.attn.qkv.weight", "blocks.1.mlp.w3.weight"]
    weights = dict(model.named_parameters())
    want = {n: [weights[n].detach().double().clone(), 0.0, 0.0] for n in names}
    for t, lr in enumerate(rates, start=1):
        lm.set_lr(optimizer, lr)
        for weight in weights.values():
            weight.grad = torch.randn_like(weight)
        for n in names:  # Loshchilov and Hutter 2019, algorithm 2
            p, m, v = want[n]
            g = weights[n].grad.double()
            m, v = 0.8 * m + 0.2 * g, 0.9 * v + 0.1 * g * g
            decay = 0.0 if "norm" in n or "emb" in n else 0.2
            update = (m / (1 - 0.8 ** t)) / ((v / (1 - 0.9 ** t)).sqrt() + 1e-8)
            want[n] = [p - lr * decay * p - lr * update, m, v]
        optimizer.step()
    for n in names:
        assert torch.allclose(weights[n].double(), want[n][0], atol=1e-6), n


def test_set_lr_reaches_every_group():
    optimizer = lm.make_optimizer(build(), lm.OptimSettings(lr=1.0), CPU)
    lm.set_lr(optimizer, 0.125)
    assert [g["lr"] for g in optimizer.param_groups] == [0.125, 0.125]


def test_one_batch_can_be_learnt_by_heart():
    model, ids = build(dry=True), torch.randint(0, 61, (2, 17))
    optimizer = lm.make_optimizer(model, lm.OptimSettings(lr=0.02, weight_decay=0.0), CPU)
    for _ in range(60):
        loss = lm.pretrain_loss(model, ids[:, :-1], ids[:, 1:]) / 32
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1
