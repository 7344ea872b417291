"""What clients may send: OpenAI's requests, with what they may hold at most.

Words that vLLM adds (``top_k``, ``min_p``, ``repetition_penalty``) are known too; a word that is not is an
error, for what it asks would not be done."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StrictBool, StrictStr

MOST_TEXT = 4_000_000  # characters
MOST_MESSAGES = 2000
MOST_STOPS = 16
MOST_LIKELIEST = 20
MOST_ANSWERS = 64
SEED_BITS = 63

Name = Annotated[StrictStr, Field(min_length=1, max_length=256)]
Text = Annotated[StrictStr, Field(max_length=MOST_TEXT)]
Stop = Annotated[StrictStr, Field(min_length=1, max_length=1000)]
Bias = Annotated[float, Field(ge=-100, le=100, allow_inf_nan=False)]
Token = Annotated[int, Field(ge=0, lt=2**31)]
Values = dict[str, Any]


def _as_list(value: object) -> object:
    return [value] if isinstance(value, str) else value


class Given(BaseModel):
    model_config = ConfigDict(extra="forbid", protected_namespaces=())


class StreamOptions(Given):
    include_usage: StrictBool = False
    include_obfuscation: StrictBool = False  # what there is for a network that listens; nothing is added here


class Answered(Given):
    """What chats and completions have in common."""

    model: Name
    temperature: float | None = Field(None, ge=0, le=10, allow_inf_nan=False)
    top_p: float | None = Field(None, gt=0, le=1, allow_inf_nan=False)
    top_k: int | None = Field(None, ge=-1, lt=2**31, description="0 or -1: all tokens")
    min_p: float | None = Field(None, ge=0, le=1, allow_inf_nan=False)
    repetition_penalty: float | None = Field(None, gt=0, le=10, allow_inf_nan=False)
    frequency_penalty: float | None = Field(None, ge=-2, le=2, allow_inf_nan=False)
    presence_penalty: float | None = Field(None, ge=-2, le=2, allow_inf_nan=False)
    logit_bias: dict[str, Bias] | None = Field(None, max_length=1024)
    max_tokens: int | None = Field(None, ge=1, le=1_000_000)
    n: int | None = Field(None, ge=1, le=MOST_ANSWERS)
    seed: int | None = Field(None, ge=-(2**SEED_BITS), lt=2**SEED_BITS)
    stop: Annotated[list[Stop], BeforeValidator(_as_list), Field(max_length=MOST_STOPS)] | None = None
    stream: StrictBool | None = None
    stream_options: StreamOptions | None = None
    user: Text | None = Field(None, description="not used")


class JsonSchema(Given):
    name: Name
    description: Text | None = None
    schema_: Values = Field(default_factory=dict, alias="schema")
    strict: StrictBool | None = None


class AnyText(Given):
    type: Literal["text"]


class AnyObject(Given):
    type: Literal["json_object"]


class OfSchema(Given):
    type: Literal["json_schema"]
    json_schema: JsonSchema


class ImageUrl(Given):
    url: Annotated[StrictStr, Field(max_length=64_000_000)]
    detail: StrictStr | None = Field(None, max_length=16, description="not used")


class ContentPart(Given):
    type: Literal["text", "input_text", "image_url", "refusal"]
    text: Text | None = None
    refusal: Text | None = None
    image_url: ImageUrl | None = None


class Called(Given):
    name: Name
    arguments: Text


class ToolCall(Given):
    id: Name | None = None
    type: Literal["function"] = "function"
    function: Called


class ChatMessage(Given):
    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: Text | Annotated[list[ContentPart], Field(min_length=1, max_length=1000)] | None = None
    name: Annotated[StrictStr, Field(max_length=256)] | None = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=256)] | None = None
    tool_call_id: Annotated[StrictStr, Field(max_length=256)] | None = None
    reasoning_content: Text | None = None
    # What an answer of this server and of OpenAI's holds beside that, which clients send back as it is.
    refusal: Text | None = None
    audio: None = None
    annotations: list[Values] | None = None
    function_call: Called | None = None


class Function(Given):
    name: Annotated[StrictStr, Field(pattern=r"^[\w.-]{1,64}$")]
    description: Text | None = None
    parameters: Values = Field(default_factory=dict)
    strict: StrictBool | None = None


class Tool(Given):
    type: Literal["function"]
    function: Function


class ChatRequest(Answered):
    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=MOST_MESSAGES)]
    max_completion_tokens: int | None = Field(None, ge=1, le=1_000_000)
    logprobs: StrictBool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MOST_LIKELIEST, description="logprobs too, then")
    response_format: Annotated[AnyText | AnyObject | OfSchema, Field(discriminator="type")] | None = None
    tools: Annotated[list[Tool], Field(max_length=128)] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: StrictBool | None = None
    metadata: Values | None = Field(None, description="not used")
    store: StrictBool | None = Field(None, description="not used: nothing is stored")
    service_tier: StrictStr | None = Field(None, description="not used")
    safety_identifier: StrictStr | None = Field(None, description="not used")
    prompt_cache_key: StrictStr | None = Field(None, description="not used: what prompts share is found")


class CompletionRequest(Answered):
    prompt: (
        Text
        | Annotated[list[Text], Field(min_length=1, max_length=MOST_MESSAGES)]
        | Annotated[list[Token], Field(min_length=1, max_length=MOST_TEXT)]
        | Annotated[
            list[Annotated[list[Token], Field(min_length=1)]], Field(min_length=1, max_length=MOST_MESSAGES)
        ]
    )
    logprobs: int | None = Field(None, ge=0, le=MOST_LIKELIEST)
    echo: StrictBool | None = None
    best_of: Literal[1] | None = None
    suffix: None = None


class AdapterRequest(Given):
    """vLLM's words for loading an adapter while the server runs."""

    lora_name: Annotated[StrictStr, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._:-]{0,127}$")]
    lora_path: Annotated[
        StrictStr, Field(min_length=1, max_length=4096, description="below the adapters' folder")
    ]


class UnloadRequest(Given):
    lora_name: Name
