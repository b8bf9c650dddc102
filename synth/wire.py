"""Many posts to one address: aiohttp's connections and response parser, without its session.

A session prepares each request anew for cookies, redirects, tracing and bodies of any kind, and
hands the body to a task of its own; that is over half of what a request costs. Requests to a chat
endpoint differ in their bodies alone, so here the head is written once, and head and body go out in
one write. Connections are those of aiohttp's connector (proxies, TLS, names, what is kept open),
and responses are read by its parser (chunks, compression, what is too long).
"""

from collections.abc import Mapping
from typing import NamedTuple

import aiohttp
from aiohttp.http import HttpProcessingError
from yarl import URL


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
    """

    def __init__(self, url: str, headers: Mapping[str, str], proxy: str | None) -> None:
        self.connector = aiohttp.TCPConnector(limit=0)
        # never sent: it tells the connector where to, and fills in what every head has
        self.model = aiohttp.ClientRequest(
            "POST", URL(url), headers=headers, proxy=URL(proxy) if proxy else None
        )
        self.timeout, self.head = aiohttp.ClientTimeout(), b""

    async def close(self) -> None:
        """Close all connections."""
        await self.connector.close()

    async def post(self, body: bytes) -> Response:
        """Send a body and return what comes back, whatever its status.

        Raises:
            Unsent: no connection could be made.
            Cut: the connection broke, or what came is no HTTP.
        """
        connection = await self._connection()
        try:
            protocol, transport = connection.protocol, connection.transport
            if protocol is None or transport is None or transport.is_closing():
                raise aiohttp.ServerDisconnectedError
            protocol.set_response_params(read_until_eof=True)
            transport.write(b"%b%d\r\n\r\n%b" % (self.head, len(body), body))
            message, content = await protocol.read()
            while message.code < 200 and message.code != 101:  # such as 103, a hint of what comes
                message, content = await protocol.read()
            raw = await content.read()
        except BaseException as error:
            connection.close()
            if isinstance(error, aiohttp.ClientError | HttpProcessingError | OSError):
                raise Cut(str(error) or type(error).__name__) from error
            raise
        connection.release()
        return Response(message.code, message.headers, raw)

    async def _connection(self) -> aiohttp.connector.Connection:
        try:
            made = await self.connector.connect(self.model, [], self.timeout)
        except (aiohttp.ClientError, OSError) as error:
            private = isinstance(error, aiohttp.ClientConnectorCertificateError)
            how = "; SSL_CERT_FILE names the file of a private authority" if private else ""
            raise Unsent(f"{error or type(error).__name__}{how}") from error
        self.head = self.head or self._head()
        return made

    def _head(self) -> bytes:
        """Return what stands before a body's length; known once the connector met the proxy."""
        model = self.model
        whole = model.proxy and not model.is_ssl()  # a proxy that opens no tunnel is told all of it
        lines = [f"POST {model.url if whole else model.url.raw_path_qs} HTTP/1.1"]
        lines += [f"{k}: {v}" for k, v in model.headers.items() if k.lower() != "content-length"]
        return "\r\n".join([*lines, "Content-Length: "]).encode()
