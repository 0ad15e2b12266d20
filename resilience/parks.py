"""Parks as a signal: a failure that several tenants meet is the fleet's, many failures of one tenant are its own.

Promises: one fingerprint parked often enough in at least two tenants stops whoever asks, for a time that grows with
each relapse; after it one try passes, and the first failure of that fingerprint stops it again; a try
without one ends it. A park that is told twice counts once. Pure: policy frozen, state a value, time an argument.
Pauses nothing by itself, and knows only what this process parked.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from contracts.failures import Category
from contracts.ports import DeadLetter


@dataclass(frozen=True, slots=True)
class ParkPolicy:
    """When parks pause something; times are seconds.

    A stage: `stage_parks` of one fingerprint, in at least `tenants` tenants, within `window_s`; for `pause_s` at first,
    `growth` times longer after each relapse, `longest_s` at most. A tenant: `tenant_parks` of any kind within
    `window_s`; for `tenant_pause_s`.
    """

    window_s: float = 60.0
    stage_parks: int = 20
    tenants: int = 2
    pause_s: float = 30.0
    growth: float = 2.0
    longest_s: float = 600.0
    tenant_parks: int = 50
    tenant_pause_s: float = 120.0


@dataclass(frozen=True, slots=True)
class Park:
    """One park; `at` is monotonic seconds."""

    at: float
    letter_id: str
    fingerprint: str
    tenant: str


@dataclass(frozen=True, slots=True)
class StageParks:
    """What a stage remembers of its parks. `broken_by` is the fingerprint that paused it, "" when nothing did."""

    recent: tuple[Park, ...] = ()
    broken_by: str = ""
    until: float = 0.0
    breaks: int = 0


def blocked_s(state: StageParks, now: float) -> float:
    """How long (s) nothing may pass; 0: it may, be it to try."""
    return max(state.until - now, 0.0) if state.broken_by else 0.0


def parked(state: StageParks, policy: ParkPolicy, letter: DeadLetter, now: float) -> StageParks:
    """The state after a park. What a sender got wrong says nothing about the stage, nor does a letter of nobody."""
    if letter.scope is None or letter.category == Category.VALIDATION_ERROR or blocked_s(state, now):
        return state
    if state.broken_by:
        return failed(state, policy, letter.fingerprint, now)
    if any(park.letter_id == letter.letter_id for park in state.recent):
        return state
    park = Park(now, letter.letter_id, letter.fingerprint, letter.scope.tenant_id)
    recent = (*(each for each in state.recent if now - each.at < policy.window_s), park)
    alike = [each for each in recent if each.fingerprint == park.fingerprint]
    if len(alike) < policy.stage_parks or len({each.tenant for each in alike}) < policy.tenants:
        return replace(state, recent=recent)
    return _broken(replace(state, broken_by=park.fingerprint), policy, now)


def failed(state: StageParks, policy: ParkPolicy, fingerprint: str, now: float) -> StageParks:
    """The state after any failure, be its entry tried again or parked: it ends a try of what paused the stage."""
    relapsed = state.broken_by == fingerprint and not blocked_s(state, now)
    return _broken(state, policy, now) if relapsed else state


def passed(state: StageParks, now: float) -> StageParks:
    """The state after a group went through: while it was only tried, that ends the pause."""
    return StageParks() if state.broken_by and not blocked_s(state, now) else state


def _broken(state: StageParks, policy: ParkPolicy, now: float) -> StageParks:
    # The exponent is bounded: a float may not grow for ever.
    lasts = min(policy.pause_s * policy.growth ** min(state.breaks, 64), policy.longest_s)
    return StageParks((), state.broken_by, now + lasts, state.breaks + 1)


class TenantParks:
    """Counts the parks of each tenant; the process that stores all letters asks."""

    def __init__(self, policy: ParkPolicy) -> None:
        self._policy = policy
        self._recent: dict[str, dict[str, float]] = {}

    def parked(self, letter: DeadLetter, now: float) -> int:
        """How many parks of its tenant lie in the window once they are too many, else 0; counting then begins anew."""
        if letter.scope is None:
            return 0
        name, since = letter.scope.tenant_id, now - self._policy.window_s
        recent = {each: at for each, at in self._recent.get(name, {}).items() if at > since}
        recent.setdefault(letter.letter_id, now)
        if len(recent) < self._policy.tenant_parks:
            self._recent[name] = recent
            return 0
        self._recent.pop(name, None)
        return len(recent)
