"""The life of a delivery at a stage: one runner for every stage and kind.

    unpack → triage (redelivered?) → own the identity (retrieval only) → claim → gather, decide
    → commit (decision only) → advance → publish and await confirms → ack

Promises: an entry is acked only after everything that it owes is confirmed; a stored result is
re-published, never recomputed; PostgreSQL's row, not this process, says what was decided. A failure of
RabbitMQ, Redis or PostgreSQL raises an InfrastructureError: nothing is acked and the consumer pauses.
The rules, and the schedules that they answer, stand in docs/protocol.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import orjson
import structlog

from contracts.codec import Entry, entry_of, state_from_bytes
from contracts.failures import DatabaseError, InfrastructureError, InvalidWorkflowStateError, UndecodableEntryError
from contracts.lifecycle import FINAL_VERSION, Status
from contracts.messages import ladder_message, next_probe, probe_of, stage_message
from contracts.ports import (
    Advance,
    Claim,
    ClaimRequest,
    ClaimVerdict,
    Clock,
    DecisionRow,
    Delivery,
    Held,
    Ids,
    Ledger,
    Publisher,
    StateStore,
    Telemetry,
)
from contracts.settlement import Ack, Pause, Settlement
from contracts.state import EventState
from contracts.telemetry import (
    APPROVALS_OPENED,
    CONFLICTS,
    DECISIONS,
    DUPLICATES,
    END_TO_END_SECONDS,
    EXECUTIONS,
    LOCK_WAITS,
    STAGE_SECONDS,
    STALE_WRITES,
    SUSPECTS,
    Measurement,
    Metric,
)
from contracts.topology import STAGES, RunningLayouts, Stage
from workers.failing import Failures, Listener
from workers.outgoing import Outgoing, Wave
from workers.pipeline import stage_of
from workers.settling import RetryPolicy
from workers.stages import StagePorts, Step

log = structlog.get_logger("runner")


@dataclass(frozen=True, slots=True)
class RunnerPolicy:
    """Bounds of one delivery's life: claims before it waits, tries of a publish, deaths of a suspect's holder.

    `chance_returns`: so often a delivery that nobody had claimed may come back from dead processes as it is.
    """

    retry: RetryPolicy = field(default_factory=RetryPolicy)
    claim_rounds: int = 4
    publish_tries: int = 3
    suspect_deaths: int = 3
    chance_returns: int = 2


@dataclass(frozen=True, slots=True)
class RunnerPorts:
    """What a runner works with."""

    state_store: StateStore
    ledger: Ledger
    publisher: Publisher
    stage: StagePorts
    telemetry: Telemetry
    clock: Clock
    ids: Ids
    listener: Listener | None = None


@dataclass(frozen=True, slots=True)
class _Claimed:
    """An entry whose lock this process holds, and the state that it goes on with."""

    entry: Entry
    state: EventState
    token: str
    owes_trail: bool

    @property
    def held(self) -> Held:
        return Held(self.state.scope, self.state.event_id, self.token)


class StageRunner:
    """Runs one stage. `handle` takes the deliveries that gathered and answers one settlement for each."""

    def __init__(
        self, stage: Stage, ports: RunnerPorts, layouts: RunningLayouts, policy: RunnerPolicy | None = None
    ) -> None:
        """`layouts`: the queues of each stage, and on which of them an entry stays."""
        self._stage = stage
        self._ports = ports
        self._layouts = layouts
        self._policy = policy or RunnerPolicy()
        self._failures = Failures(stage, self._policy.retry, layouts, ports.telemetry, ports.clock, ports.listener)
        self._outgoing = Outgoing(ports.publisher, layouts, self._policy.publish_tries, ports.telemetry)

    # --- a delivery ---------------------------------------------------------------------------------

    async def handle(self, deliveries: Sequence[Delivery]) -> Sequence[Settlement]:
        """Settle some deliveries together. Never raises for what an entry contains."""
        began = self._ports.clock.monotonic()
        try:
            alone, together, wave, behind = [], [], Wave(), Wave()
            for delivery in deliveries:
                if (sent_at := probe_of(delivery)) is not None:
                    behind.messages.append(next_probe(self._stage, delivery, sent_at))
                    continue
                entries = self._failures.unpack(delivery, wave)
                if any(entry.header.suspect for entry in entries):
                    alone += entries
                elif delivery.redelivered and not delivery.seen:
                    together += await self._triage(entries, delivery.returns, wave)
                else:
                    together += entries
            await self._outgoing.publish(wave)
            for group in _without_twins(together):
                await self._isolated(group)
            for entry in alone:
                await self._run_alone(entry)
            await self._outgoing.publish(behind)  # a probe overtakes nothing that this process was given before it
        except InfrastructureError as error:
            log.warning("stage.paused", stage=self._stage, exception_class=type(error).__name__, reason=error.detail)
            return [Pause(type(error).__name__)] * len(deliveries)
        self._measure(STAGE_SECONDS, self._ports.clock.monotonic() - began, stage=self._stage)
        return [Ack()] * len(deliveries)

    async def _triage(self, entries: list[Entry], returns: int, wave: Wave) -> list[Entry]:
        """Redelivered: go on when the holder lives, else send each entry round once more, alone, as a suspect.

        An entry that nobody held was only waiting in a process that died: it goes on too, until it has come back too
        often to be there by chance (what kills a process before its claim is held by nobody either).
        """
        found = await self._ports.state_store.peek([(e.header.scope, e.header.event) for e in entries])
        holders = [peek.holder if peek else "" for peek in found]
        alive = await self._ports.state_store.alive(holders)
        going_on = []
        for entry, holder, lives in zip(entries, holders, alive, strict=True):
            if lives if holder else returns <= self._policy.chance_returns:
                going_on.append(entry)
            else:
                wave.messages.append(stage_message(entry.evolve(suspect=True), self._layouts))
                self._measure(SUSPECTS, stage=self._stage)
        return going_on

    async def _run_alone(self, entry: Entry) -> None:
        """One suspect at a time in this process; parked undecoded once too many of its holders died, unless its event
        is decided: a decision is sent however often its senders died.
        """
        store, h = self._ports.state_store, entry.header
        deaths = await store.begin_alone(h.scope, h.event, self._stage)
        settled = True
        if deaths >= self._policy.suspect_deaths:
            wave = Wave()
            (row,) = await self._ports.ledger.decisions([(h.scope, h.event)])
            try:
                if row is None:
                    self._failures.die(entry, deaths, wave)
                else:
                    self._already_decided(entry, row, wave)
                    wave.leave(entry)
            except UndecodableEntryError as error:  # another release decided it
                self._failures.fail(entry, error, wave)
            await self._ports.state_store.release((), wave.leaving)
            await self._outgoing.publish(wave)
        else:
            settled = await self._isolated([entry])
        if settled:  # an entry that waits for its dead holder's lease must not lose its count
            await store.end_alone(h.scope, h.event, self._stage)

    # --- a group of entries, no two of one event ------------------------------------------------------

    async def _isolated(self, entries: Sequence[Entry]) -> bool:
        """Run a group; when it fails as a whole, run each entry alone, so that one holds up no other."""
        try:
            return await self._run(entries)
        except InfrastructureError:
            raise
        except Exception as error:  # noqa: BLE001 - isolated below
            if len(entries) == 1:
                wave = Wave()
                self._failures.fail(entries[0], error, wave)
                await self._ports.state_store.release((), wave.leaving)
                await self._outgoing.publish(wave)
                return True
        return all([await self._isolated([entry]) for entry in entries])

    async def _run(self, entries: Sequence[Entry]) -> bool:
        """Bring each entry to its settlement; one whose lock was taken over is claimed again.

        False when an entry went to the ladder because another process holds it.
        """
        left: Sequence[Entry] = entries
        settled = True
        for _ in range(self._policy.claim_rounds):
            if not left:
                return settled
            wave = await self._pass(left)
            settled = settled and not wave.waiting
            left = wave.lost
        if not left:
            return settled
        wave = Wave()
        for entry in left:
            wave.messages.append(ladder_message(entry, self._policy.retry.waits_ms[0], self._layouts))
        await self._outgoing.publish(wave)
        return False

    async def _pass(self, entries: Sequence[Entry]) -> Wave:
        """One pass: claim … publish. Answers its wave, which names the entries that lost their lock or wait."""
        wave = Wave()
        try:
            claimable = await self._own_identities(entries, wave) if self._stage is Stage.RETRIEVAL else entries
            claimed = await self._claim(claimable, wave)
            worked = await self._work(claimed, wave)
            if self._stage is Stage.DECISION:
                await self._commit(worked, wave)
            else:
                await self._advance(worked, wave)
        finally:
            await self._ports.state_store.release(list(wave.held.values()), wave.leaving)
        await self._outgoing.publish(wave)
        return wave

    async def _own_identities(self, entries: Sequence[Entry], wave: Wave) -> list[Entry]:
        """PostgreSQL says who owns each identity, before anything is claimed: Redis may have forgotten."""
        readable: list[tuple[Entry, EventState]] = []
        for entry in entries:
            state = self._failures.decode(entry, entry.body, wave)
            if state is not None:
                readable.append((entry, state))
        rows = await self._ports.ledger.record_events([state for _, state in readable]) if readable else []
        owned = []
        for (entry, state), row in zip(readable, rows, strict=True):
            if row.body_digest != state.body_digest:
                self._failures.conflict(entry, wave, state)
            elif row.decision is not None:
                self._already_decided(entry, row.decision, wave)
                wave.leave(entry)  # a door that Redis told nothing of the decision may have reserved it anew
            else:
                owned.append(entry)
        return owned

    async def _claim(self, entries: Sequence[Entry], wave: Wave) -> list[_Claimed]:
        """The claim table. What Redis does not know is looked up in PostgreSQL before it is installed."""
        if not entries:
            return []
        known_undecided = self._stage is Stage.RETRIEVAL
        claims = await self._claims([ClaimRequest(entry, known_undecided) for entry in entries], wave)
        absent = [entry for entry, claim in claims if claim.verdict is ClaimVerdict.ABSENT]
        if absent:
            rows = await self._ports.ledger.decisions([(e.header.scope, e.header.event) for e in absent])
            for entry, row in zip(absent, rows, strict=True):
                if row is not None:
                    self._already_decided(entry, row, wave)
            undecided = [entry for entry, row in zip(absent, rows, strict=True) if row is None]
            claims = [pair for pair in claims if pair[1].verdict is not ClaimVerdict.ABSENT]
            if undecided:
                claims += await self._claims([ClaimRequest(entry, True) for entry in undecided], wave)
        claimed = []
        for entry, claim in claims:
            mine = await self._apply(entry, claim, wave)
            if mine is not None:
                claimed.append(mine)
        return claimed

    async def _claims(self, requests: Sequence[ClaimRequest], wave: Wave) -> list[tuple[Entry, Claim]]:
        claims = await self._ports.state_store.claim(requests, self._ports.ids.token())
        for request, claim in zip(requests, claims, strict=True):
            if claim.verdict in (ClaimVerdict.GO, ClaimVerdict.TWIN, ClaimVerdict.INSTALLED):
                h = request.entry.header
                wave.held[h.tenant, h.event] = Held(h.scope, h.event, claim.token)
        return [(request.entry, claim) for request, claim in zip(requests, claims, strict=True)]

    async def _apply(self, entry: Entry, claim: Claim, wave: Wave) -> _Claimed | None:
        if claim.verdict is ClaimVerdict.DONE:
            await self._already_done(entry, claim, wave)
            return None
        if claim.verdict is ClaimVerdict.LOCKED:
            wave.messages.append(ladder_message(entry, claim.lease_ms, self._layouts))
            wave.waiting.append(entry)
            self._measure(LOCK_WAITS, stage=self._stage)
            return None
        if claim.stored is None:
            raise InvalidWorkflowStateError("a claim without stored bytes")
        if claim.verdict is ClaimVerdict.TWIN:
            log.info("state.twin", stage=self._stage, tenant=entry.header.tenant, event_id=entry.header.event)
        state = self._failures.decode(entry, claim.stored, wave)
        return None if state is None else _Claimed(entry, state, claim.token, claim.owes_trail)

    async def _work(self, claimed: Sequence[_Claimed], wave: Wave) -> list[tuple[_Claimed, EventState]]:
        """Gather together, decide one by one, and make version n+1. A failure is its entry's own."""
        worked = []
        for kind in sorted({c.state.KIND for c in claimed}):
            functions = stage_of(kind, self._stage)
            group = [c for c in claimed if kind == c.state.KIND]
            for some in await self._gathered(functions.gather, group, wave):
                item, facts = some
                try:
                    now = self._now()
                    step: Step = functions.decide(item.state, facts, now, self._ports.clock.monotonic)
                    new = item.state.transition(step.target, step.section, stage=self._stage, detail=step.detail)
                    worked.append((item, new))
                except Exception as error:  # noqa: BLE001 - a stage's defect is its entry's failure
                    self._failures.fail(item.entry, error, wave)
        return worked

    async def _gathered(
        self, gather: Callable[..., object], group: Sequence[_Claimed], wave: Wave
    ) -> list[tuple[_Claimed, object]]:
        """Facts for a group; when the group fails as a whole, for each entry alone, so that one harms no other."""
        try:
            facts = await gather([c.state for c in group], self._ports.stage)  # type: ignore[misc]
            return list(zip(group, facts, strict=True))
        except InfrastructureError:
            raise
        except Exception as error:  # noqa: BLE001 - isolated below
            if len(group) == 1:
                self._failures.fail(group[0].entry, error, wave)
                return []
        return [pair for item in group for pair in await self._gathered(gather, [item], wave)]

    async def _commit(self, worked: Sequence[tuple[_Claimed, EventState]], wave: Wave) -> None:
        """Decision only: PostgreSQL stands between decide and advance; only what was read back is used."""
        if not worked:
            return
        rows = await self._ports.ledger.decide([new for _, new in worked])
        final: list[tuple[_Claimed, EventState]] = []
        by_event: dict[tuple[str, str], tuple[DecisionRow, bool]] = {}
        for (item, new), row in zip(worked, rows, strict=True):
            if row.body_digest != new.body_digest:
                self._failures.conflict(item.entry, wave, new)
                continue
            decided = new if row.state == new.to_bytes() else state_from_bytes(row.state)
            by_event[new.scope.tenant_id, new.event_id] = (row, decided.digest == new.digest)
            final.append((item, decided))
            if decided.digest == new.digest:
                self._count_decision(new)
            else:
                self._measure(CONFLICTS, kind=new.KIND)
        for item, decided in await self._advanced(final, wave):
            row, mine = by_event[decided.scope.tenant_id, decided.event_id]
            wave.decided(item.entry, decided, row)
            wave.records += decided.records(0 if item.owes_trail or not mine else FINAL_VERSION)

    async def _advance(self, worked: Sequence[tuple[_Claimed, EventState]], wave: Wave) -> None:
        for item, new in await self._advanced(worked, wave):
            first = self._first_owed(item)
            wave.onward.append(_next_entry(new, item.entry, item.entry.header.reply_to))
            wave.records += new.records(first)

    async def _advanced(
        self, worked: Sequence[tuple[_Claimed, EventState]], wave: Wave
    ) -> list[tuple[_Claimed, EventState]]:
        """Advance all in one call; an entry whose lock is gone is LOST and claimed again."""
        if not worked:
            return []
        answers = await self._ports.state_store.advance([self._move(item, new) for item, new in worked])
        advanced = []
        for (item, new), stored in zip(worked, answers, strict=True):
            wave.let_go(item.held)
            if stored:
                advanced.append((item, new))
                self._measure(EXECUTIONS, stage=self._stage, kind=new.KIND)
            else:
                wave.lost.append(item.entry)
                self._measure(STALE_WRITES, stage=self._stage)
        return advanced

    def _move(self, item: _Claimed, new: EventState) -> Advance:
        final = new.n == FINAL_VERSION
        return Advance(
            scope=new.scope,
            event_id=new.event_id,
            token=item.token,
            expected_version=item.state.n,
            expected_digest=item.state.digest,
            version=new.n,
            digest=new.digest,
            body_digest=new.body_digest,
            stored=b"" if final else new.to_bytes(),
            output=orjson.dumps({"first": self._first_owed(item), "reply_to": item.entry.header.reply_to}),
            tombstone=final,
            status=new.status,
            received_ms=item.entry.header.received_ms,
        )

    def _first_owed(self, item: _Claimed) -> int:
        """The first version whose record joins this stage's output; retrieval emits those of 0 and 1."""
        return 0 if item.owes_trail or self._stage is Stage.RETRIEVAL else item.state.n + 1

    # --- already done: re-publish what is stored, never recompute -------------------------------------

    async def _already_done(self, entry: Entry, claim: Claim, wave: Wave) -> None:
        """Redis is further on: the stored version's output again, and every record that this stage owes."""
        if claim.stored is None:
            h = entry.header
            row = (await self._ports.ledger.decisions([(h.scope, h.event)]))[0]
            if row is None:
                raise DatabaseError(
                    "Redis holds a decided event that PostgreSQL does not know; is it the right database?"
                )
            self._already_decided(entry, row, wave)
            return
        state = self._failures.decode(entry, claim.stored, wave)
        if state is None:
            return
        owed: dict[str, Any] = orjson.loads(claim.output) if claim.output else {"first": 0, "reply_to": None}
        first = 0 if self._stage is Stage.RETRIEVAL else entry.header.n + 1
        # The caller of this very entry waits, whoever sent the one that was stored.
        wave.onward.append(_next_entry(state, entry, entry.header.reply_to or owed["reply_to"]))
        wave.records += state.records(min(first, owed["first"]))
        self._measure(DUPLICATES, stage=self._stage)

    def _already_decided(self, entry: Entry, row: DecisionRow, wave: Wave) -> None:
        """PostgreSQL has decided: the row's decision again, and its whole trail."""
        state = state_from_bytes(row.state)
        if row.body_digest != entry.header.body_digest:
            self._failures.conflict(entry, wave)
            return
        wave.decided(entry, state, row)
        wave.records += state.records()
        self._measure(DUPLICATES, stage=self._stage)

    # --- small ----------------------------------------------------------------------------------------------

    def _count_decision(self, state: EventState) -> None:
        if state.decided is None:
            return
        tenant = state.scope.tenant_id
        outcome = str(state.decided.decision.outcome)
        self._measure(DECISIONS, kind=state.KIND, outcome=outcome, tenant=tenant)
        if state.status is Status.AWAITING_APPROVAL:
            self._measure(APPROVALS_OPENED, kind=state.KIND, tenant=tenant)
        waited = self._ports.clock.now() - datetime.fromisoformat(state.received_at)
        self._measure(END_TO_END_SECONDS, max(waited.total_seconds(), 0.0), kind=state.KIND)

    def _measure(self, metric: Metric, value: float = 1.0, **labels: str) -> None:
        self._ports.telemetry.record(Measurement(metric, value, labels))

    def _now(self) -> str:
        return self._ports.clock.now().isoformat()


def _next_entry(state: EventState, before: Entry, reply_to: str | None) -> Entry:
    return entry_of(state, STAGES[state.n], reply_to, topology=before.header.topology)


def _without_twins(entries: Iterable[Entry]) -> list[list[Entry]]:
    """Groups in which no event stands twice, so that one lock token never stands for two entries."""
    groups: list[dict[tuple[str, str], Entry]] = []
    for entry in entries:
        key = (entry.header.tenant, entry.header.event)
        target = next((group for group in groups if key not in group), None)
        if target is None:
            groups.append(target := {})
        target[key] = entry
    return [list(group.values()) for group in groups]
