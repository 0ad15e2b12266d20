"""Replies and the delivery ladder on a real broker: copies find who waits, refused decisions arrive in the end."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import httpx
import pika
import pika.exceptions
import pytest

from contracts.failures import MessagingFailureError
from contracts.messages import decision_message, delivery_message, reply_message
from contracts.ports import Confirm, DecisionRow, Message
from contracts.tenancy import TenantScope
from contracts.topology import DELIVERY_QUEUE, topology
from deploy.servers import ServerUrls
from resilience.management import BrokerManagement
from resilience.rabbit import ConsumerPolicy, RabbitConsumer, RabbitPublisher, RabbitReplies
from tests.fakes import InMemoryLedger, RecordingTelemetry
from workers.sinks.delivery import DeliverySink

pytestmark = pytest.mark.integration

ACME = TenantScope("acme")


def decision(event_id: str) -> Message:
    body = b'{"event_id":"' + event_id.encode() + b'"}'
    return decision_message(ACME, "risk", DecisionRow("d", 1, "APPROVED", body, b""), "c-1")


def some_event() -> str:
    return secrets.token_hex(16)


async def until(what: str, look: Callable[[], Awaitable[bool]], within_s: float = 15.0) -> None:
    """Wait on a condition with a deadline."""
    deadline = asyncio.get_running_loop().time() + within_s
    while not await look():
        assert asyncio.get_running_loop().time() < deadline, f"{what}: not within {within_s} s"
        await asyncio.sleep(0.1)


@pytest.fixture
async def publisher(servers: ServerUrls) -> AsyncIterator[RabbitPublisher]:
    made = RabbitPublisher(servers.rabbitmq)
    await made.start()
    yield made
    await made.close()


@pytest.fixture
async def replies(servers: ServerUrls) -> AsyncIterator[RabbitReplies]:
    made = RabbitReplies(servers.rabbitmq, secrets.token_hex(16))
    await made.start()
    yield made
    await made.close()


def declared(servers: ServerUrls, queue: str) -> int:
    """The broker's answer to a look at a queue by somebody else: 0 = it is there, else the code of its refusal."""
    with pika.BlockingConnection(pika.URLParameters(servers.rabbitmq)) as connection:
        try:
            connection.channel().queue_declare(queue, passive=True)
        except pika.exceptions.ChannelClosedByBroker as closed:
            return int(closed.reply_code)
    return 0


async def test_a_copy_finds_everybody_who_waits_for_its_event_and_nobody_else(
    replies: RabbitReplies, publisher: RabbitPublisher
) -> None:
    event, other = some_event(), some_event()
    waiting = [replies.wait(event, 10) for _ in range(3)]
    elsewhere = replies.wait(other, 0.5)
    copy = reply_message(replies.address, decision(event))
    assert await publisher.publish([copy]) == [Confirm.CONFIRMED]  # before anybody awaits an answer
    assert await asyncio.gather(*waiting) == [copy.body] * 3
    assert await elsewhere is None


async def test_a_copy_that_nobody_waits_for_harms_nothing(replies: RabbitReplies, publisher: RabbitPublisher) -> None:
    event = some_event()
    gone = replies.wait(event, 10)
    gone.cancel()
    late = replies.wait(event, 0.01)
    assert await late is None
    odd = reply_message(replies.address, decision(event))
    await publisher.publish([odd, Message("", replies.address, b"?", "odd", persistent=False, mandatory=False)])
    second = some_event()
    answer = replies.wait(second, 10)
    copy = reply_message(replies.address, decision(second))
    await publisher.publish([copy])
    assert await answer == copy.body


async def test_a_copy_for_a_process_that_is_gone_is_nothing(publisher: RabbitPublisher) -> None:
    copy = reply_message("risk.v1.reply.nobody", decision(some_event()))
    assert await publisher.publish([copy, copy]) == [Confirm.CONFIRMED] * 2


async def test_the_queue_is_its_processs_own_and_dies_with_it(servers: ServerUrls) -> None:
    replies = RabbitReplies(servers.rabbitmq, secrets.token_hex(16))
    await replies.start()
    waiting = replies.wait(some_event(), 60)
    assert await asyncio.to_thread(declared, servers, replies.address) == 405
    await replies.close()
    assert await waiting is None
    assert await asyncio.to_thread(declared, servers, replies.address) == 404


async def test_a_broker_that_is_not_there_is_an_error_that_says_so() -> None:
    with pytest.raises(MessagingFailureError, match="RabbitMQ"):
        await RabbitReplies("amqp://guest:guest@127.0.0.1:1/", "boot").start()


async def _close_connections_of(servers: ServerUrls, queue: str) -> bool:
    """Let the broker end the connection that a queue is exclusive to; whether it knew of one."""
    async with httpx.AsyncClient(base_url=servers.rabbitmq_management, timeout=10) as client:
        answer = await client.get(f"/api/queues/%2F/{queue}")
        if answer.status_code == 404:
            return False
        owner: dict[str, Any] = answer.json().get("owner_pid_details") or {}
        if not owner.get("name"):
            return False
        gone = await client.delete(f"/api/connections/{owner['name']}".replace(" ", "%20").replace(">", "%3E"))
        return gone.status_code == 204


async def test_after_a_lost_connection_the_queue_is_there_again(
    servers: ServerUrls, replies: RabbitReplies, publisher: RabbitPublisher
) -> None:
    await until("the connection is killed", lambda: _close_connections_of(servers, replies.address))
    event = some_event()
    copy = reply_message(replies.address, decision(event))
    answer = replies.wait(event, 20)

    async def answered() -> bool:
        await publisher.publish([copy])  # what is sent meanwhile is lost
        return answer.done()

    await until("a copy arrives", answered)
    assert await answer == copy.body


async def test_a_decision_that_upstreams_queue_refuses_arrives_once_there_is_room(
    servers: ServerUrls, publisher: RabbitPublisher
) -> None:
    management = BrokerManagement(servers.rabbitmq_management)
    await management.apply(topology(1))
    await management.close()
    queue, event = f"full-{secrets.token_hex(4)}", some_event()
    sent, telemetry = decision(event), RecordingTelemetry()
    with pika.BlockingConnection(pika.URLParameters(servers.rabbitmq)) as connection:
        channel = connection.channel()
        full = {"x-max-length": 1, "x-overflow": "reject-publish"}
        channel.queue_declare(queue, arguments=full, auto_delete=False, exclusive=False)
        channel.queue_bind(queue, sent.exchange, sent.routing_key)
        channel.basic_publish("", queue, b"in the way")
        assert await publisher.publish([sent]) == [Confirm.REFUSED]

        async def nothing_to_probe() -> None:
            return

        sink = DeliverySink(InMemoryLedger(), publisher, telemetry)
        consumer = RabbitConsumer(servers.rabbitmq, [DELIVERY_QUEUE], sink.handle, nothing_to_probe, ConsumerPolicy())
        await consumer.start()
        try:
            first = delivery_message(sent, 1, 100)
            assert await publisher.publish([first]) == [Confirm.CONFIRMED]

            async def counted(result: str) -> bool:
                return telemetry.count("riskfleet_decision_deliveries_total", result=result) >= 1

            await until("refused once more", lambda: counted("again"))
            channel.queue_purge(queue)
            await until("delivered", lambda: counted("delivered"))
        finally:
            await consumer.stop()
        _, properties, body = channel.basic_get(queue, auto_ack=True)
        assert (body, properties.message_id, properties.headers["revision"]) == (sent.body, sent.message_id, 1)
        channel.queue_delete(queue)
