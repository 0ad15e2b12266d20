"""The twin of `resilience.rabbit.RabbitConsumer`: groups, acks and pauses over a MemoryBroker.

Promises the same interface and the same grouping: a group is whatever gathered while the handler worked on the
one before, one delivery when idle. A server that fails pauses the loop, nothing is acked, and after
`PausePolicy.return_after_s` the deliveries go back. Waits only by the broker's injected `sleep`.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import structlog

from contracts.failures import InfrastructureError, MessagingFailureError
from contracts.ports import Delivery
from contracts.settlement import Ack, Hold, Pause, Settlement
from resilience.memory.queue import Stored, Subscription, delivered_headers
from resilience.memory.time import first_of
from resilience.rabbit import ConsumerPolicy, Handler, Probe
from resilience.turns import Turns

if TYPE_CHECKING:
    from resilience.memory.broker import Connection, MemoryBroker

log = structlog.get_logger("memory")

_SEEN = 20_000
_STOP_S = 10.0


@dataclass(slots=True)
class _Held:
    delivery: Delivery
    connection: Connection
    subscription: Subscription
    tag: int


class MemoryConsumer:
    """One handler over some queues that exist already. `kill` ends it as kill -9 ends a process."""

    def __init__(
        self,
        broker: MemoryBroker,
        queues: Sequence[str],
        handler: Handler,
        probe: Probe,
        policy: ConsumerPolicy,
        name: str,
    ) -> None:
        """`probe` answers when every server that the handler needs is back, and raises until then."""
        self._memory = broker
        self._queues = list(queues)
        self._handler = handler
        self._probe = probe
        self._policy = policy
        self._name = name
        self._waiting: Turns[_Held] = Turns(lambda held: held.delivery.queue)
        self._bell = asyncio.Event()
        self._seen: OrderedDict[tuple[str, str | None, int], None] = OrderedDict()
        self._connection: Connection | None = None
        self._loop: asyncio.Task[None] | None = None
        self._watcher: asyncio.Task[None] | None = None
        self._lost = asyncio.Event()
        self._stopping = asyncio.Event()
        self._holding: set[asyncio.Task[None]] = set()
        self.paused_reason: str | None = None

    async def start(self) -> None:
        """Subscribe and begin to work. Raises MessagingFailureError when the broker is down or lacks a queue."""
        self._subscribe()
        self._loop = asyncio.create_task(self._work(), name="consumer")
        self._watcher = asyncio.create_task(self._watch(), name="consumer-watch")

    def _subscribe(self, *, again: bool = False) -> None:
        """`again`: a queue that was deleted meanwhile is left, or it would keep the others waiting."""

        def lost() -> None:
            if self._connection is connection:
                self._lost.set()

        connection = self._memory.connect(self._name, lost)
        self._connection = connection
        if again:
            missing = {queue for queue in self._queues if self._memory.lookup(queue) is None}
            for queue in sorted(missing):
                log.error("queue.missing", queue=queue)
            self._queues = [queue for queue in self._queues if queue not in missing]
        try:
            for queue in self._queues:
                self._attach(connection, queue)
        except MessagingFailureError:
            self._give_back()
            raise

    def _attach(self, connection: Connection, queue: str) -> None:
        def receive(subscription: Subscription, tag: int, stored: Stored) -> None:
            self._waiting.put_nowait(_Held(self._delivery(subscription, stored), connection, subscription, tag))
            self._bell.set()

        self._memory.subscribe(connection, queue, self._policy.prefetch, receive)

    async def _watch(self) -> None:
        """After a lost connection subscribe afresh."""
        while True:
            await self._lost.wait()
            self._lost.clear()
            self.paused_reason = "the connection to the broker was lost"
            log.warning("consumer.lost", count=len(self._queues))
            self._give_back()
            wait = self._policy.pause.first_probe_s
            while self._connection is None:
                await self._memory.sleep(wait)
                wait = min(wait * 2, self._policy.pause.longest_probe_s)
                with contextlib.suppress(MessagingFailureError):
                    self._subscribe(again=True)
            self.paused_reason = None
            log.info("consumer.subscribed", count=len(self._queues))

    async def add_queue(self, queue: str) -> None:
        """Consume one more queue of the running consumer. Raises MessagingFailureError; call it again then."""
        connection = self._connection
        if queue in self._queues or connection is None:
            return
        self._attach(connection, queue)
        self._queues.append(queue)

    async def drop_queue(self, queue: str) -> None:
        """Take nothing more from a queue until it is added again; what it delivered already is worked on."""
        if queue not in self._queues:
            return
        self._queues.remove(queue)
        if self._connection is not None:
            self._memory.unsubscribe(self._connection, queue)

    @property
    def queues(self) -> tuple[str, ...]:
        """What is consumed."""
        return tuple(self._queues)

    def _delivery(self, subscription: Subscription, stored: Stored) -> Delivery:
        queue, m = subscription.queue, stored.message
        key = (queue.name, m.message_id, hash(m.body))
        seen = key in self._seen
        self._seen[key] = None
        if len(self._seen) > _SEEN:
            self._seen.popitem(last=False)
        return Delivery(
            queue=queue.name,
            body=m.body,
            routing_key=m.routing_key,
            message_id=m.message_id,
            user_id=m.user_id,
            correlation_id=m.correlation_id,
            content_type=m.content_type,
            headers=delivered_headers(queue, stored),
            redelivered=stored.returns > 0,
            seen=seen,
        )

    async def _work(self) -> None:
        """Give the handler group after group; pause it when a server fails; never die."""
        while not self._stopping.is_set():
            group = await self._next_group()
            while group and not self._stopping.is_set():
                try:
                    settled = await self._handler([held.delivery for held in group])
                except InfrastructureError as error:
                    settled = [Pause(type(error).__name__)] * len(group)
                except Exception as error:  # a defect of the handler must not end the consumer: try again, paused
                    log.exception("consumer.defect", exception_class=type(error).__name__)
                    settled = [Pause("defect")] * len(group)
                group = self._settle(group, settled)
                if group:
                    group = await self._pause(group)

    async def _next_group(self) -> list[_Held]:
        await self._memory.sleep(0)  # publishers and other consumers run between two groups
        while self._waiting.empty():
            if self._stopping.is_set():
                return []
            self._bell.clear()
            await self._bell.wait()
        if self._policy.linger_s and self._waiting.qsize() <= self._policy.group:
            await self._memory.sleep(self._policy.linger_s)
        group = [self._waiting.get_nowait()]
        events = group[0].delivery.events
        while events < self._policy.group and not self._waiting.empty():
            group.append(self._waiting.get_nowait())
            events += group[-1].delivery.events
        return [held for held in group if held.connection.alive]

    def _settle(self, group: Sequence[_Held], settled: Sequence[Settlement]) -> list[_Held]:
        """Ack what settled; the rest is still in our hands."""
        left: list[_Held] = []
        acked: dict[Subscription, list[int]] = {}
        for held, settlement in zip(group, settled, strict=True):
            if isinstance(settlement, Hold):
                self._hold(held, settlement)
            elif not isinstance(settlement, Ack):
                left.append(held)
                self.paused_reason = settlement.reason
            else:  # on a lost connection the ack is lost too: the delivery comes again and is found to be done
                acked.setdefault(held.subscription, []).append(held.tag)
        for subscription, tags in acked.items():
            self._memory.ack(subscription, tags)
        return left

    def _hold(self, held: _Held, hold: Hold) -> None:
        """Put one aside: its queue's prefetch is what it takes away, and all others go on."""

        async def later() -> None:
            await self._memory.sleep(hold.seconds)
            if held.connection.alive:
                self._waiting.put_nowait(held)
                self._bell.set()

        task = asyncio.ensure_future(later())
        self._holding.add(task)
        task.add_done_callback(self._holding.discard)

    async def _pause(self, group: list[_Held]) -> list[_Held]:
        """Wait until the probe answers; give the deliveries back when that takes too long."""
        clock = self._memory.clock
        began, wait = clock.monotonic(), self._policy.pause.first_probe_s
        log.warning("consumer.paused", reason=self.paused_reason, count=len(group))
        returned = False
        while not self._stopping.is_set():
            await first_of(self._stopping.wait(), self._memory.sleep(wait))
            wait = min(wait * 2, self._policy.pause.longest_probe_s)
            try:
                await self._probe()
                if returned and self._connection is None:
                    self._subscribe(again=True)
                break
            except InfrastructureError as error:
                self.paused_reason = type(error).__name__
            if not returned and clock.monotonic() - began > self._policy.pause.return_after_s:
                returned = True
                self._give_back()
        log.info("consumer.resumed", seconds=round(clock.monotonic() - began, 1))
        self.paused_reason = None
        return [] if returned else [held for held in group if held.connection.alive]

    def _give_back(self) -> None:
        """Closing the connection returns every unacked delivery, uncounted as an attempt."""
        connection, self._connection = self._connection, None
        if connection is not None:
            self._memory.disconnect(connection)
        while not self._waiting.empty():
            self._waiting.get_nowait()
        for task in self._holding:
            task.cancel()

    async def join(self) -> None:
        """Runs as long as the consumer does; raises what ended it, so that a role never looks alive while it is not."""
        if self._loop is not None and self._watcher is not None:
            done, _ = await asyncio.wait({self._loop, self._watcher}, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()

    async def stop(self) -> None:
        """Finish the group in hand, then close; what was not worked on goes back to the broker."""
        self._stopping.set()
        self._bell.set()
        if self._watcher is not None:
            self._watcher.cancel()
        if self._loop is not None:
            await first_of(asyncio.wait({self._loop}), self._memory.sleep(_STOP_S))
            self._loop.cancel()
        self._give_back()

    def kill(self) -> None:
        """The process is gone: nothing more is settled, what it held goes back to the queues, counted."""
        self._give_back()
        for task in (self._loop, self._watcher):
            if task is not None:
                task.cancel()
