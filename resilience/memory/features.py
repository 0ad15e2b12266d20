"""Velocity in memory: one process's FeatureStore on a MemoryRedis, answer by answer what the scripts answer.

Histories are tuples of samples here, not bytes. Does not promise times to live: what is small enough for a process is
kept for its life.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeVar

from contracts.failures import StateStoreError
from contracts.ports import Ids
from contracts.tenancy import TenantScope
from contracts.velocity import (
    NO_VERDICT,
    RECORD,
    Mark,
    Marking,
    Observation,
    Sample,
    Sighting,
    VelocityPolicy,
    Verdict,
    kept,
)
from resilience.memory.state_store import MemoryRedis, Wire

T = TypeVar("T")
Histories = dict[str, list[Sample]]


class MemoryFeatureStore:
    """FeatureStore of one process. `wire` and `lose_replies` are those of MemoryStateStore."""

    def __init__(
        self, server: MemoryRedis, ids: Ids, policy: VelocityPolicy | None = None, *, wire: Wire | None = None
    ) -> None:
        self.server = server
        self.lose_replies = 0
        self._ids = ids
        self._policy = policy or VelocityPolicy()
        self._wire = wire

    async def _call(self, work: Callable[[], T]) -> T:
        if self._wire is not None:
            await self._wire()
        if self.server.down:
            raise StateStoreError
        answer = work()
        if self._wire is not None:
            await self._wire()
        if self.lose_replies > 0:
            self.lose_replies -= 1
            raise StateStoreError
        return answer

    async def observe(self, sightings: Sequence[Sighting], *, record: bool = True) -> Sequence[Observation]:
        """In one step for all tenants."""
        return await self._call(lambda: self._observe(sightings, record=record))

    def _observe(self, sightings: Sequence[Sighting], *, record: bool) -> Sequence[Observation]:
        histories: Histories = {}
        seen = []
        for sighting in sightings:
            keys = [key for key in sighting.histories() if key is not None]
            for key in keys:
                histories.setdefault(key, list(self.server.samples.get(key, ())))
            seen.append((self._epoch(sighting.scope, write=record), self._sequence(sighting, histories, record=record)))
        answers = []
        frozen = {key: tuple(samples) for key, samples in histories.items()}
        for sighting, (mark, sequence) in zip(sightings, seen, strict=True):
            subject, other = sighting.histories()
            theirs = None if other is None else frozen[other]
            about = (mark.epoch, sequence, mark.complete, mark.since_ms)
            answers.append(Observation(*about, frozen[subject], theirs))
        if record:
            for key, samples in histories.items():
                self.server.keep(self.server.samples, key, kept(samples, self._policy))
        return answers

    def _sequence(self, sighting: Sighting, histories: Histories, *, record: bool) -> int:
        """At which sequence the event was observed: now, unless it was before."""
        pairs = list(zip(sighting.histories(), sighting.records(), strict=True))
        sides = [(histories[key], RECORD.unpack(sample)) for key, sample in pairs if key is not None]
        mine = max(0 if (held := _held(*side)) is None else held[2] for side in sides)
        latest = self.server.sequences.get(sighting.scope, 0)
        if not record:
            return mine or latest + 1
        if not mine:
            mine = latest + 1
            self.server.keep(self.server.sequences, sighting.scope, mine)
        waiting = self.server.verdicts.get(sighting.scope.verdict_key(sighting.event_id), NO_VERDICT)
        for samples, sample in sides:
            held = _held(samples, sample) or sample
            _put(samples, _judged((*held[:2], mine, *held[3:]), waiting))
        if waiting is not NO_VERDICT:
            self.server.keep(self.server.verdicts, sighting.scope.verdict_key(sighting.event_id), None)
        return mine

    async def merge(self, sightings: Sequence[Sighting]) -> None:
        """What is there stays, and takes over a later verdict."""

        def work() -> None:
            histories: Histories = {}
            for sighting in sightings:
                for key, record in zip(sighting.histories(), sighting.records(), strict=True):
                    if key is not None:
                        samples = histories.setdefault(key, list(self.server.samples.get(key, ())))
                        sample = RECORD.unpack(record)
                        _put(samples, _judged(_held(samples, sample) or sample, sighting.verdict))
            for key, samples in histories.items():
                self.server.keep(self.server.samples, key, kept(samples, self._policy))

        await self._call(work)

    async def mark(self, markings: Sequence[Marking]) -> None:
        """Put labels on samples, or let them wait."""

        def work() -> None:
            for marking in markings:
                self._mark(marking)

        await self._call(work)

    def _mark(self, marking: Marking) -> None:
        found, sighting = False, marking.sighting
        if sighting is not None:
            for key, record in zip(sighting.histories(), sighting.records(), strict=True):
                samples = list(self.server.samples.get(key, ())) if key is not None else []
                held = _held(samples, RECORD.unpack(record)) if key is not None else None
                if held is not None:
                    _put(samples, _judged(held, marking.verdict))
                    self.server.keep(self.server.samples, key, tuple(samples))
                    found = True
        waiting = marking.scope.verdict_key(marking.event_id)
        if not found and marking.verdict.rank > self.server.verdicts.get(waiting, NO_VERDICT).rank:
            self.server.keep(self.server.verdicts, waiting, marking.verdict)

    async def marks(self, scopes: Sequence[TenantScope]) -> Sequence[Mark]:
        """The epoch of each tenant."""
        return await self._call(lambda: [self._epoch(scope, write=True) for scope in scopes])

    async def complete(self, marks: Sequence[Mark]) -> Sequence[bool]:
        """By position: the epoch is whole from now on; False when it is another one."""

        def work(mark: Mark) -> bool:
            held = self._epoch(mark.scope, write=True)
            if held.epoch == mark.epoch:
                whole = (replace(held, since_ms=None), self.server.run)
                self.server.keep(self.server.epochs, mark.scope, whole)
            return held.epoch == mark.epoch

        return await self._call(lambda: [work(mark) for mark in marks])

    def _epoch(self, scope: TenantScope, *, write: bool) -> Mark:
        held = self.server.epochs.get(scope)
        if held is not None and held[1] == self.server.run:
            return held[0]
        since = held[0].since_ms if held is not None else None
        mark = Mark(scope, self._ids.token(), self.server.now_ms if since is None else since)
        if write:
            self.server.keep(self.server.epochs, scope, (mark, self.server.run))
        return mark


def _held(samples: Sequence[Sample], sample: Sample) -> Sample | None:
    at = bisect_left(samples, sample[:2])
    return samples[at] if at < len(samples) and samples[at][:2] == sample[:2] else None


def _put(samples: list[Sample], sample: Sample) -> None:
    at = bisect_left(samples, sample[:2])
    if at < len(samples) and samples[at][:2] == sample[:2]:
        samples[at] = sample
    else:
        samples.insert(at, sample)


def _judged(sample: Sample, verdict: Verdict) -> Sample:
    if verdict.rank <= (sample[6], sample[5]):
        return sample
    return (*sample[:5], verdict.verdict, verdict.known, *sample[7:])
