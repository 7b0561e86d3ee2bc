"""How launches are timed.

A contender is a list of calls on different buffers. The list becomes one CUDA graph, so that neither Python nor the
driver is measured, and the buffers together exceed the L2 cache, so that every call finds it cold (or the list repeats
one set of buffers, where a warm cache is what the real use has). Contenders take turns within each round, each round
begins with another one, and nothing waits for the host: a drifting clock favours nobody.
"""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import islice
from typing import Protocol

import torch

from fope_export.benchmark.rounds import in_turn, turns

Calls = Sequence[Callable[[], object]]
Times = dict[str, list[float]]
"""Microseconds a call, one for each round, by contender."""
WARM_UP = 3  # rounds that are not counted
BACKLOG = 4_000_000  # cycles, about 2 ms: the GPU starts when the host is well ahead


class Stopwatch(Protocol):
    """Times contenders against each other."""

    def time(self, contenders: Mapping[str, Calls], rounds: int) -> Times: ...


class GraphStopwatch:
    """On the GPU, between CUDA events."""

    def time(self, contenders: Mapping[str, Calls], rounds: int) -> Times:
        graphs = {name: capture(calls) for name, calls in contenders.items()}
        events = [
            (name, torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
            for order in turns([*contenders], WARM_UP + rounds)
            for name in order
        ]
        torch.cuda.synchronize()
        torch.cuda._sleep(BACKLOG)
        for name, start, end in events:
            start.record()
            graphs[name][0].replay()
            end.record()
        torch.cuda.synchronize()
        times: Times = {name: [] for name in contenders}
        for name, start, end in islice(events, WARM_UP * len(contenders), None):
            times[name].append(1e3 * start.elapsed_time(end) / len(contenders[name]))
        return times


def capture(calls: Calls) -> tuple[torch.cuda.CUDAGraph, list[object]]:
    """A graph of the calls, and what they returned: results that were freed would share memory, and stay in the cache.

    Everything is called once before, so that nothing compiles or loads while it is captured.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls[:2]:
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = [call() for call in calls]
    return graph, results


class HostStopwatch:
    """On the CPU, for the dry run: its numbers mean nothing."""

    def time(self, contenders: Mapping[str, Calls], rounds: int) -> Times:
        return in_turn({name: partial(self._called, calls) for name, calls in contenders.items()}, rounds)

    def _called(self, calls: Calls) -> float:
        started = time.perf_counter()
        for call in calls:
            call()
        return 1e6 * (time.perf_counter() - started) / len(calls)


def fastest(times: Times, prefix: str) -> str | None:
    """The contender with the least median among those whose names start so."""
    return min(
        (name for name in times if name.startswith(prefix)), key=lambda n: statistics.median(times[n]), default=None
    )
