"""Velocity in Redis: one string of samples per entity, one epoch per tenant.

Keys, all under the tenant's hash tag `{f.<tenant>}`: `s:` and `c:` histories of subjects and counterparties, `y:`
labels that wait for their event, `m` the epoch: a hash of e epoch · q sequence · r run of the server · s since when
history is incomplete (ms; absent when it is whole).

Promises: each call is one pipelined round trip, of one atomic script per tenant; an event is its own idempotency mark,
since its sample holds its sequence. Memory per entity is bounded: 68 bytes a sample, 320 samples at most, forgotten
when they are 38 days older than the newest. A server that was flushed or started again begins a new, incomplete
epoch: what AOF or a replica may have lost of the last second is treated as lost. Does not promise durability: see
`workers.velocity`, which rebuilds.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files
from struct import Struct
from typing import Any, Final

from contracts.ports import Clock, Ids
from contracts.tenancy import TenantScope
from contracts.velocity import (
    RECORD,
    Mark,
    Marking,
    Observation,
    Sample,
    Sighting,
    VelocityPolicy,
    samples_of,
)
from resilience.redis import Client, register, run_all

_VERDICT: Final = Struct(">BQ")
_KEYS_A_CALL: Final = 2_000
"""Histories that one script merges: some tens of ms of the server's time."""


class RedisFeatureStore:
    """FeatureStore on one Redis or Valkey server (7.0 or later)."""

    def __init__(self, client: Client, clock: Clock, ids: Ids, policy: VelocityPolicy | None = None) -> None:
        """`ids` names epochs. Loads the scripts' texts; connects on first use."""
        self._client, self._clock, self._ids = client, clock, ids
        self._policy = policy or VelocityPolicy()
        scripts = files("resilience") / "scripts"
        before = (scripts / "velocity.lua").read_text()
        self._scripts = {
            name: register(client, before + (scripts / f"{name}.lua").read_text())
            for name in ("observe", "merge", "mark", "epoch")
        }

    async def observe(self, sightings: Sequence[Sighting], *, record: bool = True) -> Sequence[Observation]:
        """One script per tenant, all in one round trip; an entity's history travels once."""
        p, calls = self._policy, []
        groups = _by_tenant(sightings)
        for scope, places in groups.items():
            entities = _Places()
            args: list[Any] = [*self._fresh(), int(record), p.stored, p.horizon_ms, p.ttl_s, len(places)]
            for place in places:
                for key, sample in zip(sightings[place].histories(), sightings[place].records(), strict=True):
                    args += (entities.of(key), sample)
            verdicts = [scope.verdict_key(sightings[place].event_id) for place in places]
            calls.append(([scope.epoch_key, *verdicts, *entities.keys], args))
        found: dict[int, Observation] = {}
        for places, (keys, _), answer in zip(groups.values(), calls, await self._run("observe", calls), strict=True):
            epoch, since, sequences, blobs = answer
            known = dict(zip(keys[1 + len(places) :], map(samples_of, blobs), strict=True))
            for place, sequence in zip(places, sequences, strict=True):
                found[place] = _observation(epoch, since, sequence, known, sightings[place])
        return [found[place] for place in range(len(sightings))]

    async def merge(self, sightings: Sequence[Sighting]) -> None:
        """Per entity one read and one write, whatever it gets."""
        histories: dict[str, list[bytes]] = {}
        scopes: dict[str, TenantScope] = {}
        for sighting in sightings:
            for key, sample in zip(sighting.histories(), sighting.records(), strict=True):
                if key is not None:
                    histories.setdefault(key, []).append(sample)
                    scopes[key] = sighting.scope
        p, calls = self._policy, []
        for keys in _by_scope(scopes):
            for start in range(0, len(keys), _KEYS_A_CALL):
                some = keys[start : start + _KEYS_A_CALL]
                joined = [b"".join(_unique(histories[key])) for key in some]
                calls.append((some, [p.stored, p.horizon_ms, p.ttl_s, *joined]))
        await self._run("merge", calls)

    async def mark(self, markings: Sequence[Marking]) -> None:
        """One script per tenant, all in one round trip."""
        calls = []
        for scope, places in _by_tenant(markings).items():
            entities = _Places()
            args: list[Any] = [len(places), self._policy.ttl_s]
            for marking in (markings[place] for place in places):
                sighting = marking.sighting
                args.append(_VERDICT.pack(marking.verdict.verdict, marking.verdict.known))
                if sighting is None:
                    args += (b"", 0, 0)
                else:
                    args += (sighting.records()[0][:24], *(entities.of(key) for key in sighting.histories()))
            verdicts = [scope.verdict_key(markings[place].event_id) for place in places]
            calls.append(([*verdicts, *entities.keys], args))
        await self._run("mark", calls)

    async def marks(self, scopes: Sequence[TenantScope]) -> Sequence[Mark]:
        """The epoch of each tenant, begun where there is none of this run of the server."""
        answers = await self._run("epoch", [([scope.epoch_key], [*self._fresh(), ""]) for scope in scopes])
        return [_mark(scope, *answer) for scope, answer in zip(scopes, answers, strict=True)]

    async def complete(self, marks: Sequence[Mark]) -> Sequence[bool]:
        """By position: the epoch is whole from now on; False when it is another one."""
        calls = [([mark.scope.epoch_key], [*self._fresh(), mark.epoch]) for mark in marks]
        answers = await self._run("epoch", calls)
        return [_mark(m.scope, *answer) == Mark(m.scope, m.epoch) for m, answer in zip(marks, answers, strict=True)]

    def _fresh(self) -> tuple[str, int]:
        return self._ids.token(), round(self._clock.now().timestamp() * 1000)

    async def _run(self, name: str, calls: Sequence[tuple[Sequence[str], Sequence[Any]]]) -> Sequence[Any]:
        return await run_all(self._client, self._scripts[name], calls) if calls else ()


class _Places:
    """The histories of one script call, each with its place from 1 on."""

    def __init__(self) -> None:
        self._places: dict[str, int] = {}

    def of(self, key: str | None) -> int:
        return 0 if key is None else self._places.setdefault(key, len(self._places) + 1)

    @property
    def keys(self) -> list[str]:
        return list(self._places)


def _by_tenant(items: Sequence[Sighting | Marking]) -> dict[TenantScope, list[int]]:
    groups: dict[TenantScope, list[int]] = {}
    for place, item in enumerate(items):
        groups.setdefault(item.scope, []).append(place)
    return groups


def _by_scope(scopes: dict[str, TenantScope]) -> list[list[str]]:
    groups: dict[TenantScope, list[str]] = {}
    for key, scope in scopes.items():
        groups.setdefault(scope, []).append(key)
    return list(groups.values())


def _unique(records: Sequence[bytes]) -> list[bytes]:
    """In order, each event once: of two with different verdicts the later."""
    newest: dict[bytes, bytes] = {}
    for record in records:
        held = newest.get(record[:24])
        if held is None or _rank(record) > _rank(held):
            newest[record[:24]] = record
    return [newest[place] for place in sorted(newest)]


def _rank(record: bytes) -> tuple[int, int]:
    sample = RECORD.unpack(record)
    return (sample[6], sample[5])


def _observation(
    epoch: bytes, since: bytes, sequence: int, known: dict[str, tuple[Sample, ...]], sighting: Sighting
) -> Observation:
    subject, other = sighting.histories()
    mark = _mark(sighting.scope, epoch, since)
    return Observation(
        mark.epoch,
        sequence,
        mark.complete,
        mark.since_ms,
        known[subject],
        None if other is None else known[other],
    )


def _mark(scope: TenantScope, epoch: bytes, since: bytes) -> Mark:
    return Mark(scope, epoch.decode(), int(since) if since else None)
