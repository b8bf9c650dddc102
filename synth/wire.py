"""Many posts to one address: aiohttp's connections and response parser, without its session.

A session prepares each request anew for cookies, redirects, tracing and bodies of any kind, hands
the body to a task of its own and sets a timer; that is over half of what a request costs. Requests
to a chat endpoint differ in their bodies alone, so here the head is written once, head and body go
out in one write, a connection keeps its parser, and one timer watches all answers: they may all
take equally long, so the oldest is due first. Connections are made by aiohttp's connector (proxies,
TLS, names), and responses are read by its parser (chunks, compression, what is too long).
"""

import asyncio
from collections.abc import Mapping
from typing import NamedTuple

import aiohttp
from aiohttp.http import HttpProcessingError
from yarl import URL

KEPT_S = 15.0  # how long a connection may wait for its next post; servers close theirs sometime


class Response(NamedTuple):
    """A whole response."""

    status: int
    headers: Mapping[str, str]
    raw: bytes


class Cut(Exception):
    """A request was sent, and no whole response came."""


class Unsent(Exception):
    """No connection was made, so nothing was sent."""


class Wire:
    """Connections to one address; as many as there are posts at a time.

    Args:
        url: where every post goes.
        headers: of every post.
        proxy: the address of an HTTP proxy, or None.
        timeout_s: how long a connection may take, and then its answer.
    """

    def __init__(
        self, url: str, headers: Mapping[str, str], *, proxy: str | None, timeout_s: float
    ) -> None:
        self.connector = aiohttp.TCPConnector(limit=0)
        # never sent: it tells the connector where to, and fills in what every head has
        self.model = aiohttp.ClientRequest(
            "POST", URL(url), headers=headers, proxy=URL(proxy) if proxy else None
        )
        self.head, self.timeout_s = b"", timeout_s
        self.connect_timeout = aiohttp.ClientTimeout(connect=timeout_s)
        self.loop = asyncio.get_running_loop()
        self.due_s: dict[asyncio.Transport, float] = {}
        """When the answer on a connection is late, the oldest first."""
        self.watch: asyncio.TimerHandle | None = None
        self.kept: list[tuple[aiohttp.connector.Connection, float]] = []
        """Connections that wait for a post, and since when."""

    async def close(self) -> None:
        """Close all connections."""
        if self.watch:
            self.watch.cancel()
        for connection, _ in self.kept:
            connection.close()
        await self.connector.close()

    async def post(self, body: bytes) -> Response:
        """Send a body and return what comes back, whatever its status.

        Raises:
            Unsent: no connection could be made.
            Cut: the connection broke, the answer is late, or what came is no HTTP.
        """
        connection = self._kept() or await self._made()
        protocol, transport = connection.protocol, connection.transport
        if protocol is None or transport is None or transport.is_closing():
            connection.close()
            raise Cut("the connection was closed as soon as it was made")
        self._watch(transport)
        keep = False
        try:
            transport.write(b"%b%d\r\n\r\n%b" % (self.head, len(body), body))
            message, content = await protocol.read()
            while message.code < 200 and message.code != 101:  # a hint of what comes
                message, content = await protocol.read()
            raw = await content.read()
            keep = not protocol.should_close
            return Response(message.code, message.headers, raw)
        except (aiohttp.ClientError, HttpProcessingError, OSError) as error:
            late = self.due_s[transport] <= self.loop.time()
            said = f"no answer within {self.timeout_s:g} s" if late else str(error)
            raise Cut(said or type(error).__name__) from error
        finally:
            del self.due_s[transport]
            if keep:
                self.kept.append((connection, self.loop.time()))
            else:
                connection.close()

    def _kept(self) -> aiohttp.connector.Connection | None:
        """Return a connection that answered before and is still open, the last one used first."""
        while self.kept:
            connection, since_s = self.kept.pop()
            protocol = connection.protocol
            # what came meanwhile, asked for by nobody, would be taken for the next answer
            clean = protocol is not None and protocol.is_connected() and not protocol.should_close
            if clean and self.loop.time() - since_s < KEPT_S:
                return connection
            connection.close()
        return None

    async def _made(self) -> aiohttp.connector.Connection:
        try:
            made = await self.connector.connect(self.model, [], self.connect_timeout)
        except TimeoutError as error:
            raise Unsent(f"no connection within {self.timeout_s:g} s") from error
        except (aiohttp.ClientError, OSError) as error:
            raise Unsent(_why(error)) from error
        self.head = self.head or self._head()
        if made.protocol is not None:
            made.protocol.set_response_params(read_until_eof=True)
        return made

    def _watch(self, transport: asyncio.Transport) -> None:
        self.due_s[transport] = due_s = self.loop.time() + self.timeout_s
        if self.watch is None:
            self.watch = self.loop.call_at(due_s, self._abort_late)

    def _abort_late(self) -> None:
        """Break the connections whose answer is late, and come back when the next one is."""
        self.watch = None
        for transport, due_s in self.due_s.items():
            if due_s > self.loop.time():
                self.watch = self.loop.call_at(due_s, self._abort_late)
                return
            transport.abort()

    def _head(self) -> bytes:
        """Return what stands before a body's length; known once the connector met the proxy."""
        model = self.model
        whole = model.proxy and not model.is_ssl()  # a proxy that opens no tunnel is told all of it
        lines = [f"POST {model.url if whole else model.url.raw_path_qs} HTTP/1.1"]
        lines += [f"{k}: {v}" for k, v in model.headers.items() if k.lower() != "content-length"]
        return "\r\n".join([*lines, "Content-Length: "]).encode()


def _why(error: Exception) -> str:
    """Return why a connection could not be made."""
    said = str(error) or type(error).__name__
    if isinstance(error, aiohttp.ClientConnectorCertificateError):
        return f"{said}; SSL_CERT_FILE names the file of a private authority"
    if isinstance(error, aiohttp.ClientConnectorError) and error.strerror is None:
        return f"{error.host}:{error.port}: {error.os_error}"  # a handshake that leads to nothing
    return said
