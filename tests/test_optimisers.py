"""Room Optimisers: parameter groups, schedules, Muon and the average of the weights."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from test_model import build

import standalone_transformer_lm as lm

CPU = torch.device("cpu")
ONE = lm.Machine(CPU, torch.float32)
NAMES = ["cosine", "wsd", "wsd_sqrt", "constant", "inverse_sqrt"]
SCHEDULED = st.builds(
    lm.OptimSettings,
    schedule=st.sampled_from(NAMES),
    warmup_steps=st.integers(0, 120),
    decay_share=st.floats(0.01, 0.99),
    min_lr=st.floats(0, 1),
)


def formula(s, step, max_steps):
    """The documented course of the learning rate, in plain arithmetic."""
    if step < s.warmup_steps:
        return (step + 1) / s.warmup_steps
    left = (max_steps - step) / (max_steps - s.warmup_steps)  # 1 after the warm-up, 0 at the end
    if s.schedule == "cosine":  # (1 + cos(pi (1 - left))) / 2 = sin(pi left / 2)^2
        return s.min_lr + (1 - s.min_lr) * math.sin(math.pi * left / 2) ** 2
    if s.schedule == "wsd":
        return s.min_lr + (1 - s.min_lr) * min(1, (max_steps - step) / (s.decay_share * max_steps))
    if s.schedule == "wsd_sqrt":
        gone = max(0, 1 - (max_steps - step) / (s.decay_share * max_steps))
        return s.min_lr + (1 - s.min_lr) * (1 - gone**0.5)
    if s.schedule == "inverse_sqrt":  # 1 at the end of the warm-up, a half at four times that
        return (max(1, step) / max(1, s.warmup_steps)) ** -0.5
    return 1.0


@pytest.mark.parametrize("schedule", NAMES)
@pytest.mark.parametrize(("warmup", "steps"), [(0, 50), (1, 50), (10, 100), (7, 1000)])
def test_trace_equals_its_formula_from_step_0(schedule, warmup, steps):
    s = lm.OptimSettings(schedule=schedule, warmup_steps=warmup, min_lr=0.05, decay_share=0.3)
    trace = [lm.lr_scale(step, s, steps) for step in range(steps + 1)]
    assert trace == pytest.approx([formula(s, step, steps) for step in range(steps + 1)])


def test_known_points():
    s = lm.OptimSettings(warmup_steps=4, min_lr=0.1, schedule="cosine")
    assert [lm.lr_scale(k, s, 24) for k in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert lm.lr_scale(14, s, 24) == pytest.approx(0.55)  # half of the cosine
    s = lm.OptimSettings(schedule="wsd", warmup_steps=4, min_lr=0.0, decay_share=0.25)
    assert [lm.lr_scale(k, s, 16) for k in range(11, 16)] == [1.0, 1.0, 0.75, 0.5, 0.25]
    s = lm.OptimSettings(schedule="wsd_sqrt", warmup_steps=4, min_lr=0.1, decay_share=0.25)
    assert [lm.lr_scale(k, s, 16) for k in (4, 12, 13, 16)] == pytest.approx([1, 1, 0.55, 0.1])
    s = lm.OptimSettings(schedule="inverse_sqrt", warmup_steps=4)
    assert [lm.lr_scale(k, s, 90) for k in (3, 4, 16, 64)] == pytest.approx([1, 1, 0.5, 0.25])


@given(SCHEDULED, st.integers(1, 300))
def test_scale_is_bounded_and_the_first_step_learns(s, steps):
    trace = [lm.lr_scale(step, s, steps) for step in range(steps)]
    assert trace[0] > 0 and max(trace) <= 1 + 1e-12
    root = min(1.0, (max(1, s.warmup_steps) / steps) ** 0.5)
    floor = root if s.schedule == "inverse_sqrt" else s.min_lr
    assert min(trace[s.warmup_steps :], default=1) >= floor - 1e-12
    warm = trace[: s.warmup_steps]
    assert warm == sorted(warm)
    assert trace[s.warmup_steps :] == sorted(trace[s.warmup_steps :], reverse=True)


@given(SCHEDULED, st.integers(1, 300))
@example(lm.OptimSettings(schedule="wsd", warmup_steps=90, decay_share=0.2), 100)
@example(lm.OptimSettings(schedule="wsd_sqrt", warmup_steps=90, decay_share=0.2), 100)
def test_scale_never_jumps(s, steps):
    span = max(1, steps - s.warmup_steps)
    decay, warm = max(1e-9, min(span, s.decay_share * steps)), max(1, s.warmup_steps)
    height = 1.0 if s.schedule == "inverse_sqrt" else 1 - s.min_lr
    course = {
        "cosine": math.pi / 2 / span,
        "constant": 0.0,
        "wsd": 1 / decay,
        "wsd_sqrt": decay**-0.5,  # its steepest step is its first
        "inverse_sqrt": 1 - (warm / (warm + 1)) ** 0.5,
    }[s.schedule]
    bound = max(1 / warm, height * min(1.0, course)) + 1e-9
    trace = [lm.lr_scale(step, s, steps) for step in range(steps)]
    assert all(abs(b - a) <= bound for a, b in zip(trace, trace[1:], strict=False))


@given(SCHEDULED, st.integers(1, 300))
def test_the_end_reaches_the_minimum(s, steps):
    if s.schedule in ("constant", "inverse_sqrt") or s.warmup_steps >= steps:
        return
    assert lm.lr_scale(steps, s, steps) == pytest.approx(s.min_lr, abs=1e-9)
    assert lm.lr_scale(10 * steps, s, steps) == pytest.approx(s.min_lr, abs=1e-9)
    decay = (
        (steps - s.warmup_steps) / (math.pi / 2)
        if s.schedule == "cosine"
        else min(steps - s.warmup_steps, s.decay_share * steps)
    )
    last = lm.lr_scale(steps - 1, s, steps)
    assert last - s.min_lr <= (1 - s.min_lr) / max(1.0, decay) + 1e-9  # one step away at most


@pytest.mark.parametrize("schedule", ["wsd", "wsd_sqrt"])
def test_wsd_without_a_decay_stays_at_the_peak(schedule):
    s = lm.OptimSettings(schedule=schedule, decay_share=0.0, warmup_steps=2)
    assert [lm.lr_scale(step, s, 6) for step in range(6)] == [0.5, 1, 1, 1, 1, 1]


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_decay_is_on_matrices_alone(tie, optimizer):
    model = build(dry=True, tie=tie, qk_norm=True, n_sink=2)
    settings = lm.OptimSettings(weight_decay=0.3, optimizer=optimizer)
    made = lm.make_optimizers(model, settings, ONE)
    names = {id(weight): name for name, weight in model.named_parameters()}
    groups = [g for one in made for g in one.param_groups]
    decay = {names[id(p)]: g["weight_decay"] for g in groups for p in g["params"]}
    assert set(decay) == set(names.values()), "each parameter is in one group"
    assert sum(len(g["params"]) for g in groups) == len(names)
    for name, share in decay.items():
        spared = "norm" in name or "tok_emb" in name or name == "sinks"
        assert share == (0.0 if spared else 0.3), name
    assert ("lm_head.weight" in decay) != tie


@pytest.mark.parametrize(
    "changes", [{}, {"tie": False, "qk_norm": True, "n_sink": 2}, {"n_expert": 3}]
)
@pytest.mark.parametrize("wrapped", [True, False])
def test_muon_takes_the_matrices_of_the_layers_alone(changes, wrapped):
    model = build(dry=True, **changes)
    kinds = lm.split_parameters(lm.Objective(model, lm.pretrain_loss) if wrapped else model)
    names = {id(weight): name for name, weight in model.named_parameters()}
    kinds = {kind: {names[id(w)] for w in weights} for kind, weights in kinds.items()}
    parts = (
        "attn.proj.weight",
        "mlp.w1",
        "mlp.w2",
        "mlp.w3",
        "mlp.w1.weight",
        "mlp.w2.weight",
        "mlp.w3.weight",
    )
    assert kinds["qkv"] == {n for n in names.values() if n.endswith("attn.qkv.weight")}
    assert kinds["hidden"] == {n for n in names.values() if n.endswith(parts)}
    assert kinds["head"] == {
        n for n in names.values() if n.endswith(("lm_head.weight", "router.weight"))
    }
    assert sum(map(len, kinds.values())) == len(names)
    adamw, muon = lm.make_optimizers(model, lm.OptimSettings(optimizer="muon"), ONE)
    assert {names[id(p)] for g in muon.param_groups for p in g["params"]} == (
        kinds["qkv"] | kinds["hidden"]
    )
    assert [type(one) for one in (adamw, muon)] == [torch.optim.AdamW, lm.Muon]


def test_steps_equal_a_float64_adamw():
    model = build()
    s = lm.OptimSettings(
        lr=0.02,
        weight_decay=0.2,
        beta1=0.8,
        beta2=0.9,
        schedule="constant",
        warmup_steps=0,
        optimizer="adamw",
    )
    [optimizer], rates = lm.make_optimizers(model, s, ONE), [0.02, 0.01, 0.003]
    names = ["tok_emb.weight", "norm.weight", "blocks.0.attn.qkv.weight", "blocks.1.mlp.w3.weight"]
    weights = dict(model.named_parameters())
    want = {n: [weights[n].detach().double().clone(), 0.0, 0.0] for n in names}
    for t, lr in enumerate(rates, start=1):
        for group in optimizer.param_groups:
            group["peak"] = lr
        assert lm.set_step([optimizer], dataclasses.replace(s, lr=lr), t, 3) == lr
        for weight in weights.values():
            weight.grad = torch.randn_like(weight)
        for n in names:  # Loshchilov and Hutter 2019, algorithm 2
            p, m, v = want[n]
            g = weights[n].grad.double()
            m, v = 0.8 * m + 0.2 * g, 0.9 * v + 0.1 * g * g
            decay = 0.0 if "norm" in n or "emb" in n else 0.2
            update = (m / (1 - 0.8**t)) / ((v / (1 - 0.9**t)).sqrt() + 1e-8)
            want[n] = [p - lr * decay * p - lr * update, m, v]
        optimizer.step()
    for n in names:
        assert torch.allclose(weights[n].double(), want[n][0], atol=1e-6), n


@pytest.mark.parametrize(("muon_lr", "wanted"), [(0.0, 0.125), (0.4, 0.05)])
def test_set_step_reaches_every_group(muon_lr, wanted):
    s = lm.OptimSettings(lr=1.0, muon_lr=muon_lr, optimizer="muon", warmup_steps=8)
    made = lm.make_optimizers(build(tie=False), s, ONE)
    assert lm.set_step(made, s, 0, 100) == 0.125
    rates = [[g["lr"] for g in one.param_groups] for one in made]
    assert rates == [[0.125] * 3, [pytest.approx(wanted)] * 2]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_one_batch_can_be_learnt_by_heart(optimizer):
    model, ids = build(dry=True), torch.randint(0, 61, (2, 17))
    settings = lm.OptimSettings(lr=0.02, weight_decay=0.0, optimizer=optimizer)
    made = lm.make_optimizers(model, settings, ONE)
    for _ in range(60):
        loss = lm.pretrain_loss(model, ids[:, :-1], ids[:, 1:]) / 32
        for one in made:
            one.zero_grad()
        loss.backward()
        for one in made:
            one.step()
    assert loss.item() < 0.1


# --- Muon -----------------------------------------------------------------------------------------

BF16 = {"rtol": 0.0, "atol": 0.02}  # of directions near 1, after five products in eight bits
TORCHS = {"rms": "match_rms_adamw", "shape": "original"}


@pytest.fixture
def exact(monkeypatch):
    """A CPU without bf16, on which directions are computed in fp32."""
    monkeypatch.setattr(lm, "bf16_cpu", lambda: False)


def muon(groups, scale="rms", lr=0.1, weight_decay=0.2, momentum=0.9):
    return lm.Muon(groups, lr, weight_decay, momentum, scale, ONE)


def newton_schulz(g):
    """Five steps of the quintic 3.4445 x - 4.775 x^3 + 2.0315 x^5 on g's singular values."""
    u, values, v = np.linalg.svd(np.asarray(g, np.float64), full_matrices=False)
    values = values / np.sqrt((values**2).sum())
    for _ in range(5):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    return torch.from_numpy(u * values @ v)


@pytest.mark.parametrize("shape", [(12, 12), (6, 20), (20, 6), (1, 7), (7, 1)])
@pytest.mark.parametrize("size", [1e-6, 1.0, 1e6])
def test_orthogonalise_against_singular_values_in_float64(exact, shape, size):
    matrices = torch.randn(3, *shape) * size
    found = lm.orthogonalise(matrices)
    assert found.shape == matrices.shape and found.dtype == torch.float32
    for one, g in zip(found, matrices, strict=True):
        torch.testing.assert_close(one.double(), newton_schulz(g), rtol=0, atol=2e-4)


def test_orthogonalise_in_bf16_is_the_same_but_for_rounding(monkeypatch):
    matrices = torch.randn(2, 10, 24)
    monkeypatch.setattr(lm, "bf16_cpu", lambda: True)
    want = torch.stack([newton_schulz(g) for g in matrices])
    torch.testing.assert_close(lm.orthogonalise(matrices).double(), want, **BF16)
    assert not lm.orthogonalise(torch.zeros(1, 3, 4)).any(), "no gradient, no direction, no nan"


@pytest.mark.parametrize("scale", ["rms", "shape"])
@pytest.mark.parametrize("in_bf16", [True, False])
def test_muon_steps_equal_torchs(monkeypatch, scale, in_bf16):
    monkeypatch.setattr(lm, "bf16_cpu", lambda: in_bf16)
    shapes = [(24, 8), (8, 24), (24, 8), (16, 16)]
    mine = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    theirs = [torch.nn.Parameter(w.detach().clone()) for w in mine]
    ours = muon([{"params": mine}], scale)
    torchs = torch.optim.Muon(
        theirs, lr=0.1, weight_decay=0.2, momentum=0.9, adjust_lr_fn=TORCHS[scale]
    )
    for lr in (0.1, 0.05, 0.02):
        ours.param_groups[0]["lr"] = torchs.param_groups[0]["lr"] = lr
        for a, b in zip(mine, theirs, strict=True):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        ours.step()
        torchs.step()
    for a, b in zip(mine, theirs, strict=True):  # three steps of 0.17 in all, at most twofold
        torch.testing.assert_close(a, b, rtol=0, atol=2 * 0.17 * BF16["atol"])


@pytest.mark.parametrize(
    ("scale", "size"),
    [
        ("rms", lambda rows, columns: 0.2 * max(rows, columns) ** 0.5),
        ("shape", lambda rows, columns: max(1.0, rows / columns) ** 0.5),
    ],
)
def test_muon_against_float64(exact, scale, size):
    weights = [torch.nn.Parameter(torch.randn(shape)) for shape in ((24, 6), (6, 24), (8, 8))]
    optimizer = muon([{"params": weights}], scale)
    want = [(w.detach().double().clone(), 0.0) for w in weights]
    for momentum in (0.85, 0.9, 0.95):
        optimizer.param_groups[0]["momentum"] = momentum
        for i, w in enumerate(weights):
            w.grad = torch.randn_like(w)
            g, (p, average) = w.grad.double(), want[i]
            average = momentum * average + (1 - momentum) * g
            step = newton_schulz(momentum * average + (1 - momentum) * g)
            want[i] = p * (1 - 0.1 * 0.2) - 0.1 * size(*w.shape) * step, average
        optimizer.step()
    for w, (p, _) in zip(weights, want, strict=True):
        torch.testing.assert_close(w.double(), p, rtol=0, atol=1e-4)


def test_a_fused_projection_is_three_matrices_to_muon(exact):
    model = build(dry=True, n_kv_head=2, n_layer=1)  # rows: 32 of q, 16 of k, 16 of v
    made = lm.make_optimizers(model, lm.OptimSettings(optimizer="muon", lr=0.1), ONE)
    qkv = model.blocks[0].attn.qkv.weight
    apart = [torch.nn.Parameter(w.clone()) for w in qkv.detach().split((32, 16, 16))]
    alone = muon([{"params": apart}], "rms", 0.1, 0.1, 0.95)
    for _ in range(3):
        for weight in model.parameters():
            weight.grad = torch.randn_like(weight)
        for part, grad in zip(apart, qkv.grad.split((32, 16, 16)), strict=True):
            part.grad = grad.clone()
        made[1].step()
        alone.step()
    torch.testing.assert_close(qkv.detach(), torch.cat([w.detach() for w in apart]))


@pytest.mark.parametrize("scale", ["rms", "shape"])
def test_each_expert_is_a_matrix_to_muon_as_it_is_in_a_dense_layer(exact, scale):
    experts = [torch.nn.Parameter(torch.randn(3, *shape)) for shape in ((8, 20), (20, 8))]
    dense = [torch.nn.Parameter(e.mT.contiguous()) for w in experts for e in w.detach()]
    ours, theirs = muon([{"params": experts}], scale), muon([{"params": dense}], scale)
    for _ in range(2):  # an expert lies (in, out), a layer's matrix (out, in)
        for w in experts:
            w.grad = torch.randn_like(w)
        for one, g in zip(dense, [g for w in experts for g in w.grad], strict=True):
            one.grad = g.mT.contiguous()
        ours.step()
        theirs.step()
    for e, one in zip([e for w in experts for e in w.detach()], dense, strict=True):
        torch.testing.assert_close(e, one.detach().mT, rtol=1e-4, atol=1e-5)


def test_the_rms_scale_is_the_size_of_an_adamw_update(exact):
    for shape in ((64, 16), (16, 64), (32, 32)):
        weight = torch.nn.Parameter(torch.zeros(shape))
        weight.grad = torch.randn(shape)
        muon([{"params": [weight]}], "rms", lr=1.0).step()
        assert 0.13 < weight.square().mean().sqrt() < 0.24  # 0.2 but for Newton-Schulz's looseness


@pytest.mark.parametrize(
    ("warmup", "peak", "trace"),
    [
        (300, 0.95, {0: 0.85, 150: 0.9, 300: 0.95, 1000: 0.95}),
        (4, 0.89, {0: 0.85, 1: 0.86, 3: 0.88, 4: 0.89, 9: 0.89}),
        (0, 0.95, {0: 0.95, 1: 0.95}),
    ],
)
def test_momentum_warms_up(warmup, peak, trace):
    s = lm.OptimSettings(optimizer="muon", muon_warmup=warmup, muon_momentum=peak)
    made = lm.make_optimizers(build(dry=True), s, ONE)
    for step, momentum in trace.items():
        lm.set_step(made, s, step, 5000)
        assert [g["momentum"] for g in made[1].param_groups] == [pytest.approx(momentum)] * 2, step


def test_a_weight_without_a_gradient_is_left_alone():
    used, idle = (torch.nn.Parameter(torch.randn(4, 6)) for _ in range(2))
    before, used.grad = idle.detach().clone(), torch.randn(4, 6)
    muon([{"params": [used, idle]}]).step()
    assert torch.equal(idle, before)


# --- the average of the weights -------------------------------------------------------------------


def test_average_equals_its_formula_and_has_no_bias():
    weight = torch.nn.Linear(3, 2, bias=False)
    average, want = lm.EMA(weight, 0.6, None), weight.weight.detach().double().clone()
    for step in range(1, 30):
        with torch.no_grad():
            weight.weight.normal_()
        decay = min(0.6, step / (step + 9))  # 1/10, 2/11, ... as long as it is young
        want = decay * want + (1 - decay) * weight.weight.detach().double()
        average.update(step)
        torch.testing.assert_close(average.weights[0].double(), want, rtol=1e-5, atol=1e-6)


def test_average_stands_in_for_the_weights_and_leaves():
    model, ids = build(), torch.randint(0, 61, (2, 16))
    other = build(dry=True)
    average = lm.EMA(model, 0.9, [w.detach() for w in other.parameters()])
    live, kept = model(ids), [w.clone() for w in average.weights]
    with torch.no_grad(), average.in_place():
        assert torch.equal(model(ids), other(ids)) and not torch.equal(model(ids), live)
        assert model.lm_head.weight is model.tok_emb.weight
    assert torch.equal(model(ids), live)
    assert all(torch.equal(a, b) for a, b in zip(average.weights, kept, strict=True))
    with pytest.raises(ZeroDivisionError), average.in_place():
        raise ZeroDivisionError
    assert torch.equal(model(ids), live), "the weights come back after an error"


def test_average_starts_at_the_weights_or_where_it_was():
    model = build()
    fresh = lm.EMA(model, 0.9, None)
    assert all(
        torch.equal(a, w) and a.data_ptr() != w.data_ptr() and not a.requires_grad
        for a, w in zip(fresh.weights, model.parameters(), strict=True)
    )
    stored = [torch.randn_like(w) for w in model.parameters()]
    again = lm.EMA(model, 0.9, stored)
    assert all(
        torch.equal(a, w) and a.data_ptr() != w.data_ptr()
        for a, w in zip(again.weights, stored, strict=True)
    )
