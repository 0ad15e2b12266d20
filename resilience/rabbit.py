"""RabbitMQ: publishing with confirms, and consuming in groups; the only module that knows the client.

Publishing: own connection, persistent, confirmed, under a timeout; a timeout means *unknown*.
Consuming: FastStream subscribers (manual acks, explicit prefetch) hand deliveries to one loop per
consumer, which gives its handler whatever gathered while the previous group was worked on: when
idle a group is one delivery, and nothing waits. An infrastructure failure pauses the loop; nothing is
acked, and after `PausePolicy.return_after_s` the deliveries go back to the broker.
Replies: an exclusive queue of this process for copies that may be lost; nothing is acked and nothing paused.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import aio_pika
import aio_pika.abc
import aiormq.exceptions
import structlog
from faststream import AckPolicy
from faststream.rabbit import Channel, RabbitBroker, RabbitQueue
from faststream.rabbit.annotations import RabbitMessage
from pamqp.commands import Basic

from contracts.failures import InfrastructureError, MessagingFailureError, StagePausedError
from contracts.ports import Confirm, Delivery, Message
from contracts.settlement import Ack, Hold, Pause, Settlement
from contracts.topology import reply_queue
from resilience.replies import ReplyBoard
from resilience.turns import Turns

log = structlog.get_logger("rabbit")

Handler = Callable[[Sequence[Delivery]], Awaitable[Sequence[Settlement]]]
Probe = Callable[[], Awaitable[None]]
Losses = list[aio_pika.abc.AbstractConnection]
"""A broker's connection, once for each time it was lost."""

_CLIENT_ERRORS = (aiormq.exceptions.AMQPError, ConnectionError, OSError, TimeoutError, RuntimeError)
_CONNECT_S, _START_S = 10.0, 15.0
"""How long to wait for a connection, and for a start as a whole (s); a try that is cut off from outside lives on."""
_FINISH_S, _RELEASE_S, _CLOSE_S = 8.0, 2.0, 4.0
"""How long a stop waits for the group in hand, for a stuck one to let go, and for the connection to close (s)."""
_REPLIES = 10_000
"""Copies of decisions that may wait for a process to read them; the oldest are dropped beyond that."""


class RabbitPublisher:
    """Publisher on a connection of its own: a blocked connection must not stop consuming."""

    def __init__(self, url: str, *, timeout_s: float = 5.0, name: str = "riskfleet-publisher") -> None:
        """Nothing is connected before `start()`."""
        self._url = url
        self._timeout_s = timeout_s
        self._name = name
        self._connection: aio_pika.abc.AbstractRobustConnection | None = None
        self._channel: aio_pika.abc.AbstractChannel | None = None
        self._loose: aio_pika.abc.AbstractChannel | None = None
        self._in_flight: dict[str, asyncio.Event] = {}

    async def start(self) -> None:
        """Connect. Raises MessagingFailureError when the broker does not answer."""
        try:
            async with asyncio.timeout(self._timeout_s * 2):
                connection = await aio_pika.connect_robust(
                    self._url,
                    timeout=self._timeout_s,
                    reconnect_interval=0.5,
                    client_properties={"connection_name": self._name},
                    connection_class=self._made,
                )
                await self._open_channels(connection)
        except _CLIENT_ERRORS as error:
            await self.close()
            raise MessagingFailureError(
                f"RabbitMQ does not answer ({type(error).__name__}); is it up, and is RABBITMQ_URL right?"
            ) from error
        except asyncio.CancelledError:
            await self.close()
            raise

    def _made(self, *args: Any, **kwargs: Any) -> aio_pika.RobustConnection:
        """The connection, known before it is made: one that is given up half-way connects for ever unless closed, and
        does not let its loop end.
        """
        self._connection = connection = aio_pika.RobustConnection(*args, **kwargs)
        return connection

    async def publish(self, messages: Sequence[Message]) -> Sequence[Confirm]:
        """Publish all and await their confirms together; one Confirm per message."""
        return await asyncio.gather(*(self._publish(message) for message in messages))

    async def _publish(self, message: Message) -> Confirm:
        """One at a time per message id: the client matches returns by id, and would swap two in flight."""
        while (other := self._in_flight.get(message.message_id)) is not None:
            await other.wait()
        done = self._in_flight[message.message_id] = asyncio.Event()
        try:
            return await self._send(message)
        finally:
            del self._in_flight[message.message_id]
            done.set()

    async def _send(self, message: Message) -> Confirm:
        channel = self._channel if message.confirm else self._loose
        if channel is None or channel.is_closed:
            return Confirm.UNKNOWN
        try:
            async with asyncio.timeout(self._timeout_s):
                # The abstract channel lacks `wait`, which its only implementation has.
                result = await (await channel.get_underlay_channel()).basic_publish(  # type: ignore[call-arg]
                    message.body,
                    exchange=message.exchange,
                    routing_key=message.routing_key,
                    properties=Basic.Properties(
                        headers=dict(message.headers),
                        message_id=message.message_id,
                        correlation_id=message.correlation_id,
                        content_type=message.content_type,
                        user_id=message.user_id,
                        delivery_mode=2 if message.persistent else 1,
                    ),
                    mandatory=message.mandatory,
                    wait=False,  # a confirm says more than the socket, and the next message need not wait for either
                )
        except aiormq.exceptions.PublishError:
            return Confirm.UNROUTABLE
        except aiormq.exceptions.DeliveryError:
            return Confirm.REFUSED
        except _CLIENT_ERRORS as error:
            log.warning("publish.unknown", exception_class=type(error).__name__)
            return Confirm.UNKNOWN
        if not message.confirm or isinstance(result, Basic.Ack):
            return Confirm.CONFIRMED
        return Confirm.UNKNOWN

    async def ping(self) -> None:
        """Publish a message that nobody receives and await its confirm. Raises MessagingFailureError.

        A channel that its connection did not restore is replaced, so that the next ping finds it open.
        """
        nobody = Message("", "risk.ping", b"", f"ping:{self._name}:{id(self)}", persistent=False, mandatory=False)
        if await self._publish(nobody) is Confirm.CONFIRMED:
            return
        connection = self._connection
        if connection is not None and connection.connected.is_set():
            with contextlib.suppress(*_CLIENT_ERRORS):
                async with asyncio.timeout(self._timeout_s):
                    await self._open_channels(connection)
        raise MessagingFailureError("RabbitMQ did not confirm a message")

    async def _open_channels(self, connection: aio_pika.abc.AbstractRobustConnection) -> None:
        old = (self._channel, self._loose)
        self._channel = await connection.channel(publisher_confirms=True, on_return_raises=True)
        self._loose = await connection.channel(publisher_confirms=False)
        for channel in old:
            if channel is not None and not channel.is_closed:
                await channel.close()

    async def close(self) -> None:
        """Close the connection."""
        if self._connection is not None:
            with contextlib.suppress(*_CLIENT_ERRORS):
                async with asyncio.timeout(_CLOSE_S):
                    await self._connection.close()


@dataclass(frozen=True, slots=True)
class PausePolicy:
    """How a consumer behaves while a server fails (seconds): probe intervals, and when deliveries go back.

    `hold_s` is how long one delivery that has to wait alone is kept: a return counts as a delivery on a quorum queue.
    """

    first_probe_s: float = 0.2
    longest_probe_s: float = 2.0
    return_after_s: float = 300.0
    hold_s: float = 1_200.0


@dataclass(frozen=True, slots=True)
class ConsumerPolicy:
    """How much a consumer holds: unacked messages per queue, and the events after which a group is large enough.

    A group ends with the carrier that fills it, so it holds fewer than `group` + 64 events.
    `linger_s` is for sinks only: nobody waits for a record, so a group may gather for a moment and cost one commit.
    """

    prefetch: int = 128
    group: int = 64
    linger_s: float = 0.0
    pause: PausePolicy = field(default_factory=PausePolicy)


@dataclass(slots=True)
class _Held:
    delivery: Delivery
    message: RabbitMessage
    since: float = 0.0


class RabbitConsumer:
    """One handler over some queues. Queues are looked at passively: `riskfleet topology apply` makes them."""

    def __init__(self, url: str, queues: Sequence[str], handler: Handler, probe: Probe, policy: ConsumerPolicy) -> None:
        """`probe` answers when every server that the handler needs is back, and raises until then."""
        self._url = url
        self._queues = list(queues)
        self._handler = handler
        self._probe = probe
        self._policy = policy
        self._waiting: Turns[_Held] = Turns(lambda held: held.delivery.queue)
        self._seen: OrderedDict[str, None] = OrderedDict()
        self._subscribers: dict[str, Any] = {}
        self._broker: RabbitBroker | None = None
        self._losses: Losses = []
        self._loop: asyncio.Task[None] | None = None
        self._watcher: asyncio.Task[None] | None = None
        self._lost = asyncio.Event()
        self._stopping = asyncio.Event()
        self.paused_reason: str | None = None

    async def start(self) -> None:
        """Connect, subscribe and begin to work. Raises MessagingFailureError when the broker does not answer."""
        await self._subscribe()
        self._loop = asyncio.create_task(self._work(), name="consumer")
        self._watcher = asyncio.create_task(self._watch(), name="consumer-watch")

    async def _subscribe(self, *, again: bool = False) -> None:
        """`again`: a queue that was deleted meanwhile is left, or it would keep the others waiting."""
        losses: Losses = []

        def lost(connection: aio_pika.abc.AbstractConnection, *_: object) -> None:
            losses.append(connection)
            if self._broker is broker:
                self._lost.set()

        broker = _consuming(self._url, self._policy.prefetch, lost)
        async with _closed_on_failure(broker, losses):
            if again:
                self._queues = await _found(broker, self._queues)
            self._subscribers = {queue: self._attach(broker, queue) for queue in self._queues}
            await _start(broker)
            _refuse_if(losses)
        self._broker, self._losses = broker, losses

    async def _watch(self) -> None:
        """After a lost connection subscribe afresh: the client's own restoring may leave queues without a consumer."""
        while True:
            await self._lost.wait()
            self._lost.clear()
            self.paused_reason = "the connection to RabbitMQ was lost"
            log.warning("consumer.lost", count=len(self._queues))
            await self._give_back()
            wait = self._policy.pause.first_probe_s
            while self._broker is None:
                await asyncio.sleep(wait)
                wait = min(wait * 2, self._policy.pause.longest_probe_s)
                with contextlib.suppress(MessagingFailureError):
                    await self._subscribe(again=True)
            self.paused_reason = None
            log.info("consumer.subscribed", count=len(self._queues))

    def _attach(self, broker: RabbitBroker, queue: str) -> Any:
        async def receive(_body: bytes) -> None:
            message: RabbitMessage = broker.context.get_local("message")
            self._waiting.put_nowait(_Held(self._delivery(queue, message), message))

        subscriber = broker.subscriber(
            RabbitQueue(queue, declare=False),
            ack_policy=AckPolicy.MANUAL,
            no_reply=True,
            decoder=_raw_body,
        )
        subscriber(receive)
        self._subscribers[queue] = subscriber
        return subscriber

    async def add_queue(self, queue: str) -> None:
        """Consume one more queue of the running consumer. Raises MessagingFailureError; call it again then."""
        broker = self._broker
        if queue in self._queues or broker is None:
            return
        try:
            async with asyncio.timeout(_START_S):
                await _look(broker, queue)
                await self._attach(broker, queue).start()
        except _CLIENT_ERRORS as error:
            raise MessagingFailureError(f"cannot consume {queue} yet ({type(error).__name__})") from error
        self._queues.append(queue)

    async def drop_queue(self, queue: str) -> None:
        """Take nothing more from a queue until it is added again; what it delivered already is worked on."""
        if queue not in self._queues:
            return
        self._queues.remove(queue)
        subscriber = self._subscribers.pop(queue, None)
        if subscriber is not None and self._broker is not None:
            with contextlib.suppress(*_CLIENT_ERRORS):  # a lost connection takes the subscription with it
                async with asyncio.timeout(_START_S):
                    await subscriber.stop()

    @property
    def queues(self) -> tuple[str, ...]:
        """What is consumed."""
        return tuple(self._queues)

    def _delivery(self, queue: str, message: RabbitMessage) -> Delivery:
        raw = message.raw_message
        key = f"{queue}|{raw.message_id}|{hash(raw.body)}"
        seen = key in self._seen
        self._seen[key] = None
        if len(self._seen) > 20_000:
            self._seen.popitem(last=False)
        return Delivery(
            queue=queue,
            body=raw.body,
            routing_key=raw.routing_key or "",
            message_id=raw.message_id,
            user_id=raw.user_id,
            correlation_id=raw.correlation_id,
            content_type=raw.content_type,
            headers=dict(raw.headers),
            redelivered=bool(raw.redelivered),
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
                    settled = [Pause(_why(error))] * len(group)
                except Exception as error:  # a defect of the handler must not end the consumer: try again, paused
                    log.exception("consumer.defect", exception_class=type(error).__name__)
                    settled = [Pause("defect")] * len(group)
                group = await self._settle(group, settled)
                if group:
                    group = await self._pause(group)

    async def _next_group(self) -> list[_Held]:
        taker = asyncio.ensure_future(self._waiting.get())
        stopper = asyncio.ensure_future(self._stopping.wait())
        try:
            await asyncio.wait({taker, stopper}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            stopper.cancel()
            if not taker.done():
                taker.cancel()
        if not taker.done():
            return []
        group = [taker.result()]
        if self._policy.linger_s and self._waiting.qsize() < self._policy.group:
            await asyncio.sleep(self._policy.linger_s)
        events = group[0].delivery.events
        while events < self._policy.group and not self._waiting.empty():
            group.append(self._waiting.get_nowait())
            events += group[-1].delivery.events
        return [held for held in group if _is_current(held)]

    async def _settle(self, group: Sequence[_Held], settled: Sequence[Settlement]) -> list[_Held]:
        """Ack what settled; the rest is still in our hands."""
        left = []
        for held, settlement in zip(group, settled, strict=True):
            if isinstance(settlement, Ack):
                await _ack(held)
            elif isinstance(settlement, Hold):
                await self._hold(held, settlement)
            else:
                left.append(held)
                self.paused_reason = settlement.reason
        return left

    async def _hold(self, held: _Held, hold: Hold) -> None:
        """Put one aside: its queue's prefetch is what it takes away, and all others go on."""
        loop = asyncio.get_running_loop()
        held.since = held.since or loop.time()
        if loop.time() - held.since > self._policy.pause.hold_s:
            with contextlib.suppress(*_CLIENT_ERRORS):  # below the time after which the broker closes the channel
                await held.message.raw_message.nack(requeue=True)
            return
        log.info("delivery.held", queue=held.delivery.queue, reason=hold.reason)
        loop.call_later(hold.seconds, self._waiting.put_nowait, held)

    async def _pause(self, group: list[_Held]) -> list[_Held]:
        """Wait until the probe answers; give the deliveries back when that takes too long."""
        clock = asyncio.get_running_loop()
        began, wait = clock.time(), self._policy.pause.first_probe_s
        log.warning("consumer.paused", reason=self.paused_reason, count=len(group))
        returned = False
        while not self._stopping.is_set():
            await asyncio.sleep(wait)
            wait = min(wait * 2, self._policy.pause.longest_probe_s)
            try:
                await self._probe()
                if returned and self._broker is None:
                    await self._subscribe(again=True)
                break
            except InfrastructureError as error:
                self.paused_reason = _why(error)
            if not returned and clock.time() - began > self._policy.pause.return_after_s:
                returned = True
                await self._give_back()
        log.info("consumer.resumed", seconds=round(clock.time() - began, 1))
        self.paused_reason = None
        return [] if returned else [held for held in group if _is_current(held)]

    async def _give_back(self) -> None:
        """Closing the connection returns every unacked delivery, uncounted as an attempt."""
        broker, self._broker = self._broker, None
        if broker is not None:
            await _close(broker, self._losses)
        while not self._waiting.empty():
            self._waiting.get_nowait()

    async def join(self) -> None:
        """Runs as long as the consumer does; raises what ended it, so that a role never looks alive while it is not."""
        if self._loop is not None and self._watcher is not None:
            done, _ = await asyncio.wait({self._loop, self._watcher}, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                if task.cancelled():
                    # The client closes connections with CancelledError, which can reach whoever waits on one of them.
                    raise MessagingFailureError("the consumer was ended together with its connection; start it again")
                task.result()

    async def stop(self) -> None:
        """Finish the group in hand, then close; what was not worked on goes back to the broker."""
        self._stopping.set()
        if self._watcher is not None:
            self._watcher.cancel()
            await asyncio.wait({self._watcher}, timeout=_CLOSE_S)
        if self._loop is not None:
            await asyncio.wait({self._loop}, timeout=_FINISH_S)
            self._loop.cancel()
            await asyncio.wait({self._loop}, timeout=_RELEASE_S)  # a group that is stuck still gives its locks back
        broker, self._broker = self._broker, None
        if broker is not None:
            await _close(broker, self._losses)


class RabbitReplies:
    """Replies over an exclusive queue of this process, on a connection of its own: the port of that name.

    Promises that whoever waits gets a copy that arrives; nothing about copies that are sent while the connection
    is lost. The queue dies with its connection and is declared afresh with the next one, so it is never a leftover.
    """

    def __init__(self, url: str, boot: str) -> None:
        """`boot` names this process and nobody else. Nothing is connected before `start()`."""
        self._url = url
        self._address = reply_queue(boot)
        self._board = ReplyBoard()
        self._broker: RabbitBroker | None = None
        self._losses: Losses = []
        self._watcher: asyncio.Task[None] | None = None
        self._lost = asyncio.Event()

    @property
    def address(self) -> str:
        """The name of the queue."""
        return self._address

    async def start(self) -> None:
        """Connect and declare the queue. Raises MessagingFailureError when the broker does not answer."""
        await self._subscribe()
        self._watcher = asyncio.create_task(self._watch(), name="replies-watch")

    def wait(self, event_id: str, timeout_s: float) -> asyncio.Future[bytes | None]:
        """The next copy of this event's decision, None after `timeout_s`; waiting begins with the call."""
        return self._board.wait(event_id, timeout_s)

    async def _subscribe(self) -> None:
        losses: Losses = []

        def lost(connection: aio_pika.abc.AbstractConnection, *_: object) -> None:
            losses.append(connection)
            if self._broker is broker:
                self._lost.set()

        async def receive(body: bytes) -> None:
            message: RabbitMessage = broker.context.get_local("message")
            self._board.answer(str(message.headers.get("event_id")), body)

        broker = _consuming(self._url, _REPLIES, lost)
        queue = RabbitQueue(
            self._address,
            durable=False,
            exclusive=True,
            auto_delete=True,
            declare=True,
            arguments={"x-max-length": _REPLIES},  # a process that hangs must not fill the broker's memory
        )
        broker.subscriber(queue, ack_policy=AckPolicy.ACK_FIRST, no_reply=True, decoder=_raw_body)(receive)
        async with _closed_on_failure(broker, losses):
            await _start(broker)
            _refuse_if(losses)
        self._broker, self._losses = broker, losses

    async def _watch(self) -> None:
        """After a lost connection subscribe afresh; the broker may hold the old queue until it has missed it too."""
        pause = PausePolicy()
        while True:
            await self._lost.wait()
            self._lost.clear()
            log.warning("replies.lost", queue=self._address)
            await self._disconnect()
            wait = pause.first_probe_s
            while self._broker is None:
                await asyncio.sleep(wait)
                wait = min(wait * 2, pause.longest_probe_s)
                with contextlib.suppress(MessagingFailureError):
                    await self._subscribe()
            log.info("replies.subscribed", queue=self._address)

    async def _disconnect(self) -> None:
        broker, self._broker = self._broker, None
        if broker is not None:
            await _close(broker, self._losses)

    async def close(self) -> None:
        """Close the connection; whoever still waits is answered None at once."""
        if self._watcher is not None:
            self._watcher.cancel()
            await asyncio.wait({self._watcher}, timeout=_CLOSE_S)
        self._board.close()
        await self._disconnect()


def _consuming(url: str, prefetch: int, lost: Callable[..., None]) -> RabbitBroker:
    """A broker for raw bodies, not yet connected; `lost` is called when its connection closes."""
    return RabbitBroker(
        url,
        timeout=_CONNECT_S,
        graceful_timeout=5.0,
        default_channel=Channel(prefetch_count=prefetch),
        apply_types=False,
        logger=None,
        log_level=logging.DEBUG,
        reconnect_interval=0.5,
        on_close=[lost],
    )


async def _found(broker: RabbitBroker, queues: Sequence[str]) -> list[str]:
    """Those of the queues that are there; whoever wants a missing one adds it again later."""
    found = []
    try:
        async with asyncio.timeout(_START_S):
            for queue in queues:
                try:
                    await _look(broker, queue)
                    found.append(queue)
                except aiormq.exceptions.ChannelNotFoundEntity:
                    log.error("queue.missing", queue=queue)
    except _CLIENT_ERRORS as error:
        raise MessagingFailureError(f"cannot look at the queues ({type(error).__name__})") from error
    return found


async def _look(broker: RabbitBroker, queue: str) -> None:
    """Raise ChannelNotFoundEntity for a queue that is not there; on a channel of its own, which that answer closes.

    On the consumers' channel every delivery in hand would go back to its queue with it, and count as returned.
    """
    transport = (await broker.connect()).transport
    if transport is None:
        raise ConnectionError
    channel = await transport.connection.channel(publisher_confirms=False)
    await channel.queue_declare(queue, passive=True)
    await channel.close()


async def _raw_body(message: RabbitMessage) -> bytes:
    return bytes(message.body)


async def _start(broker: RabbitBroker) -> None:
    try:
        async with asyncio.timeout(_START_S):
            await broker.start()
    except _CLIENT_ERRORS as error:
        raise MessagingFailureError(
            f"cannot consume ({type(error).__name__}); is RabbitMQ up, and was 'riskfleet topology apply' run?"
        ) from error


def _refuse_if(losses: Losses) -> None:
    """Raise MessagingFailureError for a connection that was lost on the way: the client may have restored it without
    some of its consumers, and nobody would hear of the loss any more.
    """
    if losses:
        raise MessagingFailureError("the connection to RabbitMQ was lost while it was made")


@contextlib.asynccontextmanager
async def _closed_on_failure(broker: RabbitBroker, losses: Losses) -> AsyncIterator[None]:
    """Close a broker that is not taken into use, also when whoever made it is cancelled: it would go on consuming."""
    try:
        yield
    except BaseException:
        await _close(broker, losses)
        raise


async def _close(broker: RabbitBroker, losses: Losses) -> None:
    """Close a broker's connection, to the end even when cancelled: a lost one would be restored by its client.

    One that is gone already may answer with any error, or never. What the client still waits to restore on one that
    was lost is let go: it would wait for ever, since the client does not tell it of the close.
    """
    try:
        await _stop(broker)
    except asyncio.CancelledError:
        await _stop(broker)
        raise
    finally:
        for connection in losses:
            connection.connected.set()  # whoever waits looks, finds it closed and gives up


async def _stop(broker: RabbitBroker) -> None:
    with contextlib.suppress(*_CLIENT_ERRORS):
        async with asyncio.timeout(_CLOSE_S):
            await broker.stop()


def _is_current(held: _Held) -> bool:
    """False for a delivery whose channel is gone: the broker gives it again."""
    try:
        return not held.message.raw_message.channel.is_closed
    except _CLIENT_ERRORS:  # asking a closed channel for anything raises
        return False


def _why(error: InfrastructureError) -> str:
    """A server by the class of its error; a stage that somebody paused by what was said."""
    return error.detail if isinstance(error, StagePausedError) else type(error).__name__


async def _ack(held: _Held) -> None:
    try:
        await held.message.raw_message.ack()
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if task is None or task.cancelling():
            raise
        log.info("ack.lost", exception_class="CancelledError")  # the connection's end, not ours
    except _CLIENT_ERRORS as error:
        # The delivery comes again and is found to be done.
        log.info("ack.lost", exception_class=type(error).__name__)
