"""What every LabelBook promises: a label once, in whatever order, and one bad label does not hide among good ones."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import pytest

from contracts.failures import DomainValidationError
from contracts.labels import Label, parse_label
from contracts.tenancy import TenantScope
from tests.conformance import databases
from tests.conformance.databases import AT, Bench, fresh_scope, lost

bench_name, urls, database = databases.bench_name, databases.urls, databases.database
scope, size = databases.scope, databases.size


def label(scope: TenantScope, event: str = "order-1", **fields: Any) -> Label:
    document = {"event": event, "label": "chargeback", "source": "acquirer", "effective_at": AT} | fields
    return parse_label(scope, document, AT)


def expected(labels: list[Label]) -> list[tuple[str, str, str, str, datetime, bytes]]:
    at = datetime(2026, 1, 31, 12, tzinfo=UTC)
    return sorted((one.label_id, one.event_id, one.label, one.source, at, one.body) for one in labels)


async def test_a_label_is_recorded_once_and_the_answer_says_which_were_new(
    database: Bench, scope: TenantScope, size: int
) -> None:
    labels = [label(scope, f"order-{i}") for i in range(size)]
    more = label(scope, "another order")
    assert list(await database.labels.record([])) == []
    assert list(await database.labels.record([*labels, labels[0]])) == [True] * size + [False]
    assert list(await database.labels.record([labels[-1], more, more])) == [False, True, False]
    assert await database.labels_of(scope) == expected([*labels, more])


async def test_a_lost_reply_is_healed_by_repeating_the_call(database: Bench, scope: TenantScope, size: int) -> None:
    labels = [label(scope, f"order-{i}") for i in range(size)]
    await lost(database, lambda: database.labels.record(labels))
    assert list(await database.labels.record(labels)) == [False] * size
    assert await database.labels_of(scope) == expected(labels)


async def test_concurrent_sinks_agree_on_which_were_new(database: Bench, scope: TenantScope, size: int) -> None:
    labels = [label(scope, f"order-{i}") for i in range(size)]
    answers = await asyncio.gather(*(database.labels.record(labels[::step]) for step in (1, -1, 1, -1)))
    assert sum(map(sum, answers)) == size
    assert await database.labels_of(scope) == expected(labels)


async def test_a_changed_label_is_another_one_and_the_same_one_later_changes_nothing(
    database: Bench, scope: TenantScope
) -> None:
    first = label(scope)
    again = replace(first, received_at="2026-02-01T00:00:00Z", body=b"{}")
    cleared = label(scope, label="cleared")
    assert list(await database.labels.record([first, again, cleared])) == [True, False, True]
    assert await database.labels_of(scope) == expected([first, cleared])


async def test_odd_texts_do_not_fail_their_call(database: Bench, scope: TenantScope) -> None:
    odd = label(scope, source="a\0b", note="\0")
    assert list(await database.labels.record([odd, label(scope)])) == [True, True]
    assert list(await database.labels.record([odd])) == [False]
    row = next(row for row in await database.labels_of(scope) if row[0] == odd.label_id)
    assert (row[3], row[5]) == ("a\N{REPLACEMENT CHARACTER}b", odd.body)


@pytest.mark.parametrize("field", ["effective_at", "received_at"])
@pytest.mark.parametrize("text", ["yesterday", "", "2026-01-31T12:00:00", "2026-13-31T12:00:00Z"])
async def test_a_label_with_a_bad_time_is_refused_with_its_neighbours_so_that_halves_can_be_sent(
    database: Bench, scope: TenantScope, field: str, text: str
) -> None:
    good = label(scope)
    other = label(scope, "order-2")
    bad = replace(other, effective_at=text) if field == "effective_at" else replace(other, received_at=text)
    with pytest.raises(DomainValidationError) as refusal:
        await database.labels.record([good, bad])
    assert refusal.value.pointers[0][0] == f"/{field}"
    assert text == "" or text not in refusal.value.detail
    assert await database.labels_of(scope) == []
    with pytest.raises(DomainValidationError):
        await database.labels.record([bad])
    assert list(await database.labels.record([good])) == [True]


async def test_tenants_do_not_see_each_other_s_labels(database: Bench, scope: TenantScope, size: int) -> None:
    other = fresh_scope()
    mine = [label(scope, f"order-{i}") for i in range(size)]
    theirs = [replace(one, scope=other) for one in mine]  # of one id, which no door makes
    assert list(await database.labels.record([*mine, *theirs])) == [True] * 2 * size
    assert await database.labels_of(scope) == await database.labels_of(other) == expected(mine)
