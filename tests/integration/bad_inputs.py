"""Bad submissions by the thousand: one guaranteed fault in an otherwise good event, the same for the same seed."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

_JSON = "application/json"


@dataclass(frozen=True)
class BadInput:
    """What is sent, and the statuses that may answer it."""

    why: str
    body: bytes
    content_type: str = _JSON
    statuses: frozenset[int] = frozenset({400, 422})


def good_event(chance: random.Random) -> dict[str, Any]:
    """An event that both doors accept."""
    return {
        "id": f"bad-{chance.getrandbits(64):016x}",
        "kind": "risk",
        "type": "payment.card",
        "occurred_at": "2026-01-31T12:00:00Z",
        "subject": {"type": "customer", "id": f"c-{chance.randrange(1000)}"},
        "amount": {"value": "12.50", "currency": "EUR"},
        "attributes": {"channel": "web", "score": 3},
    }


def bad_inputs(seed: int, count: int) -> Iterator[BadInput]:
    """So many bad submissions, fault after fault in turn."""
    chance = random.Random(seed)
    for i in range(count):
        yield FAULTS[i % len(FAULTS)](chance)


def _bytes(document: Any) -> bytes:
    return json.dumps(document, ensure_ascii=False).encode("utf-8", "surrogatepass")


def _changed(why: str, change: Callable[[dict[str, Any], random.Random], None]) -> Callable[[random.Random], BadInput]:
    def fault(chance: random.Random) -> BadInput:
        event = good_event(chance)
        change(event, chance)
        return BadInput(why, _bytes(event))

    return fault


def _inserted(why: str, member: Callable[[random.Random], str]) -> Callable[[random.Random], BadInput]:
    """A member as raw text, for what no JSON library would write."""

    def fault(chance: random.Random) -> BadInput:
        text = json.dumps(good_event(chance))
        return BadInput(why, (text[:-1] + ", " + member(chance) + "}").encode())

    return fault


def _cut(chance: random.Random) -> BadInput:
    body = _bytes(good_event(chance))
    return BadInput("cut off", body[: chance.randrange(len(body) - 1)])


def _noise(chance: random.Random) -> BadInput:
    return BadInput("noise", b"\xff" + chance.randbytes(chance.randrange(200)))


def _flipped(chance: random.Random) -> BadInput:
    """A byte that stands in no UTF-8 text, anywhere in the body."""
    body = bytearray(_bytes(good_event(chance)))
    body[chance.randrange(len(body))] = chance.choice((0xC0, 0xF5, 0xFF))
    return BadInput("not UTF-8", bytes(body))


def _deep(chance: random.Random) -> BadInput:
    depth = chance.randrange(33, 3000)
    event = json.dumps(good_event(chance))[:-1]
    return BadInput("deep", f'{event}, "metadata": {"[" * depth}{"]" * depth}}}'.encode())


def _large(chance: random.Random) -> BadInput:
    event = good_event(chance) | {"text": "x" * (66_000 + chance.randrange(1000))}
    return BadInput("too large", _bytes(event), statuses=frozenset({413}))


def _media(chance: random.Random) -> BadInput:
    kind = chance.choice(("text/plain", "application/xml", "multipart/form-data", "application/jsonx"))
    return BadInput("media type", _bytes(good_event(chance)), kind, frozenset({415}))


def _wrong_type(chance: random.Random) -> BadInput:
    event = good_event(chance)
    name = chance.choice([name for name in event if name != "attributes"])
    wrong: list[Any] = [None, 7, 1.5, True, [], [1], {"a": 1}, ""]
    event[name] = chance.choice(wrong)
    if name in ("id", "amount") and event[name] is None:  # left out is fine for these
        event[name] = []
    return BadInput(f"{name} of a wrong type", _bytes(event))


def _not_an_object(chance: random.Random) -> BadInput:
    return BadInput("not an object", _bytes(chance.choice([None, 7, "event", [], [good_event(chance)], True])))


def _foreign(chance: random.Random) -> BadInput:
    event = good_event(chance) | {"tenant_id": f"other-{chance.randrange(100)}"}
    return BadInput("another tenant", _bytes(event), statuses=frozenset({403}))


def _missing(event: dict[str, Any], chance: random.Random) -> None:
    event.pop(chance.choice(("type", "occurred_at", "subject")))


def _set(name: str, *values: Any) -> Callable[[dict[str, Any], random.Random], None]:
    def change(event: dict[str, Any], chance: random.Random) -> None:
        event[name] = chance.choice(values)

    return change


_AMOUNTS = (
    *({"value": "NaN", "currency": "EUR"}, {"value": "1e5", "currency": "EUR"}, {"value": "12,50", "currency": "EUR"}),
    *({"value": 12.5, "currency": "EUR"}, {"value": "1" * 16, "currency": "EUR"}, {"value": "1", "currency": "euro"}),
    *(
        {"value": "1"},
        {"currency": "EUR"},
        {"value": "١", "currency": "EUR"},
        {"value": "1.0000000001", "currency": "EUR"},
    ),
)
_MOMENTS = (
    *("yesterday", "2026-02-30T00:00:00Z", "2026-01-31", "2026-01-31T12:00:00", "9999-12-31T23:59:59Z"),
    *("0001-01-01T00:00:00Z", "1769860800", "2026-01-31T25:00:00Z", "2026-01-31T12:00:00+99:00"),
)

FAULTS: tuple[Callable[[random.Random], BadInput], ...] = (
    *(_cut, _noise, _flipped, _deep, _large, _media, _wrong_type, _not_an_object, _foreign),
    _inserted("duplicate name", lambda c: f'"id": "twice-{c.randrange(9)}"'),
    _inserted("not a number", lambda c: f'"risk_score": {c.choice(("NaN", "Infinity", "-Infinity", "1e999"))}'),
    _inserted("integer beyond 2^53", lambda c: f'"attributes2": {c.choice((2**53 + 1, -(2**53) - 1, 10**400))}'),
    _inserted("lone surrogate", lambda c: f'"text": "\\ud8{c.randrange(16, 64):02x}"'),
    _inserted("NUL", lambda _: '"text": "a\\u0000b"'),
    _inserted("trailing comma", lambda _: '"text": "a",'),
    _inserted("single quotes", lambda _: "'text': 'a'"),
    _inserted("comment", lambda _: '"text": "a" /* so */'),
    _changed("missing field", _missing),
    _changed("unknown field", lambda event, c: event.update({f"extra_{c.randrange(99)}": 1})),
    _changed("bad moment", _set("occurred_at", *_MOMENTS)),
    _changed("bad amount", _set("amount", *_AMOUNTS)),
    _changed("bad type", _set("type", "Payment", "payment..card", "-", "payment card", "p" * 129, "платёж")),
    _changed("bad kind", _set("kind", "RISK", "other", "")),
    _changed("bad score", _set("risk_score", -1, 101, "50", [50])),
    _changed("nested attribute", _set("attributes", {"a": {"b": 1}}, {"a": [1]}, {"": 1}, [], "a")),
    _changed("too many attributes", lambda event, _: event.update(attributes={f"a{i}": i for i in range(257)})),
    _changed("long id", _set("id", "x" * 257, "", 5, {"a": 1})),
    _changed("bad schema version", _set("schema_version", "2.0", "", 1, None)),
    _changed("bad correction", _set("corrects", "xyz", "A" * 32, 7, "0" * 31)),
    _changed("compliance without flags", _set("kind", "compliance")),
    _changed("bad flags", _set("regulatory_flags", [{"code": "X", "level": "extreme"}], [{"level": "low"}], "X", [1])),
)
