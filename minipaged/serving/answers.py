"""From the engine's outputs to OpenAI's answers: whole, or as the events of a stream.

A completion and a chat differ in their shapes only; each is a class here with the same two
methods.  Nothing here waits or sends.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import Protocol

from pydantic import BaseModel

from minipaged.decoding.sampler import Logprob
from minipaged.engine.outputs import CompletionOutput, RequestOutput
from minipaged.models.tokenizer import Tokenizer
from minipaged.request.sequence import RequestId
from minipaged.serving import protocol


class Answer(Protocol):
    """What a request is answered with.

    Outputs of request i of several have the numbers i n to i n + n - 1.
    """

    def whole(self, outputs: list[RequestOutput]) -> BaseModel:
        """All at once."""

    def opening(self) -> Iterator[BaseModel]:
        """The events that come before any token."""

    def grown(self, piece: Piece) -> BaseModel:
        """The event of an output that has grown."""

    def closing(self, usage: protocol.Usage) -> BaseModel:
        """The event that tells the usage."""


class Piece:
    """What an output grew by since the last event, and the logprobs of those tokens."""

    def __init__(self, index: int, output: CompletionOutput, num_chars: int, num_tokens: int):
        self.index = index
        self.text = output.text[num_chars:]
        self.token_ids = output.token_ids[num_tokens:]
        self.logprobs = None if output.logprobs is None else output.logprobs[num_tokens:]
        self.finish_reason = output.finish_reason

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to tell: the text of its tokens is held back."""
        return not self.text and self.finish_reason is None


class Growth:
    """Remembers how much of every output was told already."""

    def __init__(self, request_ids: list[RequestId], n: int) -> None:
        self._first_index = {request_id: i * n for i, request_id in enumerate(request_ids)}
        self._told: dict[int, tuple[int, int]] = {}

    def pieces(self, output: RequestOutput) -> Iterator[Piece]:
        """What is new in a request's outputs; those that have ended are told once."""
        for completion in output.outputs:
            index = self._first_index[output.request_id] + completion.index
            told = self._told.get(index, (0, 0))
            if told == (-1, -1):
                continue
            piece = Piece(index, completion, *told)
            if piece.is_empty:
                continue
            ended = completion.finish_reason is not None
            now = (len(completion.text), len(completion.token_ids))
            self._told[index] = (-1, -1) if ended else now
            yield piece


def usage(outputs: Iterable[RequestOutput]) -> protocol.Usage:
    """Tokens of all prompts and outputs."""
    outputs = list(outputs)
    prompt = sum(len(output.prompt_token_ids) for output in outputs)
    completion = sum(len(c.token_ids) for output in outputs for c in output.outputs)
    cached = sum(output.num_cached_tokens for output in outputs)
    return protocol.Usage(
        prompt_tokens=prompt,
        completion_tokens=completion,
        total_tokens=prompt + completion,
        prompt_tokens_details=protocol.PromptDetails(cached_tokens=cached),
    )


def _all_pieces(outputs: list[RequestOutput], n: int) -> list[Piece]:
    growth = Growth([output.request_id for output in outputs], n)
    return [piece for output in outputs for piece in growth.pieces(output)]


class CompletionAnswer:
    """To a completion request.  Its `id` is that of the answer, and no request's."""

    def __init__(self, answer_id: str, model: str, n: int, tokenizer: Tokenizer | None) -> None:
        self.id, self.model, self.n, self.tokenizer = answer_id, model, n, tokenizer
        self.created = int(time.time())
        self._offsets: dict[int, int] = {}  # of each output, where the tokens told so far end

    def whole(self, outputs: list[RequestOutput]) -> protocol.Completion:
        return self._event(
            [self._choice(piece) for piece in _all_pieces(outputs, self.n)], usage(outputs)
        )

    def opening(self) -> Iterator[BaseModel]:
        return iter(())

    def grown(self, piece: Piece) -> protocol.Completion:
        return self._event([self._choice(piece)])

    def closing(self, usage: protocol.Usage) -> protocol.Completion:
        return self._event([], usage)

    def _event(
        self, choices: list[protocol.CompletionChoice], usage: protocol.Usage | None = None
    ) -> protocol.Completion:
        return protocol.Completion(
            id=self.id, created=self.created, model=self.model, choices=choices, usage=usage
        )

    def _choice(self, piece: Piece) -> protocol.CompletionChoice:
        return protocol.CompletionChoice(
            index=piece.index,
            text=piece.text,
            logprobs=self._logprobs(piece),
            finish_reason=piece.finish_reason,
        )

    def _logprobs(self, piece: Piece) -> protocol.CompletionLogprobs | None:
        if piece.logprobs is None:
            return None
        tokens = [token_text(self.tokenizer, token_id) for token_id in piece.token_ids]
        # Not the length of the text told so far: held back, it may come later than its tokens.
        offsets, offset = [], self._offsets.get(piece.index, 0)
        for text in tokens:
            offsets.append(offset)
            offset += len(text)
        self._offsets[piece.index] = offset
        return protocol.CompletionLogprobs(
            tokens=tokens,
            token_logprobs=[
                _logprob(of_step[token_id])
                for of_step, token_id in zip(piece.logprobs, piece.token_ids, strict=True)
            ],
            top_logprobs=[
                {token_text(self.tokenizer, i): _logprob(entry) for i, entry in of_step.items()}
                for of_step in piece.logprobs
            ],
            text_offset=offsets,
        )


class ChatAnswer:
    """To a chat request."""

    def __init__(
        self, answer_id: str, model: str, n: int, tokenizer: Tokenizer | None, num_top: int
    ) -> None:
        self.id, self.model, self.n, self.tokenizer = answer_id, model, n, tokenizer
        self.num_top = num_top
        self.created = int(time.time())

    def whole(self, outputs: list[RequestOutput]) -> protocol.Chat:
        choices = [
            protocol.ChatChoice(
                index=piece.index,
                message=protocol.AnswerMessage(content=piece.text),
                logprobs=self._logprobs(piece),
                finish_reason=piece.finish_reason,
            )
            for piece in _all_pieces(outputs, self.n)
        ]
        return protocol.Chat(
            id=self.id,
            created=self.created,
            model=self.model,
            choices=choices,
            usage=usage(outputs),
        )

    def opening(self) -> Iterator[protocol.ChatChunk]:
        for index in range(self.n):
            delta = protocol.Delta(role="assistant", content="")
            yield self._event([protocol.ChatDelta(index=index, delta=delta)])

    def grown(self, piece: Piece) -> protocol.ChatChunk:
        delta = protocol.ChatDelta(
            index=piece.index,
            delta=protocol.Delta(content=piece.text),
            logprobs=self._logprobs(piece),
            finish_reason=piece.finish_reason,
        )
        return self._event([delta])

    def closing(self, usage: protocol.Usage) -> protocol.ChatChunk:
        return self._event([], usage)

    def _event(
        self, choices: list[protocol.ChatDelta], usage: protocol.Usage | None = None
    ) -> protocol.ChatChunk:
        return protocol.ChatChunk(
            id=self.id, created=self.created, model=self.model, choices=choices, usage=usage
        )

    def _logprobs(self, piece: Piece) -> protocol.ChatLogprobs | None:
        if piece.logprobs is None:
            return None
        content = []
        for token_id, of_step in zip(piece.token_ids, piece.logprobs, strict=True):
            likeliest = sorted(of_step.items(), key=lambda item: item[1].rank)[: self.num_top]
            content.append(
                protocol.TokenLogprob(
                    **self._entry(token_id, of_step[token_id]),
                    top_logprobs=[protocol.TopLogprob(**self._entry(*item)) for item in likeliest],
                )
            )
        return protocol.ChatLogprobs(content=content)

    def _entry(self, token_id: int, entry: Logprob) -> dict:
        text = token_text(self.tokenizer, token_id)
        return {"token": text, "logprob": _logprob(entry), "bytes": list(text.encode())}


def _logprob(entry: Logprob) -> float:
    """JSON has no infinity; this number stands for it in OpenAI's answers too."""
    return max(entry.logprob, -9999.0)


def token_text(tokenizer: Tokenizer | None, token_id: int) -> str:
    """One token as text; its number, where there is no tokenizer."""
    if tokenizer is None:
        return f"token_id:{token_id}"
    return tokenizer.decode([token_id], skip_special_tokens=False)
