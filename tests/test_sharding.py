"""ZeRO 0-3: two ranks that divide a model are one that has it whole."""

import functools
import importlib
import os
import pickle
import shutil
import signal
from pathlib import Path

import pytest
import torch
from conftest import log_rows, read_pt, signal_at
from test_distributed import assert_same_curve, flags, free_port, grpo_command, in_turn, two
from test_endurance import spoil_steps
from test_lora import chat_rows, pair_rows, save_base, write_rows

import convert_to_llama as converter
import standalone_transformer_lm as lm


def whole_weights(out):
    return read_pt(out / "ckpt_last.pt")


def assert_near_checkpoint(a, b, tolerance=1e-5):
    """That two checkpoints hold the same but for rounding: weights, averages and moments."""
    assert a.keys() == b.keys()
    for name in a["model"]:
        assert torch.allclose(a["model"][name], b["model"][name], atol=tolerance), name
    for one, other in zip(a["optim"], b["optim"], strict=True):
        assert one["state"].keys() == other["state"].keys()
        for i, state in one["state"].items():
            for key, value in state.items():
                assert value.shape == other["state"][i][key].shape
                assert torch.allclose(value, other["state"][i][key], atol=tolerance), (i, key)
    for one, other in zip(a["ema"] or (), b["ema"] or (), strict=True):
        assert torch.allclose(one, other, atol=tolerance)


VARIANTS = {
    "adamw": [],
    "muon": ["--optimizer", "muon", "--n_kv_head", "1"],
    "ema": ["--ema", "0.9", "--grad_checkpoint", "1", "--grad_accum_steps", "2"],
    "experts": [*"--n_expert 4 --balance_loss 0 --optimizer muon --tie 0".split()],
}


@pytest.fixture(scope="module")
def lone(data_dir, tmp_path_factory, run):
    """`lone(variant)`: the run of one rank that those of two must equal."""
    made = {}

    def call(name):
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name) / "run"
            code, _, err = run([*flags(data_dir, made[name], 8), "--dropout", "0", *VARIANTS[name]])
            assert code == 0, err
        return made[name]

    return call


@pytest.mark.parametrize("zero", [1, 2, 3])
@pytest.mark.parametrize("name", VARIANTS)
def test_two_ranks_of_every_stage_are_one(child, data_dir, tmp_path, lone, name, zero):
    argv = [*flags(data_dir, tmp_path / "run", 4), "--dropout", "0", *VARIANTS[name]]
    ended = two(child, [*argv, "--zero", zero], keep=False)
    assert [code for code, _ in ended] == [0, 0], ended
    assert f"ZeRO stage {zero}" in ended[0][1]
    assert_same_curve(tmp_path / "run", lone(name), 2e-5)
    assert_near_checkpoint(whole_weights(tmp_path / "run"), whole_weights(lone(name)))


def in_turn_on_two(child, runs):
    ports = [(free_port(), argv) for argv in runs]
    ended = two(child, runs[0], each=[functools.partial(in_turn, ports)], keep=False)
    assert [code for code, _ in ended] == [0, 0], ended
    return ended[0][1]


def assert_logs_near(out, wanted, tolerance=1e-3):
    for a, b in zip(log_rows(out), log_rows(wanted), strict=True):
        assert a.keys() == b.keys() and a["tokens"] == b["tokens"]
        for key in a:
            if key.startswith(("train/", "val/")):
                assert a[key] == pytest.approx(b[key], rel=tolerance, abs=tolerance), key


TINY_RUN = """--max_steps 4 --eval_interval 2 --log_interval 1 --dtype fp32 --device cpu --lr 1e-3
--threads 1 --compile 0 --val_split 0.2 --warmup_steps 0""".split()


def test_tuning_on_two_ranks_is_one(child, tiny_tokenizer, run, tmp_path):
    base = save_base(tmp_path / "base.pt", tiny_tokenizer)
    chats = write_rows(tmp_path / "chats.jsonl", chat_rows(40))
    pairs = write_rows(tmp_path / "pairs.jsonl", pair_rows(40))
    kinds = {
        "sft": [chats, "--lora_rank", 2, "--samples", 2, "--zero", 3],
        "sft --optimizer muon --pack 1": [chats, "--zero", 2],
        "dpo": [pairs, "--zero", 3, "--optimizer", "muon"],
        "dpo --loss simpo --lora_rank 2": [pairs, "--zero", 1],
        "reward": [pairs, "--zero", 3, "--ema", 0.5],
    }

    def argv(name, place, batch):
        data, *more = kinds[name]
        out = tmp_path / place / name.replace(" ", "")
        flags = ["--ckpt", base, "--data", data, "--out_dir", out, "--batch_size", batch]
        return [*name.split(), *flags, *more, *TINY_RUN]

    in_turn_on_two(child, [argv(name, "both", 2) for name in kinds])
    for name in kinds:
        code, _, err = run(argv(name, "one", 4))
        assert code == 0, err
        outs = [tmp_path / place / name.replace(" ", "") for place in ("both", "one")]
        assert_logs_near(*outs)
        assert_near_checkpoint(*map(whole_weights, outs), 1e-4)
    samples = [tmp_path / place / "sft" / "samples.jsonl" for place in ("both", "one")]
    assert samples[0].read_bytes() == samples[1].read_bytes()


def test_rollouts_on_two_ranks_are_one(child, tiny_tokenizer, run, tmp_path):
    grpo = grpo_command(tiny_tokenizer, tmp_path)
    more = "--kl 0.1 --updates 2 --value_warmup 1 --share_prompts 0 --lr 1e-4".split()
    kinds = {
        "vapo": ["--zero", 3],
        "grpo": ["--zero", 2, "--lora_rank", 2, "--eval_prompts", 1],
        "dapo": ["--zero", 1, "--optimizer", "muon"],
    }
    both, one = (
        [grpo(tmp_path / place / algo, "--algo", algo, *more, *kinds[algo]) for algo in kinds]
        for place in ("both", "one")
    )
    in_turn_on_two(child, both)
    for algo, argv in zip(kinds, one, strict=True):
        code, _, err = run(argv)
        assert code == 0, err
        outs = [tmp_path / place / algo for place in ("both", "one")]
        assert_logs_near(*outs, 2e-3)
        saved = [whole_weights(out) for out in outs]
        assert_near_checkpoint(*saved, 1e-3)
        if algo == "vapo":
            for name in saved[0]["critic"]:
                assert torch.allclose(saved[0]["critic"][name], saved[1]["critic"][name], atol=1e-3)
            for a, b in zip(saved[0]["reference"], saved[1]["reference"], strict=True):
                assert torch.equal(a, b)


def test_a_run_changes_its_stage_and_ranks(child, data_dir, tmp_path, lone, run):
    """Stopped three times on two ranks, each under another stage, it ends on one as one run."""
    argv = [*flags(data_dir, tmp_path / "run", 4), "--dropout", "0", *VARIANTS["muon"]]
    for stage, nth, step in ((3, 3, 4), (1, 3, 8), (2, 1, 10)):
        stop = functools.partial(signal_at, what="seed_step", nth=nth, number=signal.SIGUSR1)
        ended = two(child, [*argv, "--zero", stage], (hook_of, stop), keep=False)
        assert ended[1][0] == 128 + signal.SIGUSR1, ended
        assert whole_weights(tmp_path / "run")["step"] == step
    assert "changed since step 8: zero 1 → 2" in ended[0][1]
    code, told, err = run(argv)
    assert code == 0 and "keeps a step at 8 sequences" in told, err
    assert_same_curve(tmp_path / "run", lone("muon"), 1e-4)
    assert_near_checkpoint(whole_weights(tmp_path / "run"), whole_weights(lone("muon")), 1e-4)


def hook_of(program, stop):
    stop(program)


@pytest.mark.parametrize(
    "more",
    [
        ["--zero", 2, "--zero_group", 1],
        ["--zero", 3, "--offload", 1],
        ["--zero", 3, "--lr", "1e-2", "--grad_accum_steps", 2],
    ],
    ids=lambda more: more[2].strip("-"),
)
def test_groups_and_offloading_change_nothing(child, data_dir, tmp_path, lone, more):
    batch = 2 if "--grad_accum_steps" in more else 4
    argv = [*flags(data_dir, tmp_path / "run", batch), "--dropout", "0", *VARIANTS["muon"]]
    ended = two(child, [*argv, *more], keep=False)
    assert [code for code, _ in ended] == [0, 0], ended
    assert_same_curve(tmp_path / "run", lone("muon"), 2e-5)


def test_one_device_offloads_too(run, data_dir, tmp_path, lone):
    argv = [*flags(data_dir, tmp_path / "run", 8), "--dropout", "0", *VARIANTS["muon"]]
    code, told, err = run([*argv, "--offload", 1])
    assert code == 0 and "in the host's memory" in told, err
    assert_same_curve(tmp_path / "run", lone("muon"), 2e-5)


def test_ranks_that_cannot_form_groups_are_refused(child, data_dir, tmp_path):
    argv = flags(data_dir, tmp_path / "run", 4)
    for more, word in ((["--zero_group", 3], "1, 2"), (["--dtype", "fp16"], "bf16 or fp32")):
        ended = two(child, [*argv, "--zero", 2, *more], keep=False)
        assert [code for code, _ in ended] == [2, 2] and word in ended[0][1], ended


def test_a_group_without_a_stage_is_refused(run, data_dir, tmp_path):
    code, _, err = run([*flags(data_dir, tmp_path / "run", 4), "--zero_group", 2])
    assert code == 2 and "--zero_group is given without --zero" in err


def spoil_late_steps(program, _):
    spoil_steps(program, set(range(6, 12)))


def test_a_sharded_run_goes_back_too(child, data_dir, tmp_path):
    argv = [*flags(data_dir, tmp_path / "run", 4), "--zero", 2, *VARIANTS["muon"], "--ema", 0.5]
    ended = two(child, argv, each=[spoil_late_steps], keep=False)
    assert [code for code, _ in ended] == [0, 0], ended
    assert "going back to step 4" in ended[0][1]
    saved = whole_weights(tmp_path / "run")
    assert saved["step"] == 12 and saved["samples"] == 12 * 8 + 8 * 8


@pytest.mark.slow
def test_a_sharded_run_is_compiled_and_in_bf16(child, data_dir, tmp_path):
    outs = [tmp_path / name for name in ("sharded", "plain")]
    for out, more in zip(outs, (["--zero", 3, "--compile", 1], ["--zero", 0]), strict=True):
        argv = [*flags(data_dir, out, 4), "--dropout", 0, *more, "--dtype", "bf16"]
        ended = two(child, argv, keep=False)
        assert [code for code, _ in ended] == [0, 0], ended
    assert_same_curve(*outs, 2e-2)


# ---- Checkpoints in shards ----

SHARDED = ["--dropout", "0", "--ema", "0.9", "--zero", 3, "--sharded_ckpt", 1]


@pytest.fixture(scope="module")
def shelf():
    return {}


@pytest.fixture
def in_shards(shelf, child, data_dir, tmp_path_factory):
    """The folder of a run of two ranks that wrote sharded checkpoints; its mirror is beside it."""
    if not shelf:
        out = tmp_path_factory.mktemp("shards") / "run"
        argv = [*flags(data_dir, out, 4), *SHARDED, "--mirror", out.with_name("mirror")]
        ended = two(child, argv, keep=False)
        assert [code for code, _ in ended] == [0, 0], ended
        shelf["run"] = out
    return shelf["run"]


@pytest.fixture
def shards_copy(in_shards, tmp_path):
    return shutil.copytree(in_shards, tmp_path / "copy")


def folders_of(out):
    return sorted(path.name for path in out.glob("*.parts"))


def test_a_sharded_checkpoint_holds_what_a_whole_one_does(
    in_shards, child, data_dir, tmp_path, run
):
    whole = tmp_path / "run"
    code, _, err = run([*flags(data_dir, whole, 8), *SHARDED[:4]])
    assert code == 0, err
    for name in ("ckpt_last.pt", "ckpt_best.pt"):
        assert (in_shards / name).stat().st_size < (whole / name).stat().st_size / 5
        found = lm.read_checkpoint(in_shards / name)
        assert found.pop("parts") in folders_of(in_shards)
        found.pop("parts_digest")
        assert found["model"]["lm_head.weight"] is found["model"]["tok_emb.weight"]
        assert_near_checkpoint(found, read_pt(whole / name))
    assert len(folders_of(in_shards)) == 3  # keep_last, and the best one's averaged weights
    assert not (in_shards / "pytorch_model.bin").exists()
    mirror = in_shards.with_name("mirror")
    for folder in folders_of(in_shards):
        names = [path.name for path in (in_shards / folder).iterdir()]
        assert {"__0_0.distcp", "__1_0.distcp", ".metadata"} == {*names}
        assert all(
            (mirror / folder / name).read_bytes() == (in_shards / folder / name).read_bytes()
            for name in names
        )


def test_a_sharded_checkpoint_is_resumed_by_any_ranks(in_shards, child, data_dir, tmp_path, run):
    """Fresh folders go on from the mirror alone, on two ranks in shards, and on one, which has it
    whole; their end is that of a run that was never stopped."""
    steps = ["--schedule", "wsd", "--decay_share", "0", "--max_steps"]
    first, calm, alone = (tmp_path / name for name in ("first", "calm", "alone"))
    argv = [*flags(data_dir, first, 4), *SHARDED, *steps, 6, "--mirror", tmp_path / "mirror"]
    ended = two(child, argv, keep=False)
    assert [code for code, _ in ended] == [0, 0], ended
    shutil.copytree(tmp_path / "mirror", tmp_path / "other")
    argv = [*flags(data_dir, tmp_path / "run", 4), *SHARDED, *steps, 12, "--mirror"]
    ended = two(child, [*argv, tmp_path / "mirror"], keep=False)
    assert [code for code, _ in ended] == [0, 0], ended
    assert "fetched ckpt_00000006.pt" in ended[0][1]
    whole = ["--dropout", "0", "--ema", "0.9", *steps, 12]
    for out, more in ((alone, ["--mirror", tmp_path / "other"]), (calm, [])):
        code, told, err = run([*flags(data_dir, out, 8), *whole, *more])
        assert code == 0, err
    saved = [lm.read_checkpoint(out / "ckpt_last.pt") for out in (tmp_path / "run", alone, calm)]
    assert ["parts" in one for one in saved] == [True, False, False]
    del saved[0]["parts"], saved[0]["parts_digest"]
    assert_near_checkpoint(saved[0], saved[2])
    assert_near_checkpoint(saved[1], saved[2])


def test_every_command_reads_a_sharded_checkpoint(in_shards, run, tmp_path, data_dir):
    code, told, err = run(
        ["generate", "--ckpt", in_shards, "--prompt", "the", "--max_new_tokens", 4]
    )
    assert code == 0, err
    code, _, err = run(["info", in_shards])
    assert code == 0, err
    code = converter.main(
        ["--ckpt", str(in_shards / "ckpt_best.pt"), "--out", str(tmp_path / "hf")]
    )
    assert code == 0 and (tmp_path / "hf" / "model.safetensors").exists()


def spoil_file(path, change):
    data = bytearray(path.read_bytes())
    change(data)
    path.write_bytes(data)


class Hostile:
    def __reduce__(self):
        return os.mkdir, ("hostile",)


@pytest.mark.parametrize(
    ("spoil", "word"),
    [
        (lambda folder: shutil.rmtree(folder), "does not exist"),
        (lambda folder: (folder / ".metadata").unlink(), "is damaged"),
        (lambda folder: (folder / "__1_0.distcp").unlink(), "is damaged"),
        (lambda folder: os.truncate(folder / "__0_0.distcp", 5000), "is shorter"),
        (lambda folder: (folder / ".metadata").write_bytes(pickle.dumps(Hostile())), "is damaged"),
        (lambda folder: (folder / ".metadata").write_bytes(b"no pickle"), "is damaged"),
    ],
)
def test_a_broken_folder_is_a_sentence(shards_copy, run, spoil, word, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    checkpoint = shards_copy / "ckpt_last.pt"
    folder = shards_copy / lm.parts_of(checkpoint)
    spoil(folder)
    saved = torch.load(checkpoint)
    if (folder / ".metadata").exists():  # as one who means harm would
        saved["parts_digest"] = lm.sha256((folder / ".metadata").read_bytes())
    torch.save(saved, checkpoint)
    code, _, err = run(["generate", "--ckpt", checkpoint, "--prompt", "the"])
    assert code == 2 and word in err and "Traceback" not in err
    assert not Path("hostile").exists()


def test_a_description_of_another_folder_is_refused(shards_copy):
    last, *_ = (lm.parts_of(path) for path in lm.numbered(shards_copy))
    other = next(name for name in folders_of(shards_copy) if name != last)
    shutil.copyfile(shards_copy / other / ".metadata", shards_copy / last / ".metadata")
    with pytest.raises(lm.UserError, match="its .metadata is another"):
        lm.read_checkpoint(shards_copy / "ckpt_last.pt")


def test_a_flipped_bit_in_a_shard_falls_back(shards_copy, child, data_dir):
    newest = shards_copy / lm.parts_of(shards_copy / "ckpt_last.pt")

    def flip(data):
        data[len(data) // 3] ^= 1

    spoil_file(newest / "__1_0.distcp", flip)
    half = shards_copy / "ckpt_00000099.parts"
    half.mkdir()
    ended = two(child, [*flags(data_dir, shards_copy, 4), *SHARDED], keep=False)
    assert [code for code, _ in ended] == [0, 0], ended
    assert "is damaged" in ended[0][1] and "trying the one before it" in ended[0][1]
    assert not half.exists()


def fill_disk(_program):
    """Rank 1's disk is full once."""
    dcp = importlib.import_module("torch.distributed.checkpoint")
    save, calls = dcp.FileSystemWriter.write_data, []

    def write_data(writer, plan, planner):
        calls.append(plan)
        if len(calls) == 1:
            raise OSError(28, "No space left on device")
        return save(writer, plan, planner)

    dcp.FileSystemWriter.write_data = write_data


def test_a_full_disk_loses_one_sharded_checkpoint(child, data_dir, tmp_path):
    out = tmp_path / "run"
    ended = two(child, [*flags(data_dir, out, 4), *SHARDED], (fill_disk,), keep=False)
    assert [code for code, _ in ended] == [0, 0], ended
    assert (
        "cannot be written (on rank 1: " in ended[0][1] and "the next one is tried" in ended[0][1]
    )
    lm.read_checkpoint(out / "ckpt_last.pt", verify=True)
    assert {lm.parts_of(path) for path in out.glob("ckpt_*.pt")} == {*folders_of(out)}


def test_shards_without_a_divided_model_are_refused(run, data_dir, tmp_path):
    code, _, err = run([*flags(data_dir, tmp_path / "run", 4), "--sharded_ckpt", 1])
    assert code == 2 and "--sharded_ckpt needs a model that several devices divide" in err


def test_one_device_writes_shards_too(run, data_dir, tmp_path, lone):
    argv = [*flags(data_dir, tmp_path / "run", 8), "--dropout", "0"]
    code, _, err = run([*argv, "--offload", 1, "--sharded_ckpt", 1])
    assert code == 0, err
    found = lm.read_checkpoint(tmp_path / "run" / "ckpt_last.pt", verify=True)
    del found["parts"], found["parts_digest"]
    assert_near_checkpoint(found, whole_weights(lone("adamw")))


def exhaust_larger(program, most):
    """Micro-batches of more sequences run out of memory, from the 6th step on, within a layer."""
    forward, calls = program.Attention.forward, []

    def tight(self, x, context):
        calls.extend([1] * self.training)
        if len(calls) > 10 and self.training and len(x) > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(self, x, context)

    program.Attention.forward = tight


def test_memory_that_runs_out_among_shards_halves_the_next_start(child, data_dir, tmp_path, lone):
    """A rank that runs out of memory between the exchanges of a sharded step ends the start; the
    next one goes on from the checkpoint with smaller micro-batches, to the same end."""
    out = tmp_path / "run"
    argv = [*flags(data_dir, out, 4), "--dropout", "0", "--zero", 3]
    first = two(child, argv, (exhaust_larger, 2), keep=False)
    assert first[1][0] == 2 and first[0][0] in (1, 2), first
    assert "with micro-batches of half the size" in first[1][1]
    again = two(child, argv, (exhaust_larger, 2), keep=False)
    assert [code for code, _ in again] == [0, 0], again
    assert "micro-batches of 2 instead of 4 sequences" in again[0][1]
    assert "resuming" in again[0][1]
    assert_near_checkpoint(whole_weights(out), whole_weights(lone("adamw")))
