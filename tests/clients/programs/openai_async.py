"""The openai package, asynchronous: streams side by side, one of them left in the middle."""

import asyncio
import json
import os

import openai


async def main() -> None:
    async with openai.AsyncOpenAI(base_url=os.environ["BASE_URL"], api_key="none") as client:
        model = (await client.models.list()).data[0].id

        async def text(seed: int) -> str:
            stream = await client.completions.create(
                model=model, prompt="def f(x):", max_tokens=24, seed=seed, stream=True
            )
            return "".join([piece.choices[0].text async for piece in stream])

        left = await client.completions.create(
            model=model,
            prompt="class A:",
            max_tokens=2000,
            stream=True,
            extra_body={"ignore_eos": True},
        )
        await anext(aiter(left))
        await left.close()
        texts = await asyncio.gather(*(text(5) for _ in range(4)))
        print(json.dumps({"texts": texts}))


asyncio.run(main())
