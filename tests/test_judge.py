"""The reward judge: a language model behind an address, here a stub of one."""

import contextlib
import http.server
import json
import threading

import pytest
from conftest import complaint, log_rows
from test_lora import write_rows
from test_rollouts import SMALL, base, sums  # noqa: F401

import standalone_transformer_lm as lm


@pytest.fixture
def server(monkeypatch):
    """`server(*replies)`: the address of a server that gives these in turn, the last one for ever:
    a text to say, or a number to fail with; and what it was asked."""
    monkeypatch.setattr(lm, "JUDGE_WAIT_S", 0.01)
    with contextlib.ExitStack() as stack:

        def call(*replies):
            asked, waiting = [], list(replies)

            class Handler(http.server.BaseHTTPRequestHandler):
                def do_POST(self):
                    body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                    asked.append((self.path, dict(self.headers), body))
                    reply = waiting.pop(0) if len(waiting) > 1 else waiting[0]
                    if reply == "broken":
                        self.close_connection = True
                        return
                    self.send_response(reply if isinstance(reply, int) else 200)
                    self.end_headers()
                    told = {"choices": [{"message": {"content": reply}}]}
                    if not isinstance(reply, int):
                        told["usage"] = {"total_tokens": 100}
                        self.wfile.write(json.dumps(told).encode())

                def log_message(self, *_):
                    pass

            one = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
            threading.Thread(target=one.serve_forever, daemon=True).start()
            stack.callback(one.shutdown)
            return f"http://127.0.0.1:{one.server_port}", asked

        yield call


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("Good. Score: 7", 0.7),
        ("Score: 3\nNo: **Score:** 10", 1.0),
        ("score 4.5/10", 0.45),
        ("8", 0.8),
        ("Score: 0", 0.0),
        ("no number", None),
        ("Score: 11", None),
        ("", None),
    ],
)
def test_points_are_read(text, score):
    if score is None:
        with pytest.raises(ValueError, match="judge"):
            lm.judged_score(text)
    else:
        assert lm.judged_score(text) == pytest.approx(score)


@pytest.mark.parametrize(
    ("spec", "what", "weight"),
    [
        ("judge:http://h:8000", "judge:http://h:8000", None),
        ("judge:http://h:8000:0.5", "judge:http://h:8000", "0.5"),
        ("judge:https://h/v1", "judge:https://h/v1", None),
        ("judge:https://h/v1:2", "judge:https://h/v1", "2"),
        ("number:0.5", "number", "0.5"),
        ("a/b.py:score:2", "a/b.py:score", "2"),
    ],
)
def test_a_port_is_no_weight(spec, what, weight):
    assert lm.REWARD_SPEC.fullmatch(spec).groups() == (what, weight)


def test_answers_are_judged_once_and_kept(server, tmp_path, monkeypatch):
    monkeypatch.setenv("JUDGE_API_KEY", "secret")
    (tmp_path / "rubric.txt").write_text("It rhymes.")
    url, asked = server("Score: 5")
    settings = lm.JudgeSettings(
        judge_model="big", judge_rubric=str(tmp_path / "rubric.txt"), judge_usd=10.0
    )
    judge = lm.Judge(f"{url}/v1", settings, tmp_path)
    calls = [("q", "one", {}), ("q", "two", {"answer": "gold"}), ("q", "one", {})]
    assert judge.score(calls) == [0.5, 0.5, 0.5]
    assert len(asked) == 2 and {path for path, *_ in asked} == {"/v1/chat/completions"}
    _, headers, body = asked[0]
    assert headers["Authorization"] == "Bearer secret" and body["model"] == "big"
    texts = [body["messages"][0]["content"] for *_, body in asked]
    assert all("It rhymes." in text and "q" in text for text in texts)
    assert sum("gold" in text for text in texts) == 1
    assert judge.costs() == {
        "cost/judge_calls": 2,
        "cost/judge_tokens": 200,
        "cost/judge_usd": pytest.approx(0.002),
    }
    again = lm.Judge(f"{url}/v1", settings, tmp_path)
    assert again.score(calls) == [0.5, 0.5, 0.5] and len(asked) == 2
    assert "secret" not in (tmp_path / "judge.jsonl").read_text()


def test_what_fails_for_a_while_is_asked_again(server, tmp_path):
    url, asked = server(500, 429, "broken", "Score: 9")
    judge = lm.Judge(url, lm.JudgeSettings(), None)
    assert judge.score([("q", "a", {})]) == [0.9] and len(asked) == 4


@pytest.mark.parametrize(("reply", "times"), [(500, 5), (401, 1), ("no score", 1)])
def test_what_keeps_failing_gives_0_and_is_told_once(server, tmp_path, capsys, reply, times):
    url, asked = server(reply)
    judge = lm.Judge(url, lm.JudgeSettings(judge_at_once=1), tmp_path)
    assert judge.score([("q", "a", {}), ("q", "b", {})]) == [0.0, 0.0]
    assert len(asked) == 2 * times
    assert capsys.readouterr().out.count("that answer gets 0") == (2 if reply == 0 else 1)
    assert not (tmp_path / "judge.jsonl").exists(), "a failure is not kept"


def test_a_judge_that_is_not_there_ends_the_run(server, run, base, tmp_path):  # noqa: F811
    url, asked = server(401)
    rows = write_rows(tmp_path / "rows.jsonl", sums())
    argv = ["grpo", *SMALL, "--ckpt", base, "--data", rows, "--out_dir", tmp_path / "run"]
    complaint(run([*argv, "--reward", f"judge:{url}"]), "401", "JUDGE_API_KEY")
    (tmp_path / "run" / "judge.jsonl").write_text('{"key": 1}\n{"key": "a", "score": "b"}\nx')
    assert lm.Judge(url, lm.JudgeSettings(), tmp_path / "run").known == {}


def test_a_run_learns_from_a_judge(server, run, base, tmp_path):  # noqa: F811
    url, asked = server("Score: 2", "Score: 8", "Score: 2", "Score: 8", "Score: 5")
    rows = write_rows(tmp_path / "rows.jsonl", sums())
    argv = ["grpo", *SMALL, "--ckpt", base, "--data", rows, "--out_dir", tmp_path / "run"]
    code, told, err = run([*argv, "--reward", f"judge:{url}/v1:2", "length"])
    assert code == 0 and "rewards: judge, length" in told, err
    found = [row for row in log_rows(tmp_path / "run") if "train/reward/judge" in row]
    assert all(0 < row["train/reward/judge"] <= 1 for row in found)
    assert 0 < found[-1]["cost/judge_calls"] <= len(asked), "the last evaluation is not in it"
    assert found[-1]["cost/judge_tokens"] == 100 * found[-1]["cost/judge_calls"]
    complaint(run([*argv, "--reward", "judge:nowhere"]), "judge:http")
    more = ["--reward", f"judge:{url}", "--judge_rubric", tmp_path / "none.txt"]
    complaint(run([*argv, *more]), "--judge_rubric")
