"""A consumer that was ended together with its connection says so: a role never looks alive while nobody works in it.

Schedule: the connection is closed (a restart of the broker was noticed) while the loop waits for the write of an ack;
the client ends what waits on a connection with CancelledError, so the loop's task is cancelled and nobody sees it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any, cast

import pytest

from contracts.failures import MessagingFailureError
from contracts.ports import Delivery
from contracts.settlement import Ack, Settlement
from resilience import rabbit
from resilience.rabbit import ConsumerPolicy, RabbitConsumer


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
