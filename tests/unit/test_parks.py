"""Parks as a signal: what several tenants meet pauses the stage, what one tenant meets pauses that tenant."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest

from contracts.codec import entry_of
from contracts.failures import Category, DatabaseError, StagePausedError, fingerprint
from contracts.messages import parked_message
from contracts.ports import DeadLetter, Delivery, PauseNotice
from contracts.settlement import Ack, Pause, Settlement
from contracts.telemetry import PARK_BREAKS, Measurement
from contracts.tenancy import TenantScope
from contracts.topology import Layouts, Stage, parked_queue
from resilience.parks import ParkPolicy, StageParks, TenantParks, blocked_s, failed, parked, passed
from tests.fakes import RecordingTelemetry, SteppingClock
from tests.unit.test_runner import new_state
from workers.failing import Failures
from workers.gate import StageGate
from workers.outgoing import Wave
from workers.settling import RetryPolicy
from workers.sinks.parking import ParkingSink, TenantBrake

POLICY = ParkPolicy(stage_parks=4, pause_s=30, longest_s=100, tenant_parks=5, tenant_pause_s=120)
ACME, GLOBEX = TenantScope("acme"), TenantScope("globex")


def letter(number: int, scope: TenantScope | None = ACME, fingerprint: str = "f", category: str = "") -> DeadLetter:
    return DeadLetter(
        letter_id=f"{scope}:{number}:{fingerprint}",
        scope=scope,
        event_id=f"{number:032x}",
        stage="scoring",
        category=category or Category.UNEXPECTED_ERROR,
        problem="unexpected",
        exception_class="ValueError",
        fingerprint=fingerprint,
        attempts=3,
        first_failed_at="2026-01-31T12:00:00Z",
        last_failed_at="2026-01-31T12:00:01Z",
        body=b"",
    )


def both(count: int) -> list[DeadLetter]:
    return [letter(n, ACME if n % 2 else GLOBEX) for n in range(count)]


def after(
    letters: Sequence[DeadLetter], state: StageParks | None = None, now: float = 0.0, gap: float = 0.0
) -> StageParks:
    state = state or StageParks()
    for each in letters:
        state, now = parked(state, POLICY, each, now), now + gap
    return state


def test_one_failure_in_two_tenants_pauses_the_stage_at_the_threshold_and_not_before() -> None:
    assert not after(both(3)).broken_by
    state = after(both(4))
    assert (state.broken_by, blocked_s(state, 0), blocked_s(state, 30)) == ("f", 30, 0)


@pytest.mark.parametrize(
    "letters",
    [
        [letter(n) for n in range(50)],
        [letter(n, (ACME, GLOBEX)[n % 2], f"f{n}") for n in range(50)],
        [letter(n, (ACME, None)[n % 2]) for n in range(50)],
        [letter(n, (ACME, GLOBEX)[n % 2], category=Category.VALIDATION_ERROR) for n in range(50)],
        both(3) * 20,
    ],
    ids=["one tenant", "many failures", "nobody's", "the senders' own", "the same letters told again"],
)
def test_what_says_nothing_about_the_stage_pauses_no_stage(letters: list[DeadLetter]) -> None:
    assert not after(letters).broken_by


def test_parks_that_are_spread_over_a_longer_time_are_no_burst() -> None:
    assert not after(both(50), gap=POLICY.window_s / 3 + 0.1).broken_by
    assert after(both(50), gap=POLICY.window_s / 3 - 0.1).broken_by


def test_each_relapse_lasts_longer_up_to_a_bound_and_a_group_that_goes_through_ends_it() -> None:
    state, now, lengths = after(both(4)), 0.0, []
    for number in range(4):
        lengths.append(blocked_s(state, now))
        assert passed(state, now) == state, "a group that began before the pause says nothing"
        now += lengths[-1]
        assert after([letter(number, fingerprint="other")], state, now) == state
        state = after([letter(number)], state, now)
    assert lengths == [30, 60, 100, 100]
    now += 100
    assert failed(state, POLICY, "other", now) == state
    assert blocked_s(failed(state, POLICY, "f", now), now) == 100, "a try that will only be repeated has failed too"
    assert passed(state, now) == StageParks()
    assert blocked_s(after(both(3), passed(state, now), now), now) == 0


def test_relapses_without_end_stay_a_number() -> None:
    state = after(both(4))
    for number in range(5_000):
        state = after([letter(number)], state, state.until)
    assert blocked_s(state, state.until - 1) == pytest.approx(1)


def test_a_tenant_is_told_once_per_burst_and_a_letter_counts_once() -> None:
    parks = TenantParks(POLICY)
    told = [parks.parked(letter(n // 2), 0.0) for n in range(10)]
    assert [count for count in told if count] == [5]
    assert not any(parks.parked(letter(n), 100.0 + n * POLICY.window_s / 4) for n in range(50)), "too slow for a burst"
    assert not any(parks.parked(letter(n, None), 0.0) for n in range(50))
    mixed = [letter(n, (ACME, GLOBEX)[n % 2]) for n in range(8)]
    random.Random(7).shuffle(mixed)
    assert not any(TenantParks(POLICY).parked(each, 0.0) for each in mixed)


# --- the gate before a stage ---------------------------------------------------------------------------


@dataclass
class Notices:
    """The port Pauses: what a test says."""

    stages: dict[str, PauseNotice] = field(default_factory=dict)

    async def doors(self, scopes: Sequence[TenantScope]) -> Sequence[PauseNotice | None]:
        return [None] * len(scopes)

    async def stage(self, stage: str) -> PauseNotice | None:
        return self.stages.get(stage)


@dataclass
class Work:
    """A stage's work: what it was given, and what it parks of it."""

    gate: StageGate
    parks: list[DeadLetter] = field(default_factory=list)
    answer: Settlement = field(default_factory=Ack)
    given: int = 0

    async def __call__(self, deliveries: Sequence[Delivery]) -> Sequence[Settlement]:
        self.given += len(deliveries)
        for each in self.parks:
            self.gate.parked(each)
        return [self.answer] * len(deliveries)


@dataclass
class Heard:
    """Whoever listens to a runner's failures."""

    failures: list[str] = field(default_factory=list)
    letters: list[DeadLetter] = field(default_factory=list)

    def failed(self, fingerprint: str) -> None:
        self.failures.append(fingerprint)

    def parked(self, letter: DeadLetter) -> None:
        self.letters.append(letter)


GROUP = [Delivery("q", b"", "q")] * 2


def gate_of(notices: Notices, clock: SteppingClock) -> tuple[StageGate, RecordingTelemetry]:
    telemetry = RecordingTelemetry()
    return StageGate(Stage.SCORING, notices, telemetry, clock, POLICY), telemetry


async def test_a_paused_stage_is_given_nothing_until_it_is_resumed() -> None:
    notices = Notices({"scoring": PauseNotice("a bad release")})
    gate, _ = gate_of(notices, SteppingClock())
    work = Work(gate)
    with pytest.raises(StagePausedError, match="scoring was paused: a bad release"):
        await gate.through(work)(GROUP)
    assert work.given == 0
    notices.stages = {"guardrail": PauseNotice("another stage")}
    assert await gate.through(work)(GROUP) == [Ack(), Ack()]


async def test_a_runner_tells_the_gate_of_failures_and_parks() -> None:
    heard = Heard()
    failures = Failures(
        Stage.SCORING, RetryPolicy((100,)), Layouts.first(4), RecordingTelemetry(), SteppingClock(), heard
    )
    entry = entry_of(new_state(), Stage.SCORING)
    failures.fail(entry, ValueError("x"), Wave())
    assert heard == Heard(failures=[fingerprint(ValueError("x"))])
    failures.fail(entry.evolve(attempts=1), ValueError("x"), Wave())
    assert [each.fingerprint for each in heard.letters] == heard.failures[:1]


async def test_a_burst_of_parks_stops_the_stage_and_one_group_decides_whether_it_goes_on() -> None:
    clock = SteppingClock()
    gate, telemetry = gate_of(Notices(), clock)
    work = Work(gate, both(6))
    handle = gate.through(work)
    assert await handle(GROUP) == [Ack(), Ack()], "what was parked is settled: the entries did fail"
    for _ in range(3):
        with pytest.raises(StagePausedError, match="next try is in 30 s"):
            await handle(GROUP)
    assert work.given == 2
    clock.step(30)
    await gate.check()  # the consumer's probe
    assert await handle(GROUP) == [Ack(), Ack()]
    with pytest.raises(StagePausedError, match="60 s"):
        await handle(GROUP)
    clock.step(60)
    work.parks, work.answer = [], Pause("redis")
    await handle(GROUP)
    work.parks = [letter(99)]
    await handle(GROUP)
    with pytest.raises(StagePausedError):  # a server that was away is no proof that the failure is gone
        await handle(GROUP)
    clock.step(100)
    work.parks, work.answer = [], Ack()
    await handle(GROUP)
    work.parks = both(3)
    await handle(GROUP)
    await gate.check()
    assert telemetry.measurements.count(Measurement(PARK_BREAKS, 1.0, {"what": "scoring"})) == 3


# --- the sink of all letters ----------------------------------------------------------------------------


@dataclass
class Letters:
    """The port DeadLetters."""

    rows: list[DeadLetter] = field(default_factory=list)

    async def park(self, letters: Sequence[DeadLetter]) -> None:
        self.rows += letters


@dataclass
class Tripped:
    """What the brake asked for."""

    calls: list[tuple[TenantScope, str, float]] = field(default_factory=list)
    paused: bool = False
    down: bool = False

    async def __call__(self, scope: TenantScope, reason: str, seconds: float) -> bool:
        if self.down:
            raise DatabaseError
        self.calls.append((scope, reason, seconds))
        return not self.paused


def deliveries(letters: Sequence[DeadLetter]) -> list[Delivery]:
    sent = [parked_message(each, "scoring") for each in letters]
    return [Delivery(parked_queue("scoring"), m.body, m.routing_key, m.message_id, headers=m.headers) for m in sent]


async def test_many_letters_of_one_tenant_pause_it_and_nobody_else() -> None:
    trip, telemetry, clock = Tripped(), RecordingTelemetry(), SteppingClock()
    sink = ParkingSink(Letters(), clock, TenantBrake(trip, telemetry, clock, POLICY))
    group = deliveries([letter(n) for n in range(5)] + [letter(n, GLOBEX) for n in range(4)])
    assert await sink.handle(group) == [Ack()] * 9
    assert trip.calls == [(ACME, "5 of its events were parked within 60 s: see its dead letters", 120)]
    assert Measurement(PARK_BREAKS, 1.0, {"what": "tenant"}) in telemetry.measurements


@pytest.mark.parametrize("trip", [Tripped(down=True), Tripped(paused=True)], ids=["down", "paused already"])
async def test_a_pause_that_cannot_be_made_holds_up_no_letter(trip: Tripped) -> None:
    letters, telemetry, clock = Letters(), RecordingTelemetry(), SteppingClock()
    sink = ParkingSink(letters, clock, TenantBrake(trip, telemetry, clock, POLICY))
    assert await sink.handle(deliveries([letter(n) for n in range(5)])) == [Ack()] * 5
    assert len(letters.rows) == 5
    assert not telemetry.measurements
