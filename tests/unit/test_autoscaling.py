"""The autoscaler's decisions: up at once, down late, never on bad numbers, never into a failing dependency."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from resilience.autoscaling import (
    Action,
    MetricsSnapshot,
    Reason,
    ScalingDecision,
    ScalingPolicy,
    ScalingState,
    evaluate,
    policy_of,
    snapshot_of,
    trace_head,
    trace_line,
)

START = datetime(2026, 1, 31, 12, tzinfo=UTC)
POLICY = ScalingPolicy(minimum=2, maximum=20)
CALM = MetricsSnapshot("scoring", START, 4, 16, 0, 0, 160, 50, 0)
"""160 a second at 50 per worker and 90 %: four workers are just what is needed."""


def decide(
    snapshot: MetricsSnapshot, state: ScalingState | None = None, policy: ScalingPolicy = POLICY
) -> ScalingDecision:
    return evaluate(snapshot, policy, state or ScalingState(), snapshot.as_of)


def run(snapshots: Sequence[MetricsSnapshot], policy: ScalingPolicy = POLICY) -> list[ScalingDecision]:
    """Decide on each, 15 s apart, and carry it out before the next."""
    state, current, made = ScalingState(), snapshots[0].current, []
    for place, snapshot in enumerate(snapshots):
        now = START + timedelta(seconds=15 * place)
        made.append(evaluate(replace(snapshot, as_of=now, current=current), policy, state, now))
        state, current = made[-1].state, made[-1].desired
    return made


def seen(decision: ScalingDecision) -> tuple[Action, int, Reason]:
    return decision.action, decision.desired, decision.reason


def test_a_stage_that_keeps_up_is_left_alone() -> None:
    assert seen(decide(CALM)) == (Action.NO_ACTION, 4, Reason.STEADY)


def test_more_arrivals_are_met_at_once_and_in_full() -> None:
    assert seen(decide(replace(CALM, arrival_rate=450))) == (Action.SCALE_UP, 10, Reason.ARRIVALS)


def test_a_backlog_is_met_so_that_it_is_gone_in_time() -> None:
    backlog = replace(CALM, arrival_rate=50, backlog_events=4_000, oldest_age_s=5)
    assert seen(decide(backlog)) == (Action.SCALE_UP, 6, Reason.BACKLOG)


def test_what_fails_and_comes_back_is_work_too() -> None:
    assert decide(replace(CALM, failure_rate=0.2)).desired == 5


def test_events_that_grow_old_although_the_numbers_are_content_get_one_more() -> None:
    old = replace(CALM, arrival_rate=50, backlog_events=500, oldest_age_s=60)
    assert seen(decide(old)) == (Action.SCALE_UP, 5, Reason.AGE)
    shrinking = ScalingState(backlog=501)
    assert decide(old, shrinking).action is Action.NO_ACTION


def test_a_few_old_events_on_the_ladder_move_nothing() -> None:
    assert decide(replace(CALM, backlog_events=3, oldest_age_s=500)).action is Action.NO_ACTION


def test_full_processors_with_work_waiting_get_one_more() -> None:
    busy = replace(CALM, arrival_rate=100, backlog_events=10, cpu=0.95)
    assert seen(decide(busy)) == (Action.SCALE_UP, 5, Reason.CPU)
    assert decide(replace(busy, backlog_events=0)).action is Action.NO_ACTION


def test_one_step_grows_to_the_growth_and_no_further() -> None:
    policy = replace(POLICY, growth=3)
    assert decide(replace(CALM, arrival_rate=10_000), policy=policy).desired == 12
    assert decide(replace(CALM, arrival_rate=10_000, current=2), policy=replace(POLICY, growth=1.1)).desired == 3


def test_a_second_step_up_waits_until_the_first_can_be_seen() -> None:
    policy = replace(POLICY, up_pause_s=30)
    made = run([replace(CALM, arrival_rate=rate) for rate in (450, 600, 600)], policy)
    assert [seen(one)[1:] for one in made] == [(10, Reason.ARRIVALS), (10, Reason.COOLING_DOWN), (14, Reason.ARRIVALS)]


def test_fewer_only_after_a_calm_and_in_steps() -> None:
    made = run([replace(CALM, arrival_rate=40, current=16)] * 8)
    assert [one.desired for one in made] == [16, 16, 16, 8, 4, 2, 2, 2]
    assert {one.reason for one in made[:3]} == {Reason.COOLING_DOWN}
    assert {one.reason for one in made[3:6]} == {Reason.SURPLUS}


def test_what_was_needed_a_moment_ago_stays() -> None:
    rates = [40, 40, 40, 340, 40, 40, 40, 40]
    made = run([replace(CALM, arrival_rate=rate, current=16) for rate in rates])
    assert [one.desired for one in made[3:7]] == [9, 9, 9, 9]


def test_load_that_wavers_around_a_boundary_does_not_flap() -> None:
    rates = [180 + (6 if place % 2 else -6) for place in range(40)]
    made = run([replace(CALM, arrival_rate=rate) for rate in rates])
    assert [one.action for one in made].count(Action.SCALE_UP) == 1
    assert Action.SCALE_DOWN not in {one.action for one in made}


def test_a_slow_stage_does_not_shrink() -> None:
    slow = replace(CALM, arrival_rate=40, current=16, latency_s=9.0)
    assert {one.reason for one in run([slow] * 8)[3:]} == {Reason.LATENCY}


@pytest.mark.parametrize("missing", ["backlog_events", "oldest_age_s", "arrival_rate", "service_rate", "failure_rate"])
@pytest.mark.parametrize("value", [None, math.nan, math.inf, -1.0])
def test_what_was_not_measured_moves_nothing(missing: str, value: float | None) -> None:
    loud = replace(CALM, arrival_rate=5_000, backlog_events=50_000)
    lost: Any = {missing: value}
    assert seen(decide(replace(loud, **lost))) == (Action.NO_ACTION, 4, Reason.MISSING)


def test_a_learnt_rate_stands_in_for_one_that_nobody_could_measure() -> None:
    state = decide(CALM).state
    later = replace(CALM, as_of=START + timedelta(seconds=15), service_rate=None, arrival_rate=450)
    assert decide(later, state).desired == 10


def test_an_idle_fleet_shrinks_although_no_rate_is_known() -> None:
    idle = replace(CALM, current=16, arrival_rate=0, service_rate=None)
    assert run([idle] * 8)[-1].desired == 2


@pytest.mark.parametrize("seconds", [-61, 61, 3_600])
def test_numbers_of_another_time_move_nothing(seconds: int) -> None:
    loud = replace(CALM, arrival_rate=5_000)
    made = evaluate(loud, POLICY, ScalingState(), START + timedelta(seconds=seconds))
    assert seen(made) == (Action.NO_ACTION, 4, Reason.STALE)


def test_numbers_that_overtook_each_other_move_nothing() -> None:
    state = decide(CALM).state
    assert decide(replace(CALM, as_of=START - timedelta(seconds=1)), state).reason is Reason.STALE


def test_a_failing_dependency_is_not_pressed_on_and_is_given_time_to_heal() -> None:
    failing = replace(CALM, arrival_rate=5_000, backlog_events=190_000, oldest_age_s=90)
    made = run([replace(failing, failure_rate=rate) for rate in (0.3, 0.9, 0.2, 0.1, 0.09)])
    assert [one.reason for one in made] == [Reason.FAILING] * 4 + [Reason.BACKLOG]
    assert [one.desired for one in made] == [4, 4, 4, 4, 16]


def test_a_stage_is_not_shrunk_while_its_dependency_fails_nor_right_after() -> None:
    idle = replace(CALM, arrival_rate=10, current=16)
    made = run([*[idle] * 3, replace(idle, failure_rate=1.0), *[idle] * 4])
    assert [one.desired for one in made] == [16] * 7 + [8]


@pytest.mark.parametrize(
    ("change", "result"),
    [
        ({"current": 0}, (Action.SCALE_UP, 4, Reason.ARRIVALS)),
        ({"current": 1, "arrival_rate": 0}, (Action.SCALE_UP, 2, Reason.BELOW_MINIMUM)),
        ({"current": 1, "arrival_rate": None}, (Action.SCALE_UP, 2, Reason.BELOW_MINIMUM)),
        ({"current": 30, "arrival_rate": 5_000}, (Action.SCALE_DOWN, 16, Reason.ABOVE_MAXIMUM)),
        ({"current": 30, "failure_rate": None}, (Action.SCALE_DOWN, 16, Reason.ABOVE_MAXIMUM)),
        ({"current": 16, "arrival_rate": 5_000}, (Action.NO_ACTION, 16, Reason.AT_MAXIMUM)),
        ({"current": 4, "partitions": 1}, (Action.SCALE_DOWN, 1, Reason.ABOVE_MAXIMUM)),
    ],
)
def test_the_bounds_hold_whatever_else_is_known(change: dict[str, float | None], result: object) -> None:
    assert seen(decide(replace(CALM, **change))) == result  # type: ignore[arg-type]  # a field of either kind


@pytest.mark.parametrize("change", [{"current": -1}, {"partitions": 0}])
def test_a_snapshot_that_nobody_can_have_measured_is_an_error(change: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="at least 0 workers"):
        decide(replace(CALM, **change))  # type: ignore[arg-type]  # counts


NUMBERS = st.none() | st.floats(0, 1e12) | st.sampled_from([math.nan, math.inf, 5e-324])
SNAPSHOTS = st.builds(
    MetricsSnapshot,
    st.just("scoring"),
    st.integers(0, 10_000).map(lambda s: START + timedelta(seconds=s)),
    st.integers(0, 100),
    st.integers(1, 100),
    NUMBERS,
    NUMBERS,
    NUMBERS,
    NUMBERS,
    NUMBERS,
    NUMBERS,
    NUMBERS,
)


@settings(max_examples=150, deadline=None)
@given(st.lists(SNAPSHOTS, max_size=8))
def test_any_numbers_give_a_decision_within_bounds_and_the_same_one_twice(snapshots: list[MetricsSnapshot]) -> None:
    state = ScalingState()
    for snapshot in sorted(snapshots, key=lambda one: one.as_of):
        first, second = decide(snapshot, state), decide(snapshot, state)
        assert repr(first) == repr(second)
        most = min(POLICY.maximum, snapshot.partitions)
        assert min(POLICY.minimum, most) <= first.desired <= most
        compared = (first.desired > snapshot.current) - (first.desired < snapshot.current)
        assert first.action is [Action.NO_ACTION, Action.SCALE_UP, Action.SCALE_DOWN][compared]
        state = first.state
        assert len(state.needs) <= len(snapshots)


@pytest.mark.parametrize(
    "bad",
    [
        {"minimum": 0},
        {"maximum": 0},
        {"busy": 1.1},
        {"spare": 0.95},
        {"healed": 0.5},
        {"growth": 1.0},
        {"shrink": 0.0},
        {"drain_s": 0.0},
        {"calm_s": -1.0},
    ],
)
def test_a_policy_that_contradicts_itself_is_refused(bad: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        ScalingPolicy(**bad)  # type: ignore[arg-type]  # a number of either kind


def test_a_trace_line_gives_back_what_was_decided_on() -> None:
    policy, snapshot = replace(POLICY, calm_s=7.5), replace(CALM, cpu=None, latency_s=0.25)
    head = trace_head("scoring", START, policy)
    line = trace_line(snapshot, START + timedelta(milliseconds=250), decide(snapshot), START)
    assert policy_of(head) == policy
    assert snapshot_of(head, line) == (snapshot, START + timedelta(milliseconds=250))
    assert (line["action"], line["desired"], line["reason"]) == ("no-action", 4, "steady")


@pytest.mark.parametrize("head", [{}, {"trace": 2}, {"trace": 1}, {"trace": 1, "policy": {"speed": 1}}])
def test_a_trace_of_another_kind_is_a_clear_error(head: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"versions? 1|names the policy"):
        policy_of(head)
    with pytest.raises(ValueError, match="has t, now"):
        snapshot_of(trace_head("scoring", START, POLICY), {"t": 1})
