"""The calls of the registry and of halts: versions, their way to an approval, and what decides where.

Promises: every command names the digest that its sender read, or the versions that it means, and gives a reason; what
a command did is counted and its record goes out at once. Holds no rule of its own: `governance.postgres.gate` does.
`_shared` in place of a tenant is what every tenant uses.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Annotated, Any, Final, TypeVar, cast, get_args

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError
from starlette.requests import Request
from starlette.responses import Response

from contracts.events import pointers_of
from contracts.failures import InvalidRequestError, NotKnownError
from contracts.identity import Permission, Principal
from contracts.messages import JSON
from contracts.telemetry import TRANSITIONS, Measurement
from contracts.tenancy import TenantScope
from gateway.calls import Answer, Call, Endpoint, Parameter, Schema
from gateway.control.desk import Desk
from gateway.control.parameters import TENANT, choice_parameter, one, words
from gateway.web import json_answer, read_json
from governance.registry import (
    ANY_MODEL,
    KINDS,
    MAX_CONTENT_BYTES,
    Activation,
    Choice,
    Draft,
    Halt,
    Kind,
    Name,
    Placement,
    ScopeKey,
    Version,
    VersionKey,
    VersionStatus,
    permission_for,
)

_REGISTRY: Final = "/ops/v1/tenants/{tenant}/registry"
_HALTS: Final = "/ops/v1/tenants/{tenant}/halts"
_NAMED: Final = _REGISTRY + "/{kind}/{name}"
_ONE: Final = _NAMED + "/{version}"
_HALT: Final = _HALTS + "/{model}"
_TAG: Final = "registry"
_STRICT: Final = ConfigDict(frozen=True, extra="forbid", strict=True)
_PROBLEMS: Final = (400, 404, 409, 413, 415, 422, 503)
_MAX_BODY: Final = MAX_CONTENT_BYTES * 2
"""Content as its author wrote it, spaces and all, with its evaluation report."""

M = TypeVar("M", bound=BaseModel)
Why = Annotated[str, Field(min_length=1, max_length=2_000)]


class VersionCommand(BaseModel):
    """A command on one version: `digest` is that of the content that its sender read."""

    model_config = _STRICT
    digest: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    reason: Why


class ActivateCommand(BaseModel):
    """Versions that begin to decide together."""

    model_config = _STRICT
    activations: Annotated[list[Choice], Field(min_length=1, max_length=64)]
    reason: Why


class RollbackCommand(BaseModel):
    """Let the version decide that was active at this place before."""

    model_config = _STRICT
    kind: Kind
    scope_key: ScopeKey
    reason: Why


class HaltCommand(BaseModel):
    """Why automatic decisions stop, or go on."""

    model_config = _STRICT
    reason: Why


class Versions(BaseModel):
    """Versions without their content."""

    versions: tuple[Version, ...]


class RolledBack(BaseModel):
    """What decides now; null: the tenant has nothing of its own there any more, and the shared version decides."""

    version: Version | None


class Difference(BaseModel):
    """A unified diff of two contents, by line."""

    lines: tuple[str, ...]


class Placements(BaseModel):
    """What decides where."""

    active: tuple[Placement, ...]


class Activations(BaseModel):
    """Changes of what decides, oldest first."""

    history: tuple[Activation, ...]


class Halts(BaseModel):
    """Halts that hold here."""

    halts: tuple[Halt, ...]


def calls(desk: Desk) -> list[Call]:
    """The calls of this room."""
    door = _Door(desk)
    kind, where = choice_parameter("kind", "One kind only.", KINDS), Parameter("scope_key", "query", "One place only.")
    status = choice_parameter("status", "One status only.", words(VersionStatus))
    numbers = (_number("from"), _number("to"))
    author, activate, halt = Permission.REGISTRY_AUTHOR, Permission.REGISTRY_ACTIVATE, Permission.HALT
    halted = Answer("Holds within 2 s", Halt)
    return [
        _read(_REGISTRY, "listVersions", "Versions, newest first, 1,000 at most", door.list, Versions, kind, status),
        _read(_REGISTRY + "/active", "listActive", "What decides where", door.active, Placements),
        _read(_REGISTRY + "/history", "listActivations", "What decided where", door.history, Activations, kind, where),
        _read(_NAMED + "/diff", "diffVersions", "Two versions compared", door.diff, Difference, *_NAME, *numbers),
        _read(_ONE, "showVersion", "One version with its content", door.show, Version, *_KEY),
        _act(_REGISTRY, "registerVersion", "Register a draft", door.register, author, Draft, (201, Version)),
        *(_move(action, target, door) for action, target in _TARGETS.items()),
        _act(
            _REGISTRY + "/activate",
            "activateVersions",
            "Let approved versions decide, together",
            door.activate,
            activate,
            ActivateCommand,
            (200, Versions),
        ),
        _act(
            _REGISTRY + "/rollback",
            "rollBack",
            "Let the version before decide again",
            door.rollback,
            activate,
            RollbackCommand,
            (200, RolledBack),
        ),
        _read(_HALTS, "listHalts", "Halts that hold here", door.halts, Halts),
        _halt(
            "PUT", "setHalt", "Stop automatic decisions of a model, or of all (*)", door.set_halt, {200: halted}, halt
        ),
        _halt("DELETE", "clearHalt", "Let them go on", door.clear_halt, {204: Answer("Within 2 s")}, halt),
    ]


_TARGETS: Final = {
    "submit": VersionStatus.SUBMITTED,
    "approve": VersionStatus.APPROVED,
    "reject": VersionStatus.REJECTED,
    "retire": VersionStatus.RETIRED,
    "revoke": VersionStatus.REVOKED,
}
_SUMMARIES: Final = {
    "submit": "Ask for approval: the content is checked",
    "approve": "Approve another person's version, and sign it",
    "reject": "Refuse a version, for ever",
    "retire": "Put an approved version away",
    "revoke": "Take an approval back, for ever",
}

Move = Callable[[Principal, TenantScope | None, VersionKey, str, str], Awaitable[Version]]


class _Door:
    """The endpoints."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk

    async def list(self, request: Request) -> Response:
        _, scope = await self._desk.caller(request, Permission.REGISTRY_READ)
        status = _query_word(request, "status", words(VersionStatus))
        kind = cast("Kind | None", _query_word(request, "kind", KINDS))
        versions = await self._desk.gate.list(scope, kind, None if status is None else VersionStatus(status))
        return _answer(200, Versions(versions=tuple(versions)))

    async def show(self, request: Request) -> Response:
        _, scope = await self._desk.caller(request, Permission.REGISTRY_READ)
        return _answer(200, await self._desk.gate.show(scope, _key(request)))

    async def diff(self, request: Request) -> Response:
        _, scope = await self._desk.caller(request, Permission.REGISTRY_READ)
        kind, name = _path_name(request)
        before, after = (VersionKey(kind, name, _query_version(request, which)) for which in ("from", "to"))
        return _answer(200, Difference(lines=tuple(await self._desk.gate.diff(scope, before, after))))

    async def active(self, request: Request) -> Response:
        _, scope = await self._desk.caller(request, Permission.REGISTRY_READ)
        return _answer(200, Placements(active=tuple(await self._desk.gate.active(scope))))

    async def history(self, request: Request) -> Response:
        _, scope = await self._desk.caller(request, Permission.REGISTRY_READ)
        kind = cast("Kind | None", _query_word(request, "kind", KINDS))
        found = await self._desk.gate.history(scope, kind, one(request, "scope_key"))
        return _answer(200, Activations(history=tuple(found)))

    async def register(self, request: Request) -> Response:
        caller, scope = await self._desk.caller(request, Permission.REGISTRY_AUTHOR)
        draft = await _command(request, Draft)
        version = await self._desk.gate.register(caller, scope, draft)
        return self._done(201, version, version)

    def move(self, action: str) -> Endpoint:
        """The endpoint of one move of a version."""
        permission = permission_for(_TARGETS[action])

        async def endpoint(request: Request) -> Response:
            caller, scope = await self._desk.caller(request, permission)
            key, body = _key(request), await _command(request, VersionCommand)
            # By name and when it is called: the document of the calls is made without a gate.
            move: Move = getattr(self._desk.gate, action)
            version = await move(caller, scope, key, body.digest, body.reason)
            return self._done(200, version, version)

        return endpoint

    async def activate(self, request: Request) -> Response:
        caller, scope = await self._desk.caller(request, Permission.REGISTRY_ACTIVATE)
        body = await _command(request, ActivateCommand)
        versions = await self._desk.gate.activate(caller, scope, body.activations, body.reason)
        return self._done(200, Versions(versions=tuple(versions)), *versions)

    async def rollback(self, request: Request) -> Response:
        caller, scope = await self._desk.caller(request, Permission.REGISTRY_ACTIVATE)
        body = await _command(request, RollbackCommand)
        version = await self._desk.gate.rollback(caller, scope, body.kind, body.scope_key, body.reason)
        return self._done(200, RolledBack(version=version), *(() if version is None else (version,)))

    async def halts(self, request: Request) -> Response:
        _, scope = await self._desk.caller(request, Permission.REGISTRY_READ)
        return _answer(200, Halts(halts=tuple(await self._desk.gate.halts(scope))))

    async def set_halt(self, request: Request) -> Response:
        caller, scope = await self._desk.caller(request, Permission.HALT)
        model, body = _path_model(request), await _command(request, HaltCommand)
        return self._done(200, await self._desk.gate.set_halt(caller, scope, model, body.reason))

    async def clear_halt(self, request: Request) -> Response:
        caller, scope = await self._desk.caller(request, Permission.HALT)
        model, body = _path_model(request), await _command(request, HaltCommand)
        await self._desk.gate.clear_halt(caller, scope, model, body.reason)
        return self._done(204, None)

    def _done(self, status: int, document: BaseModel | None, *moved: Version) -> Response:
        """A command committed: its record waits in the outbox, and where it brought each version is counted."""
        self._desk.committed()
        self._desk.telemetry.record(
            *(Measurement(TRANSITIONS, labels={"kind": each.kind, "to": str(each.status)}) for each in moved)
        )
        return _answer(status, document)


_NAMES: Final[TypeAdapter[str]] = TypeAdapter(Name)


def _path_name(request: Request) -> tuple[Kind, str]:
    """Kind and name of the path; what cannot be one is not known."""
    kind, name = request.path_params["kind"], request.path_params["name"]
    if kind not in get_args(Kind) or not _is_name(name):
        raise NotKnownError("there is no such version here")
    return cast("Kind", kind), name


def _is_name(name: str) -> bool:
    try:
        return bool(_NAMES.validate_python(name))
    except ValidationError:
        return False


def _key(request: Request) -> VersionKey:
    kind, name = _path_name(request)
    version = str(request.path_params["version"])
    # Not the router's own conversion: it fails for more digits than Python reads, before anybody is asked who calls.
    if not (version.isascii() and version.isdecimal() and len(version) <= 10 and 1 <= int(version) < 2**31):
        raise NotKnownError("there is no such version here")
    return VersionKey(kind, name, int(version))


def _path_model(request: Request) -> str:
    model = str(request.path_params["model"])
    if model != ANY_MODEL and not _is_name(model):
        raise NotKnownError("there is no such model; name one, or * for all")
    return model


def _query_word(request: Request, name: str, choices: Sequence[str]) -> str | None:
    value = one(request, name)
    if value is not None and value not in choices:
        raise InvalidRequestError(f"?{name}= is one of {', '.join(choices)}")
    return value


def _query_version(request: Request, name: str) -> int:
    value = one(request, name)
    if value is None or not (value.isascii() and value.isdecimal() and len(value) < 10 and int(value) >= 1):
        raise InvalidRequestError(f"?{name}= is the number of a version")
    return int(value)


async def _command(request: Request, model: type[M]) -> M:
    """The body of a command. Raises InvalidRequestError with a pointer per field."""
    try:
        return model.model_validate(await read_json(request, _MAX_BODY))
    except ValidationError as error:
        raise InvalidRequestError("the command has invalid fields", pointers=pointers_of(error)) from None


def _number(name: str) -> Parameter:
    schema = {"type": "integer", "minimum": 1}
    return Parameter(name, "query", "The number of a version.", schema, required=True)


_NAME: Final = (
    Parameter("kind", "path", "What it is.", {"type": "string", "enum": list(KINDS)}),
    Parameter("name", "path", "Its name."),
)
_KEY: Final = (*_NAME, Parameter("version", "path", "Its number.", {"type": "integer", "minimum": 1}))
_MODEL: Final = Parameter("model", "path", "The name of a model, or * for all.")


def _read(path: str, operation: str, summary: str, endpoint: Endpoint, answer: Schema, *parameters: Parameter) -> Call:
    return Call(
        "GET",
        path,
        operation,
        summary,
        endpoint,
        Permission.REGISTRY_READ,
        {200: Answer("What is there now", answer)},
        (TENANT, *parameters),
        problems=(404, 422, 503),
        tag=_TAG,
    )


def _act(
    path: str,
    operation: str,
    summary: str,
    endpoint: Endpoint,
    permission: Permission,
    body: Schema,
    answer: tuple[int, Schema],
    *parameters: Parameter,
) -> Call:
    status, content = answer
    return Call(
        "POST",
        path,
        operation,
        summary,
        endpoint,
        permission,
        {status: Answer("Done and recorded", content)},
        (TENANT, *parameters),
        {JSON: body},
        _PROBLEMS,
        _TAG,
    )


def _move(action: str, target: VersionStatus, door: _Door) -> Call:
    return _act(
        f"{_ONE}/{action}",
        f"{action}Version",
        _SUMMARIES[action],
        door.move(action),
        permission_for(target),
        VersionCommand,
        (200, Version),
        *_KEY,
    )


def _halt(
    method: Any, operation: str, summary: str, endpoint: Endpoint, answers: dict[int, Answer], permission: Permission
) -> Call:
    parameters, body = (TENANT, _MODEL), {JSON: HaltCommand}
    return Call(method, _HALT, operation, summary, endpoint, permission, answers, parameters, body, _PROBLEMS, _TAG)


def _answer(status: int, document: BaseModel | None) -> Response:
    if document is None:
        return Response(status_code=status)
    return json_answer(status, document.model_dump(mode="json"))
