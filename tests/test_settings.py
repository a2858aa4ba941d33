"""Room Settings: a flag is declared once, and flags, presets, @FILE and args.txt agree."""

import dataclasses
import math
import pickle
import re

import hypothesis
import pytest
from conftest import TINY, complaint
from hypothesis import assume, given
from hypothesis import strategies as st

import standalone_transformer_lm as lm

GROUPS = {group for command in lm.COMMANDS.values() for group in lm.settings_of(command.run)}
FIELDS = [
    (group, f)
    for group in sorted(GROUPS, key=lambda g: g.__name__)
    for f in dataclasses.fields(group)
    if f.metadata["flag"]
]
EVERY_COMMAND = pytest.mark.parametrize("name", lm.COMMANDS)
EVERY_FIELD = pytest.mark.parametrize("group, f", FIELDS, ids=[f.name for _, f in FIELDS])
TRAIN = lm.settings_of(lm.cmd_train)
NO_SHRINKING = (hypothesis.Phase.explicit, hypothesis.Phase.generate)


def read(argv, groups=TRAIN):
    """The settings of some groups from a command line."""
    return lm.read_flags(lm.make_parser("test", "", "", groups), groups, argv)


def faults(argv, groups=TRAIN):
    """The (what, fix) pairs of a bad command line."""
    with pytest.raises(lm.UserError) as caught:
        read(argv, groups)
    return caught.value.faults


def train_flags(*argv):
    """The flat settings of train for these flags."""
    return lm.settings_dict(*read(argv))


# ---- Help ----


@EVERY_COMMAND
def test_help_shows_every_flag_with_its_default_under_its_topic(run, name, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")
    code, out, err = run([name, "--help_all"])
    command = lm.COMMANDS[name]
    assert code == 0 and err == "" and command.example in out and command.about in out
    for group in lm.settings_of(command.run):
        topic = out.split(f"{group.__doc__.rstrip('.')}:\n")[1].split("\n\n")[0]
        topic = re.sub(r"\n {4,}", " ", topic)  # the help of a long flag stands below it
        shown = re.findall(r"^  (--\w+|PATH)\b(.*)\(default: (.*)\)$", topic, re.M)
        flags = [f for f in dataclasses.fields(group) if f.metadata["flag"]]
        assert len(shown) == len(flags)
        for f, (flag, text, default) in zip(flags, shown, strict=True):
            assert flag == ("PATH" if f.metadata["positional"] else f"--{f.name}")
            plain = f.metadata["zero"] or str(f.default)
            assert default == ("none" if f.default in ("", ()) else plain)
            assert f.metadata["help"] in text
            assert all(choice in text for choice in f.metadata["choices"])


def test_help_wrapped_to_a_narrow_terminal_still_works(run, monkeypatch):
    monkeypatch.setenv("COLUMNS", "30")
    assert run(["train", "--help"])[0] == 0


def test_examples_in_the_help_are_command_lines_without_a_fault():
    for name, command in lm.COMMANDS.items():
        words = lm.shlex.split(command.example)
        assert words[:3] == ["python", lm.PROGRAM, name]
        lm.read_command(command.run, words[3:])


@EVERY_COMMAND
def test_no_command_has_one_flag_twice(name):
    names = [
        f.name for group in lm.settings_of(lm.COMMANDS[name].run) for f in dataclasses.fields(group)
    ]
    assert len(names) == len(set(names))


def test_the_original_flags_keep_their_names():
    train = """out_dir data_dir seq_len batch_size grad_accum_steps n_layer n_head d_model ffn_mult
    max_steps warmup_steps lr weight_decay dropout compile eval_interval ckpt_interval"""
    generate = """ckpt spm prompt max_new_tokens temperature top_k top_p repetition_penalty
    no_repeat_ngram_size"""
    for name, flags in (
        ("prep", "text_path out_dir vocab_size val_split"),
        ("train", train),
        ("generate", generate),
    ):
        groups = lm.settings_of(lm.COMMANDS[name].run)
        every = [f for g in groups for f in dataclasses.fields(g)]
        names = {f.name for f in every} | {f.metadata.get("also") for f in every}
        assert set(flags.split()) <= names


def test_an_older_name_of_a_flag_is_the_flag(tmp_path):
    parser = lm.make_parser("x", "about", "example", (lm.GenerateSettings,))
    for flag in ("--spm", "--tokenizer"):
        (found,) = lm.read_flags(parser, (lm.GenerateSettings,), [flag, "a", *"--ckpt b".split()])
        assert found.tokenizer == "a"


# ---- Values ----


@pytest.mark.parametrize(
    "text, value",
    [
        ("7", 7),
        ("1e6", 10**6),
        ("1_000_000", 10**6),
        ("2.0", 2),
        ("+3", 3),
        ("12345678901234567", 12345678901234567),  # more digits than a float holds
    ],
)
def test_whole_numbers(text, value):
    assert train_flags("--max_steps", text)["max_steps"] == value
    assert type(train_flags("--max_steps", text)["max_steps"]) is int


@pytest.mark.parametrize(
    "text", ["1.5", "1e-1", "ten", "", "nan", "inf", "-inf", "1e400", "0x10", "1,000", "1 000"]
)
def test_what_is_no_whole_number(text):
    ((what, fix),) = faults([f"--max_steps={text}"])
    assert "--max_steps" in what and "whole number" in what and fix


@pytest.mark.parametrize("text", ["nan", "inf", "-inf", "1e999", "", "fast", "1,5"])
@pytest.mark.parametrize("flag", [f.name for g, f in FIELDS if f.type is float and g in TRAIN])
def test_no_float_flag_takes_what_is_no_finite_number(flag, text):
    ((what, _),) = faults([f"--{flag}={text}"])
    assert f"--{flag}" in what


@pytest.mark.parametrize(
    "argv, value",
    [
        (["--overwrite"], True),
        (["--overwrite", "1"], True),
        (["--overwrite", "0"], False),
        (["--overwrite", "No"], False),
        (["--overwrite=off"], False),
        (["--overwrite", "TRUE"], True),
        ([], False),
        (["--overwrite", "--merge"], True),
    ],
)
def test_switches(argv, value):
    groups = (lm.PrepSettings,)
    (settings,) = read([*argv, "--text_path", "a", "--out_dir", "b"], groups)
    assert settings.overwrite is value


@pytest.mark.parametrize("argv", [["--wandb", ""], ["--wandb="]])
def test_an_empty_text_takes_back_what_a_file_of_flags_gave(argv):
    assert train_flags("--wandb", "project", *argv)["wandb"] == ""


def test_a_switch_swallows_no_file_name():
    ((what, _),) = faults(
        ["--out_dir", "d", "--text_path", "a", "--overwrite", "docs.txt"], (lm.PrepSettings,)
    )
    assert "--overwrite docs.txt" in what


@EVERY_FIELD
def test_every_bound_and_choice_is_checked(group, f):
    """One below the least, the bound itself, and a word out of the choices, for every field."""
    bad = [f.metadata["least"] - 1] if f.metadata["least"] is not None else []
    bad += [f.metadata["below"]] if f.metadata["below"] is not None else []
    bad += ["no-such-choice"] if f.metadata["choices"] else []
    for value in bad:
        found = list(lm.field_faults(dataclasses.replace(group(), **{f.name: value})))
        assert [what for what, _ in found if f"--{f.name} {value} " in what], value


@EVERY_FIELD
def test_every_default_is_without_a_fault_and_of_its_type(group, f):
    assert not list(lm.field_faults(group()))
    assert isinstance(f.default, tuple if f.type == tuple[str, ...] else f.type)


def test_values_at_their_bounds_are_taken():
    got = train_flags("--dropout", "0", "--beta1", "0", "--weight_decay", "0", "--max_steps", "1")
    assert (got["dropout"], got["beta1"], got["max_steps"]) == (0, 0, 1)


# ---- Presets ----


@pytest.mark.parametrize(
    "argv",
    [
        ["--preset", "350m", "--n_layer", "3"],
        ["--n_layer", "3", "--preset", "350m"],
    ],
)
def test_a_flag_wins_over_the_preset_on_either_side_of_it(argv):
    got = train_flags(*argv)
    assert got["n_layer"] == 3 and got["d_model"] == 1024


def test_a_flag_that_repeats_the_default_still_wins_over_the_preset():
    assert train_flags("--preset", "700m", "--n_layer", "12")["n_layer"] == 12


def test_an_unknown_preset_is_corrected():
    ((what, fix),) = faults(["--preset", "138"])
    assert "138" in what and "did you mean 138m?" in fix


@pytest.mark.parametrize(
    "name, layers, width, ffn, published",
    [
        ("138m", 12, 768, 3072, 137.8e6),
        ("350m", 24, 1024, 4096, None),
        ("700m", 32, 1280, 5120, None),
    ],
)
def test_parameter_counts_of_the_presets(name, layers, width, ffn, published):
    """q, k, v, o and three feed-forward matrices a layer, two norms, one tied embedding."""
    config = dataclasses.replace(read(["--preset", name])[2], vocab_size=32000)
    layer = 4 * width**2 + 3 * width * ffn + 2 * width
    counts = lm.parameter_counts(config)
    assert counts["blocks"] == layers * layer + width
    assert counts["embedding"] == 32000 * width and counts["head"] == 0
    assert counts["total"] == counts["blocks"] + counts["embedding"]
    assert published is None or abs(counts["total"] - published) < 0.1e6
    assert not lm.check(config)


def test_an_untied_head_and_fewer_key_heads_are_counted():
    config = read(
        [
            "--tie",
            "0",
            "--d_model",
            "64",
            "--n_head",
            "8",
            "--n_kv_head",
            "2",
            "--n_layer",
            "3",
            "--ffn_hidden",
            "100",
        ]
    )[2]
    config = dataclasses.replace(config, vocab_size=500)
    layer = 2 * 64 * 64 + 2 * 64 * 16 + 3 * 64 * 100 + 2 * 64
    assert lm.parameter_counts(config) == {
        "embedding": 32000,
        "head": 32000,
        "blocks": 3 * layer + 64,
        "total": 64064 + 3 * layer,
        "active": 64064 + 3 * layer,
    }


# ---- Faults ----


def test_all_faults_of_a_command_line_come_together(run):
    code, out, err = run(
        [
            "train",
            "--lr",
            "fast",
            "--d_modle",
            "512",
            "--n_head",
            "7",
            "--schedule",
            "cosin",
            "--dropout",
            "1",
        ]
    )
    assert code == 2 and out == ""
    assert err.count("error: ") == err.count("fix: ") == 5
    for part in (
        "--lr fast is not a number",
        "did you mean --d_model?",
        "--n_head 7 does not",
        "did you mean cosine?",
        "--dropout 1.0 is too large",
    ):
        assert part in err


def test_missing_flags_are_reported_with_the_rest(run):
    code, _, err = run(["prep", "--vocab_size", "10", "--shard", "4/4"])
    assert code == 2 and err.count("error: ") == 5
    for part in (
        "--out_dir is missing",
        "--text_path is missing",
        "--vocab_size 10",
        "--shard 4/4 is not one",
        "--shard needs --tokenizer",
    ):
        assert part in err


@pytest.mark.parametrize(
    "argv, hint",
    [
        (["--learning_rate", "1"], "--help"),
        (["--d-model", "64"], "--d_model"),
        (["--max_step=5"], "--max_steps"),
        (["-lr", "1"], "--lr"),
        (["--batchsize", "4"], "batch_size"),
        (["stray"], "quotes"),
        (["--n_lay", "3"], "--n_layer"),
    ],
)
def test_unknown_flags_are_corrected(argv, hint):
    found = faults(argv)
    assert len(found) == 1 and argv[0] in found[0][0] and hint in found[0][1]


def test_every_unknown_flag_is_told():
    whats = [what for what, _ in faults(["--foo", "1", "--bar", "2"])]
    assert len(whats) == 2 and "--foo" in whats[0] and "--bar" in whats[1]


@pytest.mark.parametrize("argv", [["--lr"], ["--text_path"], ["--vocab_size", "--overwrite"]])
def test_a_flag_without_its_value_is_the_users_mistake(run, argv):
    code, _, err = run(["train" if "--lr" in argv else "prep", *argv])
    assert code == 2 and argv[0] in err and "fix: " in err


def test_a_negative_learning_rate_is_too_small_in_any_spelling():
    for text in ("-1", "-0.001", "-1e-3"):
        assert "--lr" in faults([f"--lr={text}"])[0][0]


# ---- Heads ----


def suggested(fix, flag):
    """The values that a fix names for a flag."""
    found = re.search(rf"--{flag} (\d+(?: or \d+)*)", fix)
    return [int(n) for n in found[1].split(" or ")] if found else []


def divides(width, heads):
    return width % heads == 0 and width // heads % 2 == 0


def test_the_sizes_that_cannot_be_built_name_the_nearest_that_can():
    ((what, fix),) = faults(["--d_model", "1024", "--n_head", "20"])
    assert "--n_head 20" in what and "--d_model 1024" in what
    assert 16 in suggested(fix, "n_head") and suggested(fix, "d_model") == [1000, 1040]
    ((_, fix),) = faults(["--d_model", "1280", "--n_head", "24"])
    assert 20 in suggested(fix, "n_head")


@given(st.integers(2, 600), st.integers(1, 80))
def test_every_suggested_shape_can_be_built_and_is_the_nearest(width, heads):
    found = lm.check(lm.ModelSettings(d_model=width, n_head=heads))
    assert bool(found) == (not divides(width, heads))
    assume(found)
    ((_, fix),) = found
    near, widths = suggested(fix, "n_head"), suggested(fix, "d_model")
    possible = [h for h in range(1, width + 1) if divides(width, h)]
    assert all(divides(width, h) for h in near) and bool(near) == bool(possible)
    assert not near or min(abs(h - heads) for h in near) == min(abs(h - heads) for h in possible)
    assert widths and all(divides(w, heads) for w in widths)
    best = min(abs(w - width) for w in range(1, 2 * width + 4 * heads) if divides(w, heads))
    assert min(abs(w - width) for w in widths) == best


def test_the_fix_of_an_odd_head_dim_is_no_other_flag():
    """With --head_dim given, neither --n_head nor --d_model changes the head size."""
    ((what, fix),) = lm.check(lm.ModelSettings(d_model=64, n_head=4, head_dim=33))
    assert "33" in what and "--head_dim" in fix
    assert not suggested(fix, "n_head") and not suggested(fix, "d_model")


def test_key_heads_must_divide_the_query_heads():
    ((what, fix),) = faults(["--n_kv_head", "5"])
    assert "--n_kv_head 5" in what and suggested("--x " + fix.removeprefix("use "), "x") == [
        1,
        2,
        3,
        4,
        6,
        12,
    ]


@pytest.mark.parametrize(
    "argv",
    [
        ["--n_head", "0"],
        ["--d_model", "0"],
        ["--n_head", "-4"],
        ["--n_kv_head", "-1"],
        ["--head_dim", "-64"],
        ["--seq_len", "1"],
        ["--n_layer", "0"],
        [
            "--d_model",
            "64",
            "--n_head",
            "4",
            "--ffn_mult",
            "0.01",
        ],  # a feed-forward layer of width 0
    ],
)
def test_shapes_of_nothing_are_refused_without_a_traceback(argv):
    assert faults(argv)


# ---- @FILE and args.txt ----


def test_flags_from_a_file_with_comments_quotes_and_blank_lines(tmp_path):
    path = tmp_path / "flags.txt"
    path.write_text(
        "# a comment\n--lr 3e-4   # the peak\n\n--out_dir 'my runs/東京 #1'\n"
        "--tie\n0\n--max_steps=5\n",
        encoding="utf-8",
    )
    got = train_flags(f"@{path}")
    assert (got["lr"], got["out_dir"], got["tie"], got["max_steps"]) == (
        3e-4,
        "my runs/東京 #1",
        False,
        5,
    )


def test_the_later_flag_wins_over_the_file_and_the_file_over_an_earlier_flag(tmp_path):
    path = tmp_path / "flags.txt"
    path.write_text("--max_steps 5\n")
    assert train_flags(f"@{path}", "--max_steps", "7")["max_steps"] == 7
    assert train_flags("--max_steps", "7", f"@{path}")["max_steps"] == 5


def test_a_hash_inside_a_word_is_no_comment(tmp_path):
    """As in a shell; else the run would quietly go into another folder."""
    path = tmp_path / "flags.txt"
    path.write_text("--out_dir runs/c#1\n")
    assert train_flags(f"@{path}")["out_dir"] == "runs/c#1"


@pytest.mark.parametrize("text", ["--out_dir bob's\n", '--wandb "open\n', "--out_dir x\\"])
def test_an_open_quote_in_a_file_is_the_users_mistake(run, tmp_path, text):
    path = tmp_path / "flags.txt"
    path.write_text(text)
    code, _, err = run(["train", f"@{path}"])
    assert code == 2 and "error: " in err


def test_a_missing_flag_file_is_named(run):
    code, _, err = run(["train", "@no/such/args.txt"])
    assert code == 2 and "no/such/args.txt" in err and "fix: " in err


def test_a_flag_file_that_is_no_text_is_the_users_mistake(run, tmp_path):
    path = tmp_path / "flags.txt"
    path.write_bytes(b"--out_dir \xff\xfe\x00\n\xd0")
    code, _, err = run(["train", f"@{path}"])
    assert code == 2 and "error: " in err


def values(f):
    """A strategy of values that a field's flag allows."""
    least, below = f.metadata["least"], f.metadata["below"]
    words = st.text("ab.é東 #'\"\\=@-$%{}*,0", min_size=1, max_size=8)
    if f.metadata["choices"]:
        return st.sampled_from(f.metadata["choices"])
    if f.name == "shard":
        return st.sampled_from(("", "0/4", "11/12"))
    if f.type == tuple[str, ...]:  # argparse takes no list with a dash in front, save - itself
        plain = words.filter(lambda word: word[0] not in "-@") | st.just("-")
        return st.lists(plain, min_size=1, max_size=3).map(tuple)
    if f.type is int:
        return st.integers(least or 0, 10**12 if below is None else below - 1)
    if f.type is float:
        top = {} if below is None else {"max_value": below, "exclude_max": True}
        return st.floats(least or 0.0, allow_infinity=False, allow_nan=False, **top)
    return st.booleans() if f.type is bool else words


def any_settings(group):
    names = {f.name: values(f) for f in dataclasses.fields(group) if f.metadata["flag"]}
    return st.builds(group, **names)


@pytest.fixture(scope="module")
def args_file(tmp_path_factory):
    return tmp_path_factory.mktemp("args") / "args.txt"


@pytest.mark.parametrize(
    "group",
    [
        lm.PrepSettings,
        lm.RunSettings,
        lm.OptimSettings,
        lm.DataSettings,
        lm.DeviceSettings,
        lm.SamplingSettings,
    ],
)
def test_args_txt_reads_back_equal(group, args_file):
    """Whatever a value holds: spaces, quotes, a dash or an @ in front, a hash, more digits."""

    @hypothesis.settings(max_examples=50, phases=NO_SHRINKING)
    @given(any_settings(group))
    def check(settings):
        if group is lm.DataSettings:  # which takes one of both
            settings = dataclasses.replace(settings, epochs=0.0)
        if group is lm.RunSettings:  # whose time has a form
            settings = dataclasses.replace(settings, time=settings.time and "1.5h")
            settings = dataclasses.replace(settings, max_steps=0 if settings.time else 7)
        assume(not lm.check(settings))
        args_file.write_text(lm.settings_text(settings), encoding="utf-8")
        (again,) = read([f"@{args_file}"], (group,))
        once = {"preset": "", "resume": True, "profile": 0, "max_hours": 0.0}  # not repeated
        expected = dataclasses.replace(
            settings, **{name: value for name, value in once.items() if hasattr(settings, name)}
        )
        assert again == expected

    check()


def test_args_txt_spells_the_preset_out(tmp_path):
    made = read(["--preset", "350m", "--n_layer", "2", "--tie", "0"])
    text = lm.settings_text(*made)
    assert "--preset" not in text and "--d_model=1024" in text and "--n_layer=2" in text
    path = tmp_path / "args.txt"
    path.write_text(text)
    again = lm.settings_dict(*read([f"@{path}"]))
    assert again == {**lm.settings_dict(*made), "preset": ""}


def test_args_txt_has_no_line_for_what_is_no_flag():
    text = lm.settings_text(lm.ModelSettings(vocab_size=99))
    assert "vocab_size" not in text and "rope_layout" not in text


def test_the_checkpoint_config_makes_the_settings_again():
    config = lm.ModelSettings(d_model=64, n_head=4, vocab_size=77)
    assert lm.ModelSettings(**lm.settings_dict(config)) == config


def test_a_flag_of_another_command_is_named_as_such(run):
    complaint(run(["train", "--pack", 1]), "--pack is not a flag of this command", "sft")
    complaint(run(["train", "--vocab_size", 300]), "--vocab_size is not a flag", "prep")


def test_a_mistaken_start_points_to_the_flags_of_the_run_there(run, tmp_path):
    (tmp_path / "args.txt").write_text("--data_dir=elsewhere\n")
    result = run(["train", "--out_dir", tmp_path, "--data_dir", tmp_path / "none"])
    complaint(result, "does not exist", f"@{tmp_path}/args.txt")


@pytest.mark.parametrize("kind", [lm.TuneRun, lm.GrpoRun, lm.BenchSettings])
def test_settings_with_other_defaults_can_be_pickled(kind):
    assert pickle.loads(pickle.dumps(kind())) == kind()


def dpo_of(*flags):
    found = lm.read_command(lm.cmd_dpo, ["--ckpt", "x.pt", "--data", "y.jsonl", *flags])
    return next(one for one in found if isinstance(one, lm.DpoSettings))


def test_simpo_has_a_beta_of_its_own_unless_one_is_given():
    assert dpo_of("--loss", "simpo").beta == 2.0
    assert dpo_of("--loss", "simpo", "--beta", "0.5").beta == 0.5
    assert dpo_of().beta == dpo_of("--loss", "ipo").beta == 0.1


@pytest.mark.parametrize("loss", ["ipo", "hinge", "apo_zero", "apo_down", "orpo"])
def test_label_smoothing_is_refused_where_a_loss_ignores_it(loss):
    with pytest.raises(lm.UserError, match=f"label_smoothing has no meaning in --loss {loss}"):
        dpo_of("--label_smoothing", "0.1", "--loss", loss)
    assert dpo_of("--label_smoothing", "0.1").label_smoothing == 0.1


# ---- Help in two tiers ----


@pytest.mark.parametrize("name", lm.COMMANDS)
def test_help_shows_what_most_people_set_and_says_where_the_rest_is(name, run):
    groups = lm.settings_of(lm.COMMANDS[name].run)
    flags = lm.flags(*groups)
    flags = [f for f in flags if not f.metadata["positional"]]
    basic = [f.name for f in flags if f.metadata["basic"]]
    code, out, err = run([name, "--help"])
    assert code == 0, err
    options = out.split("options:")[1] if "options:" in out else out
    shown = re.findall(r"(?m)^  --([a-z_]+)", options)
    assert set(basic) <= set(shown)
    assert not {f.name for f in flags if f.name not in basic} & set(shown)
    hidden = len(flags) - len(basic)
    assert (f"--help_all explains {hidden} more flags." in out) == (hidden > 0)
    assert len(basic) <= 32


def test_every_flag_works_whether_it_is_shown_or_not(run):
    assert "--muon_scale" not in run(["train", "--help"])[1]
    command = lm.COMMANDS["train"].run
    optim = lm.read_command(command, ["--muon_scale", "shape"])[3]
    assert optim.muon_scale == "shape"


def test_train_runs_for_tokens_or_epochs(data_dir, run, tmp_path):
    tokens = lm.TokenFolder(data_dir).meta["splits"]["train"]["tokens"]
    shape = [*TINY, "--data_dir", data_dir, "--eval_interval", 1000]
    for flags, wanted in (
        (["--tokens", 1280], 1280 // (4 * 32)),
        (["--tokens", "1.3e3"], 11),
        (["--epochs", 0.5], math.ceil(0.5 * ((tokens - 1) // 32) / 4)),
    ):
        out = tmp_path / str(wanted)
        code, said, err = run(["train", *shape, *flags, "--out_dir", out])
        assert code == 0 and f"done after {wanted} steps" in said, err
        code, said, _ = run(["train", f"@{out}/args.txt"])
        assert code == 0 and f"done after {wanted} steps" in said
    for flags in (["--max_steps", 9, "--tokens", 9], ["--epochs", 1, "--tokens", 9]):
        complaint(run(["train", *shape, *flags]), "are both given")
