"""Room Prep: text in any packing becomes token files, or a sentence that says why not."""

import bz2
import collections
import copy
import glob
import gzip
import io
import json
import lzma
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from unittest import mock

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from conftest import documents, signal_at
from hypothesis import example, given
from hypothesis import strategies as st

import standalone_transformer_lm as lm

TEXTS = list(documents(60, seed=11))
LINES = "".join(text + "\n" for text in TEXTS).encode()
PACK = {
    "": bytes,
    ".gz": gzip.compress,
    ".xz": lzma.compress,
    ".bz2": bz2.compress,
    ".zst": zstandard.ZstdCompressor(write_checksum=True).compress,
}
EVERY_MODE = pytest.mark.parametrize("mode", ["line", "blank", "file"])


@pytest.fixture(scope="module")
def spm(tiny_tokenizer, tmp_path_factory):
    """A tokenizer file, so that a test need not train one."""
    path = tmp_path_factory.mktemp("spm") / "tokenizer.model"
    path.write_bytes(tiny_tokenizer)
    return path


@pytest.fixture
def prep(run, spm, tmp_path):
    """`prep(path, ..., flag=value)` encodes into tmp_path/data: (exit code, stdout, stderr)."""

    def call(*paths, **flags):
        flags = {"out_dir": tmp_path / "data", "spm": spm, "workers": 1, "val_split": 0, **flags}
        words = [word for name, value in flags.items() for word in (f"--{name}", value)]
        return run(["prep", *(["--text_path", *paths] if paths else []), *words])

    return call


def write(path, data):
    """The path, after the data went there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


def read(path, mode="line", key="text", errors="strict"):
    """Every document that prep sees in a path."""
    return [
        text
        for source in lm.find_sources([str(path)], mode)
        for block in lm.read_blocks(source, key)
        for text in lm.block_documents(block, key, errors)
    ]


def split_ids(folder, split):
    """The ids of each document of a split, without <s> and </s>."""
    found = []
    for i in getattr(folder, split)[:].tolist():
        if i == lm.BOS:
            found.append([])
        else:
            found[-1].append(i)
    assert all(ids.pop() == lm.EOS and lm.EOS not in ids for ids in found)
    return found


def texts_of(folder, split):
    return [folder.tokenizer.decode(ids) for ids in split_ids(folder, split)]


def contents(folder):
    """A folder's files and their bytes."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def refused(result, *parts):
    """A command failed by the user's mistake, told in a sentence that holds these parts."""
    code, _, err = result
    assert code == 2 and "error: " in err and "fix: " in err and "Traceback" not in err, err
    assert not [part for part in parts if str(part) not in err], err


# ---- Documents of text files ----


@pytest.mark.parametrize(
    "data, expected",
    [
        (b"one\ntwo\n", ["one", "two"]),
        (b"one\ntwo", ["one", "two"]),
        (b"a\r\nb\r\n", ["a", "b"]),
        (b"\xef\xbb\xbfone\ntwo", ["one", "two"]),
        (b"\n\none\n \n\t\ntwo\n\n", ["one", "two"]),
        (b"  indented \n", ["  indented "]),
        (b"", []),
        (b"\n \r\n\t", []),
        (b"\xef\xbb\xbf", []),
        ("a\u2028b\x0cc\x85d\n".encode(), ["a\u2028b\x0cc\x85d"]),
        (b"a\rb\n", ["a\rb"]),
        (b"nul\0nul\n", ["nul\0nul"]),
    ],
)
def test_a_document_a_line(tmp_path, data, expected):
    assert read(write(tmp_path / "t.txt", data)) == expected


@pytest.mark.parametrize(
    "data, expected",
    [
        (b"a\nb\n\nc\n", ["a\nb", "c"]),
        (b"a\n\n\n\nb", ["a", "b"]),
        (b"\n\na\n\nb\n\n", ["a", "b"]),
        (b"a\n \t\nb", ["a", "b"]),
        (b"a\r\n\r\nb\r\n", ["a", "b"]),
        (b"a\n\n  \nb", ["a", "b"]),
        (b"a\n\n  b\n c\n", ["a", "  b\n c"]),
        (b" \n\na", ["a"]),
        (b"\xef\xbb\xbfa\n\nb", ["a", "b"]),
        (b"\n\n\n", []),
    ],
)
def test_documents_between_blank_lines(tmp_path, data, expected):
    assert read(write(tmp_path / "t.txt", data), "blank") == expected


def test_a_file_is_a_document(tmp_path):
    text = "\none\n\ntwo\r\n three\n\n"
    assert read(write(tmp_path / "t.txt", text), "file") == [text]
    assert read(write(tmp_path / "bom.txt", b"\xef\xbb\xbfone\n"), "file") == ["one\n"]


MIXED = st.lists(st.sampled_from(["a", "bé", "\n", "\n\n", "\r\n", " ", "\t", "\x0c"]), max_size=20)


@EVERY_MODE
def test_where_a_block_ends_changes_no_document(mode, tmp_path_factory):
    """Blocks of one byte to eight, against one block of it all."""
    path = tmp_path_factory.mktemp("blocks") / "t.txt"

    @given(MIXED.map("".join), st.integers(1, 8))
    @example("a\n\x0c\nb", 1)  # a form feed alone on its line, as in many old texts
    @example("a\n \t\r\nb\r\n\r\nc", 2)
    def check(text, size):
        path.write_bytes(text.encode())
        whole = read(path, mode)
        with mock.patch.object(lm, "BLOCK", size):
            assert read(path, mode) == whole

    check()


@EVERY_MODE
def test_a_document_longer_than_any_buffer_is_kept_whole(mode, tmp_path, monkeypatch):
    monkeypatch.setattr(lm, "BLOCK", 64)
    breaks = {"line": " ", "blank": "\n", "file": "\n\n"}[mode]
    long = breaks.join(TEXTS)
    rest = [] if mode == "file" else ["short", long[::-1].strip(), "end"]
    path = write(tmp_path / "t.txt", "\n\n".join([long, *rest]))
    assert read(path, mode) == [long, *rest]


def test_a_long_file_is_read_in_blocks_of_whole_lines(tmp_path, monkeypatch):
    monkeypatch.setattr(lm, "BLOCK", 100)
    (source,) = lm.find_sources([str(write(tmp_path / "t.txt", LINES))], "line")
    blocks = list(lm.read_blocks(source, "text"))
    longest = max(len(text.encode()) for text in TEXTS)
    assert len(blocks) > 10 and all(len(b.data) <= 101 + longest for b in blocks)
    assert [b.line for b in blocks] == [
        1 + LINES[: sum(len(c.data) for c in blocks[:i])].count(b"\n") for i in range(len(blocks))
    ]
    assert blocks[-1].read == len(LINES)


# ---- Packings ----


@pytest.mark.parametrize("suffix", [*PACK, ".GZ"])
def test_packed_text(tmp_path, suffix, monkeypatch):
    monkeypatch.setattr(lm, "BLOCK", 1000)
    path = write(tmp_path / f"t.txt{suffix}", PACK[suffix.lower()](LINES))
    assert read(path) == TEXTS
    assert read(path, "file") == [LINES.decode()]


@pytest.mark.parametrize("suffix", [".gz", ".xz", ".bz2", ".zst"])
def test_packed_files_written_one_after_the_other_are_read_to_the_end(tmp_path, suffix):
    data = PACK[suffix](b"one\n") + PACK[suffix](b"two\n") + PACK[suffix](b"three\n")
    assert read(write(tmp_path / f"t{suffix}", data)) == ["one", "two", "three"]


@pytest.mark.parametrize("suffix", [".gz", ".xz", ".bz2", ".zst"])
@pytest.mark.parametrize("damage", ["cut", "foreign", "flipped"])
def test_a_damaged_packing_is_named(prep, tmp_path, suffix, damage):
    """Nothing is worse than to train on the first half of a download and not to know."""
    rng = np.random.default_rng(0)
    data = bytearray(PACK[suffix](bytes(rng.integers(97, 123, 300_000, dtype=np.uint8)) + b"\n"))
    if damage == "flipped":
        data[len(data) // 2] ^= 255
    path = write(
        tmp_path / f"t.txt{suffix}",
        {
            "cut": bytes(data[: len(data) // 2]),
            "foreign": b"plain text\n",
            "flipped": bytes(data),
        }[damage],
    )
    refused(prep(path), path.name, "damaged")
    assert not (tmp_path / "data" / "meta.json").exists()


def rows(*values):
    return "".join(json.dumps(value) + "\n" for value in values)


def test_jsonl(tmp_path, monkeypatch):
    monkeypatch.setattr(lm, "BLOCK", 200)
    data = rows(*({"id": i, "text": text} for i, text in enumerate(TEXTS)))
    for name, packed in (
        ("t.jsonl", data.encode()),
        ("t.ndjson", data.encode()),
        ("t.jsonl.gz", gzip.compress(data.encode())),
        ("crlf.jsonl", b"\xef\xbb\xbf" + data.replace("\n", "\r\n\r\n").encode()),
    ):
        assert read(write(tmp_path / name, packed)) == TEXTS


def test_jsonl_documents_keep_newlines_and_lose_only_lone_surrogates(tmp_path):
    data = rows({"body": "one\n\ntwo\u2028"}, {"body": "  "}, {"body": ""}) + '{"body": "\\ud800x"}'
    assert read(write(tmp_path / "t.jsonl", data), key="body") == ["one\n\ntwo\u2028", "?x"]


@pytest.mark.parametrize(
    "row, said",
    [
        ('{"text": "x"', "not JSON"),
        ("plain", "not JSON"),
        ('["text"]', "not a JSON object"),
        ('{"body": "x", "id": 1}', "body, id"),
        ('{"text": 5}', "no text under the key 'text'"),
        ('{"text": null}', "no text under the key 'text'"),
        ('"text"', "not a JSON object"),
        ("[" * 100_000, "not JSON"),
    ],
    ids=["cut", "plain", "list", "key", "number", "null", "string", "deep"],
)
def test_a_bad_row_is_named_by_its_line(prep, tmp_path, monkeypatch, row, said):
    monkeypatch.setattr(lm, "BLOCK", 500)  # so that the line is not in the first block
    good = [json.dumps({"text": text}) for text in TEXTS]
    path = write(tmp_path / "t.jsonl", "\n".join([*good[:40], "", row, *good[40:]]))
    refused(prep(path), f"{path}, line 42", said)


def parquet(path, **columns):
    pyarrow.parquet.write_table(pyarrow.table(columns), path, row_group_size=7)
    return path


def test_parquet(tmp_path, prep):
    path = parquet(tmp_path / "t.parquet", id=list(range(61)), body=[TEXTS[0], None, *TEXTS[1:]])
    assert read(path, key="body") == TEXTS
    code, _, err = prep(path, text_key="body")
    assert code == 0, err
    assert texts_of(lm.TokenFolder(tmp_path / "data"), "train") == TEXTS
    refused(prep(path, out_dir=tmp_path / "other"), "no column text", "body")


@pytest.mark.parametrize(
    "values",
    [[1, 2], [b"\xff", b"x"], [["a"], ["b"]], [{"a": 1}, None]],
    ids=["numbers", "bytes", "lists", "rows"],
)
def test_a_parquet_column_of_no_text_is_the_users_mistake(prep, tmp_path, values):
    refused(prep(parquet(tmp_path / "t.parquet", text=values)), "t.parquet", "text")


@pytest.mark.parametrize("keep", [0, 100, -8])
def test_a_damaged_parquet_file_is_named(prep, tmp_path, keep):
    path = parquet(tmp_path / "t.parquet", text=TEXTS)
    path.write_bytes(path.read_bytes()[:keep])
    refused(prep(path), "t.parquet", "damaged")


@pytest.mark.parametrize(
    "name, modules",
    [
        ("t.txt.zst", ["pyarrow"]),
        ("t.parquet", ["pyarrow", "pyarrow.parquet"]),
    ],
)
def test_a_missing_package_is_one_sentence(prep, tmp_path, monkeypatch, name, modules):
    for module in modules:
        monkeypatch.setitem(sys.modules, module, None)
    result = prep(write(tmp_path / name, b"x"))
    refused(result, f"pip install {modules[0]}")
    assert result[2].count("error: ") == 1


# ---- Which files ----


def test_folders_are_read_in_order_without_hidden_files(tmp_path):
    for name in ("b.txt", "a.txt", "sub/c.txt", ".hidden", "sub/.git/x", ".cache/y.txt"):
        write(tmp_path / ".here" / name, Path(name).name + "\n")
    write(tmp_path / ".here" / "empty.txt", "")
    assert read(tmp_path / ".here") == ["a.txt", "b.txt", "c.txt"]


def test_globs_lists_and_names_that_look_like_globs(tmp_path):
    for name in ("a.txt", "b.txt", "c.md", "d[1].txt", "sub/e.txt"):
        write(tmp_path / name, name + "\n")
    assert read(tmp_path / "?.txt") == ["a.txt", "b.txt"]
    assert read(tmp_path / "**" / "e.txt") == ["sub/e.txt"]
    assert read(tmp_path / "d[1].txt") == ["d[1].txt"]
    found = lm.find_sources([str(tmp_path / "c.md"), str(tmp_path / "a.txt")], "line")
    assert [s.path.name for s in found] == ["c.md", "a.txt"]


def test_every_missing_path_is_told_at_once(prep, tmp_path):
    (tmp_path / "empty").mkdir()
    good = write(tmp_path / "t.txt", LINES)
    result = prep(tmp_path / "no1.txt", good, tmp_path / "no2*.txt", tmp_path / "empty", "")
    refused(result, "no1.txt does not exist", "no2*.txt", "empty does not exist or holds no file")
    assert result[2].count("error: ") == 4


@pytest.mark.parametrize("data", [b"", b"\n \n\r\n\t\n", b"\xef\xbb\xbf\n"])
@pytest.mark.parametrize("spm_too", [True, False], ids=["spm", "train"])
def test_input_without_a_word_is_the_users_mistake(run, spm, tmp_path, data, spm_too):
    path = write(tmp_path / "t.txt", data)
    flags = ["--tokenizer", spm] if spm_too else []
    refused(run(["prep", "--text_path", path, "--out_dir", tmp_path / "data", *flags]))
    assert os.listdir(tmp_path) == ["t.txt"] or not os.listdir(tmp_path / "data")


def test_standard_input(tmp_path, spm):
    """Through a real pipe, in a process of its own."""
    out = tmp_path / "data"
    done = subprocess.run(
        [
            sys.executable,
            lm.__file__,
            "prep",
            "--text_path",
            "-",
            "--out_dir",
            out,
            "--vocab_size",
            "330",
            "--val_split",
            "0",
            "--workers",
            "1",
        ],
        input=LINES,
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr.decode()
    assert texts_of(lm.TokenFolder(out), "train") == TEXTS
    assert sorted(os.listdir(out)) == sorted(lm.DATA_FILES)


def test_an_error_in_standard_input_names_it_and_no_temporary_file(prep, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"good\nb\xffd\n")))
    result = prep("-")
    refused(result, "line 2", "stdin")
    assert ".building" not in result[2]


def test_a_pipe_in_place_of_a_file_is_read_or_refused(prep, tmp_path):
    """`--text_path <(zcat docs.gz)`; a pipe can be read once and has no size."""
    reading, writing = os.pipe()
    os.write(writing, LINES[:4000])
    os.close(writing)
    code, _, err = prep(f"/dev/fd/{reading}")
    os.close(reading)
    if code == 0:
        texts = texts_of(lm.TokenFolder(tmp_path / "data"), "train")
        assert texts == LINES[:4000].decode().split("\n")
    else:
        refused((code, "", err), "/dev/fd/")


# ---- Invalid UTF-8 ----


@EVERY_MODE
@pytest.mark.parametrize("block", [64, 1 << 20])
def test_invalid_utf8_is_named_by_file_and_line(prep, tmp_path, monkeypatch, mode, block):
    monkeypatch.setattr(lm, "BLOCK", block)
    lines = LINES.split(b"\n")
    lines[36] = b"caf\xe9 " + lines[36]
    path = write(tmp_path / "latin.txt", b"\xef\xbb\xbf" + b"\n".join(lines))
    refused(prep(path, document=mode), f"{path}, line 37", "--errors replace")
    code, _, err = prep(path, document=mode, errors="replace")
    assert code == 0, err
    found = "\n".join(texts_of(lm.TokenFolder(tmp_path / "data"), "train"))
    assert found.count("\ufffd") == 1 and "caf\ufffd " in found


def test_invalid_utf8_is_found_while_the_tokenizer_trains_too(run, tmp_path):
    path = write(tmp_path / "t.txt", LINES + b"\xc3")
    refused(
        run(["prep", "--text_path", path, "--out_dir", tmp_path / "d", "--vocab_size", 330]),
        f"{path}, line 61",
    )


# ---- What stands in a data folder ----


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """A folder of input: a text, a packed .jsonl and a text with hostile documents."""
    folder = tmp_path_factory.mktemp("mixed")
    write(folder / "a.txt", LINES)
    more = list(documents(40, seed=12))
    write(
        folder / "b.jsonl.gz",
        gzip.compress(rows(*({"text": t + "\n\n" + t} for t in more)).encode()),
    )
    hostile = ["</s><s>", "<|user|> hi", " two  spaces ", "\tTab\0NUL", "🙂" * 30, "x" * 5000]
    write(folder / "c.txt", "\n".join(hostile))
    return folder, [*TEXTS, *(t + "\n\n" + t for t in more), *hostile]


@pytest.mark.parametrize("workers", [1, 2])
def test_ids_are_those_of_sentencepiece_in_the_order_of_the_input(
    prep, tmp_path, mixed, monkeypatch, workers
):
    monkeypatch.setattr(lm, "BLOCK", 300)
    folder, texts = mixed
    code, out, err = prep(folder, workers=workers)
    assert code == 0, err
    data = lm.TokenFolder(tmp_path / "data")
    assert split_ids(data, "train") == [data.tokenizer.sp.encode(text) for text in texts]
    assert data.meta["splits"]["train"] == {
        "tokens": len(data.train),
        "documents": len(texts),
        "bytes": sum(len(text.encode()) for text in texts),
    }
    assert f"{len(texts):,} documents" in out and sorted(os.listdir(tmp_path / "data")) == sorted(
        lm.DATA_FILES
    )


def test_meta_says_what_a_reader_needs(data_dir):
    meta = json.loads((data_dir / "meta.json").read_text())
    assert meta["format"] == lm.DATA_FORMAT and meta["dtype"] == "uint16"
    assert meta["vocab_size"] == 400
    assert meta["tokenizer_sha256"] == lm.sha256((data_dir / "tokenizer.model").read_bytes())
    for split, counts in meta["splits"].items():
        ids = np.fromfile(data_dir / f"{split}.bin", "<u2")
        assert counts["tokens"] == len(ids) and counts["documents"] == (ids == lm.BOS).sum()
        assert counts["documents"] == (ids == lm.EOS).sum() > 0


def test_one_worker_and_two_write_the_same_bytes(run, mixed, tmp_path, monkeypatch):
    monkeypatch.setattr(lm, "BLOCK", 300)
    for workers in (1, 2):
        code, _, err = run(
            [
                "prep",
                "--text_path",
                mixed[0],
                "--vocab_size",
                420,
                "--val_split",
                0.2,
                "--workers",
                workers,
                "--out_dir",
                tmp_path / f"w{workers}",
            ]
        )
        assert code == 0, err
    assert contents(tmp_path / "w1") == contents(tmp_path / "w2")


def test_ids_are_four_bytes_wide_where_two_do_not_hold_them(prep, tmp_path, monkeypatch):
    assert lm.token_dtype(65_535) == np.dtype("<u2") and lm.token_dtype(65_536) == np.dtype("<u4")
    monkeypatch.setattr(lm, "token_dtype", lambda size: np.dtype("<u4"))
    code, _, err = prep(write(tmp_path / "t.txt", LINES), val_split=0.2)
    assert code == 0, err
    data = lm.TokenFolder(tmp_path / "data")
    assert data.meta["dtype"] == "uint32" and data.train.dtype == np.dtype("<u4")
    assert sorted(texts_of(data, "train") + texts_of(data, "val")) == sorted(TEXTS)


def test_the_tokenizer_is_trained_on_the_text_and_reused_by_name(prep, spm, tmp_path):
    code, _, err = prep(write(tmp_path / "t.txt", LINES))
    assert code == 0, err
    assert (tmp_path / "data" / "tokenizer.model").read_bytes() == spm.read_bytes()


@pytest.mark.parametrize(
    "argv, said",
    [
        (["--vocab_size", "20000"], "use --vocab_size "),
        (["--vocab_size", "285"], "or more"),
        (["--tokenizer", "no/such.model"], "no/such.model"),
        (["--tokenizer", __file__], "test_prep.py"),
    ],
)
def test_a_bad_vocabulary_leaves_nothing_behind(run, tmp_path, argv, said):
    path, out = write(tmp_path / "t.txt", LINES), tmp_path / "data"
    refused(run(["prep", "--text_path", path, "--out_dir", out, *argv]), said)
    assert not out.exists() or not os.listdir(out)


def test_progress_lines_show_the_time_left(prep, tmp_path, monkeypatch):
    monkeypatch.setattr(lm, "LINE_EVERY_S", 0)
    monkeypatch.setattr(lm, "BLOCK", 1000)
    _, out, err = prep(write(tmp_path / "t.txt", LINES))
    lines = [line for line in err.splitlines() if line.startswith("encoding: ")]
    assert len(lines) > 3 and "s left" in lines[-3] and "%" in lines[0]
    assert "100%" in lines[-1] and "encoding: " not in out


# ---- The sample that the tokenizer is trained on ----


def sampled(path, megabytes, mode="line"):
    settings = lm.PrepSettings(sample_mb=megabytes, document=mode)
    return list(lm.sample_documents(lm.find_sources([str(path)], mode), settings))


def test_the_sample_is_bounded_spread_over_the_input_and_always_the_same(tmp_path):
    texts = [f"{i} {text}" for i, text in enumerate(documents(3000, seed=13))]
    path = write(tmp_path / "t.txt", "\n".join(texts))
    some = sampled(path, 0.05)
    assert sampled(path, 0.05) == some and set(some) < set(texts)
    size = sum(len(text.encode()) for text in some)
    assert 30_000 < size < 50_000 + max(len(text.encode()) for text in texts)
    where = [int(text.split()[0]) for text in some]
    assert where[0] < 300 and where[-1] > 2400 and sampled(path, 100) == texts


@EVERY_MODE
def test_a_few_documents_larger_than_the_sample_still_give_one(run, tmp_path, mode):
    """One novel of a megabyte and --sample_mb 0.01: its hash must not make it 'no text'."""
    path = write(tmp_path / "novel.txt", " ".join(documents(600, seed=14)))
    assert sampled(path, 0.01, mode)
    code, _, err = run(
        [
            "prep",
            "--text_path",
            path,
            "--out_dir",
            tmp_path / "d",
            "--vocab_size",
            330,
            "--sample_mb",
            0.01,
            "--document",
            mode,
            "--val_split",
            0,
        ]
    )
    assert code == 0, err


# ---- Train and val ----


def encoded(texts, spm, val_split):
    block = lm.TextBlock(lm.Source(Path("t"), "parquet", "t", 0), 1, texts, 0)
    return lm.encode_block(block, str(spm), lm.PrepSettings(val_split=val_split))


def count(packed):
    return len(packed.ends)


def test_the_split_has_its_share_and_depends_on_the_content_alone(spm):
    texts = [f"document {i}" for i in range(4000)]
    splits = encoded(texts, spm, 0.2)
    assert count(splits["train"]) + count(splits["val"]) == 4000
    assert abs(count(splits["val"]) - 800) < 5 * math.sqrt(4000 * 0.2 * 0.8)
    apart = [count(encoded([text], spm, 0.2)["val"]) for text in texts[:200]]
    assert sum(apart) == count(encoded(texts[:200][::-1], spm, 0.2)["val"]) > 0
    assert [count(encoded([text], spm, 0.2)["val"]) for text in texts[:200]] == apart


def test_a_larger_share_only_adds_to_val(spm):
    val = [
        {t for t in TEXTS if count(encoded([t], spm, share)["val"])}
        for share in (0.0, 0.1, 0.3, 0.6)
    ]
    assert not val[0] and val[0] <= val[1] < val[2] < val[3]


def test_a_duplicate_never_straddles_the_split(prep, tmp_path):
    for i, times in enumerate((1, 3, 2)):
        write(tmp_path / "in" / f"{i}.txt", LINES * times)
    code, _, err = prep(tmp_path / "in", val_split=0.3)
    assert code == 0, err
    data = lm.TokenFolder(tmp_path / "data")
    train, val = texts_of(data, "train"), texts_of(data, "val")
    assert set(train).isdisjoint(val) and train and val
    assert collections.Counter(train + val) == collections.Counter(TEXTS * 6)


def test_a_split_that_leaves_nothing_to_train_on_is_the_users_mistake(prep, tmp_path):
    refused(prep(write(tmp_path / "t.txt", "one\n"), val_split=0.999999), "--val_split")
    assert not (tmp_path / "data" / "meta.json").exists()


# ---- Interrupted, failed, repeated ----


@pytest.fixture
def finished(prep, tmp_path):
    """A finished folder, and a new input that is about to replace it."""
    code, _, err = prep(write(tmp_path / "old.txt", LINES))
    assert code == 0, err
    return tmp_path / "data", write(tmp_path / "new.txt", "something new\n" * 50)


def test_a_finished_folder_is_not_replaced_unasked(prep, finished):
    out, new = finished
    before = contents(out)
    refused(prep(new), str(out), "--overwrite")
    refused(prep(new, overwrite=0), "--overwrite")
    assert contents(out) == before
    assert prep(new, overwrite=1)[0] == 0
    assert texts_of(lm.TokenFolder(out), "train") == ["something new"] * 50


def test_a_folder_may_be_made_anew_with_its_own_tokenizer(prep, finished):
    out, new = finished
    assert prep(new, overwrite=1, spm=out / "tokenizer.model")[0] == 0
    assert texts_of(lm.TokenFolder(out), "train") == ["something new"] * 50


def test_a_worker_that_is_killed_for_memory_leaves_the_old_folder_as_it_was(child, spm, finished):
    out, new = finished
    before = contents(out)
    code, log = child(
        [
            "prep",
            "--text_path",
            new,
            "--out_dir",
            out,
            "--tokenizer",
            spm,
            "--workers",
            2,
            "--overwrite",
        ],
        (signal_at, "block_documents", 1),
    ).end()
    assert code == 2 and "error: " in log and "Traceback" not in log, log
    assert contents(out) == before


@pytest.mark.parametrize("where", ["encode_sources", "write_meta", "install", "in_order"])
@pytest.mark.parametrize(
    "fault, code",
    [
        (KeyboardInterrupt(), 130),
        (OSError(28, "No space left on device"), 2),
        (lm.UserError("what", "how"), 2),
    ],
)
def test_a_failure_leaves_the_old_folder_as_it_was(prep, finished, monkeypatch, where, fault, code):
    out, new = finished
    before = contents(out)
    monkeypatch.setattr(lm, where, mock.Mock(side_effect=fault))
    assert prep(new, overwrite=1)[0] == code
    assert contents(out) == before and len(lm.TokenFolder(out).train)


def test_a_worker_that_finds_bad_input_leaves_the_old_folder_as_it_was(prep, finished):
    out, new = finished
    before = contents(out)
    refused(prep(write(new, b"good\n" * 1000 + b"\xff"), overwrite=1, workers=2), "line 1001")
    assert contents(out) == before


@pytest.mark.parametrize(
    "place, nth, usable",
    [
        ("Progress.update", 1, True),
        ("write_meta", 1, True),
        ("os.replace", 3, True),
        ("os.replace", 4, False),
        ("os.replace", 7, False),
        ("fsync_folder", 4, True),
    ],
)
def test_a_kill_leaves_no_folder_that_looks_finished_and_is_not(
    child, prep, spm, finished, place, nth, usable
):
    """The renames 4 to 7 put the four files in place; before them the old data are whole."""
    out, new = finished
    code, log = child(
        [
            "prep",
            "--text_path",
            new,
            "--out_dir",
            out,
            "--tokenizer",
            spm,
            "--workers",
            1,
            "--val_split",
            0,
            "--overwrite",
        ],
        (signal_at, place, nth),
    ).end()
    assert code == -signal.SIGKILL, log
    if usable:
        assert len(texts_of(lm.TokenFolder(out), "train")) in (50, 60)
    else:
        with pytest.raises(lm.UserError, match="not finished"):
            lm.TokenFolder(out)
    assert prep(new, overwrite=1)[0] == 0
    assert sorted(os.listdir(out)) == sorted(lm.DATA_FILES)


def processes_of(log):
    """The processes that still have a child's log open."""
    found = set()
    for link in glob.glob("/proc/[0-9]*/fd/*"):
        try:
            if os.readlink(link) == str(log):
                found.add(int(link.split("/")[2]))
        except OSError:
            continue
    return found


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="reads /proc")
@pytest.mark.parametrize(
    "number, expected",
    [(signal.SIGINT, 130), (signal.SIGTERM, -signal.SIGTERM), (signal.SIGKILL, -signal.SIGKILL)],
)
def test_a_stopped_prep_leaves_no_process_running(child, spm, tmp_path, number, expected):
    path, out = write(tmp_path / "t.txt", LINES), tmp_path / "data"
    made = child(
        ["prep", "--text_path", path, "--out_dir", out, "--tokenizer", spm, "--workers", 2],
        (signal_at, "Progress.update", 1, number),
    )
    code, log = made.end()
    assert code in (expected, 128 + number), log
    assert "Traceback" not in log and not (out / "meta.json").exists()
    for _ in range(30):
        left = processes_of(made.log)
        if not left:
            break
        time.sleep(0.1)
    for process in left:
        os.kill(process, signal.SIGKILL)
    assert not left


def slow_tokenizer(lm, seconds):
    """Stand in for a long training of the tokenizer, with Ctrl-C pressed in the middle."""
    lm.train_tokenizer = lambda *args: time.sleep(seconds)
    threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGINT)).start()


def test_ctrl_c_does_not_wait_for_the_tokenizer(child, tmp_path):
    path, out = write(tmp_path / "t.txt", LINES), tmp_path / "data"
    made = child(
        ["prep", "--text_path", path, "--out_dir", out, "--workers", 1], (slow_tokenizer, 15)
    )
    began = time.monotonic()
    code, log = made.end()
    for process in processes_of(made.log):
        os.kill(process, signal.SIGKILL)
    assert code == 130, log
    assert time.monotonic() - began < 12 and not (out / "meta.json").exists()


@pytest.mark.parametrize("place", ["under a file", "a file", "a full disk"])
def test_a_folder_that_cannot_be_written_is_the_users_mistake(prep, tmp_path, monkeypatch, place):
    path = write(tmp_path / "t.txt", LINES)
    out = {"under a file": path / "data", "a file": path}.get(place, tmp_path / "data")
    if place == "a full disk":
        full = OSError(28, "No space left on device")
        monkeypatch.setattr(lm.os, "fsync", mock.Mock(side_effect=full))
    refused(prep(path, out_dir=out), {"a full disk": "no space left"}.get(place, "t.txt"))


# ---- Shards ----


@pytest.mark.parametrize("parts, files", [(2, 3), (3, 3), (4, 1), (1, 2)])
def test_the_shards_together_are_the_whole(prep, tmp_path, monkeypatch, parts, files):
    monkeypatch.setattr(lm, "BLOCK", 400)
    for i in range(files):
        write(tmp_path / "in" / f"{i}.txt", "\n".join(TEXTS[i::files]))
    for i in range(parts):
        code, _, err = prep(tmp_path / "in", shard=f"{i}/{parts}", val_split=0.2)
        assert code == 0, err
        assert not (tmp_path / "data" / "meta.json").exists()
    assert prep(merge=1)[0] == 0
    assert sorted(os.listdir(tmp_path / "data")) == sorted(lm.DATA_FILES)
    assert prep(tmp_path / "in", out_dir=tmp_path / "whole", val_split=0.2)[0] == 0
    merged, whole = (lm.TokenFolder(tmp_path / name) for name in ("data", "whole"))
    assert merged.meta == whole.meta
    for split in ("train", "val"):
        assert sorted(texts_of(merged, split)) == sorted(texts_of(whole, split))


def test_more_shards_than_blocks_merge_all_the_same(prep, tmp_path):
    path = write(tmp_path / "t.txt", LINES)
    assert [prep(path, shard=f"{i}/3")[0] for i in range(3)] == [0, 0, 0]
    assert prep(merge=1)[0] == 0
    assert texts_of(lm.TokenFolder(tmp_path / "data"), "train") == TEXTS


def test_a_missing_shard_is_named(prep, tmp_path):
    refused(prep(merge=1), "no shard")
    path = write(tmp_path / "t.txt", LINES)
    for i in (0, 2):
        assert prep(path, shard=f"{i}/4")[0] == 0
    refused(prep(merge=1), "shard-00001-of-00004", "shard-00003-of-00004")
    refused(prep(path, shard="2/4"), "--overwrite")
    assert prep(path, shard="2/4", overwrite=1)[0] == 0
    assert not (tmp_path / "data" / "meta.json").exists()


def test_the_last_shard_missing_is_named_too(prep, tmp_path):
    path = write(tmp_path / "t.txt", LINES)
    assert prep(path, shard="0/2")[0] == 0
    refused(prep(merge=1), "shard-00001-of-00002")


def test_shards_of_two_partitions_are_never_joined(prep, tmp_path):
    """0/1 is whole by itself and 0/2 is left over: which one did the user mean?"""
    path = write(tmp_path / "t.txt", LINES)
    assert prep(path, shard="0/1")[0] == 0 and prep(path, shard="0/2")[0] == 0
    refused(prep(merge=1), "of-00001", "of-00002")


def test_shards_of_two_tokenizers_are_not_joined(prep, tmp_path):
    path, other = write(tmp_path / "t.txt", LINES), tmp_path / "other.model"
    other.write_bytes(lm.train_tokenizer(TEXTS, 330))
    assert prep(path, shard="0/2")[0] == 0
    assert prep(path, shard="1/2", spm=other)[0] == 0
    refused(prep(merge=1), "tokenizer")
    assert len(os.listdir(tmp_path / "data")) == 2


def test_a_damaged_shard_is_not_joined(prep, tmp_path):
    path = write(tmp_path / "t.txt", LINES)
    assert prep(path, shard="0/1")[0] == 0
    part = tmp_path / "data" / "shard-00000-of-00001" / "train.bin"
    part.write_bytes(part.read_bytes()[:-2])
    refused(prep(merge=1), str(part))
    assert part.exists()


@pytest.mark.parametrize("shard", ["4/4", "1", "a/b", "-1/2", "1/2/3", "0/0", "1.0/2", "1/-2"])
def test_a_bad_shard_is_the_users_mistake(run, spm, tmp_path, shard):
    path, out = write(tmp_path / "t.txt", LINES), tmp_path / "data"
    refused(
        run(
            ["prep", "--text_path", path, "--out_dir", out, f"--shard={shard}", "--tokenizer", spm]
        ),
        f"--shard {shard}",
    )
    assert not out.exists()


# ---- Reading a data folder ----


def set_meta(**values):
    """A change of some keys of meta.json."""

    def change(folder):
        meta = json.loads((folder / "meta.json").read_text())
        (folder / "meta.json").write_text(json.dumps({**meta, **values}))

    return change


def drop_meta(key):
    def change(folder):
        meta = json.loads((folder / "meta.json").read_text())
        del meta[key]
        (folder / "meta.json").write_text(json.dumps(meta))

    return change


def set_last_id(folder):
    ids = np.fromfile(folder / "train.bin", "<u2")
    ids[-1] = 400
    ids.tofile(folder / "train.bin")


def cut(name, change):
    def damage(folder):
        (folder / name).write_bytes(change((folder / name).read_bytes()))

    return damage


DAMAGES = {
    "no meta": (lambda f: (f / "meta.json").unlink(), "is not finished"),
    "no folder": (shutil.rmtree, "does not exist"),
    "empty meta": (cut("meta.json", lambda data: b""), "not valid JSON"),
    "cut meta": (cut("meta.json", lambda data: data[:-5]), "not valid JSON"),
    "meta of a list": (cut("meta.json", lambda data: b"[]"), "not a JSON object"),
    "no format": (drop_meta("format"), "format"),
    "newer format": (set_meta(format=99), "99"),
    "no dtype": (drop_meta("dtype"), "meta.json"),
    "odd dtype": (set_meta(dtype="float99"), "meta.json"),
    "float dtype": (set_meta(dtype="float16"), "meta.json"),
    "no splits": (drop_meta("splits"), "meta.json"),
    "no hash": (drop_meta("tokenizer_sha256"), "meta.json"),
    "short bin": (cut("train.bin", lambda data: data[:-2]), "train.bin"),
    "odd bin": (cut("val.bin", lambda data: data[:-1]), "val.bin"),
    "long bin": (cut("train.bin", lambda data: data + data), "train.bin"),
    "empty bin": (cut("train.bin", lambda data: b""), "train.bin"),
    "no bin": (lambda f: (f / "val.bin").unlink(), "val.bin"),
    "other dtype": (set_meta(dtype="uint32"), "dtype uint32"),
    "bad id": (set_last_id, "beyond the vocabulary of 400"),
    "smaller vocabulary": (set_meta(vocab_size=300), "vocab_size 300"),
    "larger vocabulary": (set_meta(vocab_size=500), "vocab_size 500"),
    "no tokenizer": (lambda f: (f / "tokenizer.model").unlink(), "tokenizer.model"),
    "cut tokenizer": (cut("tokenizer.model", lambda data: data[:-9]), "tokenizer.model"),
    "other tokenizer": (
        lambda f: (f / "tokenizer.model").write_bytes(lm.train_tokenizer(TEXTS, 330)),
        "restore the original tokenizer.model",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_what_is_wrong_with_a_folder_is_said(run, data_dir, tmp_path, name):
    folder = tmp_path / "data"
    shutil.copytree(data_dir, folder)
    damage, said = DAMAGES[name]
    damage(folder)
    with pytest.raises(lm.UserError, match=said) as caught:
        lm.TokenFolder(folder)
    assert str(folder) in str(caught.value)
    refused(run(["train", "--data_dir", folder, "--out_dir", tmp_path / "run"]), said)
    assert not (tmp_path / "run").exists()


HOSTILE = (None, "text", "", -1, 0, 1.5, True, [], [1], {}, {"tokens": "x"}, 10**30)


def test_any_value_in_meta_json_is_read_or_told_by_its_field(run, data_dir, tmp_path):
    folder = tmp_path / "data"
    shutil.copytree(data_dir, folder)
    meta = json.loads((folder / "meta.json").read_text())
    paths = [(key,) for key in meta] + [("splits", name) for name in meta["splits"]]
    paths += [("splits", "val", key) for key in meta["splits"]["val"]]
    told = 0
    for path in paths:
        for hostile in HOSTILE:
            changed = copy.deepcopy(meta)
            target = changed
            for part in path[:-1]:
                target = target[part]
            target[path[-1]] = hostile
            (folder / "meta.json").write_text(json.dumps(changed))
            try:
                lm.TokenFolder(folder)
            except lm.UserError as fault:
                assert "meta.json" in str(fault) or str(folder) in str(fault)
                told += 1
    assert told > 60


def test_a_sound_folder_is_described(run, data_dir):
    code, out, err = run(["info", data_dir])
    assert code == 0, err
    meta = json.loads((data_dir / "meta.json").read_text())
    for counts in meta["splits"].values():
        assert all(f"{count:,} {what}" in out for what, count in counts.items())
    assert "vocabulary 400" in out


def test_reading_changes_nothing(data_dir):
    before = contents(data_dir)
    folder = lm.TokenFolder(data_dir)
    with pytest.raises(ValueError, match="read-only"):
        folder.train[:4][0] = 5
    assert contents(data_dir) == before


# ---- What a folder or a name of other people holds ----


def test_what_describes_a_data_set_is_no_text_of_it(prep, tmp_path):
    folder = tmp_path / "set"
    write(folder / "a.txt", LINES)
    for name in ("README.md", "readme.txt", "LICENSE", "CITATION.cff", ".hidden"):
        write(folder / name, "This must not be learned.\n")
    code, _, err = prep(folder)
    assert code == 0, err
    assert texts_of(lm.TokenFolder(tmp_path / "data"), "train") == TEXTS
    code, _, err = prep(folder / "README.md", out_dir=tmp_path / "named")
    assert code == 0, err
    named = texts_of(lm.TokenFolder(tmp_path / "named"), "train")
    assert named == ["This must not be learned."]


@pytest.mark.parametrize("form", ["list", "lines"])
def test_json_is_read_as_rows_and_never_as_text(form, prep, tmp_path):
    rows = [{"text": text} for text in TEXTS]
    text = json.dumps(rows)
    if form == "lines":
        text = "".join(json.dumps(row) + "\n" for row in rows)
    code, _, err = prep(write(tmp_path / "rows.json", text))
    assert code == 0, err
    assert texts_of(lm.TokenFolder(tmp_path / "data"), "train") == TEXTS


def test_parquet_strings_in_a_dictionary_are_read(prep, tmp_path):
    column = pyarrow.array(TEXTS).dictionary_encode()
    path = tmp_path / "t.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), path)
    code, _, err = prep(path)
    assert code == 0, err
    assert texts_of(lm.TokenFolder(tmp_path / "data"), "train") == TEXTS


def test_a_wrong_key_is_told_before_a_tokenizer_is_trained(run, tmp_path):
    rows = "".join(json.dumps({"content": text}) + "\n" for text in TEXTS)
    path = write(tmp_path / "rows.jsonl", rows)
    words = ["--text_path", path, "--out_dir", tmp_path / "data", "--vocab_size", 300]
    result = run(["prep", *words])
    refused(result, "content")
    assert "tokenizer" not in result[1].lower()


def test_the_name_of_a_data_set_on_the_hub_is_recognised(prep):
    refused(prep("roneneldan/TinyStories"), "'hf://datasets/roneneldan/TinyStories/**/*.parquet'")


@pytest.mark.parametrize("damage", ["cut", "no text in a row"])
def test_a_fault_met_while_the_tokenizer_trains_is_told_as_itself(damage, run, tmp_path):
    """Deep in the input, behind what any probe reads; never as a fault of --vocab_size."""
    rows = "".join(json.dumps({"text": text}) + "\n" for text in documents(4000, seed=3))
    path, said = tmp_path / "rows.jsonl", "rows.jsonl, line 4001"
    if damage == "cut":
        path, said = tmp_path / "rows.jsonl.gz", "rows.jsonl.gz is damaged"
        write(path, gzip.compress(rows.encode())[:-2000])
    else:
        write(path, rows + '{"no": 1}\n')
    words = ["--text_path", path, "--out_dir", tmp_path / "data", "--vocab_size", 400]
    result = run(["prep", *words, "--workers", 1])
    refused(result, said)
    assert "--vocab_size" not in result[2]


def touched(path, data):
    path.write_bytes(data)
    os.utime(path, ns=(1, 1))


@pytest.mark.parametrize("change", ["shrunk", "grown", "other ids"])
def test_a_file_that_changes_under_a_reader_is_a_sentence(data_dir, tmp_path, change):
    """A memory map of a file cut short ends the process by SIGBUS."""
    out = shutil.copytree(data_dir, tmp_path / "data")
    path, ids = out / "train.bin", lm.TokenFolder(out).train
    before, data = ids[:].copy(), path.read_bytes()
    touched(path, data)
    assert (ids[:] == before).all(), "what is only touched is the same"
    changed = {"shrunk": data[:100], "grown": data + data, "other ids": data[::-1]}[change]
    touched(path, changed)
    os.utime(path)
    with pytest.raises(lm.UserError, match="train.bin has changed"):
        ids[len(ids) - 20 :]


def test_a_file_replaced_under_a_reader_stays_what_it_was(data_dir, tmp_path):
    out = shutil.copytree(data_dir, tmp_path / "data")
    ids = lm.TokenFolder(out).train
    before = ids[:].copy()
    (out / "new.bin").write_bytes(bytes(len(ids) * 2))
    os.replace(out / "new.bin", out / "train.bin")
    assert (ids[:] == before).all()


@pytest.mark.parametrize("part", [(0, 5), (7, 8), (3, 3), (-9, None), (0, 10**9), (None, None)])
def test_a_slice_of_a_file_is_that_of_its_array(data_dir, part):
    ids = lm.TokenFolder(data_dir).train
    whole = np.fromfile(data_dir / "train.bin", "<u2")
    for step in (1, 3):
        assert np.array_equal(ids[slice(*part, step)], whole[slice(*part, step)])


def test_sigterm_leaves_no_half_built_folder(child, corpus, tmp_path):
    flags = ["--text_path", corpus, "--out_dir", tmp_path / "data", "--vocab_size", 400]
    for what in ("build_data", "write_meta"):  # before the work, and behind its worker processes
        one = child(["prep", *flags], (signal_at, what, 1, signal.SIGTERM))
        code, told = one.end()
        assert code == 128 + signal.SIGTERM and "Traceback" not in told, told
        assert not [*(tmp_path / "data").glob(".building*")]


def test_an_arrow_file_says_how_it_comes_in(prep, tmp_path):
    (tmp_path / "data-00000-of-00001.arrow").write_bytes(b"\xff\xff\xff\xffx")
    code, _, err = prep(tmp_path / "data-00000-of-00001.arrow")
    assert code == 2 and "is in Arrow's form" in err and "to_parquet()" in err
