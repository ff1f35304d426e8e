"""The routes of the server: OpenAI's API, health, metrics, and the dashboard."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.types import Receive, Scope, Send

from minipaged.serving import dashboard, failures
from minipaged.serving.failures import APIError
from minipaged.serving.protocol import (
    Chat,
    ChatRequest,
    Completion,
    CompletionRequest,
    ErrorResponse,
    ModelCard,
    ModelList,
)
from minipaged.serving.service import Exchange, Service

CLIENT_CLOSED_REQUEST = 499
REFUSALS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorResponse, "description": text}
    for status, text in (
        (400, "The request is wrong, or can never be served"),
        (401, "The API key is missing or wrong"),
        (403, "The server does not answer for this host"),
        (404, "There is no such model"),
        (408, "The body came too slowly"),
        (413, "The body is too large"),
        (415, "The body is no JSON"),
        (429, "Too many requests wait; Retry-After says when to come back"),
        (500, "The server failed"),
        (503, "The server is shutting down, or its engine has failed"),
        ("4XX", "Any other mistake in the request"),
    )
}
STREAM = {"text/event-stream": {"schema": {"type": "string"}}}
TEXT = {"content": {"text/plain": {"schema": {"type": "string"}}}}


def _refusals(*statuses: int | str) -> dict[int | str, dict[str, Any]]:
    return {status: REFUSALS[status] for status in (*statuses, 403, 500, "4XX")}


def create_app(make_service: Callable[[], Awaitable[Service]]) -> FastAPI:
    """The API around a service that is made in the event loop, when the server starts."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        app.state.service = await make_service()
        yield
        await app.state.service.engine.stop()

    app = FastAPI(
        title="minipaged",
        description="The OpenAI-compatible API of minipaged.",
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    failures.install(app)
    dashboard.add_routes(app)

    def service() -> Service:
        return app.state.service

    @app.get("/health", responses=_refusals(503))
    async def health() -> dict[str, str]:
        """Whether requests are served."""
        if not service().engine.is_serving:
            raise APIError(503, "the server is going down", "unavailable")
        return {"status": "ok"}

    @app.get("/metrics", response_class=Response, responses={**_refusals(401, 503), 200: TEXT})
    async def metrics() -> Response:
        """For Prometheus."""
        state = await service().engine.state()
        return Response(service().metrics.render(state), media_type=CONTENT_TYPE_LATEST)

    @app.get("/v1/models", responses=_refusals(401))
    async def models() -> ModelList:
        """The model that is served."""
        return ModelList(data=[service().card])

    @app.get("/v1/models/{name:path}", responses=_refusals(401, 404))
    async def model(name: str) -> ModelCard:
        """What is known of a model."""
        service().check_model(name)
        return service().card

    answers = {**REFUSALS, 200: {"content": STREAM}}

    @app.post("/v1/completions", response_model=Completion, responses=answers)
    async def completions(body: CompletionRequest, request: Request) -> Response:
        """Complete one prompt or several."""
        return await _answer(request, body.stream, service().complete(body, request.state.salt))

    @app.post("/v1/chat/completions", response_model=Chat, responses=answers)
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        """Answer a conversation."""
        return await _answer(request, body.stream, service().chat(body, request.state.salt))

    return app


async def _answer(request: Request, streams: bool, beginning: Any) -> Response:
    """The whole answer, or a stream of it; when the client goes, its request is aborted."""
    exchange = await _unless_gone(request, beginning)
    if exchange is None:
        return Response(status_code=CLIENT_CLOSED_REQUEST)
    if streams:
        return EventStream(exchange)
    try:
        answer = await _unless_gone(request, exchange.whole())
    finally:
        exchange.end()
    if answer is None:
        return Response(status_code=CLIENT_CLOSED_REQUEST)
    return Response(answer.model_dump_json(), media_type="application/json")


async def _unless_gone(request: Request, work: Any) -> Any:
    """What the work returns; None, and the work cancelled, if the client disconnects before."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else None
    finally:
        for unfinished in (task, gone):
            unfinished.cancel()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


class EventStream(StreamingResponse):
    """An answer as server-sent events; ended with the connection, however that ends."""

    def __init__(self, exchange: Exchange) -> None:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(exchange.events(), headers=headers, media_type="text/event-stream")
        self._exchange = exchange

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._exchange.end()
