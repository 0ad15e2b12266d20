"""Dead letters for people: groups, lists, and commands that are one transaction with their messages and records.

Promises: a letter is sent again or discarded once, whatever any number of people order at once; the mark on its row,
its message in the outbox, its line of history and its audit record are there together or not at all. Rules are those
of `governance.deadletters`; row-level security keeps a caller to the tenants that the reach names. Sends nothing.

Why the pace is a time on outbox rows and no job: the rows are durable with the command that wrote them, so a crash of
whoever ordered, served or relays it changes nothing but when they go out. `replay_pace` is one row for the whole
installation, so that two people together go no faster than the slower of them says.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Final

from sqlalchemy import Row, text
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from contracts.failures import (
    NotKnownError,
)
from contracts.identity import Principal
from contracts.ports import Clock, Ids, Message
from contracts.state import AuditRecord
from contracts.tenancy import TenantScope
from contracts.topology import STAGES, RunningLayouts
from governance.approvals import checked_reason
from governance.audit import SYSTEM_CHAIN, chain_of
from governance.columns import clean
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
from governance.postgres.corrections import lock_events
from governance.postgres.cursors import decode_cursor, encode_cursor
from governance.postgres.deadletters import SUMMARY, letters_of, summary
from governance.postgres.directory import tenant_ids
from governance.postgres.engine import columns, transaction
from governance.postgres.outbox import enqueue, enqueue_records
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

_WANTED: Final = """
    tenant = ANY(CAST(:tenant AS text[]))
       AND (CAST(:stage AS text) IS NULL OR stage = CAST(:stage AS text))
       AND (CAST(:category AS text) IS NULL OR category = CAST(:category AS text))
       AND (CAST(:problem AS text) IS NULL OR problem = CAST(:problem AS text))
       AND (CAST(:fingerprint AS text) IS NULL OR fingerprint = CAST(:fingerprint AS text))
       AND (CAST(:parked_from AS timestamptz) IS NULL OR parked_at >= CAST(:parked_from AS timestamptz))
       AND (CAST(:parked_before AS timestamptz) IS NULL OR parked_at < CAST(:parked_before AS timestamptz))
"""
_LIST: Final = text(
    f"""
    {SUMMARY}
     WHERE {_WANTED}
       AND (CAST(:status AS text) IS NULL OR status = CAST(:status AS text))
       AND (CAST(:after_at AS timestamptz) IS NULL
            OR (parked_at, letter_id COLLATE "C") < (CAST(:after_at AS timestamptz), CAST(:after_id AS text)))
     ORDER BY parked_at DESC, letter_id COLLATE "C" DESC LIMIT :limit
    """
)
_GROUPS: Final = text(
    f"""
    SELECT * FROM (
        SELECT fingerprint, count(*) AS count,
               count(*) FILTER (WHERE status = 'open') AS open, count(*) FILTER (WHERE status = 'closed') AS closed,
               count(*) FILTER (WHERE status = 'replayed') AS replayed,
               count(*) FILTER (WHERE status = 'discarded') AS discarded,
               array_agg(DISTINCT tenant ORDER BY tenant) AS tenants,
               array_agg(DISTINCT stage ORDER BY stage) AS stages, min(category) AS category,
               min(problem) AS problem, min(exception_class) AS exception_class,
               min(parked_at) AS first_parked_at, max(parked_at) AS last_parked_at
          FROM dead_letters WHERE {_WANTED} GROUP BY fingerprint
        HAVING CAST(:status AS text) IS NULL OR bool_or(status = CAST(:status AS text))) g
     WHERE CAST(:after_at AS timestamptz) IS NULL
        OR (last_parked_at, fingerprint COLLATE "C") < (CAST(:after_at AS timestamptz), CAST(:after_id AS text))
     ORDER BY last_parked_at DESC, fingerprint COLLATE "C" DESC LIMIT :limit
    """  # noqa: S608 - put together from the constant above
)
_ONE: Final = text(f"{SUMMARY.replace('FROM', ', body FROM')} WHERE letter_id = :letter_id")
_HISTORY: Final = text(
    """
    SELECT at, action, result, person, reason, why, request_id FROM letter_history
     WHERE tenant = :tenant AND letter_id = :letter_id ORDER BY number
    """
)
_FOUND: Final = """
    SELECT l.letter_id, l.tenant, l.event_id, l.stage, l.problem, l.fingerprint, l.status, l.replays, l.body,
           e.body_digest AS owner, d.outcome, d.revision
      FROM dead_letters l
      LEFT JOIN events e ON e.tenant = l.tenant AND e.event_id = l.event_id
      LEFT JOIN LATERAL (
        SELECT d.outcome, d.revision FROM decisions d
         WHERE d.tenant = l.tenant AND d.event_id = l.event_id ORDER BY d.revision DESC LIMIT 1) d ON true
     WHERE l.letter_id = ANY(CAST(:letter_id AS text[])) ORDER BY l.letter_id COLLATE "C"
"""
_STANDINGS: Final = text(_FOUND)
_HOLD: Final = text(f"{_FOUND} FOR UPDATE OF l")
_KEYS: Final = text(
    "SELECT letter_id, tenant, event_id, stage FROM dead_letters WHERE letter_id = ANY(CAST(:letter_id AS text[]))"
)
_MARK: Final = text(
    """
    UPDATE dead_letters l SET status = k.status, replays = k.replays, failed = k.failed
      FROM unnest(CAST(:letter_id AS text[]), CAST(:status AS text[]), CAST(:replays AS integer[]),
                  CAST(:failed AS boolean[])) AS k(letter_id, status, replays, failed)
     WHERE l.letter_id = k.letter_id
    """
)
_CLOSE_OTHERS: Final = text(
    """
    UPDATE dead_letters l SET status = 'closed'
      FROM unnest(CAST(:tenant AS text[]), CAST(:event_id AS text[])) AS k(tenant, event_id)
     WHERE l.tenant = k.tenant AND l.event_id = k.event_id AND l.status = 'open'
       AND l.stage = ANY(CAST(:stages AS text[]))
    """
)
_NOTE: Final = text(
    """
    INSERT INTO letter_history (tenant, letter_id, at, action, result, actor, person, reason, why, request_id)
    SELECT k.tenant, k.letter_id, :at, :action, k.result, :actor, :person, :reason, k.why, :request_id
      FROM unnest(CAST(:tenant AS text[]), CAST(:letter_id AS text[]), CAST(:result AS text[]),
                  CAST(:why AS text[])) AS k(tenant, letter_id, result, why)
    """
)
_HOLD_PACE: Final = text("SELECT 1 FROM replay_pace WHERE id = 1 FOR UPDATE")
_PACE: Final = text(
    """
    UPDATE replay_pace SET next_due_at = greatest(next_due_at, clock_timestamp()) + make_interval(secs => :seconds)
     WHERE id = 1 RETURNING next_due_at - make_interval(secs => :seconds) AS first
    """
)
_USED: Final = text(
    """
    SELECT count(*) FROM letter_history
     WHERE tenant = ANY(CAST(:tenant AS text[])) AND person = :person AND at > :since AND request_id IS NULL
       AND result IN ('replayed', 'discarded')
    """
)
_REQUEST: Final = text(
    """
    INSERT INTO letter_requests (tenant, request_id, action, letter_ids, force, rate_per_s, reason, requested_by,
                                 requested_at, expires_at)
    VALUES (:tenant, :request_id, :action, CAST(:letter_ids AS text[]), :force, :rate_per_s, :reason, :person, :at,
            :expires_at)
    """
)
_REQUESTS: Final = """
    SELECT q.*, ARRAY(SELECT DISTINCT h.letter_id FROM letter_history h WHERE h.request_id = q.request_id) AS came_to
      FROM letter_requests q WHERE q.tenant = ANY(CAST(:tenant AS text[]))
"""
_NEWEST: Final = text(f"{_REQUESTS} ORDER BY q.requested_at DESC, q.request_id DESC LIMIT :limit")
_ONE_REQUEST: Final = text(f"{_REQUESTS} AND q.request_id = :request_id")
_HOLD_REQUEST: Final = text(f"{_REQUESTS} AND q.request_id = :request_id FOR UPDATE OF q")
_ANSWER: Final = text(
    """
    UPDATE letter_requests SET status = :status, answered_by = :person, answered_at = :at, expires_at = :expires_at
     WHERE tenant = :tenant AND request_id = :request_id
    """
)


@dataclass(frozen=True, slots=True)
class _Order:
    """A command as it is carried out: the request's reason, force and rate where there is one."""

    command: Command
    caller: Principal
    reason: str
    now: datetime


class PostgresLetterDesk:
    """The LetterDesk over the tables `dead_letters`, `letter_history`, `letter_requests` and `outbox`."""

    def __init__(
        self, engine: AsyncEngine, clock: Clock, ids: Ids, layouts: RunningLayouts, policy: LetterPolicy | None = None
    ) -> None:
        """`layouts`: where messages that are sent again go."""
        self._engine = engine
        self._clock = clock
        self._ids = ids
        self.layouts = layouts
        self.policy = policy or LetterPolicy()

    # --- looking --------------------------------------------------------------------------------------

    async def groups(
        self, reach: Reach, wanted: LetterFilter, *, after: str | None = None, limit: int = 50
    ) -> GroupPage:
        """Letters by fingerprint; counts are over every status, `wanted.status` says which groups are listed."""
        rows, more = await self._listed(reach, _GROUPS, wanted, after, limit)
        groups = tuple(LetterGroup.model_validate(dict(row)) for row in rows)
        last = (groups[-1].last_parked_at, groups[-1].fingerprint) if more else None
        return GroupPage(groups=groups, next=encode_cursor(last) if last else None)

    async def page(
        self, reach: Reach, wanted: LetterFilter, *, after: str | None = None, limit: int = 50
    ) -> LetterPage:
        """Letters, the newest first. Raises InvalidMetadataError for a cursor that this list did not make."""
        rows, more = await self._listed(reach, _LIST, wanted, after, limit)
        letters = tuple(summary(row) for row in rows)
        last = (letters[-1].parked_at, letters[-1].letter_id) if more else None
        return LetterPage(letters=letters, next=encode_cursor(last) if last else None)

    async def _listed(
        self, reach: Reach, statement: Any, wanted: LetterFilter, after: str | None, limit: int
    ) -> tuple[list[Any], bool]:
        size = max(1, min(limit, MAX_PAGE))
        place = (None, None) if after is None else decode_cursor(after, (datetime, str))
        scopes = await self._scopes(reach)
        values: dict[str, Any] = {
            name: clean(value) if isinstance(value, str) else value for name, value in wanted.model_dump().items()
        }
        values |= {"tenant": _chains(scopes), "after_at": place[0], "after_id": place[1], "limit": size + 1}
        async with transaction(self._engine, scopes) as connection:
            rows = list((await connection.execute(statement, values)).mappings())
        return rows[:size], len(rows) > size

    async def show(self, reach: Reach, letter_id: str) -> LetterView:
        """One letter. Raises NotKnownError, for one beyond the caller's reach too."""
        async with transaction(self._engine, await self._scopes(reach)) as connection:
            row = await _one(connection, letter_id)
            key = {"tenant": row["tenant"], "letter_id": row["letter_id"]}
            history = (await connection.execute(_HISTORY, key)).mappings()
            acts = tuple(LetterAct.model_validate(dict(each)) for each in history)
            scope, event_id = _scope_of(row["tenant"]), row["event_id"]
            others = await letters_of(connection, scope, event_id) if scope and event_id else ()
        body = bytes(row["body"])
        return LetterView(
            letter=summary(row),
            size=len(body),
            sha256=hashlib.sha256(body).hexdigest(),
            entries=entries_of(body),
            resend=why_not(_letter(row), self.layouts),
            history=acts,
            related=tuple(each for each in others if each.letter_id != row["letter_id"]),
        )

    async def reveal(self, caller: Principal, reach: Reach, letter_id: str, reason: str) -> LetterPayload:
        """The bytes of one letter; who read them, and why, is recorded. Raises NotKnownError, InvalidRequestError."""
        person_of(caller)
        said = checked_reason(reason)
        async with transaction(self._engine, await self._scopes(reach)) as connection:
            letter = _letter(await _one(connection, letter_id))
            order = _Order(Command(Action.REPLAY, (letter.letter_id,)), caller, said, self._clock.now())
            await self._note(connection, order, "reveal", [(letter, "revealed", "")])
        return payload_of(letter)

    async def standings(self, reach: Reach, letter_ids: Sequence[str]) -> Sequence[tuple[Letter, Standing]]:
        """Some letters, and what stands about their events. Raises NotKnownError unless all are within reach."""
        async with transaction(self._engine, await self._scopes(reach)) as connection:
            return await _standings(connection, _STANDINGS, letter_ids)

    async def note_dry_run(self, caller: Principal, letters: Sequence[Letter], ran: DryRun) -> None:
        """One audit record per tenant: how many letters, and what would come of them."""
        scopes = {chain_of(letter.scope): letter.scope for letter in letters}
        at = stamp(self._clock.now())
        async with transaction(self._engine, scopes.values()) as connection:
            for _, scope in sorted(scopes.items()):
                record = dry_run_record(scope, caller, at, letters, ran)
                await enqueue_records(connection, scope, [record], self.layouts)

    # --- acting ---------------------------------------------------------------------------------------

    async def resolve(self, caller: Principal, reach: Reach, command: Command) -> Resolved:
        """Replay or discard some letters, each at most once whoever else does so, in one transaction."""
        person_of(caller)
        scopes = await self._scopes(reach)
        async with transaction(self._engine, scopes) as connection:
            # One command at a time: what a person may do alone is counted, and the pace goes on from the one before.
            await connection.execute(_HOLD_PACE)
            order = await self._order(connection, scopes, caller, command)
            wanted = {"letter_id": sorted(set(order.command.letter_ids))}
            keys = (await connection.execute(_KEYS, wanted)).all()
            events = [(scope, row.event_id) for row in keys if (scope := _scope_of(row.tenant)) and row.event_id]
            await lock_events(connection, (), exclusive=events)
            found = await _standings(connection, _HOLD, order.command.letter_ids)
            verdicts = [judge(order.command, *each, self.policy, self.layouts) for each in found]
            if command.request_id is None:
                left = await self._left(connection, scopes, caller, order.now)
                check_alone(acting(verdicts), left, self.policy)
            due = await self._send(connection, verdicts, order)
            await self._write(connection, verdicts, order)
        return resolved(command.action, [result_of(v, due.get(v.letter.letter_id)) for v in verdicts])

    async def _order(
        self, connection: AsyncConnection, scopes: Sequence[TenantScope | None], caller: Principal, command: Command
    ) -> _Order:
        check_size(command.letter_ids, MAX_BATCH)
        now = self._clock.now()
        if command.request_id is None:
            return _Order(command, caller, checked_reason(command.reason), now)
        values = {"tenant": _chains(scopes), "request_id": clean(command.request_id)}
        row = (await connection.execute(_ONE_REQUEST, values)).mappings().one_or_none()
        if row is None:
            raise NotKnownError(NO_REQUEST)
        return _Order(confirmed(request_from(row, now), row["letter_ids"], command), caller, row["reason"], now)

    async def _send(
        self, connection: AsyncConnection, verdicts: Sequence[Verdict], order: _Order
    ) -> dict[str, datetime]:
        """Write the messages, spread over time; when each goes out, by letter."""
        sent = [(verdict.letter, verdict.message) for verdict in verdicts if verdict.message is not None]
        if not sent:
            return {}
        step = 1.0 / order.command.rate_per_s
        first = (await connection.execute(_PACE, {"seconds": step * len(sent)})).scalar_one()
        due = {letter.letter_id: first + timedelta(seconds=step * i) for i, (letter, _) in enumerate(sent)}
        groups: dict[str, list[tuple[Letter, Message]]] = {}
        for letter, message in sent:
            groups.setdefault(chain_of(letter.scope), []).append((letter, message))
        for _, some in sorted(groups.items()):
            messages = [message for _, message in some]
            await enqueue(connection, some[0][0].scope, messages, due=[due[letter.letter_id] for letter, _ in some])
        return due

    async def _write(self, connection: AsyncConnection, verdicts: Sequence[Verdict], order: _Order) -> None:
        changed = [v for v in verdicts if v.status != v.letter.status]
        rows = [(v.letter.letter_id, v.status, v.letter.replays + (v.message is not None), v.failed) for v in changed]
        if rows:
            await connection.execute(_MARK, columns(rows, ("letter_id", "status", "replays", "failed")))
        failed = [(chain_of(v.letter.scope), v.letter.event_id) for v in verdicts if v.failed]
        if failed:
            others = columns(failed, ("tenant", "event_id")) | {"stages": list(STAGES)}
            await connection.execute(_CLOSE_OTHERS, others)
        await self._note(
            connection, order, order.command.action.value, [(v.letter, v.result, v.why) for v in verdicts], verdicts
        )

    async def _note(
        self,
        connection: AsyncConnection,
        order: _Order,
        action: str,
        done: Sequence[tuple[Letter, str, str]],
        verdicts: Sequence[Verdict] = (),
    ) -> None:
        """One line of history and one audit record for each letter."""
        rows = [(chain_of(letter.scope), letter.letter_id, result, why) for letter, result, why in done]
        about = {"at": order.now, "action": action, "actor": order.caller.actor, "person": order.caller.person}
        about |= {"reason": order.reason, "request_id": order.command.request_id}
        await connection.execute(_NOTE, columns(rows, ("tenant", "letter_id", "result", "why")) | about)
        failed = {verdict.letter.letter_id for verdict in verdicts if verdict.failed}
        groups: dict[str, tuple[TenantScope | None, list[AuditRecord]]] = {}
        for letter, result, _ in done:
            record = act_record(
                letter, result, order.caller, stamp(order.now), order.reason, order.command, failed=failed
            )
            groups.setdefault(chain_of(letter.scope), (letter.scope, []))[1].append(record)
        for _, (scope, records) in sorted(groups.items()):
            await enqueue_records(connection, scope, records, self.layouts)

    # --- two people -----------------------------------------------------------------------------------

    async def allowance(self, caller: Principal, reach: Reach) -> Allowance:
        """How much the caller may still do alone."""
        scopes = await self._scopes(reach)
        async with transaction(self._engine, scopes) as connection:
            left = await self._left(connection, scopes, caller, self._clock.now())
        policy = self.policy
        return Allowance(alone=policy.alone, within_s=policy.alone_s, left=left, most_replays=policy.most_replays)

    async def _left(
        self, connection: AsyncConnection, scopes: Sequence[TenantScope | None], caller: Principal, now: datetime
    ) -> int:
        since = now - timedelta(seconds=self.policy.alone_s)
        values = {"tenant": _chains(scopes), "person": caller.person, "since": since}
        return max(self.policy.alone - int((await connection.execute(_USED, values)).scalar_one()), 0)

    async def request(self, caller: Principal, reach: Reach, command: Command) -> LetterRequest:
        """Ask for somebody's confirmation; the request names each letter, so that what is confirmed is what is done."""
        person, reason = person_of(caller), checked_reason(command.reason)
        letter_ids = check_size(command.letter_ids, MAX_REQUEST)
        now, request_id = self._clock.now(), self._ids.uuid7()
        async with transaction(self._engine, await self._scopes(reach)) as connection:
            found = (await connection.execute(_KEYS, {"letter_id": letter_ids})).all()
            if len(found) != len(letter_ids):
                raise NotKnownError(NO_LETTER)
            scope = owner_of([_scope_of(row.tenant) for row in found], reach)
            chain = chain_of(scope)
        values = {
            "tenant": chain,
            "request_id": request_id,
            "action": command.action.value,
            "letter_ids": letter_ids,
            "force": command.force,
            "rate_per_s": command.rate_per_s,
            "reason": reason,
            "person": person,
            "at": now,
            "expires_at": now + timedelta(seconds=self.policy.request_s),
        }
        async with transaction(self._engine, [scope]) as connection:
            await connection.execute(_REQUEST, values)
            found_again = {"tenant": [chain], "request_id": request_id}
            row = (await connection.execute(_ONE_REQUEST, found_again)).mappings().one()
            asked = request_from(row, now)
            record = request_record(scope, "requested", caller, stamp(now), asked, row["letter_ids"])
            await enqueue_records(connection, scope, [record], self.layouts)
        return asked

    async def requests(self, reach: Reach) -> RequestList:
        """The newest requests, without the names of their letters."""
        scopes = await self._scopes(reach)
        async with transaction(self._engine, scopes) as connection:
            values = {"tenant": _chains(scopes), "limit": MAX_REQUESTS}
            rows = list((await connection.execute(_NEWEST, values)).mappings())
        now = self._clock.now()
        return RequestList(requests=tuple(request_from(row, now, short=True) for row in rows))

    async def request_of(self, reach: Reach, request_id: str) -> LetterRequest:
        """One request, with the letters that it has not come to. Raises NotKnownError."""
        async with transaction(self._engine, scopes := await self._scopes(reach)) as connection:
            values = {"tenant": _chains(scopes), "request_id": clean(request_id)}
            row = (await connection.execute(_ONE_REQUEST, values)).mappings().one_or_none()
        if row is None:
            raise NotKnownError(NO_REQUEST)
        return request_from(row, self._clock.now())

    async def answer(self, caller: Principal, reach: Reach, request_id: str, *, confirm: bool) -> LetterRequest:
        """Confirm somebody else's request, or withdraw anybody's."""
        person, scopes = person_of(caller), await self._scopes(reach)
        async with transaction(self._engine, scopes) as connection:
            key = {"tenant": _chains(scopes), "request_id": clean(request_id)}
            row = (await connection.execute(_HOLD_REQUEST, key)).mappings().one_or_none()
            if row is None:
                raise NotKnownError(NO_REQUEST)
            now = self._clock.now()
            check_answer(request_from(row, now), person, confirm=confirm)
            lasts = now + timedelta(seconds=self.policy.request_s) if confirm else row["expires_at"]
            values = {"tenant": row["tenant"], "request_id": row["request_id"], "person": person, "at": now}
            status = "confirmed" if confirm else "withdrawn"
            await connection.execute(_ANSWER, values | {"status": status, "expires_at": lasts})
            again = (await connection.execute(_ONE_REQUEST, key)).mappings().one()
            answered, scope = request_from(again, now), _scope_of(row["tenant"])
            record = request_record(scope, status, caller, stamp(now), answered, row["letter_ids"])
            await enqueue_records(connection, scope, [record], self.layouts)
        return answered

    async def _scopes(self, reach: Reach) -> tuple[TenantScope | None, ...]:
        return (*await tenant_ids(self._engine), None) if reach.everybody else reach.scopes


# --- rows -----------------------------------------------------------------------------------------------


async def _one(connection: AsyncConnection, letter_id: str) -> Any:
    row = (await connection.execute(_ONE, {"letter_id": clean(letter_id)})).mappings().one_or_none()
    if row is None:
        raise NotKnownError(NO_LETTER)
    return row


async def _standings(
    connection: AsyncConnection, statement: Any, letter_ids: Sequence[str]
) -> list[tuple[Letter, Standing]]:
    wanted = sorted({clean(letter_id) for letter_id in letter_ids})
    rows: list[Row[Any]] = list((await connection.execute(statement, {"letter_id": wanted})).all())
    if len(rows) != len(wanted):
        raise NotKnownError(NO_LETTER)
    return [
        (_letter(row._mapping), Standing(row.owner, row.outcome, row.revision or 0))  # noqa: SLF001 - its public name
        for row in rows
    ]


def _letter(row: Any) -> Letter:
    return Letter(
        letter_id=row["letter_id"],
        scope=_scope_of(row["tenant"]),
        event_id=row["event_id"],
        stage=row["stage"],
        problem=row["problem"],
        fingerprint=row["fingerprint"],
        status=row["status"],
        replays=row["replays"],
        body=bytes(row["body"]),
    )


def _scope_of(chain: str) -> TenantScope | None:
    return None if chain == SYSTEM_CHAIN else TenantScope(chain)


def _chains(scopes: Sequence[TenantScope | None]) -> list[str]:
    return sorted({chain_of(scope) for scope in scopes})
