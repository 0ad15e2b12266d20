"""Each rule of the checker bites: a forged history, in which just one thing is wrong, breaks just that rule."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.faults.checker import (
    Bites,
    Chain,
    EventSeen,
    Floors,
    Letter,
    Observations,
    Rejection,
    Seen,
    judge,
)
from tests.faults.load import Door, History, Line, Op, Variant, read_history

ACME = "acme"
A, B, C, D = [(ACME, f"event-{letter}") for letter in "abcd"]


def line(key: tuple[str, str], op: Op, variant: Variant = Variant.MEANT, **fields: Any) -> Line:
    return Line(1.0, op, Door.HTTP, key[0], f"id-{key[1]}", key[1], variant, **fields)


def decided(key: tuple[str, str], outcome: str = "APPROVED", revision: int = 1, digest: str = "d1") -> list[Seen]:
    return [Seen(observer, key, revision, outcome, digest) for observer in ("rows", "feed", "queue", "get")]


BITES = Bites(
    redeliveries=1_000,
    duplicates_suppressed=500,
    stale_writes_refused=100,
    confirms_lost=50,
    decision_conflicts=10,
    requests_during_faults=100,
    accepted_during_faults=50,
    kills=100,
    pauses=20,
    at_failpoints=72,
    failpoints={"claimed": 10, "advanced": 11},
    kills_in_half_settled=30,
    pauses_across_flush=20,
)
# A was decided, B is parked, C was rejected at the AMQP door, D was refused at once and is nowhere.
GOOD = Observations(
    lines=[
        *(line(A, Op.INVOKE), line(A, Op.UNKNOWN, status=503), line(A, Op.INVOKE), line(A, Op.OK, status=202)),
        *(line(A, Op.INVOKE, Variant.OTHER), line(A, Op.FAIL, Variant.OTHER, status=422)),
        *(line(A, Op.INVOKE), line(A, Op.OK, status=200, shown=(1, "APPROVED", "d1"))),
        *(line(B, Op.INVOKE), line(B, Op.OK, status=202)),
        *(line(C, Op.INVOKE, Variant.INVALID), line(C, Op.OK, Variant.INVALID)),
        *(line(D, Op.INVOKE, Variant.INVALID), line(D, Op.FAIL, Variant.INVALID, status=422)),
    ],
    events=[EventSeen(A, "meant", 1), EventSeen(B, "meant", 2)],
    seen=decided(A),
    letters=[Letter(B, "scoring", "internal", "open")],
    rejections=[Rejection(ACME, "", f"id-{C[1]}", "invalid-event"), Rejection(ACME, A[1], "", "idempotency-conflict")],
    chains=[Chain(ACME, intact=True, missing=0, orphans=3, records=5, decisions=1)],
    trails={A: (5, 5)},
    foreign_canaries=[],
    depths={"risk.v1.scoring.p00": 0},
    twin={1: "APPROVED", 2: "APPROVED"},
    decided_s=12.0,
    audited_s=70.0,
    bites=BITES,
)


def broken(**changes: Any) -> list[str]:
    return [rule.name for rule in judge(replace(GOOD, **changes), Floors()).broken]


def test_a_run_in_which_everything_held_is_sound_and_not_void() -> None:
    verdict = judge(GOOD, Floors())
    assert (verdict.sound, verdict.void, verdict.broken) == (True, False, [])


FORGED: dict[str, tuple[str, dict[str, Any]]] = {
    "an accepted event is nowhere": ("lost", {"lines": [*GOOD.lines, line(D, Op.OK)]}),
    "a confirmed invalid message got no rejection": ("lost", {"rejections": GOOD.rejections[1:]}),
    "a parked event's letter is gone": ("lost", {"letters": []}),
    "another body was accepted and never told that it lost": (
        "lost",
        {"lines": [*GOOD.lines, line(A, Op.OK, Variant.OTHER)], "rejections": GOOD.rejections[:1]},
    ),
    "an event that nobody sent": ("unexpected", {"events": [*GOOD.events, EventSeen((ACME, "ghost"), "meant", 1)]}),
    "a letter that nobody sent": (
        "unexpected",
        {"letters": [*GOOD.letters, Letter((ACME, "ghost"), "scoring", "internal", "open")]},
    ),
    "a rejection that nobody caused": (
        "unexpected",
        {"rejections": [*GOOD.rejections, Rejection(ACME, "ghost", "", "invalid-event")]},
    ),
    "the queue told another outcome than the row": (
        "decided more than once",
        {"seen": [*GOOD.seen, Seen("queue", A, 1, "REJECTED", "d2")]},
    ),
    "the same outcome, in another document": (
        "decided more than once",
        {"seen": [*GOOD.seen, Seen("feed", A, 1, "APPROVED", "d2")]},
    ),
    "an answer at the door told another story": (
        "decided more than once",
        {"lines": [*GOOD.lines, line(A, Op.OK, status=200, shown=(1, "REJECTED", "d2"))]},
    ),
    "a decision was told that no row holds": (
        "decided more than once",
        {"seen": [*GOOD.seen, Seen("queue", B, 1, "APPROVED", "d1")]},
    ),
    "approved, where the twin rejects": ("more permissive than the twin", {"twin": {1: "REJECTED", 2: "APPROVED"}}),
    "approved, where the twin asks a person": (
        "more permissive than the twin",
        {"twin": {1: "REQUIRE_APPROVAL", 2: "APPROVED"}},
    ),
    "the tenant's queue never got it": (
        "a decision that was not told",
        {"seen": [one for one in GOOD.seen if one.observer != "queue"]},
    ),
    "the feed does not show it": (
        "a decision that was not told",
        {"seen": [one for one in GOOD.seen if one.observer != "feed"]},
    ),
    "the chain is broken": (
        "audit chain not verified",
        {"chains": [Chain(ACME, intact=False, missing=0, orphans=0, records=5, decisions=1, problem="hash of 3")]},
    ),
    "the chain verified fewer decisions than there are": (
        "audit chain not verified",
        {"chains": [Chain(ACME, intact=True, missing=0, orphans=0, records=5, decisions=0)]},
    ),
    "no chain was verified at all": ("audit chain not verified", {"chains": []}),
    "a record of the trail is missing": ("audit gaps", {"trails": {A: (5, 4)}}),
    "a trail is short": ("audit gaps", {"trails": {A: (4, 4)}}),
    "a foreign canary": ("foreign canary", {"foreign_canaries": ["globex's in acme's feed"]}),
    "a message was left": ("left in queues", {"depths": {"risk.v1.audit.p01": 2}}),
    "decided too late": ("decided after the last fault", {"decided_s": 60.1}),
    "never all decided": ("decided after the last fault", {"decided_s": None}),
    "audited too late": ("audited after the last fault", {"audited_s": 121.0}),
}


@pytest.mark.parametrize("name", FORGED)
def test_one_forged_wrong_breaks_one_rule(name: str) -> None:
    rule, changes = FORGED[name]
    assert broken(**changes) == [rule]


def test_what_was_never_valid_is_not_decided() -> None:
    changes = {
        "events": [*GOOD.events, EventSeen(D, "invalid", 1)],
        "seen": [*GOOD.seen, *decided(D)],
        "trails": {A: (5, 5), D: (5, 5)},
        "chains": [replace(GOOD.chains[0], decisions=2)],
    }
    assert broken(**changes) == ["unexpected"]


def test_a_body_that_nobody_sent_owns_no_identity() -> None:
    events = [EventSeen(A, "meant", 1), EventSeen(B, "other", 2)]
    # The body that was sent is lost then, too: it is neither decided nor told that it lost.
    assert broken(events=events) == ["lost", "a foreign body's decision"]


def test_an_approval_owes_a_record_of_its_own() -> None:
    waiting = {"seen": decided(A, "REQUIRE_APPROVAL"), "lines": [one for one in GOOD.lines if one.shown is None]}
    assert broken(**waiting) == ["audit gaps"]
    assert broken(**waiting, trails={A: (6, 6)}) == []


def test_more_restrictive_than_the_twin_is_allowed() -> None:
    seen = decided(A, "REJECTED")
    assert broken(seen=seen, lines=[one for one in GOOD.lines if one.shown is None]) == []


VOID: dict[str, dict[str, Any]] = {
    "redeliveries": {"redeliveries": 999},
    "suppressed duplicates": {"duplicates_suppressed": 499},
    "refused stale writes": {"stale_writes_refused": 99},
    "lost confirms": {"confirms_lost": 49},
    "decision conflicts": {"decision_conflicts": 9},
    "accepted during faults": {"accepted_during_faults": 49},
    "kills and pauses at failpoints": {"at_failpoints": 71},
    "each failpoint": {"failpoints": {"claimed": 10, "advanced": 9}},
    "kills in a half-settled carrier": {"kills_in_half_settled": 29},
    "pauses across a FLUSHALL": {"pauses_across_flush": 19},
}


@pytest.mark.parametrize("name", VOID)
def test_a_run_in_which_too_little_happened_is_void_and_still_sound(name: str) -> None:
    verdict = judge(replace(GOOD, bites=replace(BITES, **VOID[name])), Floors())
    assert (verdict.sound, verdict.void, [rule.name for rule in verdict.broken]) == (True, True, [name])


def test_a_run_without_any_fault_is_void_in_every_respect() -> None:
    verdict = judge(replace(GOOD, bites=Bites()), Floors())
    assert {rule.name for rule in verdict.broken} == set(VOID)


def test_the_floors_of_a_short_run_are_in_proportion_and_never_nothing() -> None:
    short = Floors().scaled(2 / 30)
    assert (short.redeliveries, short.duplicates_suppressed, short.stale_writes_refused) == (33, 16, 3)
    assert (short.accepted_share, short.at_failpoints_share, short.half_settled_share) == (0.33, 0.4, 0.2)
    assert min(short.confirms_lost, short.pauses_across_flush) >= 1


def test_a_history_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    history = History(tmp_path / "history.jsonl")
    for one in GOOD.lines:
        history.add(one)
    history.close()
    assert read_history(tmp_path / "history.jsonl") == list(GOOD.lines)
