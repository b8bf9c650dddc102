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
import threading
import time
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

VERBS = ("Summarise", "Extract", "Classify", "Explain", "List", "Compare", "Assess", "Draft")
PARTS = "ar bel cor dan el fi gor hal in jo kel lum mor nex or pil quo ras sel tum ul vex wi zor"
FAULTS = ("429", "429-bare", "500", "slow", "cut", "malformed", "no-usage")
GRACE_S = 0.05


@dataclass
class Behaviour:
    """What the server does; may be changed while it runs."""

    faults: dict[str, float] = field(default_factory=dict)
    """Probability of each fault."""
    latency_s: float = 0.0
    slow_s: float = 5.0
    retry_after: str = "0.05"
    words: int = 12
    """Words of a task's input, and of its output."""
    tasks: int = 17
    junk: float = 0.15
    """Share of the tasks that the paper's rules drop."""
    form: str = "schema"
    categories: tuple[str, ...] = ("qa", "ie", "gen", "other")
    """Of its tasks, one as often as the other; said where the prompt speaks of categories."""
    content: str | None = None
    """Said instead of tasks."""
    finish: str | None = None
    usage_extra: int = 0
    """Tokens billed beyond the truth."""
    honour_cap: bool = True
    rpm: int | None = None
    """Requests in any minute; more get a 429 with Retry-After."""
    error: tuple[int, dict[str, Any]] | None = None
    """A status and an error object for every request."""
    batch_s: float = 0.0
    """How long a batch takes."""
    batch_end: tuple[str, float] = ("completed", 1.0)
    """The status in which batches end, and the share of their requests that is worked off."""
    batch_errors: float = 0.0
    """Share of a batch's requests that end in its error file, with a 500."""
    batch_hidden: float = 0.0
    """Share of a batch's answers that are billed and stand in no file."""
    batch_cuts: int = 0
    """How many creations of batches are carried out and then answered by a cut connection."""
    batch_answer_s: float = 0.0
    """How long the answer to a creation takes, after it was carried out."""
    batch_problem: dict[str, Any] | None = None
    """The error with which batches fail to validate."""
    key: str | None = None
    headers: dict[str, str] = field(default_factory=dict)


class Seen(NamedTuple):
    """One request as the server saw it."""

    time_s: float
    body_hash: str
    status: int
    fault: str
    prompt_tokens: int
    completion_tokens: int
    price: float = 1.0
    """Share of the price that is asked for it."""


@dataclass
class Batch:
    """A batch as the server holds it."""

    shown: dict[str, Any]
    due_s: float
    requests: list[dict[str, Any]]


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
        self.files: dict[str, bytes] = {}
        self.batches: dict[str, Batch] = {}

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
                status, value = self._batch_call(line.split(" ")[1], headers, raw)
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
            value = self._completion(body, mark, len(raw))
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

    def _batch_call(
        self, path: str, headers: dict[str, str], raw: bytes
    ) -> tuple[int, dict[str, Any] | bytes | None]:
        """Answer a call to files or batches; None stands for a cut connection."""
        path, _, query = path.removeprefix("/v1/").partition("?")
        for batch in self.batches.values():
            self._work_off(batch)
        if path == "files":
            mark = headers["content-type"].partition("boundary=")[2].encode()
            parts = [part.partition(b"\r\n\r\n") for part in raw.split(b"--" + mark)]
            fields = {
                head.split(b'name="')[1].split(b'"')[0]: data for head, _, data in parts[1:-1]
            }
            assert fields[b"purpose"].strip() == b"batch"
            name = f"file-{len(self.files)}"
            self.files[name] = fields[b"file"][:-2]
            shown = {"id": name, "object": "file", "bytes": len(self.files[name]), "created_at": 1}
            return 200, shown | {"filename": "b.jsonl", "purpose": "batch", "status": "processed"}
        if path.startswith("files/"):
            return 200, self.files[path.split("/")[1]]
        if path == "batches" and raw:
            made = self._new_batch(json.loads(raw))
            self.behaviour.batch_cuts -= 1
            return 200, None if self.behaviour.batch_cuts >= 0 else made
        if path == "batches":
            return 200, self._page(dict(part.split("=") for part in query.split("&") if part))
        found = self.batches.get(path.split("/")[1])
        return (200, found.shown) if found else (404, {"error": {"message": "no such batch"}})

    def _page(self, query: dict[str, str]) -> dict[str, Any]:
        """Return two batches at a time, the newest first, so that clients must turn pages."""
        names = list(reversed(self.batches))
        at = names.index(query["after"]) + 1 if "after" in query else 0
        data = [self.batches[name].shown for name in names[at : at + 2]]
        more = at + 2 < len(names)
        return {"object": "list", "data": data, "has_more": more} | (
            {"first_id": data[0]["id"], "last_id": data[-1]["id"]} if data else {}
        )

    def _new_batch(self, asked: dict[str, Any]) -> dict[str, Any]:
        """Take a batch, after the checks that the real service makes."""
        requests = [json.loads(line) for line in self.files[asked["input_file_id"]].splitlines()]
        assert (asked["endpoint"], asked["completion_window"]) == ("/v1/chat/completions", "24h")
        assert len({r["custom_id"] for r in requests}) == len(requests) <= 50_000
        assert {(r["method"], r["url"]) for r in requests} == {("POST", asked["endpoint"])}
        assert len({r["body"]["model"] for r in requests}) == 1
        name = f"batch_{len(self.batches)}"
        shown = asked | {"id": name, "object": "batch", "created_at": 1, "status": "in_progress"}
        shown["request_counts"] = {"total": len(requests), "completed": 0, "failed": 0}
        self.batches[name] = Batch(shown, time.monotonic() + self.behaviour.batch_s, requests)
        self._work_off(self.batches[name])
        return shown

    def _work_off(self, batch: Batch) -> None:
        """Bring a batch to its end once its time has come."""
        doing, shown = self.behaviour, batch.shown
        if shown["status"] != "in_progress" or time.monotonic() < batch.due_s:
            return
        shown["status"], part = doing.batch_end
        if doing.batch_problem:
            shown["status"], part = "failed", 0.0
            shown["errors"] = {"object": "list", "data": [doing.batch_problem]}
        lines: dict[str, list[bytes]] = {"output": [], "error": []}
        requests = self.chance.sample(batch.requests, len(batch.requests))  # in any order
        for place, request in enumerate(requests):
            key, chance = request["custom_id"], self.chance.random()
            row: dict[str, Any] = {"id": f"req_{place}", "custom_id": key, "error": None}
            if place >= part * len(requests):
                row |= {"response": None, "error": {"code": "batch_expired", "message": "late"}}
            elif chance < doing.batch_errors:
                body = {"error": {"message": "the server had an error"}}
                row["response"] = {"status_code": 500, "request_id": "r", "body": body}
            else:
                raw = json.dumps(
                    request["body"], sort_keys=True, separators=(",", ":"), ensure_ascii=False
                ).encode()
                body = self._completion(request["body"], hashlib.sha256(raw).hexdigest(), len(raw))
                tokens = (body["usage"]["prompt_tokens"], body["usage"]["completion_tokens"])
                self.seen.append(Seen(time.monotonic(), key, 200, "", *tokens, 0.5))
                shown["request_counts"]["completed"] += 1
                if chance >= 1 - doing.batch_hidden:
                    continue
                row["response"] = {"status_code": 200, "request_id": "r", "body": body}
            kind = (
                "output" if row["response"] and row["response"]["status_code"] == 200 else "error"
            )
            lines[kind].append(json.dumps(row).encode() + b"\n")
        for kind, made in lines.items():
            if made and not doing.batch_problem:
                shown[f"{kind}_file_id"] = name = f"file-{len(self.files)}"
                self.files[name] = b"".join(made)

    def _completion(self, body: dict[str, Any], mark: str, size: int) -> dict[str, Any]:
        doing = self.behaviour
        asked = "Category" in str(body["messages"]) or "category" in str(body["messages"])
        content = doing.content or self._tasks(mark, asked)
        most = 4 * (body.get("max_tokens") or body.get("max_completion_tokens"))
        cut = doing.honour_cap and len(content) > most
        content = content[:most] if cut else content
        usage = {
            "prompt_tokens": size // 4,
            "completion_tokens": -(-len(content) // 4) + doing.usage_extra,
        }
        finish = doing.finish or ("length" if cut else "stop")
        message = {"role": "assistant", "content": content}
        return {
            "id": f"chatcmpl-{mark[:12]}",
            "object": "chat.completion",
            "created": 1700000000,
            "model": body["model"],
            "system_fingerprint": "fp_local",
            "choices": [{"index": 0, "message": message, "finish_reason": finish}],
            "usage": usage | {"total_tokens": sum(usage.values())},
        }

    def _tasks(self, mark: str, with_category: bool) -> str:
        chance = random.Random(mark)
        made = [self._task(chance) for _ in range(self.behaviour.tasks)]
        for task in made if with_category else []:
            task["category"] = chance.choice(self.behaviour.categories)
        if self.behaviour.form == "schema":
            return json.dumps({"tasks": made})
        return "\n\n".join(
            f"{k}. Instruction: {t['instruction']}\n{k}. Input: {t['input']}\n"
            f"{k}. Output: {t['output']}"
            + (f"\n{k}. Category: {t['category']}" if with_category else "")
            for k, t in enumerate(made, 4)
        )

    def _task(self, chance: random.Random) -> dict[str, str]:
        verb, count = chance.choice(VERBS), self.behaviour.words
        instruction = f"{verb} the {_words(chance, chance.randint(6, 14))}."
        if chance.random() < self.behaviour.junk:
            instruction = chance.choice(
                ("Summarise this.", f"Draw a {_words(chance, 5)}.", "Explain the finding to them.")
            )
        length = chance.randint(count // 2, count + count // 2)
        return {
            "instruction": instruction,
            "input": _words(chance, length),
            "output": _words(chance, length),
        }


def _words(chance: random.Random, count: int) -> str:
    parts = PARTS.split()
    return " ".join("".join(chance.choices(parts, k=3)) for _ in range(count))


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
