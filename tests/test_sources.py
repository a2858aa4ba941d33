"""prep's text from servers and buckets, mixtures of corpora, and files of token ids."""

import gzip
import http.server
import json
import os
import re
import struct
import threading
import urllib.parse

import numpy as np
import pytest
from conftest import complaint, documents

import standalone_transformer_lm as lm

fsspec = pytest.importorskip("fsspec")
pytest.importorskip("aiohttp")

TEXTS = list(documents(400, 1))
LINES = "".join(text + "\n" for text in TEXTS)


class Server(http.server.ThreadingHTTPServer):
    """Gives the files of a folder, whole or in parts, and breaks off when it is told to."""

    def __init__(self, folder):
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder = folder
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.parts = True  # whether it gives parts of files
        self.breaks = 0  # how many more answers are cut short
        self.refusals = 0  # how many more are an error of the server
        self.sent = 0  # bytes of files
        self.asked = []
        self.lock = threading.Lock()

    def handle_error(self, request, client_address):
        pass  # a client that reads no further


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, body):
        server = self.server
        path = server.folder / urllib.parse.unquote(self.path.partition("?")[0]).strip("/")
        if not path.exists():
            self.send_error(404)
            return
        if path.is_dir():
            names = sorted(p.name + "/" * p.is_dir() for p in path.iterdir())
            data = "".join(f'<a href="{name}">{name}</a>\n' for name in names).encode()
            self.give(200, data, {"Content-Type": "text/html"}, body)
            return
        data = path.read_bytes()
        status, headers = 200, {"Content-Type": "application/octet-stream"}
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if server.parts:
            headers["Accept-Ranges"] = "bytes"
            if asked:
                end = min(int(asked[2] or len(data) - 1), len(data) - 1)
                headers["Content-Range"] = f"bytes {asked[1]}-{end}/{len(data)}"
                status, data = 206, data[int(asked[1]) : end + 1]
        with server.lock:
            server.asked.append((self.command, self.path, self.headers.get("Range", "")))
            broken = body and server.breaks > 0
            refused = body and not broken and server.refusals > 0
            server.breaks -= broken
            server.refusals -= refused
        if refused:
            self.send_error(503)
            return
        self.give(status, data, headers, body, broken)

    def give(self, status, data, headers, body, broken=False):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if body:
            sent = data[: len(data) // 2] if broken else data
            with self.server.lock:
                self.server.sent += len(sent)
            self.wfile.write(sent)
        self.close_connection = broken


@pytest.fixture
def server(tmp_path, monkeypatch):
    folder = tmp_path / "served"
    folder.mkdir()
    monkeypatch.setattr(lm.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(lm, "BLOCK", 1 << 12)
    server = Server(folder)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    fsspec.filesystem("http").invalidate_cache()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="session")
def spm(tmp_path_factory, tiny_tokenizer):
    path = tmp_path_factory.mktemp("spm") / "tokenizer.model"
    path.write_bytes(tiny_tokenizer)
    return path


@pytest.fixture
def prep(run, tmp_path, spm):
    """Calls prep with a tokenizer at hand, and returns its exit code, output and errors."""

    def call(*paths, out="data", **flags):
        flags = {"val_split": 0.1, "workers": 1, "tokenizer": spm, **flags}
        words = [w for k, v in flags.items() if v is not None for w in (f"--{k}", str(v))]
        paths = [str(path) for path in paths]
        return run(["prep", "--text_path", *paths, "--out_dir", str(tmp_path / out), *words])

    return call


def same_data(one, other):
    names = ("train.bin", "val.bin", "meta.json", "tokenizer.model")
    return all((one / name).read_bytes() == (other / name).read_bytes() for name in names)


def prepared(prep, tmp_path, *paths, out="data", **flags):
    code, _, err = prep(*paths, out=out, **flags)
    assert code == 0, err
    return tmp_path / out


# ---- Text behind a URL ----


def test_a_folder_glob_and_file_on_a_server_give_what_the_same_files_here_give(
    server, prep, tmp_path
):
    third = len(TEXTS) // 3
    (server.folder / "sub").mkdir()
    (server.folder / "a.txt").write_text("\n".join(TEXTS[:third]))
    rows = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS[third : 2 * third])
    (server.folder / "sub" / "b.jsonl.gz").write_bytes(gzip.compress(rows.encode()))
    (server.folder / "c.txt").write_text("\n".join(TEXTS[2 * third :]))
    (server.folder / "README.md").write_text("no data")
    here = prepared(prep, tmp_path, server.folder, out="here")
    there = prepared(prep, tmp_path, server.url + "/", out="there")
    assert same_data(here, there)
    glob = prepared(prep, tmp_path, server.url + "/*.txt", server.url + "/sub/*.gz", out="glob")
    files = prepared(
        prep, tmp_path, *(server.folder / n for n in ("a.txt", "c.txt", "sub/b.jsonl.gz")), out="f"
    )
    assert same_data(glob, files)
    one = prepared(prep, tmp_path, server.url + "/a.txt?download=true", out="one")
    assert same_data(one, prepared(prep, tmp_path, server.folder / "a.txt", out="one_here"))


@pytest.mark.parametrize("parts", [True, False])
def test_a_connection_that_breaks_is_taken_up_where_it_was(server, prep, tmp_path, parts):
    (server.folder / "a.txt").write_text(LINES)
    here = prepared(prep, tmp_path, server.folder / "a.txt", out="here")
    server.parts = parts
    server.breaks, server.refusals = 3, 1
    there = prepared(prep, tmp_path, server.url + "/a.txt", out="there")
    assert same_data(here, there)
    assert server.breaks == server.refusals == 0


def test_a_server_that_stays_broken_is_told_in_a_sentence(server, prep):
    (server.folder / "a.txt").write_text(LINES)
    server.breaks = 10**6
    complaint(prep(server.url + "/a.txt"), "cannot be read", "tries", "connection")
    complaint(prep(server.url + "/none.txt"), "does not exist")
    complaint(prep(server.url + "/none/*.txt"), "does not exist")
    complaint(prep("nonsense://x"), "cannot be opened", "install the package")


def test_parquet_is_read_in_parts_and_says_so_where_it_cannot_be(server, prep, tmp_path):
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    noise = [str(np.random.default_rng(i).bytes(2000)) for i in range(400)]
    table = pa.table({"title": noise, "content": TEXTS})
    parquet.write_table(table, server.folder / "a.parquet", row_group_size=100)
    flags = {"text_key": "content"}
    here = prepared(prep, tmp_path, server.folder / "a.parquet", out="here", **flags)
    there = prepared(prep, tmp_path, server.url + "/a.parquet", out="there", **flags)
    assert same_data(here, there)
    server.parts = False
    complaint(prep(server.url + "/a.parquet", out="no", **flags), "does not give parts")


def test_text_is_streamed_block_by_block_and_ends_early(server, prep, tmp_path):
    (server.folder / "a.txt").write_text(LINES * 300)
    size = (server.folder / "a.txt").stat().st_size
    data = prepared(prep, tmp_path, server.url + "/a.txt", max_tokens=2000)
    assert server.sent < size / 10
    meta = json.loads((data / "meta.json").read_text())
    longest = max(len(text.encode()) for text in TEXTS)
    assert 2000 <= meta["splits"]["train"]["tokens"] <= 2000 + longest
    server.sent = 0
    data = prepared(
        prep,
        tmp_path,
        server.url + "/a.txt",
        out="own",
        max_tokens=2000,
        tokenizer=None,
        vocab_size=400,
        sample_mb=0.02,
    )
    assert server.sent < size / 5  # the sample is taken of the file's beginning
    assert lm.TokenFolder(data).tokenizer.vocab_size == 400


def test_rows_of_sft_are_read_from_memory_and_servers(server):
    rows = [{"prompt": f"q{i}", "response": f"a{i}"} for i in range(9)]
    data = "".join(json.dumps(row) + "\n" for row in rows)
    (server.folder / "rows.jsonl").write_text(data)
    fsspec.filesystem("memory").pipe("/rows.json", json.dumps(rows).encode())
    for url in (server.url + "/rows.jsonl", "memory://rows.json"):
        assert lm.read_rows([url], dict, "error") == rows


def test_memory_files_and_globs(prep, tmp_path):
    files = fsspec.filesystem("memory")
    files.pipe("/corpus/x/a.txt", "\n".join(TEXTS[:200]).encode())
    files.pipe("/corpus/x/b.txt", "\n".join(TEXTS[200:]).encode())
    files.pipe("/corpus/.hidden.txt", b"no")
    (tmp_path / "all.txt").write_text(LINES)
    here = prepared(prep, tmp_path, tmp_path / "all.txt", out="here")
    for i, url in enumerate(("memory://corpus", "memory://corpus/**/*.txt")):
        assert same_data(here, prepared(prep, tmp_path, url, out=f"there{i}"))


def test_a_protocol_whose_package_is_missing_is_named(prep, monkeypatch):
    from fsspec.implementations import http as protocol

    def without(*_, **__):
        raise ImportError('HTTPFileSystem requires "requests" and "aiohttp" to be installed')

    monkeypatch.setattr(protocol.HTTPFileSystem, "_get_kwargs_from_urls", without)
    complaint(prep("https://example.com/a.txt"), "aiohttp")


# ---- Mixtures ----


def ids_of(folder):
    return lm.TokenFolder(folder).train[:].tolist()


def domains_of(folder):
    """'a' or 'b' of each document in order, and its tokens."""
    tokenizer = lm.TokenFolder(folder).tokenizer
    found, ids = [], []
    for i in ids_of(folder):
        ids.append(i)
        if i == lm.EOS:
            found.append((tokenizer.decode(ids)[0], len(ids)))
            ids = []
    return found


@pytest.fixture
def two(tmp_path):
    (tmp_path / "a.txt").write_text("".join(f"a {text}\n" for text in TEXTS * 5))
    (tmp_path / "b.txt").write_text("".join(f"b {text[:60]}\n" for text in TEXTS))
    return f"a={tmp_path}/a.txt:3", f"b={tmp_path}/b.txt:1"


def test_a_mixture_has_its_shares_at_every_place(prep, tmp_path, two, monkeypatch):
    data = prepared(prep, tmp_path, *two)
    taken = {"a": 0, "b": 0}
    longest = 0
    for name, count in domains_of(data):
        taken[name] += count
        longest = max(longest, count)
        assert abs(taken["a"] - 3 * taken["b"]) <= 4 * longest
    b = prepared(prep, tmp_path, tmp_path / "b.txt", out="b")
    assert taken["b"] == len(ids_of(b))  # the scarce part is used up
    monkeypatch.setattr(lm, "BLOCK", 1 << 12)
    small = prepared(prep, tmp_path, *two, out="small", workers=2)
    assert ids_of(small) == ids_of(data)


def test_a_mixture_ends_at_max_tokens_and_says_what_it_took(prep, tmp_path, two):
    code, out, err = prep(*two, max_tokens=3000)
    assert code == 0, err
    assert re.search(r"tokens of a [\d.]+K \(7\d\.\d%\), b \d+ \(2\d\.\d%\)", out), out
    assert "used up" not in out
    assert 3000 <= len(ids_of(tmp_path / "data")) < 3200
    _, out, _ = prep(*two, out="whole")
    assert "b is used up" in out


def test_a_part_of_a_mixture_may_come_through_a_pipe(prep, tmp_path, two):
    data = prepared(prep, tmp_path, *two)
    os.mkfifo(tmp_path / "pipe")
    text = (tmp_path / "b.txt").read_bytes()
    threading.Thread(target=(tmp_path / "pipe").write_bytes, args=(text,), daemon=True).start()
    piped = prepared(prep, tmp_path, two[0], f"b={tmp_path}/pipe:1", out="piped")
    assert ids_of(piped) == ids_of(data)


def test_faults_of_a_mixture_are_told(prep, tmp_path, two):
    complaint(prep(two[0], tmp_path / "b.txt"), "is not NAME=FILES:WEIGHT")
    complaint(prep(two[0], two[0]), "two parts called a")
    complaint(prep("a=none.txt:1", two[1]), "none.txt does not exist")


def test_a_path_with_an_equals_sign_is_a_path(prep, tmp_path):
    folder = tmp_path / "year=2024"
    folder.mkdir()
    (folder / "a.txt").write_text(LINES)
    (tmp_path / "a.txt").write_text(LINES)
    here = prepared(prep, tmp_path, folder, out="here")
    assert same_data(here, prepared(prep, tmp_path, tmp_path / "a.txt", out="there"))


def test_shards_share_max_tokens(prep, tmp_path, run, spm):
    (tmp_path / "a.txt").write_text(LINES * 4)
    (tmp_path / "b.txt").write_text(LINES * 4)
    for i in range(2):
        prepared(
            prep, tmp_path, tmp_path / "a.txt", tmp_path / "b.txt", shard=f"{i}/2", max_tokens=4000
        )
    code, _, err = run(["prep", "--merge", "1", "--out_dir", str(tmp_path / "data")])
    assert code == 0, err
    assert 4000 <= len(ids_of(tmp_path / "data")) < 4400


# ---- Token ids ----


@pytest.mark.parametrize("form", ["nanogpt", "llm.c", "npy", "npy4", "eot first"])
def test_files_of_token_ids_give_what_their_text_gives(prep, tmp_path, spm, form, monkeypatch):
    monkeypatch.setattr(lm, "BLOCK", 1 << 12)
    (tmp_path / "a.txt").write_text(LINES)
    here = prepared(prep, tmp_path, tmp_path / "a.txt", out="here")
    tokenizer = lm.load_tokenizer(spm)
    ids = []
    for text in TEXTS:
        if form == "eot first":
            ids += [tokenizer.eos, *tokenizer.encode(text)]
        else:
            ids += [*tokenizer.encode(text), tokenizer.eos]
    ids = np.array(ids, "<u2")
    path = tmp_path / "ids.bin"
    if form == "llm.c":
        header = struct.pack("<3i", 20240520, 1, len(ids)).ljust(1024, b"\0")
        path.write_bytes(header + ids.tobytes())
    elif form.startswith("npy"):
        path = tmp_path / "ids.npy"
        np.save(path, ids.astype("<u4" if form == "npy4" else "<u2"))
    else:
        ids.tofile(path)
    assert same_data(here, prepared(prep, tmp_path, path, out="there"))


def test_faults_of_token_ids_are_told(prep, tmp_path):
    np.array([1, 60000, 2], "<u2").tofile(tmp_path / "ids.bin")
    np.save(tmp_path / "float.npy", np.zeros(3))
    np.save(tmp_path / "square.npy", np.zeros((3, 3), int))
    np.save(tmp_path / "negative.npy", np.array([5, -1, 2]))
    (tmp_path / "bad.npy").write_bytes(b"nothing of the kind")
    (tmp_path / "odd.bin").write_bytes(b"\5\0\2\0\5")
    complaint(prep(tmp_path / "ids.bin", tokenizer=None), "token ids", "--tokenizer")
    complaint(prep(tmp_path / "ids.bin"), "60000", "--tokenizer")
    complaint(prep(tmp_path / "negative.npy"), "-1", "--tokenizer")
    complaint(prep(tmp_path / "float.npy"), "float64", "whole numbers")
    complaint(prep(tmp_path / "square.npy"), "(3, 3)")
    complaint(prep(tmp_path / "bad.npy"), "not a file of NumPy")
    complaint(prep(tmp_path / "odd.bin"), "middle of an id")


# ---- The tokenizer's size ----


def test_the_tokenizer_fits_the_corpus():
    sizes = [lm.fitting_vocab(size) for size in (0, 4e5, 1.9e6, 10.7e6, 1e8, 6e8, 1e12)]
    assert sizes == [512, 1024, 2048, 4096, 16384, 32000, 32000]


def test_prep_chooses_and_says_the_size_and_a_flag_wins(prep, tmp_path):
    (tmp_path / "a.txt").write_text(LINES)
    code, out, err = prep(tmp_path / "a.txt", tokenizer=None)
    assert code == 0, err
    assert "512 pieces" in out
    assert lm.TokenFolder(tmp_path / "data").tokenizer.vocab_size == 512
    prepared(prep, tmp_path, tmp_path / "a.txt", out="own", tokenizer=None, vocab_size=350)
    assert lm.TokenFolder(tmp_path / "own").tokenizer.vocab_size == 350
    complaint(prep(tmp_path / "a.txt", out="no", tokenizer=None, vocab_size=100), "280")


def test_a_size_that_nobody_asked_for_gives_way_to_the_text(prep, tmp_path):
    signs = map(chr, range(0x4E00, 0x5200))
    (tmp_path / "many.txt").write_text("".join(f"{sign} {sign}\n" for sign in signs))
    (tmp_path / "few.txt").write_text("ab ba\n" * 50)
    code, out, err = prep(tmp_path / "many.txt", out="many", tokenizer=None)
    assert code == 0, err
    assert "this text suits one of 2,048" in out
    code, out, err = prep(tmp_path / "few.txt", out="few", tokenizer=None)
    assert code == 0, err
    assert lm.TokenFolder(tmp_path / "few").tokenizer.vocab_size < 300
    complaint(prep(tmp_path / "many.txt", out="no", tokenizer=None, vocab_size=512), "or more")
