"""What both HTTP doors share: correlation, bodies, credentials, problem documents, and the application around calls.

Promises: every error is an RFC 9457 problem document, nothing that a client sends is answered with 500, every answer
carries the correlation id, and no body is read beyond its limit. Knows no call of either door.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Final

import orjson
import structlog
from starlette.applications import Starlette
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import BaseRoute
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from contracts.events import MAX_BODY_BYTES
from contracts.failures import (
    AuthenticationError,
    AuthorizationError,
    InvalidMetadataError,
    MalformedBodyError,
    OversizedBodyError,
    RiskfleetError,
    UnsupportedMediaTypeError,
    classify,
    fingerprint,
    problem_document,
)
from contracts.identity import Permission, Principal
from contracts.messages import JSON, PROBLEM_JSON, PROBLEM_URN
from contracts.ports import Credentials, Ids
from contracts.telemetry import bind_correlation, current_correlation
from contracts.tenancy import TenantScope
from gateway.intake import correlation_of
from gateway.parsing import is_json, parse_json

log = structlog.get_logger(__name__)

MAX_CREDENTIAL: Final = 8_192
CORRELATION: Final = "X-Correlation-ID"


Application = Starlette
"""What `application` makes: the type for rooms that only hand it on."""


def application(routes: Sequence[BaseRoute], ids: Ids) -> Starlette:
    """An ASGI application over some routes; nothing is connected or started by building it."""
    app = Starlette(
        routes=routes,
        middleware=[Middleware(CorrelationMiddleware, ids=ids)],
        exception_handlers={
            RiskfleetError: _on_error,
            HTTPException: _on_http_error,
            ClientDisconnect: _on_disconnect,
        },
    )
    app.router.redirect_slashes = False  # an unknown path is a 404 document, never a redirect that drops a body
    return app


class CorrelationMiddleware:
    """Binds the correlation of a request once, echoes it, and turns a defect into a problem document.

    An answer that names a correlation of its own keeps it. Pure ASGI: Starlette's BaseHTTPMiddleware runs the endpoint
    in another task, where nothing bound here is seen.
    """

    def __init__(self, app: ASGIApp, ids: Ids) -> None:
        self._app = app
        self._ids = ids

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request = Request(scope)
        correlation = correlation_of(
            request.headers.get("x-correlation-id"), request.headers.get("traceparent"), self._ids
        )
        begun = False

        async def echo(message: Message) -> None:
            nonlocal begun
            if message["type"] == "http.response.start":
                begun = True
                headers = MutableHeaders(scope=message)
                headers.setdefault(CORRELATION, correlation.correlation_id or "")
                if correlation.traceparent:
                    headers["traceparent"] = correlation.traceparent
            await send(message)

        with bind_correlation(correlation):
            try:
                await self._app(scope, receive, echo)
            except Exception as error:
                _log_defect(request, error)
                if begun:
                    raise
                await problem(request, error)(scope, receive, echo)


async def authenticate(request: Request, credentials: Credentials) -> Principal:
    """Who calls. Raises AuthenticationError without a usable bearer credential."""
    scheme, _, key = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not key.strip():
        raise AuthenticationError("send `Authorization: Bearer` and an API key or a token")
    if len(key) > MAX_CREDENTIAL:
        raise AuthenticationError(f"a credential has at most {MAX_CREDENTIAL} characters")
    principal = await credentials.principal(key.strip())
    if principal is None:
        raise AuthenticationError("the credential is unknown, expired or revoked")
    return principal


async def tenant_of(request: Request, credentials: Credentials, permission: Permission) -> TenantScope:
    """The tenant that the credential is bound to, where it may do this.

    Raises AuthenticationError, and AuthorizationError for a credential of no tenant or without the permission.
    """
    principal = await authenticate(request, credentials)
    if principal.scope is None:
        raise AuthorizationError("the token is bound to no tenant; log in with one")
    if not principal.may(permission, principal.scope):
        raise AuthorizationError(f"the credential does not permit {permission}")
    return principal.scope


def media_type(request: Request) -> str:
    """The media type of the body, in lower case without parameters.

    Raises UnsupportedMediaTypeError unless exactly one is sent, in UTF-8.
    """
    values = request.headers.getlist("content-type")
    name, _, parameters = (values[0] if len(values) == 1 else "").partition(";")
    if not name.strip():
        raise UnsupportedMediaTypeError
    charset = re.search(r'charset\s*=\s*"?([^";\s]+)', parameters, re.IGNORECASE)
    if charset and charset[1].lower() not in ("utf-8", "utf8"):
        raise UnsupportedMediaTypeError("bodies are UTF-8; send no other charset")
    return name.strip().lower()


def check_json(request: Request) -> None:
    """Raise UnsupportedMediaTypeError unless the body is sent as JSON."""
    if not is_json(media_type(request)):
        raise UnsupportedMediaTypeError


def one_header(request: Request, name: str) -> str | None:
    """A header's value. Raises InvalidMetadataError when it is sent more than once."""
    values = request.headers.getlist(name)
    if len(values) > 1:
        raise InvalidMetadataError(f"the header {name} is sent more than once")
    return values[0] if values else None


async def read_body(request: Request, limit: int = MAX_BODY_BYTES) -> bytes:
    """The body, at most `limit` bytes: a larger one is an OversizedBodyError without reading the rest."""
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared[:20]) > limit:
        raise OversizedBodyError(f"the body is larger than {limit:,} bytes")
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > limit:
            raise OversizedBodyError(f"the body is larger than {limit:,} bytes")
    return bytes(body)


async def read_json(request: Request, limit: int = MAX_BODY_BYTES) -> Any:
    """The body as strictly parsed JSON: media type, size, depth, duplicate keys and numbers checked."""
    check_json(request)
    return parse_json(await read_body(request, limit), limit)


def json_answer(status: int, document: Any, headers: Mapping[str, str] | None = None) -> Response:
    """An answer with a JSON body."""
    return Response(orjson.dumps(document), status, headers=dict(headers or {}), media_type=JSON)


def problem(request: Request, error: BaseException, **members: Any) -> Response:
    """The answer to an error: its problem document, with the headers that belong to its status."""
    document = problem_document(
        error, instance=request.scope["path"], correlation_id=current_correlation().correlation_id, **members
    )
    headers: dict[str, str] = {}
    if document["status"] == 401:
        headers["WWW-Authenticate"] = "Bearer"
    if document["status"] == 413:
        headers["Connection"] = "close"  # the rest of the body is not read, so the connection cannot be used again
    if document["status"] in (429, 503):
        headers["Retry-After"] = str(document.get("retry_after_s", 1))
    return Response(orjson.dumps(document), document["status"], headers=headers, media_type=PROBLEM_JSON)


def _on_error(request: Request, error: Exception) -> Response:
    if classify(error).status >= 500:
        log.warning(
            "request_failed", problem=classify(error).problem, path=request.scope["path"], method=request.method
        )
    return problem(request, error)


ROUTER_PROBLEMS: Final[Mapping[int, tuple[str, str]]] = {
    404: ("no-such-path", "there is no such path"),
    405: ("method-not-allowed", "this path does not answer this method; see the Allow header"),
}
"""What the router itself refuses: the problem and its detail by status."""


def _on_http_error(request: Request, error: Exception) -> Response:
    status = error.status_code if isinstance(error, HTTPException) else 404
    name, detail = ROUTER_PROBLEMS.get(status, ROUTER_PROBLEMS[404])
    document = {
        "type": PROBLEM_URN + name,
        "title": name.replace("-", " ").capitalize(),
        "status": status,
        "detail": detail,
        "instance": request.scope["path"],
        "correlation_id": current_correlation().correlation_id,
    }
    headers = getattr(error, "headers", None)
    return Response(orjson.dumps(document), status, headers=headers, media_type=PROBLEM_JSON)


def _on_disconnect(request: Request, _: Exception) -> Response:
    """The client went away while it sent its body: nobody reads this answer, and it is no defect."""
    return problem(request, MalformedBodyError("the connection was closed before the body ended"))


def _log_defect(request: Request, error: BaseException) -> None:
    log.error(
        "request_defect",
        exception_class=type(error).__name__,
        fingerprint=fingerprint(error),
        path=request.scope["path"],
        method=request.method,
    )
