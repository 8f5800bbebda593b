"""`python -m twotower.bench`: needs torch, triton, safetensors and transformers only."""

import sys

from twotower.bench.command import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
