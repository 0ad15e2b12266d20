"""What is done to a fleet in one run: submissions and faults as values, by a seed or by an exhaustive list.

Pure. A `Plan` says everything; running it twice with one seed is the same run twice.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import StrEnum
from random import Random
from typing import Any, Final, Literal

from contracts.events import canonical_json
from contracts.topology import STAGES
from tests.simulation.fleet import ALL_PLACES, KINDS, LEASE_S, TENANTS

Door = Literal["http", "batch", "amqp"]


@dataclass(frozen=True, slots=True)
class Sent:
    """One submission: by which door and when (s); those of one `batch` number go together, as one batch."""

    tenant: int
    identity: str
    body: bytes
    door: Door
    at: float
    batch: int = 0


class Mode(StrEnum):
    """What becomes of a process that is struck at a place."""

    RESTART = "restart"
    TAKEOVER = "takeover"
    PAUSE = "pause"


@dataclass(frozen=True, slots=True)
class Strike:
    """Strike the process of this kind that is the `hit`-th to pass a place."""

    kind: str
    place: str
    mode: Mode
    hit: int = 1


@dataclass(frozen=True, slots=True)
class Fault:
    """Something that happens at a time: `what` is one of FAULTS, `size` its number, seconds or kind's place."""

    at: float
    what: str
    kind: str = ""
    size: float = 0.0


@dataclass(frozen=True, slots=True)
class Plan:
    """One run. `chained`: a strike counts only once the one before it has struck."""

    seed: int
    sent: tuple[Sent, ...]
    strikes: tuple[Strike, ...] = ()
    faults: tuple[Fault, ...] = ()
    chained: bool = False
    workers: int = 2
    partitions: int = 2

    def without(self, **changes: Any) -> Plan:
        """A smaller plan, for shrinking."""
        return replace(self, **changes)


FAULTS: Final = (
    *("kill", "kill-step", "pause", "drain", "skew", "cut"),
    *("lose-confirms", "lose-messages", "refuse", "duplicate", "poison", "broker-restart", "alarm"),
    *("flush", "lost-tail", "redis-down", "redis-lost-reply"),
    *("db-fail", "db-lost-reply", "db-down"),
)

LONGEST_S: Final = 40.0
"""No fault of a plan lasts longer (s)."""

_BODIES: Final[tuple[dict[str, Any], ...]] = (
    {"type": "payment.card", "amount": {"value": "12.50", "currency": "EUR"}},
    {"type": "payment.card", "amount": {"value": "250000.00", "currency": "EUR"}},
    {"type": "payment.card", "amount": {"value": "90.00", "currency": "EUR"}, "risk_score": 97},
    {"type": "login"},
    {"kind": "compliance", "type": "kyc.onboarding", "regulatory_flags": [{"code": "PEP", "level": "high"}]},
    {"kind": "compliance", "type": "trade", "regulatory_flags": []},
)


def body_of(tenant: int, identity: str, template: int, *, changed: bool = False) -> bytes:
    """An event of a template; every event has a subject of its own, so that its outcome depends on itself alone."""
    document = {
        "id": identity,
        "kind": "risk",
        "occurred_at": "2026-01-31T11:59:00Z",
        "subject": {"type": "customer", "id": f"{TENANTS[tenant]}-{identity}"},
        "text": f"canary-{TENANTS[tenant]}",
    } | _BODIES[template]
    if changed:
        document["attributes"] = {"changed": True}
    return canonical_json(document)


TEMPLATES: Final = len(_BODIES)


def random_plan(seed: int) -> Plan:
    """3–8 events of 2–3 tenants through both doors, repeated and changed ones among them, and 0–6 faults."""
    random = Random(seed)
    tenants = random.randint(2, 3)
    sent: list[Sent] = []
    for number in range(random.randint(3, 8)):
        tenant, at = random.randrange(tenants), random.choice((0.0, random.random() * 3))
        door: Door = random.choice(("http", "http", "amqp", "batch"))
        identity = f"order-{number}"
        one = Sent(tenant, identity, body_of(tenant, identity, random.randrange(TEMPLATES)), door, at, 1)
        sent.append(one)
        if random.random() < 0.25:  # the same again, somewhere near
            sent.append(replace(one, at=at + random.random() * 2, door=random.choice(("http", "amqp")), batch=2))
        if random.random() < 0.12:  # another body under the same identity
            other = body_of(tenant, identity, random.randrange(TEMPLATES), changed=True)
            sent.append(replace(one, at=at + random.random(), body=other, door=random.choice(("http", "amqp"))))
    number = random.randint(0, 6)
    strikes = tuple(_strike(random) for _ in range(random.randint(0, number)))
    faults = tuple(_fault(random) for _ in range(number - len(strikes)))
    return Plan(seed, tuple(sent), strikes, faults, workers=random.randint(2, 4), partitions=random.choice((1, 2, 3)))


def _strike(random: Random) -> Strike:
    kind, place = random.choice(ALL_PLACES)
    return Strike(kind, place, random.choice(tuple(Mode)), random.choice((1, 1, 1, 2, 3)))


def _fault(random: Random) -> Fault:
    what = random.choice(FAULTS)
    kind = random.choice(KINDS if what != "duplicate" else tuple(STAGES))
    sizes = {
        "kill-step": random.randint(1, 400),
        "pause": random.choice((1.0, LEASE_S + 2, LEASE_S + 20)),
        "skew": random.choice((-3600.0, 3600.0)),
        "lost-tail": random.random() * 5,
        "redis-down": random.random() * 20,
        "db-down": random.random() * 20,
        "alarm": random.random() * 10,
    }
    return Fault(random.random() * 4, what, kind, float(sizes.get(what, random.randint(1, 6))))


def single_plans(sizes: tuple[int, ...] = (1, 8)) -> Iterator[Plan]:
    """Every failpoint × every mode × these carrier sizes."""
    for kind, place in ALL_PLACES:
        for mode in Mode:
            for size in sizes:
                yield _exhaustive((Strike(kind, place, mode),), size)


def pair_plans(sizes: tuple[int, ...] = (1, 8)) -> Iterator[Plan]:
    """Every ordered pair of failpoints × modes × sizes: the second strikes after the first, during the recovery.

    Pairs of kinds that no event connects any more (a door after a sink) are kept: they cost little and hide nothing.
    """
    for first in ALL_PLACES:
        for second in ALL_PLACES:
            for mode in Mode:
                for size in sizes:
                    yield _exhaustive((Strike(*first, mode), Strike(*second, mode)), size)


def number_of_pairs(sizes: int = 2) -> int:
    """How many plans `pair_plans` gives."""
    return len(ALL_PLACES) ** 2 * len(Mode) * sizes


def _exhaustive(strikes: tuple[Strike, ...], size: int) -> Plan:
    """One event, or eight that travel together, through the door that the strikes need, and one park."""
    door: Door = "amqp" if any(strike.kind == "ingress" for strike in strikes) else "batch"
    both = door == "amqp" and any(strike.kind == "gateway" for strike in strikes)
    sent = [
        Sent(0, f"order-{n}", body_of(0, f"order-{n}", n % TEMPLATES), "http" if both and n % 2 else door, 0.0, 1)
        for n in range(max(size, 2 if both else 1))
    ]
    parks = any(strike.kind == "sink-parking" for strike in strikes)
    faults = (Fault(0.0, "poison", STAGES[1], 1.0),) if parks else ()
    return Plan(_seed_of(strikes, size), tuple(sent), strikes, faults, chained=True, partitions=1)


def _seed_of(strikes: tuple[Strike, ...], size: int) -> int:
    """The same for the same plan in every process, as `hash` of a text is not."""
    seed = size
    for strike in strikes:
        place = ALL_PLACES.index((strike.kind, strike.place))
        seed = (seed * 1009 + place) * 3 + list(Mode).index(strike.mode)
    return seed
