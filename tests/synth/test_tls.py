"""HTTPS with a private authority, through a proxy that opens tunnels: real sockets and handshakes.

`tls/ca.pem` is an authority made for these tests (its key was thrown away), `tls/server.pem` the
key and certificate of api.private.test; both are good until 2126 and protect nothing.
"""

import asyncio
import contextlib
import os
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from bioinstruct.synth.totals import read_totals

TLS = Path(__file__).parent / "tls"
HOST = "api.private.test"
PROXIES = ("HTTPS_PROXY", "HTTP_PROXY", "ALL_PROXY", "NO_PROXY")


class Proxy:
    """Opens tunnels to this machine, whatever host is asked for."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.answer = b"HTTP/1.1 200 Connection established\r\n\r\n"
        self.port = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            self.asked.append(head.split(" ")[1])
            writer.write(self.answer)
            if b" 200 " in self.answer:
                port = int(self.asked[-1].rpartition(":")[2])
                there, back = await asyncio.open_connection("127.0.0.1", port)
                await asyncio.gather(pipe(reader, back), pipe(there, writer))
        writer.close()


async def pipe(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(ConnectionError):
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
    writer.close()


@pytest.fixture
def proxy() -> Iterator[Proxy]:
    made, loop, ready = Proxy(), asyncio.new_event_loop(), threading.Event()

    async def start() -> None:
        listening = await asyncio.start_server(made.serve, "127.0.0.1", 0)
        made.port = listening.sockets[0].getsockname()[1]
        ready.set()
        with contextlib.suppress(asyncio.CancelledError):
            await listening.serve_forever()

    task = loop.create_task(start())
    thread = threading.Thread(target=loop.run_until_complete, args=(task,))
    thread.start()
    assert ready.wait(10)
    yield made
    loop.call_soon_threadsafe(task.cancel)
    thread.join()
    for left in asyncio.all_tasks(loop):
        left.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            loop.run_until_complete(left)
    loop.close()


@pytest.fixture
def server(server_module: ModuleType) -> Iterator[Any]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(TLS / "server.pem")
    with server_module.running(server_module.Behaviour(key="sk-12345678"), context) as running:
        yield running


def run(server: Any, out: Path, name: str = "generate", **environment: str) -> tuple[int, str]:
    """Run a command in a process of its own; return its exit code and what it says."""
    args = [name, "--out", out, "--n", 20, "--model", "local", "--budget", "none"]
    args += ["--base-url", f"https://{HOST}:{server.port}/v1", "--price-in", 1, "--price-out", 2]
    args += ["--batch-factor", 0.5, *(["--poll", 0.05] if name == "batch" else [])]
    clean = {k: v for k, v in os.environ.items() if k.upper() not in PROXIES}
    done = subprocess.run(
        [sys.executable, "-m", "bioinstruct.synth.cli", *map(str, args)],
        env=clean | {"OPENAI_API_KEY": "sk-12345678"} | environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    return done.returncode, done.stderr


@pytest.mark.parametrize("name", ["generate", "batch"])
def test_a_proxy_and_a_private_authority(
    server: Any, proxy: Proxy, tmp_path: Path, name: str
) -> None:
    netrc = tmp_path / "netrc"  # its password is not for us
    netrc.write_text(f"machine {HOST} login me password secret\n")
    code, said = run(
        server,
        tmp_path / "run",
        name,
        NETRC=str(netrc),
        HTTPS_PROXY=f"http://127.0.0.1:{proxy.port}",
        SSL_CERT_FILE=str(TLS / "ca.pem"),
    )
    assert code == 0, said
    assert "20 records in" in said
    assert set(proxy.asked) == {f"{HOST}:{server.port}"}


def test_an_unknown_authority_is_refused_for_nothing(
    server: Any, proxy: Proxy, tmp_path: Path
) -> None:
    code, said = run(server, tmp_path, HTTPS_PROXY=f"http://127.0.0.1:{proxy.port}")
    assert code == 1
    assert f"error: cannot reach https://{HOST}" in said
    assert "certificate verify failed" in said
    assert "SSL_CERT_FILE" in said
    assert server.seen == []
    assert read_totals(tmp_path / "journal.jsonl").spent == 0


def test_a_proxy_that_refuses(server: Any, proxy: Proxy, tmp_path: Path) -> None:
    proxy.answer = b"HTTP/1.1 407 Proxy Authentication Required\r\ncontent-length: 0\r\n\r\n"
    code, said = run(server, tmp_path, HTTPS_PROXY=f"http://127.0.0.1:{proxy.port}")
    assert code == 1
    assert "Proxy Authentication Required" in said
    assert read_totals(tmp_path / "journal.jsonl").spent == 0


def test_a_proxy_that_is_not_there(server: Any, tmp_path: Path) -> None:
    code, said = run(server, tmp_path, HTTPS_PROXY="http://127.0.0.1:1")
    assert (code, "cannot reach" in said) == (1, True), said
    assert read_totals(tmp_path / "journal.jsonl").spent == 0


def test_this_machine_is_asked_without_a_proxy(
    server_module: ModuleType, proxy: Proxy, tmp_path: Path
) -> None:
    with server_module.running() as plain:
        args = ["generate", "--out", tmp_path, "--n", 10, "--model", "local", "--price-in", 0]
        args += ["--price-out", 0, "--base-url", plain.url]
        done = subprocess.run(
            [sys.executable, "-m", "bioinstruct.synth.cli", *map(str, args)],
            env=os.environ | {"HTTP_PROXY": f"http://127.0.0.1:{proxy.port}"},
            capture_output=True,
            text=True,
            timeout=60,
        )
    assert done.returncode == 0, done.stderr
    assert proxy.asked == []


@pytest.mark.parametrize(
    "proxy_url", ["nothing", "socks5://127.0.0.1:1", "http://127.0.0.1:99999", "http://me:sesame@"]
)
def test_a_proxy_that_is_no_address(server: Any, tmp_path: Path, proxy_url: str) -> None:
    code, said = run(server, tmp_path, HTTPS_PROXY=proxy_url)
    assert code == 1
    assert "error: HTTPS_PROXY must be like http://host:3128" in said
    assert "sesame" not in said


def test_an_authority_that_is_no_file(server: Any, tmp_path: Path) -> None:
    code, said = run(server, tmp_path, SSL_CERT_FILE=str(tmp_path / "none.pem"))
    assert code == 1
    assert f"error: SSL_CERT_FILE names no file ({tmp_path / 'none.pem'}); correct or" in said
