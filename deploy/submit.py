"""The client half of `riskfleet events`: reads files of events and speaks to the gateway.

Promises that one bad event never keeps back its neighbours. Reads the whole file into memory.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import orjson

from contracts.failures import DomainValidationError, NotKnownError, RiskfleetError, classify
from gateway.batch import csv_documents, json_elements, ndjson_lines


@dataclass(frozen=True, slots=True)
class Answer:
    """The gateway's answer to one event of a file."""

    index: int
    status: int
    event_id: str | None
    detail: str

    @property
    def accepted(self) -> bool:
        """Whether the event was taken."""
        return self.status in (200, 202)


def read_events(file: Path, columns: Sequence[str] = ()) -> list[bytes | RiskfleetError]:
    """The events of a file: a JSON object or array, NDJSON (one per line), or CSV with a column map (FIELD=COLUMN).

    Each as the bytes to send, or the error that stands in its place; the gateway judges the bytes. Raises
    DomainValidationError when the file is none of these.
    """
    content = file.read_bytes()
    if file.suffix == ".csv":
        return list(csv_documents(content, columns))
    if content.lstrip().startswith(b"["):
        return list(json_elements(content))
    if _is_object(content):
        return [content]
    lines = list(ndjson_lines(content))
    if not any(_is_object(line) for line in lines):
        raise DomainValidationError(f"{file} is neither JSON nor NDJSON")
    return [*lines]


def _is_object(content: bytes) -> bool:
    try:
        return isinstance(orjson.loads(content), dict)
    except orjson.JSONDecodeError:
        return False


def submit_file(file: Path, url: str, api_key: str, columns: Sequence[str] = ()) -> list[Answer]:
    """Send each event of a file; answers in the file's order."""
    headers = {"Authorization": f"Bearer {api_key}", "Content-Type": "application/json"}
    with httpx.Client(base_url=url, headers=headers, timeout=30) as client:
        return [
            Answer(index, classify(event).status, None, event.detail)
            if isinstance(event, RiskfleetError)
            else _answer(index, client.post("/v1/events", content=event))
            for index, event in enumerate(read_events(file, columns))
        ]


def _answer(index: int, response: httpx.Response) -> Answer:
    try:
        body = response.json()
    except ValueError:
        body = {}
    detail = "; ".join(
        [str(body.get("detail", "")), *(f"{e['pointer']} {e['reason']}" for e in body.get("errors", ()))]
    )
    return Answer(index, response.status_code, body.get("event_id"), detail)


def show(event: str, url: str, api_key: str) -> Any:
    """What the gateway knows of an event id or a sender's own id. Raises NotKnownError."""
    headers = {"Authorization": f"Bearer {api_key}"}
    with httpx.Client(base_url=url, headers=headers, timeout=30) as client:
        by_id = re.fullmatch(r"[0-9a-f]{32}", event)
        response = client.get(f"/v1/events/{event}") if by_id else client.get("/v1/events", params={"id": event})
    if response.status_code == 404:
        raise NotKnownError
    if response.status_code != 200:
        raise DomainValidationError(f"the gateway answered {response.status_code}: {response.text[:300]}")
    return response.json()
