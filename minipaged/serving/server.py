"""Runs the API on a port, from the first socket to the last request's end.

Owns what lies between the process and the API: the address, the signals, the way out.
"""

from __future__ import annotations

import asyncio
import errno
import math
import os
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import FrameType

import uvicorn

from minipaged.engine.engine import Engine
from minipaged.errors import ConfigurationError
from minipaged.serving.app import create_app
from minipaged.serving.async_engine import AsyncEngine
from minipaged.serving.connection import Connection
from minipaged.serving.gate import LOOPBACK, Gate, Keys
from minipaged.serving.service import Service

LONGEST_GRACE = 24 * 3600
LAST_WORDS = 2  # seconds in which clients may take what aborted requests got


@dataclass(frozen=True, kw_only=True)
class ServerOptions:
    """How to serve.

    model: the name that clients know the model by.
    port: 0 takes a free one.
    api_keys: that are accepted; without any, everybody is.
    isolate_keys: requests of different keys share nothing in the prefix cache.
    max_queued: requests that may wait to run.
    max_body: bytes of a request's body.
    grace: seconds that running requests have to end in when the server shuts down.
    stalled: seconds after which a client that takes nothing of what is sent to it is cut off.
    """

    model: str
    host: str = "127.0.0.1"
    port: int = 8000
    api_keys: Sequence[str] = ()
    isolate_keys: bool = False
    max_queued: int = 256
    max_body: int = 4 * 2**20
    grace: float = 30
    stalled: float = 60

    def __post_init__(self) -> None:
        for name, least, limit in (
            ("port", 0, 65535),
            ("max_queued", 1, math.inf),
            ("max_body", 1, math.inf),
            ("grace", 0, LONGEST_GRACE),
        ):
            value = getattr(self, name)
            if not least <= value <= limit:
                upper = "" if limit == math.inf else f" and at most {limit}"
                raise ConfigurationError(f"{name} is {value}; it must be at least {least}{upper}")
        Keys(self.api_keys, self.isolate_keys)

    @property
    def is_local(self) -> bool:
        """Whether only this machine can reach the server."""
        return self.host in LOOPBACK


def open_socket(options: ServerOptions) -> socket.socket:
    """The address of the server, taken before the model is loaded.

    Raises ConfigurationError if it cannot be had.
    """
    try:
        family, kind, *_, address = socket.getaddrinfo(
            options.host, options.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        sock = socket.socket(family, kind)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # The accepted connections inherit it (where the system can).
        if hasattr(socket, "TCP_USER_TIMEOUT"):
            milliseconds = int(options.stalled * 1000)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, milliseconds)
        sock.bind(address)
        sock.listen()  # a bound port is not yet taken: another program could listen first
    except (OSError, UnicodeError) as error:
        code = getattr(error, "errno", None) or 0
        remedy = "choose another host"
        if code == errno.EADDRINUSE:
            remedy = "another program has it, so choose another port, or 0 for a free one"
        elif code == errno.EACCES:
            remedy = "the system reserves it, so choose a port above 1023"
        raise ConfigurationError(
            f"port {options.port} of {options.host!r} cannot be opened "
            f"({os.strerror(code) if code > 0 else error}); {remedy}"
        ) from error
    return sock


def url_of(sock: socket.socket) -> str:
    """Where the server is found."""
    host, port = sock.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class Server(uvicorn.Server):
    """Serves until a signal comes, and then ends what it has begun.

    It takes no more requests, gives those that run `grace` seconds to end, and aborts the rest,
    which get what there is.  A second signal ends it at once.

    on_start: called when requests are taken.
    """

    def __init__(
        self, engine: Engine, options: ServerOptions, on_start: Callable[[], None] = lambda: None
    ) -> None:
        self._grace = options.grace
        self._on_start = on_start

        async def make_service() -> Service:
            self.engine = AsyncEngine(engine, options.max_queued)
            return Service(
                self.engine,
                options.model,
                engine.tokenizer,
                engine.context_length,
                engine.vocab_size,
            )

        gate = Gate(
            create_app(make_service),
            Keys(options.api_keys, options.isolate_keys),
            (*LOOPBACK, options.host) if options.is_local else None,
            options.max_body,
        )
        super().__init__(
            uvicorn.Config(
                gate,
                loop="asyncio",
                http=Connection,
                log_level="error",
                access_log=False,
                server_header=False,
                timeout_graceful_shutdown=math.ceil(options.grace) + 5,
            )
        )

    @property
    def has_failed(self) -> bool:
        """Whether it ended because the engine did."""
        return self.engine.died.is_set()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Take requests, until the engine fails or a signal comes."""
        await super().startup(sockets)
        if self.started:
            self._watch = asyncio.create_task(self._end_with_engine())
            self._on_start()

    async def _end_with_engine(self) -> None:
        await self.engine.died.wait()
        self.should_exit = True

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal asks to end; the second one insists."""
        self.force_exit = self.should_exit
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Let running requests end, or abort them when their time is over."""
        self.engine.stop_admitting()
        loop = asyncio.get_running_loop()
        loop.call_later(self._grace, self.engine.abort_all)
        loop.call_later(self._grace + LAST_WORDS, self._cut_off)
        await super().shutdown(sockets)
        if self.force_exit:
            await self.lifespan.shutdown()  # in a hurry too, the engine's thread has to end

    def _cut_off(self) -> None:
        """Let go of clients that do not take what is sent to them."""
        for connection in list(self.server_state.connections):
            connection.transport.abort()
