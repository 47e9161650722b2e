"""Times and memory of calls that are compared within one process."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import profile

Call = Callable[[], object]


def compare(calls: dict[str, Call], repeats: int) -> dict[str, float]:
    """Median seconds of each call, interleaved."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for repeat in range(repeats + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if torch.cuda.is_initialized():
                torch.cuda.synchronize()
            if repeat:  # the first one warms up
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def peak_memory(call: Call) -> float:
    """MB allocated at once during a call, over what was there before."""
    with profile(profile_memory=True) as record:
        call()
    results: Any = record.profiler and record.profiler.kineto_results
    level = peak = 0
    for event in sorted(results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            level += event.nbytes()
            peak = max(peak, level)
    return peak / 2**20
