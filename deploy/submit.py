"""The client half of `riskfleet events`: reads files of events and speaks to the gateway.

Promises that one bad event never keeps back its neighbours. Reads the whole file into memory.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import orjson

from contracts.failures import DomainValidationError, NotKnownError

CLIENT_VARIABLES = ("RISKFLEET_API_KEY", "RISKFLEET_URL")
"""Variables of the client commands; no server reads them."""


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


def read_events(file: Path, columns: Sequence[str] = ()) -> list[Any]:
    """The documents of a file: a JSON object or array, NDJSON (one per line), or CSV with a column map.

    Raises DomainValidationError when the file is none of these.
    """
    if file.suffix == ".csv":
        return _read_csv(file, columns)
    data = file.read_bytes()
    try:
        document = orjson.loads(data)
    except orjson.JSONDecodeError:
        try:
            return [orjson.loads(line) for line in data.splitlines() if line.strip()]
        except orjson.JSONDecodeError as error:
            raise DomainValidationError(f"{file} is neither JSON nor NDJSON: {error}") from None
    return document if isinstance(document, list) else [document]


def _read_csv(file: Path, columns: Sequence[str]) -> list[Any]:
    pairs = [pair.partition("=") for pair in columns]
    if not pairs or any(not separator for _, separator, _ in pairs):
        raise DomainValidationError("a CSV file needs --map FIELD=COLUMN, for example --map subject.id=customer")
    with file.open(newline="") as handle:
        reader = csv.DictReader(handle)
        missing = [column for _, _, column in pairs if column not in (reader.fieldnames or ())]
        if missing:
            raise DomainValidationError(f"{file} has no column {', '.join(missing)}")
        return [_document({field: row[column] for field, _, column in pairs if row[column]}) for row in reader]


def _document(fields: dict[str, str]) -> dict[str, Any]:
    document: dict[str, Any] = {}
    for path, value in fields.items():
        target = document
        *parents, leaf = path.split(".")
        for parent in parents:
            target = target.setdefault(parent, {})
        target[leaf] = value
    return document


def submit_file(file: Path, url: str, api_key: str, columns: Sequence[str] = ()) -> list[Answer]:
    """Send each event of a file; answers in the file's order."""
    headers = {"Authorization": f"Bearer {api_key}", "Content-Type": "application/json"}
    with httpx.Client(base_url=url, headers=headers, timeout=30) as client:
        return [
            _answer(index, client.post("/v1/events", content=orjson.dumps(event)))
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
