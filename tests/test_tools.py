"""Tools and environments: what they answer, and how answers of several turns are learned from."""

import contextlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import complaint, log_rows, read_pt
from test_lora import save_base, write_rows
from test_rollouts import SMALL, base, terse  # noqa: F401
from test_tuning import two

import standalone_transformer_lm as lm

# ---- The tools ----


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("48/2", "24"),
        ("0.2 * 50", "10"),
        ("(1 + 2) * -3", "-9"),
        ("10/4", "2.5"),
        ("1/3", "0.3333333333"),
        ("1,000 × 2 ÷ 4", "500"),
        ("7", "7"),
    ],
)
def test_the_calculator_calculates(expression, value):
    call = json.dumps({"name": "calculator", "arguments": {"expression": expression}})
    assert lm.use_tool(call, ["calculator"]) == value


@pytest.mark.parametrize(
    "call",
    [
        "no json",
        "[1]",
        "{}",
        '{"name": "calculator"}',
        '{"name": "calculator", "arguments": {"expression": 5}}',
        '{"name": "calculator", "arguments": {"code": "1"}}',
        '{"name": "calculator", "arguments": {"expression": "1/0"}}',
        '{"name": "calculator", "arguments": {"expression": "2**99"}}',
        '{"name": "calculator", "arguments": {"expression": "9*' + "9" * 300 + '"}}',
        '{"name": "calculator", "arguments": {"expression": "__import__(1)"}}',
        '{"name": "python", "arguments": {"code": "1"}}',
        '{"name": ["x"], "arguments": 1}',
        "[" * 100000,
    ],
)
def test_mistakes_in_a_call_are_answered_in_a_sentence(call):
    assert lm.use_tool(call, ["calculator"]).startswith("error: ")


@pytest.mark.parametrize(
    ("code", "printed"),
    [
        ("print(1 + 1)", "2"),
        ("x = 3\nx ** 2", "9"),
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("x = 1", "(nothing was printed)"),
        ("import os\nos.listdir('.')", "[]"),
        ("print('é' * 3)", "ééé"),
        ("for", "SyntaxError"),
    ],
)
def test_programs_show_what_they_print(code, printed):
    assert lm.run_python(code).startswith(printed)


def test_programs_have_limits(monkeypatch):
    monkeypatch.setattr(lm, "TOOL_SECONDS", 1.0)
    began = time.monotonic()
    assert "took more than 1 seconds" in lm.run_python("print(1)\nwhile True: pass")
    assert len(lm.run_python("while True: print('x' * 1000)")) <= lm.TOOL_OUTPUT
    assert "Error" in lm.run_python("x = bytearray(1 << 34)")
    assert time.monotonic() - began < 10


# ---- Tests of programs ----

SQUARE = "def f(x): return x * x"


@pytest.mark.parametrize(
    ("row", "program", "share"),
    [
        ({"tests": ["assert f(2) == 4", "assert f(3) == 9"]}, SQUARE, 1.0),
        ({"tests": ["assert f(2) == 4", "assert f(3) == 8"]}, SQUARE, 0.5),
        ({"tests": ["assert f(2) == 5", "assert f(3) == 9", "assert g()"]}, SQUARE, 1 / 3),
        ({"tests": ["import os\nos._exit(0)", "assert f(3) == 9"]}, SQUARE, 0.0),
        ({"tests": ["assert f(3) == 9", "while True: pass", "assert f(1) == 1"]}, SQUARE, 1 / 3),
        ({"tests": ["assert f(3) == 9"]}, "def f(x", 0.0),
        (
            {"tests": [{"input": "2 3\n", "output": "5"}]},
            "print(sum(map(int, input().split())))",
            1,
        ),
        (
            {"tests": [{"input": "1", "output": "2"}, {"input": "2", "output": "4 \n"}]},
            "print(2 * int(input()))",
            1,
        ),
        ({"input_output": '{"inputs": ["1", "2"], "outputs": ["1", "1"]}'}, "print(input())", 0.5),
        ({"tests": [{"input": "1", "output": "1"}]}, "import sys\nprint(1)\nsys.exit()", 1),
    ],
)
def test_the_share_of_tests_is_the_reward(row, program, share):
    lm.check_code_row(row)
    [found] = lm.CodeReward(2.0).score([("", f"```python\n{program}\n```", row)])
    assert found == pytest.approx(share)


@pytest.mark.parametrize(
    "row",
    [
        {"tests": [{"input": "1"}]},
        {"input_output": "{"},
        {"input_output": {"inputs": ["1"], "outputs": []}},
        {"tests": ["assert 1"] * 1001},
    ],
)
def test_rows_of_bad_tests_are_refused(row):
    with pytest.raises(ValueError, match="tests"):
        lm.check_code_row(row)


def test_a_program_is_right_only_where_all_tests_pass():
    rewards = lm.Rewards(("code", "length"), 2.0, 4, None)
    assert not rewards.right(np.array([0.9, 0])) and rewards.right(np.array([1.0, 0]))
    other = lm.Rewards(("exact",), 2.0, 4, None)
    assert other.right(np.array([0.6]))


# ---- Calls in what is said ----


def test_a_call_is_found_in_what_was_said(tiny_tokenizer):
    tokenizer = lm.Tokenizer(tiny_tokenizer)
    call = '{"name": "calculator", "arguments": {"expression": "1+1"}}'
    turns = [lm.Turn("user", "x"), lm.Turn("assistant", "So", calls=(call,))]
    asked, _ = lm.encode_chat(tokenizer, turns[:1], reply=True)
    ids, _ = lm.encode_chat(tokenizer, turns)
    assert lm.assistant_turn(tokenizer, ids[len(asked) :]) == turns[1]
    twice = [lm.Turn("assistant", "So", calls=(call, "{}"))]
    both, _ = lm.encode_chat(tokenizer, turns[:1] + twice)
    assert lm.assistant_turn(tokenizer, both[len(asked) :]).calls == (call,), "one call a turn"
    plain, _ = lm.encode_chat(tokenizer, [turns[0], lm.Turn("assistant", "No call")])
    assert lm.assistant_turn(tokenizer, plain[len(asked) :]) == lm.Turn("assistant", "No call")


@pytest.mark.parametrize("text", ["a <tool_call>\n{}\n</tool_call>", "a <|call|>{}"])
def test_calls_that_are_written_out_are_found_too(text):
    class Plain:
        roles, stops = {}, frozenset()

        def decode(self, ids):
            return text

    found = lm.assistant_turn(Plain(), [1, 2])
    assert found.text == "a " and found.calls == ("{}",)


# ---- Answers of several turns ----


class Says:
    """An environment that says the same to every answer, so many times."""

    def __init__(self, text="go on", times=9, pays=0.0):
        self.text, self.times, self.pays = text, times, pays

    def step(self, rows):
        found = []
        for state, _ in rows:
            count = len(state)
            observation = lm.Turn("user", self.text) if count < self.times else None
            found.append(lm.Step(state + b".", observation, self.pays))
        return found


def sampler_of(path, **settings):
    saved = lm.load_checkpoint(path)
    tokenizer = lm.tokenizer_of(saved, "", path)
    machine = lm.Machine(torch.device("cpu"), torch.float32)
    chosen = lm.RolloutSettings(max_new_tokens=12, rollout_batch=3, **settings)
    rewards = lm.Rewards(("length",), 5.0, 4, machine)
    return lm.Sampler(
        lm.build_model(saved, machine.device), tokenizer, rewards, chosen, machine, False, Says()
    )


def problems(tokenizer, count=6):
    found = []
    for i in range(count):
        turns = [lm.Turn("user", f"question {i}")]
        ids, _ = lm.encode_chat(tokenizer, turns, reply=True)
        found.append(lm.Problem(np.array(ids), turns, {}))
    return found


def test_log_probs_are_the_models_over_all_turns(terse):  # noqa: F811
    """Each drawn id is scored as the whole text before it says, observations included."""
    sampler = sampler_of(terse)
    sampler.renew()
    asked = problems(sampler.tokenizer)
    found = sampler.answers(asked, 1.0, 3, range(len(asked)))
    assert any(not all(one.own) for one in found), "some had several turns"
    for problem, one in zip(asked, found, strict=True):
        ids = [*problem.ids.tolist(), *one.ids]
        logps = sampler.model(torch.tensor([ids]))[0].log_softmax(-1)
        places = [len(problem.ids) + i for i, own in enumerate(one.own) if own]
        wanted = [float(logps[place - 1, ids[place]]) for place in places]
        assert one.logps == pytest.approx(wanted, abs=1e-4)
        assert len(one.logps) <= 12
        turns = lm.assistant_turn(sampler.tokenizer, [])  # an empty answer is one too
        assert turns.text == ""


def test_turns_are_spelled_as_sft_has_them(terse):  # noqa: F811
    sampler = sampler_of(terse, max_turns=3)
    sampler.renew()
    tokenizer = sampler.tokenizer
    asked = problems(tokenizer)
    episodes = lm.Episodes(
        tokenizer,
        [one.turns for one in asked],
        [one.ids.tolist() for one in asked],
        Says(),
        3,
    )
    drawn, _ = sampler.generate(asked, 1.0, 3, range(len(asked)), episodes)
    longest = 0
    for row, ids in enumerate(drawn):
        laid, own = episodes.laid(row, ids)
        assert [token for token, mine in zip(laid, own, strict=True) if mine] == ids
        said = [turn for turn in episodes.turns[row] if turn.role == "assistant"]
        longest = max(longest, len(said))
        assert len(said) <= 3
        if ids[-1] in tokenizer.stops and not any(turn.text for turn in said):
            whole, _ = lm.encode_chat(tokenizer, episodes.turns[row])
            assert [*asked[row].ids, *laid] == whole
    assert longest == 3, "and no more"


def test_a_batch_of_any_size_draws_the_same(terse):  # noqa: F811
    found = []
    for size in (1, 3, 64):
        sampler = sampler_of(terse)
        sampler.settings = lm.replace(sampler.settings, rollout_batch=size)
        sampler.renew()
        asked = problems(sampler.tokenizer)
        found.append([one.ids for one in sampler.answers(asked, 1.0, 3, range(len(asked)))])
    assert found[0] == found[1] == found[2]


def test_an_episode_ends_where_the_context_does(terse):  # noqa: F811
    sampler = sampler_of(terse, max_turns=50)
    sampler.environment = Says("more", 50)
    sampler.settings = lm.replace(sampler.settings, max_new_tokens=60)
    sampler.renew()
    asked = problems(sampler.tokenizer)
    found = sampler.answers(asked, 1.0, 3, range(6))
    lengths = [len(a.ids) + len(b.ids) for a, b in zip(asked, found, strict=True)]
    assert max(lengths) == 64
    for problem, one in zip(asked, found, strict=True):
        drawn_last = max(i for i, own in enumerate(one.own) if own)
        assert len(problem.ids) + drawn_last < 64
        ids = [*problem.ids.tolist(), *one.ids]
        logps = sampler.model(torch.tensor([ids]))[0].log_softmax(-1)
        places = [len(problem.ids) + i for i, own in enumerate(one.own) if own]
        wanted = [float(logps[place - 1, ids[place]]) for place in places]
        assert one.logps == pytest.approx(wanted, abs=1e-4), "nothing was dropped"
        assert not one.ended or all(one.own)


def test_what_has_no_room_is_not_heard(terse):  # noqa: F811
    """So that no row is longer than the context, and the last answer is still one."""
    sampler = sampler_of(terse, max_turns=50)
    sampler.environment = Says("a long observation, which fills the context " * 4, 50)
    sampler.renew()
    asked = problems(sampler.tokenizer)
    found = sampler.answers(asked, 1.0, 3, range(6))
    plain = sampler_of(terse)
    plain.environment = None
    plain.renew()
    alone = plain.answers(asked, 1.0, 3, range(6))
    assert [one.ids for one in found] == [one.ids for one in alone]
    assert [one.text for one in found] == [one.text for one in alone]
    assert not any(one.ended for one in found) and any(one.ended for one in alone)


@pytest.mark.parametrize("shared", [True, False])
def test_observations_carry_no_loss(terse, shared):  # noqa: F811
    sampler = sampler_of(terse)
    sampler.renew()
    groups = sampler.draw(problems(sampler.tokenizer, 3), 4, 1.0, 3, 0)
    rollout = lm.Rollout(groups, 1.0, 1, 4, shared=shared)
    assert int(rollout.lengths.sum()) == len(rollout.sampled)
    assert any(not one.own.all() for group in groups for one in group)
    for micro in rollout.micros():
        for row, ids, targets in zip(micro.rows, micro.ids, micro.targets, strict=True):
            one = rollout.completions[row]
            learned = targets[targets != lm.IGNORE]
            assert learned.tolist() == one.ids[one.own].tolist()
            if not shared:
                places = torch.nonzero(targets != lm.IGNORE).flatten()
                assert torch.equal(ids[places[1:]], targets[places[1:] - 1]) or not one.own.all()
    values = torch.arange(len(rollout.sampled)).float()
    laid = [batch[2] for batch in rollout.batches([*rollout.micros()], [values])]
    back = rollout.collect(zip(rollout.micros(), laid, strict=True))
    assert torch.equal(back, values)


# ---- Runs ----

GAME = """
class Game:
    def reset(self, row):
        self.wanted, self.tries = row["wanted"], 0
        return [{"role": "user", "content": row["ask"]}]

    def step(self, text):
        self.tries += 1
        if row_is_bad(text):
            raise ValueError("no such move")
        return f"try {self.tries}", float(not text) / 10, self.tries == 3

def row_is_bad(text):
    return "BAD" in text
"""
SHORT_EPISODES = ["--max_new_tokens", 12, "--max_turns", 3, "--lr", 1e-3]


@pytest.fixture
def game(tmp_path):
    """The flags of runs in an environment, and a file of its rows."""
    (tmp_path / "game.py").write_text(GAME)
    rows = write_rows(
        tmp_path / "rows.jsonl", [{"ask": f"move {i}", "wanted": i} for i in range(20)]
    )
    return ["--env", f"{tmp_path / 'game.py'}:Game", "--data", rows, *SHORT_EPISODES]


@pytest.mark.parametrize("algo", ["grpo", "dapo", "gspo", "cispo", "dr_grpo", "ppo", "vapo"])
def test_every_algorithm_learns_from_episodes(run, terse, game, tmp_path, algo):  # noqa: F811
    argv = ["grpo", *SMALL, "--ckpt", terse, "--out_dir", tmp_path / "run", *game, "--algo", algo]
    code, told, err = run([*argv, "--reward", "length:0.1"])
    assert code == 0, err
    assert "rewards: env, length" in told
    rows = [row for row in log_rows(tmp_path / "run") if "train/reward" in row]
    assert any(row["train/reward/env"] > 0 for row in rows)
    samples = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").open()]
    assert any("try 1" in row["answer"] for row in samples)


@pytest.mark.slow
def test_a_run_of_episodes_goes_on_to_the_same_bytes(run, terse, game, tmp_path):  # noqa: F811
    argv = ["grpo", *SMALL, "--ckpt", terse, *game, "--max_steps", 4, "--out_dir"]
    assert run([*argv, tmp_path / "a"])[0] == 0
    assert run([*argv, tmp_path / "b", "--max_steps", 2])[0] == 0
    assert run([*argv, tmp_path / "b"])[0] == 0
    first, second = (read_pt(tmp_path / name / "ckpt_last.pt")["model"] for name in "ab")
    assert all(torch.equal(weight, second[name]) for name, weight in first.items())


@pytest.mark.slow
def test_two_ranks_of_episodes_are_one(child, run, terse, game, tmp_path):  # noqa: F811
    argv = ["grpo", *SMALL, "--ckpt", terse, *game, "--prompts", 4, "--out_dir"]
    ended = two(child, [*argv, tmp_path / "both"])
    assert [code for code, _ in ended] == [0, 0], ended
    assert run([*argv, tmp_path / "lone"])[0] == 0
    for a, b in zip(log_rows(tmp_path / "both"), log_rows(tmp_path / "lone"), strict=True):
        for key in {"train/reward", "train/loss", "train/length"} & set(a):
            assert a[key] == pytest.approx(b[key], abs=1e-5), (a["step"], key)


def test_a_run_may_call_tools(run, terse, tmp_path):  # noqa: F811
    rows = write_rows(
        tmp_path / "rows.jsonl", [{"prompt": f"{i}?", "answer": "1"} for i in range(9)]
    )
    argv = ["grpo", *SMALL, "--ckpt", terse, "--data", rows, "--out_dir", tmp_path / "run"]
    code, _, err = run([*argv, *SHORT_EPISODES, "--tools", "calculator", "python"])
    assert code == 0, err


BAD_GAMES = {
    "no file": ("none.py:Game", None, "--env"),
    "no class": ("game.py:Play", GAME, "has no class Play"),
    "no Python": ("game.py:Game", "class Game(:", "cannot be read"),
    "no reset": ("game.py:Game", "class Game:\n    pass", "reset"),
    "no messages": ("game.py:Game", "class Game:\n    def reset(self, row): return 5", "row"),
    "an endless loop": (
        "game.py:Game",
        "class Game:\n    def reset(self, row):\n        while True: pass",
        "took more than 1 seconds",
    ),
}


@pytest.mark.parametrize("name", BAD_GAMES)
def test_mistakes_in_an_environment_are_told(run, base, tmp_path, name):  # noqa: F811
    spec, text, word = BAD_GAMES[name]
    if text:
        (tmp_path / "game.py").write_text(text)
    rows = write_rows(tmp_path / "rows.jsonl", [{"ask": "x", "prompt": "y"}])
    argv = ["grpo", *SMALL, "--ckpt", base, "--data", rows, "--out_dir", tmp_path / "run"]
    result = run([*argv, *SHORT_EPISODES, "--env", tmp_path / spec, "--reward_timeout", 1])
    complaint(result, word)


@pytest.mark.parametrize(
    "fault", ["raise ValueError('no')", "while True: pass", "exit(1)", "return 1"]
)
def test_an_episode_that_fails_costs_itself_alone(tmp_path, fault, capsys):
    text = f"""
class Game:
    def reset(self, row):
        return [{{"role": "user", "content": "?"}}]
    def step(self, text):
        if text == "bad":
            {fault}
        return "next", 0.5, False
"""
    (tmp_path / "game.py").write_text(text)
    one = lm.UserEnvironment(f"{tmp_path / 'game.py'}:Game", 1.0)
    states = [one.reset({})[0] for _ in range(4)]
    said = [lm.Turn("assistant", word) for word in ("good", "bad", "good", "bad")]
    found = one.step([*zip(states, said, strict=True)])
    one.close()
    assert [step.reward for step in found] == [0.5, 0.0, 0.5, 0.0]
    assert [step.observation is None for step in found] == [False, True, False, True]
    assert capsys.readouterr().out.count("that episode ends") == 1


def test_an_environment_draws_the_same_wherever_it_runs(tmp_path):
    text = """
import random
import numpy as np

class Dice:
    def reset(self, row):
        return [{"role": "user", "content": f"{random.random()} {np.random.rand()}"}]
    def step(self, text):
        return f"{random.random()}", 0.0, False
"""
    (tmp_path / "dice.py").write_text(text)
    found = []
    for _ in range(2):
        one = lm.UserEnvironment(f"{tmp_path / 'dice.py'}:Dice", 2.0)
        rolled = [one.reset({"row": i}) for i in (0, 1, 0)]
        said = [(state, lm.Turn("assistant", "x")) for state, _ in rolled]
        found.append([rolled, one.step(said)])
        one.close()
    assert found[0] == found[1]
    (first, second, third), _ = found[0]
    assert first == third and first[1] != second[1]


def test_tools_and_an_environment_are_not_both(run, base, game, tmp_path):  # noqa: F811
    argv = ["grpo", *SMALL, "--ckpt", base, *game, "--out_dir", tmp_path / "run"]
    complaint(run([*argv, "--tools", "calculator"]), "--tools", "--env")
    argv = ["grpo", *SMALL, "--ckpt", base, "--task", "add", "--out_dir", tmp_path / "run"]
    complaint(run([*argv, "--tools", "hammer"]), "hammer", "calculator or python")


# ---- Tools in generate, chat and eval ----


@pytest.fixture(scope="module")
def caller(tmp_path_factory, tiny_tokenizer):
    """A model taught to call the calculator for sums, and then to say the result."""
    folder = tmp_path_factory.mktemp("caller")
    base = save_base(folder / "base.pt", tiny_tokenizer, seq_len=160, d_model=64)  # noqa: F811
    rows = []
    for a in range(2, 8):
        for b in range(2, 8):
            call = {"name": "calculator", "arguments": {"expression": f"{a}+{b}"}}
            rows.append(
                {
                    "messages": [
                        {"role": "user", "content": f"{a} {b}?"},
                        {"role": "assistant", "content": "", "tool_calls": [{"function": call}]},
                        {"role": "tool", "content": str(a + b)},
                        {"role": "assistant", "content": f"It is {a + b}"},
                    ]
                }
            )
    write_rows(folder / "rows.jsonl", rows)
    argv = ["sft", "--ckpt", base, "--data", folder / "rows.jsonl", "--out_dir", folder / "run"]
    argv += "--max_steps 400 --batch_size 8 --lr 5e-3 --val_split 0 --dtype fp32".split()
    argv += "--device cpu --compile 0 --threads 1 --log_interval 100".split()
    assert lm.main([str(word) for word in argv]) == 0
    asked = [{"prompt": f"{a} {a}?", "answer": str(2 * a)} for a in range(2, 8)]
    write_rows(folder / "asked.jsonl", asked)
    return folder


@pytest.mark.slow
def test_the_same_tools_work_everywhere(caller, run, tmp_path):
    ckpt = ["--ckpt", caller / "run", "--device", "cpu"]
    tools = ["--tools", "calculator"]
    asked = ["generate", *ckpt, "--chat", "--temperature", 0, "--max_new_tokens", 100]
    code, told, err = run([*asked, "--prompt", "3 4?", *tools])
    assert code == 0 and "-> 7]" in told and "It is 7" in told, told + err
    out = tmp_path / "answers.jsonl"
    code, _, err = run([*asked, "--prompt_file", caller / "asked.jsonl", "--out", out, *tools])
    rows = [json.loads(line) for line in out.open()]
    assert code == 0 and all(row["ended"] and len(row["calls"]) == 1 for row in rows), err
    assert sum(row["completion"] == f"It is {row['expected']}" for row in rows) >= 5

    found = {}
    for name, more in (("with", tools), ("without", [])):
        argv = ["eval", *ckpt, "--tasks", f"number={caller / 'asked.jsonl'}", *more]
        argv += ["--temperature", 0, "--max_new_tokens", 100, "--out_dir", tmp_path / name]
        code, _, err = run(argv)
        assert code == 0, err
        results = json.loads((tmp_path / name / "results.json").read_text())["results"]
        [[found[name]]] = [[task["acc"] for task in one.values()] for one in results.values()]
    assert found["with"] > 0.8 and found["without"] < 0.5


@pytest.mark.slow
def test_a_conversation_goes_on_behind_a_call(caller, capsys, tmp_path):
    saved = lm.load_checkpoint(caller / "run")
    tokenizer = lm.tokenizer_of(saved, "", caller)
    machine = lm.Machine(torch.device("cpu"), torch.float32)
    model = lm.build_model(saved, machine.device)
    sampling = lm.SamplingSettings(60, temperature=0.0)
    session = lm.ChatSession(
        model, tokenizer, sampling, machine, 0, True, ["calculator"], max_turns=3
    )
    session.take("3 4?")
    told = capsys.readouterr().out
    assert "-> 7]" in told and told.strip().endswith("It is 7")
    assert [turn.role for turn in session.turns] == ["user", "assistant", "tool", "assistant"]
    session.save(str(tmp_path / "kept.json"))
    kept = session.turns
    session.load(str(tmp_path / "kept.json"))
    assert session.turns == kept
    session.retry("")
    assert [turn.role for turn in session.turns] == ["user", "assistant", "tool", "assistant"]


def test_tools_need_a_chat(run, base):  # noqa: F811
    argv = ["generate", "--ckpt", base, "--prompt", "x", "--tools", "calculator"]
    complaint(run([*argv, "--device", "cpu"]), "--chat")


@pytest.mark.slow
def test_the_server_calls_its_tools_itself(caller):
    pytest.importorskip("fastapi")
    import openai
    from test_server import served

    for tools in (("calculator",), ()):
        with served(caller / "run", tools=tools) as (url, _):
            client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
            asked = {"model": "x", "messages": [{"role": "user", "content": "3 4?"}]}
            asked |= {"temperature": 0, "max_tokens": 100}
            found = client.chat.completions.create(**asked)
            [choice] = found.choices
            pieces = [*client.chat.completions.create(**asked, stream=True)]
            text = "".join(piece.choices[0].delta.content or "" for piece in pieces)
            ends = [one.choices[0].finish_reason for one in pieces if one.choices[0].finish_reason]
        if tools:
            assert choice.message.content == text == "It is 7" and choice.finish_reason == "stop"
            assert choice.message.tool_calls is None and ends == ["stop"]
            assert "-> 7]" in choice.message.called[0]
            assert found.usage.completion_tokens > 20, "both turns"
        else:
            assert choice.message.tool_calls[0].function.name == "calculator"
            assert ends == ["tool_calls"]


def test_equal_programs_run_once(monkeypatch):
    runs, original = [], lm.run_program
    monkeypatch.setattr(lm, "run_program", lambda *args: runs.append(args) or original(*args))
    one, other = {"tests": ["assert f(2) == 4"]}, {"tests": ["assert f(2) == 5"]}
    answers = [SQUARE, f"```python\n{SQUARE}\n```", "def f(x): return 5"]
    calls = [("", answer, row) for row in (one, other) for answer in answers * 2]
    assert lm.CodeReward(5.0).score(calls) == [1, 1, 0, 1, 1, 0, 0, 0, 1, 0, 0, 1]
    assert len(runs) <= 6


# ---- Hostile programs ----


@pytest.mark.skipif(not lm.has_namespaces(), reason="this system gives no namespaces")
def test_no_mount_can_be_written_to_nor_made_so():
    """Not the root alone: whoever runs as root owns what is in /dev, /proc and /sys too."""
    places = {line.split()[1] for line in Path("/proc/self/mounts").read_text().splitlines()}
    assert {"/", "/proc", "/dev"} <= places
    writes = f"""
import os, subprocess
def writable(place):
    try:
        open(place + "/hostile-canary", "w").close()
        return True
    except OSError:
        return False
places = {sorted(places - {"/dev/shm"})!r}
assert not [place for place in places if writable(place)], places
for place in places:
    subprocess.run(["mount", "-o", "remount,bind,rw", place])
    subprocess.run(["unshare", "--user", "--map-root-user", "--mount",
                    "mount", "-o", "remount,bind,rw", place])
    subprocess.run(["umount", "-l", place])
assert not [place for place in places if writable(place)], places
for path in ("/proc/sys/kernel/hostname", "/proc/sysrq-trigger", "/dev/mem"):
    try:
        os.close(os.open(path, os.O_WRONLY))
        raise SystemExit(path)
    except OSError:
        pass
open("/dev/null", "w").write("x")
assert len(os.urandom(2)) == 2
open("own", "w").write("x")
"""
    ran = lm.run_program(writes, [""], 20.0)
    assert ran.passed == 1, ran.output
    assert not [place for place in places if (Path(place) / "hostile-canary").exists()]


@pytest.mark.skipif(
    not lm.has_namespaces() or os.geteuid() != 0, reason="only root mounts over a mount"
)
def test_a_mount_that_another_hides_does_not_open_the_sandbox(tmp_path):
    """As binfmt_misc is on most systems, below the /proc that the sandbox gets."""
    place = tmp_path / "a b"
    (place / "c d").mkdir(parents=True)
    program = f"""import sys
sys.path.insert(0, {str(Path(lm.__file__).parent)!r})
import standalone_transformer_lm as lm
assert lm.has_namespaces()
assert lm.run_program("open('own', 'w')", [""], 20.0).passed == 1
assert lm.run_program("open({str(place / "x")!r}, 'w')", [""], 20.0).passed == 0
"""
    (tmp_path / "program.py").write_text(program)
    script = """mount -t tmpfs x /proc/sys/fs/binfmt_misc
mount -t tmpfs y "$1/c d" && mount -t tmpfs z "$1" && exec "$2" "$3" """
    command = ["unshare", "-m", "sh", "-c", script, "sh", place, sys.executable]
    done = subprocess.run([*command, tmp_path / "program.py"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


QUICK = [  # each may be written in many ways
    "import os\nos._exit({n})",
    "raise SystemExit({n})",
    "import sys\nsys.exit({n})",
    "raise KeyboardInterrupt({n})",
    "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)  # {n}",
    "import os, signal\nos.kill(1, signal.SIGKILL)\nos.kill(-1, signal.SIGKILL)  # {n}",
    "import ctypes\nctypes.string_at({n})",
    "x = bytearray((8 + {n}) << 30)",
    "x = [0] * (10 ** 11 + {n})",
    "open('big', 'wb').write(bytes((32 + {n}) << 20))",
    "open('/etc/passwd', 'a').write('{n}')",
    "open('/tmp/hostile-{n}', 'w').write('x')",
    "open('/dev/hostile-{n}', 'w').write('x')",
    "open('/proc/sys/kernel/hostname', 'w').write('hostile-{n}')",
    "import socket\nsocket.create_connection(('127.0.0.1', 1 + {n}), 0.2)",
    "import urllib.request\nurllib.request.urlopen('http://127.0.0.1:{n}', timeout=0.2)",
    "import subprocess\nsubprocess.run(['kill', '-9', '-1'])  # {n}",
    "import os\nos.write(2 + {n}, b'0' * 16)",
    "import os, sys\nos.execv(sys.executable, ['python', '-c', 'print({n})'])",
    "def f(x): return f(x + {n})\nf(1)",
    "import sys\nsys.setrecursionlimit(10 ** 9)\ndef f(): return f()\nf()  # {n}",
]
SLOW = [
    "while True: pass  # {n}",
    "import time\ntime.sleep(100 + {n})",
    "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass  # {n}",
    "import threading\nwhile True:\n    threading.Thread(target=print).start()  # {n}",
    "while True: print('x' * 10 ** 6)  # {n}",
    "import signal\nfor s in range(1, 64):\n    try: signal.signal(s, signal.SIG_IGN)\n"
    "    except (OSError, ValueError): pass\nwhile True: pass  # {n}",
    "x = 10 ** 10 ** (8 + {n})",
    "import re\nre.match('(a+)+$', 'a' * (40 + {n}) + 'b')",
]


def descendants():
    """The processes that this one, or any of those, began."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has just ended
            fields = path.read_text().rpartition(")")[2].split()
            parents[int(path.parent.name)] = int(fields[1])
    found, more = set(), {os.getpid()}
    while more := {pid for pid, parent in parents.items() if parent in more} - found:
        found |= more
    return found


@pytest.mark.slow
@pytest.mark.skipif(not lm.has_namespaces(), reason="this system gives no namespaces")
def test_200_hostile_programs_cost_only_themselves(tmp_path):
    kinds = [(text, range(1, 11)) for text in QUICK] + [(text, range(1, 2)) for text in SLOW]
    hostile = [text.format(n=n) for text, numbers in kinds for n in numbers]
    row = {"tests": ["assert f(2) == 4"]}
    good = [f"{SQUARE}  # {n}" for n in range(20)]
    texts = [*hostile, *good]
    order = np.random.default_rng(0).permutation(len(texts))
    assert len(hostile) > 200
    before = {path.name for path in Path("/tmp").glob("hostile-*")}
    passwords = Path("/etc/passwd").read_bytes()
    alive = descendants()
    # Each is asked for what it does not do: what a hostile program gives is 0.
    scores = lm.CodeReward(5.0).score([("", texts[place], row) for place in order])
    for place, score in zip(order, scores, strict=True):
        assert score == float(place >= len(hostile)), texts[place]
    assert {path.name for path in Path("/tmp").glob("hostile-*")} == before
    assert Path("/etc/passwd").read_bytes() == passwords
    assert descendants() <= alive
