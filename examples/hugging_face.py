"""A program for the released model, through transformers and without its remote code.

After `import twotower.transformers` the Auto classes load two-tower checkpoints: a folder or a hub
id, here the model in this package. `python examples/hugging_face.py "    def test_open(self):"`
"""

import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import twotower.transformers

name = twotower.transformers.SHIPPED_MODEL
prompt = sys.argv[1] if len(sys.argv) > 1 else "    def test_open(self):"
tokenizer = AutoTokenizer.from_pretrained(name)
model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
model.place_towers_on_devices("cpu", "cpu")  # with two GPUs: "cuda:0", "cuda:1"
model.eval()

input_ids = tokenizer(prompt, return_tensors="pt").input_ids
output = model.generate_mask_diffusion(
    input_ids,
    max_new_tokens=32,
    block_size=16,
    steps_per_block=16,
    mask_token_id=3,
    temperature=0.0,
    confidence_threshold=0.8,
)
print(tokenizer.decode(output[0], skip_special_tokens=True))
print(f"loss {model(output, labels=output).loss.item():.2f} nats a token")
