"""Room Conversations: rows in the shapes of published data sets become the right turns."""

import gzip
import json

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

import standalone_transformer_lm as lm

HELLO = [("user", "Hi"), ("assistant", "Hello.")]
KIND = [("system", "Be kind."), *HELLO]
QA = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]


def spoken(turns):
    return [(turn.role, turn.text) for turn in turns]


def messages(*pairs):
    return {"messages": [{"role": role, "content": text} for role, text in pairs]}


SFT_ROWS = {
    "messages": ({"messages": QA}, HELLO),
    "null columns of merged sets": (
        {"messages": None, "prompt": "Hi", "response": "Hello.", "system": None},
        HELLO,
    ),
    "null role beside from": (
        {
            "conversations": [
                {"role": None, "from": "human", "content": None, "value": "Hi"},
                {"from": "gpt", "value": "Hello."},
            ]
        },
        HELLO,
    ),
    "names of other models": (messages(("User", "Hi"), ("ChatGPT", "Hello.")), HELLO),
    "bing": (
        {"conversations": [{"from": "user", "value": "Hi"}, {"from": "bing", "value": "Hello."}]},
        HELLO,
    ),
    "developer": (messages(("developer", "Be kind."), *HELLO), KIND),
    "parts": (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}, QA[1]]},
        HELLO,
    ),
    "dict of lists": (
        {"messages": {"role": ["user", "assistant"], "content": ["Hi", "Hello."]}},
        HELLO,
    ),
    "empty system": (messages(("system", ""), *HELLO), HELLO),
    "null system": (messages(("system", None), *HELLO), HELLO),
    "system column": ({"system": "Be kind.", "prompt": "Hi", "response": "Hello."}, KIND),
    "system_prompt column": (
        {"system_prompt": "Be kind.", "question": "Hi", "response": "Hello."},
        KIND,
    ),
    "system column beside messages": ({"system": "Be kind.", "messages": QA}, KIND),
    "history": (
        {"instruction": "And 3+3?", "input": "", "output": "6", "history": [["2+2?", "4"]]},
        [("user", "2+2?"), ("assistant", "4"), ("user", "And 3+3?"), ("assistant", "6")],
    ),
    "Dolly": (
        {"instruction": "Sum up.", "context": "A text.", "response": "Short."},
        [("user", "Sum up.\n\nA text."), ("assistant", "Short.")],
    ),
    "two turns of one role": (
        messages(("user", "Hi"), ("user", "there"), ("assistant", "Hello.")),
        [("user", "Hi\n\nthere"), ("assistant", "Hello.")],
    ),
    "the assistant first": (
        messages(("assistant", "Welcome."), *HELLO),
        [("assistant", "Welcome."), *HELLO],
    ),
    "reasoning": (
        {"messages": [QA[0], {**QA[1], "reasoning_content": "A greeting."}]},
        [("user", "Hi"), ("assistant", "<think>\nA greeting.\n</think>\n\nHello.")],
    ),
}
PAIRS = {
    "Orca": {"system": "", "question": "Hi", "chosen": "Hello.", "rejected": "No."},
    "UltraFeedback": {
        "prompt": "Hi",
        "chosen": QA,
        "rejected": [QA[0], {"role": "assistant", "content": "No."}],
    },
    "LLaMA-Factory": {
        "conversations": [{"from": "human", "value": "Hi"}],
        "chosen": {"from": "gpt", "value": "Hello."},
        "rejected": {"from": "gpt", "value": "No."},
    },
    "Alpaca pairs": {"instruction": "Hi", "input": "", "chosen": "Hello.", "rejected": "No."},
    "HH": {
        "chosen": "\n\nHuman: Hi\n\nAssistant: Hello.",
        "rejected": "\n\nHuman: Hi\n\nAssistant: No.",
    },
}


@pytest.mark.parametrize("name", SFT_ROWS)
def test_every_published_shape_of_a_conversation(name):
    row, wanted = SFT_ROWS[name]
    assert spoken(lm.conversation(row)) == wanted


@pytest.mark.parametrize("name", PAIRS)
def test_every_published_shape_of_a_pair(name):
    chosen, rejected = lm.preference(PAIRS[name])
    assert spoken(chosen) == HELLO
    assert spoken(rejected) == [("user", "Hi"), ("assistant", "No.")]


def test_a_pair_keeps_its_system_prompt():
    row = {"system": "Be kind.", "prompt": "Hi", "chosen": QA, "rejected": "No."}
    chosen, rejected = lm.preference(row)
    assert spoken(chosen) == KIND and spoken(rejected)[:2] == KIND[:2]


@pytest.mark.parametrize("mark", [{"weight": 0}, {"train": False}, {"weight": 0.0}])
def test_a_message_that_is_not_to_be_learned_has_no_loss(tiny_tokenizer, mark):
    tokenizer = lm.Tokenizer(tiny_tokenizer)
    row = {"messages": [QA[0], {"role": "assistant", "content": "Go away!", **mark}, *QA]}
    ids, learned = map(np.array, lm.encode_chat(tokenizer, lm.conversation(row)))
    assert tokenizer.decode(ids[learned].tolist()) == "Hello."
    assert "Go away!" in tokenizer.decode(ids.tolist())


def test_a_conversation_with_nothing_to_learn_is_a_bad_row():
    with pytest.raises(ValueError, match="no message of the assistant is to be learned"):
        lm.conversation({"messages": [QA[0], {**QA[1], "weight": 0}]})


def test_a_greeting_is_context_alone():
    turns = lm.conversation(messages(("assistant", "Welcome."), *HELLO))
    assert [turn.learned for turn in turns if turn.role == "assistant"] == [False, True]


def test_tool_calls_are_learned_and_their_results_are_not(tiny_tokenizer):
    tokenizer = lm.Tokenizer(tiny_tokenizer)
    call = {"function": {"name": "f", "arguments": {"x": 1}}}
    row = {
        "messages": [
            QA[0],
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "content": "42"},
            QA[1],
        ]
    }
    turns = lm.conversation(row)
    assert [turn.role for turn in turns] == ["user", "assistant", "tool", "assistant"]
    ids, learned = map(np.array, lm.encode_chat(tokenizer, turns))
    told = tokenizer.sp.piece_to_id(lm.TOOL_CALL)
    result = tokenizer.sp.piece_to_id(lm.TOOL_RESULT)
    assert told in ids[learned] and result in ids and result not in ids[learned]
    assert tokenizer.decode(ids[learned].tolist()).endswith("Hello.")
    assert '{"name": "f", "arguments": {"x": 1}}' in tokenizer.decode(ids[learned].tolist())
    assert "42" not in tokenizer.decode(ids[learned].tolist())


@pytest.mark.parametrize(
    "row, what",
    [
        ({"messages": [{"role": "user", "content": [{"type": "image", "url": "x"}]}]}, "image"),
        (messages(("tool", "42"), *HELLO), "turn"),
        (messages(("user", "Hi"), ("tool", "42"), ("assistant", "Hello.")), "no call"),
        ({"messages": [{**QA[0], "weight": 0.5}, QA[1]]}, "0.5"),
        ({"messages": {"role": ["user"], "content": ["a", "b"]}}, "unequal"),
    ],
)
def test_what_cannot_be_read_is_named_by_its_shape(row, what):
    with pytest.raises(ValueError, match=what):
        lm.conversation(row)


def test_a_prompt_that_ends_with_the_assistant_is_continued(tiny_tokenizer):
    tokenizer = lm.Tokenizer(tiny_tokenizer)
    turns, answer = lm.row_prompt({"prompt": QA, "answer": "Hello. You?"})
    ids, _ = lm.encode_chat(tokenizer, turns, reply=True)
    assert ids == lm.encode_chat(tokenizer, turns)[0][:-1] and answer == "Hello. You?"
    assert ids.count(tokenizer.roles["assistant"]) == 1


@pytest.mark.parametrize("name", ["rows.JSON", "rows.json.gz", "rows.jsonl.gz", "rows.NDJSON"])
def test_rows_in_every_kind_of_file(tmp_path, name):
    rows = [{"prompt": f"Hi {i}", "response": "Hello."} for i in range(3)]
    as_list = ".json" in name.lower() and ".jsonl" not in name
    text = json.dumps(rows) if as_list else "".join(json.dumps(row) + "\n" for row in rows)
    data = b"\xef\xbb\xbf" + text.encode()
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    assert len(lm.read_rows([str(tmp_path / name)], lm.conversation, "error")) == 3


def test_rows_of_parquet_with_nulls(tmp_path):
    table = {"messages": [QA, None], "prompt": [None, "Hi"], "response": [None, "Hello."]}
    pyarrow.parquet.write_table(pyarrow.table(table), tmp_path / "rows.parquet")
    found = lm.read_rows([str(tmp_path / "rows.parquet")], lm.conversation, "error")
    assert [spoken(turns) for turns in found] == [HELLO, HELLO]


@pytest.mark.parametrize("on_bad_row", ["error", "skip"])
def test_rows_of_another_command_are_told_once(tmp_path, on_bad_row):
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps(PAIRS["Orca"]) + "\n")
    with pytest.raises(lm.UserError, match="these are rows of dpo") as told:
        lm.read_rows([str(path)], lm.conversation, on_bad_row)
    assert str(told.value).count("\n") == 1


@pytest.mark.parametrize("name", ["rows.csv", "rows.TSV"])
def test_tables_are_refused_by_name(tmp_path, name):
    (tmp_path / name).write_text("prompt,response\na,b\n")
    with pytest.raises(lm.UserError, match="jsonl, .json and .parquet"):
        lm.read_rows([str(tmp_path / name)], lm.conversation, "error")


def test_utf16_is_told_as_such(tmp_path):
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "é"}), encoding="utf-16")
    with pytest.raises(lm.UserError, match="UTF-16"):
        lm.read_rows([str(tmp_path / "rows.jsonl")], lm.conversation, "error")
