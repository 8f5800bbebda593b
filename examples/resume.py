"""Leaves a stream of a running service after its first block and goes on with it in a new call.

Prompt, seed and the token ids received so far are all that it takes; the text has no seam. Clients
do this by themselves when a connection is lost; here it is done by hand, as after a restart of the
program. `twotower serve` in one terminal, `python examples/resume.py 127.0.0.1:9000` in another.
"""

import sys

from twotower.client import Client

PROMPT = "def read(path):\n"

with Client(sys.argv[1]) as client:
    first = client.generate(PROMPT, max_tokens=48, temperature=0.8)
    for block in first:
        print(block.text, end="")
        first.cancel()
        break

    rest = client.generate(
        PROMPT,
        max_tokens=48,
        temperature=0.8,
        seed=first.seed,
        generated_token_ids=first.token_ids,
    )
    for block in rest:
        print(block.text, end="")
    print(f"\n{len(rest.token_ids)} tokens after {len(first.token_ids)}, seed {first.seed}")
