"""Commands about dead letters as pure functions: who may give them, what two people are needed for, what is recorded.

Promises: an audit record holds the digest of a reason, never its words; what a request permits is exactly what its
confirmer could read. Both desks, on the server and in memory, are made of these.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, Final

from contracts.codec import Entry, decode_carrier
from contracts.failures import (
    AuthorizationError,
    ConflictError,
    InvalidRequestError,
    RiskfleetError,
    UndecodableEntryError,
)
from contracts.identity import Principal
from contracts.state import AuditRecord
from contracts.tenancy import TenantScope
from governance.audit import SYSTEM_CHAIN, operator_record
from governance.columns import clean
from governance.deadletters import (
    Action,
    Command,
    DryRun,
    Letter,
    LetterEntry,
    LetterPayload,
    LetterPolicy,
    LetterRequest,
    Reach,
    of_an_event,
    state_of,
)

MAX_REQUESTS: Final = 100
"""Requests for a second person that are listed at once."""


def person_of(caller: Principal) -> str:
    """Who answers for a command. Raises AuthorizationError for a credential that nobody answers for."""
    if not caller.person:
        raise AuthorizationError("dead letters are people's: this credential has no person who answers for it")
    return caller.person


def stamp(at: datetime) -> str:
    """RFC 3339 in UTC, to the microsecond."""
    return at.isoformat(timespec="microseconds").replace("+00:00", "Z")


def check_size(letter_ids: Sequence[str], most: int) -> list[str]:
    """Each letter once, in order. Raises InvalidRequestError for none, and for more than `most`."""
    named = sorted({clean(letter_id) for letter_id in letter_ids})
    if not 1 <= len(named) <= most:
        raise InvalidRequestError("too many letters", pointers=(("/letter_ids", f"1 to {most:,} letters"),))
    return named


def check_alone(number: int, left: int, policy: LetterPolicy) -> None:
    """Raise ConflictError for more letters than a person may still replay or discard alone."""
    if number > left:
        raise ConflictError(
            f"{number} letters, and {left} of {policy.alone} in {policy.alone_s // 60} minutes are left to you alone: "
            "make a request that another person confirms"
        )


def check_answer(asked: LetterRequest, person: str, *, confirm: bool) -> None:
    """Raise ConflictError for a request that this person cannot answer now."""
    if confirm and asked.requested_by == person:
        raise ConflictError("you made this request: another person confirms it")
    if asked.status == "withdrawn" or (confirm and asked.status != "open"):
        by = f" by {asked.answered_by}" if asked.answered_by else ""
        raise ConflictError(f"the request is {asked.status}{by}: make a new one if it is still needed")


def confirmed(asked: LetterRequest, letter_ids: Sequence[str], command: Command) -> Command:
    """The command that a request permits. Raises ConflictError for what was not confirmed."""
    if asked.status != "confirmed":
        raise ConflictError(f"the request is {asked.status}, not confirmed: another person confirms it first")
    if asked.action is not command.action or not set(command.letter_ids) <= set(letter_ids):
        raise ConflictError("the request is about something else: name its own letters and its own command")
    return Command(asked.action, command.letter_ids, asked.reason, asked.force, asked.rate_per_s, asked.request_id)


def owner_of(scopes: Sequence[TenantScope | None], reach: Reach) -> TenantScope | None:
    """Whose request it is: the one tenant's, else the system's. Raises InvalidRequestError for a reach below that."""
    if len(set(scopes)) == 1 and scopes[0] is not None:
        return scopes[0]
    if not reach.everybody and reach.scopes != (None,):
        raise InvalidRequestError("the letters belong to several tenants: make one request for each")
    return None


def request_from(row: Any, now: datetime, *, short: bool = False) -> LetterRequest:
    """A row of `letter_requests`, with `came_to`: the letters that it has come to."""
    came_to = set(row["came_to"])
    status = row["status"]
    if status != "withdrawn" and row["expires_at"] <= now:
        status = "expired"
    return LetterRequest(
        request_id=row["request_id"],
        tenant=None if row["tenant"] == SYSTEM_CHAIN else row["tenant"],
        action=Action(row["action"]),
        status=status,
        count=len(row["letter_ids"]),
        done=len(came_to),
        remaining=() if short else tuple(each for each in row["letter_ids"] if each not in came_to),
        force=row["force"],
        rate_per_s=float(row["rate_per_s"]),
        reason=row["reason"],
        requested_by=row["requested_by"],
        requested_at=row["requested_at"],
        expires_at=row["expires_at"],
        answered_by=row["answered_by"],
        answered_at=row["answered_at"],
    )


def subject_of(letter: Letter) -> Mapping[str, str | int]:
    """How an audit record names a letter."""
    return {"letter_id": letter.letter_id, "stage": letter.stage, "fingerprint": letter.fingerprint}


_ACTS: Final = {
    "replayed": "deadletter.replayed",
    "discarded": "deadletter.discarded",
    "noop": "deadletter.left",
    "refused": "deadletter.refused",
    "revealed": "deadletter.revealed",
}


def act_record(
    letter: Letter, result: str, caller: Principal, at: str, reason: str, command: Command, *, failed: set[str]
) -> AuditRecord:
    """The audit record of what became of one letter. It holds the reason's digest: the history has its words."""
    detail: dict[str, str | int] = {"reason_digest": hashlib.sha256(reason.encode()).hexdigest()}
    if result in ("replayed", "noop", "refused"):
        detail |= {"replays": letter.replays + (result == "replayed"), "action": command.action.value}
    if letter.letter_id in failed:
        detail |= {"status": "failed"}
    if command.force:
        detail |= {"force": 1}
    if command.request_id is not None:
        detail |= {"request_id": command.request_id}
    return operator_record(
        letter.scope, _ACTS[result], caller, at, subject_of(letter), detail, event_id=letter.event_id
    )


def dry_run_record(
    scope: TenantScope | None, caller: Principal, at: str, letters: Sequence[Letter], ran: DryRun
) -> AuditRecord:
    """The audit record of a dry-run over one tenant's letters."""
    mine = {letter.letter_id for letter in letters if letter.scope == scope}
    counts: dict[str, str | int] = {}
    for each in ran.results:
        if each.letter_id in mine:
            counts[each.result] = int(counts.get(each.result, 0)) + 1
    digest = hashlib.sha256("|".join(sorted(mine)).encode()).hexdigest()
    return operator_record(scope, "deadletter.dry_run", caller, at, {"letters": len(mine), "digest": digest}, counts)


def request_record(
    scope: TenantScope | None,
    what: str,
    caller: Principal,
    at: str,
    asked: LetterRequest,
    letter_ids: Sequence[str],
) -> AuditRecord:
    """The audit record of a request, or of the answer to it; the digest names its letters."""
    digest = hashlib.sha256("|".join(letter_ids).encode()).hexdigest()
    subject: dict[str, str | int] = {"request_id": asked.request_id, "action": asked.action.value, "digest": digest}
    reason = hashlib.sha256(asked.reason.encode()).hexdigest()
    detail: dict[str, str | int] = {"letters": asked.count, "force": int(asked.force), "reason_digest": reason}
    return operator_record(scope, f"deadletter.request_{what}", caller, at, subject, detail)


def payload_of(letter: Letter) -> LetterPayload:
    """The bytes of a letter, and the event inside them."""
    try:
        event = state_of(letter).event.model_dump(mode="json", exclude_none=True) if of_an_event(letter) else None
    except RiskfleetError:
        event = None
    return LetterPayload(letter_id=letter.letter_id, body=base64.b64encode(letter.body).decode(), event=event)


def entries_of(body: bytes) -> tuple[LetterEntry, ...]:
    """The entries inside some bytes, by their headers; none when they are not a carrier."""
    try:
        found = decode_carrier(body)
    except UndecodableEntryError:
        return ()
    return tuple(
        LetterEntry(
            event_id=entry.header.event,
            stage=entry.header.stage,
            n=entry.header.n,
            digest=entry.header.digest,
            body_digest=entry.header.body_digest,
            attempts=entry.header.attempts,
            replays=entry.header.replays,
            suspect=entry.header.suspect,
            size=len(entry.body),
        )
        for entry in found
        if isinstance(entry, Entry)
    )
