"""Group commit at the door: concurrent calls of one port function become one call.

A group is whatever gathered while the previous call was in flight: when idle a group is one item, and
nothing ever waits for company. Promises that a caller that goes away takes nothing from its neighbours.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Generic, TypeVar

from contracts.failures import InfrastructureError

Item = TypeVar("Item")
Answer = TypeVar("Answer")


class Gathered(Generic[Item, Answer]):
    """`one(item)` joins the next call of `call`, which takes and returns sequences of at most `limit`."""

    def __init__(self, call: Callable[[Sequence[Item]], Awaitable[Sequence[Answer]]], limit: int = 64) -> None:
        self._call = call
        self._limit = limit
        self._waiting: list[tuple[Item, asyncio.Future[Answer]]] = []
        self._running: asyncio.Task[None] | None = None

    async def one(self, item: Item) -> Answer:
        """The answer for `item`. Raises what the call raised."""
        future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._waiting.append((item, future))
        if self._running is None:
            self._running = asyncio.create_task(self._drain())
        return await future

    async def _drain(self) -> None:
        while self._waiting:
            group, self._waiting = self._waiting[: self._limit], self._waiting[self._limit :]
            await self._answer(group)
        self._running = None

    async def _answer(self, group: list[tuple[Item, asyncio.Future[Answer]]]) -> None:
        try:
            answers = await self._call([item for item, _ in group])
        except Exception as error:  # noqa: BLE001 - handed to each caller
            if len(group) > 1 and not isinstance(error, InfrastructureError):
                for pair in group:  # one bad item must not fail its neighbours
                    await self._answer([pair])
                return
            for _, future in group:
                if not future.done():
                    future.set_exception(error)
            return
        for (_, future), answer in zip(group, answers, strict=True):
            if not future.done():
                future.set_result(answer)
