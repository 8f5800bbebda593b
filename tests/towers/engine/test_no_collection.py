from __future__ import annotations

import gc
import threading
import weakref

import pytest

from twotower.towers.engine.cuda_graph import no_collection


class Cycle:
    def __init__(self) -> None:
        self.own = self


def allocate() -> None:
    """More objects than the collector lets pass before it looks at the youngest."""
    kept = [[] for _ in range(20 * gc.get_threshold()[0])]  # type: ignore[var-annotated]
    assert kept


def test_garbage_stays_while_a_graph_is_captured() -> None:
    gone = weakref.ref(Cycle())
    with no_collection():
        held = weakref.ref(Cycle())
        allocate()
        thread = threading.Thread(target=allocate)
        thread.start()
        thread.join()
        assert held() is not None
    allocate()
    assert held() is None
    assert gone() is None


def test_the_collector_is_as_it_was() -> None:
    with pytest.raises(ValueError), no_collection():
        raise ValueError
    assert gc.isenabled()
    gc.disable()
    try:
        with no_collection():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
