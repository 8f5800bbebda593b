"""The committed protobuf modules are what their sources give."""

from __future__ import annotations

import pytest

from twotower.protos import generate


def test_generated_code_is_up_to_date() -> None:
    pytest.importorskip("grpc_tools")
    assert generate.stale_files() == []
