"""Rows that PostgreSQL refuses: found by halving the batch, and parked alone.

Promises that every other row of a batch is written, and that a delivery is acked only after its bad rows are on
their way to `dead_letters`. A server that fails is no row's fault: the InfrastructureError goes through.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

from contracts.failures import InfrastructureError, MessagingFailureError
from contracts.messages import arrived, parked_message
from contracts.ports import Publisher
from workers.settling import Park

Row = TypeVar("Row")


async def write_or_park(
    rows: Sequence[Row],
    write: Callable[[Sequence[Row]], Awaitable[Sequence[bool]]],
    refuse: Callable[[Row, Exception], Park],
) -> tuple[list[bool], list[Park]]:
    """Write rows in one call, or in halves of it; the answers of what was written, and the parks of what was not."""
    if not rows:
        return [], []
    try:
        return list(await write(rows)), []
    except InfrastructureError:
        raise
    except Exception as error:  # noqa: BLE001 - bisected, then parked
        if len(rows) == 1:
            return [], [refuse(rows[0], error)]
    half = len(rows) // 2
    first, parks = await write_or_park(rows[:half], write, refuse)
    second, more = await write_or_park(rows[half:], write, refuse)
    return first + second, parks + more


async def publish_parks(publisher: Publisher, parks: Sequence[Park], source: str) -> None:
    """Send dead letters to the parked queue. Raises MessagingFailureError unless all of them are confirmed."""
    messages = [parked_message(park.letter, source) for park in parks]
    if not messages:
        return
    confirms = await publisher.publish(messages)
    if not all(arrived(message, confirm) for message, confirm in zip(messages, confirms, strict=True)):
        raise MessagingFailureError(f"a parked row of {source} was not confirmed")
