"""An endpoint whose behaviour is known exactly, and which records what it did and when.

It measures the load client: whatever the machine's speed, the client has to find the delays that
this server says it had.
"""

import asyncio
import contextlib
import json
import threading
import time
from dataclasses import dataclass, field

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse


@dataclass
class Served:
    """One request; times by time.perf_counter."""

    body: dict
    arrived: float
    started: float = 0.0
    tokens: list[float] = field(default_factory=list)
    ended: float = 0.0
    refused: bool = False


@dataclass
class FakeServer:
    """`with FakeServer(...) as server:` serves at server.url until the end of the block.

    one_at_a_time: the others queue, first come, first served.
    most: requests under way, above which others are refused with 429.
    per_chunk: tokens that come at once.
    text: of each token, sent as it is and not escaped.
    fault: "silent", "cut", "no usage", "error", "garbage" or "no text", for every request whose
        number is a multiple of `every`, from `every` on.
    """

    first_token: float = 0.01
    per_token: float = 0.002
    one_at_a_time: bool = False
    most: int = 10**9
    per_chunk: int = 1
    text: str = "x"
    fault: str = ""
    every: int = 1
    key: str = ""
    about: dict = field(default_factory=lambda: {"max_model_len": 64, "vocab_size": 50})
    served: list[Served] = field(default_factory=list)
    under_way: int = 0
    peak: int = 0

    def __enter__(self):
        config = uvicorn.Config(self._app(), port=0, log_level="critical", lifespan="off")
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, daemon=True)
        self._thread.start()
        while not self._server.started:
            assert self._thread.is_alive()
            time.sleep(0.005)
        port = self._server.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        return self

    def __exit__(self, *_):
        self._server.should_exit = self._server.force_exit = True
        self._thread.join(20)
        assert not self._thread.is_alive()

    def _app(self):
        app = FastAPI()
        lock = asyncio.Lock() if self.one_at_a_time else contextlib.nullcontext()

        @app.get("/v1/models")
        async def models(request: Request):
            if self.key and request.headers.get("authorization") != f"Bearer {self.key}":
                return JSONResponse({"error": {"message": "wrong key"}}, 401)
            return {"data": [{"id": "fake", **self.about}, {"id": "other"}]}

        @app.post("/v1/completions")
        async def completions(request: Request):
            served = Served(await request.json(), time.perf_counter())
            self.served.append(served)
            if self.under_way >= self.most:
                served.refused = True
                return JSONResponse({"error": {"message": "come back later"}}, 429)
            self.under_way += 1
            self.peak = max(self.peak, self.under_way)
            fault = self.fault if len(self.served) % self.every == 0 else ""
            return StreamingResponse(
                self._stream(served, lock, fault), media_type="text/event-stream"
            )

        return app

    async def _stream(self, served, lock, fault):
        try:
            async with lock:
                served.started = time.perf_counter()
                await asyncio.sleep(self.first_token)
                if fault == "silent":
                    await asyncio.sleep(3600)
                left = served.body["max_tokens"]
                while left:
                    count = min(self.per_chunk, left)
                    left -= count
                    served.tokens += [time.perf_counter()] * count
                    text = "" if fault == "no text" else self.text * count
                    choice = {"text": text, "finish_reason": None if left else "length"}
                    yield event({"choices": [choice], "usage": None})
                    if fault == "cut":
                        raise RuntimeError("the connection is cut")
                    if left:
                        await asyncio.sleep(self.per_token * count)
                served.ended = time.perf_counter()
            if fault == "error":
                yield event({"error": {"message": "the engine failed"}})
            elif fault == "garbage":
                yield "data: {what\n\n"
            elif fault != "no usage":
                prompt = served.body["prompt"]
                words = prompt.split() if isinstance(prompt, str) else prompt
                counts = {"completion_tokens": len(served.tokens), "prompt_tokens": len(words)}
                yield event({"choices": [], "usage": counts})
            yield "data: [DONE]\n\n"
        finally:
            self.under_way -= 1


def event(content):
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"
