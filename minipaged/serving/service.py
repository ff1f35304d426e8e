"""What becomes of a request once it was let in: prompts to tokens, tokens to an answer.

Everything between the HTTP routes, which know no engine, and the engine, which knows no HTTP.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from typing import Protocol

from pydantic import BaseModel

from minipaged.engine.outputs import RequestOutput
from minipaged.errors import InvalidRequestError, MinipagedError
from minipaged.models.tokenizer import Tokenizer
from minipaged.request.sampling_params import SamplingParams
from minipaged.request.sequence import RequestId
from minipaged.serving.answers import Answer, ChatAnswer, CompletionAnswer, Growth, usage
from minipaged.serving.async_engine import Observer
from minipaged.serving.failures import APIError, to_api_error
from minipaged.serving.metrics import Metrics
from minipaged.serving.protocol import (
    ChatRequest,
    CompletionRequest,
    ErrorResponse,
    GenerationRequest,
    ModelCard,
)
from minipaged.serving.state import EngineState
from minipaged.serving.stream import NewRequest, Stream


class Engines(Protocol):
    """What serves requests: an AsyncEngine, or several of them elsewhere."""

    observers: list[Observer]

    @property
    def is_serving(self) -> bool:
        """Whether new requests are taken."""

    async def add(self, requests: Sequence[NewRequest]) -> Stream:
        """Queue requests, all or none; returns when they are accepted."""

    def abort(self, stream: Stream) -> None:
        """End the requests of a stream; those that ended before are left alone."""

    async def state(self) -> EngineState:
        """How the engines stand."""

    async def stop(self) -> None:
        """End all requests."""


class Service:
    """One served model.

    model: the name that clients know it by.
    """

    def __init__(
        self,
        engine: Engines,
        model: str,
        tokenizer: Tokenizer | None,
        context_length: int,
        vocab_size: int,
    ) -> None:
        self.engine = engine
        self.tokenizer = tokenizer
        self.card = ModelCard(
            id=model,
            created=int(time.time()),
            max_model_len=context_length,
            vocab_size=vocab_size,
        )
        self.metrics = Metrics()
        engine.observers.append(self.metrics.observe)

    async def complete(self, request: CompletionRequest, salt: bytes) -> Exchange:
        """Queue the prompts of a completion request."""
        params = request.params(request.max_tokens, request.logprobs)
        prompts = [await self._tokens(prompt) for prompt in request.prompts]
        answer_id = f"cmpl-{secrets.token_hex(12)}"
        answer = CompletionAnswer(answer_id, self.card.id, params.n, self.tokenizer)
        return await self._begin(request, params, prompts, answer_id, answer, salt)

    async def chat(self, request: ChatRequest, salt: bytes) -> Exchange:
        """Queue the conversation of a chat request."""
        num_top = request.top_logprobs or 0
        if num_top and not request.logprobs:
            raise APIError(
                400,
                f"top_logprobs is {num_top} and logprobs is false; set it or leave both out",
                param="top_logprobs",
            )
        max_tokens = request.max_completion_tokens or request.max_tokens
        params = request.params(max_tokens, num_top if request.logprobs else None)
        if self.tokenizer is None:
            raise InvalidRequestError(
                f"{self.card.id} has no tokenizer, so it cannot chat; use /v1/completions"
            )
        messages = [message.plain() for message in request.messages]
        prompt = await asyncio.to_thread(self.tokenizer.apply_chat_template, messages)
        answer_id = f"chatcmpl-{secrets.token_hex(12)}"
        answer = ChatAnswer(answer_id, self.card.id, params.n, self.tokenizer, num_top)
        return await self._begin(request, params, [prompt], answer_id, answer, salt)

    async def _tokens(self, prompt: str | list[int]) -> list[int]:
        """Token ids; a long text is cut into tokens beside the event loop."""
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise InvalidRequestError(
                    f"{self.card.id} has no tokenizer; send the prompt as token ids"
                )
            return await asyncio.to_thread(self.tokenizer.encode, prompt)
        return prompt

    async def _begin(
        self,
        request: GenerationRequest,
        params: SamplingParams,
        prompts: list[list[int]],
        answer_id: RequestId,
        answer: Answer,
        salt: bytes,
    ) -> Exchange:
        self.check_model(request.model)
        if request.stream and params.is_ranked:
            raise APIError(
                400,
                f"the best {params.n} of {params.width} outputs are known when all have ended, so "
                "they cannot be streamed; set stream to false",
                param="stream",
            )
        new = [
            NewRequest(f"{answer_id}-{i}", prompt, params, request.priority, salt)
            for i, prompt in enumerate(prompts)
        ]
        try:
            stream = await self.engine.add(new)
        except (APIError, MinipagedError) as error:
            is_full = to_api_error(error).code == "queue_full"
            self.metrics.refused("queue_full" if is_full else "refused")
            raise
        return Exchange(self.engine, stream, answer, params.n, request.includes_usage)

    def check_model(self, name: str | None) -> None:
        """Raises APIError if this is not the name of the served model."""
        if name is not None and name != self.card.id:
            raise APIError(
                404,
                f"there is no model {name[:100]!r} here; this server has {self.card.id!r}",
                "model_not_found",
                "model",
            )


class Exchange:
    """An accepted request and the answer that it will get."""

    def __init__(
        self,
        engine: Engines,
        stream: Stream,
        answer: Answer,
        n: int,
        includes_usage: bool,
    ) -> None:
        self._engine = engine
        self._stream = stream
        self._answer = answer
        self._n = n
        self._includes_usage = includes_usage

    async def whole(self) -> BaseModel:
        """The answer, when it is complete."""
        return self._answer.whole(await self._stream.finished())

    async def events(self) -> AsyncIterator[str]:
        """The answer as server-sent events; an error on the way is the last but one of them."""
        growth = Growth(self._stream.request_ids, self._n)
        done: list[RequestOutput] = []
        try:
            for event in self._answer.opening():
                yield _event(event)
            async for output in self._stream.outputs():
                for piece in growth.pieces(output):
                    yield _event(self._answer.grown(piece))
                if output.finished:
                    done.append(output)
            if self._includes_usage:
                yield _event(self._answer.closing(usage(done)))
        except MinipagedError as error:
            yield _event(ErrorResponse.model_validate(to_api_error(error).body()))
        yield "data: [DONE]\n\n"

    def end(self) -> None:
        """Abort what is not finished: nobody waits for it any more."""
        self._engine.abort(self._stream)


def _event(content: BaseModel) -> str:
    return f"data: {content.model_dump_json()}\n\n"
