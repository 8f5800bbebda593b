"""Ray's own prints: on stderr, without the log of a raylet that is gone."""

from __future__ import annotations

import io
from contextlib import redirect_stdout

from twotower.deployments.server.ray_messages import RayMessages


def test_a_message_is_passed_on_and_a_raylets_log_is_not() -> None:
    target = io.StringIO()
    with redirect_stdout(RayMessages(target)):
        print("(raylet) a worker was ended to free memory", flush=True)
        print("(raylet) Raylet is terminated. Its log:\n  line\n  line")
        print("another")
    assert target.getvalue() == "(raylet) a worker was ended to free memory\nanother\n"
