"""A local server that speaks OpenAI's chat completions, files and batches, bills what it does, and
fails on demand.

An answer is a function of the request's body, so that two runs which ask the same get the same.
Tokens are bytes / 4. What was worked on is billed even if its answer never arrives whole, as a
provider would; refusals and server errors are not. It runs in a thread of a test, or by itself:

    python tests/synth/server.py --port 8000 --words 30
"""

import argparse
import asyncio
import contextlib
import hashlib
import json
import random
import ssl
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))  # tests and benches load this file by its path

from server_batches import Batches  # noqa: E402
from server_behaviour import FAULTS, Behaviour, Seen  # noqa: E402
from server_chat import completion  # noqa: E402

GRACE_S = 0.05


class Server:
    """The server and its books."""

    def __init__(self, behaviour: Behaviour | None = None) -> None:
        self.behaviour = behaviour or Behaviour()
        self.seen: list[Seen] = []
        self.bodies: list[dict[str, Any]] = []
        self.window: deque[float] = deque()
        self.chance = random.Random(0)
        self.in_flight = self.most_in_flight = 0
        self.told: list[tuple[float, float]] = []
        self.early = 0
        self.port = 0
        self.batch_api = Batches(lambda: self.behaviour, self.seen, self.chance)
        self.files, self.batches = self.batch_api.files, self.batch_api.batches

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def bill(self, price_in: float, price_out: float) -> float:
        """USD for everything that was worked on, at prices per million tokens."""
        return (
            sum(
                s.price * (s.prompt_tokens * price_in + s.completion_tokens * price_out)
                for s in self.seen
            )
            / 1e6
        )

    def bought(self) -> Counter[str]:
        """How often the work for each body was billed."""
        return Counter(s.body_hash for s in self.seen if s.completion_tokens)

    async def start(self, port: int = 0, tls: ssl.SSLContext | None = None) -> asyncio.Server:
        server = await asyncio.start_server(self._serve, "127.0.0.1", port, limit=2**22, ssl=tls)
        self.port = server.sockets[0].getsockname()[1]
        return server

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                lines = head.decode("latin-1").split("\r\n")
                pairs = (line.partition(":") for line in lines[1:] if line)
                headers = {name.lower(): value.strip() for name, _, value in pairs}
                body = await reader.readexactly(int(headers.get("content-length", 0)))
                self.in_flight += 1
                self.most_in_flight = max(self.most_in_flight, self.in_flight)
                try:
                    await self._respond(writer, lines[0], headers, body)
                finally:
                    self.in_flight -= 1
        except (asyncio.IncompleteReadError, ConnectionError):
            pass  # the client went away
        finally:
            writer.close()

    async def _respond(
        self, writer: asyncio.StreamWriter, line: str, headers: dict[str, str], raw: bytes
    ) -> None:
        doing, now_s = self.behaviour, time.monotonic()
        # what was sent before the client could know is not early
        self.early += any(told_s + GRACE_S < now_s < until_s for told_s, until_s in self.told)
        mark, fault, tokens = hashlib.sha256(raw).hexdigest(), self._fault(), (0, 0)
        status, value, more = self._refusal(line, headers, fault, now_s)
        if not line.startswith("POST /v1/chat/completions "):
            if status == 200:
                status, value = self.batch_api.call(*line.split(" ")[:2], headers, raw)
            if "/batches" in line and raw:
                await asyncio.sleep(doing.batch_answer_s)
            if value is None:
                raise ConnectionError
            sent = value if isinstance(value, bytes) else json.dumps(value).encode()
            text = "".join(f"{name}: {text}\r\n" for name, text in more.items())
            head = f"content-type: application/json\r\ncontent-length: {len(sent)}\r\n{text}"
            writer.write(f"HTTP/1.1 {status} X\r\n{head}\r\n".encode() + sent)
            await writer.drain()
            return
        body = json.loads(raw)
        self.bodies.append(body)
        if status == 200:
            value = completion(doing, body, mark, len(raw))
            usage = value["usage"]
            tokens = (usage["prompt_tokens"], usage["completion_tokens"])
            if fault == "no-usage":
                del value["usage"]
        self.seen.append(Seen(now_s, mark, status, fault, *tokens))
        await asyncio.sleep(doing.slow_s if fault == "slow" else doing.latency_s)
        sent = b'{"choices": [{"mess' if fault == "malformed" else json.dumps(value).encode()
        head = {"content-type": "application/json", "content-length": str(len(sent)), **more}
        text = "".join(f"{name}: {text}\r\n" for name, text in (head | doing.headers).items())
        whole = f"HTTP/1.1 {status} X\r\n{text}\r\n".encode() + sent
        if fault == "cut":
            writer.write(whole[: len(whole) // 2])
            await writer.drain()
            raise ConnectionError
        writer.write(whole)
        await writer.drain()

    def _fault(self) -> str:
        at = self.chance.random()
        for fault, probability in self.behaviour.faults.items():
            assert fault in FAULTS
            if (at := at - probability) < 0:
                return fault
        return ""

    def _refusal(
        self, line: str, headers: dict[str, str], fault: str, now_s: float
    ) -> tuple[int, dict[str, Any], dict[str, str]]:
        doing = self.behaviour
        if not line.split(" ")[1].startswith(("/v1/chat/completions", "/v1/files", "/v1/batches")):
            return 404, {"error": {"message": f"no such page: {line}"}}, {}
        if doing.key and headers.get("authorization") != f"Bearer {doing.key}":
            said = f"Incorrect API key provided: {headers.get('authorization')}"
            return 401, {"error": {"message": said, "code": "invalid_api_key"}}, {}
        if doing.error:
            return doing.error[0], {"error": doing.error[1]}, {}
        limited = {"error": {"message": "slow down", "code": "rate_limit_exceeded"}}
        if doing.rpm:
            while self.window and now_s - self.window[0] >= 60:
                self.window.popleft()
            if len(self.window) >= doing.rpm:
                return 429, limited, {"retry-after": f"{60 - (now_s - self.window[0]):.3f}"}
            self.window.append(now_s)
        if fault == "429":
            told_s = float(doing.retry_after) + doing.latency_s
            self.told.append((now_s, now_s + told_s))
            return 429, limited, {"retry-after": doing.retry_after}
        if fault == "429-bare":
            return 429, limited, {}
        if fault == "500":
            return 500, {"error": {"message": "the server had an error"}}, {}
        return 200, {}, {}


@contextlib.contextmanager
def running(
    behaviour: Behaviour | None = None, tls: ssl.SSLContext | None = None
) -> Iterator[Server]:
    """Serve from a thread until the block ends."""
    server, ready, loop = Server(behaviour), threading.Event(), asyncio.new_event_loop()
    listening: list[asyncio.Server] = []

    async def start() -> None:
        listening.append(await server.start(tls=tls))
        ready.set()

    def serve() -> None:
        asyncio.set_event_loop(loop)
        loop.create_task(start())
        loop.run_forever()
        listening[0].close()
        tasks = asyncio.all_tasks(loop)
        for task in tasks:
            task.cancel()
        loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.close()

    thread = threading.Thread(target=serve)
    thread.start()
    assert ready.wait(10)
    try:
        yield server
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()


async def _forever(port: int, behaviour: Behaviour) -> None:
    server = Server(behaviour)
    listening = await server.start(port)
    print(server.url, flush=True)
    await listening.serve_forever()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--words", type=int, default=12)
    parser.add_argument("--latency-s", type=float, default=0.0)
    parser.add_argument("--form", default="schema")
    given = parser.parse_args()
    doing = Behaviour(words=given.words, latency_s=given.latency_s, form=given.form)
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(_forever(given.port, doing))
