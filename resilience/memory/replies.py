"""The twin of `resilience.rabbit.RabbitReplies`: copies of decisions over an exclusive queue of a MemoryBroker.

Promises that whoever waits gets a copy that arrives; nothing about copies that are sent while the broker is down.
"""

from __future__ import annotations

import asyncio
import contextlib
from functools import partial

from contracts.failures import MessagingFailureError
from contracts.topology import reply_queue
from resilience.memory.broker import Connection, MemoryBroker
from resilience.memory.queue import Stored, Subscription
from resilience.rabbit import PausePolicy

_REPLIES = 10_000


class MemoryReplies:
    """Replies for one process; `boot` names it and nobody else. Nothing is connected before `start()`."""

    def __init__(self, broker: MemoryBroker, boot: str) -> None:
        self._broker = broker
        self._address = reply_queue(boot)
        self._waiting: dict[str, dict[asyncio.Future[bytes | None], None]] = {}
        self._connection: Connection | None = None
        self._watcher: asyncio.Task[None] | None = None
        self._lost = asyncio.Event()

    @property
    def address(self) -> str:
        """The name of the queue."""
        return self._address

    async def start(self) -> None:
        """Declare the queue. Raises MessagingFailureError when the broker is down."""
        self._subscribe()
        self._watcher = asyncio.create_task(self._watch(), name="replies-watch")

    def wait(self, event_id: str, timeout_s: float) -> asyncio.Future[bytes | None]:
        """The next copy of this event's decision, None after `timeout_s`; waiting begins with the call."""
        reply: asyncio.Future[bytes | None] = asyncio.get_running_loop().create_future()
        timer = asyncio.ensure_future(self._broker.sleep(timeout_s))
        timer.add_done_callback(partial(_answer, reply, None))
        self._waiting.setdefault(event_id, {})[reply] = None

        def forget(_: object) -> None:
            timer.cancel()
            waiting = self._waiting.get(event_id, {})
            waiting.pop(reply, None)
            if not waiting:
                self._waiting.pop(event_id, None)

        reply.add_done_callback(forget)
        return reply

    def _subscribe(self) -> None:
        connection = self._broker.connect(self._address, self._lost.set)
        self._broker.declare_exclusive(connection, self._address, max_length=_REPLIES)
        self._broker.subscribe(connection, self._address, _REPLIES, self._receive)
        self._connection = connection

    def _receive(self, subscription: Subscription, tag: int, stored: Stored) -> None:
        """Settled as it comes; the ack follows in the loop's next step, since this is called from within a delivery."""
        asyncio.get_running_loop().call_soon(self._broker.ack, subscription, (tag,))
        for reply in list(self._waiting.get(str(stored.message.headers.get("event_id")), ())):
            _answer(reply, stored.message.body)

    async def _watch(self) -> None:
        """After a lost connection subscribe afresh."""
        pause = PausePolicy()
        while True:
            await self._lost.wait()
            self._lost.clear()
            self._connection, wait = None, pause.first_probe_s
            while self._connection is None:
                await self._broker.sleep(wait)
                wait = min(wait * 2, pause.longest_probe_s)
                with contextlib.suppress(MessagingFailureError):
                    self._subscribe()

    async def close(self) -> None:
        """Remove the queue; whoever still waits is answered None at once."""
        if self._watcher is not None:
            self._watcher.cancel()
        for waiting in list(self._waiting.values()):
            for reply in waiting:
                _answer(reply, None)
        connection, self._connection = self._connection, None
        if connection is not None:
            self._broker.disconnect(connection)


def _answer(reply: asyncio.Future[bytes | None], body: bytes | None, _timer: object = None) -> None:
    if not reply.done():
        reply.set_result(body)
