"""What processes cost, read from /proc: CPU seconds, resident memory, descriptors; and what machine this is.

Linux only. A process kind is a name given by the caller; the children of a process (PostgreSQL's backends, also those
that ended) count with it.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

_TICKS = os.sysconf("SC_CLK_TCK")
_PAGE = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True, slots=True)
class Cost:
    """CPU seconds since the start, resident bytes now, open descriptors now (0 where not readable)."""

    cpu_s: float
    rss: int
    descriptors: int


def costs(pids: Mapping[str, Sequence[int]]) -> dict[str, Cost]:
    """The cost of each kind; a process that is gone counts nothing."""
    children = _children()
    return {kind: _sum([_cost(pid) for root in roots for pid in _tree(root, children)]) for kind, roots in pids.items()}


def cpu_between(before: Mapping[str, Cost], after: Mapping[str, Cost]) -> dict[str, float]:
    """CPU seconds of each kind between two looks."""
    return {kind: max(0.0, cost.cpu_s - before[kind].cpu_s) for kind, cost in after.items() if kind in before}


def hardware() -> dict[str, str | int]:
    """Processor, cores, memory and kernel."""
    cpu = _field(Path("/proc/cpuinfo"), "model name")
    memory = _field(Path("/proc/meminfo"), "MemTotal")
    return {
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)),
        "memory": memory,
        "kernel": platform.release(),
        "python": platform.python_version(),
        "load_1min": f"{os.getloadavg()[0]:.2f}",
    }


def _field(path: Path, name: str) -> str:
    for line in path.read_text().splitlines():
        key, _, value = line.partition(":")
        if key.strip() == name:
            return value.strip()
    return "unknown"


def _stat(pid: int) -> list[str] | None:
    try:
        # The name in parentheses may hold spaces; the fields after it are fixed (proc(5)).
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except (OSError, IndexError):
        return None


def _children() -> dict[int, list[int]]:
    found: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):  # noqa: PTH208 - a path object per process would cost more than the look
        if entry.isdigit() and (fields := _stat(int(entry))) is not None:
            found.setdefault(int(fields[1]), []).append(int(entry))
    return found


def _tree(root: int, children: Mapping[int, Sequence[int]]) -> list[int]:
    return [root, *(pid for child in children.get(root, ()) for pid in _tree(child, children))]


def _cost(pid: int) -> Cost:
    fields = _stat(pid)
    if fields is None:
        return Cost(0.0, 0, 0)
    ticks = sum(int(field) for field in fields[11:15])  # utime, stime and those of children that were waited for
    try:
        descriptors = len(os.listdir(f"/proc/{pid}/fd"))  # noqa: PTH208 - see above
    except OSError:
        descriptors = 0
    return Cost(ticks / _TICKS, int(fields[21]) * _PAGE, descriptors)


def _sum(parts: Sequence[Cost]) -> Cost:
    return Cost(sum(p.cpu_s for p in parts), sum(p.rss for p in parts), sum(p.descriptors for p in parts))
