"""What every DecisionFeed promises: every revision once, in an order in which nothing appears behind a cursor."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import AsyncIterator

import pytest
from sqlalchemy import text

from contracts.failures import InvalidMetadataError
from contracts.outcomes import Outcome
from contracts.ports import DecisionFeed
from contracts.state import EventState
from contracts.tenancy import TenantScope
from deploy.migrations.upgrade import role_of
from deploy.servers import ServerUrls
from governance.feed import FeedPosition, decode, encode
from governance.postgres import feed as feed_module
from governance.postgres import transaction
from tests.conformance import databases
from tests.conformance.databases import (
    Bench,
    CommandFailedError,
    PostgresBench,
    canonical,
    decided,
    fresh_scope,
    postgres_bench,
    received,
    upgraded,
)

bench_name, urls, database = databases.bench_name, databases.urls, databases.database
scope, size = databases.scope, databases.size


def some(scope: TenantScope, size: int, name: str = "e") -> list[EventState]:
    return [decided(received(scope, f"{name}{i}"), Outcome.REQUIRE_APPROVAL) for i in range(size)]


async def follow(
    feed: DecisionFeed, scope: TenantScope, want: int, after: str | None = None, limit: int = 7
) -> tuple[list[bytes], str | None]:
    """Page on until as many decisions were seen. The server's own work may hold the feed back for a moment."""
    seen: list[bytes] = []
    async with asyncio.timeout(20):
        while len(seen) < want:
            page = await feed.page(scope, after, limit)
            assert len(page.decisions) <= limit
            assert (page.cursor is None) == (not page.decisions)
            seen += page.decisions
            after = page.cursor or after
            if not page.decisions:
                await asyncio.sleep(0.01)
    return seen, after


async def test_a_tenant_without_decisions_has_an_empty_feed(database: Bench, scope: TenantScope) -> None:
    page = await database.feed.page(scope, None, 10)
    assert (page.decisions, page.cursor) == ((), None)


async def test_every_revision_comes_once_in_the_order_of_its_commit(
    database: Bench, scope: TenantScope, size: int
) -> None:
    first, second = some(scope, size, "a"), some(scope, size, "b")
    await database.ledger.decide(second)
    await database.ledger.decide(first)
    answer = await database.add_revision(second[0], 2, Outcome.APPROVED)
    seen, after = await follow(database.feed, scope, 2 * size + 1)
    assert seen[:size] == [canonical(s) for s in sorted(second, key=lambda s: s.event_id)]
    assert seen[size:] == [*(canonical(s) for s in sorted(first, key=lambda s: s.event_id)), answer]
    assert (await database.feed.page(scope, after, 10)).decisions == ()
    last = decided(received(scope, "last"))
    await database.ledger.decide([*first, last])
    assert (await follow(database.feed, scope, 1, after))[0] == [canonical(last)]


async def test_a_page_may_be_asked_for_again(database: Bench, scope: TenantScope) -> None:
    await database.ledger.decide(some(scope, 5))
    everything, _ = await follow(database.feed, scope, 5)
    for limit in (1, 2, 5, 1000):
        assert (await follow(database.feed, scope, 5, limit=limit))[0] == everything
    first = await database.feed.page(scope, None, 2)
    assert await database.feed.page(scope, first.cursor, 2) == await database.feed.page(scope, first.cursor, 2)


async def test_superseding_a_decision_does_not_move_it(database: Bench, scope: TenantScope) -> None:
    wrong = some(scope, 1)[0]
    await database.ledger.decide([wrong])
    _, after = await follow(database.feed, scope, 1)
    fix = decided(received(scope, "fix", corrects=wrong.event_id))
    await database.ledger.decide([fix])
    assert (await follow(database.feed, scope, 1, after))[0] == [canonical(fix)]
    assert (await follow(database.feed, scope, 2))[0] == [canonical(wrong), canonical(fix)]


async def test_a_reader_beside_writers_misses_nothing_and_sees_nothing_twice(
    database: Bench, scope: TenantScope, size: int
) -> None:
    writers = [some(scope, size, f"w{i}-") for i in range(4)]

    async def write(states: list[EventState]) -> None:
        for i in range(0, len(states), 3):
            await database.ledger.decide(states[i : i + 3])

    reader = asyncio.create_task(follow(database.feed, scope, 4 * size))
    await asyncio.gather(*map(write, writers))
    seen, _ = await reader
    assert sorted(seen) == sorted(canonical(state) for states in writers for state in states)


async def test_tenants_do_not_see_each_other_s_decisions(database: Bench, scope: TenantScope) -> None:
    other = fresh_scope()
    mine, theirs = some(scope, 2), some(other, 2)
    await database.ledger.decide([*mine, *theirs])
    seen, after = await follow(database.feed, scope, 2)
    assert sorted(seen) == sorted(map(canonical, mine))
    # A cursor is a place, and no right: what it shows is the reader's own.
    assert set((await database.feed.page(other, after, 10)).decisions) <= set(map(canonical, theirs))
    assert sorted((await follow(database.feed, other, 2))[0]) == sorted(map(canonical, theirs))
    assert (await database.feed.page(fresh_scope(), None, 10)).decisions == ()


def spelled(place: str) -> str:
    return "d1_" + base64.urlsafe_b64encode(place.encode()).rstrip(b"=").decode()


@pytest.mark.parametrize(
    "cursor",
    [
        "",
        "d1_",
        "nonsense",
        "d2_" + spelled("5:1:e")[3:],
        spelled("5:1:e") + "=",
        spelled("5:1:e") + "\n",
        spelled("5:1:e")[:-1] + chr(ord(spelled("5:1:e")[-1]) + 1),
        spelled("05:1:e"),
        spelled("5:1:"),
        spelled("5:1:e\0"),
        spelled("-5:1:e"),
        spelled("5:1"),
        spelled("٥:1:e"),
        spelled(f"{2**63}:1:e"),
        spelled(f"5:{2**31}:e"),
        spelled("5:1:" + "e" * 257),
        "d1_" + "A" * 100_000,
        "d1_é",
        "d1_\ud800",
        spelled("5:1:e").replace("_", "+"),
        "d1_" + base64.urlsafe_b64encode(b"5:1:\xff").decode().rstrip("="),
    ],
)
async def test_a_cursor_that_the_feed_did_not_make_is_refused(database: Bench, scope: TenantScope, cursor: str) -> None:
    with pytest.raises(InvalidMetadataError, match="start again without a cursor"):
        await database.feed.page(scope, cursor, 10)


async def test_a_cursor_from_the_future_is_refused(database: Bench, scope: TenantScope) -> None:
    """As after the restore of an older copy: going on from it would skip what is written next."""
    await database.ledger.decide(some(scope, 1))
    _, after = await follow(database.feed, scope, 1)
    assert after is not None
    ahead = decode(after).transaction + 1_000_000
    for number in (ahead, 2**63 - 1):
        with pytest.raises(InvalidMetadataError, match="start again without a cursor"):
            await database.feed.page(scope, encode(FeedPosition(number, "e" * 32, 1)), 10)


@pytest.mark.parametrize("limit", [0, -1])
async def test_a_page_of_nothing_is_refused(database: Bench, scope: TenantScope, limit: int) -> None:
    with pytest.raises(InvalidMetadataError):
        await database.feed.page(scope, None, limit)


# --- what only a server can get wrong -----------------------------------------------------------------


@pytest.fixture
def server(servers: ServerUrls) -> ServerUrls:
    upgraded(servers.migration_database, role_of(servers.database))
    return servers


@pytest.fixture
async def postgres(server: ServerUrls) -> AsyncIterator[PostgresBench]:
    async with postgres_bench(server) as bench:
        yield bench


_COPY = """
    INSERT INTO decisions (tenant, event_id, revision, outcome, decided_by, body_digest, digest, decision, state, score,
                           decided_at)
    SELECT tenant, event_id, :revision, outcome, decided_by, body_digest, digest, :decision, state, score, decided_at
      FROM decisions WHERE event_id = :event_id AND revision = 1
"""


@pytest.mark.integration
async def test_a_transaction_that_began_first_and_commits_last_is_not_missed(
    postgres: PostgresBench, scope: TenantScope
) -> None:
    state = some(scope, 1)[0]
    await postgres.ledger.decide([state])
    _, after = await follow(postgres.feed, scope, 1)
    async with transaction(postgres.engine, [scope]) as slow:
        values = {"revision": 2, "decision": b"slow", "event_id": state.event_id}
        await slow.execute(text(_COPY), values)  # has its number now, and is not committed
        await postgres.rows(scope, _COPY + " RETURNING 1", revision=3, decision=b"fast", event_id=state.event_id)
        assert await postgres.superseded(scope, state.event_id) == [None, None]  # the fast one is there for all to see
        assert (await postgres.feed.page(scope, after, 10)).decisions == ()
    seen, _ = await follow(postgres.feed, scope, 2, after)
    assert seen == [b"slow", b"fast"]


@pytest.mark.integration
async def test_a_transaction_that_was_rolled_back_holds_nothing_back(
    postgres: PostgresBench, scope: TenantScope
) -> None:
    state = some(scope, 1)[0]
    await postgres.ledger.decide([state])

    async def give_up() -> None:
        async with transaction(postgres.engine, [scope]) as gone:
            await gone.execute(text(_COPY), {"revision": 2, "decision": b"gone", "event_id": state.event_id})
            raise CommandFailedError

    with pytest.raises(CommandFailedError):
        await give_up()
    answer = await postgres.add_revision(state, 2, Outcome.REJECTED)
    assert (await follow(postgres.feed, scope, 2))[0] == [canonical(state), answer]


@pytest.mark.integration
async def test_a_page_is_read_from_the_index(postgres: PostgresBench, scope: TenantScope) -> None:
    """However many decisions there are, a page costs its own rows."""
    await postgres.ledger.decide(some(scope, 64))
    values = {"tenant": str(scope), "number": "5", "event_id": "", "revision": 1, "limit": 10}
    async with transaction(postgres.engine, [scope]) as connection:
        await connection.execute(text("SET LOCAL enable_seqscan = off"))
        await connection.execute(text("SET LOCAL enable_sort = off"))
        found = await connection.execute(text("EXPLAIN " + feed_module._PAGE.text), values)
        lines = "\n".join(row[0] for row in found)
    condition = lines.partition("Index Cond")[2].partition("\n")[0]
    assert "decisions_feed" in lines, lines
    assert "Sort" not in lines, lines
    assert "feed_xid < pg_snapshot_xmin" in condition, lines
    assert "ROW(feed_xid, event_id, revision) >" in condition, lines
