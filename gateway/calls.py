"""HTTP calls as data: one table gives the routes, the OpenAPI document and the permissions that the tests go through.

A call says what it needs and what it answers; nothing is documented that is not routed, and nothing is routed that is
not documented. Pure: nothing here authenticates or answers.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any, Literal

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from contracts.identity import Permission
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
    """What a status means, and what its body looks like; `content` None: no body of ours to describe."""

    about: str
    content: Schema | None = None
    media_type: str = JSON


@dataclass(frozen=True, slots=True)
class Call:
    """One method of one path. `permission` None: open to everybody (health, documents, login).

    `problems` are the statuses that are answered with a problem document; 401 and 403 join by themselves when the
    call needs a permission. `body` maps media types to schemas; empty: the call takes no body.
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


def routes(calls: Sequence[Call]) -> list[Route]:
    """One route per call. HEAD is answered where GET is."""
    return [Route(call.path, call.endpoint, methods=[call.method], name=call.operation) for call in calls]


def openapi(title: str, version: str, about: str, calls: Sequence[Call]) -> dict[str, Any]:
    """The OpenAPI 3.1 document of some calls; the same calls give the same bytes.

    `x-permission` names what a call needs; `contracts.identity.PERMISSIONS` says which roles have it.
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
        "paths": paths,
        "components": {
            "schemas": dict(sorted(schemas.items())),
            "securitySchemes": {"bearer": {"type": "http", "scheme": "bearer", "description": "An API key or a JWT"}},
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
    problems = {*call.problems, *((401, 403) if call.permission else ())}
    answers = {str(status): _answer(answer) for status, answer in call.answers.items()} | {
        str(status): {
            "description": HTTPStatus(status).phrase,
            "content": {PROBLEM_JSON: {"schema": {"$ref": "#/components/schemas/Problem"}}},
        }
        for status in problems
    }
    document: dict[str, Any] = {
        "operationId": call.operation,
        "summary": call.summary,
        "responses": dict(sorted(answers.items())),
    }
    if call.tag:
        document["tags"] = [call.tag]
    if call.permission is not None:
        document |= {"security": [{"bearer": []}], "x-permission": str(call.permission)}
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


def _answer(answer: Answer) -> dict[str, Any]:
    if answer.content is None:
        return {"description": answer.about}
    return {"description": answer.about, "content": {answer.media_type: {"schema": _schema(answer.content)}}}


def _schema(schema: Schema) -> dict[str, Any]:
    if isinstance(schema, type):
        return {"$ref": f"#/components/schemas/{schema.__name__}"}
    return dict(schema)
