"""The fields of requests: those of OpenAI's that one small model on a CPU can honour.

https://platform.openai.com/docs/api-reference/chat/create and .../completions/create. A field with a value that changes
nothing is accepted. Any other unsupported field is refused, because ignoring it would change the answer without a word.
"""

from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

MAX_ANSWERS = 4  # of one request
Penalty = Annotated[float, Field(ge=-2, le=2, allow_inf_nan=False)]


def only(*neutral: Any) -> AfterValidator:
    """Accept no other values than these, which change nothing."""

    def check(value: Any) -> Any:
        if not any(value == each and isinstance(value, bool) == isinstance(each, bool) for each in neutral):
            raise ValueError(f"only {' or '.join(map(repr, neutral))} is supported here")
        return value

    return AfterValidator(check)


NoTools = Annotated[Any, only([])]
NoToolChoice = Annotated[Any, only("none", "auto")]


class Part(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def leave_out_null(cls, fields: Any) -> Any:
        """A null means that the field is absent. The openai client sends the nulls of an answer back with it."""
        return {k: v for k, v in fields.items() if v is not None} if isinstance(fields, dict) else fields


class Message(Part):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | None
    # The chat template has no place for these.
    name: str | None = None
    id: str | None = None
    annotations: Annotated[Any, only([])] = None
    tool_calls: NoTools = None

    @model_validator(mode="before")
    @classmethod
    def leave_out_null(cls, fields: Any) -> Any:
        """As in any part; but an assistant's content may be null."""
        if not isinstance(fields, dict):
            return fields
        given = {name: value for name, value in fields.items() if value is not None}
        return {"content": None, **given} if fields.get("role") == "assistant" else given

    @field_validator("content", mode="before")
    @classmethod
    def join_text_parts(cls, content: Any) -> Any:
        if not isinstance(content, list):
            return content
        if not all(isinstance(part, dict) and part.get("type") == "text" for part in content):
            raise ValueError("only parts of type text are supported")
        texts = [part.get("text") for part in content]
        if not all(isinstance(text, str) for text in texts):
            raise ValueError("a text part must have a text")
        return "\n".join(texts)

    def as_dict(self) -> dict[str, str]:
        """The message for the engine. OpenAI calls system messages developer messages now."""
        return {"role": "system" if self.role == "developer" else self.role, "content": self.content or ""}


class StreamOptions(Part):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class ResponseFormat(Part):
    type: Literal["text", "json_object"]


class AnyRequest(Part):
    """The fields of every request for an answer."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: str | list[str] | None = None
    n: Annotated[int, Field(ge=1, le=MAX_ANSWERS)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    # Not OpenAI's; other servers of open models use these names.
    top_k: Annotated[int, Field(ge=0)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.1, le=10, allow_inf_nan=False)] | None = None
    # Accepted with values that change nothing.
    min_p: Annotated[Any, only(0)] = None
    logit_bias: Annotated[Any, only({})] = None
    user: str | None = None

    @field_validator("stop", mode="after")
    @classmethod
    def check_stops(cls, stop: str | list[str] | None) -> str | list[str] | None:
        stops = [stop] if isinstance(stop, str) else stop or []
        if len(stops) > 4 or not all(1 <= len(text) <= 100 for text in stops):
            raise ValueError("must be at most 4 texts of 1 to 100 characters")
        return stop

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @property
    def sampling(self) -> dict[str, Any]:
        """The given sampling options, by the engine's names. The engine has defaults for the others."""
        names = ("max_tokens", "temperature", "top_p", "top_k", "repetition_penalty")
        given = {name: getattr(self, name) for name in (*names, "presence_penalty", "frequency_penalty")}
        given["seed"] = None if self.seed is None else self.seed % 2**63
        return {name: value for name, value in given.items() if value is not None}


class ChatRequest(AnyRequest):
    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    response_format: ResponseFormat | None = None
    # Accepted with values that change nothing.
    tools: NoTools = None
    tool_choice: NoToolChoice = None
    functions: NoTools = None
    function_call: NoToolChoice = None
    parallel_tool_calls: bool | None = None
    modalities: Annotated[Any, only(["text"])] = None
    verbosity: Annotated[Any, only("medium")] = None
    reasoning_effort: str | None = None  # the model does not reason first, so there is no effort to set
    service_tier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    safety_identifier: str | None = None
    metadata: dict[str, str] | None = None
    store: bool | None = None

    @field_validator("top_logprobs", mode="after")
    @classmethod
    def check_top_logprobs(cls, top: int | None, info: ValidationInfo) -> int | None:
        if top and not info.data.get("logprobs"):
            raise ValueError("needs logprobs: true")
        return top

    @property
    def conversation(self) -> list[dict[str, str]]:
        """The messages for the engine. An assistant's message without content says nothing and is left out."""
        return [message.as_dict() for message in self.messages if message.content is not None]

    @property
    def sampling(self) -> dict[str, Any]:
        given = super().sampling
        if self.max_completion_tokens is not None:
            given["max_tokens"] = self.max_completion_tokens
        if self.logprobs:
            given["logprobs"] = self.top_logprobs or 0
        if self.response_format and self.response_format.type == "json_object":
            given["json_object"] = True
        return given


class CompletionRequest(AnyRequest):
    prompt: str | Annotated[list[str], Field(min_length=1, max_length=MAX_ANSWERS)]
    max_tokens: Annotated[int, Field(ge=1)] | None = 16  # OpenAI's default of this path
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
    echo: bool | None = None
    best_of: int | None = None
    suffix: Annotated[Any, only("")] = None

    @field_validator("echo", mode="after")
    @classmethod
    def check_echo(cls, echo: bool | None, info: ValidationInfo) -> bool | None:
        if echo and info.data.get("logprobs") is not None:
            raise ValueError("with logprobs, only false is supported here")
        return echo

    @field_validator("best_of", mode="after")
    @classmethod
    def check_best_of(cls, best_of: int | None, info: ValidationInfo) -> int | None:
        if best_of not in (None, info.data.get("n") or 1):
            raise ValueError("only the value of n is supported here")
        return best_of

    @field_validator("prompt", mode="after")
    @classmethod
    def check_prompt(cls, prompt: str | list[str], info: ValidationInfo) -> str | list[str]:
        if isinstance(prompt, list) and len(prompt) * (info.data.get("n") or 1) > MAX_ANSWERS:
            raise ValueError(f"a request may ask for at most {MAX_ANSWERS} answers")
        return prompt

    @property
    def prompts(self) -> list[str]:
        return [self.prompt] if isinstance(self.prompt, str) else self.prompt

    @property
    def sampling(self) -> dict[str, Any]:
        return super().sampling | ({} if self.logprobs is None else {"logprobs": self.logprobs})


def problems(error: ValidationError) -> tuple[str, str | None]:
    """One line about everything that is wrong with a request, and the first wrong field."""
    lines: list[str] = []
    first: str | None = None
    for problem in error.errors(include_url=False, include_input=False)[:5]:
        where = ""
        for part in problem["loc"]:
            where += f"[{part}]" if isinstance(part, int) else f".{part}" if where else str(part)
        first = first or where or None
        text = "is not supported here" if problem["type"] == "extra_forbidden" else problem["msg"]
        text = text.removeprefix("Value error, ")
        lines.append(f"{where}: {text}" if where else text)
    return "; ".join(lines), first
