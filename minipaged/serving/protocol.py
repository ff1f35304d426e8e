"""What clients send and what they get: OpenAI's completions and chats, with vLLM's extra fields.

Owns the shapes and the limits that a single field can break; what fields mean together is
checked by `SamplingParams`, what a model can serve by the engine.  The served schema is made
from these classes.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    StringConstraints,
    model_serializer,
    model_validator,
)

from minipaged.request.sampling_params import LARGEST_LOGPROBS, SamplingParams

MOST_STOPS = 16
LONGEST_STOP = 128  # characters; the output's last ones are held back for so long
MOST_OUTPUTS = 128  # per prompt
MOST_PROMPTS = 1024

StopString = Annotated[str, StringConstraints(min_length=1, max_length=LONGEST_STOP)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]


def _tell_of_nulls(schema: dict[str, Any], model: type[BaseModel]) -> None:
    """In the served schema, fields that may be left out may be null as well."""
    for name, field in schema["properties"].items():
        null = {"type": "null"}
        if name not in schema.get("required", ()) and null not in field.get("anyOf", ()):
            kept = {key: field.pop(key) for key in ("title", "default") if key in field}
            schema["properties"][name] = {"anyOf": [field, null], **kept}


class _Fields(BaseModel):
    """Unknown fields are refused, and null is as good as leaving a field out."""

    model_config = ConfigDict(extra="forbid", strict=True, json_schema_extra=_tell_of_nulls)

    @model_validator(mode="before")
    @classmethod
    def _select(cls, data: Any) -> Any:
        """Without nulls, and of fields that there are not, one: a body can hold very many."""
        if not isinstance(data, dict):
            return data
        unknown = [name for name in data if name not in cls.model_fields]
        names = [*cls.model_fields, *unknown[:1]]
        return {name: data[name] for name in names if name in data and data[name] is not None}


class StreamOptions(_Fields):
    """include_usage: a last event says how many tokens there were."""

    include_usage: bool = False


class GenerationRequest(_Fields):
    """The fields that completions and chats have in common."""

    model: str | None = None
    n: Annotated[int, Field(ge=1, le=MOST_OUTPUTS)] = 1
    best_of: Annotated[int, Field(ge=1, le=MOST_OUTPUTS)] | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] = 0
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] = 1.0
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    stop: (
        StopString
        | Annotated[list[StopString], Field(fail_fast=True, max_length=MOST_STOPS)]
        | None
    ) = None
    stop_token_ids: Annotated[list[TokenId], Field(fail_fast=True, max_length=64)] | None = None
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    min_tokens: Annotated[int, Field(ge=0, lt=2**31)] = 0
    ignore_eos: bool = False
    use_beam_search: bool = False
    length_penalty: Annotated[float, Field(ge=-10, le=10)] = 1.0
    early_stopping: bool | Literal["never"] = False
    priority: Annotated[int, Field(ge=0, lt=2**31)] = 0
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: Annotated[str, StringConstraints(max_length=512)] | None = None

    @property
    def includes_usage(self) -> bool:
        """Whether a last event of the stream tells the usage."""
        return self.stream_options is not None and self.stream_options.include_usage

    def params(self, max_tokens: int | None, logprobs: int | None) -> SamplingParams:
        """How to draw.  Raises InvalidRequestError if two fields contradict each other."""
        usual = 0.0 if self.use_beam_search else 1.0
        return SamplingParams(
            n=self.n,
            best_of=self.best_of,
            temperature=usual if self.temperature is None else self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            repetition_penalty=self.repetition_penalty,
            seed=self.seed,
            stop=self.stop or (),
            stop_token_ids=self.stop_token_ids or (),
            include_stop_str_in_output=self.include_stop_str_in_output,
            skip_special_tokens=self.skip_special_tokens,
            max_tokens=max_tokens,
            min_tokens=self.min_tokens,
            ignore_eos=self.ignore_eos,
            logprobs=logprobs,
            use_beam_search=self.use_beam_search,
            length_penalty=self.length_penalty,
            early_stopping=self.early_stopping,
        )


MaxTokens = Annotated[int, Field(ge=1, lt=2**31)]
Text = Annotated[str, StringConstraints(min_length=1)]
# Of a list the first mistake is told: it can hold as many of them as a body has room for.
TokenIds = Annotated[list[TokenId], Field(fail_fast=True, min_length=1)]


class CompletionRequest(GenerationRequest):
    """Of POST /v1/completions.  A prompt is a text or token ids; several may be sent at once."""

    prompt: (
        Text
        | TokenIds
        | Annotated[list[Text], Field(fail_fast=True, min_length=1, max_length=MOST_PROMPTS)]
        | Annotated[list[TokenIds], Field(fail_fast=True, min_length=1, max_length=MOST_PROMPTS)]
    )
    max_tokens: MaxTokens | None = 16
    logprobs: Annotated[int, Field(ge=0, le=LARGEST_LOGPROBS)] | None = None

    @property
    def prompts(self) -> list[str | list[int]]:
        """One text or list of token ids for each prompt."""
        if isinstance(self.prompt, str) or isinstance(self.prompt[0], int):
            return [self.prompt]
        return self.prompt  # type: ignore[return-value]


# All texts meet this constraint, but with it half a character ("\ud800"), which no tokenizer
# takes, is refused; a plain str lets it through.
Content = Annotated[str, StringConstraints(min_length=0)]


class TextPart(_Fields):
    """A piece of a message; of the kinds there are, text is the one that is known here."""

    type: Literal["text"]
    text: Content


class Message(_Fields):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Content | Annotated[list[TextPart], Field(fail_fast=True)]
    name: str | None = None

    def plain(self) -> dict[str, str]:
        """As chat templates want it."""
        role = "system" if self.role == "developer" else self.role
        if isinstance(self.content, str):
            return {"role": role, "content": self.content}
        return {"role": role, "content": "".join(part.text for part in self.content)}


class ChatRequest(GenerationRequest):
    """Of POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(fail_fast=True, min_length=1)]
    max_tokens: MaxTokens | None = None
    max_completion_tokens: MaxTokens | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=LARGEST_LOGPROBS)] | None = None


class PromptDetails(BaseModel):
    """cached_tokens: of the prompts, found in the prefix cache."""

    cached_tokens: int


class Usage(BaseModel):
    """Tokens of all prompts and all outputs of a request."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails


FinishReason = Literal["stop", "length", "abort"]


class CompletionLogprobs(BaseModel):
    """Of each token of an output, in the shape of completions."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class CompletionChoice(BaseModel):
    """One output; in a stream, what it grew by."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: FinishReason | None = None


class Completion(BaseModel):
    """The answer to a completion request, or one event of it."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None


class TopLogprob(BaseModel):
    """A token that could have come; bytes are those of its text in UTF-8."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    """A token that came, and the likeliest ones in its place."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    """Of each token of an output, in the shape of chats."""

    content: list[TokenLogprob]


class AnswerMessage(BaseModel):
    """What the model says."""

    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class ChatChoice(BaseModel):
    """One answer."""

    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishReason | None = None


class Chat(BaseModel):
    """The answer to a chat request."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class Delta(BaseModel):
    """What an answer grew by."""

    role: Literal["assistant"] | None = None
    content: str | None = None

    @model_serializer(mode="wrap")
    def _without_nulls(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {name: value for name, value in serialize(self).items() if value is not None}


class ChatDelta(BaseModel):
    """One answer, in a stream."""

    index: int
    delta: Delta
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishReason | None = None


class ChatChunk(BaseModel):
    """One event of a chat."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChatDelta]
    usage: Usage | None = None


class ModelCard(BaseModel):
    """max_model_len: tokens of prompt and output together; vocab_size: token ids it knows."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "minipaged"
    max_model_len: int
    vocab_size: int


class ModelList(BaseModel):
    """Of GET /v1/models."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class ErrorDetail(BaseModel):
    """What is wrong, in a sentence; `code` and `param` where there is more to say."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorResponse(BaseModel):
    """Every error has this shape."""

    error: ErrorDetail
