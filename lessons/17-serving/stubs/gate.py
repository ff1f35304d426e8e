"""Who and what is let in: the host asked for, the key, and a body of bounded size and time.

An ASGI application in front of the API.  It has the whole body before the API sees the
request, so that a client that sends slowly holds nothing but its own connection.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import secrets
from collections.abc import Iterable

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from minipaged.errors import ConfigurationError
from minipaged.serving.failures import APIError

OPEN_PATHS = ("/", "/health")  # the page is the same for everybody and shows nothing by itself
LOOPBACK = ("localhost", "127.0.0.1", "::1")


class Keys:
    """The keys that are accepted; with none of them everybody is.

    isolate: give every key a salt of its own, so that its requests share nothing with those of
        other keys in the prefix cache.
    """

    def __init__(self, keys: Iterable[str] = (), isolate: bool = False) -> None:
        keys = list(keys)
        if isolate and not keys:
            raise ConfigurationError(
                "--isolate-keys sets the keys apart and there is none; give some with --api-key"
            )
        for number, key in enumerate(keys, 1):
            if not key.isascii() or not key.isprintable() or key != key.strip() or not key:
                raise ConfigurationError(
                    f"API key number {number} of {len(keys)} is empty or has spaces around it or "
                    "signs that no HTTP header carries; use printable ASCII"
                )
        self._digests = [_digest(key.encode()) for key in keys]
        self._salts = [secrets.token_bytes(16) if isolate else b"" for _ in keys]

    def check(self, authorization: str | None) -> bytes:
        """The salt of whoever sent this header.  Raises APIError if the key is not accepted.

        Every key is compared, and in constant time: how long it takes says nothing of them.
        """
        raise NotImplementedError("Task 17.5: Keys.check is still to be written")


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


class Gate:
    """Lets requests through to the application, with `salt` in their state.

    hosts: names under which the server may be asked for; None is any.  A web page that gives
        its own name the address of this machine is kept out by it.
    max_body: bytes of a body.
    body_seconds: that a client may take to send it.
    """

    def __init__(
        self,
        app: ASGIApp,
        keys: Keys,
        hosts: Iterable[str] | None = None,
        max_body: int = 4 * 2**20,
        body_seconds: float = 30,
    ) -> None:
        self.app = app
        self.keys = keys
        self.hosts = None if hosts is None else {host.lower() for host in hosts}
        self.max_body = max_body
        self.body_seconds = body_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        try:
            self._check_host(headers.get("host", ""))
            salt = b""
            if scope["path"] not in OPEN_PATHS:
                salt = self.keys.check(headers.get("authorization"))
            body = b""
            if scope["method"] == "POST":
                body = await self._body(headers, receive)
        except APIError as error:
            await error.response()(scope, receive, send)
            return
        scope.setdefault("state", {})["salt"] = salt
        await self.app(scope, _replay(body, receive), send)

    def _check_host(self, host: str) -> None:
        name = host.lower().rpartition(":")[0] if _has_port(host) else host.lower()
        if self.hosts is not None and name.strip("[]") not in self.hosts:
            raise APIError(
                403,
                f"this server does not answer for host {host!r}; ask for it as 127.0.0.1 or "
                "localhost, or start it with --host",
            )

    async def _body(self, headers: Headers, receive: Receive) -> bytes:
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise APIError(
                415, f"the body is sent as {kind or 'nothing'!r}; send it as application/json"
            )
        too_large = APIError(
            413, f"the body is larger than {self.max_body} bytes; send less at a time"
        )
        length = headers.get("content-length", "0")
        if length.isdecimal() and int(length) > self.max_body:
            raise too_large
        body = bytearray()

        async def read() -> None:
            more = True
            while more:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise APIError(400, "the body ended before its time; send all of it")
                body.extend(message.get("body", b""))
                more = message.get("more_body", False)
                if len(body) > self.max_body:
                    raise too_large

        try:
            await asyncio.wait_for(read(), self.body_seconds)
        except asyncio.TimeoutError:
            raise APIError(
                408,
                f"the body took longer than {self.body_seconds:g} s; send it faster",
                headers={"Connection": "close"},
            ) from None
        return bytes(body)


def _has_port(host: str) -> bool:
    return host.rpartition(":")[2].isdecimal() and (host.count(":") == 1 or "]:" in host)


def _replay(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives a body which was read before, and then what really comes."""
    waiting = [body]

    async def replay() -> Message:
        if waiting:
            return {"type": "http.request", "body": waiting.pop(), "more_body": False}
        return await receive()

    return replay
