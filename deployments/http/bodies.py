"""Bodies of requests to the HTTP front: OpenAI's fields, and the diffusion knobs beside them.

Types are checked strictly, a field that nobody knows is refused, and `null` means the default of an
optional field. Ranges are those of `GenerationParams`, which checks them for every front.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, FailFast, Field, model_validator
from pydantic_core import PydanticCustomError

from twotower.towers.errors import InvalidRequestError
from twotower.towers.request.logit_bias import MAX_LOGIT_BIAS
from twotower.towers.request.params import SAMPLING_PARAMETERS, GenerationParams

# Of a completion without max_tokens: what OpenAI's own API does.
DEFAULT_MAX_TOKENS = 16
MAX_COMPLETION_LOGPROBS = 5
# Of a conversation, and parts of a message: each costs time to check, be it empty.
MAX_MESSAGES = 4096


class _FirstFault(FailFast):
    """Of a long list that is wrong only the first fault is looked for."""

    def __hash__(self) -> int:
        # Unions compare their members by it.
        return hash(self.fail_fast)


def _few(given: Any) -> Any:
    """Biases, counted before each of them is looked at."""
    if isinstance(given, dict) and len(given) > MAX_LOGIT_BIAS:
        raise PydanticCustomError("too_long", f"it should have at most {MAX_LOGIT_BIAS} tokens")
    return given


Ids = Annotated[list[int], _FirstFault()]
Texts = Annotated[list[str], _FirstFault()]
Prompt = str | Ids | Texts | Annotated[list[Ids], _FirstFault()]


class Body(BaseModel):
    """Base of all bodies."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _with_one_unknown(cls, given: Any) -> Any:
        """The fields without all unknown ones but the first: each would be a fault of its own."""
        if not isinstance(given, dict) or len(given) <= len(cls.model_fields):
            return given
        unknown = next(name for name in given if name not in cls.model_fields)
        return {name: given[name] for name in (*cls.model_fields, unknown) if name in given}


class StreamOptions(Body):
    """Options of a stream."""

    include_usage: bool | None = Field(
        None, description="a last chunk with the usage of the whole request"
    )


class SamplingBody(Body):
    """Fields of both kinds of completions. Descriptions are those of the gRPC API's parameters of
    the same name, limits and defaults included."""

    model: str | None = Field(None, description="name of the served model; null = that one")
    n: int | None = Field(None, description="completions of each prompt, 1 (default) to 128")
    stream: bool | None = Field(None, description="answer block by block, as server-sent events")
    stream_options: StreamOptions | None = None
    stop: str | Texts | None = Field(
        None, description="the output ends before the first of these, at most 16"
    )
    temperature: float | None = Field(None, description="0 (default) takes the likeliest token")
    top_p: float | None = Field(None, description="draws from this mass; above 0, at most 1")
    top_k: int | None = Field(None, description="draws from the k likeliest tokens")
    min_p: float | None = Field(
        None, description="draws from tokens of this share of the best one's probability"
    )
    seed: int | None = Field(None, description="0 to 2^63 - 1; the same seed gives the same text")
    presence_penalty: float | None = Field(None, description="-2 to 2")
    frequency_penalty: float | None = Field(None, description="-2 to 2")
    logit_bias: Annotated[dict[str, float] | None, BeforeValidator(_few)] = Field(
        None, description="-100 to 100 by token id; at most 1024"
    )
    user: str | None = Field(None, description="taken and not used")
    mode: str | None = Field(
        None, description="mask_diffusion (default), ar, mock_ar, verified or auto"
    )
    block_size: int | None = Field(None, description="tokens denoised together; default 16")
    steps_per_block: int | None = Field(
        None, description="most denoiser passes a block; default 16"
    )
    confidence_threshold: float | None = Field(
        None, description="a likelier token is committed at once; 0 to 1, default 0.8"
    )
    draft_steps: int | None = Field(
        None, description="most denoiser passes a draft in verified; default 1"
    )
    quality: str | None = Field(
        None,
        description="what auto may give up for speed: ar (default: nothing), near (a mix of 0.3) "
        "or fast (as mask_diffusion)",
    )
    draft_source: str | None = Field(
        None, description="of drafts in verified: any (default), lookup or denoiser"
    )
    acceptance: str | None = Field(
        None, description="of a denoiser's draft in verified: strict (default) or mix"
    )
    mix_ratio: float | None = Field(
        None, description="the denoiser's share in a mix; 0 to 1, default 0.3"
    )
    commit_rule: str | None = Field(
        None,
        description="which positions a step of mask_diffusion commits: leftmost (default), "
        "released or product",
    )
    first_token: str | None = Field(
        None,
        description="tower that draws the first token of a block in mask_diffusion: context or "
        "denoiser; default: denoiser with the released rule, else context",
    )
    min_steps_per_block: int | None = Field(
        None, description="floor of steps_per_block for a service with a long queue"
    )
    min_confidence_threshold: float | None = Field(
        None, description="floor of confidence_threshold for a service with a long queue"
    )
    min_tokens: int | None = Field(
        None, description="nothing ends the output before it has so many tokens"
    )
    ignore_eos: bool | None = Field(None, description="goes on after the end-of-text token")
    return_token_ids: bool | None = Field(
        None, description="also sends the ids of prompt and output"
    )
    provisional: bool | None = Field(
        None, description="streams also carry the draft of a block after each denoiser step"
    )

    def check_stream_options(self) -> None:
        """Raises InvalidRequestError for options of a stream where there is none."""
        if self.stream_options is not None and not self.stream:
            raise InvalidRequestError("stream_options", "options", "null without stream")

    def params(
        self, max_tokens: int, top_logprobs: int, eos_token_id: int | None
    ) -> GenerationParams:
        """The sampling parameters with a seed. Raises InvalidRequestError."""
        given: dict[str, Any] = {
            name: value
            for name in SAMPLING_PARAMETERS
            if (value := getattr(self, name, None)) is not None
        }
        given |= {"max_tokens": max_tokens, "top_logprobs": top_logprobs}
        if isinstance(self.stop, str):
            # OpenAI's clients send an empty text for none.
            given["stop"] = (self.stop,) if self.stop else ()
        if self.logit_bias is not None:
            given["logit_bias"] = {_token_id(key): bias for key, bias in self.logit_bias.items()}
        eos = None if self.ignore_eos else eos_token_id
        return GenerationParams(**given, eos_token_id=eos).with_seed()


class CompletionBody(SamplingBody):
    """Body of POST /v1/completions."""

    prompt: Annotated[Prompt, Field(description="a text, ids, or a list of either")]
    max_tokens: int | None = Field(None, description="most tokens of output; default 16")
    echo: bool | None = Field(None, description="the text begins with the prompt")
    logprobs: int | None = Field(
        None, description="log-probabilities, with so many alternatives: 0 to 5"
    )
    best_of: int | None = Field(None, description="refused, unless 1")
    suffix: str | None = Field(None, description="refused")


class TextPart(Body):
    """A part of a message's content."""

    type: Literal["text"]
    text: str


class Message(Body):
    """A message of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], _FirstFault(), Field(max_length=MAX_MESSAGES)]
    name: str | None = None

    def text(self) -> str:
        """The content in one piece."""
        if isinstance(self.content, str):
            return self.content
        return "".join(part.text for part in self.content)


class ResponseFormat(Body):
    """Format of an answer: plain text alone."""

    type: str


class ChatBody(SamplingBody):
    """Body of POST /v1/chat/completions."""

    messages: Annotated[list[Message], _FirstFault()] = Field(min_length=1, max_length=MAX_MESSAGES)
    max_tokens: int | None = Field(
        None, description="most tokens of output; default: what the context has room for"
    )
    max_completion_tokens: int | None = Field(None, description="as max_tokens")
    logprobs: bool | None = Field(None, description="log-probabilities of the output's tokens")
    top_logprobs: int | None = Field(None, description="with so many alternatives: 0 to 20")
    response_format: ResponseFormat | None = Field(None, description='{"type": "text"} alone')


class TokenizeBody(Body):
    """Body of POST /tokenize."""

    prompt: str = Field(
        description="a text; a special token that stands alone gives its own id, as nowhere else"
    )
    model: str | None = None
    add_special_tokens: bool | None = Field(
        None, description="those that the tokenizer puts around a text; default true"
    )


class DetokenizeBody(Body):
    """Body of POST /detokenize."""

    tokens: Ids
    model: str | None = None


def _token_id(key: str) -> int:
    if not (key.isascii() and key.isdecimal() and len(key) < 12):
        raise InvalidRequestError("logit_bias", key, "token ids as keys")
    return int(key)
