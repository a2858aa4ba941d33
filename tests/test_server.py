"""The server: the protocol of the official client, many requests at once, and what may go wrong."""

import asyncio
import contextlib
import json
import math
import re
import threading
import time

import httpx
import openai
import pytest
import torch
import uvicorn
from conftest import complaint
from test_convert import call
from test_lora import save_base

import chat_server
import standalone_transformer_lm as lm

ASKED = [{"role": "user", "content": "Where is the harbour?"}]


@contextlib.contextmanager
def served(ckpt, dtype="fp32", **flags):
    """A server of a checkpoint on a free port: its address and its service."""
    settings = chat_server.ServerSettings(ckpt=str(ckpt), **flags)
    device = lm.InferenceSettings(device="cpu", dtype=dtype, threads=1)
    service = chat_server.open_service(settings, device)
    config = uvicorn.Config(chat_server.make_app(service), port=0, log_level="error")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    until = time.monotonic() + 30
    while not server.started and time.monotonic() < until:
        time.sleep(0.02)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}", service
    finally:
        server.should_exit = True
        thread.join(10)
        service.engine.close()


@pytest.fixture(scope="module")
def chat_model(tiny_tokenizer, tmp_path_factory):
    path = tmp_path_factory.mktemp("served") / "sft" / "ckpt_best.pt"
    path.parent.mkdir()
    save_base(path, tiny_tokenizer, seq_len=256)
    saved = lm.read_checkpoint(path)
    lm.save_checkpoint(path, {**saved, "kind": "sft"})
    return path


@pytest.fixture(scope="module")
def server(chat_model):
    with served(chat_model, batch_size=20) as found:
        yield found


@pytest.fixture
def client(server):
    return openai.OpenAI(base_url=f"{server[0]}/v1", api_key="none", max_retries=0)


def idle(service, seconds=10):
    """Wait until no request is left; whether that came about."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if not (service.engine.running or service.engine.waiting):
            return True
        time.sleep(0.02)
    return False


def wanted_text(service, turns, seed, index=0, **sampling):
    """What the engine alone answers."""
    tokenizer = service.tokenizer
    ids = lm.encode_chat(tokenizer, turns, reply=True)[0]
    model = service.engine.batch.model
    settings = lm.SamplingSettings(**{"top_p": 1.0, "temperature": 1.0, **sampling})
    (new,) = lm.complete(model, [ids], settings, seed, frozenset({tokenizer.eos}), numbers=[index])
    return tokenizer.decode(new)


# ---- The official client ----


def test_the_model_is_listed(client):
    assert [model.id for model in client.models.list()] == ["sft"]


def test_an_answer_is_what_the_engine_draws(client, server):
    found = client.chat.completions.create(
        model="sft", messages=ASKED, max_tokens=20, seed=5, n=3, temperature=0.9
    )
    turns = [("user", ASKED[0]["content"])]
    for index, choice in enumerate(found.choices):
        wanted = wanted_text(server[1], turns, 5, index, max_new_tokens=20, temperature=0.9)
        assert choice.message.content == wanted and choice.index == index
        assert choice.finish_reason in ("stop", "length")
    ids = lm.encode_chat(server[1].tokenizer, turns, reply=True)[0]
    assert found.usage.prompt_tokens == len(ids) and 3 < found.usage.completion_tokens <= 60


def test_a_streamed_answer_is_the_whole_one(client):
    flags = {"model": "sft", "messages": ASKED, "max_tokens": 30, "seed": 6, "n": 2}
    whole = client.chat.completions.create(**flags)
    texts, finishes, usage = ["", ""], [None, None], None
    stream = client.chat.completions.create(
        **flags, stream=True, stream_options={"include_usage": True}
    )
    for chunk in stream:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            finishes[choice.index] = choice.finish_reason or finishes[choice.index]
    assert texts == [choice.message.content for choice in whole.choices]
    assert finishes == [choice.finish_reason for choice in whole.choices]
    assert usage == whole.usage


def test_completions_continue_text(client, server):
    found = client.completions.create(
        model="sft", prompt=["The harbour", "A"], max_tokens=8, temperature=0, logprobs=2
    )
    tokenizer, model = server[1].tokenizer, server[1].engine.batch.model
    for choice, text in zip(found.choices, ("The harbour", "A"), strict=True):
        ids = [tokenizer.bos, *tokenizer.encode(text)]
        greedy = lm.SamplingSettings(8, temperature=0.0)
        (new,) = lm.complete(model, [ids], greedy, 0, frozenset({tokenizer.eos}))
        assert choice.text == tokenizer.decode(ids + new)[len(tokenizer.decode(ids)) :]
        assert len(choice.logprobs.tokens) == len(choice.logprobs.token_logprobs) <= 8
        assert all(len(likeliest) <= 2 for likeliest in choice.logprobs.top_logprobs)


def test_log_probabilities_are_those_of_the_model(client, server):
    found = client.chat.completions.create(
        model="sft", messages=ASKED, max_tokens=5, temperature=0, logprobs=True, top_logprobs=3
    )
    tokenizer, model = server[1].tokenizer, server[1].engine.batch.model
    ids = lm.encode_chat(tokenizer, [("user", ASKED[0]["content"])], reply=True)[0]
    for entry in found.choices[0].logprobs.content:
        with torch.no_grad():
            logps = model(torch.tensor([ids]))[0, -1].log_softmax(-1)
        values, best = logps.topk(3)
        assert entry.logprob == pytest.approx(float(values[0]), abs=1e-4)
        assert [one.logprob for one in entry.top_logprobs] == pytest.approx(
            values.tolist(), abs=1e-4
        )
        assert entry.bytes == list(entry.token.encode())
        ids.append(int(best[0]))


def test_stop_strings_end_an_answer_before_them(client):
    flags = {"model": "sft", "messages": ASKED, "max_tokens": 60, "seed": 9}
    text = client.chat.completions.create(**flags).choices[0].message.content
    assert len(text) > 12
    for stop in (text[5:8], text[7], [text[9:11], "nowhere"], "not in it"):
        found = client.chat.completions.create(**flags, stop=stop).choices[0]
        stops = [stop] if isinstance(stop, str) else stop
        ends = [text.find(one) for one in stops if one in text]
        assert found.message.content == text[: min(ends, default=len(text))]
        streamed = client.chat.completions.create(**flags, stop=stop, stream=True)
        pieces = [chunk.choices[0].delta.content or "" for chunk in streamed]
        assert "".join(pieces) == found.message.content
        if ends:
            assert found.finish_reason == "stop"


def test_tool_calls_are_told_as_such(server):
    """Ids as a model writes a call: text, the symbol, JSON."""
    service = server[1]
    tokenizer = service.tokenizer
    asked = chat_server.read_chat({"messages": ASKED}, tokenizer, service.settings, 256)
    writer = chat_server.Writer(tokenizer, asked, [])
    spelled = '{"name": "add", "arguments": {"a": 1}}'
    ids = [*tokenizer.encode("So: "), tokenizer.roles["call"], *tokenizer.encode(spelled)]
    pieces = [writer.push(lm.Drawn(i, -1.0, [])) for i in [*ids, tokenizer.eos]]
    choice = service.choice(asked, True, 0, writer, pieces)
    assert choice["finish_reason"] == "tool_calls" and choice["message"]["content"] == "So: "
    (found,) = choice["message"]["tool_calls"]
    assert found["function"] == {"name": "add", "arguments": '{"a": 1}'}


def test_the_oldest_turns_leave_a_full_context(client, server):
    talk = []
    for number in range(12):
        talk.append({"role": "user", "content": f"Where is the old harbour number {number}?"})
        talk.append({"role": "assistant", "content": "It is near the river, north of the village."})
    talk.append(ASKED[0])
    found = client.chat.completions.create(model="sft", messages=talk, max_tokens=9)
    assert found.dropped_turns % 2 == 0 and 0 < found.dropped_turns < 24
    assert 100 < found.usage.prompt_tokens <= 256 - 9
    short = client.chat.completions.create(model="sft", messages=ASKED, max_tokens=9)
    assert not hasattr(short, "dropped_turns")


def test_tools_and_their_results_are_read(client, server):
    tool = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
    messages = [
        *ASKED,
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {"id": "x", "type": "function", "function": {"name": "add", "arguments": "{}"}}
            ],
        },
        {"role": "tool", "tool_call_id": "x", "content": "3"},
    ]
    body = {"messages": messages, "tools": [tool]}
    turns = chat_server.chat_turns(body)
    assert [turn.role for turn in turns] == ["system", "user", "assistant", "tool"]
    assert '"name": "add"' in turns[0].text and turns[2].calls
    found = client.chat.completions.create(model="sft", max_tokens=3, **body)
    assert found.choices[0].finish_reason in ("stop", "length")


# ---- Many at once ----


async def ask(http, url, body):
    response = await http.post(f"{url}/v1/chat/completions", json=body, timeout=60)
    return response


def test_sixteen_at_once_answer_as_alone(server):
    url, service = server

    async def everyone():
        async with httpx.AsyncClient() as http:
            bodies = []
            for number in range(16):
                messages = [
                    {"role": "user", "content": f"Where is harbour {number}? " * (number % 4 + 1)}
                ]
                bodies.append(
                    {
                        "messages": messages,
                        "seed": number,
                        "max_tokens": 10 + 5 * (number % 5),
                        "temperature": (0, 0.7, 1.3)[number % 3],
                    }
                )
            together = await asyncio.gather(*(ask(http, url, body) for body in bodies))
            return bodies, [response.json() for response in together]

    bodies, found = asyncio.run(everyone())
    compared = 0
    for body, answer in zip(bodies, found, strict=True):
        wanted = wanted_text(
            service,
            [("user", body["messages"][0]["content"])],
            body["seed"],
            max_new_tokens=body["max_tokens"],
            temperature=body["temperature"],
        )
        message = answer["choices"][0]["message"]
        if "tool_calls" not in message:  # an untrained model draws their symbol, too
            assert message["content"] == wanted
            compared += 1
    assert compared > 10
    assert idle(service) and len(service.engine.batch.rows) == 1


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_row(stream, server, endless):
    url, service = server
    body = {"messages": ASKED, "max_tokens": 1000, "ignored": 1, "stream": stream}
    with httpx.Client() as http, contextlib.suppress(httpx.ReadTimeout):
        where = ("POST", f"{url}/v1/chat/completions")
        with http.stream(*where, json=body, timeout=0.5) as response:
            next(response.iter_lines())
    began = time.monotonic()
    assert idle(service) and time.monotonic() - began < 5
    assert "lm_abandoned_requests_total" in httpx.get(f"{url}/metrics").text


@pytest.fixture
def endless(monkeypatch, server):
    """</s> is never drawn."""
    eos, original = server[1].tokenizer.eos, lm.draw

    def draw(logits, *args):
        logits[:, eos] = -math.inf
        return original(logits, *args)

    monkeypatch.setattr(lm, "draw", draw)


def test_a_full_queue_answers_429_and_the_rest_is_answered(chat_model):
    with served(chat_model, batch_size=2, queue=2) as (url, service):

        async def everyone():
            async with httpx.AsyncClient() as http:
                body = {"messages": ASKED, "max_tokens": 120, "seed": 3, "temperature": 2}
                return await asyncio.gather(*(ask(http, url, body) for _ in range(12)))

        found = asyncio.run(everyone())
        codes = [response.status_code for response in found]
        assert codes.count(429) >= 4 and codes.count(200) >= 4 and len({*codes}) == 2
        texts = {r.json()["choices"][0]["message"]["content"] for r in found if r.is_success}
        assert len(texts) == 1 and idle(service)
        refused = next(response for response in found if response.status_code == 429)
        assert refused.json()["error"]["type"] == "rate_limit_error"


def test_time_is_limited_and_what_is_there_is_given(chat_model, endless):
    with served(chat_model, timeout=0.3, max_tokens=100_000) as (url, service):
        body = {"messages": ASKED, "seed": 1}
        found = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=20).json()
        assert found["choices"][0]["finish_reason"] == "length"
        assert found["choices"][0]["message"]["content"] and idle(service)


# ---- What is wrong with a request ----

BAD = {
    "no JSON": (b"{", "the body is not JSON"),
    "deep JSON": (b"[" * 100_000, "the body is not JSON"),
    "a list": (b"[]", "must be a JSON object"),
    "no messages": ({}, "messages must be a list"),
    "empty messages": ({"messages": []}, "messages must be a list"),
    "a text": ({"messages": "hello"}, "messages must be a list"),
    "no role": ({"messages": [{"content": "x"}]}, "unknown role"),
    "a number": ({"messages": [5]}, "messages"),
    "an odd role": ({"messages": [{"role": "ghost", "content": "x"}]}, "unknown role 'ghost'"),
    "no content": ({"messages": [{"role": "user"}]}, "missing, empty"),
    "an image": (
        {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
        "only text is known",
    ),
    "roles out of turn": ({"messages": [{"role": "tool", "content": "x"}]}, "speak in turn"),
    "a hot temperature": ({"temperature": 3}, "temperature must be a number from 0 to 2"),
    "a worded temperature": ({"temperature": "hot"}, "temperature must be a number"),
    "a true temperature": ({"temperature": True}, "temperature must be a number"),
    "a NaN": (b'{"messages": [], "temperature": NaN}', "temperature must be a number"),
    "no answers": ({"n": 0}, "n must be a whole number"),
    "too many answers": ({"n": 9}, "n is at most 8"),
    "half an answer": ({"n": 1.5}, "n must be a whole number"),
    "a huge seed": ({"seed": 10**400}, "seed must be a whole number"),
    "no tokens": ({"max_tokens": 0}, "max_tokens must be a whole number"),
    "a stop of numbers": ({"stop": [1]}, "stop must be a text"),
    "an empty stop": ({"stop": ""}, "stop must be a text"),
    "many stops": ({"stop": ["x"] * 17}, "stop must be a text"),
    "streaming of a kind": ({"stream": "yes"}, "stream must be true or false"),
    "a bias": ({"logit_bias": {"5": 1}}, "logit_bias is not offered"),
    "likeliest alone": ({"top_logprobs": 2}, "top_logprobs needs logprobs"),
    "tools of text": ({"tools": "add"}, "tools must be a list"),
    "a nameless tool": ({"tools": [{"type": "function"}]}, "a function with a name"),
    "a long prompt": (
        {"messages": [{"role": "user", "content": "harbour " * 400}]},
        "the model's context 256",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_request_is_told_what_is_wrong(name, server):
    url, service = server
    body, said = BAD[name]
    if isinstance(body, dict):
        body = json.dumps({"messages": ASKED, **body} if name != "no messages" else body).encode()
    if name == "a NaN":
        body = body.replace(b"[]", json.dumps(ASKED).encode())
    response = httpx.post(f"{url}/v1/chat/completions", content=body)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert said in error["message"] and error["type"] == "invalid_request_error"
    assert httpx.get(f"{url}/health").json() == {"status": "ok"} and idle(service)


def test_a_key_is_asked_for_and_large_bodies_are_refused(chat_model):
    with served(chat_model, api_key="secret", max_body=2000) as (url, _):
        body = {"messages": ASKED, "max_tokens": 2}
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Bearer é"}):
            headers = {name: value.encode() for name, value in headers.items()}
            response = httpx.post(f"{url}/v1/chat/completions", json=body, headers=headers)
            assert response.status_code == 401
        assert httpx.get(f"{url}/v1/models").status_code == 401
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="secret", max_retries=0)
        assert client.chat.completions.create(model="sft", **body).choices
        with pytest.raises(openai.APIStatusError) as caught:
            client.chat.completions.create(
                model="sft", messages=[{"role": "user", "content": "x" * 3000}]
            )
        assert caught.value.status_code == 413


def test_a_model_that_fails_is_told_and_not_waited_for(chat_model, capsys):
    with served(chat_model) as (url, service):

        def fail():
            raise RuntimeError("out of something")

        service.engine.batch.step = fail
        body = {"messages": ASKED}
        response = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=20)
        assert response.is_success  # what was there: nothing
        assert httpx.post(f"{url}/v1/chat/completions", json=body).status_code == 503
        assert httpx.get(f"{url}/health").status_code == 503
        assert "out of something" in capsys.readouterr().err


def test_the_page_loads_nothing_from_elsewhere(server):
    page = httpx.get(server[0]).text
    assert page.startswith("<!doctype html>") and "EventSource" not in page
    assert not re.search(r"""(?:src|href)\s*=\s*"(?!data:)|https?://|@import|url\(""", page)


def test_a_server_in_bf16_answers(chat_model):
    with served(chat_model, dtype="bf16") as (url, _):
        found = httpx.post(f"{url}/v1/chat/completions", json={"messages": ASKED, "max_tokens": 9})
        assert found.json()["usage"]["completion_tokens"] > 0


def test_metrics_are_those_of_prometheus(server):
    text = httpx.get(f"{server[0]}/metrics").text
    for line in text.splitlines():
        assert re.fullmatch(r"# TYPE \w+ (counter|gauge)|\w+(\{[^}]*\})? [\d.e+-]+", line), line
    assert "lm_running_requests 0" in text


def test_mistakes_of_the_server(chat_model, tmp_path):
    complaint(call(chat_server.main), "--ckpt is missing")
    complaint(call(chat_server.main, "--ckpt", tmp_path / "none.pt"), "does not exist")
    words = ["--ckpt", chat_model, "--host", "0.0.0.0"]
    complaint(call(chat_server.main, *words), "lets others in without a key")
