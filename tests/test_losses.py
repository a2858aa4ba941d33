"""Room Losses: tensors in, tensors out."""

import math

import pytest
import torch
import torch.nn.functional as F
from test_model import build

import standalone_transformer_lm as lm


def by_hand(hidden, weight, targets, z_loss=0.0):
    """-log softmax(h W')[t] + z log(Z)^2 of every position in float64; 0 where ignored."""
    losses = []
    for h, t in zip(hidden.double().flatten(0, 1), targets.flatten().tolist(), strict=True):
        scores = [float(h @ row) for row in weight.double()]
        top = max(scores)
        total = top + math.log(sum(math.exp(s - top) for s in scores))
        losses.append(0.0 if t == lm.IGNORE else total - scores[t] + z_loss * total**2)
    return torch.tensor(losses, dtype=torch.float64)


def token_losses(hidden, weight, targets, widths=None, **kwargs):
    """The program's, which notes in `widths` how many positions have their logits at a time."""

    def head(h):
        if widths is not None:
            widths.append(len(h))
        return F.linear(h, weight)

    return lm.token_losses(hidden, head, targets, **kwargs)


def some_case(scale=1.0, ignored=(2, 9, 10)):
    hidden, weight = torch.randn(3, 5, 8) * scale, torch.randn(11, 8)
    targets = torch.randint(0, 11, (3, 5))
    targets.view(-1)[list(ignored)] = lm.IGNORE
    return hidden, weight, targets


@pytest.mark.parametrize("scale", [0.0, 1.0, 100.0])
def test_token_losses_against_float64(scale):
    case = some_case(scale)
    losses = token_losses(*case)
    assert losses.shape == (15,) and losses.dtype == torch.float32
    assert torch.allclose(losses.double(), by_hand(*case), rtol=1e-5, atol=1e-5)
    assert losses[[2, 9, 10]].tolist() == [0, 0, 0]


def test_a_batch_of_ignored_targets_costs_nothing_and_is_no_nan():
    hidden, weight, targets = some_case()
    hidden.requires_grad_()
    loss = token_losses(hidden, weight, torch.full_like(targets, lm.IGNORE)).sum()
    loss.backward()
    assert loss.item() == 0 and torch.equal(hidden.grad, torch.zeros_like(hidden))


def test_an_ignored_position_gets_no_gradient():
    hidden, weight, targets = some_case()
    hidden.requires_grad_()
    token_losses(hidden, weight, targets).sum().backward()
    silent = (hidden.grad.flatten(0, 1) == 0).all(dim=1).nonzero().flatten()
    assert silent.tolist() == [2, 9, 10]


def test_gradients_are_softmax_minus_one_hot():
    hidden, weight, targets = some_case(ignored=())
    hidden.requires_grad_()
    token_losses(hidden, weight, targets).sum().backward()
    logits = hidden.detach().double() @ weight.double().T
    error = logits.softmax(-1) - F.one_hot(targets, 11)
    assert torch.allclose(hidden.grad.double(), error @ weight.double(), atol=1e-5)


def test_losses_are_fp32_whatever_the_matmul_is():
    hidden, weight, targets = some_case()
    with torch.autocast("cpu", torch.bfloat16):
        cast = token_losses(hidden, weight, targets)
    half = token_losses(hidden.bfloat16(), weight.bfloat16(), targets)
    want = by_hand(hidden, weight, targets)
    for losses in (cast, half):
        assert losses.dtype == torch.float32
        assert torch.allclose(losses.double(), want, rtol=0.02, atol=0.05)


class Elsewhere(torch.Tensor):
    """A tensor that calls itself a GPU's until it is split, as only there losses are chunked."""

    @property
    def device(self):
        return torch.device("cuda")

    def split(self, size, dim=0):
        return self.as_subclass(torch.Tensor).split(size, dim)


@pytest.mark.parametrize("z_loss", [0.0, 0.3])
@pytest.mark.parametrize("rows", [1, 4, 5, 14, 15, 16, 10**6])
def test_losses_in_parts_are_the_losses_whole(monkeypatch, rows, z_loss):
    hidden, weight, targets = some_case()
    monkeypatch.setattr(lm, "LOSS_ROWS", rows)
    widths = []
    found = []
    for kind in (torch.Tensor, Elsewhere):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        losses = token_losses(h.as_subclass(kind), w, targets, widths, z_loss=z_loss)
        losses = losses.as_subclass(torch.Tensor)
        (losses * torch.arange(15)).sum().backward()
        found.append((losses.detach(), h.grad, w.grad))
    for one, parts in zip(*found, strict=True):
        assert torch.allclose(one, parts, atol=1e-6)
    assert widths[0] == 12, "a CPU computes no logits for the three that are ignored"
    assert all(width <= rows for width in widths[1:])
    assert sum(widths[1:]) in (15, 30)  # 30 where the parts are made again in the backward pass


@pytest.mark.parametrize("z_loss", [1e-4, 0.5])
def test_z_loss_against_float64(z_loss):
    hidden, weight, targets = some_case()
    hidden.requires_grad_()
    losses = token_losses(hidden, weight, targets, z_loss=z_loss)
    want = by_hand(hidden.detach(), weight, targets, z_loss)
    assert torch.allclose(losses.double(), want, rtol=1e-5, atol=1e-5)
    assert losses[[2, 9, 10]].tolist() == [0, 0, 0]
    losses.sum().backward()  # d/ds of log Z is the softmax
    scores = hidden.detach().double() @ weight.double().T
    shares, kept = scores.softmax(-1), (targets != lm.IGNORE).unsqueeze(-1)
    hit = F.one_hot(targets.clamp(min=0), 11)
    error = shares - hit + 2 * z_loss * scores.logsumexp(-1, keepdim=True) * shares
    assert torch.allclose(hidden.grad.double(), error * kept @ weight.double(), atol=1e-5)


def test_z_loss_and_side_losses_are_in_training_and_not_in_evaluation():
    model = build(dry=True, n_expert=4)
    ids, targets = torch.randint(0, 61, (2, 16)), torch.randint(0, 61, (2, 16))
    targets[1, 4:] = lm.IGNORE
    logs = model(ids).detach().double()
    real = targets != lm.IGNORE
    plain = F.cross_entropy(logs[real], targets[real], reduction="sum").item()
    _, aux_loss = model.hidden_and_aux_loss(ids)
    z = logs[real].logsumexp(-1).square().sum().item()
    want = plain + 0.25 * z + 20 * aux_loss.item()  # a side loss weighs as much as a token's
    assert aux_loss.item() > 0.009 and z > 100  # an even balance loss is 0.01
    assert lm.pretrain_loss(model, ids, targets, 0.25).item() == pytest.approx(plain, rel=1e-5)
    model.train()
    assert lm.pretrain_loss(model, ids, targets, 0.25).item() == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize("tie", [True, False])
def test_pretrain_loss_is_the_sum_over_targets(tie):
    model = build(tie=tie)
    ids, targets = torch.randint(0, 61, (2, 16)), torch.randint(0, 61, (2, 16))
    targets[1, 4:] = lm.IGNORE
    loss = lm.pretrain_loss(model, ids, targets)
    logs = model(ids).double().log_softmax(-1)
    want = -sum(
        logs[b, t, targets[b, t]] for b in range(2) for t in range(16) if targets[b, t] != lm.IGNORE
    )
    assert loss.dim() == 0 and loss.item() == pytest.approx(want.item(), rel=1e-5)


def test_an_untrained_model_is_no_better_and_no_worse_than_chance():
    model = build(dry=True)
    ids = torch.randint(0, 61, (4, 17))
    loss = lm.pretrain_loss(model, ids[:, :-1], ids[:, 1:]) / 64
    assert loss.item() == pytest.approx(math.log(61), abs=0.05)


def test_objective_is_its_loss_and_shares_the_parameters():
    model = build()
    objective = lm.Objective(model, lm.pretrain_loss)
    ids = torch.randint(0, 61, (2, 16))
    assert torch.equal(objective(ids, ids), lm.pretrain_loss(model, ids, ids).view(1))
    assert {id(p) for p in objective.parameters()} == {id(p) for p in model.parameters()}
    assert not objective.eval().model.training
