"""Tenants: the only maker of keys, queue names and slots from a tenant id.

A raw tenant id is a string in an envelope; everywhere else it travels as a `TenantScope`, so that
no adapter can forget it in a key. Slots and partitions are stable for ever: their test vectors are
published in `docs/architecture.md`.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from functools import lru_cache

from contracts.failures import InvalidTenantError

VIRTUAL_SLOTS = 4096
_TENANT_ID = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")
_RESERVED = frozenset({"unrouted"})  # its ingest queue is everybody's: risk.ingest.unrouted
_MASK64 = (1 << 64) - 1


@lru_cache(maxsize=16_384)  # every key of every event asks for it
def virtual_slot(tenant_id: str) -> int:
    """The fixed slot (0–4,095) of a tenant: the first 8 bytes of SHA-256, big endian, mod 4,096."""
    digest = hashlib.sha256(tenant_id.encode()).digest()
    return int.from_bytes(digest[:8], "big") % VIRTUAL_SLOTS


def jump_consistent_hash(key: int, buckets: int) -> int:
    """The bucket (0 … buckets−1) of a 64-bit key.

    Source: Lamping and Veach, "A Fast, Minimal Memory, Consistent Hash Algorithm" (2014). Growing
    from n to n+1 buckets moves 1/(n+1) of the keys, all of them into the new bucket.
    """
    if buckets < 1:
        raise ValueError(f"buckets must be at least 1, not {buckets}")
    bucket, candidate = -1, 0
    while candidate < buckets:
        bucket = candidate
        key = (key * 2862933555777941757 + 1) & _MASK64
        candidate = int((bucket + 1) * (float(1 << 31) / float((key >> 33) + 1)))
    return bucket


@dataclass(frozen=True, slots=True)
class TenantScope:
    """One validated tenant: makes every key, predicate and name that belongs to it.

    Raises InvalidTenantError for an id outside `[a-z0-9][a-z0-9-]{0,62}`.
    """

    tenant_id: str

    def __post_init__(self) -> None:
        if not _TENANT_ID.fullmatch(self.tenant_id):
            raise InvalidTenantError("a tenant id has 1 to 63 of a-z, 0-9 and '-', and does not start with '-'")
        if self.tenant_id in _RESERVED:
            raise InvalidTenantError(f"the tenant id {self.tenant_id} is reserved; choose another")

    @property
    def slot(self) -> int:
        """The virtual slot, 0–4,095."""
        return virtual_slot(self.tenant_id)

    def partition(self, partitions: int) -> int:
        """The partition (0 … partitions−1) whose queues carry this tenant's events."""
        return jump_consistent_hash(self.slot, partitions)

    def state_key(self, event_id: str) -> str:
        """The Redis key of an event's state; the hash tag keeps a slot's keys on one cluster node."""
        return f"rf:{{s{self.slot:04d}}}:e:{self.tenant_id}:{event_id}"

    def suspect_key(self, event_id: str, stage: str) -> str:
        """The Redis key that remembers which process runs a suspect entry alone."""
        return f"rf:{{s{self.slot:04d}}}:a:{self.tenant_id}:{event_id}:{stage}"

    def limit_key(self, limit: str) -> str:
        """The Redis key of one of this tenant's rate limits."""
        return f"rf:{{s{self.slot:04d}}}:l:{self.tenant_id}:{limit}"

    def velocity_key(self, side: str, entity: str) -> str:
        """The Redis key of one entity's history; a tenant's features have a hash tag, and so a node, of their own."""
        return f"rf:{{f.{self.tenant_id}}}:{side[:1]}:{entity}"

    def verdict_key(self, event_id: str) -> str:
        """The Redis key of a label whose event was not observed yet."""
        return f"rf:{{f.{self.tenant_id}}}:y:{event_id}"

    @property
    def epoch_key(self) -> str:
        """The Redis key of the epoch of this tenant's features."""
        return f"rf:{{f.{self.tenant_id}}}:m"

    @property
    def backlog_key(self) -> str:
        """The Redis key of this tenant's backlog; `:n` behind it names the set of its events at version n."""
        return f"rf:{{s{self.slot:04d}}}:b:{self.tenant_id}"

    @property
    def ingest_queue(self) -> str:
        """The AMQP queue that holds what this tenant's broker user published."""
        return f"risk.ingest.{self.tenant_id}"

    def routing_key(self, *words: str) -> str:
        """A topic routing key whose first word is this tenant."""
        return ".".join((self.tenant_id, *words))

    def __str__(self) -> str:
        return self.tenant_id
