"""The verdict on the fleet: the worst first, and what could not be read is never well."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from contracts.failures import Severity
from resilience.breaker import Phase
from resilience.monitor import (
    SEVERITIES,
    Cause,
    Health,
    MonitorPolicy,
    Readings,
    ServerReading,
    StageReading,
    judge,
)

POLICY = MonitorPolicy()
UP, DOWN, UNASKED = ServerReading(answered=True, seconds=0.01), ServerReading(answered=False), ServerReading(None)
QUIET = StageReading(0, 0)
WELL = Readings(UP, UP, UP, {"scoring": QUIET, "decision": StageReading(40, 1, 0.2)}, {"llm": Phase.CLOSED})


def causes(readings: Readings) -> list[tuple[Cause, str]]:
    return [(one.cause, one.subject) for one in judge(readings, POLICY).reasons]


def test_a_fleet_that_is_well_has_no_reasons() -> None:
    verdict = judge(WELL, POLICY)
    assert (verdict.health, verdict.reasons) == (Health.OK, ())


@pytest.mark.parametrize("server", ["database", "redis", "rabbitmq"])
def test_without_one_server_the_fleet_is_down(server: str) -> None:
    verdict = judge(replace(WELL, **{server: DOWN}), POLICY)  # type: ignore[arg-type]  # a server
    assert verdict.health is Health.DOWN
    assert [one.cause for one in verdict.reasons] == [Cause.UNREACHABLE]
    assert verdict.reasons[0].subject in verdict.reasons[0].sentence


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        ({"redis": UNASKED}, Cause.UNKNOWN),
        ({"redis": ServerReading(answered=True, seconds=0.5)}, Cause.SLOW_SERVER),
        ({"redis": ServerReading(answered=True, seconds=math.nan)}, Cause.SLOW_SERVER),
        ({"stages": {"scoring": StageReading(None, 0)}}, Cause.UNKNOWN),
        ({"stages": {"scoring": StageReading(0, None)}}, Cause.UNKNOWN),
        ({"stages": {"scoring": StageReading(0, math.nan)}}, Cause.UNKNOWN),
        ({"stages": {"scoring": StageReading(1, 10)}}, Cause.LATE),
        ({"stages": {"scoring": StageReading(10_000, 1)}}, Cause.BACKLOG),
        ({"stages": {"scoring": StageReading(1, 1, 5)}}, Cause.SLOW_STAGE),
        ({"breakers": {"llm": Phase.OPEN}}, Cause.BREAKER_OPEN),
        ({"breakers": {"llm": Phase.HALF_OPEN}}, Cause.BREAKER_PROBING),
    ],
)
def test_anything_else_degrades_it(change: dict[str, object], cause: Cause) -> None:
    verdict = judge(replace(WELL, **change), POLICY)  # type: ignore[arg-type]  # a field of each kind
    assert verdict.health is Health.DEGRADED
    assert [one.cause for one in verdict.reasons] == [cause]


def test_a_stage_that_stands_still_is_down_whatever_the_servers_say() -> None:
    stuck = replace(WELL, stages={"scoring": StageReading(1, 300)})
    assert (judge(stuck, POLICY).health, causes(stuck)) == (Health.DOWN, [(Cause.STUCK, "scoring")])


@pytest.mark.parametrize(
    ("reading", "well"), [(StageReading(9_999, 9.99, 4.99), True), (StageReading(10_000, 9.99, 4.99), False)]
)
def test_below_every_bound_is_well(reading: StageReading, well: bool) -> None:
    assert (judge(replace(WELL, stages={"scoring": reading}), POLICY).health is Health.OK) == well


def test_the_worst_comes_first_and_equals_by_cause_and_name() -> None:
    bad = Readings(
        ServerReading(answered=True, seconds=2.0),
        DOWN,
        UNASKED,
        {
            "scoring": StageReading(20_000, 400, 9),
            "decision": StageReading(None, None),
            "guardrail": StageReading(5, 20),
        },
        {"screening": Phase.OPEN, "llm": Phase.OPEN, "model": Phase.HALF_OPEN},
    )
    assert causes(bad) == [
        (Cause.UNREACHABLE, "Redis"),
        (Cause.STUCK, "scoring"),
        (Cause.UNKNOWN, "RabbitMQ"),
        (Cause.UNKNOWN, "decision"),
        (Cause.LATE, "guardrail"),
        (Cause.BREAKER_OPEN, "llm"),
        (Cause.BREAKER_OPEN, "screening"),
        (Cause.BACKLOG, "scoring"),
        (Cause.SLOW_SERVER, "PostgreSQL"),
        (Cause.SLOW_STAGE, "scoring"),
        (Cause.BREAKER_PROBING, "model"),
    ]


SERVERS = st.builds(ServerReading, st.sampled_from([True, False, None]), st.none() | st.floats(0, 9))
STAGES = st.builds(StageReading, st.none() | st.floats(0), st.none() | st.floats(0), st.none() | st.floats(0))
READINGS = st.builds(
    Readings,
    SERVERS,
    SERVERS,
    SERVERS,
    st.dictionaries(st.sampled_from("abc"), STAGES),
    st.dictionaries(st.sampled_from("xyz"), st.sampled_from(Phase)),
)


@given(READINGS)
def test_any_readings_have_one_verdict_and_it_follows_from_its_reasons(readings: Readings) -> None:
    verdict = judge(readings, POLICY)
    loud = [one.severity for one in verdict.reasons]
    order = [Severity.CRITICAL, Severity.ERROR, Severity.WARNING, Severity.INFO]
    assert loud == sorted(loud, key=order.index)
    wanted = Health.OK if not loud else Health.DOWN if Severity.CRITICAL in loud else Health.DEGRADED
    assert verdict.health is wanted
    for field in ("stages", "breakers"):
        backwards: Any = {field: dict(reversed(getattr(readings, field).items()))}
        turned = replace(readings, **backwards)
        assert judge(turned, POLICY) == verdict
    unknown = [server.answered is None for server in (readings.database, readings.redis, readings.rabbitmq)]
    assert not (any(unknown) and verdict.health is Health.OK)


def test_causes_are_listed_from_severe_to_slight() -> None:
    order = [Severity.CRITICAL, Severity.ERROR, Severity.WARNING, Severity.INFO]
    ranks = [order.index(SEVERITIES[cause]) for cause in Cause]
    assert all(one <= two for one, two in itertools.pairwise(ranks))


def test_late_comes_before_stuck() -> None:
    with pytest.raises(ValueError, match="stuck_s"):
        MonitorPolicy(late_s=300, stuck_s=300)
