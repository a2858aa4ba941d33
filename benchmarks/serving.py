"""Load chat_server.py: 16 streams with clients that leave and requests that are malformed.

    python benchmarks/serving.py --ckpt runs/sft --seconds 60

Tells tokens a second of one stream and of 16, the wait of a 17th for its first token while 16 run,
the server's memory after 10 seconds and at the end, and how many finished answers differ from the
same request alone with the same seed: a draw may fall within rounding of the border between two
tokens, so the exit code is 1 above 1 in 100. Needs fastapi, uvicorn, httpx.
"""

import argparse
import asyncio
import json
import random
import subprocess
import sys
import time
from pathlib import Path

import httpx

SERVER = Path(__file__).resolve().parents[1] / "chat_server.py"
PORT = 8931
URL = f"http://127.0.0.1:{PORT}/v1/chat/completions"
WORDS = "harbour engine village river teacher library mountain orchard soldier painter".split()
MALFORMED = (b"{", b"[]", b'{"messages": 5}', b'{"messages": [], "n": -1}', b"\xff\xfe")


def memory_mb(pid: int) -> float:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * 4096 / 1e6


def request_of(rng: random.Random, tokens: int) -> dict:
    text = "Where is the " + " ".join(rng.choices(WORDS, k=rng.randint(1, 12))) + "?"
    return {
        "messages": [{"role": "user", "content": text}],
        "seed": rng.randrange(1 << 30),
        "temperature": rng.choice((0, 0.7, 1.0)),
        "max_tokens": rng.randint(8, tokens),
    }


async def streamed(http: httpx.AsyncClient, body: dict, leave_after: int = 0) -> tuple:
    """(text, tokens, seconds to the first piece) of a streamed answer; tokens are 0 where the
    client left."""
    began, first, text, tokens, pieces = time.monotonic(), 0.0, "", 0, 0
    body = {**body, "stream": True, "stream_options": {"include_usage": True}}
    async with http.stream("POST", URL, json=body, timeout=120) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            if not line.startswith("data: {"):
                continue
            event = json.loads(line[6:])
            if event.get("usage"):
                tokens = event["usage"]["completion_tokens"]
            for choice in event["choices"]:
                piece = choice["delta"].get("content", "")
                text += piece
                pieces += bool(piece)
                if piece and not first:
                    first = time.monotonic() - began
            if leave_after and pieces >= leave_after:
                return text, 0, first
    return text, tokens, first


async def stream_for(seconds: float, seed: int, tokens: int, found: list, odd: bool) -> None:
    """One client: requests in turn; an `odd` one leaves some early and sends malformed ones."""
    rng, until = random.Random(seed), time.monotonic() + seconds
    async with httpx.AsyncClient() as http:
        while time.monotonic() < until:
            if odd and rng.random() < 0.1:
                response = await http.post(URL, content=rng.choice(MALFORMED), timeout=60)
                assert response.status_code == 400, response.status_code
            body = request_of(rng, tokens)
            leave = rng.randint(1, 5) if odd and rng.random() < 0.2 else 0
            text, count, first = await streamed(http, body, leave)
            found.append((body, text, count, first, leave))


async def load(streams: int, seconds: float, tokens: int, odd: bool) -> list:
    found: list = []
    clients = [stream_for(seconds, seed, tokens, found, odd) for seed in range(streams)]
    await asyncio.gather(*clients)
    return found


async def seventeenth(tokens: int) -> float:
    """The longest of five waits for a first token while 16 streams run."""
    waits = []

    async def late() -> None:
        await asyncio.sleep(2)
        rng = random.Random(99)
        async with httpx.AsyncClient() as http:
            for _ in range(5):
                _, _, first = await streamed(http, request_of(rng, tokens))
                waits.append(first)

    await asyncio.gather(load(16, 10, tokens, False), late())
    return max(waits)


async def different_alone(found: list, most: int) -> float:
    """The share of finished answers that the server gives otherwise to the same request alone."""
    whole = [(body, text) for body, text, _, _, leave in found if not leave]
    sample = random.Random(1).sample(whole, min(most, len(whole)))
    wrong = 0
    async with httpx.AsyncClient() as http:
        for body, text in sample:
            alone, _, _ = await streamed(http, body)
            wrong += alone != text
    print(f"{len(sample)} of {len(whole)} finished answers asked for again, alone: {wrong} differ")
    return wrong / len(sample)


def speed(found: list, seconds: float) -> float:
    return sum(count for *_, count, _, _ in found) / seconds


def wait_for(process: subprocess.Popen) -> None:
    until = time.monotonic() + 60
    while time.monotonic() < until:
        try:
            if httpx.get(f"http://127.0.0.1:{PORT}/health").is_success:
                return
        except httpx.TransportError:
            time.sleep(0.2)
    process.kill()
    raise SystemExit("the server did not start")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--ckpt", required=True)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--tokens", type=int, default=100, help="most tokens of an answer")
    parser.add_argument("--again", type=int, default=200, help="answers to ask for again, alone")
    args = parser.parse_args()
    command = [sys.executable, SERVER, "--ckpt", args.ckpt, "--port", PORT, "--dtype", "fp32"]
    process = subprocess.Popen([str(word) for word in command])
    try:
        wait_for(process)
        asyncio.run(load(1, 3, args.tokens, False))  # warm up
        one = speed(asyncio.run(load(1, 15, args.tokens, False)), 15)
        many = speed(asyncio.run(load(16, 15, args.tokens, False)), 15)
        print(f"tokens/s: one stream {one:.0f}, 16 streams {many:.0f}, {many / one:.1f} times")
        print(f"first token of a 17th while 16 run: {asyncio.run(seventeenth(args.tokens)):.2f} s")
        asyncio.run(load(16, 10, args.tokens, True))
        before = memory_mb(process.pid)
        found = asyncio.run(load(16, args.seconds, args.tokens, True))
        after = memory_mb(process.pid)
        left = sum(leave > 0 for *_, leave in found)
        print(
            f"{args.seconds:g} s of 16 streams: {len(found)} requests, {left} left early; "
            f"memory {before:.0f} MB, then {after:.0f} MB"
        )
        wrong = asyncio.run(different_alone(found, args.again))
        assert process.poll() is None, "the server has ended"
    finally:
        process.terminate()
        process.wait(20)
    return int(wrong > 0.01)


if __name__ == "__main__":
    sys.exit(main())
