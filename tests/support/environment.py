"""The environment of all tests, set when this is imported: before Triton and gRPC read it."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import torch

# What Ray's socket paths leave for the folder that they begin with.
_LONGEST = 31

# Tests speak to this machine alone: a proxy that the environment names is not on the way.
for proxy in ("grpc_proxy", "http_proxy", "https_proxy", "all_proxy"):
    os.environ.pop(proxy, None)
    os.environ.pop(proxy.upper(), None)
if not os.access(Path.home(), os.W_OK):
    # Triton keeps compiled kernels there, Ray a token.
    home = Path(tempfile.gettempdir()) / f"twotower-tests-{os.getuid()}"
    home.mkdir(exist_ok=True)
    os.environ["HOME"] = str(home)
if len(os.fsencode(tempfile.gettempdir())) > _LONGEST:
    # Tests that start Ray by themselves; the service finds a place for its own.
    os.environ.setdefault("RAY_TMPDIR", "/tmp")
# Without a GPU, kernels run under Triton's interpreter.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
# Triton 3.9 warns at every launch where this is not said; 1 is what it does.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
