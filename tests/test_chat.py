"""The conversation in the terminal: its commands, its context, and what it survives."""

import io
import json

import pytest
import torch
from conftest import complaint
from test_lora import save_base

import standalone_transformer_lm as lm

PLACE = ["--device", "cpu", "--threads", "1", "--dtype", "fp32", "--max_new_tokens", "6"]


@pytest.fixture(scope="module")
def models(tiny_tokenizer, tmp_path_factory):
    """A model that was taught to chat, and one that was not."""
    folder = tmp_path_factory.mktemp("models")
    save_base(folder / "base.pt", tiny_tokenizer)
    saved = lm.read_checkpoint(folder / "base.pt")
    lm.save_checkpoint(folder / "chat.pt", {**saved, "kind": "sft"})
    return {"base": folder / "base.pt", "chat": folder / "chat.pt"}


@pytest.fixture
def talk(models, run, monkeypatch):
    """`talk(model, lines, *flags)`: what chat prints for lines that are typed."""

    def call(name, lines, *flags):
        monkeypatch.setattr("sys.stdin", io.StringIO("".join(line + "\n" for line in lines)))
        code, out, err = run(["chat", *PLACE, "--ckpt", models[name], *flags])
        assert code == 0, err
        return out

    return call


@pytest.fixture
def session(models):
    saved = lm.load_checkpoint(models["chat"])
    machine = lm.Machine(torch.device("cpu"), torch.float32, 0, 1)
    return lm.ChatSession(
        lm.build_model(saved, machine.device),
        lm.tokenizer_of(saved, "", "chat.pt"),
        lm.SamplingSettings(8, temperature=0.0),
        machine,
        1,
        True,
    )


def test_an_answer_is_what_generate_says(session, capsys):
    session.take("Where is the harbour?")
    asked, answered = session.turns
    assert asked == lm.Turn("user", "Where is the harbour?") and answered.role == "assistant"
    ids = lm.encode_chat(session.tokenizer, [asked], reply=True)[0]
    stop = frozenset({session.tokenizer.eos})
    (new,) = lm.complete(session.model, [ids], session.sampling, 1, stop)
    assert answered.text == session.tokenizer.decode(new)
    assert capsys.readouterr().out == answered.text + "\n"


def test_the_model_sees_the_whole_conversation(session, monkeypatch):
    """All turns so far, the system prompt first, with an answer to be begun."""
    seen, original = [], lm.generate

    def watched(model, prompts, *args, **kwargs):
        seen.extend(prompts)
        return original(model, prompts, *args, **kwargs)

    monkeypatch.setattr(lm, "generate", watched)
    session.sampling = lm.SamplingSettings(3, temperature=0.0)
    session.system("Brief.")
    session.take("One?")
    session.take("Two?")
    roles = [turn.role for turn in session.turns]
    assert roles == "system user assistant user assistant".split()
    for ids, turns in zip(seen, (session.turns[:2], session.turns[:4]), strict=True):
        assert ids == lm.encode_chat(session.tokenizer, turns, reply=True)[0]


def test_retry_draws_another_answer_to_the_same_question(session):
    session.sampling = lm.SamplingSettings(8, temperature=1.5)
    session.take("Where is the harbour?")
    texts = {session.turns[-1].text}
    for _ in range(4):
        session.take("/retry")
        assert [turn.role for turn in session.turns] == ["user", "assistant"]
        texts.add(session.turns[-1].text)
    assert len(texts) > 2


def test_ctrl_c_ends_the_answer_and_not_the_conversation(session, capsys, monkeypatch):
    push, calls = lm.TextStream.push, []

    def interrupted(stream, token):
        calls.append(token)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return push(stream, token)

    session.sampling = lm.SamplingSettings(20, temperature=1.5)
    monkeypatch.setattr(lm.TextStream, "push", interrupted)
    session.take("Where is the harbour?")
    shown = capsys.readouterr().out
    assert shown.endswith("\n(stopped)\n") and len(calls) == 3
    assert session.turns[-1] == lm.Turn("assistant", shown.removesuffix("\n(stopped)\n"))
    session.take("And the island?")
    assert len(session.turns) == 4


def test_the_oldest_turns_leave_a_full_context(session, capsys):
    session.system("Be brief.")
    for number in range(9):
        session.take(f"Where is the old harbour number {number}?")
        ids, _ = session.prompt()
        assert len(ids) <= session.model.config.seq_len
        assert session.turns[0] == lm.Turn("system", "Be brief.")
        assert session.turns[-2].text.endswith(f"number {number}?")
    assert len(session.turns) < 18 and "turns are dropped" in capsys.readouterr().out


def test_a_question_longer_than_the_context_is_answered(session, capsys):
    session.take("Where is the harbour? " * 60)
    assert session.turns[-1].role == "assistant"
    assert "its end is read" in capsys.readouterr().out


def test_a_conversation_is_saved_and_gone_on_with(talk, tmp_path):
    path = tmp_path / "talk.jsonl"
    talk("chat", ["Where is it?", f"/save {path}"], "--system", "Be brief.")
    (row,) = [json.loads(line) for line in path.read_text().splitlines()]
    assert [one["role"] for one in row["messages"]] == ["system", "user", "assistant"]
    row["messages"][2]["content"] += "there"
    assert lm.conversation(row)[1].text == "Where is it?"  # a row of sft
    out = talk("chat", ["/save", f"/save {path}2"], "--load", path)
    assert "3 turns from" in out and "no file is named" in out
    assert (tmp_path / "talk.jsonl2").read_text() == path.read_text()


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("/temp warm", "warm is no temperature"),
        ("/temp -1", "-1 is no temperature"),
        ("/load nowhere.jsonl", "not loaded: "),
        ("/save /dev/null/x.jsonl", "not saved: "),
        ("/retry", "there is no question yet"),
        ("/unknown", "/unknown is not a command"),
        ("/help", "/retry   answer the last question again"),
    ],
)
def test_what_a_command_cannot_do_is_told_and_the_talk_goes_on(talk, line, said):
    out = talk("chat", [line, "Where is it?", "/help"])
    assert said in out and out.count("/reset ") >= 1


def test_a_damaged_conversation_is_told(talk, tmp_path):
    for text in ("", "{", "[]", '{"messages": [{"role": "ghost", "content": "x"}]}', "\x00"):
        (tmp_path / "x.jsonl").write_text(text)
        assert "not loaded: " in talk("chat", [], "--load", tmp_path / "x.jsonl")


def test_a_model_that_was_never_taught_continues_each_text(talk, models, run):
    out = talk("base", ["The harbour", "The harbour"], "--temperature", 0)
    assert "never taught to chat" in out
    _, first, second, _ = out.split("> ")
    assert first == second and first.strip()
    words = ["--prompt", "The harbour", "--temperature", 0]
    _, text, _ = run(["generate", *PLACE, "--ckpt", models["base"], *words])
    assert text.strip().endswith(first.strip())


def test_generate_without_a_question_names_chat(run, models):
    complaint(run(["generate", "--ckpt", models["chat"], "--chat"]), "chat --ckpt")
    complaint(run(["chat"]), "--ckpt is missing")
