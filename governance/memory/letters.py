"""Dead letters in memory: how they are parked, and what people do about them.

The rules are those of `governance.postgres.deadletters` and `.letters`, one for one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Any, Final

from contracts.failures import NotKnownError
from contracts.identity import Principal
from contracts.messages import audit_message
from contracts.ports import DeadLetter, Ids, Message
from contracts.state import AuditRecord
from contracts.tenancy import TenantScope
from contracts.topology import STAGES, RunningLayouts
from governance.approvals import checked_reason
from governance.audit import SYSTEM_CHAIN, chain_of
from governance.columns import clean, moment
from governance.deadletters import (
    MAX_BATCH,
    MAX_PAGE,
    MAX_REQUEST,
    NO_LETTER,
    NO_REQUEST,
    Action,
    Allowance,
    Command,
    DryRun,
    GroupPage,
    Letter,
    LetterAct,
    LetterFilter,
    LetterGroup,
    LetterPage,
    LetterPayload,
    LetterPolicy,
    LetterRequest,
    LetterSummary,
    LetterView,
    Reach,
    RequestList,
    Resolved,
    Standing,
    Verdict,
    acting,
    judge,
    resolved,
    result_of,
    why_not,
)
from governance.memory.database import MemoryDatabase, Table, Transaction
from governance.memory.directory import TENANTS
from governance.memory.ledger import DECISIONS, EVENTS
from governance.memory.records import DEAD_LETTERS, StoredLetter, close_letters, enqueue
from governance.postgres.cursors import decode_cursor, encode_cursor
from governance.resolving import (
    MAX_REQUESTS,
    act_record,
    check_alone,
    check_answer,
    check_size,
    confirmed,
    dry_run_record,
    entries_of,
    owner_of,
    payload_of,
    person_of,
    request_from,
    request_record,
    stamp,
)


@dataclass(frozen=True, slots=True)
class StoredAct:
    """A row of `letter_history`."""

    tenant: str
    letter_id: str
    number: int
    at: datetime
    action: str
    result: str
    actor: str
    person: str
    reason: str
    why: str
    request_id: str | None


@dataclass(frozen=True, slots=True)
class StoredRequest:
    """A row of `letter_requests`."""

    tenant: str
    request_id: str
    action: str
    letter_ids: tuple[str, ...]
    force: bool
    rate_per_s: float
    reason: str
    requested_by: str
    requested_at: datetime
    expires_at: datetime
    status: str = "open"
    answered_by: str | None = None
    answered_at: datetime | None = None


@dataclass(frozen=True, slots=True)
class StoredPace:
    """The one row of `replay_pace`."""

    next_due_at: datetime
    id: int = 1


LETTER_HISTORY: Final[Table[StoredAct]] = Table(
    "letter_history",
    key=lambda row: (row.tenant, row.letter_id, row.number),
    tenant=lambda row: row.tenant,
    indexes={"letter": lambda row: (row.tenant, row.letter_id)},
)
LETTER_REQUESTS: Final[Table[StoredRequest]] = Table(
    "letter_requests", key=lambda row: (row.tenant, row.request_id), tenant=lambda row: row.tenant
)
REPLAY_PACE: Final[Table[StoredPace]] = Table("replay_pace", key=lambda row: (row.id,))


class MemoryDeadLetters:
    """The port DeadLetters on a database in memory; letters without a tenant belong to the system."""

    def __init__(self, database: MemoryDatabase) -> None:
        self._database = database

    async def park(self, letters: Sequence[DeadLetter]) -> None:
        """Insert each letter once; a repeat changes nothing. `parked_at` is the database's clock's."""
        if not letters:
            return
        now = self._database.clock.now()
        rows = [_stored(letter, now) for letter in letters]

        def work(tx: Transaction) -> None:
            for row in rows:
                decided = row.stage in STAGES and tx.get(DECISIONS, row.tenant, row.event_id, 1) is not None
                tx.insert(DEAD_LETTERS, replace(row, status="closed") if decided else row)

        await self._database.run([letter.scope for letter in letters], work)


def _stored(letter: DeadLetter, now: datetime) -> StoredLetter:
    return StoredLetter(
        letter_id=clean(letter.letter_id),
        tenant=chain_of(letter.scope),
        event_id=clean(letter.event_id),
        stage=clean(letter.stage),
        category=clean(letter.category),
        problem=clean(letter.problem),
        exception_class=clean(letter.exception_class),
        fingerprint=clean(letter.fingerprint),
        attempts=letter.attempts,
        first_failed_at=_moment_or(letter.first_failed_at, now),
        last_failed_at=_moment_or(letter.last_failed_at, now),
        parked_at=now,
        body=letter.body,
        replays=letter.replays,
    )


def _moment_or(value: str, fallback: datetime) -> datetime:
    """A letter is kept even when its times cannot be read: it may come from a broken message."""
    try:
        return moment(value)
    except ValueError:
        return fallback


class MemoryLetterDesk:
    """The LetterDesk on a database in memory."""

    def __init__(
        self, database: MemoryDatabase, ids: Ids, layouts: RunningLayouts, policy: LetterPolicy | None = None
    ) -> None:
        """`layouts`: where messages that are sent again go."""
        self._database = database
        self._ids = ids
        self.layouts = layouts
        self.policy = policy or LetterPolicy()

    # --- looking --------------------------------------------------------------------------------------

    async def groups(
        self, reach: Reach, wanted: LetterFilter, *, after: str | None = None, limit: int = 50
    ) -> GroupPage:
        """Letters by fingerprint; counts are over every status, `wanted.status` says which groups are listed."""
        size, place = max(1, min(limit, MAX_PAGE)), _place(after)
        anyone = wanted.model_copy(update={"status": None})
        rows = await self._rows(reach)
        by_cause: dict[str, list[StoredLetter]] = {}
        for row in rows:
            if _fits(row, anyone):
                by_cause.setdefault(row.fingerprint, []).append(row)
        groups = [
            _group(some)
            for some in by_cause.values()
            if wanted.status is None or any(row.status == wanted.status for row in some)
        ]
        groups.sort(key=lambda group: (group.last_parked_at, group.fingerprint), reverse=True)
        left = [group for group in groups if place is None or (group.last_parked_at, group.fingerprint) < place]
        page, more = left[:size], len(left) > size
        last = (page[-1].last_parked_at, page[-1].fingerprint) if more else None
        return GroupPage(groups=tuple(page), next=encode_cursor(last) if last else None)

    async def page(
        self, reach: Reach, wanted: LetterFilter, *, after: str | None = None, limit: int = 50
    ) -> LetterPage:
        """Letters, the newest first. Raises InvalidMetadataError for a cursor that this list did not make."""
        size, place = max(1, min(limit, MAX_PAGE)), _place(after)
        rows = [row for row in await self._rows(reach) if _fits(row, wanted)]
        rows.sort(key=lambda row: (row.parked_at, row.letter_id), reverse=True)
        left = [row for row in rows if place is None or (row.parked_at, row.letter_id) < place]
        page, more = left[:size], len(left) > size
        last = (page[-1].parked_at, page[-1].letter_id) if more else None
        return LetterPage(letters=tuple(map(_summary, page)), next=encode_cursor(last) if last else None)

    async def show(self, reach: Reach, letter_id: str) -> LetterView:
        """One letter. Raises NotKnownError, for one beyond the caller's reach too."""

        def work(tx: Transaction) -> LetterView:
            row = _one(tx, letter_id)
            acts = sorted(tx.find(LETTER_HISTORY, "letter", row.tenant, row.letter_id), key=lambda act: act.number)
            others = tx.find(DEAD_LETTERS, "event", row.tenant, row.event_id)
            shared = row.tenant != SYSTEM_CHAIN and row.event_id != ""
            related = sorted(others, key=lambda one: (one.parked_at, one.letter_id)) if shared else []
            return LetterView(
                letter=_summary(row),
                size=len(row.body),
                sha256=hashlib.sha256(row.body).hexdigest(),
                entries=entries_of(row.body),
                resend=why_not(_letter(row), self.layouts),
                history=tuple(map(_act, acts)),
                related=tuple(_summary(one) for one in related if one.letter_id != row.letter_id),
            )

        return await self._database.run(self._scopes(reach), work)

    async def reveal(self, caller: Principal, reach: Reach, letter_id: str, reason: str) -> LetterPayload:
        """The bytes of one letter; who read them, and why, is recorded. Raises NotKnownError, InvalidRequestError."""
        person_of(caller)
        said, now = checked_reason(reason), self._database.clock.now()

        def work(tx: Transaction) -> LetterPayload:
            letter = _letter(_one(tx, letter_id))
            command = Command(Action.REPLAY, (letter.letter_id,), said)
            self._note(tx, caller, command, now, "reveal", [(letter, "revealed", "")])
            return payload_of(letter)

        return await self._database.run(self._scopes(reach), work)

    async def standings(self, reach: Reach, letter_ids: Sequence[str]) -> Sequence[tuple[Letter, Standing]]:
        """Some letters, and what stands about their events. Raises NotKnownError unless all are within reach."""
        return await self._database.run(self._scopes(reach), lambda tx: _standings(tx, letter_ids))

    async def note_dry_run(self, caller: Principal, letters: Sequence[Letter], ran: DryRun) -> None:
        """One audit record per tenant: how many letters, and what would come of them."""
        scopes = {chain_of(letter.scope): letter.scope for letter in letters}
        at = stamp(self._database.clock.now())

        def work(tx: Transaction) -> None:
            for _, scope in sorted(scopes.items()):
                self._record(tx, scope, [dry_run_record(scope, caller, at, letters, ran)])

        await self._database.run(scopes.values(), work)

    # --- acting ---------------------------------------------------------------------------------------

    async def resolve(self, caller: Principal, reach: Reach, command: Command) -> Resolved:
        """Replay or discard some letters, each at most once whoever else does so, in one transaction."""
        person_of(caller)
        now = self._database.clock.now()

        def work(tx: Transaction) -> Resolved:
            order = self._order(tx, command, now)
            found = _standings(tx, order.letter_ids)
            verdicts = [judge(order, *each, self.policy, self.layouts) for each in found]
            if command.request_id is None:
                check_alone(acting(verdicts), self._left(tx, caller, now), self.policy)
            due = self._send(tx, verdicts, order)
            self._write(tx, verdicts)
            done = [(verdict.letter, verdict.result, verdict.why) for verdict in verdicts]
            failed = {verdict.letter.letter_id for verdict in verdicts if verdict.failed}
            self._note(tx, caller, order, now, order.action.value, done, failed)
            return resolved(order.action, [result_of(v, due.get(v.letter.letter_id)) for v in verdicts])

        return await self._database.run(self._scopes(reach), work)

    def _order(self, tx: Transaction, command: Command, now: datetime) -> Command:
        check_size(command.letter_ids, MAX_BATCH)
        if command.request_id is None:
            return replace(command, reason=checked_reason(command.reason))
        row = _request(tx, command.request_id)
        return confirmed(_document(tx, row, now), row.letter_ids, command)

    def _send(self, tx: Transaction, verdicts: Sequence[Verdict], command: Command) -> dict[str, datetime]:
        sent = [(verdict.letter, verdict.message) for verdict in verdicts if verdict.message is not None]
        if not sent:
            return {}
        now, stored = self._database.clock.now(), tx.get(REPLAY_PACE, 1)
        first = max(stored.next_due_at, now) if stored else now
        step = timedelta(seconds=1.0 / command.rate_per_s)
        tx.put(REPLAY_PACE, StoredPace(first + step * len(sent)))
        due = {letter.letter_id: first + step * i for i, (letter, _) in enumerate(sent)}
        groups: dict[str, list[tuple[Letter, Message]]] = {}
        for letter, message in sent:
            groups.setdefault(chain_of(letter.scope), []).append((letter, message))
        for _, some in sorted(groups.items()):
            times = [due[letter.letter_id] for letter, _ in some]
            enqueue(tx, some[0][0].scope, [message for _, message in some], due=times)
        return due

    def _write(self, tx: Transaction, verdicts: Sequence[Verdict]) -> None:
        for verdict in verdicts:
            row = _one(tx, verdict.letter.letter_id)
            replays = row.replays + (verdict.message is not None)
            failed = row.failed or verdict.failed
            tx.put(DEAD_LETTERS, replace(row, status=verdict.status, replays=replays, failed=failed))
        close_letters(tx, [(chain_of(v.letter.scope), v.letter.event_id) for v in verdicts if v.failed])

    def _note(
        self,
        tx: Transaction,
        caller: Principal,
        command: Command,
        now: datetime,
        action: str,
        done: Sequence[tuple[Letter, str, str]],
        failed: Iterable[str] = (),
    ) -> None:
        """One line of history and one audit record for each letter."""
        groups: dict[str, tuple[TenantScope | None, list[AuditRecord]]] = {}
        for letter, result, why in done:
            number, chain = tx.next_number("letter_history"), chain_of(letter.scope)
            about = (chain, letter.letter_id, number, now, action, result, caller.actor, caller.person)
            tx.insert(LETTER_HISTORY, StoredAct(*about, command.reason, why, command.request_id))
            record = act_record(letter, result, caller, stamp(now), command.reason, command, failed=set(failed))
            groups.setdefault(chain, (letter.scope, []))[1].append(record)
        for _, (scope, records) in sorted(groups.items()):
            self._record(tx, scope, records)

    def _record(self, tx: Transaction, scope: TenantScope | None, records: Sequence[AuditRecord]) -> None:
        enqueue(tx, scope, audit_message(records, self.layouts))

    # --- two people -----------------------------------------------------------------------------------

    async def allowance(self, caller: Principal, reach: Reach) -> Allowance:
        """How much the caller may still do alone."""
        now, policy = self._database.clock.now(), self.policy
        left = await self._database.run(self._scopes(reach), lambda tx: self._left(tx, caller, now))
        return Allowance(alone=policy.alone, within_s=policy.alone_s, left=left, most_replays=policy.most_replays)

    def _left(self, tx: Transaction, caller: Principal, now: datetime) -> int:
        since = now - timedelta(seconds=self.policy.alone_s)
        used = sum(
            act.person == caller.person
            and act.at > since
            and act.request_id is None
            and act.result in ("replayed", "discarded")
            for act in tx.rows(LETTER_HISTORY)
        )
        return max(self.policy.alone - used, 0)

    async def request(self, caller: Principal, reach: Reach, command: Command) -> LetterRequest:
        """Ask for somebody's confirmation; the request names each letter, so that what is confirmed is what is done."""
        person, reason = person_of(caller), checked_reason(command.reason)
        letter_ids = check_size(command.letter_ids, MAX_REQUEST)
        now, request_id = self._database.clock.now(), self._ids.uuid7()
        expires_at = now + timedelta(seconds=self.policy.request_s)

        def look(tx: Transaction) -> TenantScope | None:
            return owner_of([_scope_of(_one(tx, letter_id).tenant) for letter_id in letter_ids], reach)

        scope = await self._database.run(self._scopes(reach), look)

        def work(tx: Transaction) -> LetterRequest:
            row = StoredRequest(
                *(chain_of(scope), request_id, command.action.value, tuple(letter_ids), command.force),
                *(command.rate_per_s, reason, person, now, expires_at),
            )
            tx.insert(LETTER_REQUESTS, row)
            asked = _document(tx, row, now)
            self._record(tx, scope, [request_record(scope, "requested", caller, stamp(now), asked, letter_ids)])
            return asked

        return await self._database.run([scope], work)

    async def requests(self, reach: Reach) -> RequestList:
        """The newest requests, without the names of their letters."""
        now = self._database.clock.now()

        def work(tx: Transaction) -> RequestList:
            rows = sorted(tx.rows(LETTER_REQUESTS), key=lambda row: (row.requested_at, row.request_id), reverse=True)
            return RequestList(requests=tuple(_document(tx, row, now, short=True) for row in rows[:MAX_REQUESTS]))

        return await self._database.run(self._scopes(reach), work)

    async def request_of(self, reach: Reach, request_id: str) -> LetterRequest:
        """One request, with the letters that it has not come to. Raises NotKnownError."""
        now = self._database.clock.now()
        return await self._database.run(self._scopes(reach), lambda tx: _document(tx, _request(tx, request_id), now))

    async def answer(self, caller: Principal, reach: Reach, request_id: str, *, confirm: bool) -> LetterRequest:
        """Confirm somebody else's request, or withdraw anybody's."""
        person, now = person_of(caller), self._database.clock.now()

        def work(tx: Transaction) -> LetterRequest:
            row = _request(tx, request_id)
            check_answer(_document(tx, row, now), person, confirm=confirm)
            status = "confirmed" if confirm else "withdrawn"
            lasts = now + timedelta(seconds=self.policy.request_s) if confirm else row.expires_at
            changed = replace(row, status=status, expires_at=lasts, answered_by=person, answered_at=now)
            tx.put(LETTER_REQUESTS, changed)
            answered, scope = _document(tx, changed, now), _scope_of(row.tenant)
            self._record(tx, scope, [request_record(scope, status, caller, stamp(now), answered, row.letter_ids)])
            return answered

        return await self._database.run(self._scopes(reach), work)

    # --- rows -----------------------------------------------------------------------------------------

    def _scopes(self, reach: Reach) -> tuple[TenantScope | None, ...]:
        if not reach.everybody:
            return reach.scopes
        return (*(TenantScope(row.tenant_id) for row in self._database.contents(TENANTS)), None)

    async def _rows(self, reach: Reach) -> tuple[StoredLetter, ...]:
        return await self._database.run(self._scopes(reach), lambda tx: tx.rows(DEAD_LETTERS))


def _one(tx: Transaction, letter_id: str) -> StoredLetter:
    row = tx.get(DEAD_LETTERS, clean(letter_id))
    if row is None:
        raise NotKnownError(NO_LETTER)
    return row


def _request(tx: Transaction, request_id: str) -> StoredRequest:
    row = next((row for row in tx.rows(LETTER_REQUESTS) if row.request_id == request_id), None)
    if row is None:
        raise NotKnownError(NO_REQUEST)
    return row


def _standings(tx: Transaction, letter_ids: Sequence[str]) -> list[tuple[Letter, Standing]]:
    return [(letter, _standing(tx, row)) for row, letter in ((row, _letter(row)) for row in _named(tx, letter_ids))]


def _named(tx: Transaction, letter_ids: Sequence[str]) -> list[StoredLetter]:
    return [_one(tx, letter_id) for letter_id in sorted(set(map(clean, letter_ids)))]


def _standing(tx: Transaction, row: StoredLetter) -> Standing:
    event = tx.get(EVENTS, row.tenant, row.event_id)
    decisions = tx.find(DECISIONS, "event", row.tenant, row.event_id)
    highest = max(decisions, key=lambda decision: decision.revision, default=None)
    return Standing(
        event.body_digest if event else None,
        highest.outcome if highest else None,
        highest.revision if highest else 0,
    )


def _letter(row: StoredLetter) -> Letter:
    scope = _scope_of(row.tenant)
    about = (row.event_id, row.stage, row.problem, row.fingerprint, row.status, row.replays, row.body)
    return Letter(row.letter_id, scope, *about)


def _summary(row: StoredLetter) -> LetterSummary:
    found = {name: getattr(row, name) for name in LetterSummary.model_fields}
    return LetterSummary.model_validate(found | {"tenant": None if row.tenant == SYSTEM_CHAIN else row.tenant})


def _act(row: StoredAct) -> LetterAct:
    return LetterAct.model_validate({name: getattr(row, name) for name in LetterAct.model_fields})


def _group(rows: Sequence[StoredLetter]) -> LetterGroup:
    words = ("open", "closed", "replayed", "discarded")
    counts = {word: sum(row.status == word for row in rows) for word in words}
    return LetterGroup(
        fingerprint=rows[0].fingerprint,
        count=len(rows),
        **counts,
        tenants=tuple(sorted({row.tenant for row in rows})),
        stages=tuple(sorted({row.stage for row in rows})),
        category=min(row.category for row in rows),
        problem=min(row.problem for row in rows),
        exception_class=min(row.exception_class for row in rows),
        first_parked_at=min(row.parked_at for row in rows),
        last_parked_at=max(row.parked_at for row in rows),
    )


def _document(tx: Transaction, row: StoredRequest, now: datetime, *, short: bool = False) -> LetterRequest:
    came_to = {act.letter_id for act in tx.rows(LETTER_HISTORY) if act.request_id == row.request_id}
    found = {name: getattr(row, name) for name in StoredRequest.__dataclass_fields__}
    return request_from(found | {"came_to": came_to}, now, short=short)


def _fits(row: StoredLetter, wanted: LetterFilter) -> bool:
    exact = ("status", "stage", "category", "problem", "fingerprint")
    named = all(getattr(wanted, name) in (None, getattr(row, name)) for name in exact)
    early = wanted.parked_from is not None and row.parked_at < wanted.parked_from
    late = wanted.parked_before is not None and row.parked_at >= wanted.parked_before
    return named and not early and not late


def _place(after: str | None) -> tuple[Any, ...] | None:
    return None if after is None else tuple(decode_cursor(after, (datetime, str)))


def _scope_of(chain: str) -> TenantScope | None:
    return None if chain == SYSTEM_CHAIN else TenantScope(chain)
