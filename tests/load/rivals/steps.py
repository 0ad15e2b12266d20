"""The work of every rival: four steps, each of which reads and writes the event's state in Redis; the last also writes
the decision and five audit rows to PostgreSQL, in one transaction, so that a repeat changes nothing.

Runs in a rival's own virtual environment: imports nothing of riskfleet. Connections are one per thread.
"""

from __future__ import annotations

import hashlib
import os
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import orjson
import psycopg
import redis

STEPS = ("retrieval", "scoring", "guardrail", "decision")
RABBITMQ, REDIS, DATABASE = os.environ["RIVAL_RABBITMQ"], os.environ["RIVAL_REDIS"], os.environ["RIVAL_DATABASE"]
TABLES = """
    CREATE TABLE IF NOT EXISTS rival_decisions (event_id text PRIMARY KEY, outcome text NOT NULL, state bytea NOT NULL,
        intended double precision NOT NULL, decided_at timestamptz NOT NULL DEFAULT clock_timestamp());
    CREATE TABLE IF NOT EXISTS rival_audit (event_id text, n int, body bytea NOT NULL, PRIMARY KEY (event_id, n));
"""
DECIDE = (
    "INSERT INTO rival_decisions (event_id, outcome, state, intended) VALUES (%s, %s, %s, %s) ON CONFLICT DO NOTHING"
)
AUDIT = "INSERT INTO rival_audit SELECT %s, * FROM unnest(%s::int[], %s::bytea[]) ON CONFLICT DO NOTHING"
STARTED = "rival:started"
_own = threading.local()
_first = threading.Event()


def store() -> Any:
    """This thread's Redis connection."""
    if not hasattr(_own, "redis"):
        _own.redis = redis.Redis.from_url(REDIS)
    return _own.redis


def database() -> Any:
    """This thread's PostgreSQL connection; autocommit, so that a transaction is what the code says."""
    if not hasattr(_own, "database"):
        _own.database = psycopg.connect(DATABASE, autocommit=True)
    return _own.database


def key_of(event_id: str) -> str:
    return f"rival:{event_id}"


def advanced(raw: bytes, name: str) -> tuple[dict[str, Any], bytes]:
    """The state after a step, and its bytes."""
    state = orjson.loads(raw)
    digest = hashlib.sha256(raw).hexdigest()
    # A repeat of a step is the same step: the trail has one entry for each.
    trail = [entry for entry in state["trail"] if entry["step"] != name]
    state["trail"] = [*trail, {"step": name, "parent": digest, "at": time.time()}]
    return state, orjson.dumps(state)


def step(name: str, event_id: str) -> None:
    """One step; the last also decides."""
    if not _first.is_set():
        _first.set()
        store().set(STARTED, repr(time.time()), nx=True)
    raw = store().get(key_of(event_id))
    state, after = advanced(raw, name)
    store().set(key_of(event_id), after)
    if name == STEPS[-1]:
        with database().transaction():
            database().execute(DECIDE, (event_id, "APPROVED", after, state["intended"]))
            database().execute(AUDIT, (event_id, *audit_rows(state)))


def audit_rows(state: dict[str, Any]) -> tuple[list[int], list[bytes]]:
    """Numbers and bodies of the five records."""
    return list(range(5)), [orjson.dumps(entry) for entry in state["trail"]]


def prepare(event_id: str, intended: float) -> bytes:
    """A new event's state, about 1 KB."""
    body = {f"field_{i:02d}": f"value-{i}-{event_id}" for i in range(24)}
    first = {"step": "received", "parent": None, "at": time.time()}
    return orjson.dumps({"id": event_id, "intended": intended, "body": body, "trail": [first]})


def command(send: Callable[[str], object]) -> None:
    """`fill N`: states and messages of a backlog; `rate R N`: open loop, the intended moment travels in the state."""
    with database().transaction():
        database().execute(TABLES)
    if sys.argv[1] == "fill":
        for number in range(int(sys.argv[2])):
            event_id = f"event-{number:07d}"
            store().set(key_of(event_id), prepare(event_id, time.time()))
            send(event_id)
        return
    rate, began = float(sys.argv[2]), time.time() + 0.2
    for number in range(int(sys.argv[3])):
        moment = began + number / rate
        if (pause := moment - time.time()) > 0:
            time.sleep(pause)
        event_id = f"event-{number:07d}"
        store().set(key_of(event_id), prepare(event_id, moment))
        send(event_id)
