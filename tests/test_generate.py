"""generate: what it warns of, refuses, streams and writes."""

import json

import numpy as np
import pytest
from conftest import complaint, documents

import standalone_transformer_lm as lm


@pytest.fixture
def ask(run, trained):
    """`ask(*flags)` runs generate on the trained model."""
    start = ["generate", "--ckpt", trained, "--device", "cpu", "--dtype", "fp32", "--threads", 1]
    return lambda *flags: run([*start, "--max_new_tokens", 5, *flags])


@pytest.mark.parametrize("context", [0, 1, 40])
def test_a_stream_of_text_is_the_text_decoded_at_the_end(tiny_tokenizer, context):
    tokenizer = lm.Tokenizer(tiny_tokenizer)
    rng = np.random.default_rng(3)
    texts = [*documents(5, seed=5), " a  b\n\n c 🙂東京é ", "👩‍👩‍👧"]
    lines = [tokenizer.encode(text) for text in texts]
    lines.append(rng.integers(0, tokenizer.vocab_size, 300).tolist())  # broken characters too
    before = tokenizer.encode("The harbour, and then more. " * 9)[:context]
    for ids in lines:
        stream = lm.TextStream(tokenizer, before)
        told = "".join(stream.push(token) for token in ids) + stream.waiting()
        whole = tokenizer.decode(before + ids)
        assert told == whole[len(tokenizer.decode(before)) :]


def test_a_stream_of_text_reads_few_ids_again(tiny_tokenizer, monkeypatch):
    tokenizer = lm.Tokenizer(tiny_tokenizer)
    sizes = []
    decode = tokenizer.decode
    monkeypatch.setattr(tokenizer, "decode", lambda ids: sizes.append(len(ids)) or decode(ids))
    stream = lm.TextStream(tokenizer, [])
    for token in tokenizer.encode("the engine and the river " * 100):
        stream.push(token)
    assert max(sizes) < 20


def test_a_prompt_longer_than_the_context_is_told(ask):
    code, _, err = ask("--prompt", "the engine and the river " * 30)
    assert code == 0 and "only its last 16 are read" in err


def test_a_model_that_was_never_taught_to_chat_is_told(ask):
    code, _, err = ask("--chat", "--prompt", "Why?")
    assert code == 0 and "never taught to chat" in err


def test_a_chat_without_a_question_is_refused(ask):
    complaint(ask("--chat"), "--prompt")


def test_conversations_want_chat(ask, tmp_path):
    chat = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    ]
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": chat}))
    complaint(ask("--prompt_file", tmp_path / "rows.jsonl"), "add --chat")
    assert ask("--prompt_file", tmp_path / "rows.jsonl", "--chat")[0] == 0


def test_prompts_may_begin_with_a_byte_order_mark(ask, tmp_path):
    (tmp_path / "asked.txt").write_bytes(b"\xef\xbb\xbfthe engine\r\nthe river\r\n")
    out = tmp_path / "out.jsonl"
    assert ask("--prompt_file", tmp_path / "asked.txt", "--out", out)[0] == 0
    assert json.loads(out.read_text().split("\n")[0])["prompt"].strip() == "the engine"


def test_expected_answers_that_json_lacks_are_written(ask, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "Hi", "answer": "\\ud83d"}\n')
    out = tmp_path / "out.jsonl"
    code, _, err = ask("--prompt_file", tmp_path / "rows.jsonl", "--out", out)
    assert code == 0, err
    assert json.loads(out.read_text())["expected"] == "\ud83d"


def test_an_output_that_cannot_be_written_is_told_before_the_work(ask, tmp_path, monkeypatch):
    monkeypatch.setattr(lm, "generate", lambda *_, **__: pytest.fail("it computed first"))
    (tmp_path / "file").write_text("")
    complaint(ask("--prompt", "a", "--out", tmp_path / "file" / "out.jsonl"), "exists")


def test_a_stop_id_is_never_banned():
    import torch

    settings = lm.SamplingSettings(no_repeat_ngram_size=1)
    logits = lm.penalise(torch.zeros(1, 6), [[1, 2, 3]], settings, frozenset({2}))
    assert torch.isinf(logits[0]).tolist() == [False, True, False, True, False, False]


def test_the_demo_learns_from_docstrings_alone():
    code = '"""Front."""\nx = """data"""\ndef f():\n    """About f."""\n    return """no"""\n'
    assert [text for text in lm.docstrings(code) if text] == ["Front.", "About f."]


def test_rows_of_parquet_with_dates_and_bytes_come_out(run, tiny_tokenizer, tmp_path):
    """What JSON lacks is written as text, not an error after all the work."""
    import datetime

    import pyarrow
    import pyarrow.parquet
    from test_lora import save_base

    save_base(tmp_path / "base.pt", tiny_tokenizer, scalar_head=True)
    day = datetime.date(2026, 11, 25)
    rows = {"prompt": ["a?", "b?"], "answer": [day, day]}
    pyarrow.parquet.write_table(pyarrow.table(rows), tmp_path / "asked.parquet")
    place = ["--device", "cpu", "--threads", 1, "--dtype", "fp32"]
    words = ["--prompt_file", tmp_path / "asked.parquet", "--out", tmp_path / "out.jsonl", "--chat"]
    code, _, err = run(
        ["generate", "--ckpt", tmp_path / "base.pt", *place, *words, "--max_new_tokens", 3]
    )
    assert code == 0, err
    found = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row["expected"] for row in found] == ["2026-11-25"] * 2
    scored = {"prompt": ["a?"], "response": ["b"], "made": [day], "raw": [b"\xff\x00"]}
    pyarrow.parquet.write_table(pyarrow.table(scored), tmp_path / "rows.parquet")
    words = ["--score", tmp_path / "rows.parquet", "--out", tmp_path / "scored.jsonl"]
    code, _, err = run(["reward", "--ckpt", tmp_path / "base.pt", *place, *words])
    assert code == 0, err
    row = json.loads((tmp_path / "scored.jsonl").read_text())
    assert row["made"] == "2026-11-25" and isinstance(row["raw"], str)
