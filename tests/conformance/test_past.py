"""What every Past promises: events, labels and imports as they were accepted, by pages, a tenant's own, each once."""

from __future__ import annotations

from typing import Any

from contracts.tenancy import TenantScope
from contracts.velocity import ImportedPart
from tests.conformance import databases
from tests.conformance.databases import AT, Bench, fresh_scope, received
from tests.conformance.test_labels import label

bench_name, urls, database = databases.bench_name, databases.urls, databases.database
scope, size = databases.scope, databases.size


async def test_events_come_back_by_pages_in_order_of_their_ids(database: Bench, scope: TenantScope, size: int) -> None:
    states = [received(scope, f"e{i}", attributes={"i": i}) for i in range(size)]
    await database.ledger.record_events([*states, received(fresh_scope(), "of another tenant")])
    wanted = sorted(states, key=lambda state: state.event_id)
    found, after = list[Any](), None
    while page := await database.past.events(scope, after, 7):
        assert len(page) <= 7
        found += page
        after = page[-1].event_id
    assert [(one.scope, one.event_id, one.event) for one in found] == [(scope, s.event_id, s.event) for s in wanted]
    assert {one.received_at.isoformat() for one in found} == {"2026-01-31T12:00:00+00:00"}
    assert AT.startswith("2026-01-31T12:00:00")


async def test_events_are_counted_no_further_than_is_asked(database: Bench, scope: TenantScope, size: int) -> None:
    assert await database.past.count(scope, 10) == 0
    await database.ledger.record_events([received(scope, f"e{i}") for i in range(size)])
    assert [await database.past.count(scope, most) for most in (1, size, size + 1)] == [1, size, size]


async def test_known_events_answer_by_position(database: Bench, scope: TenantScope) -> None:
    state, other = received(scope), received(fresh_scope())
    await database.ledger.record_events([state, other])
    keys = [(scope, "0" * 32), (scope, state.event_id), (scope, other.event_id), (scope, state.event_id)]
    found = await database.past.known(keys)
    assert [one and one.event for one in found] == [None, state.event, None, state.event]
    assert list(await database.past.known([])) == []


async def test_labels_come_back_by_pages(database: Bench, scope: TenantScope, size: int) -> None:
    labels = [label(scope, f"order-{i}") for i in range(size)]
    await database.labels.record([*labels, label(fresh_scope())])
    found, after = list[Any](), None
    while page := await database.past.labels(scope, after, 5):
        found += page
        after = page[-1].label_id
    assert [one.label_id for one in found] == sorted(one.label_id for one in labels)
    assert {one.body for one in found} == {one.body for one in labels}


async def test_an_imported_part_is_kept_once_and_found_by_its_source(database: Bench, scope: TenantScope) -> None:
    parts = [ImportedPart(scope, source, part, f"{source}{part}".encode()) for source in "ba" for part in range(3)]
    changed = ImportedPart(scope, "a", 1, b"other bytes")
    await database.past.keep(parts)
    await database.past.keep([changed, ImportedPart(fresh_scope(), "a", 0, b"of another tenant")])
    await database.past.keep([])
    in_order = sorted(parts, key=lambda part: (part.source, part.part))
    assert list(await database.past.imported(scope, None, 10)) == in_order
    assert list(await database.past.imported(scope, ("a", 1), 2)) == in_order[2:4]
    assert list(await database.past.imported(scope, None, 10, source="b")) == in_order[3:]
