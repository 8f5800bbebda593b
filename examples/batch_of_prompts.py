"""Completes several prompts together, each with parameters of its own.

Rows of a batch do not influence each other: every result is that of the prompt alone.
`python examples/batch_of_prompts.py`
"""

from twotower import GenerationParams, Request, TwoTower

REQUESTS = [
    Request("def read(path):\n", GenerationParams(max_tokens=32)),
    Request("class Point:\n", GenerationParams(max_tokens=16, temperature=0.8, seed=1)),
    Request("import os\n", GenerationParams(mode="ar", max_tokens=24, stop=("\n\n",))),
]

model = TwoTower.from_pretrained()
for request, result in zip(REQUESTS, model.generate_requests(REQUESTS), strict=True):
    cost = f"{len(result.token_ids)} tokens, {result.nfe} denoiser passes"
    print(f"{request.params.mode}: {cost}, {result.finish_reason}: {result.text!r}")
