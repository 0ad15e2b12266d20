"""Judges a run: a pure function from what outsiders observed to a verdict, rule by rule. It believes nobody.

Promises: a rule that is broken is named, with counts and examples; a run whose faults did not bite is void, not good.
Reads nothing by itself: `observing` collects, and forged observations show in the tests that every rule can fail.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from tests.faults.load import Line, Op, Variant

Key = tuple[str, str]
"""(tenant, event id)."""

PRECEDENCE: Final = ("APPROVED", "REQUIRE_APPROVAL", "REJECTED")
CONFLICT: Final = "idempotency-conflict"
_EXAMPLES: Final = 5


@dataclass(frozen=True, slots=True)
class Seen:
    """One decision as one observer saw it: `rows`, `feed`, `queue`, `get` or `answer`."""

    observer: str
    key: Key
    revision: int
    outcome: str
    digest: str


@dataclass(frozen=True, slots=True)
class EventSeen:
    """An event's row: which body owns it, and its shape."""

    key: Key
    variant: str
    shape: int


@dataclass(frozen=True, slots=True)
class Letter:
    """A dead letter, whatever its status."""

    key: Key
    stage: str
    problem: str
    status: str


@dataclass(frozen=True, slots=True)
class Rejection:
    """A problem document that a tenant was sent; the event's id may be unknown."""

    tenant: str
    event_id: str
    identity: str
    problem: str


@dataclass(frozen=True, slots=True)
class Chain:
    """What `audit verify` and a count of our own say about a tenant's chain."""

    tenant: str
    intact: bool
    missing: int
    orphans: int
    records: int
    decisions: int
    problem: str = ""


@dataclass(frozen=True, slots=True)
class Bites:
    """What the faults did: a run in which they did nothing proves nothing."""

    redeliveries: int = 0
    duplicates_suppressed: int = 0
    stale_writes_refused: int = 0
    confirms_lost: int = 0
    decision_conflicts: int = 0
    requests_during_faults: int = 0
    accepted_during_faults: int = 0
    kills: int = 0
    pauses: int = 0
    at_failpoints: int = 0
    failpoints: Mapping[str, int] = field(default_factory=dict)
    kills_in_half_settled: int = 0
    pauses_across_flush: int = 0


@dataclass(frozen=True, slots=True)
class Floors:
    """The least that must have happened, for the long profile; `scaled` makes a short run's."""

    redeliveries: int = 1_000
    duplicates_suppressed: int = 500
    stale_writes_refused: int = 100
    confirms_lost: int = 50
    decision_conflicts: int = 10
    accepted_share: float = 0.5
    at_failpoints_share: float = 0.6
    each_failpoint: int = 10
    half_settled_share: float = 0.3
    pauses_across_flush: int = 20

    def scaled(self, part: float) -> Floors:
        """Floors of a run that is `part` as long. Counts shrink by half again and shares by a third: one restart of a
        server is a large part of a short run, and a few dozen faults vary.
        """

        def less(count: int) -> int:
            return max(1, int(count * part / 2))

        return Floors(
            less(self.redeliveries),
            less(self.duplicates_suppressed),
            less(self.stale_writes_refused),
            less(self.confirms_lost),
            int(self.decision_conflicts * part / 2),
            round(self.accepted_share * 2 / 3, 2),
            round(self.at_failpoints_share * 2 / 3, 2),
            int(self.each_failpoint * part / 2),
            round(self.half_settled_share * 2 / 3, 2),
            less(self.pauses_across_flush),
        )


@dataclass(frozen=True, slots=True)
class Observations:
    """Everything that outsiders saw. Times in seconds; `decided_s` and `audited_s` count from the last fault's healing
    and are None when it never happened.
    """

    lines: Sequence[Line]
    events: Sequence[EventSeen]
    seen: Sequence[Seen]
    letters: Sequence[Letter]
    rejections: Sequence[Rejection]
    chains: Sequence[Chain]
    trails: Mapping[Key, tuple[int, int]]
    """Per decided event: the entries of its decision's trail, and how many of them have their audit record."""
    foreign_canaries: Sequence[str]
    depths: Mapping[str, int]
    twin: Mapping[int, str]
    """Outcome of each shape in a faultless run."""
    decided_s: float | None
    audited_s: float | None
    bites: Bites


@dataclass(frozen=True, slots=True)
class Rule:
    """One rule and how it fared; `found` counts violations, or is what was measured."""

    name: str
    holds: bool
    found: str
    examples: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Verdict:
    """All rules. `sound`: no promise was broken; `void`: too little happened to say so."""

    rules: tuple[Rule, ...]
    bites: tuple[Rule, ...]

    @property
    def sound(self) -> bool:
        """No promise was broken."""
        return all(rule.holds for rule in self.rules)

    @property
    def void(self) -> bool:
        """Too little happened."""
        return not all(rule.holds for rule in self.bites)

    @property
    def broken(self) -> list[Rule]:
        """What does not hold."""
        return [rule for rule in (*self.rules, *self.bites) if not rule.holds]


TRAIL: Final = 5
"""Entries of a pipeline decision's trail; one more when an approval opens."""

DECIDED_WITHIN_S: Final = 60.0
AUDITED_WITHIN_S: Final = 120.0


def judge(seen: Observations, floors: Floors) -> Verdict:
    """The verdict."""
    facts = _Facts(seen)
    rules = (
        _none("lost", facts.lost()),
        _none("unexpected", facts.unexpected()),
        _none("decided more than once", facts.two_stories()),
        _none("more permissive than the twin", facts.permissive()),
        _none("a decision that was not told", facts.untold()),
        _none("a foreign body's decision", facts.wrong_body()),
        _none("audit gaps", facts.audit_gaps()),
        _none("audit chain not verified", facts.broken_chains()),
        _none("foreign canary", list(seen.foreign_canaries)),
        _none("left in queues", [f"{name}: {n}" for name, n in seen.depths.items() if n]),
        _within("decided after the last fault", seen.decided_s, DECIDED_WITHIN_S),
        _within("audited after the last fault", seen.audited_s, AUDITED_WITHIN_S),
    )
    return Verdict(rules, _bites(seen.bites, floors))


class _Facts:
    """Observations by event."""

    def __init__(self, seen: Observations) -> None:
        self._seen = seen
        self.accepted: dict[Key, set[Variant]] = defaultdict(set)
        self.sent: dict[Key, set[Variant]] = defaultdict(set)
        self.identity: dict[Key, str] = {}
        for line in seen.lines:
            key = (line.tenant, line.event_id)
            self.sent[key].add(line.variant)
            self.identity[key] = line.identity
            if line.op is Op.OK:
                self.accepted[key].add(line.variant)
        self.rows: dict[Key, list[Seen]] = defaultdict(list)
        for one in seen.seen:
            if one.observer == "rows":
                self.rows[one.key].append(one)
        self.owners = {event.key: event for event in seen.events}
        self.letters: dict[Key, list[Letter]] = defaultdict(list)
        for letter in seen.letters:
            self.letters[letter.key].append(letter)
        self.rejected: dict[Key, set[str]] = defaultdict(set)
        by_identity = {(tenant, name): (tenant, event) for (tenant, event), name in self.identity.items()}
        for one_rejection in seen.rejections:
            key = (one_rejection.tenant, one_rejection.event_id)
            if not one_rejection.event_id:
                key = by_identity.get((one_rejection.tenant, one_rejection.identity), key)
            self.rejected[key].add(one_rejection.problem)

    def lost(self) -> list[str]:
        """Accepted, and neither decided with that body, nor parked, nor rejected."""
        found = []
        for key, variants in self.accepted.items():
            owner = self.owners.get(key)
            for variant in variants:
                decided = bool(self.rows.get(key)) and owner is not None and owner.variant == variant
                if decided or self._answered(key, variant, owner):
                    continue
                found.append(f"{key} {variant}: {len(self.rows.get(key, ()))} decisions, owner {owner}")
        return found

    def _answered(self, key: Key, variant: Variant, owner: EventSeen | None) -> bool:
        """Whether a body that was not decided came to a dead letter or a rejection of its own."""
        problems = {letter.problem for letter in self.letters[key]} | self.rejected[key]
        if owner is not None and owner.variant != variant:
            return CONFLICT in problems  # another body owns the identity: that one's dead letter is not this one's
        return bool(problems - {CONFLICT})  # nobody conflicts with what owns the identity itself, or with nobody

    def unexpected(self) -> list[str]:
        """Events, decisions, letters and rejections that nobody sent, and decisions of what was never valid."""
        found = [f"event {key} was never sent" for key in self.owners if key not in self.sent]
        found += [f"decision of {key}, which was never sent" for key in self.rows if key not in self.sent]
        found += [f"letter of {key}, which was never sent" for key in self.letters if key[1] and key not in self.sent]
        found += [
            f"rejection of {key}, which was never sent" for key in self.rejected if key[1] and key not in self.sent
        ]
        found += [f"{key} was decided and is invalid" for key in self.rows if self.sent.get(key) == {Variant.INVALID}]
        found += [f"{key} has a decision and no event" for key in self.rows if key not in self.owners]
        return found

    def two_stories(self) -> list[str]:
        """More than one outcome, or more than one document, per (event, revision) over all observers."""
        told: dict[tuple[Key, int], dict[tuple[str, str], set[str]]] = defaultdict(lambda: defaultdict(set))
        for one in self._all_seen():
            told[one.key, one.revision][one.outcome, one.digest].add(one.observer)
        found = [f"{key} revision {n}: {dict(stories)}" for (key, n), stories in told.items() if len(stories) > 1]
        rows = Counter((row.key, row.revision) for rows in self.rows.values() for row in rows)
        found += [f"{key} revision {n} has {count} rows" for (key, n), count in rows.items() if count > 1]
        stored = set(rows)
        found += [f"{key} revision {n} was told and is not stored" for key, n in told if (key, n) not in stored]
        return found

    def _all_seen(self) -> Iterable[Seen]:
        yield from self._seen.seen
        for line in self._seen.lines:
            if line.shown is not None:
                yield Seen("answer", (line.tenant, line.event_id), *line.shown)

    def permissive(self) -> list[str]:
        """An outcome that lets through what a faultless run would not."""
        found = []
        for key, rows in self.rows.items():
            owner = self.owners.get(key)
            if owner is None:
                continue
            least = PRECEDENCE.index(self._seen.twin[owner.shape])
            found += [
                f"{key}: {row.outcome}, the twin says {PRECEDENCE[least]}"
                for row in rows
                if row.revision == 1 and PRECEDENCE.index(row.outcome) < least
            ]
        return found

    def untold(self) -> list[str]:
        """A decision that its tenant's own bound queue never got, or its feed does not show."""
        by: dict[str, set[tuple[Key, int]]] = defaultdict(set)
        for one in self._seen.seen:
            by[one.observer].add((one.key, one.revision))
        return [
            f"{key} revision {n} is not in the {how}" for how in ("queue", "feed") for key, n in by["rows"] - by[how]
        ]

    def wrong_body(self) -> list[str]:
        """An event whose row holds a body that nobody sent under this identity."""
        return [
            f"{key} is {owner.variant}, sent were {sorted(self.sent[key])}"
            for key, owner in self.owners.items()
            if key in self.sent and owner.variant not in self.sent[key]
        ]

    def audit_gaps(self) -> list[str]:
        """Decided events whose trail is too short, or is not wholly in the chain."""
        found = []
        for key, rows in self.rows.items():
            waits = any(row.revision == 1 and row.outcome == PRECEDENCE[1] for row in rows)
            owed, present = self._seen.trails.get(key, (0, 0))
            if owed < TRAIL + waits or present < owed:
                found.append(f"{key}: {present} of {owed} records, at least {TRAIL + waits} are owed")
        return found

    def broken_chains(self) -> list[str]:
        """Chains that do not verify, miss records, or know another number of decisions than the table."""
        decided = Counter(key[0] for key in self.rows)
        found = [
            f"{chain.tenant}: {chain.problem or f'{chain.missing} missing'}"
            for chain in self._seen.chains
            if not chain.intact or chain.missing
        ]
        verified = {chain.tenant: chain.decisions for chain in self._seen.chains}
        found += [f"{t}: {n} decisions, {verified.get(t)} verified" for t, n in decided.items() if verified.get(t) != n]
        return found


def _none(name: str, violations: Sequence[str]) -> Rule:
    return Rule(name, not violations, str(len(violations)), tuple(violations[:_EXAMPLES]))


def _within(name: str, took_s: float | None, limit_s: float) -> Rule:
    said = "never" if took_s is None else f"{took_s:.1f} s"
    return Rule(name, took_s is not None and took_s <= limit_s, f"{said} (at most {limit_s:.0f} s)")


def _bites(bites: Bites, floors: Floors) -> tuple[Rule, ...]:
    faults = bites.kills + bites.pauses
    least = min(bites.failpoints.values(), default=0)
    seldom = tuple(f"{name}: {n}" for name, n in bites.failpoints.items() if n < floors.each_failpoint)
    return (
        _least("redeliveries", bites.redeliveries, floors.redeliveries),
        _least("suppressed duplicates", bites.duplicates_suppressed, floors.duplicates_suppressed),
        _least("refused stale writes", bites.stale_writes_refused, floors.stale_writes_refused),
        _least("lost confirms", bites.confirms_lost, floors.confirms_lost),
        _least("decision conflicts", bites.decision_conflicts, floors.decision_conflicts),
        _share(
            "accepted during faults", bites.accepted_during_faults, bites.requests_during_faults, floors.accepted_share
        ),
        _share("kills and pauses at failpoints", bites.at_failpoints, faults, floors.at_failpoints_share),
        Rule("each failpoint", least >= floors.each_failpoint, f"{least} (at least {floors.each_failpoint})", seldom),
        _share("kills in a half-settled carrier", bites.kills_in_half_settled, bites.kills, floors.half_settled_share),
        _least("pauses across a FLUSHALL", bites.pauses_across_flush, floors.pauses_across_flush),
    )


def _least(name: str, count: int, floor: int) -> Rule:
    return Rule(name, count >= floor, f"{count:,} (at least {floor:,})")


def _share(name: str, part: int, whole: int, floor: float) -> Rule:
    share = part / whole if whole else 0.0
    return Rule(name, share >= floor, f"{part:,} of {whole:,} = {share:.0%} (at least {floor:.0%})")
