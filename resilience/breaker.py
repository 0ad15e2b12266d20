"""A breaker per dependency: what fails too often is left alone for a while, then asked by a few.

Promises: while a breaker is open no call goes through; each opening in a row lasts longer, up to a bound; half-open it
lets at most `probes` calls run at once and closes only after that many have succeeded; an answer that belongs to an
earlier phase changes nothing. Pure in `admit` and `settle`: the policy is frozen, the state a value, the time an
argument. `Breaker.call` joins them, and `guarded` puts one around a whole port. Does not time calls out (whoever calls
does), and does not retry.

The idea is the circuit breaker of M. Nygard, "Release It!" (2007); the window counts calls, not seconds, so a quiet
dependency is judged by as many answers as a busy one.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any, Final, TypeVar, cast

from contracts.failures import DependencyUnavailableError, InfrastructureError
from contracts.ports import Clock
from contracts.telemetry import BREAKER_CHANGES, BREAKER_REFUSALS, Measurement
from resilience.limiter import Observe, ignore

T = TypeVar("T")


class Phase(StrEnum):
    """What a breaker does with calls: all pass, none pass, a few pass."""

    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half-open"


PHASES: Final[Mapping[Phase, frozenset[Phase]]] = {
    Phase.CLOSED: frozenset({Phase.OPEN}),
    Phase.OPEN: frozenset({Phase.HALF_OPEN}),
    Phase.HALF_OPEN: frozenset({Phase.CLOSED, Phase.OPEN}),
}
"""The whole machine: which phase may follow which."""


@dataclass(frozen=True, slots=True)
class BreakerPolicy:
    """When a breaker opens, for how long (s), and how it closes again.

    It opens once at least `minimum` of the last `window` calls are known and the share `failure_rate` of them failed.
    The first opening lasts `open_s`, each further one in a row `growth` times as long, `longest_s` at most. Probes that
    are not answered for `probe_s` count as failed. Raises ValueError for a policy that could not do that.
    """

    window: int = 20
    minimum: int = 10
    failure_rate: float = 0.5
    open_s: float = 5.0
    growth: float = 2.0
    longest_s: float = 60.0
    probes: int = 3
    probe_s: float = 30.0

    def __post_init__(self) -> None:
        if not 1 <= self.minimum <= self.window:
            raise ValueError("minimum is between 1 and window")
        if not 0 < self.failure_rate <= 1:
            raise ValueError("failure_rate is above 0 and at most 1")
        if not 0 < self.open_s <= self.longest_s or self.growth < 1:
            raise ValueError("open_s is above 0 and at most longest_s, and growth is at least 1")
        if self.probes < 1 or self.probe_s <= 0:
            raise ValueError("there is at least one probe, and probe_s is above 0")


@dataclass(frozen=True, slots=True)
class BreakerState:
    """What a breaker remembers; times are seconds of a monotonic clock.

    `answers`: the last calls, oldest first, True = failed (closed only). `opened`: openings in a row. `number` counts
    phases, so that a late answer is known as one. `out` and `good`: probes under way and succeeded, `asked`: when the
    last of them began (half-open only).
    """

    phase: Phase = Phase.CLOSED
    since: float = 0.0
    answers: tuple[bool, ...] = ()
    opened: int = 0
    number: int = 0
    out: int = 0
    good: int = 0
    asked: float = 0.0


class Answer(StrEnum):
    """How a call ended: the dependency answered, it failed, or nobody knows (the caller was cancelled)."""

    GOOD = "good"
    FAILED = "failed"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Ticket:
    """The permission of one call; names the phase in which it was given."""

    number: int


def open_for(state: BreakerState, policy: BreakerPolicy) -> float:
    """How long (s) the present opening lasts."""
    # The exponent is bounded: a dependency may stay away for months, and a float may not grow that far.
    grown = policy.open_s * policy.growth ** min(max(state.opened - 1, 0), 64)
    return min(grown, policy.longest_s)


def admit(state: BreakerState, policy: BreakerPolicy, now: float) -> tuple[BreakerState, Ticket | None]:
    """Whether a call may go through now; None = it may not. Every ticket is given back to `settle`."""
    if state.phase is Phase.OPEN:
        if now - state.since < open_for(state, policy):
            return state, None
        state = _enter(state, Phase.HALF_OPEN, now)
    if state.phase is Phase.CLOSED:
        return state, Ticket(state.number)
    if state.out and now - state.asked >= policy.probe_s:
        return _open(state, now), None
    if state.out + state.good >= policy.probes:
        return state, None
    return replace(state, out=state.out + 1, asked=now), Ticket(state.number)


def settle(state: BreakerState, policy: BreakerPolicy, now: float, ticket: Ticket, answer: Answer) -> BreakerState:
    """The state after a call ended; a ticket of an earlier phase changes nothing."""
    if ticket.number != state.number:
        return state
    if state.phase is Phase.HALF_OPEN:
        state = replace(state, out=state.out - 1)
        if answer is Answer.FAILED:
            return _open(state, now)
        if answer is Answer.GOOD:
            state = replace(state, good=state.good + 1)
            return state if state.good < policy.probes else _enter(state, Phase.CLOSED, now)
        return state
    if answer is Answer.UNKNOWN:
        return state
    answers = (*state.answers, answer is Answer.FAILED)[-policy.window :]
    failing = len(answers) >= policy.minimum and sum(answers) >= policy.failure_rate * len(answers)
    return _open(state, now) if failing else replace(state, answers=answers)


def _open(state: BreakerState, now: float) -> BreakerState:
    return _enter(replace(state, opened=state.opened + 1), Phase.OPEN, now)


def _enter(state: BreakerState, phase: Phase, now: float) -> BreakerState:
    opened = 0 if phase is Phase.CLOSED else state.opened
    return BreakerState(phase, now, opened=opened, number=state.number + 1)


def is_outage(error: BaseException) -> bool:
    """Whether an error says that the dependency failed: anything else is an answer, if an unwelcome one."""
    return isinstance(error, InfrastructureError | OSError | TimeoutError)


class Breaker:
    """The breaker of one dependency in this process. `failed` says which errors of a call are the dependency's."""

    def __init__(
        self,
        dependency: str,
        clock: Clock,
        policy: BreakerPolicy | None = None,
        observe: Observe = ignore,
        failed: Callable[[BaseException], bool] = is_outage,
    ) -> None:
        """`dependency` is a word of the code or of the settings: it is a metric's label and part of a sentence."""
        self.dependency = dependency
        self._clock = clock
        self._policy = policy or BreakerPolicy()
        self._observe = observe
        self._failed = failed
        self._state = BreakerState()

    @property
    def state(self) -> BreakerState:
        """What the breaker remembers; an opening that is over shows only once somebody calls."""
        return self._state

    async def call(self, operation: Callable[[], Awaitable[T]]) -> T:
        """Run one operation, or raise DependencyUnavailableError without running it."""
        now = self._clock.monotonic()
        state, ticket = admit(self._state, self._policy, now)
        self._become(state)
        if ticket is None:
            self._observe(Measurement(BREAKER_REFUSALS, 1.0, {"dependency": self.dependency}))
            raise DependencyUnavailableError(
                f"{self.dependency} failed too often and is left alone; it is asked again within "
                f"{self._next_try_s(now):.0f} s"
            )
        answer = Answer.UNKNOWN
        try:
            result = await operation()
            answer = Answer.GOOD
        except asyncio.CancelledError:
            raise
        except Exception as error:
            answer = Answer.FAILED if self._failed(error) else Answer.GOOD
            raise
        finally:
            self._become(settle(self._state, self._policy, self._clock.monotonic(), ticket, answer))
        return result

    def _next_try_s(self, now: float) -> float:
        state, policy = self._state, self._policy
        ends = state.since + open_for(state, policy) if state.phase is Phase.OPEN else state.asked + policy.probe_s
        return max(ends - now, 1.0)

    def _become(self, state: BreakerState) -> None:
        before, self._state = self._state.phase, state
        if state.phase is not before:
            self._observe(Measurement(BREAKER_CHANGES, 1.0, {"dependency": self.dependency, "to": str(state.phase)}))


class Breakers:
    """One breaker per dependency, made when it is first asked for."""

    def __init__(self, clock: Clock, policy: BreakerPolicy | None = None, observe: Observe = ignore) -> None:
        self._clock = clock
        self._policy = policy
        self._observe = observe
        self._found: dict[str, Breaker] = {}

    def of(self, dependency: str) -> Breaker:
        """The breaker of a dependency: always the same one."""
        if dependency not in self._found:
            self._found[dependency] = Breaker(dependency, self._clock, self._policy, self._observe)
        return self._found[dependency]

    def phases(self) -> dict[str, Phase]:
        """The phase of every breaker that was asked for, by dependency."""
        return {name: breaker.state.phase for name, breaker in sorted(self._found.items())}


class _Guarded:
    """A port as it is, but for its coroutines."""

    def __init__(self, port: Any, breaker: Breaker) -> None:
        self._port = port
        self._breaker = breaker

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._port, name)
        if not inspect.iscoroutinefunction(found):
            return found

        @functools.wraps(found)
        async def call(*args: Any, **kwargs: Any) -> Any:
            return await self._breaker.call(lambda: found(*args, **kwargs))

        setattr(self, name, call)
        return call


def guarded(port: T, breaker: Breaker) -> T:
    """The same port, each of whose calls goes through the breaker; it also raises DependencyUnavailableError then."""
    return cast("T", _Guarded(port, breaker))
