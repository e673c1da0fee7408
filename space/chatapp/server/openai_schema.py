"""The fields of a request to /v1/chat/completions: those of OpenAI's that one small model on a CPU can honour.

https://platform.openai.com/docs/api-reference/chat/create. An unsupported field is refused, because ignoring it would
change the answer without a word.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

MAX_MESSAGES = 1000
Zero = Annotated[float, Field(ge=0, le=0, allow_inf_nan=False)]


class Part(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def leave_out_null(cls, fields: Any) -> Any:
        """A null means that the field is absent. The openai client sends the nulls of an answer back with it."""
        return {k: v for k, v in fields.items() if v is not None} if isinstance(fields, dict) else fields


class Message(Part):
    role: Literal["system", "developer", "user", "assistant"]
    content: str
    name: str | None = None  # the chat template has no place for it

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
        return {"role": "system" if self.role == "developer" else self.role, "content": self.content}


class StreamOptions(Part):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class TextFormat(Part):
    type: Literal["text"]


class ChatRequest(Part):
    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)]
    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: str | list[str] | None = None
    # Not OpenAI's; other servers of open models use these names.
    top_k: Annotated[int, Field(ge=0)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.1, le=10, allow_inf_nan=False)] | None = None
    # Accepted only with values that change nothing.
    n: Literal[1] | None = None
    presence_penalty: Zero | None = None
    frequency_penalty: Zero | None = None
    logprobs: Literal[False] | None = None
    response_format: TextFormat | None = None
    user: str | None = None
    metadata: dict[str, str] | None = None
    store: bool | None = None

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
        given = {
            "max_tokens": self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "repetition_penalty": self.repetition_penalty,
            "seed": None if self.seed is None else self.seed % 2**63,
        }
        return {name: value for name, value in given.items() if value is not None}


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
        lines.append(f"{where}: {text}" if where else text)
    return "; ".join(lines), first
