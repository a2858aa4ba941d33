"""How fast this program is beside others, on the CPU of the machine at hand.

    python benchmarks/peers.py train --shape 12m --nanogpt nanoGPT --hf --compile
    python benchmarks/peers.py decode --shape 15m --batch 1 --hf --llama2c llama2.c
    python benchmarks/peers.py prep --text docs.txt --spm data/tokenizer.model
    python benchmarks/peers.py start --data_dir data
    python benchmarks/peers.py grpo --trl venv/bin/python

Weights and ids are random: only sizes matter here. A peer that is not named is left out; --nanogpt,
--nanochat and --llama2c name checkouts, --trl the Python of an environment with TRL (it need not
be able to run this program), and --hf wants transformers beside this program. Every participant has
a process of its own, for `open_machine` sets threads and malloc for a whole process; it lives
through all rounds, so that it compiles once, and waits on stdin while others are timed. They take
turns, a block of --steps steps a round, after a warm-up. The tables hold medians over the rounds
and their range; a speedup is this program's median over the row's. Each has the number format and
the threads that it would have by itself; all use AdamW unless --optimizer gives this program
another.
"""

import argparse
import functools
import importlib
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
import types
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
OURS = "this program"
WARM = 3  # untimed steps at the start
SKIPPED = 2  # first steps of grpo that do not count
PROMPTS, GROUP, PROMPT_TOKENS, NEW_TOKENS = 16, 8, 16, 32  # of grpo
MATMUL = 2048  # rows and columns of the squares that show what the machine can do
SHAPES = {  # SwiGLU's three matrices weigh what an MLP of 4 d_model does
    "1m": {"n_layer": 4, "d_model": 128, "n_head": 4, "seq_len": 256, "ffn_hidden": 344},
    "12m": {"n_layer": 6, "d_model": 384, "n_head": 6, "seq_len": 256, "ffn_hidden": 1024},
    "15m": {"n_layer": 6, "d_model": 288, "n_head": 6, "seq_len": 256, "ffn_hidden": 768},
    "110m": {"n_layer": 12, "d_model": 768, "n_head": 12, "seq_len": 512, "ffn_hidden": 2048},
}
SIZES = {  # sequences in a training batch, ids in the vocabulary
    "1m": (32, 4096),
    "12m": (32, 4096),
    "15m": (32, 32000),
    "110m": (4, 32000),
}


@functools.cache
def program() -> types.ModuleType:
    """This program; not imported above, for TRL's Python reads this file too."""
    sys.path.insert(0, str(ROOT))
    return importlib.import_module("standalone_transformer_lm")


def command(name: str, **flags) -> list[str]:
    """A command of this program as a user would type it."""
    words = [word for key, value in flags.items() for word in (f"--{key}", str(value))]
    return [sys.executable, str(ROOT / "standalone_transformer_lm.py"), name, *words]


def config_of(shape: str):
    """This program's settings for a shape, by which peers are built too."""
    return program().ModelSettings(**SHAPES[shape], vocab_size=SIZES[shape][1])


# ---- Participants: from a job and config_of its shape, a step and its number format ----


def our_model(config):
    lm = program()
    machine, model = lm.open_machine(lm.DeviceSettings(device="cpu")), lm.Transformer(config)
    model.init_weights(0)
    return lm, machine, model


def random_ids(config) -> np.ndarray:
    return np.random.default_rng(0).integers(config.vocab_size, size=1 << 19, dtype=np.uint16)


def train_ours(job, config):
    lm, machine, model = our_model(config)
    stream = lm.Windows(random_ids(config), config.seq_len, 0)
    run = lm.RunSettings(
        out_dir=tempfile.mkdtemp(dir=job.folder),
        batch_size=job.batch,
        max_steps=10**6,
        compile=str(int(job.compile)),
        eval_interval=10**6,
    )
    whole = lm.Job("train", model, lm.pretrain_loss, stream, lambda module: {}, None)
    optim = lm.OptimSettings(optimizer=job.optimizer)
    trainer = lm.Trainer(whole, machine, run, optim, {"seed": 0}, None)
    trainer.objective.train()
    return lambda: trainer.train_step(0), machine.dtype


def train_peer(job, config, model, optimizer, loss):
    """The usual loop in fp32: loss of inputs and next ids, backward, clip at 1, step, clear."""
    ids, T = random_ids(config), config.seq_len

    def step() -> None:
        starts = np.random.randint(len(ids) - T, size=job.batch)
        rows = torch.from_numpy(np.stack([ids[i : i + T + 1] for i in starts]).astype(np.int64))
        loss(rows[:, :-1].contiguous(), rows[:, 1:].contiguous()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step, torch.float32


def train_nanogpt(job, config):
    sys.path.insert(0, job.nanogpt)
    peer = importlib.import_module("model")
    model = peer.GPT(
        peer.GPTConfig(
            block_size=config.seq_len,
            vocab_size=config.vocab_size,
            n_layer=config.n_layer,
            n_head=config.n_head,
            n_embd=config.d_model,
            dropout=0.0,
            bias=False,
        )
    )
    optimizer = model.configure_optimizers(0.1, 6e-4, (0.9, 0.95), "cpu")
    run = torch.compile(model) if job.compile else model
    return train_peer(job, config, model, optimizer, lambda *batch: run(*batch)[1])


def llama(config):
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.d_model,
            tie_word_embeddings=True,
            intermediate_size=config.hidden,
            num_hidden_layers=config.n_layer,
            num_attention_heads=config.n_head,
            max_position_embeddings=config.seq_len,
        )
    )


def train_hf(job, config):
    model = llama(config).train()
    run = torch.compile(model) if job.compile else model
    return train_peer(
        job,
        config,
        model,
        torch.optim.AdamW(model.parameters()),
        lambda ids, _: run(input_ids=ids, labels=ids, use_cache=False).loss,
    )  # it shifts the labels itself


def decode_ours(job, config):
    lm, machine, model = our_model(config)
    model.eval()
    settings = lm.SamplingSettings(job.new_tokens, 1.0, 0, 1.0)

    def step() -> None:
        with machine.autocast():
            rows = lm.complete(
                model, job.prompts, settings, 0, dtype=machine.dtype, compiled=job.compile
            )
        assert all(len(row) == job.new_tokens for row in rows), "it ended early"

    return step, machine.dtype


def decode_hf(job, config):
    from transformers import CompileConfig

    model, ids, more = llama(config).eval(), torch.tensor(job.prompts), {}
    if job.compile:
        more = {"cache_implementation": "static", "compile_config": CompileConfig(mode="default")}
        more["compile_config"]._compile_all_devices = True  # by itself it compiles on GPUs alone

    @torch.inference_mode()
    def step() -> None:
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=True,
            top_k=0,
            top_p=1.0,
            temperature=1.0,
            max_new_tokens=job.new_tokens,
            min_new_tokens=job.new_tokens,
            pad_token_id=3,
            **more,
        )
        assert out.shape[1] == job.prompt_tokens + job.new_tokens, "it ended early"

    return step, torch.float32


def decode_nanochat(job, config):
    """Its Engine continues one prompt in many rows; its own scripts do not compile for that."""
    sys.path.insert(0, job.nanochat)
    loader = types.ModuleType("nanochat.checkpoint_manager")  # wants the packages of a tokenizer
    loader.load_model = None
    sys.modules[loader.__name__] = loader
    gpt, engine = (importlib.import_module(f"nanochat.{name}") for name in ("gpt", "engine"))
    model = gpt.GPT(
        gpt.GPTConfig(
            sequence_len=config.seq_len,
            vocab_size=config.vocab_size,
            n_layer=config.n_layer,
            n_head=config.n_head,
            n_kv_head=config.n_head,
            n_embd=config.d_model,
            window_pattern="L",
        )
    )
    model.init_weights()
    endless = types.SimpleNamespace(encode_special=lambda text: -1, get_bos_token_id=lambda: -1)
    runner, prompt = engine.Engine(model.eval(), endless), job.prompts[0]

    def step() -> None:
        columns = runner.generate(prompt, job.batch, job.new_tokens, temperature=1.0)
        assert len(list(columns)) == job.new_tokens, "it ended early"

    return step, gpt.COMPUTE_DTYPE


def decode_llama2c(job, config):
    """Its run.c, built as its Makefile's `runomp` does, on random weights; it writes a text without
    a prompt, token by token, and its start is in the time."""
    assert job.batch == 1, "llama2.c writes one text at a time"
    folder, source = Path(job.folder), Path(job.llama2c)
    subprocess.run(
        [
            "gcc",
            "-Ofast",
            "-fopenmp",
            "-march=native",
            source / "run.c",
            "-lm",
            "-o",
            folder / "run",
        ],
        check=True,
    )
    sizes = [
        config.d_model,
        config.hidden,
        config.n_layer,
        config.n_head,
        config.n_head,
        config.vocab_size,
        config.seq_len,
    ]
    count = program().parameter_counts(config)["total"] + config.seq_len * config.head_size
    weights = np.random.default_rng(0).standard_normal(count, np.float32) * np.float32(0.02)
    (folder / "model.bin").write_bytes(np.array(sizes, np.int32).tobytes() + weights.tobytes())
    words = [
        folder / "run",
        folder / "model.bin",
        "-z",
        source / "tokenizer.bin",
        "-t",
        "1.0",
        "-n",
        str(job.new_tokens),
    ]

    def step() -> None:
        done = subprocess.run(words, check=True, capture_output=True)
        assert b"achieved" in done.stderr, done.stderr

    return step, torch.float32


def matmul(job, config):
    """What the machine can do, set up as this program does it."""
    lm, dtype = program(), getattr(torch, job.dtype)
    lm.open_machine(lm.DeviceSettings(device="cpu"))
    a, b = (torch.randn(MATMUL, MATMUL).to(dtype) for _ in range(2))
    return lambda: torch.mm(a, b), dtype


PARTICIPANTS = {
    one.__name__: one
    for one in (
        train_ours,
        train_nanogpt,
        train_hf,
        decode_ours,
        decode_hf,
        decode_nanochat,
        decode_llama2c,
        matmul,
    )
}


# ---- Turns: one process a participant, driven by lines ----


def child(job: dict) -> None:
    """Build and warm up, then answer each line, a number of steps, with the seconds they took."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever a participant prints is no answer
    job = types.SimpleNamespace(**job)
    step, dtype = PARTICIPANTS[job.kind](job, config_of(job.shape))
    for _ in range(WARM):
        step()
    print(json.dumps([str(dtype)[len("torch.") :], torch.get_num_threads()]), file=answers)
    for line in sys.stdin:
        began = time.perf_counter()
        for _ in range(int(line)):
            step()
        print(time.perf_counter() - began, file=answers)


class Peer:
    """A participant in a process of its own; its rates are amounts a second, one a round."""

    def __init__(self, name: str, amount: int, **job):
        self.name, self.amount, self.rates = name, amount, []
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--child"],
            stdin=subprocess.PIPE,
            text=True,
            stdout=subprocess.PIPE,
            env=os.environ | {"HF_HUB_OFFLINE": "1"},
        )
        print(f"warming up: {name}", file=sys.stderr)
        print(json.dumps(job), file=self.process.stdin, flush=True)
        self.dtype, self.threads = self.answer()

    def answer(self):
        line = self.process.stdout.readline()
        assert line, f"{self.name} failed, as is told above"
        return json.loads(line)

    def run(self, steps: int) -> None:
        print(steps, file=self.process.stdin, flush=True)
        self.rates.append(steps * self.amount / self.answer())


def race(entries: list[tuple], amount: int, args: argparse.Namespace, **job) -> list[Peer]:
    """The participants (name, more of its job) after all rounds; started one by one."""
    job = {key: value for key, value in vars(args).items() if key != "work"} | job
    with tempfile.TemporaryDirectory() as folder:
        peers = [
            Peer(name, **{"amount": amount, "folder": folder} | job | more)
            for name, more in entries
        ]
        for number in range(args.rounds):
            print(f"round {number + 1} of {args.rounds}", file=sys.stderr)
            for peer in peers:
                peer.run(args.steps)
        for peer in peers:
            peer.process.communicate()  # the end of its lines is its end
    return peers


def both_ways(entries: dict[str, str], compiled: bool) -> list[tuple]:
    """Each participant, a name and a kind, as it is and, where that is wanted, compiled as well."""
    return [
        (name + ", compiled" * way, {"kind": kind, "compile": way})
        for name, kind in entries.items()
        for way in [False, True][: 1 + compiled]
    ]


def show(title: str, rates: dict[str, list[float]], notes: dict[str, str], digits: int = 0) -> None:
    """Medians and ranges of each one's rates, and how often its median goes into this program's."""
    middle = {name: statistics.median(column) for name, column in rates.items()}
    ours = [name for name in rates if name.startswith(OURS)]
    rows = [[title, "median", "range", *(f"speedup{own[len(OURS) :]}" for own in ours), ""]]
    for name, column in rates.items():
        rows.append(
            [
                name,
                f"{middle[name]:,.{digits}f}",
                f"{min(column):,.{digits}f} to {max(column):,.{digits}f}",
                *(f"{middle[own] / middle[name]:.2f}" for own in ours),
                notes.get(name, ""),
            ]
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for first, *middle, last in rows:
        cells = (word.rjust(width) for word, width in zip(middle, widths[1:-1], strict=True))
        print("  ".join((first.ljust(widths[0]), *cells, last)).rstrip())


def show_race(title: str, peers: list[Peer], flops: int = 0) -> None:
    """`flops` a token where they tell something."""
    notes = {
        peer.name: f"{peer.dtype}, threads: {peer.threads}"
        + bool(flops) * f", {statistics.median(peer.rates) * flops / 1e12:.3f} TFLOP/s"
        for peer in peers
    }
    show(title, {peer.name: peer.rates for peer in peers}, notes)


# ---- Commands ----


def cmd_train(args: argparse.Namespace) -> None:
    """The ceiling is told in tokens whose training takes as many operations as its products."""
    lm, config, batch = program(), config_of(args.shape), SIZES[args.shape][0]
    flops = lm.flops_per_token(config)
    entries = {OURS: "train_ours"} | ({"nanoGPT": "train_nanogpt"} if args.nanogpt else {})
    entries = both_ways(entries | ({"Hugging Face": "train_hf"} if args.hf else {}), args.compile)
    products = {"kind": "matmul", "amount": 2 * MATMUL**3 / flops}
    entries += [
        (f"matmul {name}", products | {"dtype": name})
        for name in ["float32"] + ["bfloat16"] * lm.bf16_cpu()
    ]
    peers = race(entries, batch * config.seq_len, args, batch=batch)
    show_race(f"train {args.shape}, {args.optimizer}, tokens/s", peers, flops)


def cmd_decode(args: argparse.Namespace) -> None:
    share, config = args.share or bool(args.nanochat), config_of(args.shape)
    assert args.prompt_tokens + args.new_tokens <= config.seq_len, "longer than the context"
    prompts = (
        np.random.default_rng(0)
        .integers(20, config.vocab_size, (1 if share else args.batch, args.prompt_tokens))
        .tolist()
    )
    entries = {OURS: "decode_ours"} | ({"Hugging Face": "decode_hf"} if args.hf else {})
    entries = both_ways(entries, args.compile)
    entries += [("nanochat", {"kind": "decode_nanochat"})] * bool(args.nanochat)
    entries += [("llama2.c", {"kind": "decode_llama2c"})] * bool(args.llama2c)
    peers = race(
        entries, args.batch * args.new_tokens, args, prompts=prompts * (args.batch // len(prompts))
    )
    show_race(f"decode {args.shape}, batch {args.batch}, tokens/s", peers)


def cmd_prep(args: argparse.Namespace) -> None:
    lm, cores, size = program(), os.cpu_count(), os.path.getsize(args.text) / 1e6
    lines = Path(args.text).read_bytes().decode().split("\n")  # with prep, a document is a line
    lines = [line.removesuffix("\r") for line in lines if line.strip()]
    tokenizer = lm.load_tokenizer(args.spm)
    dtype, sp = lm.token_dtype(tokenizer.vocab_size), tokenizer.sp
    with tempfile.TemporaryDirectory() as folder:
        whole = command(
            "prep", text_path=args.text, spm=args.spm, out_dir=folder, overwrite=1, val_split=0
        )  # all ids in one file, in the order of the text
        ways = {
            f"{OURS}, whole process": lambda: (
                subprocess.run(whole, check=True, capture_output=True) and lm.TokenFolder(folder)
            ),
            f"{OURS}, encoding, 1 core": lambda: [
                *map(lm.WordEncoder(tokenizer, dtype).encode, lines)
            ],  # knows no word yet
            "SentencePiece, 1 thread": lambda: sp.encode(lines, num_threads=1),
            f"SentencePiece, {cores} threads": lambda: sp.encode(lines, num_threads=cores),
        }
        rates, found = {name: [] for name in ways}, {}
        for name, work in list(ways.items()) * args.rounds:
            began = time.perf_counter()
            found[name] = work()
            rates[name].append(size / (time.perf_counter() - began))
        data, packed, _, ids = found.values()
        wanted = [i for row in ids for i in (tokenizer.bos, *row, tokenizer.eos)]
        assert np.array_equal(data.tokens("train"), wanted), "prep gave other ids"
    wanted = [i for row in ids for i in row]
    assert np.array_equal(np.frombuffer(b"".join(packed), dtype), wanted), "encoding gave other ids"
    show(f"prep of {size:.1f} MB, MB/s", rates, {}, 2)


def first_step(data_dir: str, out: str) -> tuple[float, float]:
    """Seconds from the start of `train` to its first line of metrics, and of the step in it."""
    log, words = (
        Path(out) / "metrics.jsonl",
        command(
            "train",
            data_dir=data_dir,
            out_dir=out,
            batch_size=SIZES["12m"][0],
            compile=0,
            log_interval=1,
            max_steps=1000,
            **SHAPES["12m"],
        ),
    )  # a last step evaluates first
    began = time.perf_counter()
    with subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while not (log.exists() and log.read_text().endswith("\n")):
            assert process.poll() is None, f"`{' '.join(words)}` ended without a step"
            time.sleep(0.005)
        seconds = time.perf_counter() - began
        process.kill()
    row = json.loads(log.read_text().splitlines()[0])
    return seconds, row["tokens"] / row["perf/tok_per_s"]


def cmd_start(args: argparse.Namespace) -> None:
    pairs = []
    for _ in range(args.rounds):
        with tempfile.TemporaryDirectory() as folder:
            pairs.append(first_step(args.data_dir, folder))
    names = "to the first finished step", "of which that step"
    show(
        "start of train, 12m, seconds",
        dict(zip(names, zip(*pairs, strict=True), strict=True)),
        {},
        2,
    )


def make_run(folder: Path, shape: str) -> None:
    """Data of random words, an untrained run and its export; prompts and the reward, for both:
    questions that are PROMPT_TOKENS long with the markers of a chat."""
    lm, rng, vocab, rows = program(), random.Random(0), SIZES[shape][1], []
    words = [
        "".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(3, 9)))
        for _ in range(2 * vocab)
    ]
    lines = (" ".join(rng.choices(words, k=20)) + "\n" for _ in range(vocab))
    (folder / "words.txt").write_text("".join(lines))
    for line in (
        command("prep", text_path=folder / "words.txt", out_dir=folder / "data", vocab_size=vocab),
        command(
            "train",
            data_dir=folder / "data",
            out_dir=folder / "run",
            max_steps=1,
            batch_size=1,
            compile=0,
            eval_tokens=1,
            **SHAPES[shape],
        ),
        [
            sys.executable,
            ROOT / "convert_to_llama.py",
            "--ckpt",
            folder / "run",
            "--out",
            folder / "hf",
        ],
    ):
        subprocess.run(line, check=True, stdout=subprocess.DEVNULL)
    tokenizer = lm.load_tokenizer(folder / "data" / "tokenizer.model")
    while len(rows) < 4 * PROMPTS:
        text = " ".join(rng.choices(words, k=rng.randint(1, PROMPT_TOKENS)))
        if len(lm.question(tokenizer, [("user", text)], 1 << 20).ids) == PROMPT_TOKENS:
            rows.append(json.dumps({"prompt": text, "answer": ""}) + "\n")
    (folder / "prompts.jsonl").write_text("".join(rows))
    (folder / "reward.py").write_text(
        "def letters(prompt, completion, row):\n    return len(completion) / 100\n"
    )


def steps_of(ends: list[float], tokens: list[float]) -> list[tuple[float, float]]:
    """(seconds, new tokens) of each step that counts."""
    return list(zip(np.diff(ends)[SKIPPED - 1 :], tokens[SKIPPED:], strict=True))


def grpo_ours(folder: Path, args: argparse.Namespace) -> list[tuple[float, float]]:
    with tempfile.TemporaryDirectory(dir=folder) as out:
        subprocess.run(
            command(
                "grpo",
                ckpt=folder / "run",
                data=folder / "prompts.jsonl",
                val_split=0,
                out_dir=out,
                reward=f"{folder / 'reward.py'}:letters",
                prompts=PROMPTS,
                group_size=GROUP,
                max_new_tokens=NEW_TOKENS,
                batch_size=args.micro,
                lr=1e-5,
                ckpt_interval=10**6,
                max_steps=SKIPPED + args.steps,
            ),
            check=True,
            stdout=subprocess.DEVNULL,
        )
        rows = [json.loads(line) for line in (Path(out) / "metrics.jsonl").open()]
    rows = [row for row in rows if "train/reward" in row]
    return steps_of([row["time"] for row in rows], np.diff([0, *(row["tokens"] for row in rows)]))


def grpo_trl(folder: Path, args: argparse.Namespace) -> list[tuple[float, float]]:
    job = {
        "folder": str(folder),
        "micro": args.micro,
        "steps": SKIPPED + args.steps,
        "bf16": program().bf16_cpu(),
    }
    done = subprocess.run(
        [args.trl, __file__, "--trl_child"],
        input=json.dumps(job),
        text=True,
        check=True,
        stdout=subprocess.PIPE,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )
    answer = json.loads(done.stdout.splitlines()[-1])
    assert answer["prompt_tokens"] == PROMPT_TOKENS, "the prompts are not the same"
    return steps_of(answer["ends"], [PROMPTS * GROUP * n for n in answer["lengths"]])


def trl_child(job: dict) -> None:
    """TRL's side, run by its own Python: prints when its steps ended, as one line of JSON."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    folder, ends = Path(job["folder"]), []
    rows = [json.loads(line) for line in (folder / "prompts.jsonl").open()]
    chats = [[{"role": "user", "content": row["prompt"]}] for row in rows]
    model = AutoModelForCausalLM.from_pretrained(folder / "hf", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder / "hf")
    first = tokenizer.apply_chat_template(chats[0], add_generation_prompt=True, return_dict=True)
    clock = TrainerCallback()
    clock.on_step_end = lambda *_, **__: ends.append(time.perf_counter())
    config = GRPOConfig(
        output_dir=str(folder / "trl"),
        max_steps=job["steps"],
        num_generations=GROUP,
        per_device_train_batch_size=job["micro"],
        loss_type="grpo",
        beta=0.0,
        num_iterations=1,
        gradient_accumulation_steps=PROMPTS * GROUP // job["micro"],
        gradient_checkpointing=False,
        max_completion_length=NEW_TOKENS,
        generation_kwargs={"min_new_tokens": NEW_TOKENS},
        temperature=1.0,
        learning_rate=1e-5,
        lr_scheduler_type="constant",
        bf16=job["bf16"],
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
    )
    trainer = GRPOTrainer(
        model,
        lambda completions, **_: [len(one[0]["content"]) / 100 for one in completions],
        config,
        Dataset.from_list([{"prompt": chat} for chat in chats]),
        processing_class=tokenizer,
        callbacks=[clock],
    )
    trainer.train()
    lengths = [log.get("completions/mean_length") for log in trainer.state.log_history]
    print(
        json.dumps(
            {
                "ends": ends,
                "lengths": [n for n in lengths if n],
                "prompt_tokens": len(first["input_ids"]),
            }
        )
    )


def cmd_grpo(args: argparse.Namespace) -> None:
    """This program cannot forbid </s>, drawn about once in a vocabulary, so tokens/s says more."""
    aux_losses = {OURS: grpo_ours} | ({"TRL": grpo_trl} if args.trl else {})
    found = {name: [] for name in aux_losses}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_run(folder, args.shape)
        for aux_loss, work in list(aux_losses.items()) * args.rounds:
            found[aux_loss] += work(folder, args)
    rates = {
        aux_loss: [tokens / seconds for seconds, tokens in steps]
        for aux_loss, steps in found.items()
    }
    notes = {
        aux_loss: "{:.2f} s a step, {:.2f} tokens a completion".format(
            *np.median(steps, 0) / (1, PROMPTS * GROUP)
        )
        for aux_loss, steps in found.items()
    }
    show(f"grpo {args.shape}, new tokens/s", rates, notes)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True)
    choices = {"shape": SHAPES, "optimizer": ("adamw", "muon")}

    def add(work, **flags) -> None:
        """Flags by their defaults: None must be given, False is a switch."""
        one = commands.add_parser(work.__name__.removeprefix("cmd_"))
        one.set_defaults(work=work)
        for name, default in ({"rounds": 5} | flags).items():
            how = (
                {"action": "store_true"}
                if default is False
                else {
                    "type": str if default is None else type(default),
                    "default": default,
                    "required": default is None,
                    "choices": choices.get(name),
                }
            )
            one.add_argument(f"--{name}", **how)

    add(cmd_train, steps=10, shape=None, nanogpt="", hf=False, compile=False, optimizer="adamw")
    add(
        cmd_decode,
        steps=1,
        shape=None,
        batch=64,
        prompt_tokens=32,
        new_tokens=96,
        hf=False,
        nanochat="",
        llama2c="",
        share=False,
        compile=False,
    )
    add(cmd_prep, text=None, spm=None)
    add(cmd_start, data_dir=None)
    add(cmd_grpo, steps=10, trl="", shape="1m", micro=32)
    return parser


def main() -> int:
    if sys.argv[1:] in (["--child"], ["--trl_child"]):
        work = child if sys.argv[1] == "--child" else trl_child
        work(json.loads(sys.stdin.readline()))
    else:
        args = make_parser().parse_args()
        args.work(args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
