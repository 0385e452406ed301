"""What the bodies of all requests share: strict types with bounds, and fields that are refused unless they are off."""

from typing import Annotated, Any, Literal, cast

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    model_validator,
)
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

MAX_TEXT = 2**20
MAX_COUNT = 2**20
MAX_CHOICES = 1024
MAX_KEYS = 1024
MAX_UNKNOWN = 16
MAX_TOKEN = 2**31 - 1
# The largest number below 2**63 that is the same as a float, as which JSON schemas have it.
MAX_SEED = 2**63 - 1024


class FirstFault:
    """A list whose first wrong item is reported alone: reports of all would take longer than an answer."""

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        schema: Any = handler(source)
        schema["fail_fast"] = True
        return cast(CoreSchema, schema)


def _whole(value: Any) -> Any:
    """JSON has one kind of number, so 2.0 is a whole number."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _few(value: Any) -> Any:
    """Every wrong key is reported, so there may not be many of them."""
    if isinstance(value, dict) and len(value) > MAX_KEYS:
        raise PydanticCustomError("too_many_keys", "has too many keys")
    return value


FEW = BeforeValidator(_few)
WHOLE = BeforeValidator(_whole)
Text = Annotated[str, Field(max_length=MAX_TEXT)]
SomeText = Annotated[str, Field(min_length=1, max_length=MAX_TEXT)]
Name = Annotated[str, Field(min_length=1, max_length=512)]
Label = Annotated[str, Field(max_length=512)]
Stop = Annotated[str, Field(min_length=1, max_length=512)]
Labels = Annotated[dict[Annotated[str, Field(max_length=64)], Label], Field(max_length=16), FEW]
TokenId = Annotated[int, Field(ge=0, le=MAX_TOKEN)]
FIRST = FirstFault()
TokenIds = Annotated[list[TokenId], FIRST, Field(min_length=1, max_length=MAX_COUNT)]
TemplateVariables = Annotated[dict[Name, Any], Field(max_length=64), FEW]
VisibilityName = Literal["columnar", "isolated"]


class Body(BaseModel):
    """A body with no other keys than its fields, whose values have exactly the declared types."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _has_few_keys(cls, value: Any) -> Any:
        """Every unknown key is reported, so there may not be many of them."""
        if isinstance(value, dict) and len(value) > len(cls.model_fields) + MAX_UNKNOWN:
            raise PydanticCustomError("too_many_keys", "has more keys than this server knows")
        return value


class Answer(BaseModel):
    """A body of a response; it describes the response and checks nothing."""

    model_config = ConfigDict(extra="forbid")


class Off:
    """A field that the server does not support: only null, and ``values`` that ask for nothing, are accepted."""

    def __init__(self, *values: Any) -> None:
        self._values = (None, *values)

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(self._check)

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {"enum": list(self._values), "description": "Not supported; only a value that asks for nothing."}

    def _check(self, value: Any) -> Any:
        # The type is compared as well, since False equals 0.
        if not any(type(value) is type(off) and value == off for off in self._values):
            raise PydanticCustomError("unsupported", "is not supported by this server; leave it out")
        return value


class StreamOptions(Body):
    """What a stream has besides the answers."""

    include_usage: bool | None = None
    include_obfuscation: Annotated[object, Off(False)] = None


class AnyText(Body):
    """An answer of any form."""

    type: Literal["text"]


class JsonObject(Body):
    """An answer that is a JSON object."""

    type: Literal["json_object"]


class NamedSchema(Body):
    """A JSON schema; whether it is ``strict`` makes no difference, since it is always enforced."""

    name: Name
    json_schema: Annotated[dict[str, Any], Field(alias="schema")]
    description: Text | None = None
    strict: bool | None = None


class JsonSchema(Body):
    """An answer that a JSON schema accepts."""

    type: Literal["json_schema"]
    json_schema: NamedSchema


ResponseFormat = Annotated[AnyText | JsonObject | JsonSchema, Field(discriminator="type")]


class Sampled(Body):
    """The fields of all requests that say how answers are sampled."""

    model: Name | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    stream: bool | None = None
    user: Label | None = None


class Extended(Sampled):
    """The fields of chat completions and completions alike; those from ``top_k`` on are not OpenAI's."""

    n: Annotated[int, Field(ge=1, le=MAX_CHOICES), WHOLE] | None = None
    max_tokens: Annotated[int, Field(ge=0, le=MAX_COUNT), WHOLE] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=MAX_CHOICES)] | None = None
    seed: Annotated[int, Field(ge=0, le=MAX_SEED), WHOLE] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: (
        Annotated[
            dict[Annotated[str, Field(pattern=r"^[0-9]{1,9}$")], Annotated[float, Field(ge=-100, le=100)]],
            Field(max_length=MAX_KEYS, json_schema_extra={"additionalProperties": False}),
            FEW,
        ]
        | None
    ) = None
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    top_k: Annotated[int, Field(ge=-1, le=MAX_TOKEN), WHOLE] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    min_new_tokens: Annotated[int, Field(ge=0, le=MAX_COUNT), WHOLE] | None = None
    branches: Annotated[list[SomeText], FIRST, Field(min_length=1, max_length=MAX_CHOICES)] | None = None
    visibility: VisibilityName | None = None
