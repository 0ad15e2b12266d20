"""Features: one pure definition, equal to a recomputation by brute force over exactly what was observed before."""

from __future__ import annotations

import csv
import itertools
import lzma
import math
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from random import Random
from typing import Any

import pytest

from contracts.events import parse_event
from contracts.failures import InvalidModelStateError
from contracts.state import SubjectHistory
from contracts.tenancy import TenantScope
from contracts.velocity import (
    CLEARED,
    DAY_MS,
    FRAUD,
    NO_VERDICT,
    RECORD,
    EntityVelocity,
    Observation,
    Sample,
    Sighting,
    Velocity,
    VelocityPolicy,
    party_digest,
    samples_of,
    sighting_of,
    since_1900,
)
from resilience.memory import CountingIds, MemoryFeatureStore, MemoryRedis, SteppingClock
from workers.judgement.features import (
    LABEL_WINDOWS,
    VELOCITY_FEATURES,
    WINDOWS,
    FeatureSpec,
    HistoryLostError,
    feature,
    is_feature,
    velocity_of,
)

ACME = TenantScope("acme")
PAYMENTS = Path(__file__).resolve().parents[3] / "shared" / "data" / "payments-2018-07.csv.xz"
SEED = 20180701
COUNT = 5_000
AT = since_1900(datetime(2026, 1, 31, 12, tzinfo=UTC))
EVENT: dict[str, Any] = {
    "kind": "risk",
    "type": "payment.card",
    "occurred_at": "2026-01-31T12:00:00Z",
    "subject": {"type": "customer", "id": "c-1"},
    "amount": {"value": "20.00", "currency": "EUR"},
}


def sample(at: int, number: int = 0, **fields: Any) -> Sample:
    known: dict[str, Any] = {
        "sequence": 1,
        "amount": 10.0,
        "currency": b"EUR",
        "verdict": 0,
        "known": 0,
        "other": 1,
        "attribute": 0,
    }
    values = known | fields
    return (
        at,
        number.to_bytes(16, "big"),
        *(values[name] for name in ("sequence", "amount", "currency", "verdict", "known")),
        values["other"].to_bytes(8, "big"),
        values["attribute"].to_bytes(8, "big"),
    )


def values(*samples: Sample, sequence: int = 100, policy: VelocityPolicy | None = None) -> dict[str, Any]:
    """Every velocity feature of an event at AT in EUR whose subject has these samples."""
    seen = Observation("e", sequence, True, None, tuple(sorted(samples)), None)
    velocity = velocity_of(seen, AT, b"EUR", policy or VelocityPolicy())
    event = parse_event(EVENT)
    return {name: feature(name, event, SubjectHistory(), velocity) for name in VELOCITY_FEATURES}


def test_a_window_holds_its_end_and_not_its_beginning_and_never_the_future() -> None:
    ends = [sample(AT - length, n) for n, length in enumerate(WINDOWS.values())]
    found = values(*ends, sample(AT, 8), sample(AT + 1, 9))
    assert [found[f"subject.count.{name}"] for name in WINDOWS] == [1, 2, 3, 4, 5]


def test_what_was_observed_later_does_not_count_even_if_it_happened_before() -> None:
    found = values(
        sample(AT - 5, 1, sequence=7), sample(AT - 4, 2, sequence=8), sample(AT - 3, 3, sequence=0), sequence=8
    )
    assert found["subject.count.1h"] == 2


def test_amounts_are_of_the_events_currency_and_nothing_is_no_amount() -> None:
    found = values(
        sample(AT, 1, amount=0.1),
        sample(AT, 2, amount=0.2),
        sample(AT, 3, amount=5000.0, currency=b"JPY"),
        sample(AT, 4, amount=math.nan, currency=bytes(3)),
    )
    assert [found[f"subject.{name}.1h"] for name in ("count", "sum", "mean", "max")] == [
        4,
        0.30000000000000004,
        0.15000000000000002,
        0.2,
    ]
    empty = values()
    assert [empty[f"subject.{name}.1h"] for name in ("count", "sum", "mean", "max", "distinct")] == [
        0,
        0.0,
        None,
        None,
        0,
    ]


def test_distinct_others_and_attributes_are_counted_and_absent_ones_are_not() -> None:
    found = values(sample(AT, 1, other=4), sample(AT, 2, other=4, attribute=6), sample(AT, 3, other=0, attribute=7))
    assert (found["subject.distinct.1h"], found["subject.distinct_attribute.1h"]) == (1, 2)


def test_rates_look_at_events_older_than_the_delay_and_at_labels_known_by_then() -> None:
    delay = VelocityPolicy().label_delay_ms
    old = AT - delay
    found = values(
        sample(old + 1, 1, verdict=FRAUD, known=old + 2),
        sample(old, 2, verdict=FRAUD, known=AT),
        sample(old, 3, verdict=FRAUD, known=AT + 1),
        sample(old, 4, verdict=CLEARED, known=AT),
        sample(old - 2 * DAY_MS, 5),
    )
    assert [found[f"subject.{n}.1d"] for n in ("matured", "fraud", "fraud_rate")] == [3, 1, 1 / 3]
    assert [found[f"subject.{n}.7d"] for n in ("matured", "fraud", "fraud_rate")] == [4, 1, 0.25]
    assert values()["subject.fraud_rate.7d"] is None


def test_the_newest_samples_count_at_most() -> None:
    found = values(*(sample(AT - n, n) for n in range(20)), policy=VelocityPolicy(keep=7))
    assert found["subject.count.1h"] == 7


def test_an_event_that_is_dated_ahead_happened_when_it_came() -> None:
    event = parse_event(EVENT | {"occurred_at": "2199-01-01T00:00:00Z"})
    assert sighting_of(ACME, "0" * 32, event, datetime(2026, 1, 31, 12, tzinfo=UTC), "device_id").at == AT
    early = parse_event(EVENT | {"occurred_at": "1900-01-01T00:00:00+14:00"})
    assert sighting_of(ACME, "0" * 32, early, datetime(2026, 1, 31, 12, tzinfo=UTC), "device_id").at == 0


def test_a_counterparty_that_is_not_named_has_no_values_and_is_no_error() -> None:
    found = values(sample(AT))
    assert {found[name] for name in VELOCITY_FEATURES if name.startswith("counterparty.")} == {None}


def test_a_history_that_is_not_whole_is_no_number() -> None:
    seen = Observation("e", 1, False, 5, (), None)
    velocity = velocity_of(seen, AT, b"EUR", VelocityPolicy())
    assert (velocity.complete, velocity.since) == (False, "1970-01-01T00:00:00.005000+00:00")
    for known in (velocity, None):
        with pytest.raises(HistoryLostError, match="not whole"):
            feature("subject.count.1h", parse_event(EVENT), SubjectHistory(), known)


def test_a_spec_takes_known_names_once() -> None:
    spec = FeatureSpec.of(["subject.count.1h", "amount.value", "attributes.x"])
    whole = Velocity(
        epoch="e",
        sequence=1,
        complete=True,
        subject=EntityVelocity(windows=((2, 0, 0.0, None, 0, 0),) * 5, labels=((0, 0),) * 3),
    )
    assert spec.values(parse_event(EVENT), SubjectHistory(), whole) == (2, 20.0, None)
    for wrong in ("subject.count.2h", "subject.fraud.1h", "person.count.1h", "subject", "attributes.", ""):
        assert not is_feature(wrong)
        with pytest.raises(InvalidModelStateError, match="unknown features"):
            FeatureSpec.of(["amount.value", wrong])
    with pytest.raises(InvalidModelStateError, match="twice"):
        FeatureSpec.of(["amount.value", "amount.value"])


def test_facts_are_read_back_as_they_were_written() -> None:
    velocity = velocity_of(Observation("e", 3, True, None, (sample(AT, 1),), ()), AT, b"EUR", VelocityPolicy())
    assert Velocity.model_validate(velocity.model_dump(mode="json")) == velocity


# --- the shuffled feed ------------------------------------------------------------------------------------


def payments() -> list[Sighting]:
    """COUNT events of the payments data, of few customers and terminals so that histories fill; else made-up ones."""
    if not PAYMENTS.exists():
        sys.stderr.write("NOT the payments data: it is not beside the project; made-up events instead\n")
        random = Random(SEED)
        start = datetime(2018, 7, 1, tzinfo=UTC)
        times = sorted(random.randrange(40 * 86_400) for _ in range(COUNT))
        rows = [
            (
                start + timedelta(seconds=s),
                random.randrange(60),
                random.randrange(80),
                random.randrange(1, 30_000) / 100,
                0,
            )
            for s in times
        ]
    else:
        with lzma.open(PAYMENTS, "rt") as file:
            taken = (row for row in csv.DictReader(file) if int(row["CUSTOMER_ID"]) % 60 == 7)
            rows = [
                (
                    datetime.fromisoformat(row["TX_DATETIME"]).replace(tzinfo=UTC),
                    int(row["CUSTOMER_ID"]),
                    int(row["TERMINAL_ID"]) % 50,
                    float(row["TX_AMOUNT"]),
                    int(row["TX_FRAUD"]),
                )
                for row in itertools.islice(taken, COUNT)
            ]
    found = []
    for number, (at, customer, terminal, amount, fraud) in enumerate(rows):
        verdict = replace(NO_VERDICT, verdict=FRAUD, known=since_1900(at) + 7 * DAY_MS) if fraud else NO_VERDICT
        parties = party_digest("customer", str(customer)), party_digest("terminal", str(terminal))
        found.append(Sighting(ACME, f"{number:032x}", since_1900(at), *parties, amount, b"EUR", verdict=verdict))
    return found


def shuffled(feed: Sequence[Sighting], random: Random) -> list[Sighting]:
    """Up to ten minutes late each, and one in twenty comes again."""
    arrivals = [(s.at + random.randrange(600_000), s) for s in feed]
    arrivals += [(s.at + random.randrange(600_000), s) for s in random.sample(list(feed), len(feed) // 20)]
    return [s for _, s in sorted(arrivals, key=lambda one: one[0])]


def recomputed(
    before: Sequence[Sighting], now: Sighting, *, counterparty: bool, policy: VelocityPolicy
) -> dict[str, Any]:
    """One entity's features by brute force: no buckets, no bisection, no store."""
    side = "counterparty" if counterparty else "subject"
    newest = sorted(before, key=lambda s: (s.at, s.event_id))[-policy.keep :]
    found: dict[str, Any] = {}
    for name, length in WINDOWS.items():
        part = [s for s in newest if now.at - length < s.at <= now.at]
        amounts = [s.amount for s in part]
        found[f"{side}.count.{name}"] = len(part)
        found[f"{side}.sum.{name}"] = math.fsum(amounts)
        found[f"{side}.mean.{name}"] = math.fsum(amounts) / len(part) if part else None
        found[f"{side}.max.{name}"] = max(amounts, default=None)
        found[f"{side}.distinct.{name}"] = len({s.subject if counterparty else s.counterparty for s in part})
        found[f"{side}.distinct_attribute.{name}"] = 0
    for name, length in LABEL_WINDOWS.items():
        ripe = now.at - policy.label_delay_ms
        part = [s for s in newest if ripe - length < s.at <= ripe]
        frauds = [s for s in part if s.verdict.verdict == FRAUD and s.verdict.known <= now.at]
        found[f"{side}.matured.{name}"] = len(part)
        found[f"{side}.fraud.{name}"] = len(frauds)
        found[f"{side}.fraud_rate.{name}"] = len(frauds) / len(part) if part else None
    return found


async def stored(feed: Sequence[Sighting]) -> tuple[list[Observation], dict[str, list[tuple[Any, ...]]]]:
    """What each event saw, and the histories at the end without their sequences."""
    server = MemoryRedis(SteppingClock())
    store = MemoryFeatureStore(server, CountingIds())
    await store.complete(await store.marks([ACME]))
    answers = []
    for start in range(0, len(feed), 16):
        answers += list(await store.observe(feed[start : start + 16]))
    return answers, {key: [(*s[:2], *s[3:]) for s in samples] for key, samples in server.samples.items()}


async def test_features_of_a_shuffled_feed_equal_a_recomputation_over_what_was_observed_before() -> None:
    policy, feed = VelocityPolicy(), payments()
    late = shuffled(feed, Random(SEED))
    assert len(late) == len(feed) + len(feed) // 20 > COUNT * 0.9
    answers, end = await stored(late)
    _, sorted_end = await stored(feed)
    assert end == sorted_end
    known: dict[str, list[Sighting]] = defaultdict(list)
    facts: dict[str, Velocity] = {}
    event, history = parse_event(EVENT), SubjectHistory()
    labelled = repeats = 0
    for sighting, seen in zip(late, answers, strict=True):
        velocity = velocity_of(seen, sighting.at, b"EUR", policy)
        if sighting.event_id in facts:
            repeats += 1
            assert velocity == facts[sighting.event_id]
            continue
        facts[sighting.event_id] = velocity
        subject, other = sighting.histories()
        assert other is not None
        wanted = recomputed(known[subject], sighting, counterparty=False, policy=policy)
        wanted |= recomputed(known[other], sighting, counterparty=True, policy=policy)
        assert {name: feature(name, event, history, velocity) for name in VELOCITY_FEATURES} == wanted
        labelled += bool(wanted["counterparty.fraud.30d"])
        known[subject].append(sighting)
        known[other].append(sighting)
    assert repeats == len(feed) // 20
    assert not PAYMENTS.exists() or labelled > 0
    assert max(map(len, known.values())) > 40


def test_a_stored_sample_is_68_bytes_and_reads_back() -> None:
    given = Sighting(ACME, f"{5:032x}", AT, f"{1:032x}", f"{2:032x}", 1.5, b"EUR", b"attribut")
    mine, theirs = given.records(9)
    assert RECORD.size == len(mine) == len(theirs) == 68
    assert samples_of(mine + theirs)[0][:5] == (AT, (5).to_bytes(16, "big"), 9, 1.5, b"EUR")
