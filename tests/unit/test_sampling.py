"""From counts to what is decided on: the backlog's promises, and rates that are never guessed."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from contracts.ports import StageBacklog
from resilience.sampling import Sighting, carried, depth_of, is_whole, snapshot_between

NOW = datetime(2026, 1, 31, 12, tzinfo=UTC)
OLDEST = round(NOW.timestamp() * 1000) - 4_000
SEEN = Sighting(NOW, StageBacklog(1_000, OLDEST, True, 5_000, 4_990), messages=100, workers=2)


def test_the_backlog_is_in_events_with_its_oldest_age() -> None:
    depth = depth_of(SEEN)
    assert (depth.events, depth.messages, depth.oldest_age_s, depth.estimated) == (1_000, 100, 4.0, False)


@pytest.mark.parametrize("whole", [True, False])
def test_it_is_nothing_when_the_queues_are_empty(whole: bool) -> None:
    seen = replace(SEEN, messages=0, counted=replace(SEEN.counted, whole=whole))
    assert (depth_of(seen).events, depth_of(seen).oldest_age_s, depth_of(seen).estimated) == (0, 0.0, False)


def test_it_is_never_below_the_messages() -> None:
    assert depth_of(replace(SEEN, messages=1_500)).events == 1_500


def test_after_flushall_messages_stand_for_the_events_that_they_held() -> None:
    learnt = carried(SEEN)
    assert learnt == 10
    forgotten = replace(SEEN, counted=StageBacklog(3, None, False), messages=80, events_per_message=learnt)
    depth = depth_of(forgotten)
    assert (depth.events, depth.estimated) == (800, True)
    assert carried(forgotten) == 10  # nothing is learnt from what was forgotten


def test_counts_are_trusted_once_the_queues_were_empty_twice() -> None:
    forgotten = replace(SEEN, counted=replace(SEEN.counted, whole=False))
    empty = replace(forgotten, messages=0)
    assert [is_whole(*pair) for pair in ((None, empty), (forgotten, empty), (empty, forgotten), (empty, empty))] == [
        False,
        False,
        False,
        True,
    ]
    assert not is_whole(replace(SEEN, messages=0), replace(SEEN, messages=0))  # it is already


def after(**counts: Any) -> Sighting:
    return replace(SEEN, as_of=NOW + timedelta(seconds=5), counted=replace(SEEN.counted, **counts))


def test_rates_between_two_looks() -> None:
    later = after(events=1_300, claimed=5_500, advanced=5_440)
    found = snapshot_between("scoring", SEEN, later, 2, 4)
    assert (found.arrival_rate, found.service_rate, found.failure_rate) == (150.0, 50.0, 0.1)
    assert (found.backlog_events, found.oldest_age_s, found.current, found.partitions) == (1_300, 9.0, 2, 4)


def test_a_worker_that_was_not_always_busy_has_no_rate() -> None:
    found = snapshot_between("scoring", SEEN, after(events=10, claimed=7_000, advanced=6_990), 2, 4)
    assert found.service_rate is None
    assert found.arrival_rate == 220.0  # never below the messages: 100 of them


@pytest.mark.parametrize("later", [after(claimed=0), after(advanced=0), replace(SEEN, as_of=NOW)])
def test_counts_that_began_anew_give_no_rates(later: Sighting) -> None:
    found = snapshot_between("scoring", SEEN, later, 2, 4)
    assert (found.arrival_rate, found.service_rate, found.failure_rate) == (None, None, None)
    assert snapshot_between("scoring", None, SEEN, 2, 4).arrival_rate is None


def test_a_stage_at_rest_has_rates_of_nothing() -> None:
    rest = replace(SEEN, counted=StageBacklog(0, None, True, 9, 9), messages=0)
    found = snapshot_between("scoring", rest, replace(rest, as_of=NOW + timedelta(seconds=5)), 1, 4)
    assert (found.arrival_rate, found.service_rate, found.failure_rate) == (0.0, None, 0.0)
