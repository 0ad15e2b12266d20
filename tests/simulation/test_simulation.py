"""The fleet in virtual time: every failpoint once, some pairs and seeds of the day, and the same story twice.

`make simulate` runs all pairs and 100,000 seeds. RISKFLEET_TEST_SEEDS sets how many seeds run here, and
RISKFLEET_TEST_SEED the first of them.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest
import structlog

from tests.simulation.campaign import Tally, plans_of, report, shrink, tally, told
from tests.simulation.fleet import ALL_PLACES, KINDS, places_of
from tests.simulation.mutants import MUTANTS, Mutant
from tests.simulation.plans import Mode, number_of_pairs, random_plan, single_plans
from tests.simulation.run import run

SEEDS = int(os.environ.get("RISKFLEET_TEST_SEEDS", "250"))
FIRST = int(os.environ.get("RISKFLEET_TEST_SEED", str(int(time.time() // 86_400) * 1_000)))
PAIRS = 60

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(autouse=True)
def _silence() -> Iterator[None]:
    """A fleet that is killed a thousand times says a great deal."""
    before = structlog.get_config()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    yield
    structlog.configure(**before)


def check(total: Tally, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with capsys.disabled():
        print(f"\n{report(name, total, 0)}")  # noqa: T201 - seeds and counts belong into the log
    assert not total.failed, "\n".join(told(plan, broken) for plan, broken in total.failed[:3])


def test_every_failpoint_in_every_way_for_one_event_and_for_eight(capsys: pytest.CaptureFixture[str]) -> None:
    plans = list(single_plans())
    assert len(plans) == len(ALL_PLACES) * len(Mode) * 2
    total = tally(plans)
    check(total, f"{len(plans)} single plans", capsys)
    assert total.struck == len(plans), "a failpoint was not reached"


def test_some_pairs_of_failpoints(capsys: pytest.CaptureFixture[str]) -> None:
    random = Random(FIRST)
    places = sorted(random.sample(range(number_of_pairs()), PAIRS))
    total = tally(plan for place in places for plan in plans_of("pairs", place, place + 1))
    check(total, f"{PAIRS} pairs of {number_of_pairs():,}, seed {FIRST}", capsys)


def test_seeds_of_the_day(capsys: pytest.CaptureFixture[str]) -> None:
    total = tally(random_plan(seed) for seed in range(FIRST, FIRST + SEEDS))
    check(total, f"seeds {FIRST} to {FIRST + SEEDS}", capsys)
    assert total.seen["redelivered"] > SEEDS // 4
    assert total.seen["duplicates_suppressed_total"] > SEEDS // 8


def test_a_seed_tells_the_same_story_twice() -> None:
    stories = [[(run(random_plan(seed)).trace) for seed in range(FIRST, FIRST + 20)] for _ in range(2)]
    assert stories[0] == stories[1]
    assert len(set(stories[0])) == 20


def test_a_failing_plan_is_made_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A broken promise that needs one submission and no fault loses all others."""
    plan = next(p for p in map(random_plan, range(100)) if p.faults and p.strikes and len(p.sent) > 3)
    culprit = plan.sent[2].identity
    original = run

    def broken(tried: object) -> object:
        result = original(tried)  # type: ignore[arg-type]
        result.violations = ["broken"] if any(one.identity == culprit for one in result.plan.sent) else []
        return result

    monkeypatch.setattr("tests.simulation.campaign.run", broken)
    small = shrink(plan)
    assert not small.faults
    assert not small.strikes
    assert [one.identity for one in small.sent] == [culprit]


@pytest.mark.parametrize("kind", KINDS)
def test_places_are_named_once(kind: str) -> None:
    assert len(set(places_of(kind))) == len(places_of(kind)) > 3


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_every_planted_bug_still_has_its_place(mutant: Mutant) -> None:
    root = Path(__file__).parents[2]
    assert (root / mutant.file).read_text().count(mutant.old) == 1
    assert mutant.new != mutant.old
    assert all((root / test).exists() for test in mutant.tests.split())
