"""The parking sink: dead letters from the parked queues into the table `dead_letters`.

Promises ack after commit, one row per letter whatever is repeated, and that a letter whose description PostgreSQL
refuses harms no other: its bytes are kept as a letter of nobody. One that cannot be kept at all stays on its queue.
"""

from __future__ import annotations

from collections.abc import Sequence

import structlog

from contracts.failures import InfrastructureError, UndecodableEntryError
from contracts.ports import Clock, DeadLetter, DeadLetters, Delivery
from contracts.settlement import Ack, Pause, Settlement, letter_from, undelivered_letters
from workers.settling import Park, park_bytes
from workers.sinks.bisecting import write_or_park

log = structlog.get_logger("parking")

_STAGE = "parking"


class ParkingSink:
    """Moves each parked message into its row."""

    def __init__(self, dead_letters: DeadLetters, clock: Clock) -> None:
        """`dead_letters` is the table."""
        self._dead_letters = dead_letters
        self._clock = clock

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
