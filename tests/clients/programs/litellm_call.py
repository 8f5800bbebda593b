"""litellm: a text completion of an OpenAI-like service."""

import json
import os

import litellm

answer = litellm.text_completion(
    model="text-completion-openai/pystdlib",
    prompt="def f(x):",
    max_tokens=24,
    seed=5,
    api_base=os.environ["BASE_URL"],
    api_key="none",
)
print(json.dumps({"text": answer.choices[0].text, "tokens": answer.usage.completion_tokens}))
