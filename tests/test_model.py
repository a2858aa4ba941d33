"""Room Model: the transformer."""

import math
import os
import shutil

import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM

import standalone_transformer_lm as lm

SHAPES = {
    "mha": {},
    "gqa": {"n_kv_head": 2},
    "mqa": {"n_kv_head": 1},
    "head_dim": {"head_dim": 6},
    "head_dim_gqa": {"head_dim": 16, "n_kv_head": 2, "n_layer": 1},
    "untied": {"tie": False},
    "theta_eps": {"rope_theta": 500.0, "norm_eps": 1e-3},
    "ffn_hidden": {"ffn_hidden": 50},
    "ffn_mult": {"ffn_mult": 2.67},
}


def config(**changes):
    shape = {
        "seq_len": 16,
        "n_layer": 2,
        "d_model": 32,
        "n_head": 4,
        "ffn_mult": 2.0,
        "vocab_size": 61,
    }
    return lm.ModelSettings(**shape | changes)


def build(dry=False, **changes):
    """A tiny model in evaluation mode; unless `dry`, its weights are large enough to matter."""
    model = lm.Transformer(config(**changes)).eval()
    model.init_weights(7)
    with torch.no_grad():
        for weight in () if dry else model.parameters():
            weight.mul_(6) if weight.dim() > 1 else weight.copy_(torch.linspace(0.5, 1.5, 32))
    return model


def some_ids(rows=2, length=16, vocab_size=61):
    return torch.randint(0, vocab_size, (rows, length))


@pytest.fixture(params=SHAPES)
def shape(request):
    return SHAPES[request.param]


# --- attention and positions ----------------------------------------------------------------------


def test_a_future_token_changes_no_earlier_logit(shape):
    model, ids = build(**shape), some_ids(3)
    logits = model(ids)
    for place in (1, 7, 15):
        other = ids.clone()
        other[:, place] = (ids[:, place] + 1 + torch.arange(3)) % 61
        changed = (model(other) - logits).abs().amax(-1)
        assert changed[:, :place].max() <= 1e-5 < 1e-3 < changed[:, place:].max()


def test_an_earlier_token_reaches_every_later_logit():
    model, ids = build(), some_ids(1)
    other = ids.clone()
    other[0, 0] = (ids[0, 0] + 1) % 61
    assert (model(other) - model(ids)).abs().amax(-1).min() > 1e-5


def turned(x, place, theta=10000.0):
    """x (D) turned to a place by the program's own tables."""
    cos, sin = lm.rope_tables(config(head_dim=len(x), seq_len=64, rope_theta=theta))
    return lm.rotate(x.view(1, 1, 1, -1), cos[place : place + 1], sin[place : place + 1]).flatten()


def test_rope_against_complex_numbers():
    x = torch.randn(8)
    for place in (0, 1, 17, 63):
        for i in range(4):  # pair i is (x[i], x[i + 4]); its angle is place / theta^(2 i / D)
            z = complex(x[i], x[i + 4])
            z *= complex(math.cos(place * 50.0 ** (-i / 4)), math.sin(place * 50.0 ** (-i / 4)))
            found = turned(x, place, theta=50.0)
            assert (found[i].item(), found[i + 4].item()) == pytest.approx(
                (z.real, z.imag), abs=1e-5
            )


def test_rope_keeps_norms_and_depends_on_relative_position_only():
    q, k = torch.randn(16), torch.randn(16)
    for place in range(64):
        assert turned(q, place).norm().item() == pytest.approx(q.norm().item(), rel=1e-5)
    for apart in (0, 1, 5, 30):
        dots = [float(turned(q, m + apart) @ turned(k, m)) for m in range(0, 64 - apart, 3)]
        assert max(dots) - min(dots) < 1e-4
    near, far = turned(q, 3) @ turned(k, 2), turned(q, 30) @ turned(k, 2)
    assert abs(near - far) > 1e-2


def plainly(cos, sin):
    """The context of causal attention without a cache."""
    return lm.Context(cos, sin, None, None, {False: None})


def attention_by_hand(attn, x, cfg, keep=lambda q, k: k <= q):
    """Causal GQA with RoPE for x (T, d), one query at a time in float64 (Su 2021, Ainslie 2023)."""
    H, K, D, x = cfg.n_head, cfg.kv_heads, cfg.head_size, x.double()
    weight = attn.qkv.weight.double()
    rows = weight.split((H * D, K * D, K * D))
    q, k, v = ((x @ w.T).view(len(x), -1, D) for w in rows)

    def turn(vector, place):
        out = vector.clone()
        for i in range(D // 2):
            angle = place * cfg.rope_theta ** (-2 * i / D)
            a, b = vector[i], vector[i + D // 2]
            out[i] = a * math.cos(angle) - b * math.sin(angle)
            out[i + D // 2] = b * math.cos(angle) + a * math.sin(angle)
        return out

    outputs = torch.zeros(len(x), H, D, dtype=torch.float64)
    for t in range(len(x)):
        for h in range(H):
            g = h // (H // K)  # neighbouring query heads share a key head
            seen = [s for s in range(len(x)) if keep(t, s)]
            scores = [turn(q[t, h], t) @ turn(k[s, g], s) / math.sqrt(D) for s in seen]
            shares = torch.stack(scores).softmax(0)
            outputs[t, h] = sum(p * v[s, g] for p, s in zip(shares, seen, strict=True))
    return outputs.flatten(1) @ attn.proj.weight.double().T


@pytest.mark.parametrize("changes", [{}, {"n_kv_head": 2}, {"n_kv_head": 1, "head_dim": 6}])
def test_attention_against_float64_loops(changes):
    model = build(n_layer=1, **changes)
    x = torch.randn(1, 6, 32)
    found = model.blocks[0].attn(x, plainly(model.cos[:6], model.sin[:6]))
    want = attention_by_hand(model.blocks[0].attn, x[0], model.config)
    assert torch.allclose(found[0].double(), want, atol=1e-4)


def test_rms_norm_and_swiglu_against_their_formulas():
    model, x = build(norm_eps=0.01), torch.randn(5, 32)
    norm, mlp = model.blocks[0].norm1, model.blocks[0].mlp
    scale = (x.double().pow(2).mean(-1, keepdim=True) + 0.01).sqrt()
    assert torch.allclose(norm(x).double(), x / scale * norm.weight.double(), atol=1e-5)
    gate, up = x.double() @ mlp.w1.weight.double().T, x.double() @ mlp.w2.weight.double().T
    want = (gate / (1 + torch.exp(-gate)) * up) @ mlp.w3.weight.double().T
    assert torch.allclose(mlp(x).double(), want, atol=1e-4)


# --- parity with transformers ---------------------------------------------------------------------


def as_llama(model):
    """transformers' LLaMA with the same weights, mapped here by hand."""
    c = model.config
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=c.vocab_size,
            hidden_size=c.d_model,
            intermediate_size=c.ffn_width,
            num_hidden_layers=c.n_layer,
            num_attention_heads=c.n_head,
            head_dim=c.head_size,
            num_key_value_heads=c.kv_heads,
            rms_norm_eps=c.norm_eps,
            tie_word_embeddings=c.tie,
            rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta},
            max_position_embeddings=c.seq_len,
            attn_implementation="eager",
        )
    ).eval()
    state, mine = {}, model.state_dict()
    sizes = (c.n_head * c.head_size, c.kv_heads * c.head_size, c.kv_heads * c.head_size)
    for i in range(c.n_layer):
        to, at = f"model.layers.{i}.", f"blocks.{i}."
        for part, rows in zip("qkv", mine[at + "attn.qkv.weight"].split(sizes), strict=True):
            state[to + f"self_attn.{part}_proj.weight"] = rows
        state[to + "self_attn.o_proj.weight"] = mine[at + "attn.proj.weight"]
        for name, part in {"w1": "gate", "w2": "up", "w3": "down"}.items():
            state[to + f"mlp.{part}_proj.weight"] = mine[at + f"mlp.{name}.weight"]
        state[to + "input_layernorm.weight"] = mine[at + "norm1.weight"]
        state[to + "post_attention_layernorm.weight"] = mine[at + "norm2.weight"]
    state |= {
        "model.embed_tokens.weight": mine["tok_emb.weight"],
        "model.norm.weight": mine["norm.weight"],
        "lm_head.weight": mine["lm_head.weight"],
    }
    llama.load_state_dict(state)
    return llama


def test_logits_equal_transformers(shape):
    model, ids = build(**shape), some_ids()
    with torch.no_grad():
        mine, theirs = model(ids), as_llama(model)(input_ids=ids).logits
    assert theirs.std() > 0.3, "logits must vary for the comparison to say anything"
    assert (mine - theirs).abs().max() <= 1e-4


# --- parts, counts, init --------------------------------------------------------------------------


def test_state_dict_keys_and_shapes():
    shapes = {k: tuple(v.shape) for k, v in build(n_layer=1, n_kv_head=2).state_dict().items()}
    assert shapes == {
        "tok_emb.weight": (61, 32),
        "blocks.0.norm1.weight": (32,),
        "blocks.0.attn.qkv.weight": (64, 32),
        "blocks.0.attn.proj.weight": (32, 32),
        "blocks.0.norm2.weight": (32,),
        "blocks.0.mlp.w1.weight": (64, 32),
        "blocks.0.mlp.w2.weight": (64, 32),
        "blocks.0.mlp.w3.weight": (32, 64),
        "norm.weight": (32,),
        "lm_head.weight": (61, 32),
    }


def test_tied_head_is_one_tensor():
    tied, loose = build(), build(tie=False)
    assert tied.lm_head.weight is tied.tok_emb.weight
    assert loose.lm_head.weight.data_ptr() != loose.tok_emb.weight.data_ptr()
    assert not torch.equal(loose.lm_head.weight, loose.tok_emb.weight)
    tied.load_state_dict(build(dry=True).state_dict())
    assert tied.lm_head.weight is tied.tok_emb.weight


def test_parameter_counts(shape):
    c, counts = config(**shape), lm.parameter_counts(config(**shape))
    qkv = (c.n_head + 2 * c.kv_heads) * c.head_size * c.d_model
    block = qkv + c.n_head * c.head_size * c.d_model + 3 * c.d_model * c.ffn_width + 2 * c.d_model
    assert counts["blocks"] == c.n_layer * block + c.d_model
    assert counts["embedding"] == 61 * 32 and counts["head"] == (0 if c.tie else 61 * 32)
    assert counts["total"] == sum(p.numel() for p in build(**shape).parameters())
    assert counts["total"] == counts["blocks"] + counts["embedding"] + counts["head"]


@pytest.mark.parametrize(("preset", "millions"), [("138m", 138), ("350m", 435), ("700m", 880)])
def test_published_sizes(preset, millions):
    counts = lm.parameter_counts(lm.ModelSettings(vocab_size=32000, **lm.PRESETS[preset]))
    assert round(counts["total"] / 1e6) == millions


def test_flops_per_token(shape):
    c = config(**shape)
    matrices = sum(
        p.numel()
        for n, p in build(**shape).named_parameters()
        if "tok_emb" not in n and "lm_head" not in n
    )
    want = 6 * (matrices + 61 * 32) + 12 * c.n_layer * c.n_head * c.head_size * 16
    assert lm.flops_per_token(c) == want


def test_init_is_as_documented():
    model = lm.Transformer(config(d_model=256, n_layer=8, vocab_size=512, tie=False))
    model.init_weights(3)
    for name, weight in model.named_parameters():
        if "norm" in name:
            assert (weight == 1).all(), name
            continue
        residual = name.endswith(("attn.proj.weight", "mlp.w3.weight"))
        want = 0.02 / math.sqrt(2 * 8) if residual else 0.02
        assert weight.std().item() == pytest.approx(want, rel=0.03), name
        assert abs(weight.mean().item()) < want / 20, name
    first = {n: w.clone() for n, w in model.named_parameters()}
    model.init_weights(3)
    assert all(torch.equal(first[n], w) for n, w in model.named_parameters())
    model.init_weights(4)
    assert not torch.equal(first["tok_emb.weight"], model.tok_emb.weight)


# --- dropout --------------------------------------------------------------------------------------


def watch_attention(monkeypatch):
    """The dropout_p of every attention call to come."""
    shares, real = [], F.scaled_dot_product_attention

    def watched(*args, **kwargs):
        shares.append(kwargs["dropout_p"])
        return real(*args, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", watched)
    return shares


def test_dropout_reaches_attention_in_training_and_nothing_in_evaluation(monkeypatch):
    model, ids, shares = build(dropout=0.3), some_ids(), watch_attention(monkeypatch)
    plain = build()
    assert torch.equal(model(ids), plain(ids)) and shares == [0.0] * 4
    model.train()
    assert not torch.equal(model(ids), model(ids)) and shares[4:] == [0.3] * 4
    model.eval()
    assert torch.equal(model(ids), plain(ids))


def test_dropout_is_on_the_embedding_and_on_both_branches_of_a_layer():
    model, share = build(dropout=0.5).train(), []
    for part in model.modules():
        if isinstance(part, torch.nn.Dropout):
            part.register_forward_hook(lambda _m, _x, y: share.append((y == 0).float().mean()))
    model(some_ids(8))
    assert len(share) == 1 + 2 * 2 and all(0.4 < s < 0.6 for s in share)


def test_attention_alone_is_random_under_dropout():
    attn = build(dropout=0.5).blocks[0].attn.train()
    context = plainly(*lm.rope_tables(config(seq_len=8)))
    x = torch.randn(1, 8, 32)
    runs = torch.stack([attn(x, context) for _ in range(3000)])
    exact = attn.eval()(x, context)
    assert runs.std(0).min() > 0 and ((runs.mean(0) - exact).abs() < runs.std(0) / 8).all()


def test_no_dropout_is_no_dropout():
    model, ids = build(), some_ids()
    assert torch.equal(model.train()(ids), model.eval()(ids))


# --- training -------------------------------------------------------------------------------------


def test_gradients_reach_every_parameter(shape):
    model, ids = build(**shape).train(), some_ids(4)
    F.cross_entropy(model(ids).flatten(0, 1), some_ids(4).flatten()).backward()
    for name, weight in model.named_parameters():
        assert weight.grad is not None and weight.grad.abs().max() > 0, name
        assert weight.grad.isfinite().all(), name


@pytest.mark.parametrize("changes", [{}, {"n_kv_head": 2}])
def test_bf16_autocast(changes):
    model, ids = build(dry=True, **changes), some_ids()
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(ids)
        logits.float().logsumexp(-1).sum().backward()
    exact = model(ids)
    assert logits.dtype == torch.bfloat16 and logits.isfinite().all()
    assert (logits.float() - exact).abs().max() < 0.03 * exact.abs().max() + 0.01
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())


def test_compiled_equals_eager():
    """One small compile, the slowest test here: about 15 s where nothing is cached."""
    able = shutil.which(os.environ.get("CXX", "g++"))
    model, ids = build(n_layer=1, n_kv_head=2), some_ids()
    compiled = torch.compile(
        lm.Objective(model, lm.pretrain_loss),
        dynamic=False,
        backend="inductor" if able else "aot_eager",
    )
    losses, grads = [], []
    for run in (lm.Objective(model, lm.pretrain_loss), compiled):
        model.zero_grad()
        losses.append(run(ids, ids.roll(-1, 1)))
        losses[-1].backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-5)
    for one, other in zip(*grads, strict=True):
        assert torch.allclose(one, other, atol=1e-3, rtol=1e-3)
