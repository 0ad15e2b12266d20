"""What every AuditLog promises: a record once, a chain without gap or fork, and a check that tells what is missing."""

from __future__ import annotations

import asyncio
import secrets
from dataclasses import replace
from datetime import UTC, datetime

from contracts.codec import state_from_bytes
from contracts.outcomes import Outcome
from contracts.state import AuditRecord
from contracts.tenancy import TenantScope
from tests.conformance import databases
from tests.conformance.databases import Bench, decided, fresh_scope, lost, received

bench_name, urls, database = databases.bench_name, databases.urls, databases.database
scope, size = databases.scope, databases.size


def some(scope: TenantScope, size: int) -> list[AuditRecord]:
    """Records of as many events."""
    return [received(scope, f"e{i}").records()[0] for i in range(size)]


async def intact(database: Bench, scope: TenantScope | None, records: int) -> None:
    report = await database.audit.verify(scope)
    assert (report.records, report.intact, report.problem) == (records, True, None)


async def test_a_record_is_appended_once(database: Bench, scope: TenantScope, size: int) -> None:
    records = some(scope, size)
    more = received(scope, "more").records()[0]
    assert list(await database.audit.append([])) == []
    assert list(await database.audit.append([*records, records[0]])) == [True] * size + [False]
    assert list(await database.audit.append([records[-1], more, more])) == [False, True, False]
    assert list(await database.audit.append(records[::-1])) == [False] * size
    await intact(database, scope, size + 1)


async def test_an_empty_chain_is_intact(database: Bench, scope: TenantScope) -> None:
    await intact(database, scope, 0)


async def test_a_lost_reply_is_healed_by_repeating_the_call(database: Bench, scope: TenantScope, size: int) -> None:
    records = some(scope, size)
    await lost(database, lambda: database.audit.append(records))
    assert list(await database.audit.append(records)) == [False] * size
    await intact(database, scope, size)


async def test_concurrent_sinks_leave_no_gap_and_no_fork(database: Bench, scope: TenantScope, size: int) -> None:
    other = fresh_scope()
    records = [record for tenant in (scope, other) for record in some(tenant, size)]
    halves = [records[: len(records) // 2], records[len(records) // 2 :]]

    async def sink(batches: list[list[AuditRecord]]) -> int:
        return sum([sum(await database.audit.append(batch)) for batch in batches])

    appended = await asyncio.gather(
        sink([records]), sink([records[::-1]]), sink(halves), sink([half[::-1] for half in halves[::-1]])
    )
    assert sum(appended) == len(records)
    await intact(database, scope, size)
    await intact(database, other, size)


async def test_one_call_serves_many_chains(database: Bench, size: int) -> None:
    tenants = [fresh_scope() for _ in range(size)]
    assert list(await database.audit.append([some(tenant, 1)[0] for tenant in tenants])) == [True] * size
    for tenant in tenants[:3]:
        await intact(database, tenant, 1)


async def test_records_of_no_tenant_go_to_the_system_chain(database: Bench) -> None:
    record = AuditRecord(None, secrets.token_hex(16), "", 0, "", b'{"problem":"\\u0000 unauthenticated"}')
    assert list(await database.audit.append([record])) == [True]
    assert list(await database.audit.append([record])) == [False]
    report = await database.audit.verify(None)
    assert (report.tenant, report.intact) == ("_system", True)


async def test_a_record_id_of_another_tenant_is_no_repeat(database: Bench, scope: TenantScope) -> None:
    record = some(scope, 1)[0]
    assert list(await database.audit.append([record, replace(record, scope=fresh_scope())])) == [True, True]


async def test_odd_texts_do_not_fail_their_call(database: Bench, scope: TenantScope) -> None:
    odd = AuditRecord(scope, "r\0", "e\0", 1, "d\0", b"\0")
    assert list(await database.audit.append([odd, *some(scope, 1), odd])) == [True, True, False]
    await intact(database, scope, 2)


async def test_a_decision_whose_records_are_missing_is_told(database: Bench, scope: TenantScope) -> None:
    whole, partial = decided(received(scope, "whole")), decided(received(scope, "partial"))
    sibling = decided(received(scope, "whole"), Outcome.REJECTED)
    await database.ledger.decide([whole, partial])
    undecided = received(scope, "open").records()
    await database.audit.append([*whole.records(), *partial.records(0, 2), *sibling.records(), *undecided])
    report = await database.audit.verify(scope)
    assert (report.decisions, report.missing, report.intact) == (2, 2, False)
    assert "is missing" in (report.problem or "")
    assert report.orphans == len({r.record_id for r in sibling.records()} - {r.record_id for r in whole.records()}) > 0
    early = await database.audit.verify(scope, decided_before=datetime(2026, 1, 1, tzinfo=UTC))
    assert (early.decisions, early.missing, early.intact) == (0, 0, True)
    (stored,) = await database.ledger.decisions([(scope, partial.event_id)])
    assert stored is not None
    await database.audit.append(state_from_bytes(stored.state).records())
    assert (await database.audit.verify(scope)).intact
