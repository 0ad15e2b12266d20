"""The calls of dead letters: groups, lists, one letter, dry-runs, replays, discards, and what two people do together.

Promises: a caller sees and touches letters of its own tenants; those of nobody are for grants over everything. A
command names its letters, so that what is done is what was looked at. Bytes are shown to those with the permission
for it alone, with a reason. Holds no rule of its own: `governance.deadletters` does.
"""

from __future__ import annotations

from typing import Annotated, Final, Literal

from pydantic import BaseModel, ConfigDict, Field
from starlette.requests import Request
from starlette.responses import Response

from contracts.failures import InvalidMetadataError
from contracts.identity import Permission, Principal
from contracts.messages import JSON
from gateway.calls import Answer, Call, Endpoint, Parameter, Schema
from gateway.control.desk import Desk
from gateway.control.parameters import (
    AFTER,
    choice,
    choice_parameter,
    command,
    limit_parameter,
    moment_of,
    number,
    one,
)
from gateway.web import json_answer
from governance.approvals import MAX_REASON
from governance.deadletters import (
    MAX_BATCH,
    MAX_DRY_RUN,
    MAX_PAGE,
    MAX_RATE,
    MAX_REQUEST,
    Action,
    Allowance,
    Command,
    DryRun,
    GroupPage,
    LetterFilter,
    LetterPage,
    LetterPayload,
    LetterRequest,
    LetterView,
    Reach,
    RequestList,
    Resolved,
    dry_run,
    reach_of,
)

_LETTERS: Final = "/ops/v1/dead-letters"
_ONE: Final = _LETTERS + "/{letter_id}"
_REQUESTS: Final = "/ops/v1/dead-letters/requests"
_REQUEST: Final = _REQUESTS + "/{request_id}"
_TAG: Final = "dead letters"
_EVERY: Final = "all"
_STATUS: Final = ("open", "closed", "replayed", "discarded", _EVERY)
_WORDS: Final = ("stage", "category", "problem", "fingerprint")
_MAX_COMMAND: Final = 1_048_576
_STRICT: Final = ConfigDict(frozen=True, extra="forbid", strict=True)

LetterId = Annotated[str, Field(min_length=1, max_length=200)]
Why = Annotated[str, Field(min_length=1, max_length=MAX_REASON)]
Rate = Annotated[float, Field(ge=0.1, le=MAX_RATE, description="How many go out in a second at most.")]


class LettersToTry(BaseModel):
    """Letters to decide again without sending anything."""

    model_config = _STRICT
    letter_ids: Annotated[list[LetterId], Field(min_length=1, max_length=MAX_DRY_RUN)]


class LettersToReplay(BaseModel):
    """Letters to send again, alone with a reason, or as a part of a confirmed request, which has its own.

    `force` sends those again that were sent too often already.
    """

    model_config = _STRICT
    letter_ids: Annotated[list[LetterId], Field(min_length=1, max_length=MAX_BATCH)]
    reason: Annotated[str, Field(max_length=MAX_REASON)] = ""
    force: bool = False
    rate_per_s: Rate = 20.0
    request_id: Annotated[str, Field(min_length=1, max_length=64)] | None = None


class LettersToDiscard(BaseModel):
    """Letters to give up, alone with a reason, or as a part of a confirmed request."""

    model_config = _STRICT
    letter_ids: Annotated[list[LetterId], Field(min_length=1, max_length=MAX_BATCH)]
    reason: Annotated[str, Field(max_length=MAX_REASON)] = ""
    request_id: Annotated[str, Field(min_length=1, max_length=64)] | None = None


class NewLetterRequest(BaseModel):
    """A command about many letters, for another person to confirm."""

    model_config = _STRICT
    action: Literal["replay", "discard"]
    letter_ids: Annotated[list[LetterId], Field(min_length=1, max_length=MAX_REQUEST)]
    reason: Why
    force: bool = False
    rate_per_s: Rate = 20.0


class ReasonToReveal(BaseModel):
    """Why somebody reads a payload."""

    model_config = _STRICT
    reason: Why


def calls(desk: Desk) -> list[Call]:
    """The calls of this room. Names of their own come before {letter_id}: the first path that fits is taken."""
    door = _Door(desk)
    return [*_lists(door), *_commands(door), *_requests(door), *_one(door)]


def _lists(door: _Door) -> list[Call]:
    when = {"type": "string", "format": "date-time"}
    tenant = Parameter("tenant", "query", "Only of this tenant; _system: of nobody. Default: all that are yours.")
    filters = (
        *(tenant, choice_parameter("status", "Default: open.", _STATUS)),
        *(Parameter(name, "query", f"Only of this {name}.") for name in _WORDS),
        Parameter("parked_from", "query", "Parked then or later.", when),
        Parameter("parked_before", "query", "Parked before then.", when),
        *(AFTER, limit_parameter(MAX_PAGE)),
    )
    groups, listed = "Dead letters by fingerprint, the newest first", "Dead letters, the newest first"
    return [
        _read(_LETTERS, "listDeadLetters", listed, door.page, LetterPage, *filters),
        _read(f"{_LETTERS}/groups", "groupDeadLetters", groups, door.groups, GroupPage, *filters),
        _read(f"{_LETTERS}/allowance", "letterAllowance", "What one may do alone", door.allowance, Allowance),
    ]


def _commands(door: _Door) -> list[Call]:
    tried = ("dryRunDeadLetters", "What a replay would do now; sends nothing", door.dry_run)
    replayed = ("replayDeadLetters", "Send dead letters again, each once", door.replay)
    discarded = ("discardDeadLetters", "Give dead letters up: their events fail", door.discard)
    resolve = Permission.DEADLETTERS_RESOLVE
    return [
        _act(f"{_LETTERS}/dry-run", tried, Permission.DEADLETTERS_READ, (LettersToTry, DryRun)),
        _act(f"{_LETTERS}/replay", replayed, resolve, (LettersToReplay, Resolved)),
        _act(f"{_LETTERS}/discard", discarded, resolve, (LettersToDiscard, Resolved)),
    ]


def _requests(door: _Door) -> list[Call]:
    request, resolve = Parameter("request_id", "path", "The request."), Permission.DEADLETTERS_RESOLVE
    listed, one_of_them = "The newest requests about many letters", "One request, and what is left"
    made = ("makeLetterRequest", "Ask another person to confirm a command about many letters", door.request)
    confirmed = ("confirmLetterRequest", "Confirm somebody else's request", door.confirm)
    withdrawn = ("withdrawLetterRequest", "Withdraw a request", door.withdraw)
    return [
        _read(_REQUESTS, "listLetterRequests", listed, door.requests, RequestList),
        _act(_REQUESTS, made, resolve, (NewLetterRequest, LetterRequest)),
        _read(_REQUEST, "showLetterRequest", one_of_them, door.asked, LetterRequest, request),
        _act(f"{_REQUEST}/confirm", confirmed, resolve, (None, LetterRequest), request),
        _act(f"{_REQUEST}/withdraw", withdrawn, resolve, (None, LetterRequest), request),
    ]


def _one(door: _Door) -> list[Call]:
    letter = Parameter("letter_id", "path", "The dead letter.")
    revealed = ("revealDeadLetter", "The bytes of one dead letter", door.reveal)
    return [
        _read(_ONE, "showDeadLetter", "One dead letter: history, sizes, digests", door.show, LetterView, letter),
        _act(f"{_ONE}/reveal", revealed, Permission.DEADLETTERS_PAYLOAD, (ReasonToReveal, LetterPayload), letter),
    ]


class _Door:
    """The endpoints."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk

    async def groups(self, request: Request) -> Response:
        _, reach = await self._caller(request, Permission.DEADLETTERS_READ)
        after, limit = one(request, "after"), number(request, "limit", 50, 1, MAX_PAGE)
        return _answer(await self._desk.letters.groups(reach, _filter(request), after=after, limit=limit))

    async def page(self, request: Request) -> Response:
        _, reach = await self._caller(request, Permission.DEADLETTERS_READ)
        after, limit = one(request, "after"), number(request, "limit", 50, 1, MAX_PAGE)
        return _answer(await self._desk.letters.page(reach, _filter(request), after=after, limit=limit))

    async def show(self, request: Request) -> Response:
        _, reach = await self._caller(request, Permission.DEADLETTERS_READ)
        return _answer(await self._desk.letters.show(reach, str(request.path_params["letter_id"])))

    async def reveal(self, request: Request) -> Response:
        caller, reach = await self._caller(request, Permission.DEADLETTERS_PAYLOAD)
        body = await command(request, ReasonToReveal)
        letter_id = str(request.path_params["letter_id"])
        shown = await self._desk.letters.reveal(caller, reach, letter_id, body.reason)
        return self._done(shown, {"Cache-Control": "no-store"})

    async def dry_run(self, request: Request) -> Response:
        caller, reach = await self._caller(request, Permission.DEADLETTERS_READ)
        body = await command(request, LettersToTry)
        desk = self._desk.letters
        found = await desk.standings(reach, body.letter_ids)
        ran = await dry_run(found, self._desk.redecider, desk.policy, desk.layouts)
        await desk.note_dry_run(caller, [letter for letter, _ in found], ran)
        return self._done(ran)

    async def replay(self, request: Request) -> Response:
        caller, reach = await self._caller(request, Permission.DEADLETTERS_RESOLVE)
        body = await command(request, LettersToReplay, _MAX_COMMAND)
        ordered = Command(
            Action.REPLAY, tuple(body.letter_ids), body.reason, body.force, body.rate_per_s, body.request_id
        )
        return self._done(await self._desk.letters.resolve(caller, reach, ordered))

    async def discard(self, request: Request) -> Response:
        caller, reach = await self._caller(request, Permission.DEADLETTERS_RESOLVE)
        body = await command(request, LettersToDiscard, _MAX_COMMAND)
        ordered = Command(Action.DISCARD, tuple(body.letter_ids), body.reason, request_id=body.request_id)
        return self._done(await self._desk.letters.resolve(caller, reach, ordered))

    async def allowance(self, request: Request) -> Response:
        caller, reach = await self._caller(request, Permission.DEADLETTERS_READ)
        return _answer(await self._desk.letters.allowance(caller, reach))

    async def requests(self, request: Request) -> Response:
        _, reach = await self._caller(request, Permission.DEADLETTERS_READ)
        return _answer(await self._desk.letters.requests(reach))

    async def request(self, request: Request) -> Response:
        caller, reach = await self._caller(request, Permission.DEADLETTERS_RESOLVE)
        body = await command(request, NewLetterRequest, _MAX_COMMAND)
        ordered = Command(Action(body.action), tuple(body.letter_ids), body.reason, body.force, body.rate_per_s)
        return self._done(await self._desk.letters.request(caller, reach, ordered))

    async def asked(self, request: Request) -> Response:
        _, reach = await self._caller(request, Permission.DEADLETTERS_READ)
        return _answer(await self._desk.letters.request_of(reach, str(request.path_params["request_id"])))

    async def confirm(self, request: Request) -> Response:
        return await self._answer_request(request, confirm=True)

    async def withdraw(self, request: Request) -> Response:
        return await self._answer_request(request, confirm=False)

    async def _answer_request(self, request: Request, *, confirm: bool) -> Response:
        caller, reach = await self._caller(request, Permission.DEADLETTERS_RESOLVE)
        request_id = str(request.path_params["request_id"])
        return self._done(await self._desk.letters.answer(caller, reach, request_id, confirm=confirm))

    async def _caller(self, request: Request, permission: Permission) -> tuple[Principal, Reach]:
        """Who calls, and whose letters the caller may touch. Raises as `reach_of` does."""
        caller = await self._desk.anybody(request, permission)
        return caller, reach_of(caller, permission, one(request, "tenant") if request.method == "GET" else None)

    def _done(self, document: BaseModel, headers: dict[str, str] | None = None) -> Response:
        """A command committed: its messages wait in the outbox."""
        self._desk.committed()
        return json_answer(200, document.model_dump(mode="json"), headers)


def _filter(request: Request) -> LetterFilter:
    status = choice(request, "status", _STATUS, "open")
    start, end = moment_of(request, "parked_from"), moment_of(request, "parked_before")
    if start is not None and end is not None and start >= end:
        raise InvalidMetadataError("?parked_from= lies before ?parked_before=")
    return LetterFilter.model_validate(
        {name: one(request, name) for name in _WORDS}
        | {"status": None if status == _EVERY else status, "parked_from": start, "parked_before": end}
    )


def _read(path: str, operation: str, summary: str, endpoint: Endpoint, answer: Schema, *parameters: Parameter) -> Call:
    return Call(
        "GET",
        path,
        operation,
        summary,
        endpoint,
        Permission.DEADLETTERS_READ,
        {200: Answer("What is there now", answer)},
        parameters,
        problems=(404, 422, 503),
        tag=_TAG,
    )


def _act(
    path: str,
    about: tuple[str, str, Endpoint],
    permission: Permission,
    bodies: tuple[Schema | None, Schema],
    *parameters: Parameter,
) -> Call:
    operation, summary, endpoint = about
    body, answer = bodies
    return Call(
        "POST",
        path,
        operation,
        summary,
        endpoint,
        permission,
        {200: Answer("Done and recorded", answer)},
        parameters,
        {} if body is None else {JSON: body},
        (400, 404, 409, 413, 415, 422, 429, 503),
        _TAG,
    )


def _answer(document: BaseModel) -> Response:
    return json_answer(200, document.model_dump(mode="json"))
