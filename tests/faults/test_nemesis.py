"""The plan of faults is a pure function of its seed, and holds what its profile says."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import replace

from tests.faults.armed import HALF_SETTLED, places_of
from tests.faults.load import LoadProfile, Variant, arrivals, body_of, canary, shape_of
from tests.faults.nemesis import PROXY_FAULTS, Kind, Profile, local_ports, overlapping, plan, weather_of

ROLES = (
    *(f"{stage}-{n}" for stage in ("retrieval", "scoring", "guardrail", "decision") for n in (1, 2)),
    *("gateway", "ingress", "sink-audit-1", "sink-audit-2", "sink-parking"),
)
LONG = Profile(1_800, ROLES, kills=600, pauses=150, proxy=150, redis=40, postgresql=30, rabbitmq=20, flushes=10)


def test_the_same_seed_gives_the_same_plan_and_another_seed_another() -> None:
    assert plan(7, LONG) == plan(7, LONG)
    assert plan(7, LONG) != plan(8, LONG)


def test_a_plan_has_the_faults_of_its_profile_in_order_and_inside_its_time() -> None:
    planned = plan(1, LONG)
    counted = Counter(fault.kind for _, fault in planned)
    assert counted == {
        Kind.KILL: 600,
        Kind.PAUSE: 150,
        Kind.PROXY: 150,
        Kind.REDIS: 40,
        Kind.POSTGRESQL: 30,
        Kind.RABBITMQ: 20,
        Kind.FLUSH: 10,
    }
    times = [at_s for at_s, _ in planned]
    assert times == sorted(times)
    assert times[0] >= 0
    assert times[-1] <= LONG.seconds


def test_most_kills_and_pauses_are_planned_at_named_places_each_often_enough() -> None:
    strikes = [fault for _, fault in plan(1, LONG) if fault.kind in (Kind.KILL, Kind.PAUSE)]
    placed = [fault for fault in strikes if fault.place]
    assert len(placed) >= 0.8 * len(strikes)
    counted = Counter(fault.place for fault in placed)
    assert set(counted) == {place for role in ROLES for place in places_of(role)}
    assert min(counted.values()) > 15  # some will not be passed in time
    assert all(fault.place in places_of(fault.target) for fault in placed)


def test_a_third_of_the_kills_wait_for_a_large_half_settled_carrier() -> None:
    kills = [fault for _, fault in plan(1, LONG) if fault.kind is Kind.KILL]
    assert sum(fault.least_entries >= 8 and fault.place in HALF_SETTLED for fault in kills) >= 0.3 * len(kills)


def test_pauses_outlast_the_lease_and_stand_around_every_flush() -> None:
    planned = plan(1, LONG)
    assert all(fault.for_s > LONG.lease_s for _, fault in planned if fault.kind is Kind.PAUSE)
    flushes = [at_s for at_s, fault in planned if fault.kind is Kind.FLUSH]
    pauses = [(at_s, at_s + fault.for_s) for at_s, fault in planned if fault.kind is Kind.PAUSE]
    across = sum(sum(start < at_s < end for start, end in pauses) for at_s in flushes)
    assert across >= 3 * len(flushes)


def test_a_short_profile_is_a_plan_too() -> None:
    short = replace(LONG, seconds=90, kills=30, pauses=8, proxy=8, redis=2, postgresql=1, rabbitmq=1, flushes=1)
    assert Counter(fault.kind for _, fault in plan(3, short))[Kind.KILL] == 30


def test_every_proxy_fault_is_known() -> None:
    assert all(weather_of(how) for how in PROXY_FAULTS if how != "reset")


def test_times_of_faults_are_joined_where_they_overlap() -> None:
    assert overlapping([(5, 6), (1, 3), (2, 4), (6, 7)]) == [(1, 4), (5, 7)]


def test_the_ports_of_a_process_are_found_while_it_cannot_answer() -> None:
    import socket

    with socket.socket() as server, socket.socket() as client:
        server.bind(("127.0.0.1", 0))
        server.listen()
        client.connect(server.getsockname())
        assert client.getsockname()[1] in local_ports(os.getpid())
    assert local_ports(2**22 + 1) == set()


def test_the_load_comes_in_bursts_with_repeats_changed_and_invalid_bodies() -> None:
    profile = LoadProfile(60, 50)
    planned = arrivals(5, profile)
    assert planned == arrivals(5, profile)
    kinds = Counter(arrival.submission.variant for arrival in planned)
    assert kinds[Variant.OTHER] > 20
    assert kinds[Variant.INVALID] > 10
    assert sum(arrival.submission.repeat for arrival in planned) > 150
    first = {arrival.submission.identity for arrival in planned}
    assert len(first) == 3_000
    in_bursts = sum(arrival.at_s % profile.period_s < profile.burst_s for arrival in planned)
    assert in_bursts > 0.7 * len(planned)


def test_bodies_hold_the_tenants_canary_and_nobody_elses() -> None:
    (one, *_) = arrivals(5, LoadProfile(6, 5))
    body = body_of(one.submission, "acme")
    assert canary("acme") in body["text"]
    assert canary("acme") != canary("globex")
    assert {shape_of(number)["kind"] for number in range(50)} == {"risk", "compliance"}
