"""The parking sink: dead letters from the parked queues into the table `dead_letters`.

Promises ack after commit, and one row per letter whatever is repeated.
"""

from __future__ import annotations

from collections.abc import Sequence

from contracts.failures import InfrastructureError, UndecodableEntryError
from contracts.ports import Clock, DeadLetter, DeadLetters, Delivery
from contracts.settlement import Ack, Pause, Settlement, letter_from, undelivered_letters


class ParkingSink:
    """Moves each parked message into its row."""

    def __init__(self, dead_letters: DeadLetters, clock: Clock) -> None:
        """`dead_letters` is the table."""
        self._dead_letters = dead_letters
        self._clock = clock

    async def handle(self, deliveries: Sequence[Delivery]) -> Sequence[Settlement]:
        """Insert all letters; answers Pause for all while PostgreSQL does not answer."""
        letters = [letter for delivery in deliveries for letter in self._letters(delivery)]
        try:
            await self._dead_letters.park(letters)
        except InfrastructureError as error:
            return [Pause(type(error).__name__)] * len(deliveries)
        return [Ack()] * len(deliveries)

    def _letters(self, delivery: Delivery) -> tuple[DeadLetter, ...]:
        try:
            return (letter_from(delivery.headers, delivery.body),)
        except UndecodableEntryError:
            return undelivered_letters(delivery.headers, delivery.body, self._clock.now().isoformat())
