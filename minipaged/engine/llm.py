"""The offline API: a list of prompts in, their outputs back in the same order."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Sequenced
from pathlib import Path
from typing import Any, Protocol, cast, runtime_checkable

import numpy as np

from minipaged.engine.builder import EngineOptions, load_engine
from minipaged.engine.engine import Prompt
from minipaged.engine.interrupt import Interrupt
from minipaged.engine.outputs import RequestOutput
from minipaged.errors import InvalidRequestError
from minipaged.request.sampling_params import SamplingParams


@runtime_checkable
class Closing(Protocol):
    """A runner that has something to end."""

    def close(self) -> object: ...


class LLM:
    """A model, its KV cache and a scheduler behind one call.

    model: "tiny" (shipped), "smollm2", a Hugging Face directory, a GGUF file or a hub id.
    The keyword arguments are those of EngineOptions: dtype, block_size, num_blocks,
    max_num_seqs, max_num_batched_tokens, seed and so on.  With tensor_parallel_size=2 a second
    process has half of the model; it ends with `close`, with this object, or with this process.

    >>> llm = LLM(num_blocks=64)
    >>> [output] = llm.generate("ROMEO:", SamplingParams(max_tokens=20))
    """

    def __init__(self, model: str | Path = "tiny", **options: Any) -> None:
        show_messages()
        self.engine = load_engine(model, EngineOptions(**options))
        self._num_requests = 0

    def close(self) -> None:
        """End the other ranks, if there are any; nothing can be generated with them any more."""
        if isinstance(self.engine.runner, Closing):
            self.engine.runner.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def generate(
        self,
        prompts: Prompt | Sequenced[Prompt],
        sampling_params: SamplingParams | Sequenced[SamplingParams] | None = None,
        on_step: Callable[[list[RequestOutput]], None] | None = None,
        priority: Sequenced[int] | None = None,
    ) -> list[RequestOutput]:
        """Serve all prompts together; outputs come back in the order of the prompts.

        prompts: one prompt or many, each a text or a list of token ids.
        sampling_params: one for all, or one for each.
        priority: of each prompt, 0 the most urgent; needs the option policy="priority".
        on_step: called after every iteration with the requests that got a token.
        Raises InvalidRequestError, before anything runs, if one prompt cannot be served.
        """
        prompt_list = _as_list(prompts)
        if sampling_params is None or isinstance(sampling_params, SamplingParams):
            sampling_params = [sampling_params or SamplingParams()] * len(prompt_list)
        if len(sampling_params) != len(prompt_list):
            raise InvalidRequestError(
                f"{len(prompt_list)} prompts came with {len(sampling_params)} sampling parameters; "
                "give one for all or one for each"
            )
        priorities = [0] * len(prompt_list) if priority is None else list(priority)
        if len(priorities) != len(prompt_list):
            raise InvalidRequestError(
                f"{len(prompt_list)} prompts came with {len(priorities)} priorities; give one for "
                "each or none"
            )
        request_ids: list[str] = []
        done: dict[str, RequestOutput] = {}
        try:
            for prompt, params, urgency in zip(
                prompt_list, sampling_params, priorities, strict=True
            ):
                request_id = str(self._num_requests)
                self.engine.add_request(request_id, prompt, params, urgency)
                self._num_requests += 1
                request_ids.append(request_id)
            with Interrupt() as interrupt:  # not within a step, which would be half done
                while self.engine.has_unfinished_requests:
                    outputs = self.engine.step()
                    done.update(
                        (output.request_id, output) for output in outputs if output.finished
                    )
                    if on_step is not None:
                        on_step(outputs)
                    if interrupt.asked:
                        raise KeyboardInterrupt
        finally:  # an error or an interrupt leaves no request behind
            for request_id in request_ids:
                self.engine.abort(request_id)
        return [done[request_id] for request_id in request_ids]

    def chat(
        self,
        messages: list[dict[str, str]] | list[list[dict[str, str]]],
        sampling_params: SamplingParams | None = None,
    ) -> list[RequestOutput]:
        """Answer one conversation, or several; each is a list of {"role": ..., "content": ...}."""
        if not messages:
            raise InvalidRequestError("there is no message; give a conversation at least one")
        conversations = [messages] if isinstance(messages[0], dict) else messages
        tokenizer = self.engine.tokenizer
        if tokenizer is None:
            raise InvalidRequestError("the model has no tokenizer, so it cannot chat")
        prompts = [tokenizer.apply_chat_template(chat) for chat in conversations]
        return self.generate(prompts, sampling_params)


def _as_list(prompts: Prompt | Sequenced[Prompt]) -> list[Prompt]:
    """One prompt, as text or token ids, is a list of one."""
    if isinstance(prompts, (str, bytes)) or not isinstance(prompts, Iterable):
        return [cast(Prompt, prompts)]
    if len(prompts) and isinstance(prompts[0], (int, np.integer)):
        return [cast(Prompt, prompts)]
    return list(cast("Sequenced[Prompt]", prompts))


def show_messages() -> None:
    """Let the package's messages be seen where nobody has set up logging."""
    logger = logging.getLogger("minipaged")
    if not logger.hasHandlers():
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("minipaged: %(message)s"))
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
