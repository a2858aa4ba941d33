"""What every test shares: the program on the path, fixed seeds, a tiny corpus and its tokenizer."""

import contextlib
import io
import os
import random
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch loads; child processes inherit it
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import hypothesis  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

hypothesis.settings.register_profile("fixed", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("fixed")

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
