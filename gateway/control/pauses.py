"""The calls of pauses: what is paused, and pausing or resuming a stage or a tenant's doors.

Promises: a command gives a reason and is recorded in its own transaction; it holds within 5 s. Holds no rule of its
own: `governance.postgres.pauses` does. `_shared` in place of a tenant is where stages are.
"""

from __future__ import annotations

from typing import Annotated, Any, Final

from pydantic import BaseModel, ConfigDict, Field
from starlette.requests import Request
from starlette.responses import Response

from contracts.identity import Permission
from contracts.messages import JSON
from gateway.calls import Answer, Call, Endpoint, Parameter
from gateway.control.desk import Desk
from gateway.control.parameters import TENANT, command
from gateway.web import json_answer
from governance.pauses import PLACES, StandingPause

_ONE: Final = "/ops/v1/tenants/{tenant}/pauses/{place}"
_PLACE: Final = Parameter(
    "place", "path", "`doors` of a tenant, or a stage of `_shared`.", {"type": "string", "enum": list(PLACES)}
)


class PauseCommand(BaseModel):
    """Why something is paused, or goes on."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)
    reason: Annotated[str, Field(min_length=1, max_length=2_000)]


class Standing(BaseModel):
    """What is paused."""

    pauses: tuple[StandingPause, ...]


def calls(desk: Desk) -> list[Call]:
    """The calls of this room."""
    door = _Door(desk)
    held = Answer("Holds within 5 s", StandingPause)
    return [
        Call(
            "GET",
            "/ops/v1/pauses",
            "listPauses",
            "Stages and tenants that are paused, as far as they are yours to see",
            door.list,
            Permission.REGISTRY_READ,
            {200: Answer("What is paused now", Standing)},
            problems=(503,),
            tag="pauses",
        ),
        _act("PUT", "pause", "Pause a stage, or a tenant at its doors: its events wait", door.pause, {200: held}),
        _act("DELETE", "resume", "Let it go on", door.resume, {204: Answer("Within 5 s")}),
    ]


class _Door:
    """The endpoints."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk

    async def list(self, request: Request) -> Response:
        caller = await self._desk.anybody(request, Permission.REGISTRY_READ)
        found = await self._desk.pauses.standing(caller.tenants(Permission.REGISTRY_READ))
        return json_answer(200, Standing(pauses=tuple(found)).model_dump(mode="json"))

    async def pause(self, request: Request) -> Response:
        caller, scope = await self._desk.caller(request, Permission.HALT)
        body = await command(request, PauseCommand)
        pause = await self._desk.pauses.pause(caller, scope, str(request.path_params["place"]), body.reason)
        self._desk.committed()
        return json_answer(200, pause.model_dump(mode="json"))

    async def resume(self, request: Request) -> Response:
        caller, scope = await self._desk.caller(request, Permission.HALT)
        body = await command(request, PauseCommand)
        await self._desk.pauses.resume(caller, scope, str(request.path_params["place"]), body.reason)
        self._desk.committed()
        return Response(status_code=204)


def _act(method: Any, operation: str, summary: str, endpoint: Endpoint, answers: dict[int, Answer]) -> Call:
    parameters, body, problems = (TENANT, _PLACE), {JSON: PauseCommand}, (400, 404, 413, 415, 422, 503)
    return Call(
        method, _ONE, operation, summary, endpoint, Permission.HALT, answers, parameters, body, problems, "pauses"
    )
