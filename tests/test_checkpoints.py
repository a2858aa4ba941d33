"""Saving, loading, rotating and resuming: no damage, no hostile file and no full disk goes far."""

import json
import math
import os
import pickle
import re
import resource
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import SHORT, TINY, complaint, log_rows, read_pt, weight_bytes

import standalone_transformer_lm as lm

ROOT = Path(__file__).resolve().parents[1]
CPU = lm.Machine(torch.device("cpu"), torch.float32)
CONTENTS = """model config optim scaler format kind step samples best_val rng args
tokenizer""".split()


@pytest.fixture
def copied(trained, tmp_path):
    """A finished run to spoil."""
    return shutil.copytree(trained, tmp_path / "copied")


def again(run, data_dir, out, *flags):
    return run(["train", *TINY, *SHORT, "--data_dir", data_dir, "--out_dir", out, *flags])


def refusal(call, *args):
    """The one UserError that a call raises, as text."""
    with pytest.raises(lm.UserError) as caught:
        call(*args)
    return str(caught.value)


def flip(path, at=0.6):
    """Change one byte at a share of the file's length."""
    data = bytearray(path.read_bytes())
    data[int(len(data) * at)] ^= 0xFF
    path.write_bytes(data)


class Evil:
    """Unpickling it makes the folder `path`."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


# ---- Round trip and contents ----


def test_checkpoint_holds_what_the_design_lists(trained, data_dir):
    saved = read_pt(trained / "ckpt_last.pt")
    assert set(CONTENTS) <= set(saved)
    assert (saved["kind"], saved["step"], saved["samples"]) == ("train", 12, 48)
    assert bytes(saved["tokenizer"]) == (data_dir / "tokenizer.model").read_bytes()
    assert saved["args"]["lr"] == 0.01 and saved["args"]["out_dir"] == str(trained)
    assert {"rope_layout", "n_kv_head", "vocab_size"} <= set(saved["config"])
    assert all(w.dtype == torch.float32 for w in saved["model"].values())
    assert not any(name.startswith(("module.", "_orig_mod.", "model.")) for name in saved["model"])


def test_plain_weights_lie_beside_the_checkpoint(trained, data_dir):
    plain, saved = read_pt(trained / "pytorch_model.bin"), read_pt(trained / "ckpt_last.pt")
    assert plain.keys() == saved["model"].keys()
    assert all(torch.equal(plain[name], saved["model"][name]) for name in plain)
    assert json.loads((trained / "config.json").read_text()) == saved["config"]
    assert (trained / "tokenizer.model").read_bytes() == (data_dir / "tokenizer.model").read_bytes()


@pytest.mark.parametrize("tie", [True, False])
def test_weights_survive_a_round_trip_to_the_bit(tmp_path, tie):
    config = lm.ModelSettings(vocab_size=50, n_layer=2, d_model=16, n_head=2, seq_len=8, tie=tie)
    model = lm.Transformer(config).eval()
    model.init_weights(3)
    lm.save_checkpoint(tmp_path / "a.pt", {"model": model.state_dict(), "config": vars(config)})
    loaded = lm.build_model(lm.load_checkpoint(tmp_path / "a.pt"), torch.device("cpu"))
    ids = torch.arange(16).view(2, 8)
    assert torch.equal(loaded(ids), model(ids).detach())
    assert loaded.config == config or vars(loaded.config) == {**vars(config), "ffn_hidden": 64}
    assert not loaded.training and (loaded.lm_head.weight is loaded.tok_emb.weight) == tie


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "module._orig_mod."])
def test_wrapped_names_load(trained, tmp_path, prefix):
    saved = read_pt(trained / "ckpt_last.pt")
    wrapped = {**saved, "model": {prefix + name: w for name, w in saved["model"].items()}}
    torch.save(wrapped, tmp_path / "w.pt")
    assert lm.load_checkpoint(tmp_path / "w.pt")["model"].keys() == saved["model"].keys()


def test_a_run_folder_names_its_best_checkpoint(copied):
    assert lm.checkpoint_path(copied) == copied / "ckpt_best.pt"
    (copied / "ckpt_best.pt").unlink()
    assert lm.checkpoint_path(copied) == copied / "ckpt_last.pt"


@pytest.mark.parametrize("file", ["standalone_transformer_lm.py", "convert_to_llama.py"])
def test_every_load_is_weights_only(file):
    source = (ROOT / file).read_text()
    assert all("weights_only=True" in call for call in re.findall(r"torch\.load\([^\n]*", source))


# ---- Hostile, foreign and damaged files ----


def hostile_pickle(path, evil):
    path.write_bytes(pickle.dumps({"model": {}, "config": evil}, protocol=2))


def hostile_archive(path, evil):
    torch.save({"model": {}, "config": evil}, path)


@pytest.mark.parametrize("write", [hostile_pickle, hostile_archive])
def test_hostile_file_is_refused_and_runs_nothing(write, tmp_path, run, trained):
    evil, path = tmp_path / "evil", tmp_path / "ckpt.pt"
    write(path, Evil(evil))
    code, out, err = run(["generate", "--ckpt", path])
    assert code == 2 and not evil.exists()
    assert err.count("error:") == err.count("fix:") == 1 and "not loaded" in err
    assert "Traceback" not in err and not out


def test_hostile_file_in_a_run_is_passed_over(copied, tmp_path, run, data_dir):
    evil = tmp_path / "evil"
    (copied / "ckpt_last.pt").unlink()
    hostile_archive(copied / "ckpt_last.pt", Evil(evil))
    code, out, _ = again(run, data_dir, copied)
    assert code == 0 and not evil.exists() and "ckpt_last.pt" in out


def truncated(path):
    path.write_bytes(path.read_bytes()[:-2000])


def headless(path):
    path.write_bytes(path.read_bytes()[:100])


def empty(path):
    path.write_bytes(b"")


def text(path):
    path.write_text("To be, or not to be, that is the question.\n" * 50)


def foreign_zip(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.txt", "hello")


def a_tensor(path):
    torch.save(torch.ones(3), path)


def plain_weights(path):
    torch.save({"model.embed_tokens.weight": torch.ones(3, 3)}, path)


def noise(path):
    path.write_bytes(bytes(range(256)) * 8)


@pytest.mark.parametrize(
    "spoil", [truncated, headless, empty, text, foreign_zip, a_tensor, plain_weights, noise]
)
def test_unusable_file_is_one_sentence(spoil, copied, run):
    path = copied / "ckpt_last.pt"
    spoil(path)
    for argv in (["generate", "--ckpt", path], ["info", path]):
        code, _, err = run(argv)
        assert code == 2 and err.count("error:") == 1 and str(path) in err


@pytest.mark.parametrize(
    "content",
    [
        {"model": [1, 2], "config": {}},
        {"model": {}, "config": {}},
        {"model": {}, "config": None},
        {"model": None, "config": {}},
        {"model": {1: torch.ones(2)}, "config": {}},
        {"model": {"tok_emb.weight": 3}, "config": {}},
        {"model": {}, "config": "a text"},
        {"model": {}, "config": {}, "format": "new"},
    ],
)
def test_a_dict_of_something_else_is_one_sentence(content, tmp_path):
    torch.save(content, tmp_path / "x.pt")
    assert "x.pt" in refusal(lm.load_checkpoint, tmp_path / "x.pt")


@pytest.mark.parametrize(
    "change",
    [
        {"n_head": 0},
        {"n_head": 3},
        {"n_head": "4"},
        {"d_model": 64},
        {"n_layer": 3},
        {"n_layer": -1},
        {"seq_len": None},
        {"shiny_new": 1},
    ],
)
def test_a_config_that_does_not_fit_is_one_sentence(change, trained, tmp_path):
    saved = read_pt(trained / "ckpt_last.pt")
    config = {**saved["config"], **change}
    if change == {"seq_len": None}:
        del config["n_head"]
    torch.save({**saved, "config": config}, tmp_path / "x.pt")
    assert "x.pt" in refusal(lm.load_checkpoint, tmp_path / "x.pt")


def test_missing_weight_is_named(trained, tmp_path):
    saved = read_pt(trained / "ckpt_last.pt")
    del saved["model"]["blocks.1.attn.qkv.weight"]
    torch.save(saved, tmp_path / "x.pt")
    assert "blocks.1.attn.qkv.weight" in refusal(lm.load_checkpoint, tmp_path / "x.pt")


def test_newer_format_is_refused(copied, run):
    torch.save({**read_pt(copied / "ckpt_last.pt"), "format": 99}, copied / "ckpt_best.pt")
    code, _, err = run(["generate", "--ckpt", copied])
    assert code == 2 and "newer" in err and "update" in err


def test_a_flipped_byte_never_ends_in_a_traceback(trained, tmp_path):
    whole = (trained / "ckpt_last.pt").read_bytes()
    start = whole.index(b"PK")
    pickled = whole[start:].index(b"data.pkl")
    for at in [*range(pickled, pickled + 3000, 61), *range(len(whole) - 3000, len(whole), 131)]:
        data = bytearray(whole)
        data[at] ^= 0x55
        (tmp_path / "x.pt").write_bytes(data)
        for read in (lm.load_checkpoint, lambda path: lm.read_checkpoint(path, verify=True)):
            try:
                read(tmp_path / "x.pt")
            except lm.UserError:
                continue


def test_a_flip_in_the_pickle_of_a_small_file_is_the_same_model_or_a_sentence(tmp_path):
    config = lm.ModelSettings(vocab_size=40, n_layer=1, d_model=8, n_head=2, seq_len=8)
    content = {"model": lm.Transformer(config).state_dict(), "config": vars(config)}
    lm.save_checkpoint(tmp_path / "a.pt", content)
    whole, leaks = (tmp_path / "a.pt").read_bytes(), {}
    for at in range(whole.index(b"data.pkl"), whole.index(b"byteorder"), 6):
        data = bytearray(whole)
        data[at] ^= (0x55, 0x01)[at // 6 % 2]
        (tmp_path / "x.pt").write_bytes(data)
        try:
            lm.load_checkpoint(tmp_path / "x.pt")
        except lm.UserError:
            continue
        except Exception as fault:
            leaks[at] = repr(fault)
    assert not leaks


# ---- Resume from what is whole ----


def test_flipped_byte_in_the_newest_is_found_and_the_one_before_used(copied, run, data_dir):
    before = weight_bytes(copied / "ckpt_last.pt")
    rows = log_rows(copied)
    for name in ("ckpt_last.pt", "ckpt_00000012.pt"):
        flip(copied / name)
    code, out, err = again(run, data_dir, copied)
    assert code == 0, err
    assert "ckpt_last.pt" in out and "damaged" in out and "after step 8" in out
    assert weight_bytes(copied / "ckpt_last.pt") == before  # steps 9 to 12 were done once more
    assert log_rows(copied) == rows


@pytest.mark.parametrize("at", [0.05, 0.3, 0.9, 0.999])
def test_a_flip_anywhere_resumes_the_same_or_is_noticed(copied, at):
    wanted = weight_bytes(copied / "ckpt_last.pt")
    flip(copied / "ckpt_last.pt", at)
    found = lm.read_checkpoint(lm.newest_whole(copied, True))
    assert found["step"] == 12
    assert {n: w.numpy().tobytes() for n, w in found["model"].items()}.items() <= wanted.items()


def test_all_damaged_is_an_error_and_nothing_is_touched(copied, run, data_dir):
    for path in copied.glob("ckpt_*.pt"):
        truncated(path)
    left = {path.name: path.read_bytes() for path in copied.iterdir()}
    code, _, err = again(run, data_dir, copied)
    assert code == 2 and "every checkpoint" in err and str(copied) in err
    assert left == {path.name: path.read_bytes() for path in copied.iterdir()}


def test_lost_ckpt_last_is_made_up_for(copied):
    (copied / "ckpt_last.pt").unlink()
    assert lm.read_checkpoint(lm.newest_whole(copied, True))["step"] == 12


def test_resume_0_refuses_a_run_and_leaves_it(copied, run, data_dir):
    left = {path.name: path.read_bytes() for path in copied.iterdir()}
    code, _, err = again(run, data_dir, copied, "--resume", 0)
    assert code == 2 and "--resume 0" in err and str(copied) in err
    assert left == {path.name: path.read_bytes() for path in copied.iterdir()}


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--d_model", 64, "--n_layer", 3], ["--d_model 32", "64", "--n_layer 2", "3"]),
        (["--seq_len", 16], ["--seq_len 32", "16"]),
        (["--seed", 5], ["--seed 1337", "5"]),
        (["--tie", 0], ["--tie"]),
    ],
)
def test_another_model_is_told_by_what_differs(copied, run, data_dir, flags, named):
    args = (copied / "args.txt").read_bytes()
    code, _, err = again(run, data_dir, copied, *flags)
    assert code == 2 and err.count("error:") == 1
    assert all(word in err for word in named), err
    assert "--n_head" not in err and (copied / "args.txt").read_bytes() == args


def test_another_tokenizer_is_told(copied, run, corpus, tmp_path):
    other = tmp_path / "other"
    assert (
        run(
            ["prep", "--text_path", corpus, "--out_dir", other, "--vocab_size", 410, "--workers", 1]
        )[0]
        == 0
    )
    code, _, err = again(run, other, copied)
    assert code == 2 and "tokenizer" in err and str(copied) in err


# ---- Rotation and atomic writing ----


def step_file(step):
    return {"step": step, "model": {}, "config": {}}


def test_rotation_keeps_the_newest(tmp_path):
    for step in (5, 10, 95, 100, 100_000_0):
        lm.save_step(tmp_path, step_file(step), keep_last=2)
        assert read_pt(tmp_path / "ckpt_last.pt")["step"] == step
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "ckpt_00000100.pt",
        "ckpt_01000000.pt",
        "ckpt_last.pt",
    ]


def test_rotation_spares_best_and_other_files(tmp_path):
    (tmp_path / "ckpt_best.pt").write_text("best")
    (tmp_path / "ckpt_mine.pt").write_text("mine")
    for step in (1, 2, 3):
        lm.save_step(tmp_path, step_file(step), keep_last=1)
    assert (tmp_path / "ckpt_best.pt").read_text() == "best"
    assert (tmp_path / "ckpt_mine.pt").exists() and not (tmp_path / "ckpt_00000002.pt").exists()


def test_no_hard_links_is_no_matter(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(1, "no links here")

    monkeypatch.setattr(os, "link", refuse)
    lm.save_step(tmp_path, step_file(7), keep_last=1)
    assert read_pt(tmp_path / "ckpt_last.pt")["step"] == 7


def test_ckpt_last_is_whole_at_every_rename(tmp_path, monkeypatch):
    replace, seen = os.replace, []

    def watched(source, target):
        for moment in (lambda: None, lambda: replace(source, target)):
            moment()
            if (tmp_path / "ckpt_last.pt").exists():
                seen.append(read_pt(tmp_path / "ckpt_last.pt")["step"])

    monkeypatch.setattr(os, "replace", watched)
    for step in (1, 2, 3):
        lm.save_step(tmp_path, step_file(step), keep_last=1)
    assert seen == sorted(seen) and seen[-1] == 3 and len(seen) > 6


@pytest.mark.parametrize("fault", [KeyboardInterrupt, MemoryError, OSError(28, "No space")])
def test_a_write_cut_short_leaves_the_old_file(tmp_path, monkeypatch, fault):
    def half(checkpoint, file):
        file.write(b"PK half of it")
        raise fault

    lm.save_checkpoint(tmp_path / "a.pt", step_file(1))
    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(fault if isinstance(fault, type) else OSError):
        lm.save_checkpoint(tmp_path / "a.pt", step_file(2))
    assert [p.name for p in tmp_path.iterdir()] == ["a.pt"]
    assert read_pt(tmp_path / "a.pt")["step"] == 1


def test_a_full_disk_says_so(tmp_path):
    (tmp_path / ".a.pt.tmp").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left"):
        lm.save_checkpoint(tmp_path / "a.pt", {"model": {"w": torch.ones(100_000)}})
    assert list(tmp_path.iterdir()) == []


def test_no_room_for_a_checkpoint_ends_the_run_and_keeps_the_old_one(copied, run, data_dir):
    left = {p.name: p.read_bytes() for p in copied.glob("ckpt_*.pt")}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))  # Python ignores SIGXFSZ
    try:
        code, _, err = again(run, data_dir, copied, "--max_steps", 16)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert code == 2 and err.count("error:") == err.count("fix:") == 1, err
    assert "Traceback" not in err and "ckpt_" in err and "ulimit" in err
    assert left == {p.name: p.read_bytes() for p in copied.glob("ckpt_*.pt")}
    assert not list(copied.glob(".*"))
    assert again(run, data_dir, copied, "--max_steps", 16)[0] == 0  # and with room it goes on
    assert read_pt(copied / "ckpt_last.pt")["step"] == 16


# ---- Checkpoints of the original program ----


def interleaved(x, theta):
    """Rotary positions on neighbouring pairs, as the original turned them: x (B, T, H, D)."""
    T, D = x.shape[1], x.shape[3]
    angle = torch.arange(T)[:, None] / theta ** (torch.arange(0, D, 2) / D)  # (T, D/2)
    turn = torch.polar(torch.ones_like(angle), angle)[:, None]  # (T, 1, D/2)
    pairs = torch.view_as_complex(x.reshape(*x.shape[:3], D // 2, 2))
    return torch.view_as_real(pairs * turn).flatten(3)


def original_logits(w, ids, layers, heads, theta=10000.0):
    """The original program's forward pass on its own weights, written anew with no cache."""
    B, T = ids.shape
    x = w["tok_emb.weight"][ids]
    causal = torch.full((T, T), float("-inf")).triu(1)

    def norm(x, name):
        return x * (x.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt() * w[name]

    for i in range(layers):
        b = f"blocks.{i}."
        q, k, v = (
            (norm(x, b + "norm1.weight") @ w[b + "attn.qkv.weight"].T)
            .view(B, T, 3, heads, -1)
            .unbind(2)
        )
        q, k = interleaved(q, theta), interleaved(k, theta)
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / q.shape[-1] ** 0.5 + causal
        y = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v).reshape(B, T, -1)
        x = x + y @ w[b + "attn.proj.weight"].T
        h = norm(x, b + "norm2.weight")
        gate, up = h @ w[b + "mlp.w1.weight"].T, h @ w[b + "mlp.w2.weight"].T
        x = x + (F.silu(gate) * up) @ w[b + "mlp.w3.weight"].T
    return norm(x, "norm.weight") @ w["lm_head.weight"].T


def original_checkpoint(path, tie, length="seq_len"):
    """A file as the original 138M program wrote it, small: its weights and its path."""
    torch.manual_seed(11)
    d, hidden, vocab = 24, 96, 400
    shapes = {"tok_emb.weight": (vocab, d), "norm.weight": (d,)}
    for i in range(2):
        shapes |= {
            f"blocks.{i}.{name}.weight": shape
            for name, shape in {
                "norm1": (d,),
                "norm2": (d,),
                "attn.qkv": (3 * d, d),
                "attn.proj": (d, d),
                "mlp.w1": (hidden, d),
                "mlp.w2": (hidden, d),
                "mlp.w3": (d, hidden),
            }.items()
        }
    weights = {name: torch.randn(shape) * 0.3 for name, shape in shapes.items()}
    weights["lm_head.weight"] = weights["tok_emb.weight"] if tie else torch.randn(vocab, d)
    config = {
        "vocab_size": vocab,
        length: 16,
        "n_layer": 2,
        "n_head": 3,
        "d_model": d,
        "ffn_mult": 4,
        "dropout": 0.1,
    }
    torch.save(
        {
            "model": {"_orig_mod." + n: w for n, w in weights.items()},
            "config": config,
            "optim": {},
            "scaler": {},
        },
        path,
    )
    return weights


@pytest.mark.parametrize(("tie", "length"), [(True, "seq_len"), (False, "max_seq_len")])
def test_original_checkpoint_gives_the_original_logits(tmp_path, tie, length):
    weights = original_checkpoint(tmp_path / "o.pt", tie, length)
    model = lm.build_model(lm.load_checkpoint(tmp_path / "o.pt"), torch.device("cpu"))
    ids = torch.randint(0, 400, (2, 16))
    wanted = original_logits(weights, ids, layers=2, heads=3)
    assert torch.allclose(model(ids), wanted, atol=1e-4), (model(ids) - wanted).abs().max()
    assert model.config.seq_len == 16 and model.config.tie == tie


def test_original_checkpoint_generates_with_spm_and_asks_for_it(tmp_path, run, tiny_tokenizer):
    original_checkpoint(tmp_path / "o.pt", True)
    code, _, err = run(["generate", "--ckpt", tmp_path / "o.pt", "--prompt", "The"])
    assert code == 2 and "--tokenizer" in err
    (tmp_path / "t.model").write_bytes(tiny_tokenizer)
    code, out, _ = run(
        [
            "generate",
            "--ckpt",
            tmp_path / "o.pt",
            "--tokenizer",
            tmp_path / "t.model",
            "--prompt",
            "The",
            "--max_new_tokens",
            20,
        ]
    )
    assert code == 0 and out.startswith("The")
    code, out, _ = run(["info", tmp_path / "o.pt"])
    assert code == 0 and "original" in out and "--tokenizer" in out


def test_a_tokenizer_larger_than_the_model_is_refused(tmp_path, run, corpus):
    weights = original_checkpoint(tmp_path / "o.pt", True)
    assert len(weights["tok_emb.weight"]) == 400
    big = lm.train_tokenizer(corpus.read_text().splitlines(), 420)
    (tmp_path / "big.model").write_bytes(big)
    code, _, err = run(
        ["generate", "--ckpt", tmp_path / "o.pt", "--tokenizer", tmp_path / "big.model"]
    )
    assert code == 2 and "420" in err and "400" in err


def test_an_original_run_is_not_overwritten(tmp_path, run, data_dir):
    original_checkpoint(tmp_path / "ckpt_last.pt", True)
    code, _, err = again(run, data_dir, tmp_path)
    assert code == 2 and "original" in err and "--out_dir" in err


def test_saved_file_is_no_larger_than_weights_and_moments(trained):
    saved = read_pt(trained / "ckpt_last.pt")
    unique = {w.data_ptr(): w.numel() for w in saved["model"].values()}
    size = 3 * 4 * sum(unique.values()) + len(saved["tokenizer"])
    assert (trained / "ckpt_last.pt").stat().st_size < size * 1.3


def test_a_format_that_is_no_number_is_a_sentence(trained, tmp_path, run):
    saved = read_pt(trained / "ckpt_last.pt")
    torch.save({**saved, "format": torch.ones(3)}, tmp_path / "odd.pt")
    complaint(run(["info", tmp_path / "odd.pt"]), "odd.pt")


def test_a_disk_that_gives_invalid_bytes_is_a_sentence(trained, monkeypatch, run):
    def fail(*_, **__):
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr(torch, "load", fail)
    complaint(run(["info", trained / "ckpt_last.pt"]), "is damaged")


def test_more_layers_than_weights_are_refused_before_a_model_is_built(trained, tmp_path, run):
    saved = read_pt(trained / "ckpt_last.pt")
    saved["config"]["n_layer"] = 10_000
    torch.save(saved, tmp_path / "odd.pt")
    complaint(run(["info", tmp_path / "odd.pt"]), "n_layer 10000", "weights have 2")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "text"])
def test_weights_that_are_no_numbers_are_a_sentence(trained, tmp_path, run, value):
    saved = read_pt(trained / "ckpt_last.pt")
    if value == "text":
        saved["model"]["norm.weight"] = value
    else:
        saved["model"]["norm.weight"][0] = value
    torch.save(saved, tmp_path / "odd.pt")
    complaint(run(["generate", "--ckpt", tmp_path / "odd.pt", "--prompt", "x"]), "norm.weight")


def test_a_folder_of_another_program_says_how_it_comes_in(tmp_path, run):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    complaint(run(["generate", "--ckpt", tmp_path, "--prompt", "x"]), "hidden_size is missing")
    (tmp_path / "config.json").write_text('{"model_type": "mamba"}')
    complaint(run(["generate", "--ckpt", tmp_path, "--prompt", "x"]), "'mamba'", "qwen3")
    (tmp_path / "config.json").write_text('{"n_layer": 2}')
    complaint(run(["generate", "--ckpt", tmp_path, "--prompt", "x"]), "plain weights")


def test_changed_flags_are_told_on_a_resume(trained, data_dir, tmp_path, run):
    shutil.copytree(trained, tmp_path / "run")
    flags = [*TINY, *SHORT, "--data_dir", data_dir, "--out_dir", tmp_path / "run"]
    code, told, err = run(["train", *flags, "--max_steps", 13, "--lr", 5e-3])
    assert code == 0, err
    (line,) = [line for line in told.split("\n") if line.startswith("changed since step 12:")]
    assert "lr 0.01 → 0.005" in line and "max_steps 12 → 13" in line


HOSTILE = (None, "text", -1, True, 1.5, [], [1], {}, {"state": 3}, b"\xff", torch.zeros(2))


def mutations(saved):
    """(path of a field, hostile value) for each field of a checkpoint, two levels deep."""
    for key, value in saved.items():
        inner = []
        if isinstance(value, dict) and key not in ("model", "args"):
            inner = [(key, name) for name in value]
        if isinstance(value, list):
            inner = [(key, place) for place in range(len(value))]
        for path in [(key,), *inner[:6]]:
            for hostile in HOSTILE:
                yield path, hostile


@pytest.mark.slow
def test_a_resume_from_any_mutated_field_goes_on_or_is_a_sentence(copied, run, data_dir):
    whole = lm.read_checkpoint(copied / "ckpt_last.pt")
    leaks, told = [], 0
    for path, hostile in mutations(whole):
        changed = dict(whole)
        target = changed
        for part in path[:-1]:
            target[part] = target[part].copy()
            target = target[part]
        target[path[-1]] = hostile
        for old in copied.glob("ckpt_*.pt"):
            old.unlink()
        torch.save(changed, copied / "ckpt_last.pt")
        try:
            code, _, err = again(run, data_dir, copied, "--max_steps", 13)
        except Exception as fault:
            code, err = 1, repr(fault)
        told += code == 2
        if code not in (0, 2) or "Traceback" in err:
            leaks.append((path, hostile, err.strip()[-300:]))
    assert not leaks and told > 50


@pytest.mark.parametrize("change", ["nan", "shape", "name", "kind"])
def test_a_resume_from_mutated_weights_is_a_sentence(change, copied, run, data_dir):
    saved = lm.read_checkpoint(copied / "ckpt_last.pt")
    name = "blocks.1.attn.proj.weight"
    weight = saved["model"].pop(name)
    saved["model"] |= {
        "nan": {name: weight * math.nan},
        "shape": {name: weight[:-1]},
        "name": {"blocks.1.attn.other.weight": weight},
        "kind": {name: "text"},
    }[change]
    for old in copied.glob("ckpt_*.pt"):
        old.unlink()
    torch.save(saved, copied / "ckpt_last.pt")
    code, _, err = again(run, data_dir, copied, "--max_steps", 13)
    assert code == 2 and ("is damaged (its " in err or "weights that are NaN" in err), err
    assert "Traceback" not in err
