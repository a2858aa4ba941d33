"""The CUDA path, held right where there is no GPU: on_cuda() takes it on a CPU."""

import functools
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch._dynamo
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.attention import flex_attention
from torch.utils._python_dispatch import TorchDispatchMode

import standalone_transformer_lm as lm

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")
ONE = lm.Machine(CPU, torch.float32)
SHAPE = {
    "n_layer": 2,
    "d_model": 64,
    "n_head": 4,
    "ffn_mult": 2.0,
    "seq_len": 64,
    "vocab_size": 97,
}
KINDS = {
    "plain": {},
    "doc_mask": {"doc_mask": True},
    "window and sinks": {"window": 24, "n_sink": 2},
    "experts": {"n_expert": 4, "n_expert_active": 2},
}
aten = torch.ops.aten


def build(seed=1, **more):
    model = lm.Transformer(lm.ModelSettings(**{**SHAPE, **more}))
    model.init_weights(seed)
    return model


@pytest.fixture
def cuda(monkeypatch):
    """CUDA's way through the program, on a CPU."""
    monkeypatch.setattr(lm, "on_cuda", lambda x: True)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    monkeypatch.setattr(lm, "LOSS_ROWS", 48)  # so that losses are taken in parts
    monkeypatch.setattr(flex_attention, "_validate_device", lambda *_: None)  # backward on a CPU
    compiled = functools.cache(functools.partial(torch.compile, backend="aot_eager", dynamic=False))
    monkeypatch.setattr(lm, "compiled_once", lambda function, **_: compiled(function))


@pytest.fixture(autouse=True)
def fresh():
    """No compiled code of another test; limits as they were."""
    limits = torch._dynamo.config
    before = limits.recompile_limit, limits.accumulated_recompile_limit
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
    limits.recompile_limit, limits.accumulated_recompile_limit = before


def some_batch(rows=4, length=64, seed=3):
    torch.manual_seed(seed)
    ids = torch.randint(4, 97, (rows, length))
    ids[:, 20] = 1  # a document begins
    targets = torch.randint(4, 97, (rows, length))
    targets[:, -5:] = lm.IGNORE
    return ids, targets


def objectives(model):
    """Each loss with a batch for it."""
    ids, targets = some_batch()
    numbers = torch.rand(4, 64)
    policy = lm.PolicySettings()
    lm_loss = functools.partial(lm.pretrain_loss, z_loss=1e-4)
    preference = functools.partial(lm.preference_loss, settings=lm.DpoSettings())
    reinforce = functools.partial(lm.policy_loss, settings=policy)
    scalars = torch.tensor([[1.0, 0.0, 0.0]]).repeat(4, 1)
    yield "pretrain", lm_loss, (ids, targets)
    chosen = lm.DistillSettings(teacher="x", divergence="jsd", text_weight=0.1, soften=2.0)
    teacher = lm.Transformer(model.config).eval().requires_grad_(False)
    teacher.init_weights(7)
    distil = functools.partial(lm.distill_loss, teacher=teacher, settings=chosen)
    yield "distil", distil, (ids, targets)
    yield "preference", preference, (ids, targets, -torch.rand(2, 2) * 9)
    arguments = (-numbers, numbers - 0.5, -numbers, torch.ones(4, 64), torch.rand(4, 3), scalars)
    yield "policy", reinforce, (ids, targets, *arguments)
    if model.score is not None:
        yield "judge", lm.judge_loss, (ids, targets, torch.zeros(2, 0))
        value = functools.partial(lm.value_loss, clip=0.2)
        yield "value", value, (ids, targets, numbers, numbers + 0.1)


def loss_and_gradients(module, batch):
    module.zero_grad()
    losses = module(*batch)
    losses[0].backward()
    named = {n.split("model.")[-1]: w.grad for n, w in module.named_parameters()}
    return losses.detach(), {n: g.clone() for n, g in named.items() if g is not None}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_every_objective_is_one_graph_and_gives_what_a_cpu_gives(kind, cuda, monkeypatch):
    model = build(scalar_head=True, n_layer=1, **KINDS[kind]).train()
    torch.nn.init.normal_(model.score.weight)
    for name, loss, batch in objectives(model):
        with monkeypatch.context() as away:
            away.setattr(lm, "on_cuda", lambda x: False)
            want = loss_and_gradients(lm.Objective(model, loss), batch)
        counter = CompileCounterWithBackend("aot_eager")
        graph = torch.compile(
            lm.Objective(model, loss), backend=counter, fullgraph=True, dynamic=False
        )
        losses, gradients = loss_and_gradients(graph, batch)
        assert counter.frame_count == 1, name
        torch.testing.assert_close(losses, want[0], rtol=2e-4, atol=2e-4)
        assert gradients.keys() == want[1].keys()
        for weight, gradient in gradients.items():
            torch.testing.assert_close(gradient, want[1][weight], rtol=2e-3, atol=2e-4)
        torch._dynamo.reset()


# --- no wait for the device -----------------------------------------------------------------------

WAITS = {
    aten._local_scalar_dense.default,
    aten.nonzero.default,
    aten.masked_select.default,
    aten.item.default,
    aten.is_nonzero.default,
    aten.equal.default,
}


def refuse(_tensor, name, *_):
    raise AssertionError(f"{name} waits for the device")


class NoWaits(TorchDispatchMode):
    """Refuses what makes a host wait for its device; of what a CPU's tensors do without dispatching
    anything, the methods themselves."""

    METHODS = ("tolist", "cpu", "numpy", "item", "__float__", "__int__", "__bool__", "__index__")

    def __enter__(self):
        self.patch = pytest.MonkeyPatch()
        for name in self.METHODS:
            self.patch.setattr(torch.Tensor, name, functools.partialmethod(refuse, name))
        return super().__enter__()

    def __exit__(self, *fault):
        self.patch.undo()
        return super().__exit__(*fault)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function not in WAITS, function
        if function is aten.index.Tensor:  # by a mask it counts what is kept
            masks = [i for i in args[1] if i is not None and i.dtype == torch.bool]
            assert not masks, "indexing by a mask"
        return function(*args, **(kwargs or {}))


def trainer_of(model, loss, tmp_path, machine=ONE, compile="0", **more):
    ids = np.random.default_rng(0).integers(4, 97, 20_000)
    job = lm.Job("train", model, loss, lm.Windows(ids, 64, 0), lambda *_: {}, None)
    run = lm.RunSettings(
        out_dir=str(tmp_path), max_steps=100, batch_size=4, grad_accum_steps=2, compile=compile
    )
    return lm.Trainer(job, machine, run, lm.OptimSettings(**more), {"seed": 0}, None)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("kind", KINDS)
def test_no_step_waits_for_the_device(kind, optimizer, cuda, tmp_path, monkeypatch):
    """All but FlexAttention, which is compiled as a whole, and cannot be looked into."""
    monkeypatch.setattr(lm.Transformer, "uses_flex", lambda self, x: False)
    model = build(scalar_head=True, **KINDS[kind]).train()
    for name, loss, batch in objectives(model):
        one = trainer_of(model, loss, tmp_path / name, optimizer=optimizer, ema=0.9)
        losses = one.accumulate(one.wrapped, [batch], 0.01)  # makes what is made once
        one.update(model, one.optimizers)
        with NoWaits():
            losses = sum(one.accumulate(one.wrapped, [batch, batch], 0.01))
            norm = one.update(model, one.optimizers)
            one.count_step()
            one.metrics.sums = torch.zeros(len(losses) + 2)
            one.metrics.names = ("loss",) * len(losses)
            one.metrics.add(1, losses, norm, 9)


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: lm.grouped_linear(x, torch.rand(2, 8, 8), torch.tensor([1, 3])),  # the old way
        lambda x: x.sum().item(),
        lambda x: float(x.sum()),
        lambda x: bool((x > 0).all()),
        lambda x: x[x > 0.5],
        lambda x: x.nonzero(),
        lambda x: x.cpu(),
        lambda x: x.tolist(),
    ],
)
def test_what_waits_is_refused(wait):
    wait(torch.rand(4, 8))
    with pytest.raises(AssertionError), NoWaits():
        wait(torch.rand(4, 8))
    wait(torch.rand(4, 8))


# --- experts in blocks ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "counts",
    [[3, 0, 5, 4], [12, 0, 0, 0], [0, 0, 0, 12], [1, 1, 1, 1], [0, 1, 0, 0], [7, 7, 7, 8], [5, 9]],
)
def test_blocks_hold_every_row_whatever_the_counts(counts):
    counts, rows = torch.tensor(counts), sum(counts)
    places, owners, size = lm.in_blocks(counts, rows)
    assert len(owners) == 2 * len(counts) and len(set(places.tolist())) == rows
    expert = torch.repeat_interleave(torch.arange(len(counts)), counts)
    assert torch.equal(owners[places // size], expert), "a row lies in a block of its own expert"
    assert int(places.max()) < len(owners) * size


def test_experts_in_blocks_drop_no_token(cuda, monkeypatch):
    torch.manual_seed(0)
    moe = lm.MoE(lm.ModelSettings(**SHAPE, n_expert=4, n_expert_active=2))
    for weight in moe.parameters():
        torch.nn.init.normal_(weight, std=0.1)
    for counts in ([3, 0, 5, 4], [12, 0, 0, 0]):
        rows = torch.randn(12, 64, requires_grad=True)
        found = moe.experts(rows, torch.tensor(counts))
        found.square().sum().backward()
        mine, rows.grad = rows.grad, None
        with monkeypatch.context() as away:
            away.setattr(lm, "on_cuda", lambda x: False)
            want = moe.experts(rows, torch.tensor(counts))
        want.square().sum().backward()
        torch.testing.assert_close(found, want)
        torch.testing.assert_close(mine, rows.grad)


# --- a decoding step ------------------------------------------------------------------------------


def decoding(rows=4, **more):
    model = build(**more).eval().requires_grad_(False)
    cache = lm.KVCache(model.config, rows, CPU, torch.float32).first(rows)
    ids = torch.full((rows, 1), 7)
    positions = torch.full((rows, 1), 9)
    return model, (model, ids, positions, cache, 32)


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_captured_step_writes_to_stays_where_it_is(kind):
    """Inductor captures no graph that writes to an input unless its address is static."""
    seen = []

    def backend(graph, inputs):
        meta = torch._guards.TracingContext.get().fw_metadata
        names = [node for node in graph.graph.nodes if node.op == "placeholder"]
        written = set()
        for node in graph.graph.nodes:
            mutable = getattr(node.target, "_schema", None)
            if node.op == "call_function" and mutable and mutable.is_mutable:
                written.add(names.index(node.args[0]))
        seen.append((written, set(meta.static_input_indices)))
        return graph.forward

    aot = torch._dynamo.backends.common.aot_autograd(
        fw_compiler=backend, inference_compiler=backend, keep_inference_input_mutations=True
    )
    model, arguments = decoding(**KINDS[kind])
    with torch.inference_mode():
        step = torch.compile(lm.Transformer.next_logits, backend=aot, fullgraph=True, dynamic=False)
        step(*arguments)
    [(written, static)] = seen
    assert len(written) >= 2 * SHAPE["n_layer"], "the keys and values of each layer"
    assert written <= static
    keys = arguments[3].tensors
    assert all(tensor._dynamo_static_input_type == "unguarded" for tensor in keys)


@pytest.mark.parametrize("kind", ["plain", "window and sinks"])
def test_a_compiled_step_copies_no_layer(kind):
    """Its generated code allocates nothing as large as the keys of one layer."""
    from torch._inductor.utils import run_and_get_code

    model, arguments = decoding(rows=16, **KINDS[kind])
    layer = arguments[3].k[0].numel()
    with torch.inference_mode():
        step = torch.compile(lm.Transformer.next_logits, dynamic=False)
        _, codes = run_and_get_code(step, *arguments)
    sizes = []
    for shape in re.findall(r"empty_strided\w*\(\(([\d, ]+)\)", "\n".join(codes)):
        sizes.append(int(np.prod([int(n) for n in shape.split(",") if n.strip()])))
    assert sizes and max(sizes) < layer, (max(sizes), layer)


class Operations(TorchDispatchMode):
    """Counts what is dispatched, and casts of whole weights."""

    def __init__(self, least):
        super().__init__()
        self.least = least
        self.names = []
        self.casts = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function)
        cast = function in (aten._to_copy.default, aten.to.dtype)
        if cast and args[0].numel() >= self.least:
            wanted = (kwargs or {}).get("dtype") or args[1]
            self.casts += wanted != args[0].dtype
        return function(*args, **(kwargs or {}))


def casts_of_tokens(model, dtype, tokens=4):
    """Casts of whole weights while so many tokens are drawn, after the prompt."""
    settings = lm.SamplingSettings(tokens + 1, temperature=0.0)
    with torch.autocast("cpu", dtype), torch.inference_mode():
        stream = lm.generate(model, [[1, 5, 9]], settings, 0, dtype=dtype)
        next(stream)  # reads the prompt
        with Operations(min(w.numel() for w in model.parameters() if w.dim() == 2)) as seen:
            list(stream)
    return seen.casts


@pytest.mark.parametrize("more", [{}, {"tie": False}, {"n_expert": 4}, {"n_kv_head": 2}], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16])
def test_no_weight_is_cast_for_a_token(more, dtype):
    model = build(**more).eval().requires_grad_(False)
    assert casts_of_tokens(model, dtype) > 0, "autocast casts them in inference mode"
    twin = lm.reading_copy(model, dtype)
    assert casts_of_tokens(twin, dtype) == 0
    assert model.lm_head.weight.dtype == torch.float32, "the model itself is as it was"
    assert twin.tok_emb.weight is model.tok_emb.weight and twin.cos is model.cos
    assert casts_of_tokens(lm.lower_weights(model, dtype), dtype) == 0


@pytest.mark.parametrize(
    "more", [{}, {"tie": False}, {"n_expert": 4}, {"n_sink": 2, "window": 9}], ids=str
)
def test_lowered_weights_compute_what_autocast_computes(more):
    model = build(**more).eval().requires_grad_(False)
    ids = some_batch()[0]
    with torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
        want = model(ids)
        twin = lm.reading_copy(model, torch.bfloat16)
        assert torch.equal(twin(ids), want)
        with torch.no_grad():
            for weight in model.parameters():
                weight.add_(0.01)
        assert not torch.equal(twin(ids), model(ids))
        lm.renew_copy(twin, model)
        assert torch.equal(twin(ids), model(ids))
        model.fp32_head = True
        assert torch.equal(lm.reading_copy(model, torch.bfloat16)(ids), model(ids))


def test_a_copy_of_adapters_reads_as_they_do():
    model = build().eval()
    lm.attach_lora(model, lm.LoraSettings(lora_rank=2), 1)
    for name, weight in model.named_parameters():
        if name.endswith("lora_b"):
            torch.nn.init.normal_(weight, std=0.05)
    twin = lm.reading_copy(model, torch.bfloat16)
    ids = some_batch()[0]
    with torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
        assert torch.equal(twin(ids), model(ids))
    assert casts_of_tokens(twin, torch.bfloat16) == 0


@pytest.mark.parametrize("how", [{"temperature": 0.0}, {"top_k": 5}, {"top_p": 0.8}], ids=str)
def test_several_ids_are_drawn_without_a_look_at_any(how, cuda, monkeypatch):
    """What would be captured runs as it is; ids, positions and numbers never leave the device."""
    step = lm.Transformer.next_logits
    monkeypatch.setattr(lm, "compiled_once", lambda function, **_: step)
    model = build().eval().requires_grad_(False)
    with torch.inference_mode():
        decoder = lm.Decoder(model, 3, 60, torch.float32, compiled=True)
        slots = [lm.Slot(0, [1, 7, 8 + i], 20) for i in range(3)]
        decoder.begin([0, 1, 2], slots, [lm.uniforms(0, row, 20) for row in range(3)])
        decoder.positions = decoder.cache.positions(1)  # sent once, when texts join
        with NoWaits():
            drawn, logps = decoder.run(lm.SamplingSettings(20, **how), frozenset(), True)
    assert drawn.shape == logps.shape == (lm.LOOK_EVERY, len(decoder.slots))


def test_a_mixture_asks_each_part_once_a_step(monkeypatch):
    """Not once a sample, which took 31 ms a step of 64."""
    asked = []

    class Part(lm.Windows):
        def places(self, numbers):
            asked.append(len(numbers))
            return super().places(numbers)

    parts = [Part(np.arange(900) + 1000 * i, 8, 1) for i in range(3)]
    mixture = lm.Mixture(parts, [0.5, 0.3, 0.2])
    real, orders = lm.permute, []
    monkeypatch.setattr(lm, "permute", lambda *args: orders.append(args[2]) or real(*args))
    for first in (0, 64, 128):
        mixture.step(first, 64, 1, 0, 1)
    assert len(asked) == 9 and sum(asked) == 3 * 64
    assert sum("mixture" in key for key in orders) == 1, "the order of a block is worked out once"


def test_an_eager_token_takes_few_operations():
    """Of plain greedy decoding, for each layer, and for the rest."""
    counts = []
    for layers in (2, 4):
        model = build(n_layer=layers).eval().requires_grad_(False)
        stream = lm.generate(model, [[1, 5]], lm.SamplingSettings(12, temperature=0.0), 0)
        next(stream), next(stream)
        with Operations(1) as seen:
            next(stream)
        counts.append(len(seen.names))
    a_layer = (counts[1] - counts[0]) / 2
    assert a_layer <= 60 and counts[0] - 2 * a_layer <= 40, (counts, a_layer)


def test_an_update_of_muon_takes_few_operations():
    """They do not grow with the number of layers but for momentum, decay and the move."""
    counts = []
    for layers in (2, 6):
        model = build(n_layer=layers)
        lm.pretrain_loss(model, *some_batch()).backward()
        muon = lm.make_optimizers(model, lm.OptimSettings(optimizer="muon"), ONE)[-1]
        muon.step()
        lm.pretrain_loss(model, *some_batch()).backward()
        with Operations(1) as seen:
            muon.step()
        counts.append(len(seen.names))
    assert (counts[1] - counts[0]) / 4 <= 30, counts
    assert counts[0] <= 300, counts


# --- shapes that are compiled ---------------------------------------------------------------------


@pytest.fixture
def shapes(monkeypatch):
    """Everything is compiled, by a backend that only counts; running eager for a limit fails."""
    counter = CompileCounterWithBackend("eager")
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **_: real(f, backend=counter, dynamic=False))
    lm.compiled_once.cache_clear()
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        yield counter
    lm.compiled_once.cache_clear()


def flags(out, *more):
    words = f"--out_dir {out} --compile 1 --threads 1 --dtype fp32 --device cpu --batch_size 3"
    return [*words.split(), "--optimizer", "adamw", *more]


@pytest.fixture(scope="module")
def small(data_dir, tmp_path_factory, run):
    out = tmp_path_factory.mktemp("small") / "run"
    words = """--n_layer 1 --d_model 32 --n_head 4 --seq_len 96 --ffn_mult 2 --lr 1e-2 --max_steps 2
    --threads 1 --dtype fp32 --device cpu --compile 0 --batch_size 4"""
    code, _, err = run(["train", *words.split(), "--data_dir", data_dir, "--out_dir", out])
    assert code == 0, err
    return out


def texts_of_every_length(count=80):
    """Rows whose lengths fill every one of the lengths that batches are padded to."""
    for i in range(count):
        yield f"say {i}", " ".join("harbour" for _ in range(1 + 2 * i % 80))


def write_jsonl(path, rows):
    lm.write_jsonl(path, rows)
    return path


def test_training_with_evaluation_keeps_to_its_shapes(shapes, run, data_dir, tmp_path):
    words = "--n_layer 1 --d_model 32 --n_head 4 --seq_len 32 --max_steps 6 --eval_interval 2"
    argv = ["train", *words.split(), "--data_dir", data_dir, *flags(tmp_path / "run")]
    code, _, err = run(argv)
    assert code == 0, err
    assert shapes.frame_count <= 2, "one to train, one to evaluate"


def test_rows_of_every_length_keep_to_their_shapes(shapes, run, small, tmp_path):
    rows = [{"prompt": a, "response": b} for a, b in texts_of_every_length()]
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    more = ["--ckpt", small, "--data", data, "--pack", 0, *"--batch_size 1 --epochs 2".split()]
    code, _, err = run(["sft", *flags(tmp_path / "sft", *more), "--val_split", 0.4])
    assert code == 0, err
    assert 8 < shapes.frame_count <= 2 * lm.LENGTHS, "in training, and evaluated"


def test_pairs_of_every_length_keep_to_their_shapes(shapes, run, small, tmp_path):
    rows = [{"prompt": a, "chosen": b, "rejected": "no"} for a, b in texts_of_every_length()]
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    more = ["--ckpt", small, "--data", data, *"--batch_size 1 --epochs 2".split()]
    code, _, err = run(["dpo", *flags(tmp_path / "dpo", *more), "--val_split", 0.4])
    assert code == 0, err
    assert 8 < shapes.frame_count <= 2 * lm.LENGTHS


@pytest.mark.slow
def test_reinforcement_with_a_value_model_keeps_to_its_shapes(shapes, run, small, tmp_path):
    """Policy, value model and rollouts, whose batches end and shrink at different times."""
    words = """--task add --task_rows 40 --algo ppo --max_steps 3 --prompts 6 --group_size 4
    --max_new_tokens 40 --eval_prompts 5 --eval_samples 3 --eval_interval 1 --value_warmup 1
    --minibatches 2 --rollout_batch 20"""
    code, _, err = run(["grpo", *flags(tmp_path / "rl", *words.split(), "--ckpt", small)])
    assert code == 0, err
    assert shapes.frame_count <= 24, shapes.frame_count


# --- several ranks --------------------------------------------------------------------------------


def share_muon(rank, port, folder):
    torch.set_num_threads(1)
    place = f"tcp://127.0.0.1:{port}"
    torch.distributed.init_process_group("gloo", init_method=place, rank=rank, world_size=2)
    torch.save(muon_weights(lm.Machine(CPU, torch.float32, rank, 2)), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def muon_weights(machine, steps=3):
    model = build(n_layer=3, n_kv_head=2)  # matrices of which there are odd numbers
    seen = []
    optimizers = lm.make_optimizers(model, lm.OptimSettings(optimizer="muon", lr=0.05), machine)
    real = lm.newton_schulz
    lm.newton_schulz = lambda x: seen.append(len(x)) or real(x)
    for step in range(steps):
        lm.pretrain_loss(model, *some_batch(seed=step)).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    lm.newton_schulz = real
    return {"weights": model.state_dict(), "matrices": sum(seen)}


def test_two_ranks_share_muons_work_and_get_the_weights_of_one(tmp_path):
    from test_distributed import free_port

    torch.multiprocessing.spawn(share_muon, (free_port(), str(tmp_path)), nprocs=2)
    one = muon_weights(ONE)
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    for found in ranks:
        for name, weight in one["weights"].items():
            torch.testing.assert_close(found["weights"][name], weight, rtol=1e-4, atol=1e-5)
        assert found["matrices"] < 0.7 * one["matrices"]
    for name, weight in ranks[0]["weights"].items():
        assert torch.equal(weight, ranks[1]["weights"][name]), "the ranks never drift apart"


def test_a_compiled_graph_is_cut_few_times_by_the_buckets_of_gradients(monkeypatch):
    """DDP has dynamo cut where a bucket is full: 25 MB would cut 138M parameters 22 times."""
    with torch.device("meta"):
        model = lm.Transformer(lm.ModelSettings(**lm.PRESETS["138m"] | {"vocab_size": 32000}))
    told = {}

    class Ddp:
        def __init__(self, module, **options):
            told.update(options)

    signature = lm.inspect.signature(lm.DistributedDataParallel)
    Ddp.__init__.__signature__ = signature
    monkeypatch.setattr(lm, "DistributedDataParallel", Ddp)
    lm.distribute(model, lm.Machine(CPU, torch.float32, 0, 2))
    size = sum(weight.numel() * 4 for weight in model.parameters()) / 2**20
    assert size / told["bucket_cap_mb"] <= lm.GRADIENT_BUCKETS


def count_graphs(program, rank):
    """Compile with a backend that counts; the count is written beside the run."""
    counter = CompileCounterWithBackend("aot_eager")
    program.compiled = lambda f, **_: torch.compile(f, backend=counter, dynamic=False)
    fit = program.Trainer.fit

    def counted(self):
        code = fit(self)
        (self.out / f"graphs_{rank}").write_text(str(counter.frame_count))
        return code

    program.Trainer.fit = counted


@pytest.mark.slow
def test_two_compiled_ranks_train_as_two_eager_ones(child, data_dir, tmp_path):
    from conftest import read_pt
    from test_distributed import flags as flags_of
    from test_distributed import two

    for compiled in (0, 1):
        out = tmp_path / str(compiled)
        each = (count_graphs,) if compiled else ()
        ends = two(child, [*flags_of(data_dir, out, 4), "--compile", compiled], each=each)
        assert [code for code, _ in ends] == [0, 0], ends
    eager, graphs = (read_pt(tmp_path / str(c) / "ckpt_last.pt")["model"] for c in (0, 1))
    for name, weight in eager.items():
        torch.testing.assert_close(graphs[name], weight, rtol=1e-3, atol=1e-4)
    assert int((tmp_path / "1" / "graphs_0").read_text()) <= 2 * (lm.GRADIENT_BUCKETS + 1)


# --- processes, 8 bits, sizes ---------------------------------------------------------------------


def test_reward_processes_are_no_copies_of_one_with_cuda(monkeypatch):
    assert lm.start_method() == lm.START_METHOD
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    assert lm.start_method() in ("forkserver", "spawn")
    reward = lm.CallReward("plus", plus, 30.0)
    try:
        assert reward.score([("1", "2", {}), ("3", "4", {})]) == [3.0, 7.0]
        [process] = reward.workers[0].pool._processes.values()
        assert type(process).__name__ != "ForkProcess"
    finally:
        reward.close()


def plus(prompt, completion, row):
    return float(prompt) + float(completion)


def test_eight_bits_multiply_nearly_as_sixteen_do():
    """Against float64, as near as three bits of mantissa allow; and the gradients."""
    torch.manual_seed(0)
    x = torch.randn(64, 48, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.nn.Parameter(torch.randn(32, 48) / 7)
    y = lm.Fp8Matmul.apply(x, weight)
    back = torch.randn_like(y)
    y.backward(back)
    x_, w_, g_ = (t.detach().double() for t in (x, weight, back))
    for found, want in ((y, x_ @ w_.T), (x.grad, g_ @ w_), (weight.grad, g_.T @ x_)):
        error = (found.double() - want).norm() / want.norm()
        assert error < 0.08, error
    assert y.dtype == torch.bfloat16 and weight.grad.dtype == torch.float32
    zeros = lm.Fp8Matmul.apply(torch.zeros(16, 48, dtype=torch.bfloat16), weight)
    assert not zeros.any() and zeros.isfinite().all()


def test_only_large_matrices_train_in_eight_bits(monkeypatch):
    monkeypatch.setattr(lm, "FP8_LEAST", 64)
    model = build(ffn_mult=1.5)  # 96 wide: w1 and w2 (96, 64), w3 (64, 96), qkv (192, 64)
    names = list(model.state_dict())
    assert lm.attach_fp8(model) == 5 * SHAPE["n_layer"]
    assert list(model.state_dict()) == names and type(model.lm_head) is torch.nn.Linear
    ids, targets = some_batch()
    with torch.autocast("cpu", torch.bfloat16):
        mine = lm.pretrain_loss(model.train(), ids, targets)
        mine.backward()
        plain = lm.pretrain_loss(build(ffn_mult=1.5), ids, targets)
        assert mine.item() == pytest.approx(plain.item(), rel=0.02) and mine != plain
        with torch.no_grad():  # evaluated in 16 bits
            assert model.eval()(ids).equal(build(ffn_mult=1.5).eval()(ids))
    assert all(weight.grad is not None for weight in model.parameters())


def test_adapters_stay_beside_matrices_of_eight_bits(monkeypatch):
    monkeypatch.setattr(lm, "FP8_LEAST", 64)
    model = build(ffn_mult=1.5)
    lm.attach_lora(model, lm.LoraSettings(lora_rank=2, lora_targets="qkv,proj"), 1)
    names = [name for name, _ in model.named_parameters()]
    assert lm.attach_fp8(model) == 3 * SHAPE["n_layer"], "w1, w2 and w3"
    assert [name for name, _ in model.named_parameters()] == names


def test_eight_bits_are_one_graph(monkeypatch):
    monkeypatch.setattr(lm, "FP8_LEAST", 64)
    model = build().train()
    lm.attach_fp8(model)
    counter = CompileCounterWithBackend("aot_eager")
    objective = lm.Objective(model, lm.pretrain_loss)
    with torch.autocast("cpu", torch.bfloat16):
        graph = torch.compile(objective, backend=counter, fullgraph=True, dynamic=False)
        loss_and_gradients(graph, some_batch())
    assert counter.frame_count == 1


def test_eight_bits_are_refused_where_they_cannot_be(monkeypatch):
    bf16 = lm.Machine(CPU, torch.bfloat16)
    with pytest.raises(lm.UserError, match="Hopper"):
        lm.use_fp8(build(), bf16)
    monkeypatch.setattr(lm, "on_cuda", lambda x: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    with pytest.raises(lm.UserError, match="Hopper"):
        lm.use_fp8(build(), bf16)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    with pytest.raises(lm.UserError, match="1024"):
        lm.use_fp8(build(), bf16)
    with pytest.raises(lm.UserError, match="bf16"):
        lm.use_fp8(build(), lm.Machine(CPU, torch.float16))


def job_of(preset, kind="train", seq_len=1024, vocab=32000):
    settings = {**lm.PRESETS[preset], "vocab_size": vocab, "seq_len": seq_len}
    with torch.device("meta"):
        model = lm.Transformer(lm.ModelSettings(**settings))
    windows = lm.Windows(np.zeros(4 * seq_len + 1, np.uint16), seq_len, 0)
    return lm.Job(kind, model, None, windows, None, None)


@pytest.mark.parametrize("memory", [80e9, 24e9])
@pytest.mark.parametrize("world", [1, 8])
@pytest.mark.parametrize("preset", ["138m", "350m"])
def test_a_step_on_a_gpu_suits_the_model_and_fits_the_memory(
    preset, world, memory, cuda, monkeypatch
):
    monkeypatch.setattr(lm, "device_memory", lambda device: int(memory))
    job, machine = job_of(preset), lm.Machine(CPU, torch.bfloat16, 0, world)
    run = lm.choose_step(lm.RunSettings(), job, machine, lm.OptimSettings(), 0)
    tokens = run.batch_size * run.grad_accum_steps * world * 1024
    assert tokens == 1 << 19
    planned = lm.plan_memory(job.model.config, run, lm.OptimSettings())
    assert sum(planned.values()) <= 0.85 * memory
    doubled = lm.plan_memory(
        job.model.config, lm.replace(run, batch_size=2 * run.batch_size), lm.OptimSettings()
    )
    largest = run.batch_size * 1024 == min(lm.MICRO_TOKENS, tokens // world)
    assert largest or sum(doubled.values()) > 0.85 * memory
    other = lm.choose_step(lm.RunSettings(), job, machine, lm.OptimSettings(), 512)
    assert other.batch_size * other.grad_accum_steps * world == 512, "a resumed run keeps its step"
    given = lm.RunSettings(batch_size=4)
    found = lm.choose_step(given, job, machine, lm.OptimSettings(), 0)
    assert (found.batch_size, found.grad_accum_steps) == (4, 1)


def test_a_step_on_a_cpu_is_what_it_was():
    job, machine = job_of("138m"), lm.Machine(CPU, torch.float32, 0, 2)
    for more, want in (
        ({}, (8, 1)),
        ({"grad_accum_steps": 3}, (8, 3)),
        ({"batch_size": 2}, (2, 1)),
    ):
        run = lm.choose_step(lm.RunSettings(**more), job, machine, lm.OptimSettings(), 0)
        assert (run.batch_size, run.grad_accum_steps) == want
    run = lm.choose_step(lm.RunSettings(), job, machine, lm.OptimSettings(), 8)
    assert (run.batch_size, run.grad_accum_steps) == (4, 1)
    with pytest.raises(lm.UserError, match="cannot be divided"):
        lm.choose_step(lm.RunSettings(), job, machine, lm.OptimSettings(), 7)


def test_an_evaluation_takes_a_twentieth_of_the_time():
    job, machine = job_of("138m"), lm.Machine(CPU, torch.float32, 0, 1)
    run = lm.RunSettings(batch_size=16, grad_accum_steps=1, max_steps=1000, eval_interval=100)
    found = lm.choose_eval_tokens(run, job, machine).eval_tokens
    assert found / 3 == pytest.approx(0.05 * 100 * 16 * 1024), "a token costs a third of training"
    assert lm.choose_eval_tokens(lm.replace(run, eval_interval=10**6), job, machine).eval_tokens > (
        found
    )
    assert lm.choose_eval_tokens(lm.replace(run, eval_tokens=77), job, machine).eval_tokens == 77
    tiny = lm.replace(run, batch_size=1, eval_interval=1)
    assert lm.choose_eval_tokens(tiny, job, machine).eval_tokens == lm.EVAL_TOKENS[0]


# --- files are written aside ----------------------------------------------------------------------


def test_a_step_does_not_wait_for_a_slow_disk(tmp_path, monkeypatch):
    """Steps go on while a checkpoint is written, of which it holds the moment when it was due."""
    began, release = lm.threading.Event(), lm.threading.Event()
    real = lm.save_checkpoint

    def slow(path, checkpoint):
        began.set()
        assert release.wait(30)
        real(path, checkpoint)

    monkeypatch.setattr(lm, "save_checkpoint", slow)
    one = trainer_of(build(), lm.pretrain_loss, tmp_path)
    one.job.tokenizer = type("Tokenizer", (), {"data": b"x"})()
    one.objective.train()
    one.train_step(0)
    then = {name: weight.clone() for name, weight in one.job.model.state_dict().items()}
    moments = [state["exp_avg"].clone() for state in one.optimizers[0].state.values()]
    one.save(numbered=True)
    assert began.wait(30) and not (tmp_path / "ckpt_last.pt").exists()
    for _ in range(2):
        one.train_step(0)
    assert not one.writer.fault
    release.set()
    one.writer.wait()
    saved = lm.read_checkpoint(tmp_path / "ckpt_last.pt")
    assert saved["step"] == 1
    for name, weight in then.items():
        assert torch.equal(saved["model"][name], weight), name
    kept = [state["exp_avg"] for state in saved["optim"][0]["state"].values()]
    assert all(map(torch.equal, kept, moments))
    tied = saved["model"]["lm_head.weight"], saved["model"]["tok_emb.weight"]
    assert tied[0].data_ptr() == tied[1].data_ptr(), "what is one tensor is written once"


def test_the_best_and_the_newest_are_written_once_where_they_are_one(run, data_dir, tmp_path):
    words = "--n_layer 1 --d_model 32 --n_head 4 --seq_len 32 --max_steps 4 --eval_interval 4"
    out = tmp_path / "run"
    argv = ["train", *words.split(), "--data_dir", data_dir, "--out_dir", out, "--compile", "0"]
    assert run([*argv, "--ckpt_interval", "4"])[0] == 0
    files = [out / name for name in ("ckpt_best.pt", "ckpt_last.pt", "ckpt_00000004.pt")]
    assert len({file.stat().st_ino for file in files}) == 1
    assert (
        run([*argv, "--ckpt_interval", "4", "--max_steps", "6", "--eval_interval", "100"])[0] == 0
    )
    steps = [lm.read_checkpoint(out / name)["step"] for name in ("ckpt_best.pt", "ckpt_last.pt")]
    assert steps[1] == 6 and lm.read_checkpoint(out / "ckpt_00000004.pt")["step"] == 4


def test_a_trainer_made_with_automatic_sizes_takes_whole_steps(tmp_path):
    ids = np.random.default_rng(0).integers(4, 97, 20_000)
    job = lm.Job("train", build(), lm.pretrain_loss, lm.Windows(ids, 64, 0), None, None)
    run = lm.RunSettings(out_dir=str(tmp_path), compile="0", eval_interval=9)
    one = lm.Trainer(job, ONE, run, lm.OptimSettings(), {"seed": 0}, None)
    one.train_step(0)
    assert one.samples == 8 and one.metrics.tokens == 8 * 64


def test_speed_is_told_with_and_without_what_stands_aside(run, data_dir, tmp_path):
    """Evaluations and checkpoints take no part in tok_per_s, but in wall_tok_per_s they do."""
    words = "--n_layer 1 --d_model 32 --n_head 4 --seq_len 32 --max_steps 4 --log_interval 2"
    out = tmp_path / "run"
    real = lm.perplexity

    def slow(*args):
        lm.time.sleep(1.0)
        return real(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lm, "perplexity", slow)
        argv = ["train", *words.split(), "--eval_interval", 1, "--compile", 0]
        assert run([*argv, "--data_dir", data_dir, "--out_dir", out])[0] == 0
    rows = [lm.json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    last = [row for row in rows if "perf/tok_per_s" in row][-1]
    tokens = 2 * 8 * 32
    assert last["perf/wall_tok_per_s"] < tokens / 1.9 + 1
    assert last["perf/tok_per_s"] > 2 * last["perf/wall_tok_per_s"]


@pytest.mark.slow
def test_the_script_for_a_gpu_works(tmp_path):
    """In miniature, as far as a machine without a GPU goes."""
    command = [lm.sys.executable, str(ROOT / "benchmarks" / "gpu.py"), "--small"]
    done = lm.subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "Everything is right." in done.stdout and "failed" not in done.stdout
    for title in ("Losses and gradients", "Captured decoding", "Training", "prefill", "grpo"):
        assert title in done.stdout, title
    done = lm.subprocess.run(command[:-1], capture_output=True, text=True, timeout=100)
    if not torch.cuda.is_available():
        assert done.returncode == 2 and "error: " in done.stderr and "fix: " in done.stderr


def test_batches_made_ahead_are_those_that_were_due():
    made = []

    def make(first):
        made.append(first)
        return lm.StepBatch([], 0, 8, first)

    ahead = lm.Ahead(make)
    assert [ahead.take(first).tokens for first in (0, 8, 16, 80, 88)] == [0, 8, 16, 80, 88]
    ahead.coming[1].result()
    assert sorted(made) == [0, 8, 16, 24, 80, 88, 96], "each once, but for a leap"


def test_what_is_made_ahead_is_pinned_for_the_ranks_own_device(cuda, tmp_path, monkeypatch):
    """A new thread stands at device 0, where every rank's pinning would then take memory."""
    devices, pinned = [], []
    monkeypatch.setattr(torch.cuda, "set_device", devices.append)
    monkeypatch.setattr(
        torch.Tensor, "pin_memory", lambda tensor: pinned.append(len(devices)) or tensor
    )
    one = trainer_of(build(), lm.pretrain_loss, tmp_path)
    batch = one.ahead.take(0)
    one.ahead.coming[1].result()
    assert len(batch.micros) == 2 and devices == [CPU, CPU]
    assert pinned and all(pinned), "after the device was set"


def test_a_reader_that_fails_ahead_fails_its_step():
    def make(first):
        if first:
            raise OSError("the disk is gone")
        return lm.StepBatch([], 0, 8, first)

    ahead = lm.Ahead(make)
    ahead.take(0)
    with pytest.raises(OSError, match="gone"):
        ahead.take(8)
