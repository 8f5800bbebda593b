"""Prints a completion of the shipped model block by block, as it is committed.

`python examples/stream.py ["text"]`
"""

import sys

from twotower import TwoTower

prompt = sys.argv[1] if len(sys.argv) > 1 else "import os\n\n\ndef "
model = TwoTower.from_pretrained()
print(prompt, end="")
for block in model.stream(prompt, max_tokens=32):
    print(block.text, end="", flush=True)
print()
