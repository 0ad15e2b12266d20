"""The client half of the operator API: what the command line's governing commands speak.

Promises: a command acts with its caller's own credential; a problem document becomes one sentence that says what to
do. Holds no rule of its own: what is permitted is the server's to say.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import httpx
import orjson

from contracts.failures import RiskfleetError
from deploy.settings import client as client_settings

DEFAULT_URL = "http://127.0.0.1:8081"


class OperatorError(RiskfleetError):
    """The operator API refused a command."""


@dataclass(frozen=True, slots=True)
class Session:
    """What `riskfleet login` keeps: where, who, and the token; the file is readable by its owner only."""

    url: str
    user: str
    token: str
    expires_at: str
    tenant: str | None = None


def session_file(data_dir: Path) -> Path:
    """Where the session lies."""
    return data_dir / "keys" / "session.json"


def save_session(data_dir: Path, session: Session) -> Path:
    """Keep a session; replaces the one before."""
    path = session_file(data_dir)
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w") as file:
        json.dump({name: getattr(session, name) for name in Session.__slots__}, file)
    return path


def load_session(data_dir: Path) -> Session | None:
    """The kept session, None when nobody logged in here."""
    path = session_file(data_dir)
    try:
        return Session(**json.loads(path.read_text()))
    except (FileNotFoundError, TypeError, ValueError):
        return None


class OperatorClient:
    """Calls of the operator API. Raises OperatorError for a refusal, httpx.TransportError when it is not reachable."""

    def __init__(self, url: str, token: str | None, transport: httpx.BaseTransport | None = None) -> None:
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        self._client = httpx.Client(base_url=url, headers=headers, timeout=30, transport=transport)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()

    def get(self, path: str, **query: Any) -> Any:
        """The answer's JSON; parameters that are None are left out."""
        return self._call("GET", path, params={name: value for name, value in query.items() if value is not None})

    def post(self, path: str, body: Any = None) -> Any:
        """The answer's JSON."""
        return self._call("POST", path, content=None if body is None else orjson.dumps(body))

    def put(self, path: str, body: Any = None) -> Any:
        """The answer's JSON."""
        return self._call("PUT", path, content=None if body is None else orjson.dumps(body))

    def delete(self, path: str, body: Any = None) -> Any:
        """The answer's JSON."""
        return self._call("DELETE", path, content=None if body is None else orjson.dumps(body))

    def _call(self, method: str, path: str, **given: Any) -> Any:
        headers = {"Content-Type": "application/json"} if given.get("content") is not None else {}
        response = self._client.request(method, path, headers=headers, **given)
        try:
            document = response.json() if response.content else None
        except ValueError:
            document = None
        if response.is_success:
            return document
        raise OperatorError(_sentence(response.status_code, document))


def client_from_environment(data_dir: Path) -> OperatorClient:
    """A client with the caller's own credential: RISKFLEET_TOKEN, RISKFLEET_API_KEY, or the session of a login."""
    session, given = load_session(data_dir), client_settings()
    token = given.token or given.api_key or (session.token if session else None)
    if token is None:
        raise OperatorError("nobody is logged in here; run 'riskfleet login', or set RISKFLEET_TOKEN")
    return OperatorClient(control_url(session), token)


def control_url(session: Session | None = None) -> str:
    """RISKFLEET_CONTROL_URL, else where the session logged in, else the local default."""
    return client_settings().control_url or (session.url if session else DEFAULT_URL)


def _sentence(status: int, document: Any) -> str:
    problem = document if isinstance(document, dict) else {}
    parts = [str(problem.get("detail") or problem.get("title") or f"the operator API answered {status}")]
    parts += [f"{error.get('pointer', '')} {error.get('reason', '')}".strip() for error in problem.get("errors", ())]
    if status == 401:
        parts.append("run 'riskfleet login'")
    return "; ".join(parts)
