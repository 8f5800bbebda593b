"""The openai package, blocking: an answer, a stream, several prompts, knobs, models, errors."""

import json
import os

import openai

client = openai.OpenAI(base_url=os.environ["BASE_URL"], api_key="none", max_retries=0)
model = client.models.list().data[0].id
ask = {"model": model, "prompt": "def f(x):", "max_tokens": 24, "seed": 5}
whole = client.completions.create(**ask)
pieces = list(client.completions.create(**ask, stream=True, stream_options={"include_usage": True}))
knobs = client.completions.create(
    **ask, extra_body={"mode": "verified", "confidence_threshold": 0.9, "block_size": 8}
)
ar = client.completions.create(**ask, extra_body={"mode": "ar"})
many = client.completions.create(**{**ask, "prompt": ["a =", "class A:"]}, n=2, temperature=0.8)
scored = client.completions.create(
    **{**ask, "max_tokens": 1}, echo=True, logprobs=3, extra_body={"mode": "ar"}
)


def error(call):
    try:
        call()
    except openai.APIStatusError as found:
        return [type(found).__name__, found.status_code, found.param, found.message]
    return None


print(
    json.dumps(
        {
            "model": model,
            "retrieved": client.models.retrieve(model).id,
            "text": whole.choices[0].text,
            "finish_reason": whole.choices[0].finish_reason,
            "usage": whole.usage.model_dump(),
            "streamed": "".join(piece.choices[0].text for piece in pieces if piece.choices),
            "stream_usage": pieces[-1].usage.model_dump(),
            "verified": knobs.choices[0].text,
            "accepted": knobs.usage.model_dump()["twotower"]["accepted_tokens"],
            "ar": ar.choices[0].text,
            "many": [choice.text for choice in many.choices],
            "tokens": scored.choices[0].logprobs.tokens,
            "token_logprobs": scored.choices[0].logprobs.token_logprobs,
            "errors": [
                error(lambda: client.completions.create(**{**ask, "temperature": -1})),
                error(lambda: client.completions.create(**ask, extra_body={"mode": "fast"})),
                error(lambda: client.completions.create(**{**ask, "model": "gpt-4"})),
                error(lambda: client.completions.create(**ask, best_of=3)),
                error(
                    lambda: client.chat.completions.create(
                        model=model, messages=[{"role": "user", "content": "hi"}]
                    )
                ),
            ],
        }
    )
)
