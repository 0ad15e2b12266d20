"""Deliveries that wait for the handler, taken in turn by queue: a long queue delays its own deliveries only.

Promises order within a queue, and that between two of one queue every other queue that holds something has its turn.
Does not weigh a delivery by how many events it holds.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


class Turns(asyncio.Queue[T]):
    """An unbounded queue of queues; `queue_of` names the one that an item belongs to."""

    def __init__(self, queue_of: Callable[[T], str]) -> None:
        self._queue_of = queue_of
        self._held: dict[str, deque[T]] = {}
        self._size = 0
        super().__init__()

    def _init(self, maxsize: int) -> None:  # noqa: ARG002 - the signature is asyncio's
        self._held.clear()

    def qsize(self) -> int:
        """How many items wait."""
        return self._size

    def empty(self) -> bool:
        """Whether nothing waits."""
        return not self._size

    def _put(self, item: T) -> None:
        self._held.setdefault(self._queue_of(item), deque()).append(item)
        self._size += 1

    def _get(self) -> T:
        name = next(iter(self._held))
        held = self._held.pop(name)
        item = held.popleft()
        self._size -= 1
        if held:  # to the end: it has its next turn after all others
            self._held[name] = held
        return item
