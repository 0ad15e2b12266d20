"""Dead letters as pure functions: what may be sent again, what a person may do about it, and what people read of it.

Promises: nothing is sent again that cannot be read, belongs to a decided event or goes round in a loop; every refusal
says why. A replay goes back to where the letter came from: a stage, the audit or the labels. A submission that a door
parked has lost its envelope, so its sender repeats it. Knows no table and no clock.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from enum import StrEnum
from typing import Any, Final, Literal, Protocol

from pydantic import BaseModel, ConfigDict

from contracts.codec import CARRIER_HEADER, Entry, decode_carrier, encode_carrier, record_of_entry, state_from_bytes
from contracts.failures import (
    AuthorizationError,
    InfrastructureError,
    InvalidTenantError,
    InvalidWorkflowStateError,
    LimitExceededError,
    NotKnownError,
    RiskfleetError,
    UndecodableEntryError,
    classify,
)
from contracts.identity import EVERYWHERE, Permission, Principal
from contracts.messages import JSON, label_from, stage_message
from contracts.ports import Message, Redecider
from contracts.settlement import REPLAYS_HEADER
from contracts.state import EventState
from contracts.tenancy import TenantScope
from contracts.topology import LABELS_QUEUE, STAGES, WORK, RunningLayouts
from governance.audit import SYSTEM_CHAIN

MAX_PAGE: Final = 200
MAX_BATCH: Final = 200
"""Letters of one command: each command is one transaction."""
MAX_DRY_RUN: Final = 50
MAX_REQUEST: Final = 5_000
"""Letters that one confirmation may be about."""
MAX_RATE: Final = 1_000.0

_DELIVERY_LIMIT: Final = "delivery-limit"
_DOCUMENT = ConfigDict(frozen=True, extra="forbid")

LetterStatus = Literal["open", "closed", "replayed", "discarded"]
Dry = Literal["decides", "resends", "parks", "noop", "refused"]


@dataclass(frozen=True, slots=True)
class LetterPolicy:
    """How far one person may go. Times are seconds.

    One person alone replays or discards at most `alone` letters in `alone_s`; for more somebody else confirms within
    `request_s`, and the same time again is left to carry it out. A letter that was replayed `most_replays` times needs
    force.
    """

    alone: int = 100
    alone_s: int = 3_600
    request_s: int = 3_600
    most_replays: int = 3


class Action(StrEnum):
    """What people do about letters."""

    REPLAY = "replay"
    DISCARD = "discard"


# --- what people read ---------------------------------------------------------------------------------


class LetterSummary(BaseModel):
    """One dead letter without its bytes. `replays`: how often it, or what it was before, was sent again."""

    model_config = _DOCUMENT
    letter_id: str
    tenant: str | None
    event_id: str
    stage: str
    category: str
    problem: str
    exception_class: str
    fingerprint: str
    status: LetterStatus
    attempts: int
    replays: int
    first_failed_at: datetime
    last_failed_at: datetime
    parked_at: datetime


class LetterEntry(BaseModel):
    """One entry inside a letter, as its header says: `n` and `digest` name the version, `size` is in bytes."""

    model_config = _DOCUMENT
    event_id: str
    stage: str
    n: int
    digest: str
    body_digest: str
    attempts: int
    replays: int
    suspect: bool
    size: int


class LetterAct(BaseModel):
    """What somebody did, or tried to do, about a letter."""

    model_config = _DOCUMENT
    at: datetime
    action: str
    result: str
    person: str
    reason: str
    why: str
    request_id: str | None


class LetterView(BaseModel):
    """One dead letter with the size (bytes) and SHA-256 of its bytes; no entries: they are not a carrier.

    `resend` says why it cannot be sent again; null when it can. `related` are the other letters of its event.
    """

    model_config = _DOCUMENT
    letter: LetterSummary
    size: int
    sha256: str
    entries: tuple[LetterEntry, ...]
    resend: str | None
    history: tuple[LetterAct, ...]
    related: tuple[LetterSummary, ...]


class LetterPayload(BaseModel):
    """The bytes of a letter, Base64, and the event inside them where there is one that can be read."""

    model_config = _DOCUMENT
    letter_id: str
    body: str
    event: dict[str, Any] | None


class LetterPage(BaseModel):
    """Some dead letters, the newest first; `next` continues where they end, null at the end."""

    model_config = _DOCUMENT
    letters: tuple[LetterSummary, ...]
    next: str | None


class LetterGroup(BaseModel):
    """The letters of one fingerprint: one cause, as far as a program can tell."""

    model_config = _DOCUMENT
    fingerprint: str
    count: int
    open: int
    closed: int
    replayed: int
    discarded: int
    tenants: tuple[str, ...]
    stages: tuple[str, ...]
    category: str
    problem: str
    exception_class: str
    first_parked_at: datetime
    last_parked_at: datetime


class GroupPage(BaseModel):
    """Some groups, the one with the newest letter first; `next` continues where they end, null at the end."""

    model_config = _DOCUMENT
    groups: tuple[LetterGroup, ...]
    next: str | None


class LetterFilter(BaseModel):
    """Which letters; what is None does not matter. `parked_before` is excluded, `parked_from` included."""

    model_config = _DOCUMENT
    status: LetterStatus | None = "open"
    stage: str | None = None
    category: str | None = None
    problem: str | None = None
    fingerprint: str | None = None
    parked_from: datetime | None = None
    parked_before: datetime | None = None


class LetterResult(BaseModel):
    """What became of one letter of a command, and why.

    `due_at`: when its entry goes out. `failed`: its event's status is `failed` from now on.
    """

    model_config = _DOCUMENT
    letter_id: str
    event_id: str
    result: Literal["replayed", "discarded", "noop", "refused"]
    why: str
    replays: int
    due_at: datetime | None
    failed: bool


class Resolved(BaseModel):
    """What a command did, letter by letter in the order of their ids."""

    model_config = _DOCUMENT
    action: Action
    results: tuple[LetterResult, ...]
    counts: dict[str, int]


class DryResult(BaseModel):
    """What a replay of one letter would do now. `now`: the outcome that stands; `then`: the one that would come."""

    model_config = _DOCUMENT
    letter_id: str
    event_id: str
    result: Dry
    now: str | None
    then: str | None
    why: str


class DryRun(BaseModel):
    """What a replay would do, letter by letter; nothing was sent. `changes` counts "from → to"."""

    model_config = _DOCUMENT
    results: tuple[DryResult, ...]
    counts: dict[str, int]
    changes: dict[str, int]


class Allowance(BaseModel):
    """How many letters a person may still replay or discard alone; more need a request."""

    model_config = _DOCUMENT
    alone: int
    within_s: int
    left: int
    most_replays: int


class LetterRequest(BaseModel):
    """A command about many letters that somebody else confirms before it may be carried out.

    `remaining` are the letters that it has not come to yet.
    """

    model_config = _DOCUMENT
    request_id: str
    tenant: str | None
    action: Action
    status: Literal["open", "confirmed", "withdrawn", "expired"]
    count: int
    done: int
    remaining: tuple[str, ...]
    force: bool
    rate_per_s: float
    reason: str
    requested_by: str
    requested_at: datetime
    expires_at: datetime
    answered_by: str | None
    answered_at: datetime | None


class RequestList(BaseModel):
    """The newest requests, at most 100, without the names of their letters."""

    model_config = _DOCUMENT
    requests: tuple[LetterRequest, ...]


# --- who may touch what -------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Reach:
    """Whose letters a caller may touch. `everybody`: every tenant's, and those of nobody, who have no scope."""

    scopes: tuple[TenantScope | None, ...]
    everybody: bool = False


def reach_of(caller: Principal, permission: Permission, tenant: str | None = None) -> Reach:
    """What the caller may touch, narrowed to `tenant` ("_system": the letters of nobody) when one is named.

    Raises AuthorizationError without the permission anywhere, NotKnownError for a tenant that is not the caller's.
    """
    held = caller.tenants(permission)
    if not held:
        raise AuthorizationError(f"the credential does not permit {permission}")
    if tenant is None:
        if EVERYWHERE in held:
            return Reach((), everybody=True)
        return Reach(tuple(TenantScope(name) for name in sorted(held)))
    if tenant == SYSTEM_CHAIN and EVERYWHERE in held:
        return Reach((None,))
    try:
        scope = TenantScope(tenant)
    except InvalidTenantError:
        raise NotKnownError(_NO_TENANT) from None
    if not held & {EVERYWHERE, tenant}:
        raise NotKnownError(_NO_TENANT)
    return Reach((scope,))


_NO_TENANT: Final = "no such tenant is known to you"
NO_LETTER: Final = "no such dead letter is known to you"
NO_REQUEST: Final = "no such request is known to you"


# --- what may be sent again ---------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Letter:
    """A row of `dead_letters`, as far as it can be sent again; `scope` None: it belongs to nobody."""

    letter_id: str
    scope: TenantScope | None
    event_id: str
    stage: str
    problem: str
    fingerprint: str
    status: str
    replays: int
    body: bytes


@dataclass(frozen=True, slots=True)
class Standing:
    """What PostgreSQL says of a letter's event: the digest of the body that owns its identity, and its decision."""

    owner: str | None = None
    outcome: str | None = None
    revision: int = 0


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a command does to one letter. `status`: what it becomes; `message`: what goes out; `failed`: its event."""

    letter: Letter
    result: Literal["replayed", "discarded", "noop", "refused"]
    why: str
    status: str
    message: Message | None = None
    failed: bool = False


@dataclass(frozen=True, slots=True)
class Command:
    """What a person orders about some letters. `rate_per_s` caps how many of them go out in a second.

    `request_id` names the confirmed request that this is a part of: reason, force and rate are then the request's.
    """

    action: Action
    letter_ids: tuple[str, ...]
    reason: str = ""
    force: bool = False
    rate_per_s: float = 20.0
    request_id: str | None = None


def of_an_event(letter: Letter) -> bool:
    """Whether a stage parked it, so that a decision of its event settles it too."""
    return letter.scope is not None and letter.stage in STAGES and letter.event_id != ""


def judge(
    command: Command, letter: Letter, standing: Standing, policy: LetterPolicy, layouts: RunningLayouts
) -> Verdict:
    """What a command does to one letter as it stands now."""
    act = _replay if command.action is Action.REPLAY else _discard
    if (settled := _settled(letter, standing)) is not None:
        return settled
    return act(command, letter, standing, policy, layouts)


def _settled(letter: Letter, standing: Standing) -> Verdict | None:
    """The verdict about a letter that nothing is left to do about."""
    if of_an_event(letter) and standing.outcome is not None:
        why = f"its event is decided: {standing.outcome}, revision {standing.revision}"
        return Verdict(letter, "noop", why, "closed" if letter.status == "open" else letter.status)
    words = {
        "replayed": "it was sent again already: if it fails once more it comes back as another letter",
        "discarded": "it was discarded already",
        "closed": "it was closed with its event",
    }
    if letter.status in words:
        return Verdict(letter, "noop", words[letter.status], letter.status)
    return None


def _replay(
    command: Command, letter: Letter, standing: Standing, policy: LetterPolicy, layouts: RunningLayouts
) -> Verdict:
    try:
        message = resend(letter, layouts)
        _check_owner(letter, standing)
    except RiskfleetError as error:
        return Verdict(letter, "refused", error.detail, letter.status)
    if letter.replays >= policy.most_replays and not command.force:
        why = f"it was sent again {letter.replays} times already: find the cause, then use force"
        return Verdict(letter, "refused", why, letter.status)
    return Verdict(letter, "replayed", f"goes to {message.routing_key}", "replayed", message)


def _discard(
    command: Command, letter: Letter, standing: Standing, policy: LetterPolicy, layouts: RunningLayouts
) -> Verdict:
    del command, policy, layouts
    failed = of_an_event(letter) and _owns(letter, standing)
    why = "its event has failed" if failed else "closed; no event fails with it"
    return Verdict(letter, "discarded", why, "discarded", failed=failed)


def _owns(letter: Letter, standing: Standing) -> bool:
    """Whether the letter's body owns the event's identity: the one of a changed body says nothing about the event."""
    try:
        _check_owner(letter, standing)
    except InvalidWorkflowStateError:
        return False
    return True


def _check_owner(letter: Letter, standing: Standing) -> None:
    if not of_an_event(letter) or standing.owner is None:
        return
    try:
        entry = one_entry(letter)
    except UndecodableEntryError:
        return
    if entry.header.body_digest != standing.owner:
        raise InvalidWorkflowStateError(
            "another body owns this identity: its sender gives this one a name of its own; discard the letter"
        )


def one_entry(letter: Letter) -> Entry:
    """The one entry of a letter. Raises UndecodableEntryError for bytes that are not a carrier of exactly one."""
    items = decode_carrier(letter.body)
    entry = items[0]
    if len(items) != 1 or not isinstance(entry, Entry):
        raise UndecodableEntryError("the bytes cannot be decoded to one entry: they cannot be sent again")
    return entry


def state_of(letter: Letter) -> EventState:
    """The version inside a stage's letter. Raises UndecodableEntryError, InvalidWorkflowStateError."""
    entry = one_entry(letter)
    h = entry.header
    if letter.scope is None or (h.tenant, h.event) != (letter.scope.tenant_id, letter.event_id):
        raise InvalidWorkflowStateError("its bytes name another event than the letter: it cannot be sent again")
    if h.stage not in STAGES or STAGES.index(h.stage) != h.n:
        raise InvalidWorkflowStateError(f"no stage takes version {h.n} at {h.stage}: it cannot be sent again")
    state = state_from_bytes(entry.body)
    if (state.scope, state.event_id) != (letter.scope, letter.event_id):
        raise InvalidWorkflowStateError("its stored bytes are another event's: it cannot be sent again")
    return state


def resend(letter: Letter, layouts: RunningLayouts) -> Message:
    """What a replay of a letter sends, to the stage that the letter came from, on the newest version.

    Attempts begin again; the count of replays grows, so that a later park is another letter; a suspect stays one, and
    what was delivered too often becomes one, since it may have killed its holders. Raises UndecodableEntryError or
    InvalidWorkflowStateError with the reason why it cannot be sent.
    """
    count = letter.replays + 1
    name = f"replay:{letter.letter_id}:{count}"
    try:
        if letter.stage in STAGES:
            state_of(letter)
            entry = _again(letter, count).evolve(topology=layouts.newest.version)
            return replace(stage_message(entry, layouts), message_id=name)
        if letter.stage == "audit":
            return _to_audit(letter, count, name, layouts)
        if letter.stage == "labels":
            label = label_from(letter.body)
            if letter.scope not in (None, label.scope):
                raise InvalidWorkflowStateError("its bytes name another tenant than the letter")
            return Message(WORK, LABELS_QUEUE, letter.body, name, {REPLAYS_HEADER: count}, content_type=JSON)
    except UndecodableEntryError as error:
        raise UndecodableEntryError(f"it cannot be decoded, so it cannot be sent again: {error.detail}") from error
    if letter.stage == "ingress":
        raise InvalidWorkflowStateError(
            "a door parked it and its envelope is gone: the sender repeats it under the same name, which is safe"
        )
    raise InvalidWorkflowStateError("it names no stage of this release: it cannot be sent again")


def _again(letter: Letter, count: int) -> Entry:
    entry = one_entry(letter)
    suspect = entry.header.suspect or letter.problem == _DELIVERY_LIMIT
    return entry.evolve(attempts=0, first_failed_at=None, replays=count, suspect=suspect, reply_to=None)


def _to_audit(letter: Letter, count: int, name: str, layouts: RunningLayouts) -> Message:
    entry = one_entry(letter)
    record = record_of_entry(entry)
    if record.scope != letter.scope:
        raise InvalidWorkflowStateError("its record belongs to another chain than the letter")
    body = encode_carrier((entry.evolve(replays=count),))
    return Message(WORK, layouts.newest.audit_queue(record.scope), body, name, {CARRIER_HEADER: 1})


def why_not(letter: Letter, layouts: RunningLayouts) -> str | None:
    """Why a letter cannot be sent again, whatever stands in the tables; None when it can."""
    try:
        resend(letter, layouts)
    except RiskfleetError as error:
        return error.detail
    return None


def result_of(verdict: Verdict, due_at: datetime | None) -> LetterResult:
    """A verdict for people."""
    return LetterResult(
        letter_id=verdict.letter.letter_id,
        event_id=verdict.letter.event_id,
        result=verdict.result,
        why=verdict.why,
        replays=verdict.letter.replays + (verdict.message is not None),
        due_at=due_at,
        failed=verdict.failed,
    )


def resolved(action: Action, results: Sequence[LetterResult]) -> Resolved:
    """The answer to a command."""
    return Resolved(action=action, results=tuple(results), counts=dict(Counter(each.result for each in results)))


def acting(verdicts: Sequence[Verdict]) -> int:
    """How many letters a command really sends or discards."""
    return sum(verdict.result in ("replayed", "discarded") for verdict in verdicts)


# --- dry-run ------------------------------------------------------------------------------------------


async def dry_run(
    found: Sequence[tuple[Letter, Standing]], redecider: Redecider, policy: LetterPolicy, layouts: RunningLayouts
) -> DryRun:
    """What a replay of these letters would do now; sends and writes nothing.

    An event is decided again from the version in its letter, by the pins in it if it has any: as its stages would.
    Raises InfrastructureError when a server does not answer, LimitExceededError when too many decide at once.
    """
    results = [await _dry(letter, standing, redecider, policy, layouts) for letter, standing in found]
    changes = Counter(
        f"{each.now or 'undecided'} → {each.then}" for each in results if each.result == "decides" and each.then
    )
    return DryRun(results=tuple(results), counts=dict(Counter(each.result for each in results)), changes=dict(changes))


async def _dry(
    letter: Letter, standing: Standing, redecider: Redecider, policy: LetterPolicy, layouts: RunningLayouts
) -> DryResult:
    verdict = judge(Command(Action.REPLAY, (letter.letter_id,)), letter, standing, policy, layouts)

    def answer(
        result: Literal["decides", "resends", "parks", "noop", "refused"], then: str | None, why: str
    ) -> DryResult:
        return DryResult(
            letter_id=letter.letter_id,
            event_id=letter.event_id,
            result=result,
            now=standing.outcome,
            then=then,
            why=why,
        )

    if verdict.result == "noop":
        return answer("noop", standing.outcome, verdict.why)
    if verdict.result == "refused":
        return answer("refused", None, verdict.why)
    if letter.stage not in STAGES:
        return answer("resends", None, verdict.why)
    try:
        decision = await redecider.redecide(state_of(letter))
    except (InfrastructureError, LimitExceededError):
        raise
    except Exception as error:  # noqa: BLE001 - whatever a stage raises would park the entry again
        problem = classify(error).problem
        return answer("parks", None, f"it would fail again: {type(error).__name__} ({problem})")
    return answer("decides", decision.outcome.value, "")


# --- the desk -----------------------------------------------------------------------------------------


class LetterDesk(Protocol):
    """Dead letters for people; every command is one transaction with its messages and its audit records."""

    policy: LetterPolicy
    layouts: RunningLayouts

    async def groups(
        self, reach: Reach, wanted: LetterFilter, *, after: str | None = None, limit: int = 50
    ) -> GroupPage:
        """Letters by fingerprint; a group is listed when one of its letters has the wanted status."""
        ...

    async def page(
        self, reach: Reach, wanted: LetterFilter, *, after: str | None = None, limit: int = 50
    ) -> LetterPage:
        """Letters, the newest first. Raises InvalidMetadataError for a cursor that this list did not make."""
        ...

    async def show(self, reach: Reach, letter_id: str) -> LetterView:
        """One letter. Raises NotKnownError, for one beyond the caller's reach too."""
        ...

    async def reveal(self, caller: Principal, reach: Reach, letter_id: str, reason: str) -> LetterPayload:
        """The bytes of one letter, with a record of who read them and why. Raises NotKnownError."""
        ...

    async def standings(self, reach: Reach, letter_ids: Sequence[str]) -> Sequence[tuple[Letter, Standing]]:
        """Some letters, and what stands about their events. Raises NotKnownError unless all are within reach."""
        ...

    async def note_dry_run(self, caller: Principal, letters: Sequence[Letter], ran: DryRun) -> None:
        """The audit record of a dry-run: how many letters, and what would come of them."""
        ...

    async def resolve(self, caller: Principal, reach: Reach, command: Command) -> Resolved:
        """Replay or discard some letters, each at most once whoever else does so.

        Raises NotKnownError unless all are within reach, AuthorizationError for a caller who is no person,
        InvalidRequestError without a reason, ConflictError for more than one person may do alone, and for a request
        that is not confirmed, has expired, or is about something else.
        """
        ...

    async def allowance(self, caller: Principal, reach: Reach) -> Allowance:
        """How much the caller may still do alone."""
        ...

    async def request(self, caller: Principal, reach: Reach, command: Command) -> LetterRequest:
        """Ask for somebody's confirmation. Letters of several tenants, or of nobody, need a reach over everybody."""
        ...

    async def requests(self, reach: Reach) -> RequestList:
        """The newest requests."""
        ...

    async def request_of(self, reach: Reach, request_id: str) -> LetterRequest:
        """One request, with the letters that it has not come to. Raises NotKnownError."""
        ...

    async def answer(self, caller: Principal, reach: Reach, request_id: str, *, confirm: bool) -> LetterRequest:
        """Confirm somebody else's request, or withdraw anybody's.

        Raises AuthorizationError for a caller who is no person, ConflictError for one's own request, and for one that
        is not open or has expired.
        """
        ...
