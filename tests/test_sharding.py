"""ZeRO 0-3: two ranks that divide a model are one that has it whole."""

import pytest
import torch
from conftest import log_rows, read_pt
from test_distributed import alone, assert_same_curve, flags, two  # noqa: F401

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
