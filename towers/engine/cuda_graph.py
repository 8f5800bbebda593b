"""Work over fixed buffers, replayed as CUDA graphs.

A pass is hundreds of launches of a few microseconds: at small batches the host would be slower
than the device. On a CPU the same work is simply called, so that everything else is the same.
"""

from __future__ import annotations

import gc
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from twotower.kernels import dispatch
from twotower.kernels.rows import Rows
from twotower.towers.engine.buckets import ROW_BUCKETS
from twotower.towers.state.tensors import StateTensors

# Clients choose block lengths. A pass of a length and size that nobody has warmed up runs without
# graphs until it comes often, and the least recently used of too many gives its graphs up. One
# length needs a program a bucket, and another where drafts are checked.
CAPTURE_AFTER = 8
MAX_PROGRAMS = 6 * len(ROW_BUCKETS)

# One thread of a process captures at a time, as all do so on one stream of a device.
_capturing = threading.Lock()


@cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream on which all graphs of a device are warmed up and captured.

    Libraries keep a workspace per stream, for good. On one stream it is made once, by the first
    warm-up and so outside all graphs; on torch's own capture stream it would belong to the first
    graph and go with it, and on a stream for each tower there would be one for each.
    """
    return torch.cuda.Stream(device)


@contextmanager
def no_collection() -> Iterator[None]:
    """Keeps the garbage collector from running, in any thread of the process.

    A graph that it found, of an engine that is gone, would be freed by the thread that captures,
    and CUDA ends a capture in which its thread frees a graph.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class GraphMemory:
    """Memory that all graphs of one tower share, as no two of them run at a time."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._handle: Any = None

    def handle(self) -> Any:
        """The pool's handle, made when the first graph is captured."""
        if self._handle is None:
            self._handle = torch.cuda.graph_pool_handle()
        return self._handle


class CapturedGraph:
    """Calls `work`, on a CUDA device as a graph once it has been captured.

    `work` takes and returns nothing: it reads and writes tensors that live as long as this does,
    and never waits for the device. It is run twice before it is captured: its inputs must describe
    padding then, so that this changes no row.
    """

    def __init__(self, work: Callable[[], None], memory: GraphMemory) -> None:
        self._work = work
        self._memory = memory
        self._graph: torch.cuda.CUDAGraph | None = None

    @property
    def ready(self) -> bool:
        """True if a call costs a replay only."""
        return self._memory.device.type != "cuda" or self._graph is not None

    @torch.inference_mode()
    def capture(self) -> None:
        """Compiles the kernels by running the work, then records it; on a CPU nothing."""
        if self.ready:
            return
        # Triton launches on the current device, whatever device its tensors are on. The current
        # stream is named so that it is the current one afterwards even if the capture fails.
        with (
            _capturing,
            torch.cuda.device(self._memory.device),
            torch.cuda.stream(torch.cuda.current_stream(self._memory.device)),
        ):
            stream = _capture_stream(self._memory.device)
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(2):
                    self._work()
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            # Other threads of the process go on allocating and copying meanwhile.
            with (
                no_collection(),
                torch.cuda.graph(
                    graph,
                    pool=self._memory.handle(),
                    stream=stream,
                    capture_error_mode="thread_local",
                ),
            ):
                self._work()
        self._graph = graph

    def close(self) -> None:
        """Drops graph and work for good: the work holds the program that holds this graph."""
        if self._graph is not None:
            self._graph.reset()
            self._graph = None
        self._work = _closed

    @torch.inference_mode()
    def __call__(self) -> None:
        if self._graph is not None:
            self._graph.replay()
        else:
            self._work()


def _closed() -> None:
    raise RuntimeError("the program was closed")


class Staging:
    """Numbers on their way to and from the device: one transfer each way a call.

    `inputs` [n, B] int64 on the device; `send` fills it. The host's side is pinned where the device
    is CUDA, and is written again only after the device has read it: a call ends with
    `Results.receive` or the next waits for that, and a capture waits for the device before it
    records.
    """

    def __init__(self, names: Sequence[str], rows: int, device: torch.device) -> None:
        pinned = device.type == "cuda"
        self._host = torch.zeros(len(names), rows, dtype=torch.int64, pin_memory=pinned)
        self._inputs = torch.zeros(len(names), rows, dtype=torch.int64, device=device)
        self._lines = {name: index for index, name in enumerate(names)}

    def __getitem__(self, name: str) -> Tensor:
        """One named input on the device, [B] int64."""
        return self._inputs[self._lines[name]]

    def send(self, padding: Mapping[str, int], **values: Sequence[int]) -> None:
        """Sends each name's numbers, and its padding (0 if not given) behind them."""
        # One tensor of what is given: a call for each name would take longer than a small pass's
        # launch, and so would padding in lists for a large one.
        most = max(map(len, values.values()), default=0)
        pad = [padding.get(name, 0) for name in self._lines]
        lines = []
        for name, index in self._lines.items():
            given = values.get(name, ())
            lines.append([*given, *[pad[index]] * (most - len(given))])
        self._host[:, most:] = torch.tensor(pad).unsqueeze(1)
        self._host[:, :most] = torch.tensor(lines, dtype=torch.int64).view(len(lines), most)
        self._inputs.copy_(self._host, non_blocking=True)


class Results:
    """Results of a call for the host, in fp64, which holds ids and fp32 values exactly."""

    def __init__(self, shape: tuple[int, ...], device: torch.device) -> None:
        host = torch.zeros(shape, dtype=torch.float64)
        self._device = host.to(device)
        self._host = host.pin_memory() if device.type == "cuda" else host

    def fill(self, write: Callable[[Tensor], None]) -> None:
        """Part of the work: `write` stores the values of this call in the tensor that it gets."""
        write(self._device)

    def receive(self) -> Tensor:
        """Waits for the device, the only time in a call, and returns the values on the host."""
        self._host.copy_(self._device, non_blocking=True)
        if self._device.is_cuda:
            torch.cuda.current_stream(self._device.device).synchronize()
        return self._host


class Program:
    """The graphs of passes over up to B rows of L tokens each, over fixed buffers.

    A call sends every row's `slot` and `context_lens`, -1 and 0 for padding, and `inputs` of up to
    `width` numbers each.
    """

    def __init__(
        self,
        pool: StateTensors,
        rows: int,
        length: int,
        memory: GraphMemory,
        inputs: Sequence[str] = (),
        width: int | None = None,
        padding: Mapping[str, int] | None = None,
    ) -> None:
        self._pool = pool
        self._length = length
        self._memory = memory
        self._padding = {"slot": -1, **(padding or {})}
        self._staging = Staging(("slot", "context_lens", *inputs), width or rows, memory.device)
        ends = rows * length + 1
        self._starts = torch.arange(0, ends, length, dtype=torch.int32, device=memory.device)
        self._slots = torch.full((rows,), -1, dtype=torch.int32, device=memory.device)
        self._context_lens = torch.zeros_like(self._slots)
        self._graphs: list[CapturedGraph] = []
        self._calls = 0

    def capture(self) -> None:
        """Captures all graphs for padding alone, where that has not been done."""
        if all(graph.ready for graph in self._graphs):
            return
        self._staging.send(self._padding)
        for graph in self._graphs:
            graph.capture()

    def close(self) -> None:
        """Drops the graphs."""
        for graph in self._graphs:
            graph.close()

    def _add(self, work: Callable[[], None]) -> CapturedGraph:
        """Adds a part of the work, with a graph for it."""
        self._graphs.append(CapturedGraph(work, self._memory))
        return self._graphs[-1]

    def _read_rows(self) -> Rows:
        """Part of the work: the rows that were sent, as operators take them."""
        sent = self._staging["slot"], self._staging["context_lens"]
        real = dispatch.unpack_rows(*sent, self._slots, self._context_lens, self._length)
        return Rows(
            self._starts,
            self._slots,
            self._context_lens,
            self._pool.page_table,
            self._pool.page_tokens,
            self._length,
            real=self._real(real),
        )

    def _real(self, whole: Tensor) -> Tensor:
        """Part of the work: which tokens are not padding, [T] bool; `whole` where all rows have L
        tokens."""
        return whole

    def _begin(self, **values: Sequence[int]) -> None:
        """Sends a call's inputs; captures a shape that comes often."""
        if self._calls >= CAPTURE_AFTER:
            # Without room for the graph the work runs without one, and tries again later.
            self._calls = 0
            with suppress(torch.OutOfMemoryError):
                self.capture()
        self._calls += 1
        self._staging.send(self._padding, **values)


Key = TypeVar("Key", bound=Hashable)
Shape = TypeVar("Shape", bound=Program)


class Programs(Generic[Key, Shape]):
    """Programs over one pool by their shape, MAX_PROGRAMS at most: the least recently used are
    closed, and all when another pool is asked for."""

    def __init__(self, make: Callable[[StateTensors, Key], Shape]) -> None:
        self._make = make
        self._pool: StateTensors | None = None
        self._programs: OrderedDict[Key, Shape] = OrderedDict()

    def __len__(self) -> int:
        return len(self._programs)

    def of(self, pool: StateTensors, key: Key) -> Shape:
        """The program of a shape over the states of `pool`."""
        if self._pool is not pool:
            self._pool = pool
            self._drop(0)
        if key not in self._programs:
            self._drop(MAX_PROGRAMS - 1)
            self._programs[key] = self._make(pool, key)
        self._programs.move_to_end(key)
        return self._programs[key]

    def _drop(self, kept: int) -> None:
        while len(self._programs) > kept:
            self._programs.popitem(last=False)[1].close()
