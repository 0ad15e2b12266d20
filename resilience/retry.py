"""When something that failed is tried again: one policy, read by a call that waits and by a message that waits.

Promises: what an error's disposition forbids is never repeated; waits and tries are bounded. A message waits on the
retry ladder, whose rungs have fixed lengths; a call waits in place, each time somewhere between nothing and a bound
that doubles ("full jitter": M. Brooker, "Exponential Backoff And Jitter", AWS Architecture Blog, 2015), so that callers
who failed together do not return together. Chance and the way to wait are injected. Does not know whether an operation
may be repeated: whoever hands it to `call_again` does.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final, TypeVar

from tenacity import AsyncRetrying, RetryCallState, retry_if_exception

from contracts.failures import Disposition, classify

T = TypeVar("T")

Chance = Callable[[], float]
"""A number from 0 (included) to 1 (excluded)."""

Sleep = Callable[[float], Awaitable[None]]
"""A way to wait so many seconds."""

_REPEATABLE: Final = frozenset({Disposition.RETRY, Disposition.PAUSE})


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """The ladder's waits (ms) before attempt 2, 3, …, and the bounds of a call that waits in place (s).

    An entry that failed once more than there are waits is parked. A call is made `call_tries` times at most; the wait
    before its second try is below `call_first_s`, the bound doubles up to `call_longest_s`, and all its waits together
    stay below `call_budget_s`.
    """

    waits_ms: tuple[int, ...] = (1_000, 5_000, 15_000, 30_000)
    call_tries: int = 4
    call_first_s: float = 0.05
    call_longest_s: float = 1.0
    call_budget_s: float = 2.0


def ladder_wait(error: BaseException, attempts: int, policy: RetryPolicy) -> int | None:
    """How long (ms) an entry that failed `attempts` times before waits on the ladder; None = park it.

    A failing server pauses the consumer and is nobody's attempt, so it never asks here.
    """
    if classify(error).disposition is not Disposition.RETRY or attempts >= len(policy.waits_ms):
        return None
    return policy.waits_ms[attempts]


def call_wait(error: BaseException, tries: int, policy: RetryPolicy, chance: Chance) -> float | None:
    """How long (s) to wait after a call's `tries`-th failure; None = give up and raise it."""
    if classify(error).disposition not in _REPEATABLE or tries >= policy.call_tries:
        return None
    # The exponent is bounded because a float is.
    bound = min(policy.call_longest_s, policy.call_first_s * 2.0 ** min(tries - 1, 64))
    return chance() * bound


async def call_again(operation: Callable[[], Awaitable[T]], policy: RetryPolicy, chance: Chance, sleep: Sleep) -> T:
    """Run an operation that may be repeated until it succeeds; raises its last error, unchanged."""

    def wait(state: RetryCallState) -> float:
        found = call_wait(_error(state), state.attempt_number, policy, chance)
        return policy.call_budget_s if found is None else found

    def stop(state: RetryCallState) -> bool:
        spent = state.idle_for + state.upcoming_sleep
        return state.attempt_number >= policy.call_tries or spent >= policy.call_budget_s

    def again(error: BaseException) -> bool:
        return isinstance(error, Exception) and classify(error).disposition in _REPEATABLE

    async def once() -> T:
        return await operation()

    retrying = AsyncRetrying(retry=retry_if_exception(again), wait=wait, stop=stop, sleep=sleep, reraise=True)
    return await retrying(once)


def _error(state: RetryCallState) -> BaseException:
    error = state.outcome.exception() if state.outcome is not None else None
    assert error is not None, "only failures are waited for"
    return error
