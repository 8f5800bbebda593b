"""Loads a checkpoint of yours and completes a prompt of token ids with it.

A folder has config.json, safetensors and, for texts, tokenizer.json. What does not fit is refused
with the name of the tensor or key. `python examples/own_checkpoint.py FOLDER 5 6 7`
"""

import sys

from twotower import TwoTower

folder, *ids = sys.argv[1:]
model = TwoTower.from_pretrained(folder, device="cpu", dtype="float32")
config = model.config
print(f"{config.layer_pattern}, width {config.hidden_size}, {config.vocab_size} tokens")
result = model.generate([[int(token) for token in ids]], max_tokens=16)[0]
print(result.token_ids)
if model.tokenizer is not None:
    print(result.text)
