"""An OpenAI-compatible server for a checkpoint, and a page to talk to it.

    pip install fastapi uvicorn
    python chat_server.py --ckpt runs/sft          # then open http://127.0.0.1:8000

`/v1/chat/completions`, `/v1/completions` and `/v1/models` speak the protocol that the official
`openai` client expects, streaming or not; `/health` and `/metrics` (Prometheus) tell how it is.
All requests in flight share one batch, which they join and leave between two tokens. With one seed
and --dtype fp32 an answer is the same alone and among others, but for a draw that falls within
rounding of the border between two tokens (bf16 rounds more, by the size of the batch). The server
listens on this machine alone unless --host says otherwise.
"""

import asyncio
import contextlib
import json
import secrets
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import standalone_transformer_lm as lm

PAGE = Path(__file__).resolve().parent / "chat_page.html"
EXAMPLE = "python chat_server.py --ckpt runs/sft"


@dataclass
class ServerSettings:
    """The model and the server."""

    ckpt: str = lm.setting("", "checkpoint, or the folder of a run", basic=True)
    base: str = lm.setting("", "of adapters in --ckpt, the checkpoint that they adapt, if moved")
    tokenizer: str = lm.setting("", "tokenizer.model, for a checkpoint that carries none")
    name: str = lm.setting("", "name of the model; default: that of its folder", basic=True)
    host: str = lm.setting("127.0.0.1", "address to listen on; 0.0.0.0: all", basic=True)
    port: int = lm.setting(8000, "port to listen on", below=65536, basic=True)
    api_key: str = lm.setting("", "key that requests must carry (Authorization: Bearer KEY)")
    batch_size: int = lm.setting(32, "answers generated together", least=1, basic=True)
    queue: int = lm.setting(64, "requests that may wait; further ones get 429")
    max_tokens: int = lm.setting(1024, "most tokens of an answer", least=1, basic=True)
    max_n: int = lm.setting(8, "most answers to a request", least=1)
    max_body: int = lm.setting(1 << 20, "most bytes of a request", least=1)
    timeout: float = lm.setting(300.0, "most seconds of a request; it ends with what it has")
    tools: tuple[str, ...] = lm.setting(
        (), f"{lm.TOOLS_HELP}; others go to the client", choices=lm.TOOL_NAMES
    )
    max_turns: int = lm.setting(4, lm.TURNS_HELP, least=1)

    def faults(self) -> Iterator[tuple[str, str]]:
        if not self.ckpt:
            yield "--ckpt is missing", "give a checkpoint, --ckpt runs/sft"
        if not self.api_key and self.host not in ("127.0.0.1", "localhost", "::1"):
            yield (
                f"--host {self.host} lets others in without a key",
                "add --api_key, as long as a password",
            )


# ==================================================================================================
# Requests: what a body of JSON asks for, checked field by field
# ==================================================================================================


class RequestError(Exception):
    """What is wrong with a request: a status of HTTP and a sentence."""

    def __init__(self, status: int, message: str, parameter: str = ""):
        super().__init__(message)
        self.status = status
        self.message = message
        self.parameter = parameter

    def body(self) -> dict:
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        kind = {401: "authentication_error", 429: "rate_limit_error"}.get(self.status, kind)
        error = {"message": self.message, "type": kind, "param": self.parameter or None}
        return {"error": {**error, "code": self.status}}


class Bounds(NamedTuple):
    kind: type
    default: object
    least: float
    most: float


NUMBERS = {  # fields of a request that are numbers
    "temperature": Bounds(float, 1.0, 0.0, 2.0),
    "top_p": Bounds(float, 1.0, 0.0, 1.0),
    "top_k": Bounds(int, 0, 0, 1 << 30),
    "repetition_penalty": Bounds(float, 1.0, 0.01, 10.0),
    "n": Bounds(int, 1, 1, 1 << 10),
    "seed": Bounds(int, None, -(1 << 63), 1 << 63),
    "max_tokens": Bounds(int, None, 1, 1 << 30),
    "max_completion_tokens": Bounds(int, None, 1, 1 << 30),
    "top_logprobs": Bounds(int, 0, 0, 20),
}

NOT_OFFERED = ("frequency_penalty", "presence_penalty", "logit_bias", "best_of", "suffix")


def number(body: dict, name: str) -> float | int | None:
    """A field that is a number within its bounds; null means its default."""
    bounds, value = NUMBERS[name], body.get(name)
    if value is None:
        return bounds.default
    good = isinstance(value, (int, float)) and not isinstance(value, bool)
    if bounds.kind is int and isinstance(value, float):
        good = value.is_integer()
    if not good or not bounds.least <= value <= bounds.most:
        kind = "a whole number" if bounds.kind is int else "a number"
        raise RequestError(
            400, f"{name} must be {kind} from {bounds.least:g} to {bounds.most:g}", name
        )
    return bounds.kind(value)


def switch(body: dict, name: str) -> bool:
    value = body.get(name)
    if value not in (None, True, False):
        raise RequestError(400, f"{name} must be true or false", name)
    return bool(value)


def stops_of(body: dict) -> list[str]:
    """The strings that end an answer."""
    value = body.get("stop")
    if value is None:
        return []
    stops = [value] if isinstance(value, str) else value
    good = isinstance(stops, list) and len(stops) <= 16
    if not good or not all(isinstance(stop, str) and stop for stop in stops):
        raise RequestError(400, "stop must be a text or a list of up to 16 texts", "stop")
    return stops


@dataclass
class Asked:
    """A request that was read: the ids to continue, and how."""

    prompts: list[list[int]]  # several only in /v1/completions
    contexts: list[list[int]]  # ids whose text stands before the answer's
    sampling: lm.SamplingSettings
    n: int
    seed: int
    stops: list[str]
    stream: bool
    usage: bool  # a streamed answer ends with its usage
    logprobs: bool
    likeliest: int
    dropped: int = 0  # of the oldest turns, which the context has no room for
    turns: lm.Turns = field(default_factory=list)  # of a chat


def parse_body(raw: bytes) -> dict:
    try:
        body = json.loads(raw)
    except (ValueError, RecursionError) as fault:
        raise RequestError(400, f"the body is not JSON ({fault})") from fault
    if not isinstance(body, dict):
        raise RequestError(400, "the body must be a JSON object")
    for name in NOT_OFFERED:
        if body.get(name) not in (None, 0, 1, {}, ""):
            raise RequestError(400, f"{name} is not offered by this server", name)
    return body


def tools_text(tools: object) -> str:
    """What a model is told of the tools that a request offers; empty without any."""
    if not tools:
        return ""
    if not isinstance(tools, list):
        raise RequestError(400, "tools must be a list", "tools")
    lines = []
    for tool in tools:
        function = tool.get("function") if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise RequestError(400, "each of tools must be a function with a name", "tools")
        lines.append(json.dumps(function, ensure_ascii=False))
    return "Tools, which are called with their name and arguments as JSON:\n" + "\n".join(lines)


def chat_turns(body: dict) -> lm.Turns:
    """The turns of messages, the tools told in the system prompt."""
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise RequestError(400, "messages must be a list that is not empty", "messages")
    try:
        turns = [lm.message_turn(message, "messages") for message in messages]
        turns = lm.check_turns([turn for turn in turns if turn is not None])
    except (ValueError, AttributeError, TypeError, IndexError) as fault:
        raise RequestError(400, f"messages: {fault}", "messages") from fault
    if about := tools_text(body.get("tools")):
        if turns[0].role == "system":
            turns[0] = turns[0]._replace(text=f"{turns[0].text}\n\n{about}")
        else:
            turns.insert(0, lm.Turn("system", about))
    return turns


def prompt_texts(body: dict) -> list[str]:
    prompts = body.get("prompt", "")
    prompts = [prompts] if isinstance(prompts, str) else prompts
    good = isinstance(prompts, list) and prompts
    if not good or not all(isinstance(prompt, str) for prompt in prompts):
        raise RequestError(400, "prompt must be a text or a list of texts", "prompt")
    return [lm.LONE_SURROGATE.sub("\ufffd", prompt) for prompt in prompts]


def common(body: dict, settings: ServerSettings, chat: bool) -> dict:
    """The fields that both endpoints share, as arguments of Asked."""
    most = number(body, "max_completion_tokens") or number(body, "max_tokens")
    default = settings.max_tokens if chat else 16  # as OpenAI has it
    sampling = lm.SamplingSettings(
        max_new_tokens=min(most or default, settings.max_tokens),
        temperature=number(body, "temperature"),
        top_k=number(body, "top_k"),
        top_p=number(body, "top_p"),
        repetition_penalty=number(body, "repetition_penalty"),
    )
    n, seed = number(body, "n"), number(body, "seed")
    if n > settings.max_n:
        raise RequestError(400, f"n is at most {settings.max_n}", "n")
    options = body.get("stream_options") or {}
    if not isinstance(options, dict):
        raise RequestError(400, "stream_options must be an object", "stream_options")
    return {
        "sampling": sampling,
        "n": n,
        "seed": secrets.randbits(62) if seed is None else seed,
        "stops": stops_of(body),
        "stream": switch(body, "stream"),
        "usage": switch(options, "include_usage"),
    }


def read_chat(
    body: dict,
    tokenizer: lm.Tokenizer,
    settings: ServerSettings,
    context: int,
) -> Asked:
    """A conversation, without its oldest turns where they and the answer do not fit."""
    shared = common(body, settings, True)
    room = context - min(context // 2, shared["sampling"].max_new_tokens)
    turns, dropped = lm.fit_turns(tokenizer, chat_turns(body), room)
    ids = lm.encode_chat(tokenizer, turns, reply=True)[0]
    logprobs = switch(body, "logprobs")
    likeliest = number(body, "top_logprobs")
    if likeliest and not logprobs:
        raise RequestError(400, "top_logprobs needs logprobs", "top_logprobs")
    about = {"logprobs": logprobs, "likeliest": likeliest, "dropped": dropped, "turns": turns}
    return Asked([ids], [[]], **shared, **about)


def read_completion(
    body: dict,
    tokenizer: lm.Tokenizer,
    settings: ServerSettings,
    context: int,
) -> Asked:
    prompts = [tokenizer.prompt(text) for text in prompt_texts(body)]
    shared = common(body, settings, False)
    likeliest = body.get("logprobs")
    if likeliest is not None and (type(likeliest) is not int or not 0 <= likeliest <= 20):
        raise RequestError(400, "logprobs must be a whole number from 0 to 20", "logprobs")
    if len(prompts) * shared["n"] > settings.max_n:
        raise RequestError(400, f"a request has at most {settings.max_n} answers", "prompt")
    return Asked(
        prompts, prompts, **shared, logprobs=likeliest is not None, likeliest=likeliest or 0
    )


# ==================================================================================================
# Engine: one thread that generates for all requests
# ==================================================================================================


class Statistics:
    """What /metrics tells; written by one thread at a time, under its lock."""

    def __init__(self):
        self.lock = threading.Lock()
        self.counts: Counter[str] = Counter()

    def add(self, name: str, value: float = 1) -> None:
        with self.lock:
            self.counts[name] += value

    def text(self, gauges: dict[str, float]) -> str:
        lines = []
        with self.lock:
            counts = dict(self.counts)
        kinds = {**dict.fromkeys(counts, "counter"), **dict.fromkeys(gauges, "gauge")}
        told = set()
        for name, value in {**counts, **gauges}.items():
            bare = name.partition("{")[0]
            if bare not in told:
                lines.append(f"# TYPE {bare} {kinds[name]}")
                told.add(bare)
            lines.append(f"{name} {value:g}")
        return "\n".join(lines) + "\n"


@dataclass(eq=False)
class Answer:
    """One text of a request: what the engine gives it, and where it goes."""

    generation: lm.Generation
    deliver: Callable[[lm.Drawn | None], None]  # None: nothing more comes
    asked_at: float = field(default_factory=time.monotonic)
    cancelled: bool = False


class Engine:
    """The thread that owns the model: waiting answers join the running batch as rows get free."""

    def __init__(
        self,
        model: lm.Transformer,
        machine: lm.Machine,
        settings: ServerSettings,
        statistics: Statistics,
    ):
        self.batch = lm.RunningBatch(model, settings.batch_size, machine.dtype, machine.compiles)
        self.machine = machine
        self.settings = settings
        self.statistics = statistics
        self.waiting: deque[Answer] = deque()
        self.running: dict[lm.Generation, Answer] = {}
        self.changed = threading.Condition()
        self.closed = False
        self.failed = ""
        self.thread = threading.Thread(target=self.run, daemon=True)
        self.thread.start()

    def submit(self, answers: list[Answer]) -> None:
        """Queue the answers of a request; RequestError where there is no room for them."""
        with self.changed:
            if self.failed or self.closed:
                raise RequestError(503, self.failed or "the server is closing")
            if len(self.waiting) + len(answers) > self.settings.queue + self.free():
                raise RequestError(429, "too many requests are waiting; try again")
            self.waiting.extend(answers)
            self.changed.notify()

    def go_on(self, answer: Answer) -> None:
        """Queue a further turn of an answer that was let in before, ahead of new ones."""
        with self.changed:
            self.waiting.appendleft(answer)
            self.changed.notify()

    def free(self) -> int:
        return max(0, self.settings.batch_size - len(self.running))

    def cancel(self, answers: list[Answer]) -> None:
        """Nobody waits for these any more: their rows become free before the next step."""
        with self.changed:
            for answer in answers:
                answer.cancelled = True
            self.changed.notify()

    def close(self) -> None:
        with self.changed:
            self.closed = True
            self.changed.notify()
        self.thread.join()

    def run(self) -> None:
        try:
            while not self.closed:
                self.turn()
        except lm.BROKEN as fault:  # nobody may wait for a thread that has ended
            self.failed = f"the model failed: {fault or type(fault).__name__}"
            print(f"error: {self.failed}", file=sys.stderr, flush=True)
        with self.changed:
            left = [*self.running.values(), *self.waiting]
            self.running, self.waiting = {}, deque()
        for answer in left:
            answer.deliver(None)

    def turn(self) -> None:
        """Let answers go and come, and draw a token for each."""
        with self.changed:
            while not (self.waiting or self.running or self.closed):
                self.changed.wait()
            begun = self.admit()
        if not self.running:
            return
        with self.machine.autocast():
            for answer in begun:
                self.batch.join(answer.generation)
            drawn = self.batch.step()
        for generation, one in drawn:
            answer = self.running[generation]
            if generation.drawn == 1:
                self.statistics.add(
                    "lm_first_token_seconds_sum", time.monotonic() - answer.asked_at
                )
                self.statistics.add("lm_first_token_seconds_count")
            answer.deliver(one)
            if generation.ended:
                answer.deliver(None)
        self.statistics.add("lm_generated_tokens_total", len(drawn))
        with self.changed:
            self.running = {g: a for g, a in self.running.items() if not g.ended}

    def admit(self) -> list[Answer]:
        """Drop what was cancelled, and take in what waits while rows are free."""
        for generation, answer in list(self.running.items()):
            if answer.cancelled:
                self.batch.leave(generation)
                del self.running[generation]
        self.waiting = deque(answer for answer in self.waiting if not answer.cancelled)
        begun = []
        while self.waiting and len(self.running) < self.settings.batch_size:
            answer = self.waiting.popleft()
            self.running[answer.generation] = answer
            begun.append(answer)
        return begun


# ==================================================================================================
# Answers: ids become text, stop strings and tool calls
# ==================================================================================================


class Piece(NamedTuple):
    """Text that may be sent, the tokens behind it, and why the answer ended, if it did."""

    text: str
    tokens: list[lm.Drawn]
    finish: str = ""


class Writer:
    """Assembles one answer. Text that may be the beginning of a stop string is held back."""

    def __init__(self, tokenizer: lm.Tokenizer, asked: Asked, context: list[int]):
        self.tokenizer = tokenizer
        self.stops = asked.stops
        self.stream = lm.TextStream(tokenizer, context)
        self.held = ""
        self.tokens: list[lm.Drawn] = []  # of the held text
        self.count = 0
        self.calls: list[list[int]] = []  # ids of each tool call
        self.marker = tokenizer.roles.get("call")
        self.ids: list[int] = []  # of the turn under way
        self.called: list[str] = []  # by this server, a line each
        self.turn = 0

    def next_turn(self, called: list[str]) -> None:
        """Go on behind the result of a tool."""
        self.ids, self.calls, self.called = [], [], called
        self.turn += 1

    def push(self, drawn: lm.Drawn) -> Piece:
        self.count += 1
        self.ids.append(drawn.token)
        if drawn.token in self.tokenizer.stops:
            return self.end("stop")
        if drawn.token == self.marker:
            self.calls.append([])
            return Piece("", [])
        if self.calls:
            self.calls[-1].append(drawn.token)
            return Piece("", [])
        self.held += self.stream.push(drawn.token)
        self.tokens.append(drawn)
        found = [self.held.find(stop) for stop in self.stops if stop in self.held]
        if found:
            self.held = self.held[: min(found)]
            return self.flush("stop")
        safe = len(self.held) - self.overlap()
        text, self.held = self.held[:safe], self.held[safe:]
        tokens = []
        if text or not self.stops:
            tokens, self.tokens = self.tokens, []
        return Piece(text, tokens)

    def overlap(self) -> int:
        """How many of the last characters may begin a stop string."""
        longest = 0
        for stop in self.stops:
            for size in range(1, min(len(stop), len(self.held) + 1)):
                if self.held.endswith(stop[:size]):
                    longest = max(longest, size)
        return longest

    def flush(self, finish: str) -> Piece:
        piece = Piece(self.held, self.tokens, finish)
        self.held, self.tokens = "", []
        return piece

    def end(self, finish: str) -> Piece:
        """What is left, stop strings in it included."""
        if not self.calls:
            self.held += self.stream.waiting()
        for stop in self.stops:
            self.held = self.held.partition(stop)[0]
        if self.calls and finish == "stop":
            finish = "tool_calls"
        return self.flush(finish)

    def tool_calls(self) -> list[dict]:
        """The calls as OpenAI spells them; one that is no JSON is given as it is."""
        calls = []
        for number, ids in enumerate(self.calls):
            text = self.tokenizer.decode(ids)
            name, arguments = "", text
            with contextlib.suppress(ValueError, AttributeError, TypeError):
                call = json.loads(text)
                name = str(call["name"]) if "name" in call else ""
                arguments = json.dumps(call.get("arguments", {}), ensure_ascii=False)
            function = {"name": name, "arguments": arguments}
            call_id = f"call_{secrets.token_hex(8)}"
            calls.append({"index": number, "id": call_id, "type": "function", "function": function})
        return calls


def token_text(tokenizer: lm.Tokenizer, token: int) -> str:
    return tokenizer.decode([token])


def chat_logprobs(tokenizer: lm.Tokenizer, tokens: list[lm.Drawn]) -> dict:
    def entry(token: int, logp: float) -> dict:
        text = token_text(tokenizer, token)
        return {"token": text, "logprob": logp, "bytes": list(text.encode())}

    content = []
    for drawn in tokens:
        likeliest = [entry(*pair) for pair in drawn.likeliest]
        content.append({**entry(drawn.token, drawn.logp), "top_logprobs": likeliest})
    return {"content": content, "refusal": None}


def text_logprobs(tokenizer: lm.Tokenizer, tokens: list[lm.Drawn], offset: int) -> dict:
    texts = [token_text(tokenizer, drawn.token) for drawn in tokens]
    offsets = [offset + len("".join(texts[:place])) for place in range(len(texts))]
    likeliest = []
    for drawn in tokens:
        likeliest.append({token_text(tokenizer, i): logp for i, logp in drawn.likeliest})
    return {
        "tokens": texts,
        "token_logprobs": [drawn.logp for drawn in tokens],
        "top_logprobs": likeliest,
        "text_offset": offsets,
    }


# ==================================================================================================
# Server: FastAPI on one event loop
# ==================================================================================================


class Service:
    """A model behind the two endpoints."""

    def __init__(
        self,
        settings: ServerSettings,
        model: lm.Transformer,
        tokenizer: lm.Tokenizer,
        machine: lm.Machine,
    ):
        self.settings = settings
        self.tokenizer = tokenizer
        self.context = model.config.seq_len
        self.statistics = Statistics()
        self.engine = Engine(model, machine, settings, self.statistics)
        self.created = int(time.time())
        path = Path(settings.ckpt)
        self.name = settings.name or (path.name if path.is_dir() else path.parent.name) or "model"

    def check_key(self, header: str) -> None:
        key = self.settings.api_key
        given = header.removeprefix("Bearer ").strip()
        if key and not secrets.compare_digest(given.encode(), key.encode()):
            raise RequestError(401, "the API key is missing or wrong")

    def begin(self, asked: Asked) -> tuple[list[Answer], asyncio.Queue]:
        """Queue the answers of a request; (index, drawn or None) arrive in the queue. RequestError
        where there is no room for them."""
        loop = asyncio.get_running_loop()
        longest = max(map(len, asked.prompts))
        if longest >= self.context:
            raise RequestError(
                400,
                f"the prompt has {longest} tokens, the model's context {self.context}",
                "messages",
            )
        arrived: asyncio.Queue = asyncio.Queue()
        answers = []
        for place, ids in enumerate(asked.prompts):
            for number in range(asked.n):
                index = place * asked.n + number
                answers.append(self.answer(asked, ids, index, 0, asked.sampling, loop, arrived))
        self.engine.submit(answers)
        self.statistics.add("lm_prompt_tokens_total", sum(map(len, asked.prompts)))
        return answers, arrived

    def answer(
        self,
        asked: Asked,
        ids: list[int],
        index: int,
        turn: int,
        sampling: lm.SamplingSettings,
        loop: asyncio.AbstractEventLoop,
        arrived: asyncio.Queue,
    ) -> Answer:
        """A turn of an answer, of which (index, turn, drawn or None) arrive in the queue."""

        def deliver(drawn: lm.Drawn | None) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has been closed
                loop.call_soon_threadsafe(arrived.put_nowait, (index, turn, drawn))

        seed, stops = asked.seed + turn, self.tokenizer.stops
        return Answer(lm.Generation(ids, sampling, seed, index, stops, asked.likeliest), deliver)

    def episodes(self, asked: Asked) -> list[lm.Episodes]:
        """What follows on each answer of a chat, where this server has tools for it."""
        if not (self.settings.tools and asked.turns):
            return []
        box, most = lm.Toolbox(self.settings.tools), self.settings.max_turns
        made = []
        for ids in asked.prompts * asked.n:
            made.append(lm.Episodes(self.tokenizer, [asked.turns], [ids], box, most))
        return made

    async def next_turn(
        self,
        asked: Asked,
        episode: lm.Episodes,
        writer: Writer,
        old: Answer,
        arrived: asyncio.Queue,
    ) -> Answer | None:
        """The turn that follows on one which calls a tool of this server; None where none does."""
        calls = lm.assistant_turn(self.tokenizer, writer.ids).calls
        with contextlib.suppress(ValueError, LookupError, TypeError):
            if calls and json.loads(calls[0])["name"] not in self.settings.tools:
                return None  # the client's
        ids = old.generation.ids + writer.ids
        [more] = await asyncio.to_thread(episode, [(0, ids)])
        room = self.context - len(ids) - len(more or [])
        most = min(asked.sampling.max_new_tokens - writer.count, room)
        if more is None or most < 1:
            return None
        writer.next_turn(lm.called_lines(episode.turns[0][len(asked.turns) :]))
        sampling = lm.replace(asked.sampling, max_new_tokens=most)
        loop, index = asyncio.get_running_loop(), old.generation.number
        return self.answer(asked, ids + more, index, writer.turn, sampling, loop, arrived)

    async def pieces(
        self,
        asked: Asked,
        writers: list[Writer],
        answers: list[Answer],
        arrived: asyncio.Queue,
    ) -> AsyncIterator[tuple[int, Piece]]:
        """(index, piece) of answers that were begun, as they come, until all have ended."""
        until = time.monotonic() + self.settings.timeout
        left = set(range(len(answers)))
        episodes = self.episodes(asked)
        try:
            while left:
                try:
                    wait = max(0.0, until - time.monotonic())
                    index, turn, drawn = await asyncio.wait_for(arrived.get(), wait)
                except asyncio.TimeoutError:
                    for index in sorted(left):
                        yield index, writers[index].end("length")
                    return
                writer = writers[index]
                if index not in left or turn < writer.turn:
                    continue
                if drawn is None:  # all its tokens are drawn
                    piece = writer.end("length")
                else:
                    piece = writer.push(drawn)
                if piece.finish == "tool_calls" and episodes:
                    old, episode = answers[index], episodes[index]
                    following = await self.next_turn(asked, episode, writer, old, arrived)
                    if following:
                        answers[index] = following
                        self.engine.go_on(following)
                        piece = Piece(piece.text, piece.tokens)
                if piece.finish:
                    left.discard(index)
                    self.engine.cancel([answers[index]])
                if piece.text or piece.tokens or piece.finish:
                    yield index, piece
            self.statistics.add('lm_requests_total{status="200"}')
        finally:
            if left:
                self.statistics.add("lm_abandoned_requests_total")
            self.engine.cancel(answers)

    def usage(self, asked: Asked, writers: list[Writer]) -> dict:
        read, written = sum(map(len, asked.prompts)), sum(writer.count for writer in writers)
        return {
            "prompt_tokens": read,
            "completion_tokens": written,
            "total_tokens": read + written,
        }

    def writers(self, asked: Asked) -> list[Writer]:
        return [
            Writer(self.tokenizer, asked, context)
            for context in asked.contexts
            for _ in range(asked.n)
        ]

    def head(self, kind: str, asked: Asked) -> dict:
        prefix = "chatcmpl" if kind.startswith("chat") else "cmpl"
        head = {
            "id": f"{prefix}-{secrets.token_hex(12)}",
            "object": kind,
            "created": int(time.time()),
            "model": self.name,
        }
        if asked.dropped:
            head["dropped_turns"] = asked.dropped
        return head

    def choice(self, asked: Asked, chat: bool, index: int, writer: Writer, pieces: list) -> dict:
        """A whole answer as one of `choices`."""
        text = "".join(piece.text for piece in pieces)
        tokens = [token for piece in pieces for token in piece.tokens]
        logprobs = None
        if asked.logprobs and chat:
            logprobs = chat_logprobs(self.tokenizer, tokens)
        elif asked.logprobs:
            logprobs = text_logprobs(self.tokenizer, tokens, 0)
        about = {"index": index, "logprobs": logprobs, "finish_reason": pieces[-1].finish}
        if not chat:
            return {**about, "text": text}
        message: dict[str, object] = {"role": "assistant", "content": text, "refusal": None}
        if calls := writer.tool_calls():
            for call in calls:
                del call["index"]
            message |= {"content": text or None, "tool_calls": calls}
        if writer.called:
            message["called"] = writer.called
        return {**about, "message": message}

    async def whole(self, asked: Asked, chat: bool) -> dict:
        """The answer to a request that is not streamed."""
        writers = self.writers(asked)
        pieces: list[list[Piece]] = [[] for _ in writers]
        async for index, piece in self.pieces(asked, writers, *self.begin(asked)):
            pieces[index].append(piece)
        choices = [
            self.choice(asked, chat, index, writer, pieces[index])
            for index, writer in enumerate(writers)
        ]
        kind = "chat.completion" if chat else "text_completion"
        return {**self.head(kind, asked), "choices": choices, "usage": self.usage(asked, writers)}

    def delta(self, asked: Asked, chat: bool, index: int, writer: Writer, piece: Piece) -> dict:
        """A piece as one of the `choices` of a chunk."""
        logprobs = None
        if asked.logprobs and piece.tokens:
            logprobs = chat_logprobs(self.tokenizer, piece.tokens)
            if not chat:
                logprobs = text_logprobs(self.tokenizer, piece.tokens, 0)
        about = {"index": index, "logprobs": logprobs, "finish_reason": piece.finish or None}
        if not chat:
            return {**about, "text": piece.text}
        delta: dict[str, object] = {"content": piece.text} if piece.text else {}
        if piece.finish and (calls := writer.tool_calls()):
            delta["tool_calls"] = calls
        if piece.finish and writer.called:
            delta["called"] = writer.called
        return {**about, "delta": delta}

    async def events(
        self,
        asked: Asked,
        chat: bool,
        answers: list[Answer],
        arrived: asyncio.Queue,
    ) -> AsyncIterator[str]:
        """The lines of a streamed answer that was begun (server-sent events)."""
        writers = self.writers(asked)
        head = self.head("chat.completion.chunk" if chat else "text_completion", asked)

        def event(choices: list[dict], **more) -> str:
            return f"data: {json.dumps({**head, 'choices': choices, **more})}\n\n"

        if chat:
            for index in range(len(writers)):
                delta = {"role": "assistant", "content": ""}
                yield event([{"index": index, "delta": delta, "finish_reason": None}])
        async for index, piece in self.pieces(asked, writers, answers, arrived):
            yield event([self.delta(asked, chat, index, writers[index], piece)])
        if asked.usage:
            yield event([], usage=self.usage(asked, writers))
        yield "data: [DONE]\n\n"

    def metrics(self) -> str:
        return self.statistics.text(
            {
                "lm_running_requests": len(self.engine.running),
                "lm_waiting_requests": len(self.engine.waiting),
                "lm_batch_rows": len(self.engine.batch.rows),
            }
        )


async def body_of(request, most: int) -> bytes:
    """The body of a request; RequestError where it is larger than it may be."""
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > most:
            raise RequestError(413, f"the body is larger than {most} bytes")
        parts.append(part)
    return b"".join(parts)


async def unless_left(request, work) -> object:
    """The result of `work`, which is cancelled where the client leaves before it is done."""
    task = asyncio.ensure_future(work)
    try:
        while not task.done():
            await asyncio.wait([task], timeout=0.2)
            if not task.done() and await request.is_disconnected():
                raise RequestError(499, "the client has left")
        return task.result()
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError, RequestError):
            await task


def make_app(service: Service):
    """The FastAPI application of a service."""
    fastapi = lm.need("fastapi")
    responses = lm.need("fastapi.responses", "fastapi")
    Request = fastapi.Request
    app = fastapi.FastAPI(title="standalone_transformer_lm", docs_url=None, redoc_url=None)

    @app.exception_handler(RequestError)
    async def told(_request: Request, fault: RequestError):
        service.statistics.add(f'lm_requests_total{{status="{fault.status}"}}')
        return responses.JSONResponse(fault.body(), fault.status)

    async def answer(request: Request, read: Callable, chat: bool):
        service.check_key(request.headers.get("authorization", ""))
        body = parse_body(await body_of(request, service.settings.max_body))
        asked = read(body, service.tokenizer, service.settings, service.context)
        if not asked.stream:
            return await unless_left(request, service.whole(asked, chat))
        events = service.events(asked, chat, *service.begin(asked))
        return responses.StreamingResponse(events, media_type="text/event-stream")

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request):
        return await answer(request, read_chat, True)

    @app.post("/v1/completions")
    async def completions(request: Request):
        return await answer(request, read_completion, False)

    @app.get("/v1/models")
    async def models(request: Request):
        service.check_key(request.headers.get("authorization", ""))
        model = {"id": service.name, "object": "model", "created": service.created}
        return {"object": "list", "data": [{**model, "owned_by": "local"}]}

    @app.get("/health")
    async def health():
        if service.engine.failed:
            raise RequestError(503, service.engine.failed)
        return {"status": "ok"}

    @app.get("/metrics")
    async def metrics():
        return responses.PlainTextResponse(service.metrics())

    @app.get("/")
    async def page():
        return responses.HTMLResponse(PAGE.read_text(encoding="utf-8"))

    return app


def open_service(settings: ServerSettings, device: lm.InferenceSettings) -> Service:
    machine = lm.open_to_generate(device)
    saved = lm.load_checkpoint(settings.ckpt, settings.base)
    tokenizer = lm.tokenizer_of(saved, settings.tokenizer, settings.ckpt)
    if saved.get("kind") in lm.UNTAUGHT_KINDS:
        lm.say("note: this model was never taught to chat; /v1/completions continues text")
    model = lm.build_model(saved, machine.device, machine.dtype)
    return Service(settings, model, tokenizer, machine)


def serve(settings: ServerSettings, device: lm.InferenceSettings) -> int:
    uvicorn = lm.need("uvicorn")
    lm.need("fastapi")
    service = open_service(settings, device)
    lm.say(f"{service.name}: open http://{settings.host}:{settings.port}  (Ctrl-C ends)")
    try:
        uvicorn.run(
            make_app(service),
            host=settings.host,
            port=settings.port,
            log_level="warning",
            timeout_graceful_shutdown=5,
        )
    finally:
        service.engine.close()
    return 0


def main(argv: list[str] | None = None) -> int:
    """The server; the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    about = "an OpenAI-compatible server for a checkpoint"
    groups = (ServerSettings, lm.InferenceSettings)

    def run() -> int:
        parser = lm.make_parser("", about, EXAMPLE, groups)
        parser.prog = Path(__file__).name
        return serve(*lm.read_flags(parser, groups, words))

    return lm.run_command(lm.Command(run, about, EXAMPLE), [])


if __name__ == "__main__":
    sys.exit(main())
