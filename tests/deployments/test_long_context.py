"""The longest requests and answers pass every limit of messages on their way: a real service."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.random_model import small_config, write_checkpoint
from twotower.client import Client, Score, ServiceError
from twotower.deployments.config import ServiceConfig
from twotower.deployments.server.server import LocalService, free_port
from twotower.protos.incoming import MAX_MESSAGE_BYTES
from twotower.protos.v1 import generation_pb2 as pb

pytestmark = [pytest.mark.cluster, pytest.mark.filterwarnings("default")]

CONTEXT = 32768
VOCABULARY = 4096
BLOCK = 16


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    # Without attention: what is tested are messages, and no layer is quadratic then.
    model = small_config(vocab_size=VOCABULARY, layer_pattern="M-", max_position_embeddings=CONTEXT)
    folder: Path = write_checkpoint(tmp_path_factory.mktemp("long"), model)
    config = ServiceConfig(
        model=str(folder),
        grpc_port=free_port(),
        http_port=free_port(),
        num_threads=1,
        max_context=CONTEXT,
        max_num_seqs=2,
    )
    with LocalService(config) as service, Client(service.address) as connected:
        yield connected


def test_the_longest_requests_and_answers_pass(client: Client) -> None:
    ids = [index % VOCABULARY for index in range(CONTEXT)]
    plain, full = client.score(ids, timeout=300), client.score(ids, 20, timeout=300)
    assert list(plain.token_ids) == ids
    assert len(plain.log_probs) == CONTEXT - 1
    assert full.log_probs == plain.log_probs
    assert {len(top) for top in full.top_log_probs} == {20}
    assert len(full.top_log_probs) == CONTEXT - 1
    assert length(full) > MAX_MESSAGE_BYTES
    stream = client.generate(ids[:-BLOCK], max_tokens=BLOCK, block_size=BLOCK, timeout=300)
    assert len([token for block in stream for token in block.token_ids]) == BLOCK
    assert stream.prompt_tokens == CONTEXT - BLOCK


def length(score: Score) -> int:
    """Bytes of the message that has brought a score."""
    tops = [
        pb.TopLogProbs(token_ids=ids, log_probs=log_probs)
        for ids, log_probs in (zip(*top, strict=True) for top in score.top_log_probs)
    ]
    message = pb.ScoreResponse(
        token_ids=score.token_ids, log_probs=score.log_probs, top_log_probs=tops
    )
    return message.ByteSize()


def test_one_token_more_is_an_invalid_argument(client: Client) -> None:
    limit = f"expected at most {CONTEXT} tokens"
    for ask in (lambda ids: client.score(ids), lambda ids: list(client.generate(ids))):
        with pytest.raises(ServiceError, match=f"INVALID_ARGUMENT: .*{limit}"):
            ask([1] * (CONTEXT + 1))
