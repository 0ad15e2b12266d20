"""What every Outbox promises: a message waits if and only if its command committed, until it was published."""

from __future__ import annotations

import asyncio
import secrets

import pytest

from contracts.failures import DatabaseError
from contracts.ports import Message, OutboxRow
from contracts.tenancy import TenantScope
from tests.conformance import databases
from tests.conformance.databases import Bench, CommandFailedError, fresh_scope, lost

bench_name, urls, database = databases.bench_name, databases.urls, databases.database
size = databases.size

MANY = 100_000


@pytest.fixture
async def scope(database: Bench) -> TenantScope:
    """A tenant of this test alone, which the relay must know of."""
    made = fresh_scope()
    await database.create_tenant(made)
    return made


def message(**changes: object) -> Message:
    fields: dict[str, object] = {"exchange": "x", "routing_key": "k", "body": b"\0", "message_id": secrets.token_hex(8)}
    return Message(**(fields | changes))  # type: ignore[arg-type]


async def waiting(database: Bench, scope: TenantScope | None) -> list[OutboxRow]:
    """Other tests' rows wait in the same table."""
    return [row for row in await database.outbox.waiting(MANY) if row.scope == scope]


async def test_messages_wait_in_the_order_of_writing_until_they_are_published(
    database: Bench, scope: TenantScope, size: int
) -> None:
    messages = [message() for _ in range(size)]
    await database.send(scope, [])
    await database.send(scope, messages)
    last = message()
    await database.send(scope, [last])
    rows = await waiting(database, scope)
    assert [row.message for row in rows] == [*messages, last]
    assert [row.position for row in rows] == sorted({row.position for row in rows})
    await database.outbox.published(rows[:-1])
    assert [row.message for row in await waiting(database, scope)] == [last]
    await database.outbox.published(rows)
    await database.outbox.published([])
    assert await waiting(database, scope) == []


async def test_every_field_of_a_message_is_kept(database: Bench, scope: TenantScope) -> None:
    headers = {"x-riskfleet-events": 3, "traceparent": "00-1-2-01", "flag": True, "none": None, "list": [1, "a"]}
    sent = message(headers=headers, mandatory=False, content_type="application/json", correlation_id="c")
    await database.send(scope, [sent])
    (row,) = await waiting(database, scope)
    assert row.message == sent


async def test_a_command_that_failed_sends_nothing(database: Bench, scope: TenantScope) -> None:
    with pytest.raises(CommandFailedError):
        await database.send(scope, [message()], fail=True)
    assert await waiting(database, scope) == []


async def test_a_command_whose_reply_was_lost_has_sent_and_its_repeat_sends_nothing_more(
    database: Bench, scope: TenantScope, size: int
) -> None:
    messages = [message() for _ in range(size)]
    await lost(database, lambda: database.send(scope, messages))
    await database.send(scope, messages)
    assert [row.message for row in await waiting(database, scope)] == messages


async def test_a_removal_whose_reply_was_lost_may_be_repeated(database: Bench, scope: TenantScope) -> None:
    await database.send(scope, [message(), message()])
    rows = await waiting(database, scope)
    await lost(database, lambda: database.outbox.published(rows[:1]))
    await database.outbox.published(rows[:1])
    assert await waiting(database, scope) == rows[1:]


async def test_the_first_message_of_an_id_is_kept(database: Bench, scope: TenantScope) -> None:
    first = message(message_id="m")
    await database.send(scope, [first, message(message_id="m", body=b"other")])
    await database.send(scope, [message(message_id="m", body=b"later")])
    assert [row.message for row in await waiting(database, scope)] == [first]


async def test_a_limit_takes_the_oldest(database: Bench, scope: TenantScope) -> None:
    await database.send(scope, [message() for _ in range(5)])
    everything = await database.outbox.waiting(MANY)
    assert list(await database.outbox.waiting(3)) == list(everything)[:3]


async def test_messages_of_all_tenants_and_of_the_system_wait(database: Bench, scope: TenantScope) -> None:
    other = fresh_scope()
    await database.create_tenant(other)
    mine, theirs, system = message(message_id="same"), message(message_id="same"), message()
    for owner, sent in ((scope, mine), (other, theirs), (None, system)):
        await database.send(owner, [sent])
    everybody = {scope, other, None}
    rows = [row for row in await database.outbox.waiting(MANY) if row.scope in everybody]
    assert {(row.scope, row.message.message_id) for row in rows} >= {
        (scope, "same"),
        (other, "same"),
        (None, system.message_id),
    }
    await database.outbox.published([row for row in rows if row.scope != other])
    assert [row.message for row in await waiting(database, other)] == [theirs]
    assert await waiting(database, scope) == []


async def test_two_relays_may_remove_the_same_rows(database: Bench, scope: TenantScope, size: int) -> None:
    await database.send(scope, [message() for _ in range(size)])
    rows = await waiting(database, scope)
    answers = await asyncio.gather(
        *(database.outbox.published(rows[::step]) for step in (1, -1, 1)), return_exceptions=True
    )
    # Two that take the same rows in another order may meet; one of them is then told to come again.
    assert all(answer is None or isinstance(answer, DatabaseError) for answer in answers)
    assert await waiting(database, scope) == []
