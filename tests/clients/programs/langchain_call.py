"""langchain-openai: a completion model of an OpenAI-like service, whole and as a stream."""

import json
import os

from langchain_openai import OpenAI

model = OpenAI(
    model="pystdlib",
    base_url=os.environ["BASE_URL"],
    api_key="none",
    max_tokens=24,
    temperature=0,
    seed=5,
    top_p=1,
)
print(
    json.dumps({"text": model.invoke("def f(x):"), "streamed": "".join(model.stream("def f(x):"))})
)
