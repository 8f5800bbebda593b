"""Every exception has one status, and no text that was not made for clients gets out."""

from __future__ import annotations

import grpc
import pytest
from ray.exceptions import ActorDiedError, RayTaskError
from ray.serve._private.common import DeploymentID
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

from twotower.deployments.completions.status import refuse, status_of
from twotower.deployments.routing.retry import LostTooOftenError, NoPairError
from twotower.protos.refusals import RequestRefusedError, marked, retry_after_of
from twotower.towers.errors import (
    CapacityError,
    CheckpointError,
    InvalidRequestError,
    NumericalError,
    QueueFullError,
    UnavailableError,
)

Code = grpc.StatusCode
SECRET = "Traceback /home/someone/secret.py actor_id=1e5f"


def as_task_error(cause: Exception) -> Exception:
    """The error as it comes out of an actor: an instance of both classes, with a trace."""
    error: Exception = RayTaskError("generate", f"{SECRET}\n{cause}", cause).as_instanceof_cause()
    return error


@pytest.mark.parametrize("wrap", [lambda e: e, as_task_error], ids=["plain", "from an actor"])
@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (InvalidRequestError("top_p", 2.0, "at most 1"), Code.INVALID_ARGUMENT, "top_p: got 2.0"),
        (CapacityError("no room"), Code.RESOURCE_EXHAUSTED, "no room"),
        (UnavailableError("a tower is gone"), Code.UNAVAILABLE, "a tower is gone"),
        (NumericalError("non-finite logits"), Code.INTERNAL, "numerical error: non-finite logits"),
        (QueueFullError("3 rows wait"), Code.RESOURCE_EXHAUSTED, "3 rows wait; retry after 1 s"),
        (LostTooOftenError("lost with 8 pairs"), Code.ABORTED, "lost with 8 pairs"),
        (NoPairError("no pair is up"), Code.UNAVAILABLE, "no pair is up"),
        (CheckpointError(f"in {SECRET}"), Code.INTERNAL, "internal error"),
        (TimeoutError(SECRET), Code.UNAVAILABLE, "did not answer"),
        (KeyError(SECRET), Code.INTERNAL, "internal error"),
        (ValueError(SECRET), Code.INTERNAL, "internal error"),
    ],
)
def test_status_of_each_error(error: Exception, code: Code, text: str, wrap: object) -> None:
    got_code, details = status_of(wrap(error), "req-1")  # type: ignore[operator]
    assert got_code == code
    assert text in details
    assert "Traceback" not in details
    assert "secret" not in details


def test_platform_errors() -> None:
    busy = BackPressureError(num_queued_requests=3, max_queued_requests=3)
    code, details = status_of(busy, "r")
    assert code == Code.RESOURCE_EXHAUSTED
    assert retry_after_of(details) == 1.0
    gone = DeploymentUnavailableError(DeploymentID("TowerPair", "app"))
    assert status_of(gone, "r")[0] == Code.UNAVAILABLE
    code, details = status_of(ActorDiedError(), "r")
    assert code == Code.UNAVAILABLE
    assert "actor" not in details.lower()


def test_a_row_that_never_fits_has_nothing_to_wait_for() -> None:
    assert retry_after_of(status_of(CapacityError("5 pages, expected at most 4"), "r")[1]) is None


def test_internal_errors_name_the_request_for_the_log() -> None:
    assert status_of(RuntimeError(SECRET), "req-7")[1].endswith("req-7")


def test_details_are_bounded() -> None:
    assert len(status_of(UnavailableError("x" * 9000), "r")[1]) <= 1024


def test_refuse_sets_the_status_and_ends_the_call() -> None:
    calls: dict[str, object] = {}

    class Context:
        def set_code(self, code: object) -> None:
            calls["code"] = code

        def set_details(self, details: object) -> None:
            calls["details"] = details

    with pytest.raises(RequestRefusedError) as caught:
        refuse(Context(), as_task_error(InvalidRequestError("seed", -1, "at least 0")), "r")
    text = "seed: got -1, expected at least 0"
    assert calls == {"code": Code.INVALID_ARGUMENT, "details": marked(text)}
    # Serve logs the error: of what was sent it says nothing.
    assert str(caught.value) == "INVALID_ARGUMENT"
