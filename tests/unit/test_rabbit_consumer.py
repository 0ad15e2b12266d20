"""A consumer that was ended together with its connection says so: a role never looks alive while nobody works in it.

Schedule: the connection is closed (a restart of the broker was noticed) while the loop waits for the write of an ack;
the client ends what waits on a connection with CancelledError, so the loop's task is cancelled and nobody sees it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any, cast

import pytest

from contracts.failures import MessagingFailureError
from contracts.ports import Delivery
from contracts.settlement import Ack, Settlement
from resilience import rabbit
from resilience.rabbit import ConsumerPolicy, PausePolicy, RabbitConsumer, RabbitPublisher, RabbitReplies


async def handle(deliveries: Sequence[Delivery]) -> Sequence[Settlement]:
    return [Ack()] * len(deliveries)


async def probe() -> None:
    return None


class ClosedUnderAck:
    """A delivery whose connection ends while it is acked."""

    class _Raw:
        async def ack(self) -> None:
            raise asyncio.CancelledError

    raw_message = _Raw()


async def test_the_end_of_the_loop_is_told_even_when_it_was_cancelled() -> None:
    consumer = RabbitConsumer("amqp://nobody", [], handle, probe, ConsumerPolicy())
    consumer._loop = asyncio.create_task(asyncio.sleep(60))
    consumer._watcher = asyncio.create_task(asyncio.sleep(60))
    consumer._loop.cancel()
    try:
        with pytest.raises(MessagingFailureError):
            await asyncio.wait_for(consumer.join(), 5)
    finally:
        consumer._watcher.cancel()


async def test_an_ack_that_ends_with_its_connection_does_not_end_the_loop() -> None:
    held = rabbit._Held(cast("Delivery", None), cast("Any", ClosedUnderAck()))
    await asyncio.create_task(rabbit._ack(held))


async def test_an_ack_ends_with_its_own_task() -> None:
    class Slow:
        class _Raw:
            async def ack(self) -> None:
                await asyncio.sleep(60)

        raw_message = _Raw()

    task = asyncio.create_task(rabbit._ack(rabbit._Held(cast("Delivery", None), cast("Any", Slow()))))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_a_connection_that_is_lost_while_it_is_made_is_closed_and_not_consumed_from(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Schedule: the broker restarts between the connection and the last subscription; the client restores the
    connection by itself, perhaps without a consumer on some queue, and told of the loss before anybody listened.
    """
    made: list[Any] = []

    class Broker:
        def __init__(self, lost: Callable[[Any], None], times: int) -> None:
            self.lost, self.times, self.closed = lost, times, False
            self.connected = asyncio.Event()  # as its connection's, whose channels wait for it

        def subscriber(self, *_: object, **__: object) -> Callable[[Any], Any]:
            return lambda receive: receive

        async def start(self) -> None:
            for _ in range(self.times):
                self.lost(self)

        async def stop(self) -> None:
            self.closed = True

    def consuming(_url: str, _prefetch: int, lost: Callable[[Any], None]) -> Any:
        made.append(Broker(lost, 1 if not made else 0))
        return made[-1]

    monkeypatch.setattr(rabbit, "_consuming", consuming)
    for subscriber in (
        RabbitConsumer("amqp://nobody", ["a"], handle, probe, ConsumerPolicy()),
        RabbitReplies("amqp://nobody", "boot"),
    ):
        made.clear()
        with pytest.raises(MessagingFailureError):
            await subscriber._subscribe()
        assert made[0].closed
        assert made[0].connected.is_set()  # what its client waited to restore is let go
        assert subscriber._broker is None
        await subscriber._subscribe()
        assert subscriber._broker is made[1]
        assert [one.closed for one in made] == [True, False]


async def test_a_consumer_that_is_stopped_while_it_subscribes_leaves_no_connection(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Schedule: the connection is lost, and the stop comes while the next one is being made: its client would restore
    it for ever, with consumers whose deliveries nobody settles.
    """
    started = asyncio.Event()
    made: list[Any] = []

    class Broker:
        closed = False

        def subscriber(self, *_: object, **__: object) -> Callable[[Any], Any]:
            return lambda receive: receive

        async def start(self) -> None:
            if len(made) > 1:
                started.set()
                await asyncio.sleep(60)

        async def stop(self) -> None:
            await asyncio.sleep(0)
            self.closed = True

    def consuming(_url: str, _prefetch: int, _lost: Callable[[], None]) -> Any:
        made.append(Broker())
        return made[-1]

    async def found(_broker: object, queues: list[str]) -> list[str]:
        return queues

    monkeypatch.setattr(rabbit, "_consuming", consuming)
    monkeypatch.setattr(rabbit, "_found", found)
    policy = ConsumerPolicy(pause=PausePolicy(first_probe_s=0.001))
    consumer, replies = RabbitConsumer("amqp://nobody", ["a"], handle, probe, policy), RabbitReplies("amqp://x", "boot")
    for start, stop, lost in (
        (consumer.start, consumer.stop, consumer._lost),
        (replies.start, replies.close, replies._lost),
    ):
        made.clear()
        started.clear()
        await start()
        lost.set()
        await asyncio.wait_for(started.wait(), 5)
        await stop()
        assert [one.closed for one in made] == [True, True]


async def test_a_publisher_that_is_given_up_while_it_connects_leaves_no_task_of_its_client() -> None:
    """Such a task takes a cancellation for one more failed try: the loop of a role that failed would never end."""
    asked = asyncio.Event()

    async def silent(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked.set()
        await asyncio.sleep(60)

    server = await asyncio.start_server(silent, "127.0.0.1")
    port = server.sockets[0].getsockname()[1]
    before = asyncio.all_tasks()
    starting = asyncio.create_task(RabbitPublisher(f"amqp://127.0.0.1:{port}/", timeout_s=30).start())
    await asyncio.wait_for(asked.wait(), 5)
    serving = asyncio.all_tasks() - before - {starting}
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    left = {task for task in asyncio.all_tasks() - before if "silent" not in repr(task)}
    assert not left, left
    for task in serving:
        task.cancel()
    server.close()
