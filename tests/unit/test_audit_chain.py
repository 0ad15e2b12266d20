"""The chain of hashes notices what it promises to notice, without a database."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from contracts.events import event_id_of, parse_event
from contracts.failures import InvalidTenantError
from contracts.state import EventState, begin
from contracts.tenancy import TenantScope
from governance.audit import (
    SYSTEM_CHAIN,
    ChainHead,
    ChainRow,
    chain_of,
    check_head,
    genesis,
    link,
    start_of,
    trail_gaps,
    verify_chain,
)


def chain(*bodies: bytes, name: str = "acme") -> list[ChainRow]:
    rows, previous = [], genesis(name)
    for seq, body in enumerate(bodies, 1):
        digest = link(previous, seq, body)
        rows.append(ChainRow(seq, f"r{seq}", "", body, previous, digest))
        previous = digest
    return rows


def test_the_published_vectors_hold() -> None:
    assert genesis("acme") == hashlib.sha256(b"riskfleet.audit\x00acme").digest()
    body = b'{"v":1}'
    expected = hashlib.sha256(genesis("acme") + b"\0\0\0\0\0\0\0\x01" + hashlib.sha256(body).digest()).digest()
    assert link(genesis("acme"), 1, body) == expected


def test_no_tenant_shares_the_system_chain() -> None:
    assert chain_of(None) == SYSTEM_CHAIN
    with pytest.raises(InvalidTenantError):
        TenantScope(SYSTEM_CHAIN)


def test_an_untouched_chain_holds_page_by_page() -> None:
    rows = chain(b"a", b"b", b"c")
    report = verify_chain(rows[2:], verify_chain(rows[:2], start_of("acme")))
    assert (report.records, report.problem) == (3, None)
    assert check_head(report, ChainHead(3, rows[-1].hash)) == report


def test_another_tenants_chain_does_not_pass_for_mine() -> None:
    assert verify_chain(chain(b"a", name="other"), start_of("acme")).problem is not None


@given(st.lists(st.binary(max_size=20), min_size=2, max_size=8), st.data())
def test_any_single_change_is_noticed(bodies: list[bytes], data: st.DataObject) -> None:
    rows = chain(*bodies)
    head = ChainHead(len(rows), rows[-1].hash)
    at = data.draw(st.integers(0, len(rows) - 1))
    kind = data.draw(st.sampled_from(["body", "remove", "swap", "repeat", "hash"]))
    if kind == "body":
        rows[at] = replace(rows[at], body=rows[at].body + b"x")
    elif kind == "remove":
        del rows[at]
    elif kind == "swap":
        other = (at + 1) % len(rows)
        rows[at], rows[other] = rows[other], rows[at]
    elif kind == "repeat":
        rows.insert(at, rows[at])
    else:
        rows[at] = replace(rows[at], hash=bytes(32))
    assert check_head(verify_chain(rows, start_of("acme")), head).problem is not None


@pytest.mark.parametrize("keep", [0, 1, 2])
def test_a_removed_tail_is_noticed(keep: int) -> None:
    rows = chain(b"a", b"b", b"c")
    report = check_head(verify_chain(rows[:keep], start_of("acme")), ChainHead(3, rows[-1].hash))
    assert "tail is missing" in (report.problem or "")


def test_records_beyond_the_head_are_noticed() -> None:
    rows = chain(b"a", b"b")
    assert check_head(verify_chain(rows, start_of("acme")), ChainHead(1, rows[0].hash)).problem is not None


def test_the_first_problem_stays() -> None:
    rows = chain(b"a", b"b", b"c")
    broken = verify_chain([rows[1]], start_of("acme"))
    assert verify_chain(rows, broken) == broken == check_head(broken, ChainHead(0, b""))


def test_a_record_filed_under_another_name_is_noticed() -> None:
    (row,) = chain(b'{"record_id":"r1","event_id":"e"}')
    filed = replace(row, event_id="e")
    assert verify_chain([filed], start_of("acme")).problem is None
    for moved in (replace(filed, record_id="other"), replace(filed, event_id="other")):
        assert "filed under another id" in (verify_chain([moved], start_of("acme")).problem or "")


def state(identity: str = "e") -> EventState:
    scope = TenantScope("acme")
    event = parse_event(
        {
            "kind": "risk",
            "type": "login",
            "occurred_at": "2026-01-31T12:00:00Z",
            "subject": {"type": "customer", "id": "c"},
        }
    )
    return begin(
        scope,
        event_id_of(scope, identity),
        event,
        received_at="2026-01-31T12:00:00Z",
        source="http",
        correlation_id="corr",
    )


def test_a_trail_is_compared_byte_for_byte() -> None:
    (record,) = state().records()
    assert trail_gaps([state()], {record.record_id: record.body}) == trail_gaps([], {})
    assert trail_gaps([state()], {}).missing == (record.record_id,)
    assert trail_gaps([state()], {record.record_id: b"{}"}).missing == (record.record_id,)
    sibling = record.body.replace(b'"n":0', b'"n":7')
    command = b'{"action":"approval.approved"}'
    gaps = trail_gaps([state()], {record.record_id: record.body, "sibling": sibling, "command": command})
    assert (gaps.missing, gaps.orphans) == ((), ("sibling",))  # what a person did is no version of an event
