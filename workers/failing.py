"""What cannot be read, or cannot be worked on: the entry goes to the ladder or to the parked queue, with its record.

Promises: a bad entry is parked alone and harms no other; a body that cannot be read is never guessed at; nothing of
an entry's content reaches a log. Only adds to a wave: whoever holds the wave publishes it. A failing server is not an
entry's failure and goes through as the InfrastructureError that it is.
"""

from __future__ import annotations

from typing import Protocol

import structlog

from contracts.codec import Entry, decode_carrier, encode_carrier, state_from_bytes
from contracts.failures import (
    IdempotencyConflictError,
    InfrastructureError,
    InvalidWorkflowStateError,
    RiskfleetError,
    UndecodableEntryError,
    classify,
    fingerprint,
    problem_document,
)
from contracts.messages import ladder_message, parked_message, rejection_message
from contracts.ports import Clock, DeadLetter, Delivery, Telemetry
from contracts.state import EventState
from contracts.telemetry import FAILURES, PARKED, RETRIES, Measurement, Metric
from contracts.topology import STAGES, RunningLayouts, Stage, is_version
from workers.outgoing import Wave
from workers.settling import Park, Retry, RetryPolicy, after_failure, park, park_bytes

log = structlog.get_logger("runner")


class Listener(Protocol):
    """Hears of what fails."""

    def failed(self, fingerprint: str) -> None:
        """An entry failed and will be tried again."""
        ...

    def parked(self, letter: DeadLetter) -> None:
        """An entry was parked; may be told twice of one letter."""
        ...


class Failures:
    """The failures of one stage's entries."""

    def __init__(
        self,
        stage: Stage,
        retry: RetryPolicy,
        layouts: RunningLayouts,
        telemetry: Telemetry,
        clock: Clock,
        listener: Listener | None = None,
    ) -> None:
        """`layouts`: the queues of the stage; `listener` hears of every failure."""
        self._stage = stage
        self._retry = retry
        self._layouts = layouts
        self._telemetry = telemetry
        self._clock = clock
        self._listener = listener

    def unpack(self, delivery: Delivery, wave: Wave) -> list[Entry]:
        """The entries of a carrier. What cannot be read is parked: a carrier whole, an entry alone."""
        now = self._now()
        try:
            items = decode_carrier(delivery.body)
        except UndecodableEntryError as error:
            self.park(park_bytes(delivery.body, self._stage, error, now), wave)
            return []
        entries = []
        for item in items:
            if isinstance(item, UndecodableEntryError):
                self.park(park_bytes(delivery.body, self._stage, item, now), wave)
                continue
            problem = self._misfit(item, now)
            if problem is None:
                entries.append(item)
            else:
                self.park(problem, wave)
        return entries

    def _misfit(self, entry: Entry, now: str) -> Park | None:
        """The dead letter of an entry that this stage cannot hold; without a valid tenant it is nobody's.

        Raises MessagingFailureError for an entry of a version that is not known here.
        """
        try:
            entry.header.scope  # noqa: B018 - validates the tenant id
        except RiskfleetError as error:
            return park_bytes(encode_carrier((entry,)), self._stage, error, now)
        if not is_version(entry.header.topology):
            return park(entry, InvalidWorkflowStateError("the entry names no topology version"), now)
        self._layouts.of(entry.header.topology)  # not known yet: everything waits until it is
        if entry.header.stage != self._stage or entry.header.n != STAGES.index(self._stage):
            return park(entry, InvalidWorkflowStateError("the entry is addressed to another stage"), now)
        return None

    def decode(self, entry: Entry, stored: bytes, wave: Wave) -> EventState | None:
        """The state in some stored bytes; None when it cannot be read, and the entry has failed."""
        key = (entry.header.tenant, entry.header.event)
        known = wave.states.get(key)
        if known is not None and known.to_bytes() is stored:
            return known
        try:
            state = state_from_bytes(stored)
            if (state.scope.tenant_id, state.event_id) != key:
                raise InvalidWorkflowStateError("an entry's header names another event than its bytes")
        except RiskfleetError as error:
            self.fail(entry, error, wave)
            return None
        wave.states[key] = state
        return state

    def fail(self, entry: Entry, error: BaseException, wave: Wave) -> None:
        """Count one attempt of an entry: the ladder while waits are left, then the parked queue."""
        if isinstance(error, InfrastructureError):
            raise error
        category = str(classify(error).category)
        log.warning(
            "entry.failed",
            stage=self._stage,
            tenant=entry.header.tenant,
            event_id=entry.header.event,
            attempts=entry.header.attempts + 1,
            category=category,
            exception_class=type(error).__name__,
        )
        self._measure(FAILURES, category)
        verdict = after_failure(entry, error, self._retry, self._now())
        if isinstance(verdict, Retry):
            wave.messages.append(ladder_message(verdict.entry, verdict.delay_ms, self._layouts))
            self._measure(RETRIES, category)
            if self._listener is not None:
                self._listener.failed(fingerprint(error))
        else:
            self.park(verdict, wave)
            wave.leave(entry)

    def die(self, entry: Entry, deaths: int, wave: Wave) -> None:
        """Park, undecoded, an entry that so many processes died with while they ran it alone."""
        error = InvalidWorkflowStateError(f"{deaths} processes died while they ran this entry alone")
        self.park(park(entry, error, self._now()), wave)
        wave.leave(entry)

    def conflict(self, entry: Entry, wave: Wave, state: EventState | None = None) -> None:
        """Park another body under a taken identity, and tell its sender, whom `state` names.

        Nobody gets the decision of another body.
        """
        self.park(park(entry, IdempotencyConflictError(), self._now()), wave)
        wave.leave(entry)  # the newcomer; the owner of the identity has another body, and stays
        if state is None:
            return
        document = problem_document(
            IdempotencyConflictError(),
            event_id=state.event_id,
            id=state.event.id,
            correlation_id=state.correlation_id,
        )
        message_id = f"rejected:{entry.header.event}:{entry.header.body_digest[:16]}"
        wave.messages.append(
            rejection_message(state.scope, document, message_id=message_id, correlation_id=state.correlation_id)
        )

    def park(self, verdict: Park, wave: Wave) -> None:
        """Owe a dead letter and its record."""
        wave.messages.append(parked_message(verdict.letter, self._stage))
        wave.records.append(verdict.record)
        self._measure(PARKED, verdict.letter.category)
        if self._listener is not None:
            self._listener.parked(verdict.letter)

    def _measure(self, metric: Metric, category: str) -> None:
        self._telemetry.record(Measurement(metric, 1.0, {"stage": self._stage, "category": category}))

    def _now(self) -> str:
        return self._clock.now().isoformat()
