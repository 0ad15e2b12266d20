"""The parking sink: dead letters from the parked queues into the table `dead_letters`.

Promises ack after commit, one row per letter whatever is repeated, and that a letter whose description PostgreSQL
refuses harms no other: its bytes are kept as a letter of nobody. One that cannot be kept at all stays on its queue. Too
many letters of one tenant pause it at the doors; that pause may come late or be missed when PostgreSQL fails, and never
holds up a letter.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence

import structlog

from contracts.failures import InfrastructureError, UndecodableEntryError
from contracts.ports import Clock, DeadLetter, DeadLetters, Delivery, Telemetry
from contracts.settlement import Ack, Pause, Settlement, letter_from, undelivered_letters
from contracts.telemetry import PARK_BREAKS, Measurement
from contracts.tenancy import TenantScope
from resilience.parks import ParkPolicy, TenantParks
from workers.settling import Park, park_bytes
from workers.sinks.bisecting import write_or_park

log = structlog.get_logger("parking")

_STAGE = "parking"

Trip = Callable[[TenantScope, str, float], Awaitable[bool]]


class TenantBrake:
    """Pauses a tenant at the doors once too many of its events were parked."""

    def __init__(self, trip: Trip, telemetry: Telemetry, clock: Clock, policy: ParkPolicy | None = None) -> None:
        """`trip` pauses a tenant, with a reason, for so many seconds; False when it is paused already."""
        self._trip = trip
        self._telemetry = telemetry
        self._clock = clock
        self._policy = policy or ParkPolicy()
        self._parks = TenantParks(self._policy)

    async def stored(self, letters: Sequence[DeadLetter]) -> None:
        """Count letters that were stored now."""
        now = self._clock.monotonic()
        for letter in letters:
            count = self._parks.parked(letter, now)
            if not count or letter.scope is None:
                continue
            seconds = self._policy.tenant_pause_s
            reason = f"{count} of its events were parked within {self._policy.window_s:.0f} s: see its dead letters"
            try:
                made = await self._trip(letter.scope, reason, seconds)
            except InfrastructureError as error:
                log.warning("tenant.park_breaker_missed", reason=error.detail)
                continue
            if made:
                log.error("tenant.park_breaker", tenant=letter.scope.tenant_id, count=count, seconds=seconds)
                self._telemetry.record(Measurement(PARK_BREAKS, 1.0, {"what": "tenant"}))


class ParkingSink:
    """Moves each parked message into its row."""

    def __init__(self, dead_letters: DeadLetters, clock: Clock, brake: TenantBrake | None = None) -> None:
        """`dead_letters` is the table; without a `brake` no tenant is paused."""
        self._dead_letters = dead_letters
        self._clock = clock
        self._brake = brake

    async def handle(self, deliveries: Sequence[Delivery]) -> Sequence[Settlement]:
        """Insert all letters; answers Pause for all while PostgreSQL does not answer."""
        read = [self._letters(delivery) for delivery in deliveries]
        try:
            _, refused = await write_or_park([letter for some in read for letter in some], self._write, self._refuse)
            plain = {park.letter.body: park.letter for park in refused}
            _, lost = await write_or_park(list(plain.values()), self._write, self._refuse)
        except InfrastructureError as error:
            return [Pause(type(error).__name__)] * len(deliveries)
        kept_out = {park.letter.body for park in lost}
        if self._brake is not None:
            await self._brake.stored([one for some in read for one in some if one.body not in plain])
        return [Pause(_STAGE) if any(one.body in kept_out for one in some) else Ack() for some in read]

    async def _write(self, letters: Sequence[DeadLetter]) -> Sequence[bool]:
        await self._dead_letters.park(letters)
        return [True] * len(letters)

    def _refuse(self, letter: DeadLetter, error: Exception) -> Park:
        """What is left of a letter when nothing but its bytes can be trusted."""
        log.error("parking.refused", exception_class=type(error).__name__, stage=letter.stage)
        return park_bytes(letter.body, _STAGE, error, self._clock.now().isoformat())

    def _letters(self, delivery: Delivery) -> tuple[DeadLetter, ...]:
        try:
            return (letter_from(delivery.headers, delivery.body),)
        except UndecodableEntryError:
            return undelivered_letters(delivery.headers, delivery.body, self._clock.now().isoformat())
