"""Reads a trace of `jax.profiler`: how long each kernel ran on the first accelerator."""

import re
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from jax.profiler import ProfileData


class Kernels(NamedTuple):
    """What ran on one device. Kernels that differ by a number at the end of their name are one."""

    seconds: Counter[str]
    calls: Counter[str]
    busy_seconds: float  # in which at least one kernel ran
    span_seconds: float  # from the first kernel's start to the last one's end


def read_trace(directory: Path) -> Kernels:
    """Of the trace that `jax.profiler.trace` wrote there; on a CPU the operations of its threads."""
    [path] = directory.glob("plugins/profile/*/*.xplane.pb")
    planes = list(ProfileData.from_file(str(path)).planes)
    gpus = [plane for plane in planes if plane.name.startswith("/device:GPU")]
    spans: list[tuple[float, float]] = []
    seconds: Counter[str] = Counter()
    calls: Counter[str] = Counter()
    for plane in gpus[:1] or [p for p in planes if "CPU" in p.name]:
        for line in plane.lines:
            if gpus and not line.name.startswith("Stream"):
                continue  # what is derived from the streams (modules, operations, steps)
            for event in line.events:
                name = re.sub(r"[._]\d+$", "", event.name)
                seconds[name] += event.duration_ns * 1e-9
                calls[name] += 1
                spans.append((event.start_ns * 1e-9, event.end_ns * 1e-9))
    return Kernels(seconds, calls, *_union(spans))


def _union(spans: list[tuple[float, float]]) -> tuple[float, float]:
    """(length of the union, distance between its ends) of intervals."""
    if not spans:
        return 0.0, 0.0
    spans = sorted(spans)
    covered, reached = 0.0, spans[0][0]
    for start, end in spans:
        covered += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return covered, reached - spans[0][0]
