"""The gate before a stage: closed while a person paused the stage, or while its own parks did.

Promises: while it is closed nothing is claimed, counted as an attempt or acked, and the consumer waits as it does for a
server (after five minutes its deliveries go back to their queues); it opens within seconds of the resumption; when the
parks' pause is over one group is let through, and decides whether the gate stays open. Runs nothing by itself.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence

import structlog

from contracts.failures import StagePausedError
from contracts.ports import Clock, DeadLetter, Delivery, Pauses, Telemetry
from contracts.settlement import Ack, Settlement
from contracts.telemetry import PARK_BREAKS, Measurement
from contracts.topology import Stage
from resilience.parks import ParkPolicy, StageParks, blocked_s, failed, parked, passed

log = structlog.get_logger("gate")

Work = Callable[[Sequence[Delivery]], Awaitable[Sequence[Settlement]]]


class StageGate:
    """The gate of one stage in this process."""

    def __init__(
        self, stage: Stage, pauses: Pauses, telemetry: Telemetry, clock: Clock, policy: ParkPolicy | None = None
    ) -> None:
        """`pauses` says what people paused; `policy` when parks do."""
        self._stage = stage
        self._pauses = pauses
        self._telemetry = telemetry
        self._clock = clock
        self._policy = policy or ParkPolicy()
        self._parks = StageParks()

    def failed(self, fingerprint: str) -> None:
        """Hear of a failure whose entry will be tried again."""
        now = self._clock.monotonic()
        self._become(failed(self._parks, self._policy, fingerprint, now), now)

    def parked(self, letter: DeadLetter) -> None:
        """Hear of a park."""
        now = self._clock.monotonic()
        self._become(parked(self._parks, self._policy, letter, now), now)

    def _become(self, state: StageParks, now: float) -> None:
        before, self._parks = self._parks, state
        if state.breaks > before.breaks:
            seconds = round(blocked_s(self._parks, now))
            log.error("stage.park_breaker", stage=self._stage, fingerprint=self._parks.broken_by, seconds=seconds)
            self._telemetry.record(Measurement(PARK_BREAKS, 1.0, {"what": str(self._stage)}))

    async def check(self) -> None:
        """Raise StagePausedError while nothing may pass, saying why and what to do."""
        notice = await self._pauses.stage(self._stage)
        if notice is not None:
            raise StagePausedError(f"stage {self._stage} was paused: {notice.reason}")
        seconds = blocked_s(self._parks, self._clock.monotonic())
        if seconds:
            raise StagePausedError(
                f"stage {self._stage} parked {self._parks.broken_by} in several tenants; the next try is in "
                f"{seconds:.0f} s; see its dead letters"
            )

    def through(self, work: Work) -> Work:
        """The same work behind the gate."""

        async def handle(deliveries: Sequence[Delivery]) -> Sequence[Settlement]:
            await self.check()
            settled = await work(deliveries)
            if all(isinstance(settlement, Ack) for settlement in settled):
                self._parks = passed(self._parks, self._clock.monotonic())
            return settled

        return handle
