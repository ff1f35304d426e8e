"""A connection before and between its requests: who says nothing, and whose bytes are no HTTP."""

from __future__ import annotations

import asyncio
import json

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from minipaged.serving.failures import APIError


class Connection(H11Protocol):
    """A connection as uvicorn has it, but for two things.

    Whoever does not go on with a request within the time for which an idle connection is kept
    loses it.  What cannot be read is refused in the shape that all errors have.
    """

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Somebody is there, and now has to say something."""
        super().connection_made(transport)
        self._wait_for_more()

    def data_received(self, data: bytes) -> None:
        """Something came, of a request or of the body of one that is answered already."""
        super().data_received(data)
        self._wait_for_more()

    def _wait_for_more(self) -> None:
        if self.cycle is None or self.cycle.response_complete:
            self._unset_keepalive_if_required()
            self.timeout_keep_alive_task = self.loop.call_later(
                self.timeout_keep_alive, self.timeout_keep_alive_handler
            )

    def send_400_response(self, msg: str) -> None:
        """Refuse, unless an answer was begun, and close."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            error = APIError(400, "this is no HTTP/1.1 request, or its headers are too long")
            body = json.dumps(error.body()).encode()
            headers = [
                (b"content-type", b"application/json"),
                (b"content-length", b"%d" % len(body)),
                (b"connection", b"close"),
            ]
            response = h11.Response(status_code=400, headers=headers, reason=b"Bad Request")
            for event in (response, h11.Data(data=body), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()
