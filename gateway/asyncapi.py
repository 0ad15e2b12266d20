"""The AMQP surface as an AsyncAPI 3.0 document, from the topology's names and the wire's own models.

Pure: the same code gives the same bytes. Describes what upstream meets; the queues between the stages are ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from contracts.events import Event, Kind
from contracts.labels import LabelBody
from contracts.messages import JSON, PROBLEM_JSON
from contracts.outcomes import Decision, Outcome
from contracts.topology import DECISIONS, INGEST, REJECTED
from gateway.calls import PROBLEM_SCHEMA

_MODELS: Final[tuple[type[BaseModel], ...]] = (Decision, Event, LabelBody)
_BINDING: Final = "0.3.0"
_ABOUT: Final = (
    "Events and labels in, decisions and refusals out. Every message is JSON, persistent and at least once: consumers "
    "drop a `message_id` that they have seen, and keep the highest revision of a decision. No order is promised."
)
_CLOUDEVENTS: Final = (
    "CloudEvents 1.0 is accepted too: structured (content type `application/cloudevents+json`, the event in `data`), "
    "as a batch of those (`application/cloudevents-batch+json`, acked when all of it has settled), or binary with the "
    "attributes as headers prefixed `cloudEvents:`, `cloudEvents_` or `ce-`."
)
_PUBLISHING: Final[Mapping[str, str]] = {
    "user_id": "Required: the tenant's own broker user. The broker checks it; the tenant is taken from it alone",
    "message_id": "The sender's id of this submission. Required unless the body has one; both have to agree",
    "correlation_id": "Taken when it has 1 to 128 printable ASCII characters, else made; comes back on every answer",
    "delivery_mode": "2: persistent",
}


def asyncapi(version: str) -> dict[str, Any]:
    """The document; `version` is the interface's, not the release's."""
    _, definitions = models_json_schema(
        [(model, "validation") for model in _MODELS], ref_template="#/components/schemas/{model}"
    )
    schemas = {"Problem": PROBLEM_SCHEMA, **definitions.get("$defs", {})}
    return {
        "asyncapi": "3.0.0",
        "info": {"title": "riskfleet over AMQP", "version": version, "description": _ABOUT},
        "defaultContentType": JSON,
        "servers": {
            "broker": {
                "host": "{host}:{port}",
                "protocol": "amqp",
                "protocolVersion": "0.9.1",
                "description": "RabbitMQ, with one broker user per tenant",
                "variables": {"host": {"default": "127.0.0.1"}, "port": {"default": "5672"}},
                "security": [{"$ref": "#/components/securitySchemes/brokerUser"}],
            }
        },
        "channels": {"ingest": _ingest(), "decisions": _decisions(), "rejected": _rejected()},
        "operations": {
            "receiveSubmissions": _operation("receive", "ingest", "What a tenant's broker user publishes"),
            "sendDecisions": _operation("send", "decisions", "Every revision of a decision, after it was stored"),
            "sendRefusals": _operation("send", "rejected", "The answer to a submission that becomes no event"),
        },
        "components": {
            "messages": _messages(),
            "schemas": dict(sorted(schemas.items())),
            "securitySchemes": {"brokerUser": {"type": "userPassword", "description": "The tenant's broker user"}},
        },
    }


def _channel(exchange: str, address: str, about: str, parameters: Mapping[str, Any], *messages: str) -> dict[str, Any]:
    return {
        "address": address,
        "description": about,
        "servers": [{"$ref": "#/servers/broker"}],
        "parameters": {"tenant": {"description": "The tenant's id"}, **parameters},
        "messages": {name: {"$ref": f"#/components/messages/{name}"} for name in messages},
        "bindings": {
            "amqp": {
                "is": "routingKey",
                "exchange": {"name": exchange, "type": "topic", "durable": True, "autoDelete": False, "vhost": "/"},
                "bindingVersion": _BINDING,
            }
        },
    }


def _ingest() -> dict[str, Any]:
    return _channel(
        INGEST,
        "{tenant}.{kind}",
        f"Exchange `{INGEST}`: publish with the routing key `<tenant>.<kind>`, a label with `<tenant>.label`. "
        f"{_CLOUDEVENTS}",
        {"kind": {"description": "What the body is", "enum": [*(str(kind) for kind in Kind), "label"]}},
        "event",
        "label",
    )


def _decisions() -> dict[str, Any]:
    return _channel(
        DECISIONS,
        "{tenant}.{kind}.{outcome}",
        f"Exchange `{DECISIONS}`: bind a queue named `up.<tenant>.…`. It drops its oldest messages above its limit; "
        "`GET /v1/decisions` catches up.",
        {
            "kind": {"description": "The event's kind", "enum": [str(kind) for kind in Kind]},
            "outcome": {"description": "The decision's outcome", "enum": [str(outcome) for outcome in Outcome]},
        },
        "decision",
    )


def _rejected() -> dict[str, Any]:
    return _channel(
        REJECTED,
        "{tenant}.{problem}",
        f"Exchange `{REJECTED}`: bind a queue named `up.<tenant>.…`.",
        {"problem": {"description": "The last part of the problem's type; docs/problems.md lists them"}},
        "refusal",
    )


def _operation(action: str, channel: str, summary: str) -> dict[str, Any]:
    return {"action": action, "channel": {"$ref": f"#/channels/{channel}"}, "summary": summary}


def _messages() -> dict[str, Any]:
    trace = {"traceparent": {"type": "string", "description": "W3C Trace Context of the submission"}}
    decision_headers = {
        "event_id": {"type": "string"},
        "revision": {"type": "integer", "minimum": 1},
        "outcome": {"type": "string", "enum": [str(outcome) for outcome in Outcome]},
    }
    return {
        "event": _message(Event, "An event to decide", JSON, trace, (), _PUBLISHING),
        "label": _message(LabelBody, "Late ground truth about an event", JSON, trace, (), _PUBLISHING),
        "decision": _message(
            Decision,
            "A decision",
            JSON,
            decision_headers | trace,
            tuple(decision_headers),
            {
                "message_id": "`<event_id>:<revision>`: the same for every copy",
                "correlation_id": "The submission's own, or the one that was made for it",
            },
        ),
        "refusal": _message(
            "Problem",
            "A refusal, as an RFC 9457 problem document",
            PROBLEM_JSON,
            {"problem": {"type": "string"}},
            ("problem",),
            {"message_id": "The same for every copy", "correlation_id": "The submission's own, or the made one"},
        ),
    }


def _message(
    payload: type[BaseModel] | str,
    summary: str,
    content_type: str,
    headers: Mapping[str, Any],
    required: tuple[str, ...],
    properties: Mapping[str, str],
) -> dict[str, Any]:
    """`properties` are AMQP's own (`x-amqp-properties`), which AsyncAPI has no place for."""
    name = payload if isinstance(payload, str) else payload.__name__
    schema: dict[str, Any] = {"type": "object", "properties": dict(headers)}
    if required:
        schema["required"] = list(required)
    return {
        "name": name,
        "summary": summary,
        "contentType": content_type,
        "headers": schema,
        "payload": {"$ref": f"#/components/schemas/{name}"},
        "x-amqp-properties": dict(properties),
    }
