"""Naive FastStream over RabbitMQ: a subscriber per step, one message is one event, ack after the next is confirmed.

Quorum queues, persistent messages, confirms, uvloop, asyncpg pool of 8, prefetch 64 per step. One process.
"""

from __future__ import annotations

import asyncio
import time

import asyncpg
import redis.asyncio as aredis
import uvloop
from faststream import AckPolicy, FastStream
from faststream.rabbit import Channel, QueueType, RabbitBroker, RabbitQueue
from steps import DATABASE, DECIDE, RABBITMQ, REDIS, STARTED, STEPS, advanced, audit_rows, command, key_of

broker = RabbitBroker(RABBITMQ, apply_types=False, default_channel=Channel(prefetch_count=64))
app = FastStream(broker)
_AUDIT = "INSERT INTO rival_audit SELECT $1, * FROM unnest($2::int[], $3::bytea[]) ON CONFLICT DO NOTHING"
_DECIDE = DECIDE.replace("%s, %s, %s, %s", "$1, $2, $3, $4")


class Connected:
    store: aredis.Redis
    pool: asyncpg.Pool


@app.on_startup
async def connect() -> None:
    Connected.store = aredis.Redis.from_url(REDIS)
    Connected.pool = await asyncpg.create_pool(DATABASE, min_size=2, max_size=8)


def queue(name: str) -> RabbitQueue:
    return RabbitQueue(name, durable=True, queue_type=QueueType.QUORUM)


def subscribe(number: int, name: str) -> None:
    @broker.subscriber(queue(name), ack_policy=AckPolicy.NACK_ON_ERROR)
    async def run(message: str) -> None:
        event_id = message if isinstance(message, str) else message.decode()
        if number == 0:
            await Connected.store.set(STARTED, repr(time.time()), nx=True)
        state, after = advanced(await Connected.store.get(key_of(event_id)), name)
        await Connected.store.set(key_of(event_id), after)
        if number + 1 < len(STEPS):
            await broker.publish(event_id, STEPS[number + 1], persist=True)
            return
        async with Connected.pool.acquire() as connection, connection.transaction():
            await connection.execute(_DECIDE, event_id, "APPROVED", after, state["intended"])
            await connection.execute(_AUDIT, event_id, *audit_rows(state))


for _number, _name in enumerate(STEPS):
    subscribe(_number, _name)


async def main() -> None:
    import sys

    if sys.argv[1] == "worker":
        await app.run()
        return
    await broker.connect()
    await broker.declare_queue(queue(STEPS[0]))
    loop = asyncio.get_running_loop()

    def send(event_id: str) -> None:
        asyncio.run_coroutine_threadsafe(broker.publish(event_id, STEPS[0], persist=True), loop).result()

    await asyncio.to_thread(command, send)
    await broker.stop()


if __name__ == "__main__":
    uvloop.run(main())
