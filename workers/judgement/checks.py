"""Guardrail checks: limits on score, prior and amount, and blocked patterns (RE2, linear time).

Promises: a check that cannot be made has the verdict `error`, never `pass`. Amounts are compared as
numbers of their own currency; nothing converts. Patterns look at `text`, string attributes and the
names of subject and counterparty, field by field.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from decimal import Decimal
from functools import lru_cache
from typing import Annotated, Any, Literal

import re2
from pydantic import Field

from contracts.events import Amount, Event
from contracts.failures import InvalidModelStateError
from contracts.outcomes import Check
from contracts.ports import Artifact
from contracts.state import Thresholds
from workers.judgement.content import CACHED_VERSIONS, Content, ContentKey, key_of, read
from workers.judgement.models import Code

HIGH_RISK = "HIGH_RISK"
SCORE_LIMIT = "SCORE_LIMIT"
AMOUNT_LIMIT = "AMOUNT_LIMIT"
CHECK_ERROR = "CHECK_ERROR"
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


class GuardrailContent(Content):
    """The content of a guardrail of type `checks`. `amount_limit` is a decimal string."""

    type: Literal["checks"]
    score_limit: Annotated[float, Field(ge=0, le=100)] | None = None
    amount_limit: Annotated[str, Field(max_length=40, pattern=r"^\d{1,15}(\.\d{1,9})?$")] | None = None
    patterns: Annotated[tuple[BlockedPattern, ...], Field(max_length=64)] = ()


@dataclass(frozen=True, slots=True)
class Guardrail:
    """A guardrail ready to run; `version` is name@version."""

    version: str
    content: GuardrailContent
    patterns: tuple[tuple[BlockedPattern, Any], ...]


@dataclass(frozen=True, slots=True)
class Subject:
    """What is checked: the event, its score and its tenant's limits."""

    event: Event
    score: float | None
    thresholds: Thresholds


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
    return Guardrail(key.name, content, tuple(compiled))


def run_checks(guardrail: Guardrail | None, subject: Subject, stopwatch: Stopwatch) -> tuple[Check, ...]:
    """Every check, each timed by `stopwatch` (seconds). Without a guardrail only the tenant's limits are checked."""
    return tuple(_timed(*planned, stopwatch) for planned in _plan(guardrail, subject))


Planned = tuple[str, str, Callable[[], str | None]]


def _plan(guardrail: Guardrail | None, subject: Subject) -> Iterator[Planned]:
    """(check, version, test) of each check; a test gives the code of a failure, or None."""
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


def _timed(check: str, version: str, test: Callable[[], str | None], stopwatch: Stopwatch) -> Check:
    started = stopwatch()
    verdict: Literal["pass", "fail", "error"]
    try:
        code = test()
        verdict = "pass" if code is None else "fail"
    except Exception:  # noqa: BLE001 - a check that raises has not passed, whatever it raised
        code, verdict = CHECK_ERROR, "error"
    latency_ms = round((stopwatch() - started) * 1000, 3)
    return Check(check=check, version=version, verdict=verdict, latency_ms=latency_ms, code=code)


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
        scanned = list(_texts(event, blocked.fields))
        if sum(map(len, scanned)) > MAX_SCANNED:
            raise ValueError("more text than patterns look at")
        return blocked.code if any(compiled.search(text) for text in scanned) else None

    return test


def _texts(event: Event, fields: tuple[FieldName, ...]) -> Iterator[str]:
    if "text" in fields and event.text:
        yield event.text
    if "attributes" in fields:
        yield from (value for value in event.attributes.values() if isinstance(value, str))
    if "names" in fields:
        yield from (party.name for party in (event.subject, event.counterparty) if party is not None and party.name)
