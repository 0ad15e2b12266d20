"""Past events from a file into the velocity of their entities: parts of it, each kept in PostgreSQL first.

A line of NDJSON is an event as upstream sends it, with its `id`, and may have `label` {label, effective_at}. Of a CSV,
`--map FIELD=COLUMN` names the columns (`FIELD=:text` a constant); `label` may be 0 or 1, and counts from
`label_effective_at`, else from when the label delay has passed. Times without an offset are UTC there.

Promises: the same file read the same way is the same parts, so that an import goes on where it ended, and one that is
repeated changes nothing; a flushed Redis is rebuilt with them. A line that cannot be read ends the import, by number.
"""

from __future__ import annotations

import asyncio
import csv
import hashlib
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from itertools import islice
from pathlib import Path
from typing import Any, Final

import orjson

from contracts.events import event_id_of, parse_event
from contracts.failures import DomainValidationError, RiskfleetError
from contracts.labels import LABELS
from contracts.ports import FeatureStore, Past
from contracts.tenancy import TenantScope
from contracts.velocity import (
    ImportedPart,
    Sighting,
    VelocityPolicy,
    pack,
    party_digest,
    sighting_of,
    since_1900,
    verdict,
)

PART: Final = 50_000
"""Events of a part: one transaction, and one merge of every history in it."""

_POLICY: Final = VelocityPolicy()
_UNLABELLED: Final = frozenset({"", "0", "none", "false"})


async def import_file(
    scope: TenantScope,
    file: Path,
    columns: Mapping[str, str],
    store: FeatureStore,
    past: Past,
    done: Callable[[int], None] = lambda _: None,
) -> int:
    """Load a file; returns how many events it has. `done` hears how many so far.

    Raises DomainValidationError with the number of a line that is no event, InfrastructureError.
    """
    source, count, number = source_of(file, columns), 0, 0
    kept = await _kept(scope, source, past)
    lines = enumerate(_rows(file, columns), start=1)

    async def bring(part: int, sightings: list[Sighting], upto: int) -> None:
        await past.keep([ImportedPart(scope, source, part, pack(sightings))])
        await store.merge(sightings)
        done(upto)

    def read(some: Sequence[tuple[int, Any]]) -> list[Sighting]:
        return [_sighting(scope, place, row) for place, row in some]

    bringing: asyncio.Task[None] | None = None
    try:
        while some := await asyncio.to_thread(lambda: list(islice(lines, PART))):
            count += len(some)
            # The last part that is kept may not have been merged: whoever brought it died in between, perhaps.
            if number >= kept - 1:
                sightings = await asyncio.to_thread(read, some)  # while the servers take in the part before
                if bringing is not None:
                    await bringing
                bringing = asyncio.create_task(bring(number, sightings, count))
            number += 1
    finally:
        if bringing is not None:
            await bringing
    return count


def source_of(file: Path, columns: Mapping[str, str]) -> str:
    """The name of a file's content, read in this way: 64 hex digits."""
    digest = hashlib.sha256(orjson.dumps({"part": PART, "columns": dict(columns)}, option=orjson.OPT_SORT_KEYS))
    with file.open("rb") as content:
        while block := content.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


async def _kept(scope: TenantScope, source: str, past: Past) -> int:
    count, place = 0, None
    while parts := await past.imported(scope, place, 64, source):
        count, place = count + len(parts), (source, parts[-1].part)
    return count


def _rows(file: Path, columns: Mapping[str, str]) -> Iterator[Any]:
    """One document per line, not looked at yet."""
    if file.suffix.lower() == ".csv":
        with file.open(newline="", encoding="utf-8") as lines:
            reader = csv.DictReader(lines)
            missing = [c for c in columns.values() if not c.startswith(":") and c not in (reader.fieldnames or ())]
            if missing or not columns:
                raise DomainValidationError(
                    f"the file has no column {missing[0]}" if missing else "a CSV needs --map FIELD=COLUMN"
                )
            fields = [(field.split("."), column) for field, column in columns.items()]
            for row in reader:
                yield _document(row, fields)
        return
    with file.open("rb") as content:
        for line in content:
            if line.strip():
                yield line


def _document(row: Mapping[str, str], fields: Sequence[tuple[list[str], str]]) -> dict[str, Any]:
    document: dict[str, Any] = {}
    for path, column in fields:
        value = column[1:] if column.startswith(":") else row[column]
        if value == "":
            continue
        inner = document
        for step in path[:-1]:
            inner = inner.setdefault(step, {})
        inner[path[-1]] = _utc(value) if path == ["occurred_at"] else value
    return document


def _utc(value: str) -> str:
    """A time of a CSV is UTC when it says nothing else."""
    try:
        return value if datetime.fromisoformat(value).tzinfo else f"{value}Z"
    except ValueError:
        return value  # the event's own check says what is wrong with it


def _sighting(scope: TenantScope, number: int, row: Any) -> Sighting:
    try:
        document = orjson.loads(row) if isinstance(row, bytes) else row
        if not isinstance(document, dict):
            raise DomainValidationError("an event is a JSON object")
        said, effective_at = _label(document)
        plain = _plain(scope, document)
        if plain is not None:
            at, sighting = plain
            return _judged(sighting, said, effective_at, at)
        document.setdefault("kind", "risk")
        document.setdefault("type", "imported")
        event = parse_event(document)
        if event.id is None:
            raise DomainValidationError("a past event needs its id")
        at = event.occurred
        sighting = sighting_of(scope, event_id_of(scope, event.id), event, at, _POLICY.attribute)
        return _judged(sighting, said, effective_at, at)
    except (RiskfleetError, ValueError) as error:
        places = "; ".join(f"{p} {why}" for p, why in getattr(error, "pointers", ()))
        detail = error.detail if isinstance(error, RiskfleetError) else "not JSON, or a time that cannot be read"
        raise DomainValidationError(f"event {number}: {detail}{f' ({places})' if places else ''}") from None


def _judged(sighting: Sighting, said: str | None, effective_at: datetime | None, at: datetime) -> Sighting:
    if said is None:
        return sighting
    known = at + timedelta(milliseconds=_POLICY.label_delay_ms) if effective_at is None else effective_at
    return replace(sighting, verdict=verdict(said, known))


def _plain(scope: TenantScope, document: Mapping[str, Any]) -> tuple[datetime, Sighting] | None:
    """The sighting of an event of the commonest shape; None: only the event's own model knows, or says what is wrong.

    Twice as fast as that model, of which velocity needs five fields.
    """
    subject, other, amount = document.get("subject"), document.get("counterparty"), document.get("amount")
    name, moment = document.get("id"), document.get("occurred_at")
    if not (document.keys() <= _PLAIN and _named(subject) and (other is None or _named(other))):
        return None
    if not (isinstance(name, str) and 0 < len(name) <= 256 and isinstance(moment, str) and _MOMENT.fullmatch(moment)):
        return None
    value, currency = math.nan, bytes(3)
    if amount is not None:
        if not (isinstance(amount, dict) and amount.keys() == _AMOUNT and all(type(v) is str for v in amount.values())):
            return None
        if not (_DECIMAL.fullmatch(amount["value"]) and _CURRENCY.fullmatch(amount["currency"])):
            return None
        value, currency = float(amount["value"]), amount["currency"].encode()
    at = datetime.fromisoformat(moment)
    parties = [None if p is None else party_digest(p["type"], p["id"]) for p in (subject, other)]
    event_id = event_id_of(scope, name)
    return at, Sighting(scope, event_id, since_1900(at), parties[0] or "", parties[1], value, currency)


def _named(party: Any) -> bool:
    return (
        isinstance(party, dict)
        and party.keys() == _PARTY
        and all(type(value) is str and value for value in party.values())
        and len(party["type"]) <= 128
        and len(party["id"]) <= 256
    )


_PLAIN: Final = frozenset({"id", "occurred_at", "subject", "counterparty", "amount"})
_PARTY: Final = frozenset({"type", "id"})
_AMOUNT: Final = frozenset({"value", "currency"})
_MOMENT: Final = re.compile(r"(?:19|20|21)\d\d-\d\d-\d\d[T ]\d\d:\d\d:\d\d(?:\.\d{1,6})?Z", re.ASCII)
_DECIMAL: Final = re.compile(r"-?[0-9]{1,15}(?:\.[0-9]{1,9})?", re.ASCII)
_CURRENCY: Final = re.compile(r"[A-Z]{3}", re.ASCII)


def _label(document: dict[str, Any]) -> tuple[str | None, datetime | None]:
    """What a row says of itself in hindsight; taken out of it."""
    given: Any = document.pop("label", None)
    since: Any = document.pop("label_effective_at", None)
    if isinstance(given, dict):
        given, since = given.get("label"), given.get("effective_at", since)
    if given is None or str(given).lower() in _UNLABELLED:
        return None, None
    name = "confirmed_fraud" if str(given).lower() in ("1", "true") else str(given)
    if name not in LABELS:
        raise DomainValidationError(f"a label is 0, 1, or one of {', '.join(LABELS)}")
    if since is None:
        return name, None
    moment = datetime.fromisoformat(str(since))
    return name, moment if moment.tzinfo else moment.replace(tzinfo=UTC)
