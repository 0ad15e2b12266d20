"""Guardrail checks: limits, blocked patterns (RE2), personal identifiers, injection, lists, listed names, evidence,
model validity.

Promises: a check that cannot be made has the verdict `error`, never `pass`; once the budget of a version is spent, the
checks that are left are not made and have the verdict `timeout`, and so has one that spent it alone. When anything was
unavailable, the check `degraded_mode` says what the version wants for that: a person, or a rejection. Amounts are
compared as numbers of their own currency; nothing converts. Texts are `text`, string attributes and the names of
subject and counterparty, field by field.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from decimal import Decimal
from functools import lru_cache, partial
from typing import Annotated, Any, Literal

import re2
from pydantic import Field, field_validator

from contracts.events import Amount, Event
from contracts.failures import InvalidModelStateError
from contracts.outcomes import Check
from contracts.ports import Artifact
from contracts.state import Pin, SubjectHistory, Thresholds
from contracts.velocity import Velocity
from workers.judgement.content import CACHED_VERSIONS, Content, ContentKey, key_of, read
from workers.judgement.features import feature, is_feature
from workers.judgement.injection import DEFAULT_LIMIT, look_for_injection
from workers.judgement.lists import LISTED, ListEntry, ListIndex, Which, index, listed
from workers.judgement.models import Code
from workers.judgement.personal import PERSONAL_KINDS, PHONE_REGIONS, PersonalKind, find_personal, prepare
from workers.judgement.screening import SanctionsList, screen

HIGH_RISK = "HIGH_RISK"
SCORE_LIMIT = "SCORE_LIMIT"
AMOUNT_LIMIT = "AMOUNT_LIMIT"
CHECK_ERROR = "CHECK_ERROR"
CHECK_TIMEOUT = "CHECK_TIMEOUT"
PERSONAL_DATA = "PERSONAL_DATA"
PROMPT_INJECTION = "PROMPT_INJECTION"
EVIDENCE_MISSING = "EVIDENCE_MISSING"
MODEL_TOO_OLD = "MODEL_TOO_OLD"
MODEL_EXPIRED = "MODEL_EXPIRED"
NAME_LISTED = "NAME_LISTED"
DEGRADED_ESCALATE, DEGRADED_REJECT = "DEGRADED_ESCALATE", "DEGRADED_REJECT"
REJECTING = frozenset({DEGRADED_REJECT, LISTED["deny"]})
"""Codes of failed checks that reject; every other one asks a person."""
MAX_SCANNED = 65_536
"""Characters of one event that patterns look at; an event with more is an `error`."""

Stopwatch = Callable[[], float]
FieldName = Literal["text", "attributes", "names"]


class BlockedPattern(Content):
    """An RE2 pattern that no field may contain."""

    id: Annotated[str, Field(min_length=1, max_length=64, pattern=r"^[a-z0-9][a-z0-9_.-]*$")]
    pattern: Annotated[str, Field(min_length=1, max_length=512)]
    code: Code
    fields: Annotated[tuple[FieldName, ...], Field(min_length=1)] = ("text", "attributes", "names")


class PersonalCheck(Content):
    """Which personal identifiers no text may contain; phone numbers without a country are tried in `regions`."""

    kinds: Annotated[tuple[PersonalKind, ...], Field(min_length=1)] = PERSONAL_KINDS
    fields: Annotated[tuple[FieldName, ...], Field(min_length=1)] = ("text",)
    regions: Annotated[tuple[Annotated[str, Field(pattern=r"^[A-Z]{2}$")], ...], Field(min_length=1, max_length=16)] = (
        PHONE_REGIONS
    )


class InjectionCheck(Content):
    """From which strength of signals (0–1) a text is taken for an attack on a language model."""

    limit: Annotated[float, Field(gt=0, le=1)] = DEFAULT_LIMIT
    fields: Annotated[tuple[FieldName, ...], Field(min_length=1)] = ("text", "attributes", "names")


class GuardrailContent(Content):
    """The content of a guardrail of type `checks`. `amount_limit` is a decimal string, `budget_ms` is wall time.

    `evidence`: features (as models name them) that must be there. `model_age_days`: the oldest approval of the model.
    `on_degraded`: what becomes of an event for which something was unavailable.
    """

    type: Literal["checks"]
    score_limit: Annotated[float, Field(ge=0, le=100)] | None = None
    amount_limit: Annotated[str, Field(max_length=40, pattern=r"^\d{1,15}(\.\d{1,9})?$")] | None = None
    patterns: Annotated[tuple[BlockedPattern, ...], Field(max_length=64)] = ()
    personal: PersonalCheck | None = None
    injection: InjectionCheck | None = None
    lists: Annotated[tuple[ListEntry, ...], Field(max_length=2_000)] = ()
    evidence: Annotated[tuple[Annotated[str, Field(max_length=160)], ...], Field(max_length=64)] = ()
    model_age_days: Annotated[int, Field(ge=1, le=3_650)] | None = None
    budget_ms: Annotated[float, Field(gt=0, le=1_000)] = 100.0
    on_degraded: Literal["escalate", "reject"] = "escalate"

    @field_validator("evidence")
    @classmethod
    def _are_features(cls, paths: tuple[str, ...]) -> tuple[str, ...]:
        if not all(is_feature(path) for path in paths):
            raise ValueError("names something that is not a feature")
        return paths


@dataclass(frozen=True, slots=True)
class Guardrail:
    """A guardrail ready to run; `version` is name@version."""

    version: str
    content: GuardrailContent
    patterns: tuple[tuple[BlockedPattern, Any], ...]
    lists: ListIndex


@dataclass(frozen=True, slots=True)
class Subject:
    """What is checked: the event, its score and its tenant's limits.

    `now` is the event's clock (`Pins.now`), `model` the artifact that scored it, `unavailable` what was not to be had.
    `lists`: the pinned lists of names, and `names` what is in them, None when that cannot be had.
    """

    event: Event
    score: float | None
    thresholds: Thresholds
    now: str = ""
    history: SubjectHistory = field(default_factory=SubjectHistory)
    velocity: Velocity | None = None
    model: Artifact | None = None
    unavailable: tuple[str, ...] = ()
    lists: Pin | None = None
    names: SanctionsList | None = None


@dataclass(frozen=True, slots=True)
class _Found:
    """Why a check failed: its code, and what it found."""

    code: str
    hit: str


def load_guardrail(artifact: Artifact) -> Guardrail:
    """The guardrail of an artifact, compiled once per digest. Raises InvalidModelStateError when it is not one."""
    return _load(key_of(artifact))


@lru_cache(maxsize=CACHED_VERSIONS)
def _load(key: ContentKey) -> Guardrail:
    content = read(GuardrailContent, key)
    options = re2.Options()
    options.log_errors = False
    options.max_mem = 1 << 20
    compiled = []
    for each in content.patterns:
        try:
            compiled.append((each, re2.compile(each.pattern, options=options)))
        except re2.error:
            raise InvalidModelStateError(f"{key.name}: pattern {each.id} is not RE2") from None
    if content.personal is not None:
        prepare(content.personal.regions)
    return Guardrail(key.name, content, tuple(compiled), index(content.lists))


def run_checks(guardrail: Guardrail | None, subject: Subject, stopwatch: Stopwatch) -> tuple[Check, ...]:
    """Every check, each timed by `stopwatch` (seconds). Without a guardrail only the tenant's limits are checked."""
    checks: list[Check] = []
    budget_ms = None if guardrail is None else guardrail.content.budget_ms
    for planned in _plan(guardrail, subject):
        spent = sum(check.latency_ms for check in checks)
        if budget_ms is not None and spent > budget_ms:
            checks.append(_timeout(*planned[:2], 0.0))
            continue
        check = _timed(*planned, stopwatch)
        late = budget_ms is not None and spent + check.latency_ms > budget_ms and check.verdict == "pass"
        checks.append(_timeout(check.check, check.version, check.latency_ms) if late else check)
    return (*checks, *_degraded(guardrail, subject, checks))


def _timeout(check: str, version: str, latency_ms: float) -> Check:
    return Check(check=check, version=version, verdict="timeout", latency_ms=latency_ms, code=CHECK_TIMEOUT)


def _degraded(guardrail: Guardrail | None, subject: Subject, checks: list[Check]) -> Iterator[Check]:
    """What the version wants when something was unavailable, or a check of it could not be made in time."""
    if guardrail is None or not (subject.unavailable or any(check.verdict in ("error", "timeout") for check in checks)):
        return
    code = DEGRADED_REJECT if guardrail.content.on_degraded == "reject" else DEGRADED_ESCALATE
    yield Check(check="degraded_mode", version=guardrail.version, verdict="fail", latency_ms=0.0, code=code)


Test = Callable[[], "str | _Found | None"]
Planned = tuple[str, str, Test]


def _plan(guardrail: Guardrail | None, subject: Subject) -> Iterator[Planned]:
    """(check, version, test) of each check; a test gives the code of a failure, or None."""
    if subject.lists is not None:
        # First: what a version's budget leaves out may be anything but this.
        yield "screening", f"{subject.lists.name}@{subject.lists.version}", lambda: _screened(subject)
    limits = subject.thresholds
    own = f"thresholds@{limits.version}"
    yield "score_limit", own, lambda: _score_limit(subject.score, limits.hard_limit)
    yield "prior_limit", own, lambda: HIGH_RISK if (subject.event.risk_score or 0) > limits.hard_limit else None
    if limits.amount_limit is not None:
        yield "amount_limit", own, lambda: _amount_limit(subject.event.amount, limits.amount_limit)
    if guardrail is None:
        return
    content, version = guardrail.content, guardrail.version
    if content.score_limit is not None:
        yield "guardrail_score_limit", version, lambda: _score_limit(subject.score, content.score_limit)
    if content.amount_limit is not None:
        yield "guardrail_amount_limit", version, lambda: _amount_limit(subject.event.amount, content.amount_limit)
    for blocked, compiled in guardrail.patterns:
        yield f"pattern:{blocked.id}", version, _pattern_test(blocked, compiled, subject.event)
    yield from _more(guardrail, subject)


def _more(guardrail: Guardrail, subject: Subject) -> Iterator[Planned]:
    content, version, event = guardrail.content, guardrail.version, subject.event
    if content.lists:
        yield "list:deny", version, lambda: _listed(guardrail.lists, "deny", subject)
        yield "list:watch", version, lambda: _listed(guardrail.lists, "watch", subject)
    if (personal := content.personal) is not None:
        yield "personal_data", version, lambda: _personal(personal, event)
    if (injection := content.injection) is not None:
        yield "prompt_injection", version, lambda: _injection(injection, event)
    for path in content.evidence:
        yield f"evidence:{path}", version, partial(_evidence, path, subject)
    if content.model_age_days is not None:
        days = content.model_age_days
        yield "model_age", version, lambda: _model_age(subject, days)
    if subject.model is not None and subject.model.valid_until is not None:
        yield "model_validity", version, lambda: _model_validity(subject)


def _screened(subject: Subject) -> _Found | None:
    """The most similar listed name of the event's parties. Raises ValueError without the lists, or for a long name."""
    if subject.names is None:
        raise ValueError("the pinned lists cannot be had")
    parties = (subject.event.subject, subject.event.counterparty)
    hits = [screen(subject.names, party.name) for party in parties if party is not None and party.name is not None]
    best = max((hit for hit in hits if hit is not None), key=lambda hit: hit.similarity, default=None)
    return (
        None if best is None else _Found(NAME_LISTED, f"entry {best.listed.number}, similarity {best.similarity:.2f}")
    )


def _listed(entries: ListIndex, which: Which, subject: Subject) -> str | None:
    return LISTED[which] if listed(entries, which, subject.event, subject.now) else None


def _personal(wanted: PersonalCheck, event: Event) -> str | None:
    found = (find_personal(text, wanted.kinds, wanted.regions) for text in _bounded(event, wanted.fields))
    kinds = {each.kind for hits in found for each in hits}
    return f"{PERSONAL_DATA}:{','.join(sorted(kinds))}" if kinds else None


def _injection(wanted: InjectionCheck, event: Event) -> str | None:
    texts = _bounded(event, wanted.fields)
    # Together too: an order that is spread over two attributes reaches a model in one prompt.
    seen = [look_for_injection(text) for text in ([*texts, "\n".join(texts)] if len(texts) > 1 else texts)]
    return PROMPT_INJECTION if any(each.strength >= wanted.limit for each in seen) else None


def _evidence(path: str, subject: Subject) -> str | None:
    return EVIDENCE_MISSING if feature(path, subject.event, subject.history, subject.velocity) is None else None


def _model_age(subject: Subject, days: int) -> str | None:
    if subject.model is None or subject.model.approved_at is None:
        raise ValueError("nobody knows how old the model is")
    age = datetime.fromisoformat(subject.now) - datetime.fromisoformat(subject.model.approved_at)
    return MODEL_TOO_OLD if age > timedelta(days=days) else None


def _model_validity(subject: Subject) -> str | None:
    if subject.model is None or subject.model.valid_until is None:
        return None
    return (
        None
        if datetime.fromisoformat(subject.model.valid_until) > datetime.fromisoformat(subject.now)
        else MODEL_EXPIRED
    )


def _timed(check: str, version: str, test: Test, stopwatch: Stopwatch) -> Check:
    started = stopwatch()
    verdict: Literal["pass", "fail", "error"]
    code = hit = None
    try:
        said = test()
        code, hit = (said.code, said.hit) if isinstance(said, _Found) else (said, None)
        verdict = "pass" if code is None else "fail"
    except Exception:  # noqa: BLE001 - a check that raises has not passed, whatever it raised
        code, verdict = CHECK_ERROR, "error"
    latency_ms = round((stopwatch() - started) * 1000, 3)
    return Check(check=check, version=version, verdict=verdict, latency_ms=latency_ms, code=code, hit=hit)


def _score_limit(score: float | None, limit: float | None) -> str | None:
    if score is None or limit is None:
        raise ValueError("there is no score to compare")
    return None if score < limit else SCORE_LIMIT


def _amount_limit(amount: Amount | None, limit: str | None) -> str | None:
    if amount is None or limit is None:
        return None
    return AMOUNT_LIMIT if abs(Decimal(amount.value)) > Decimal(limit) else None


def _pattern_test(blocked: BlockedPattern, compiled: Any, event: Event) -> Callable[[], str | None]:
    def test() -> str | None:
        return blocked.code if any(compiled.search(text) for text in _bounded(event, blocked.fields)) else None

    return test


def _bounded(event: Event, fields: tuple[FieldName, ...]) -> list[str]:
    scanned = list(_texts(event, fields))
    if sum(map(len, scanned)) > MAX_SCANNED:
        raise ValueError("more text than checks look at")
    return scanned


def _texts(event: Event, fields: tuple[FieldName, ...]) -> Iterator[str]:
    if "text" in fields and event.text:
        yield event.text
    if "attributes" in fields:
        yield from (value for value in event.attributes.values() if isinstance(value, str))
    if "names" in fields:
        yield from (party.name for party in (event.subject, event.counterparty) if party is not None and party.name)
