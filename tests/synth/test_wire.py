"""Posting over aiohttp's connections: what is sent, byte for byte, and every way to come back."""

import asyncio
import contextlib
import gzip
import socket
from collections.abc import Awaitable, Callable
from typing import NamedTuple

import aiohttp
import pytest

from bioinstruct.synth.wire import Cut, Response, Unsent, Wire

BODY = b'{"a": 1}'
WHOLE = b"HTTP/1.1 200 OK\r\ncontent-length: 8\r\n\r\n" + BODY
CHUNKS = b'HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n3\r\n{"a\r\n5\r\n": 1}\r\n0\r\n\r\n'
PAUSE = b"<pause>"
PACKED = gzip.compress(BODY)
HALF = b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: 8\r\n\r\n" + BODY[:5]
GZIP = b"HTTP/1.1 200 OK\r\ncontent-encoding: gzip\r\ncontent-length: %d\r\n\r\n" % len(PACKED)
HEADERS = {"Content-Type": "application/json", "Authorization": "Bearer sk-1"}


class Heard(NamedTuple):
    """What a server heard: the bytes of each request, in the order of their connections."""

    requests: list[bytes]
    connections: list[int]


Ask = Callable[[Wire], Awaitable[object]]


def asked(
    answers: list[bytes], ask: Ask, *, proxied: bool = False, timeout_s: float = 20.0
) -> Heard:
    """Answer the k-th request with the k-th of some bytes, and hang up after it where that is none
    or says so; run what asks."""
    heard = Heard([], [])
    open_now: list[asyncio.StreamWriter] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        open_now.append(writer)
        heard.connections.append(0)
        number = len(heard.connections) - 1
        while head := await reader.readuntil(b"\r\n\r\n"):
            length = int(head.split(b"Content-Length: ")[1].split(b"\r\n")[0])
            heard.requests.append(head + await reader.readexactly(length))
            heard.connections[number] += 1
            answer = answers[len(heard.requests) - 1]
            for part in answer.split(PAUSE):
                writer.write(part)
                await writer.drain()
                await asyncio.sleep(0.05 if PAUSE in answer else 0)
            if not answer or b"connection: close" in answer:
                break
        writer.close()

    async def main() -> None:
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        at = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
        url = "http://far.invalid/v1/chat?v=1" if proxied else f"http://{at}/v1/chat?v=1"
        proxy = f"http://user:word@{at}" if proxied else None
        wire = Wire(url, HEADERS, proxy=proxy, timeout_s=timeout_s)
        try:
            await ask(wire)
        finally:
            await wire.close()
            for writer in open_now:
                writer.transport.abort()
            server.close()
            await server.wait_closed()
            for task in asyncio.all_tasks() - {asyncio.current_task()}:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)

    asyncio.run(main())
    return heard


def answered(raw: bytes, timeout_s: float = 20.0) -> Response:
    """Return what one request makes of a server's bytes."""
    got: list[Response] = []

    async def ask(wire: Wire) -> None:
        got.append(await wire.post(b"x"))

    asked([raw], ask, timeout_s=timeout_s)
    return got[0]


def test_head_and_body_are_those_of_the_official_session() -> None:
    body = b'{"model": "m"}' * 3

    async def ours(wire: Wire) -> None:
        await wire.post(body)

    async def session(wire: Wire) -> None:
        async with (
            aiohttp.ClientSession(cookie_jar=aiohttp.DummyCookieJar()) as made,
            made.post(wire.model.url, data=body, headers=HEADERS) as got,
        ):
            assert await got.read() == BODY

    one, other = (asked([WHOLE], ask).requests[0] for ask in (ours, session))
    head, _, rest = one.partition(b"\r\n\r\n")
    assert rest == body
    assert head.startswith(b"POST /v1/chat?v=1 HTTP/1.1\r\nHost: 127.0.0.1:")
    port_apart = [set(text.split(b"\r\n\r\n")[0].split(b"\r\n")[2:]) for text in (one, other)]
    assert port_apart[0] == port_apart[1]


@pytest.mark.parametrize(
    "raw",
    [
        WHOLE,
        CHUNKS,
        GZIP + PACKED,
        b"HTTP/1.1 200 OK\r\nconnection: close\r\n\r\n" + BODY,
        b"HTTP/1.1 103 Early Hints\r\nlink: </a>\r\n\r\nHTTP/1.1 100 Continue\r\n\r\n" + WHOLE,
    ],
    ids=["length", "chunks", "gzip", "until-the-end", "hints"],
)
def test_a_response_in_each_form(raw: bytes) -> None:
    assert answered(raw)[::2] == (200, BODY)


@pytest.mark.parametrize("status", [204, 307, 400, 429, 500])
def test_every_status_comes_back_as_it_is(status: int) -> None:
    got = answered(b"HTTP/1.1 %d X\r\nlocation: /x\r\ncontent-length: 0\r\n\r\n" % status)
    assert (got.status, got.raw, got.headers["Location"]) == (status, b"", "/x")


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        (b"", "Server disconnected"),
        (HALF, "payload is not completed"),
        (WHOLE.replace(b"200", b"2x0"), "."),
        (CHUNKS.replace(b"5\r\n", b"zz\r\n"), "."),
        (b"HTTP/1.1 200 OK\r\ncontent-encoding: gzip\r\ncontent-length: 8\r\n\r\n" + BODY, "."),
        (b"SSH-2.0-OpenSSH_9.9\r\n", "."),
    ],
    ids=["hung-up", "half", "no-status", "no-chunk", "no-gzip", "no-http"],
)
def test_what_is_no_whole_response_is_cut(raw: bytes, said: str) -> None:
    with pytest.raises(Cut, match=said):
        answered(raw, timeout_s=0.3)


def test_connections_are_kept_and_bad_ones_are_not() -> None:
    async def ask(wire: Wire) -> None:
        for _ in range(3):
            assert (await wire.post(b"x")).raw == BODY
        with pytest.raises(Cut):
            await wire.post(b"x")
        assert (await wire.post(b"x")).raw == BODY
        assert not wire.due_s

    assert asked([WHOLE, WHOLE, WHOLE, HALF, WHOLE], ask).connections == [4, 1]


def test_what_nobody_asked_for_is_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    async def ask(wire: Wire) -> None:
        assert (await wire.post(b"x")).status == 200
        await asyncio.sleep(0.3)  # by then the rest is there
        assert (await wire.post(b"x")).status == 500
        monkeypatch.setattr("bioinstruct.synth.wire.KEPT_S", 0.0)
        assert (await wire.post(b"x")).status == 500

    other = WHOLE.replace(b"200 OK", b"500 No")
    late = b"".join((WHOLE, PAUSE, WHOLE))
    for first in (WHOLE * 2, late):
        assert asked([first, other, other], ask).connections == [1, 1, 1]
        monkeypatch.undo()


def test_many_at_once_take_a_connection_each() -> None:
    async def ask(wire: Wire) -> None:
        got = await asyncio.gather(*(wire.post(b"x" * k) for k in range(20)))
        assert {one.raw for one in got} == {BODY}
        await asyncio.gather(*(wire.post(b"x" * k) for k in range(20)))

    heard = asked([WHOLE] * 40, ask)
    assert len(heard.connections) == 20
    assert sum(heard.connections) == 40


@pytest.mark.parametrize("raw", [b"HTTP/1.1 200 OK\r\n", WHOLE[:-4]], ids=["head", "body"])
def test_late_answers_are_cut_each_in_its_time(raw: bytes) -> None:
    async def ask(wire: Wire) -> None:
        loop = asyncio.get_running_loop()

        async def late(after_s: float) -> float:
            await asyncio.sleep(after_s)
            start_s = loop.time()
            with pytest.raises(Cut, match=r"no answer within 0\.2 s"):
                await wire.post(b"x")
            return loop.time() - start_s

        took_s = await asyncio.gather(late(0.0), late(0.1), late(0.15))
        assert all(s > 0.199 for s in took_s)
        await late(0.0)  # the watch goes on after a pause
        assert not wire.due_s

    asked([raw] * 4, ask, timeout_s=0.2)


def test_a_cancelled_post_leaves_no_connection() -> None:
    async def ask(wire: Wire) -> None:
        task = asyncio.create_task(wire.post(b"x"))
        while not wire.due_s:
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert not wire.due_s
        assert (await wire.post(b"x")).raw == BODY

    assert len(asked([b"HTTP/1.1 200 OK\r\n", WHOLE], ask).connections) == 2


def test_a_proxy_without_a_tunnel_is_told_the_whole_address() -> None:
    async def ask(wire: Wire) -> None:
        for _ in range(2):
            assert (await wire.post(b"xyz")).raw == BODY

    first, second = asked([WHOLE, WHOLE], ask, proxied=True).requests
    assert first == second
    assert first.startswith(
        b"POST http://far.invalid/v1/chat?v=1 HTTP/1.1\r\nHost: far.invalid\r\n"
    )
    assert b"\r\nProxy-Authorization: Basic dXNlcjp3b3Jk\r\n" in first
    assert b"\r\nAuthorization: Bearer sk-1\r\n" in first


def test_nobody_there_is_unsent() -> None:
    async def main() -> None:
        wire = Wire("http://127.0.0.1:1/v1", HEADERS, proxy=None, timeout_s=5.0)
        with pytest.raises(Unsent, match="Cannot connect to host 127.0.0.1:1"):
            await wire.post(b"x")
        await wire.close()

    asyncio.run(main())


def test_a_connection_that_takes_too_long_is_unsent() -> None:
    async def main(port: int) -> None:
        wire = Wire(f"http://127.0.0.1:{port}/v1", HEADERS, proxy=None, timeout_s=0.3)
        with pytest.raises(Unsent, match=r"no connection within 0\.3 s"):
            await wire.post(b"x")
        await wire.close()

    with contextlib.ExitStack() as stack:
        full = stack.enter_context(socket.socket())
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        for _ in range(8):  # nobody takes them, and a full queue lets no more in
            one = stack.enter_context(socket.socket())
            one.setblocking(False)
            one.connect_ex(full.getsockname())
        asyncio.run(main(full.getsockname()[1]))
