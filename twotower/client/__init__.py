"""Clients of the service over gRPC; they need no torch and no Ray."""

from twotower.client.choices import AsyncChoicesStream, ChoicesStream
from twotower.client.client import AsyncClient, Client
from twotower.client.messages import ModelInfo, Score, ServiceError
from twotower.client.streams import AsyncGenerationStream, GenerationStream
from twotower.towers.request.results import ProvisionalBlock, TextBlock, Usage
from twotower.towers.request.token_ids import Prompt

__all__ = [
    "AsyncChoicesStream",
    "AsyncClient",
    "AsyncGenerationStream",
    "ChoicesStream",
    "Client",
    "GenerationStream",
    "ModelInfo",
    "Prompt",
    "ProvisionalBlock",
    "Score",
    "ServiceError",
    "TextBlock",
    "Usage",
]
