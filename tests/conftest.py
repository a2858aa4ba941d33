"""What every test shares: the program on the path, fixed seeds, a tiny corpus and its tokenizer."""

import contextlib
import faulthandler
import io
import itertools
import json
import multiprocessing
import os
import random
import signal
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch loads; child processes inherit it
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import hypothesis  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

# A shell that starts the tests in the background has them ignore Ctrl-C, and so their children.
signal.signal(signal.SIGINT, signal.default_int_handler)
hypothesis.settings.register_profile("fixed", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("fixed")

TINY = """--n_layer 2 --d_model 32 --n_head 4 --n_kv_head 2 --seq_len 32 --ffn_mult 2 --lr 1e-2
--batch_size 4 --warmup_steps 3 --dtype fp32 --device cpu --threads 1 --compile 0
--optimizer adamw --schedule cosine""".split()
SHORT = """--max_steps 12 --dropout 0.1 --log_interval 1 --eval_interval 4 --ckpt_interval 4
--eval_tokens 500""".split()
PRELOADED = ["torch._dynamo", "torch.distributed", "sentencepiece", "hypothesis", "pytest"]
TIMES = ("time", "perf/tok_per_s", "perf/wall_tok_per_s")  # in which equal runs differ

NOUNS = """harbour engine village river teacher library mountain orchard soldier painter bridge
market winter garden letter captain island forest candle window station doctor printer sailor
kitchen museum valley festival basket lantern meadow scholar hammer blanket tower café Zürich
東京""".split()
VERBS = """carried followed repaired painted measured remembered crossed visited described
borrowed gathered ignored defended opened replaced studied""".split()
ADJECTIVES = """quiet narrow ancient bright crowded distant fragile golden hollow modest northern
patient rusty silent stubborn wooden naïve""".split()
TEMPLATES = (
    "The {adj} {noun} {verb} the {noun} near the {adj} {noun}.",
    "In {year} a {noun} {verb} every {noun} , and nobody noticed .",
    "Why was the {noun} so {adj}? Because the {noun} {verb} it {number} times.",
    "Chapter {number}: how the {adj} {noun} and the {noun} {verb} each other.",
    "It cost {number}.{number} to see the {noun};  the {noun} was free 🙂",
)


def documents(count, seed):
    """Yield `count` short documents of one to four sentences, the same for the same seed."""
    rng = random.Random(seed)
    words = {"noun": NOUNS, "verb": VERBS, "adj": ADJECTIVES}
    words |= {"year": range(1800, 2030), "number": range(2, 100)}
    for _ in range(count):
        text = " ".join(rng.choice(TEMPLATES) for _ in range(rng.randint(1, 4)))
        for slot, choices in words.items():
            while "{" + slot + "}" in text:
                text = text.replace("{" + slot + "}", str(rng.choice(choices)), 1)
        yield text


@pytest.fixture(autouse=True)
def same_numbers_every_time():
    """One thread and one seed, so that a test's numbers do not depend on what ran before it."""
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """A UTF-8 text file, one document a line, large enough for a vocabulary of 512."""
    path = tmp_path_factory.mktemp("corpus") / "corpus.txt"
    path.write_text("".join(text + "\n" for text in documents(600, seed=1)), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def tiny_tokenizer():
    """The bytes of a SentencePiece model of 400 pieces, trained by the program on about 50 kB."""
    import standalone_transformer_lm as lm

    return lm.train_tokenizer(documents(300, seed=2), 400)


@pytest.fixture(scope="session")
def run():
    """`run(argv)` calls the program's main in this process: (exit code, stdout, stderr)."""
    import standalone_transformer_lm as lm

    def call(argv):
        out, err = (io.TextIOWrapper(io.BytesIO(), "utf-8", write_through=True) for _ in range(2))
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                code = lm.main([str(word) for word in argv])
            except SystemExit as stop:
                code = stop.code or 0
        return code, out.buffer.getvalue().decode(), err.buffer.getvalue().decode()

    return call


@pytest.fixture(scope="session")
def data_dir(corpus, tmp_path_factory, run):
    """A data folder that prep made of the corpus; read only."""
    out = tmp_path_factory.mktemp("prepared") / "data"
    code, _, err = run(
        [
            "prep",
            "--text_path",
            corpus,
            "--out_dir",
            out,
            "--vocab_size",
            400,
            "--val_split",
            0.1,
            "--workers",
            1,
        ]
    )
    assert code == 0, err
    return out


@pytest.fixture(scope="session")
def trained(data_dir, tmp_path_factory, run):
    """The folder of a finished run of TINY and SHORT; read only, copy it to change it."""
    out = tmp_path_factory.mktemp("trained") / "run"
    code, _, err = run(["train", *TINY, *SHORT, "--data_dir", data_dir, "--out_dir", out])
    assert code == 0, err
    return out


def complaint(result, *words):
    """Assert that a result is one of the user's mistakes, told with these words."""
    code, _, err = result
    assert code == 2 and err.count("error: ") == 1 and "\nfix: " in err, err
    assert "Traceback" not in err
    assert all(word in err for word in words), err


def log_rows(out):
    """The rows of a run's metrics.jsonl, without the figures that a clock made."""
    lines = (out / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in TIMES} for line in lines]


def read_pt(path):
    """What a checkpoint file holds."""
    return torch.load(path, weights_only=True)


def weight_bytes(path):
    """The weights, their average and the optimisers' moments in a checkpoint, as bytes by name."""
    saved = read_pt(path)
    state = {
        f"{n}/{i}/{k}": v
        for n, one in enumerate(saved["optim"])
        for i, row in one["state"].items()
        for k, v in row.items()
    }
    state |= {f"ema/{i}": w for i, w in enumerate(saved["ema"] or ())}
    return {name: t.numpy().tobytes() for name, t in {**saved["model"], **state}.items()}


def signal_at(lm, what, nth, number=signal.SIGKILL):
    """Make the program send itself a signal when `what`, a name in it, is called the nth time."""
    *path, name = what.split(".")
    owner = lm
    for part in path:
        owner = getattr(owner, part)
    original, calls = getattr(owner, name), itertools.count(1)

    def counted(*args, **kwargs):
        if next(calls) == nth:
            os.kill(os.getpid(), number)
        return original(*args, **kwargs)

    setattr(owner, name, counted)


def in_child(argv, log, env, hooks):
    """What a child process runs: main(argv), after `hooks`, its output written to `log`."""
    os.environ.update(env)
    with open(log, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    faulthandler.register(signal.SIGUSR2, all_threads=True)
    import standalone_transformer_lm as lm

    for hook, *args in hooks:
        hook(lm, *args)
    code = lm.main(argv)
    sys.stdout.flush()
    os._exit(code)


class Child:
    """The program in a process of its own, forked off one that has torch loaded."""

    def __init__(self, argv, log, env, hooks):
        self.log = log
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        argv = [str(word) for word in argv]
        self.process = context.Process(target=in_child, args=(argv, log, env, hooks))
        self.process.start()

    def end(self, seconds=100):
        """(exit code, what it printed); the code of a killed child is minus the signal."""
        self.process.join(seconds)
        if self.process.exitcode is None:
            os.kill(self.process.pid, signal.SIGUSR2)  # where it hangs, to its log
            time.sleep(1)
            self.process.kill()
        assert self.process.exitcode is not None, f"still running:\n{self.log.read_text()}"
        return self.process.exitcode, self.log.read_text()


@pytest.fixture
def child(tmp_path):
    """`child(argv, *hooks, **env)` starts the program; a hook is (function, *arguments)."""
    numbers = itertools.count()

    def start(argv, *hooks, **env):
        return Child(argv, tmp_path / f"child{next(numbers)}.log", env, hooks)

    return start
