"""HTTP calls as data: one table gives the routes, the OpenAPI document and the permissions that the tests go through.

A call says what it needs and what it answers; nothing is documented that is not routed, and nothing is routed that is
not documented. Pure: nothing here authenticates or answers.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from contracts.identity import EVERYWHERE_ONLY, Permission
from contracts.messages import JSON, PROBLEM_JSON

Schema = type[BaseModel] | Mapping[str, Any]
"""A pydantic model (a component of the document), or an inline JSON Schema."""

Endpoint = Callable[[Request], Awaitable[Response]]


@dataclass(frozen=True, slots=True)
class Parameter:
    """One parameter of a call; path parameters are always required."""

    name: str
    where: Literal["path", "query", "header"]
    about: str
    schema: Mapping[str, Any] = field(default_factory=lambda: {"type": "string"})
    required: bool = False


@dataclass(frozen=True, slots=True)
class Answer:
    """What a status means, and what its body looks like; `content` None: no body of ours to describe.

    `headers` are those that belong to this answer beside the ones that every answer has (`ECHOED`).
    """

    about: str
    content: Schema | None = None
    media_type: str = JSON
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Call:
    """One method of one path. `permission` None: open to everybody (health, documents, login), or with `known` to
    everybody who has a credential.

    `problems` are the statuses that are answered with a problem document; 401, 403 and 503 (the credential cannot be
    looked up) join by themselves when the call needs a permission. `body` maps media types to schemas; empty: the call
    takes no body. `about` is the paragraph below the summary.
    """

    method: Literal["GET", "POST", "PUT", "DELETE"]
    path: str
    operation: str
    summary: str
    endpoint: Endpoint
    permission: Permission | None
    answers: Mapping[int, Answer]
    parameters: tuple[Parameter, ...] = ()
    body: Mapping[str, Schema] = field(default_factory=dict)
    problems: tuple[int, ...] = ()
    tag: str = ""
    about: str = ""
    known: bool = False


ECHOED: Mapping[str, str] = {
    "X-Correlation-ID": "The request's own, or the one that was made for it",
    "traceparent": "W3C Trace Context: the request's own, or the one that was made for it",
}
"""Headers of every answer."""


def routes(calls: Sequence[Call]) -> list[Route]:
    """One route per path, so that 405 names every method of it. HEAD is answered where GET is.

    Raises ValueError for two calls with the same method and path, or with the same operation.
    """
    paths: dict[str, dict[str, Call]] = {}
    for call in calls:
        if paths.setdefault(call.path, {}).setdefault(call.method, call) is not call:
            raise ValueError(f"{call.method} {call.path} stands in the table twice")
    if len({call.operation for call in calls}) != len(calls):
        raise ValueError("two calls have one operation")
    return [
        Route(path, _dispatch(by_method), methods=sorted(by_method), name=next(iter(by_method.values())).operation)
        for path, by_method in paths.items()
    ]


def _dispatch(by_method: Mapping[str, Call]) -> Endpoint:
    """The endpoint of a path. The router has refused every other method already."""

    async def endpoint(request: Request) -> Response:
        return await by_method["GET" if request.method == "HEAD" else request.method].endpoint(request)

    return endpoint


def openapi(title: str, version: str, about: str, calls: Sequence[Call]) -> dict[str, Any]:
    """The OpenAPI 3.1 document of some calls; the same calls give the same bytes.

    `x-permission` names what a call needs, `x-everywhere` that only a grant for the whole installation gives it;
    `contracts.identity.PERMISSIONS` says which roles have it.
    """
    models = sorted({model for call in calls for model in _models(call)}, key=lambda model: model.__name__)
    _, definitions = models_json_schema(
        [(model, "validation") for model in models], ref_template="#/components/schemas/{model}"
    )
    paths: dict[str, dict[str, Any]] = {}
    for call in calls:
        paths.setdefault(re.sub(r"{(\w+):\w+}", r"{\1}", call.path), {})[call.method.lower()] = _operation(call)
    schemas = {"Problem": PROBLEM_SCHEMA, **definitions.get("$defs", {})}
    return {
        "openapi": "3.1.0",
        "info": {"title": title, "version": version, "description": about},
        "tags": [{"name": tag} for tag in dict.fromkeys(call.tag for call in calls) if tag],
        "paths": paths,
        "components": {
            "schemas": dict(sorted(schemas.items())),
            "securitySchemes": {"bearer": {"type": "http", "scheme": "bearer", "description": "An API key or a JWT"}},
            "responses": {
                f"Problem{status}": _problem(status)
                for status in sorted({s for call in calls for s in _problems(call)})
            },
            "headers": {
                name: {"description": about, "schema": {"type": "string"}} for name, about in sorted(ECHOED.items())
            },
        },
    }


PROBLEM_SCHEMA: dict[str, Any] = {
    "title": "Problem",
    "description": "RFC 9457 problem details; `type` is stable.",
    "type": "object",
    "required": ["type", "title", "status"],
    "properties": {
        "type": {"type": "string", "format": "uri"},
        "title": {"type": "string"},
        "status": {"type": "integer"},
        "category": {"type": "string"},
        "detail": {"type": "string"},
        "instance": {"type": "string"},
        "correlation_id": {"type": "string"},
        "event_id": {"type": "string"},
        "id": {"type": "string"},
        "retry_after_s": {"type": "integer", "description": "With status 429; as in `Retry-After`"},
        "errors": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["pointer", "reason"],
                "properties": {"pointer": {"type": "string"}, "reason": {"type": "string"}},
            },
        },
    },
}


def _models(call: Call) -> list[type[BaseModel]]:
    found = [*call.body.values(), *(answer.content for answer in call.answers.values())]
    return [schema for schema in found if isinstance(schema, type)]


def _operation(call: Call) -> dict[str, Any]:
    answers = {str(status): _answer(answer) for status, answer in call.answers.items()} | {
        str(status): {"$ref": f"#/components/responses/Problem{status}"} for status in _problems(call)
    }
    document: dict[str, Any] = {
        "operationId": call.operation,
        "summary": call.summary,
        "responses": dict(sorted(answers.items())),
    }
    if call.about:
        document["description"] = call.about
    if call.tag:
        document["tags"] = [call.tag]
    if call.permission is not None or call.known:
        document["security"] = [{"bearer": []}]
    if call.permission is not None:
        document["x-permission"] = str(call.permission)
        if call.permission in EVERYWHERE_ONLY:
            document["x-everywhere"] = True
    if call.parameters:
        document["parameters"] = [
            {
                "name": parameter.name,
                "in": parameter.where,
                "description": parameter.about,
                "required": parameter.required or parameter.where == "path",
                "schema": dict(parameter.schema),
            }
            for parameter in call.parameters
        ]
    if call.body:
        content = {media: {"schema": _schema(schema)} for media, schema in call.body.items()}
        document["requestBody"] = {"required": True, "content": content}
    return document


_PROBLEM_HEADERS: Mapping[int, Mapping[str, str]] = {
    401: {"WWW-Authenticate": "How to authenticate"},
    429: {"Retry-After": "Seconds to wait before the same request is worth another try"},
    503: {"Retry-After": "Seconds to wait before the same request is worth another try"},
}


def _problems(call: Call) -> set[int]:
    needed = (401, 403, 503) if call.permission else (401, 503) if call.known else ()
    return {*call.problems, *needed}


_PROBLEM_ABOUT: Mapping[int, str] = {
    400: "The body cannot be read as what it is sent as",
    401: "No credential, or one that is not valid now",
    403: "The credential does not permit this",
    404: "Not known (yet), or another tenant's",
    409: "Not in a state in which this can be done",
    413: "The body is too large",
    415: "A content type that this call does not read",
    422: "Read, but it cannot be used; `errors` points at fields where there are any",
    429: "A limit is reached; repeat after `Retry-After`",
    503: "Not known to be done: repeat it the same way",
}
"""Our own words: the standard library's phrases change between its versions, and the document must not."""


def _problem(status: int) -> dict[str, Any]:
    return {
        "description": _PROBLEM_ABOUT.get(status, "A problem"),
        "headers": _headers(_PROBLEM_HEADERS.get(status, {})),
        "content": {PROBLEM_JSON: {"schema": {"$ref": "#/components/schemas/Problem"}}},
    }


def _answer(answer: Answer) -> dict[str, Any]:
    document: dict[str, Any] = {"description": answer.about, "headers": _headers(answer.headers)}
    if answer.content is not None:
        document["content"] = {answer.media_type: {"schema": _schema(answer.content)}}
    return document


def _headers(own: Mapping[str, str]) -> dict[str, Any]:
    echoed = {name: {"$ref": f"#/components/headers/{name}"} for name in ECHOED}
    return echoed | {name: {"description": about, "schema": {"type": "string"}} for name, about in own.items()}


def _schema(schema: Schema) -> dict[str, Any]:
    if isinstance(schema, type):
        return {"$ref": f"#/components/schemas/{schema.__name__}"}
    return dict(schema)
