"""What a gateway tells about itself: its OpenAPI and AsyncAPI documents, a page that shows them, and every problem.

Promises: the page and its parts come from this process alone, under a policy that lets nothing else in: no foreign
host, no inline script, nothing that sends anything but a GET for the document. Knows no call of its own but these.
"""

from __future__ import annotations

import html
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import orjson
from starlette.requests import Request
from starlette.responses import Response

from contracts.failures import FAILURES, Category, Disposition
from contracts.messages import JSON, PROBLEM_URN
from gateway.asyncapi import asyncapi
from gateway.calls import Answer, Call, Endpoint
from gateway.web import ROUTER_PROBLEMS

API_VERSION: Final = "1.0.0"
"""The version of the interface, which outlives releases: it changes when a client has to."""

_PAGES: Final = Path(__file__).parent / "pages"
_HTML: Final = "text/html; charset=utf-8"
_HEADERS: Final = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


@dataclass(frozen=True, slots=True)
class Problem:
    """One row of the catalogue: what a problem type means, and what its receiver does about it."""

    name: str
    status: int
    category: Category
    disposition: Disposition
    meaning: str
    remedy: str

    @property
    def type(self) -> str:
        """The stable URI in the member `type`."""
        return PROBLEM_URN + self.name


REMEDIES: Final[Mapping[str, str]] = {
    "invalid-event": "Correct the fields that `errors` points at and send it again.",
    "malformed-json": "Send one UTF-8 JSON document: no duplicate names, NaN, NUL, lone surrogates or huge integers.",
    "body-too-large": "Send less: at most 64 KiB for one event, 5 MiB for a batch.",
    "unsupported-media-type": "Name a content type that the call documents, in UTF-8.",
    "unknown-schema-version": "Send a `schema_version` that `detail` names, or leave it out.",
    "invalid-metadata": "Correct the header or query parameter that `detail` names.",
    "invalid-request": "Correct the fields that `errors` points at and send it again.",
    "invalid-tenant": "Ask the operator: the tenant's id or state cannot be used.",
    "idempotency-conflict": "One name was used for two bodies. Give the second one a name of its own.",
    "conflict": "Look at the thing again, then decide whether your command still makes sense.",
    "invalid-transition": "Report it to the operator with the correlation id.",
    "invalid-workflow-state": "Report it to the operator with the correlation id.",
    "risk-threshold": "Wait for a person's decision.",
    "policy-violation": "Wait for a person's decision.",
    "model-not-approved": "Ask the operator to approve and activate a version.",
    "invalid-model-state": "Report it to the operator with the correlation id.",
    "unauthenticated": "Send `Authorization: Bearer` with a key or token that is valid now.",
    "forbidden": "Use a credential whose role has the permission that the call's `x-permission` names.",
    "foreign-tenant": "Name your own tenant, or none: the credential decides.",
    "encryption": "Report it to the operator; repeat later with the same identity.",
    "not-known": "Check the id. Right after a submission: repeat in a second.",
    "too-many-undecided": "Too many of the tenant's events are under way. Wait for the seconds in `Retry-After`, then "
    "repeat with the same identity.",
    "limit-exceeded": "Wait for the seconds in `Retry-After`, then repeat with the same identity.",
    "dependency-unavailable": "Repeat later with the same identity.",
    "not-known-to-be-accepted": "Repeat with the same identity until it is answered; that is always safe.",
    "unexpected": "Report it to the operator with the correlation id; repeating with the same identity is safe.",
    "no-such-path": "Check the path against the document.",
    "method-not-allowed": "Use a method that the `Allow` header names.",
}
"""What the sender does, by problem; the operator's side stands in docs/operations.md."""


def problems() -> tuple[Problem, ...]:
    """Every problem type that an answer can have, by name. Raises KeyError for one without a remedy."""
    found: dict[str, Problem] = {}
    for error, row in FAILURES.items():
        meaning = (error.__doc__ or "").split("\n")[0]
        problem = Problem(row.problem, row.status, row.category, row.disposition, meaning, REMEDIES[row.problem])
        found.setdefault(row.problem, problem)
    for status, (name, meaning) in ROUTER_PROBLEMS.items():
        sentence = f"{meaning[0].upper()}{meaning[1:]}."
        found[name] = Problem(name, status, Category.VALIDATION_ERROR, Disposition.REFUSE, sentence, REMEDIES[name])
    return tuple(found[name] for name in sorted(found))


def problems_markdown() -> bytes:
    """The catalogue as a page of the documentation."""
    lines = [
        "# Problems",
        "",
        "Every refusal is an RFC 9457 problem document whose `type` is one of these; the same documents are sent to",
        "`risk.rejected`. *Then* is what becomes of an entry that fails with it inside the fleet. Written by",
        "`python -m deploy.documents`.",
        "",
        "| type | status | category | then | meaning | what to do |",
        "|---|---|---|---|---|---|",
        *(
            f"| `{row.type}` | {row.status} | {row.category} | {row.disposition} | {row.meaning} | {row.remedy} |"
            for row in problems()
        ),
        "",
    ]
    return "\n".join(lines).encode()


def problems_page() -> bytes:
    """The catalogue as a page that the gateway serves; each problem has an anchor of its own."""
    rows = "\n".join(
        f'<tr id="{row.name}"><td><code>{row.type}</code></td><td>{row.status}</td><td>{row.category}</td>'
        f"<td>{row.disposition}</td><td>{_prose(row.meaning)}</td><td>{_prose(row.remedy)}</td></tr>"
        for row in problems()
    )
    heads = "".join(f"<th>{head}</th>" for head in ("type", "status", "category", "then", "meaning", "what to do"))
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>riskfleet problems</title>\n'
        '<link rel="stylesheet" href="/docs/page.css">\n</head>\n<body>\n<h1>Problems</h1>\n'
        '<p>The <code>type</code> of every RFC 9457 document. <a href="/docs">API</a></p>\n'
        f'<div class="scroll"><table>\n<tr>{heads}</tr>\n{rows}\n</table></div>\n</body>\n</html>\n'
    ).encode()


def document_bytes(document: Mapping[str, object]) -> bytes:
    """A document as it is served and committed: sorted, indented, one newline at the end."""
    return orjson.dumps(document, option=orjson.OPT_SORT_KEYS | orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE)


def document_calls(openapi: Callable[[], bytes]) -> tuple[Call, ...]:
    """The calls that serve documents; `openapi` gives the document of the whole table, these calls included."""
    return (
        _call("/openapi.json", "getOpenapi", "This document, OpenAPI 3.1", JSON, openapi),
        _call(
            "/asyncapi.json",
            "getAsyncapi",
            "The AMQP surface, AsyncAPI 3.0",
            JSON,
            lambda: document_bytes(asyncapi(API_VERSION)),
        ),
        _call("/docs", "getDocs", "This document as a page", _HTML, lambda: _page("docs.html")),
        _call(
            "/docs/page.css", "getDocsStyle", "The page's style", "text/css; charset=utf-8", lambda: _page("page.css")
        ),
        _call(
            "/docs/page.js",
            "getDocsScript",
            "The page's script",
            "text/javascript; charset=utf-8",
            lambda: _page("page.js"),
        ),
        _call("/docs/problems", "getProblems", "Every problem type, as a page", _HTML, problems_page),
    )


def _call(path: str, operation: str, summary: str, media_type: str, read: Callable[[], bytes]) -> Call:
    name = media_type.partition(";")[0]
    schema = {"type": "object"} if name == JSON else {"type": "string"}
    return Call(
        "GET",
        path,
        operation,
        summary,
        _served(read, media_type),
        None,
        {200: Answer(summary, schema, name)},
        tag="documents",
    )


def _served(read: Callable[[], bytes], media_type: str) -> Endpoint:
    held: list[bytes] = []  # read once, at the first request: nothing is read by building the application

    async def endpoint(_: Request) -> Response:
        if not held:
            held.append(read())
        return Response(held[0], 200, headers=_HEADERS, media_type=media_type)

    return endpoint


def _page(name: str) -> bytes:
    return (_PAGES / name).read_bytes()


def _prose(text: str) -> str:
    """Text as HTML, its `code` marked."""
    parts = html.escape(text).split("`")
    return "".join(f"<code>{part}</code>" if index % 2 else part for index, part in enumerate(parts))
