"""Allocators of a pool's slots and pages.

Holders of a page are counted: a row and the prefix cache may share a page.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left
from collections.abc import Sequence

from twotower.towers.errors import CapacityError

PAGE_TOKENS = 64


def pages_for(tokens: int) -> int:
    """Pages that hold so many tokens."""
    return -(-tokens // PAGE_TOKENS)


class PageAllocator:
    """Keeps which of `num_pages` pages are free, and the number of holders of each other page."""

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self.num_free = num_pages
        self._holders: dict[int, int] = {}
        # Free pages as runs start..stop-1, in order and never touching each other.
        self._runs: list[tuple[int, int]] = [(0, num_pages)] if num_pages else []

    def allocate(self, count: int) -> list[int]:
        """The lowest run of neighbouring pages that is long enough, otherwise the lowest pages.

        Raises CapacityError if fewer pages are free.
        """
        if count > self.num_free:
            raise CapacityError(f"pages: got a need of {count}, expected at most {self.num_free}")
        fitting = [run for run in self._runs if run[1] - run[0] >= count][:1]
        pages: list[int] = []
        for run in fitting or list(self._runs):
            pages += self._take(run, count - len(pages))
            if len(pages) == count:
                break
        self.num_free -= count
        self._holders |= dict.fromkeys(pages, 1)
        return pages

    def share(self, pages: Sequence[int]) -> None:
        """Adds a holder to each page. Raises ValueError for a free page."""
        self._check_held(pages)
        for page in pages:
            self._holders[page] += 1

    def free(self, pages: Sequence[int]) -> None:
        """Takes a holder from each page; a page without holders is free again.

        Raises ValueError, and changes nothing, for a page that is free or named twice.
        """
        self._check_held(pages)
        for page in pages:
            self._holders[page] -= 1
            if not self._holders[page]:
                del self._holders[page]
                self._give_back(page)

    def holders(self, page: int) -> int:
        """Number of holders of a page; 0 if it is free."""
        return self._holders.get(page, 0)

    def _take(self, run: tuple[int, int], count: int) -> range:
        start, stop = run
        taken = range(start, min(stop, start + count))
        index = bisect_left(self._runs, run)
        self._runs[index : index + 1] = [(taken.stop, stop)] if taken.stop < stop else []
        return taken

    def _give_back(self, page: int) -> None:
        start, stop = page, page + 1
        index = bisect_left(self._runs, (page, page))
        after = before = index
        if index < len(self._runs) and self._runs[index][0] == stop:
            stop, after = self._runs[index][1], index + 1
        if index and self._runs[index - 1][1] == start:
            start, before = self._runs[index - 1][0], index - 1
        self._runs[before:after] = [(start, stop)]
        self.num_free += 1

    def _check_held(self, pages: Sequence[int]) -> None:
        if len(set(pages)) != len(pages):
            raise ValueError(f"pages: got {list(pages)}, expected each page once")
        for page in pages:
            if page not in self._holders:
                raise ValueError(f"pages: got page {page}, expected one that is held")


class SlotAllocator:
    """Keeps which of `num_slots` slots are free."""

    def __init__(self, num_slots: int) -> None:
        self.num_slots = num_slots
        self._free = list(range(num_slots))
        self._used: set[int] = set()

    @property
    def num_free(self) -> int:
        return len(self._free)

    def allocate(self) -> int:
        """The lowest free slot. Raises CapacityError if there is none."""
        if not self._free:
            raise CapacityError(f"slots: all {self.num_slots} are in use")
        slot = heapq.heappop(self._free)
        self._used.add(slot)
        return slot

    def free(self, slot: int) -> None:
        """Raises ValueError for a slot that is free already."""
        if slot not in self._used:
            raise ValueError(f"slot: got {slot}, expected one that is in use")
        self._used.remove(slot)
        heapq.heappush(self._free, slot)
