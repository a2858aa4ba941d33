"""Every architecture option, through everything a model does: the table of issue-sized promises.

Each option is held to: causal, trains every weight, cached = uncached, ragged batch = alone, past
the context, recomputed gradients, compiled = eager, saved and loaded, and a float64 attention
with the mask written out. Export is in test_convert.py.
"""

import dataclasses
import math

import pytest
import torch

import standalone_transformer_lm as lm

BASE = {"seq_len": 32, "n_layer": 3, "d_model": 32, "n_head": 4, "ffn_mult": 2, "vocab_size": 61}
OPTIONS = {
    "plain": {},
    "gqa": {"n_kv_head": 2},
    "mqa": {"n_kv_head": 1},
    "head_dim": {"head_dim": 16},
    "qk_norm": {"qk_norm": True},
    "nope_every": {"nope_every": 2},
    "window": {"window": 5},
    "full_every": {"window": 5, "full_every": 3},
    "n_sink": {"n_sink": 3},
    "n_sink+window": {"n_sink": 2, "window": 6},
    "n_expert": {"n_expert": 4},
    "untied": {"tie": False},
    "softcap": {"softcap": 5.0},
    "embed_scale": {"embed_scale": True, "trunc_init": True},
    "rope linear": {"rope_scaling": "linear", "rope_factor": 2.0},
    "rope yarn": {"rope_scaling": "yarn", "rope_factor": 4.0},
    "doc_mask": {"doc_mask": True},
    "doc_mask+n_sink+window": {"doc_mask": True, "n_sink": 2, "window": 7},
    "everything": {
        "n_kv_head": 2,
        "qk_norm": True,
        "nope_every": 2,
        "window": 6,
        "full_every": 3,
        "n_sink": 2,
        "n_expert": 4,
        "tie": False,
        "embed_scale": True,
        "trunc_init": True,
        "softcap": 20.0,
    },
}
GREEDY = lm.SamplingSettings(max_new_tokens=10, temperature=0)
PROMPTS = [[1, 5, 6, 7], [1] + [8] * 15, [1, 2, 3, 4, 5, 6, 7, 8, 9], [1, 5, 6, 7]]


@pytest.fixture(params=OPTIONS, ids=lambda name: name.replace(" ", "_"))
def model(request):
    """A small model with one option on, its weights large enough that the option matters."""
    config = lm.ModelSettings(**{**BASE, **OPTIONS[request.param]})
    assert not lm.check(config)
    network = lm.Transformer(config)
    network.init_weights(1)
    for weight in network.parameters():
        if weight.dim() > 1:
            weight.data *= 4
    return network.eval()


def texts(rows=2, length=30):
    """Random ids, each row two documents."""
    ids = torch.randint(2, 61, (rows, length))
    ids[:, 0] = ids[0, 13] = ids[1, 8] = 1
    return ids


def test_presets_are_all_buildable_and_count_what_the_readme_says():
    for name, values in lm.PRESETS.items():
        known = {f.name for f in dataclasses.fields(lm.ModelSettings)}
        config = lm.ModelSettings(
            **{"vocab_size": 32000, **{k: v for k, v in values.items() if k in known}}
        )
        assert not lm.check(config), name
        d, width, D = config.d_model, config.ffn_width, config.head_size
        layer = d * D * (config.n_head + 2 * config.kv_heads) + d * D * config.n_head
        layer += 3 * d * width + 2 * d + (2 * D if config.qk_norm else 0)
        ends = config.vocab_size * d * (1 if config.tie else 2)
        total = ends + config.n_layer * layer + d + config.n_sink * d
        assert lm.parameter_counts(config)["total"] == total, name


def test_a_future_token_changes_no_earlier_logit(model):
    ids = texts()
    other = ids.clone()
    other[:, 20] = (other[:, 20] + 1) % 59 + 2
    with torch.no_grad():
        a, b = model(ids), model(other)
    torch.testing.assert_close(a[:, :20], b[:, :20], rtol=0, atol=1e-5)
    assert (a[:, 20:] - b[:, 20:]).abs().max() > 1e-3


def test_every_weight_learns_and_the_loss_falls(model):
    model.init_weights(2)
    model.train()
    ids, first = texts(4), None
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(15):
        loss = lm.pretrain_loss(model, ids[:, :-1], ids[:, 1:]) / ids[:, 1:].numel()
        optimizer.zero_grad()
        loss.backward()
        first = first or loss.item()
        assert all(w.grad is not None and w.grad.abs().sum() > 0 for w in model.parameters())
        optimizer.step()
    assert loss.item() < 0.8 * first


def test_cached_equals_uncached(model):
    ids = texts()
    ids[:, 1:][ids[:, 1:] == 1] = 2  # one document: a cache is of one
    cache = lm.KVCache(model.config, 2, model.device, torch.float32)
    with torch.no_grad():
        steps = [model(ids[:, :10], cache)]
        steps += [model(ids[:, i : i + 1], cache) for i in range(10, 30)]
        torch.testing.assert_close(torch.cat(steps, 1), model(ids), rtol=1e-4, atol=1e-4)


def test_ragged_batch_equals_alone_equals_uncached(model):
    together = lm.complete(model, PROMPTS, GREEDY, 0)
    assert together == [lm.complete(model, [p], GREEDY, 0)[0] for p in PROMPTS]
    for prompt, new in zip(PROMPTS, together, strict=True):
        ids = list(prompt)
        with torch.no_grad():
            for _ in range(GREEDY.max_new_tokens):
                ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
        assert ids[len(prompt) :] == new


def test_generation_goes_on_past_the_context(model):
    settings = lm.SamplingSettings(max_new_tokens=80, temperature=0)
    [ids] = lm.complete(model, PROMPTS[:1], settings, 0)
    assert len(ids) == 80


def test_recomputing_layers_changes_no_gradient(model):
    model.train()
    gradients = []
    ids = texts()
    for recomputed in (False, True):
        model.grad_checkpoint = recomputed
        model.zero_grad()
        lm.pretrain_loss(model, ids[:, :-1], ids[:, 1:]).backward()
        gradients.append([w.grad.clone() for w in model.parameters()])
    for plain, again in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, again, rtol=1e-4, atol=1e-4)


def test_saved_and_loaded_model_is_the_same(model, tmp_path):
    lm.save_checkpoint(
        tmp_path / "c.pt", {"model": model.state_dict(), "config": dataclasses.asdict(model.config)}
    )
    loaded = lm.build_model(lm.load_checkpoint(tmp_path / "c.pt"), torch.device("cpu"))
    ids = texts()
    with torch.no_grad():
        assert torch.equal(loaded(ids), model(ids))


def visible(config, ids, layer):
    """(T, T) of one row: what each place sees, written out from the definition."""
    sinks, T = config.n_sink, config.n_sink + len(ids)
    document, seen, count = [None] * sinks, [], 0
    for token in ids:
        count += token == config.bos_id
        document.append(count)
    for i in range(T):
        row = []
        for j in range(T):
            near = j <= i
            if config.windowed(layer):
                near = near and i - j < config.window
            if config.doc_mask:
                near = near and document[i] == document[j]
            row.append(near or (j < sinks and j <= i))
        seen.append(row)
    return torch.tensor(seen)


@pytest.mark.parametrize(
    "name", ["window", "full_every", "n_sink+window", "doc_mask", "doc_mask+n_sink+window"]
)
def test_masks_equal_the_definition_written_out(name):
    """The dense mask, and flex_attention's, against a float64 softmax over loops."""
    config = lm.ModelSettings(**{**BASE, **OPTIONS[name]})
    model, ids = lm.Transformer(config), texts()
    length = config.n_sink + ids.shape[1]
    documents = model.documents(ids)[0] if config.doc_mask else None
    places = torch.arange(length).unsqueeze(0)
    attention_mask = lm.AttentionMask(places, places, documents, config.n_sink)
    q, k, v = (torch.randn(2, 4, length, 8, dtype=torch.float64) for _ in range(3))
    for layer in range(config.n_layer):
        window = config.window if config.windowed(layer) else 0
        dense = lm.attend(q, k, v, attention_mask.mask(window), 0.0)
        flex = lm.flex_attention(
            q.float(), k.float(), v.float(), block_mask=attention_mask.block_mask(window)
        )
        for row in range(2):
            seen = visible(config, ids[row].tolist(), layer)
            scores = (q[row] @ k[row].mT / math.sqrt(8)).masked_fill(~seen, -math.inf)
            want = scores.softmax(-1) @ v[row]
            torch.testing.assert_close(dense[row], want, rtol=1e-9, atol=1e-9)
            torch.testing.assert_close(flex[row].double(), want, rtol=1e-4, atol=1e-5)


def test_packed_documents_give_the_logits_they_give_alone():
    config = lm.ModelSettings(**{**BASE, "doc_mask": True, "n_sink": 2, "window": 7})
    model = lm.Transformer(config)
    model.init_weights(3)
    model.eval()
    first, second = [1, 5, 6, 7, 2], [1, 9, 8, 7, 6, 5, 2]
    with torch.no_grad():
        packed = model(torch.tensor([first + second]))
        alone = [model(torch.tensor([ids])) for ids in (first, second)]
    torch.testing.assert_close(packed, torch.cat(alone, 1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "names",
    [["n_expert"], ["everything"], ["doc_mask+n_sink+window"], ["head_dim", "rope yarn", "mqa"]],
)
def test_compiled_equals_eager(names):
    options = {key: value for name in names for key, value in OPTIONS[name].items()}
    config = lm.ModelSettings(**{**BASE, "n_layer": 1, **options})
    model = lm.Transformer(config)
    model.init_weights(1)
    ids = texts()
    objective = lm.Objective(model, lm.pretrain_loss)
    losses, gradients = [], []
    for call in (objective, torch.compile(objective, dynamic=False)):
        model.zero_grad()
        losses.append(call(ids[:, :-1], ids[:, 1:]))
        losses[-1].backward()
        gradients.append(torch.cat([w.grad.flatten() for w in model.parameters()]))
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-3, atol=1e-3)


def test_mixture_of_experts_equals_a_loop_over_tokens():
    config = lm.ModelSettings(**{**BASE, "n_expert": 5, "n_expert_active": 2})
    moe = lm.MoE(config).eval()
    for weight in moe.parameters():
        torch.nn.init.normal_(weight)
    x = torch.randn(2, 7, config.d_model)
    y, aux_loss = moe(x)
    w1, w2, w3 = (w.double() for w in (moe.w1, moe.w2, moe.w3))
    counts, chances = torch.zeros(5).double(), []
    for b in range(2):
        for t in range(7):
            token = x[b, t].double()
            scores = moe.router.weight.double() @ token
            chance = scores.softmax(0)
            chances.append(chance)
            best = chance.topk(2)
            want = sum(
                p
                / best.values.sum()
                * ((torch.nn.functional.silu(token @ w1[e]) * (token @ w2[e])) @ w3[e])
                for p, e in zip(best.values, best.indices, strict=True)
            )
            counts[best.indices] += 1
            torch.testing.assert_close(y[b, t].double(), want, rtol=1e-4, atol=1e-3)
    balance = 5 * (counts / counts.sum() * torch.stack(chances).mean(0)).sum()
    z = torch.stack(
        [(moe.router.weight.double() @ t.double()).logsumexp(0) ** 2 for t in x.flatten(0, 1)]
    ).mean()
    want = config.balance_loss * balance + config.router_z_loss * z
    torch.testing.assert_close(aux_loss.double(), want, rtol=1e-4, atol=1e-5)
    assert torch.equal(moe.usage.double(), counts)


def test_forgetting_moves_keys_to_where_fewer_tokens_would_have_put_them():
    """One layer: what the cache holds after forget() is what the tail alone would have written."""
    config = lm.ModelSettings(**{**BASE, "n_layer": 1, "n_sink": 2})
    model = lm.Transformer(config)
    model.init_weights(1)
    model.eval()
    ids = torch.randint(2, 61, (1, config.seq_len))
    cache, tail = (lm.KVCache(config, 1, model.device, torch.float32) for _ in range(2))
    with torch.no_grad():
        model(ids, cache)
        model(ids[:, 10:], tail)
    cache.forget([0], 10, model.cos[10], model.sin[10])
    assert cache.lengths == tail.lengths == [2 + config.seq_len - 10]
    n = cache.lengths[0]
    for mine, theirs in zip(cache.tensors, tail.tensors, strict=True):
        torch.testing.assert_close(mine[:, :, :n], theirs[:, :, :n], rtol=1e-4, atol=1e-5)


def test_yarn_and_linear_tables_equal_transformers():
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    for kind in ("linear", "yarn"):
        config = lm.ModelSettings(
            seq_len=256,
            d_model=128,
            n_head=2,
            rope_scaling=kind,
            rope_factor=4.0,
            rope_theta=10000.0,
            vocab_size=8,
        )
        cos, sin = lm.rope_tables(config)
        theirs = LlamaConfig(
            hidden_size=128,
            num_attention_heads=2,
            max_position_embeddings=256,
            rope_parameters={
                "rope_type": kind,
                "factor": 4.0,
                "rope_theta": 10000.0,
                "original_max_position_embeddings": 64,
            },
        )
        inverse, scale = ROPE_INIT_FUNCTIONS[kind](theirs, "cpu")
        angles = torch.outer(torch.arange(256.0), inverse)
        torch.testing.assert_close(cos, angles.cos() * scale, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(sin, angles.sin() * scale, rtol=1e-4, atol=1e-4)
