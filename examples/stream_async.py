"""Streams two completions of the shipped model at once from one event loop.

`python examples/stream_async.py`
"""

import asyncio

from twotower import TwoTower

PROMPTS = ["def read(path):\n", "class Point:\n"]


async def completion(model: TwoTower, prompt: str) -> str:
    """The whole text, gathered from its blocks."""
    pieces = []
    async for block in model.astream(prompt, max_tokens=32):
        pieces.append(block.text)
    return "".join(pieces)


async def main() -> None:
    """Both completions share the passes of one model."""
    model = TwoTower.from_pretrained()
    for text in await asyncio.gather(*(completion(model, prompt) for prompt in PROMPTS)):
        print(repr(text))


if __name__ == "__main__":
    asyncio.run(main())
