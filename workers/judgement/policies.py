"""Policies: CEL expressions over the event, its history and its score. A rule fires when it is true.

Variables: `event` {kind, type, subject {type}, amount? {value, currency}, attributes, risk_score?,
text_length, regulatory_flags [{code, level}]}, `history` {events_1d, events_30d, amount_30d,
new_subject}, `risk` {score?}. What is absent is not there: write `has(event.amount) && …` or
`'x' in event.attributes && …`. Every number is a double, so that 100 and 100.0 mean the same: write
arithmetic with double literals (`event.amount.value * 2.0`).

Promises: a rule that raises, or gives something that is not a bool, is FAIL with POLICY_ERROR. Work
is bounded: length, nesting, number of rules, and one comprehension (`all`, `exists`, …) an expression.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated, Any, Literal

import re2
from pydantic import Field

from contracts.events import Event
from contracts.failures import InvalidModelStateError
from contracts.outcomes import POLICY_PRECEDENCE, PolicyResult, PolicyVerdict, RuleVerdict
from contracts.ports import Artifact
from contracts.state import SubjectHistory
from workers.judgement.content import CACHED_VERSIONS, Content, ContentKey, key_of, read
from workers.judgement.models import Code, Text

POLICY_ERROR = "POLICY_ERROR"
MAX_EXPRESSION = 2_000
MAX_NESTING = 24

_COMPREHENSION: Any = re2.compile(r"\b(?:all|exists|exists_one|map|filter)\b")
_PREFIXES: Any = re2.compile(r"[!-](?:\s*[!-]){7}")


class Rule(Content):
    """One rule: what it says (`result`) when its expression is true."""

    id: Annotated[str, Field(min_length=1, max_length=64, pattern=r"^[a-z0-9][a-z0-9_.-]*$")]
    when: Annotated[str, Field(min_length=1, max_length=MAX_EXPRESSION)]
    result: Literal["FAIL", "DENY"]
    code: Code
    text: Text


class PolicySet(Content):
    """The content of a policy of type `cel`."""

    type: Literal["cel"]
    rules: Annotated[tuple[Rule, ...], Field(min_length=1, max_length=200)]


@dataclass(frozen=True, slots=True)
class CompiledRule:
    """A rule and its CEL program."""

    rule: Rule
    program: Any


def load_policy(artifact: Artifact) -> tuple[CompiledRule, ...]:
    """The rules of an artifact, compiled once per digest. Raises InvalidModelStateError when one is not CEL."""
    return _load(key_of(artifact))


@lru_cache(maxsize=CACHED_VERSIONS)
def _load(key: ContentKey) -> tuple[CompiledRule, ...]:
    rules = read(PolicySet, key).rules
    if len({rule.id for rule in rules}) != len(rules):
        raise InvalidModelStateError(f"{key.name} has two rules of one id")
    return tuple(CompiledRule(rule, _compile(rule, key.name)) for rule in rules)


def _compile(rule: Rule, name: str) -> Any:
    if nesting(rule.when) > MAX_NESTING or _PREFIXES.search(rule.when):
        raise InvalidModelStateError(f"{name}: rule {rule.id} nests deeper than {MAX_NESTING}")
    if len(_COMPREHENSION.findall(rule.when)) > 1:
        raise InvalidModelStateError(f"{name}: rule {rule.id} has more than one comprehension; split it")
    import cel  # late: it brings its whole command line, and most roles never look at a policy

    try:
        return cel.compile(rule.when)
    except BaseException as error:  # noqa: BLE001 - `_only_cel` lets interrupts through
        _only_cel(error)
        raise InvalidModelStateError(f"{name}: rule {rule.id} is not a CEL expression") from None


def nesting(expression: str) -> int:
    """The deepest bracket level, brackets in strings counted too, plus the number of conditionals."""
    depth = deepest = 0
    for letter in expression:
        depth += (letter in "([{") - (letter in ")]}")
        deepest = max(deepest, depth)
    return deepest + expression.count("?")


def evaluate_policy(artifact: Artifact, event: Event, history: SubjectHistory, score: float | None) -> PolicyVerdict:
    """The most severe result and every rule that fired. Raises InvalidModelStateError for unreadable content."""
    import cel  # late, as above

    rules = load_policy(artifact)
    context = cel.Context(variables(event, history, score))
    fired = tuple(verdict for each in rules if (verdict := _verdict(each, context)) is not None)
    result = max((PolicyResult.PASS, *(verdict.result for verdict in fired)), key=POLICY_PRECEDENCE.index)
    return PolicyVerdict(result=result, rules=fired)


def _verdict(compiled: CompiledRule, context: Any) -> RuleVerdict | None:
    rule = compiled.rule
    try:
        fires = compiled.program.execute(context)
    except BaseException as error:  # noqa: BLE001 - `_only_cel` lets interrupts through
        _only_cel(error)
        return RuleVerdict(rule=rule.id, result=PolicyResult.FAIL, code=POLICY_ERROR)
    if fires is False:
        return None
    if fires is True:
        return RuleVerdict(rule=rule.id, result=PolicyResult(rule.result), code=rule.code)
    return RuleVerdict(rule=rule.id, result=PolicyResult.FAIL, code=POLICY_ERROR)


def variables(event: Event, history: SubjectHistory, score: float | None) -> dict[str, Any]:
    """What an expression can see: plain values, every number a double, nothing that names a person."""
    seen: dict[str, Any] = {
        "kind": event.kind,
        "type": event.type,
        "subject": {"type": event.subject.type},
        "attributes": {name: _plain(value) for name, value in event.attributes.items()},
        "text_length": float(len(event.text or "")),
        "regulatory_flags": [{"code": flag.code, "level": flag.level} for flag in event.regulatory_flags or ()],
    }
    if event.amount is not None:
        seen["amount"] = {"value": float(event.amount.value), "currency": event.amount.currency}
    if event.risk_score is not None:
        seen["risk_score"] = float(event.risk_score)
    known = {
        "events_1d": float(history.events_1d),
        "events_30d": float(history.events_30d),
        "amount_30d": float(history.amount_30d),
        "new_subject": history.first_seen_at is None,
    }
    return {"event": seen, "history": known, "risk": {} if score is None else {"score": float(score)}}


def _plain(value: str | bool | float | None) -> str | bool | float | None:
    if value is None or isinstance(value, str | bool):
        return value
    return float(value)


def _only_cel(error: BaseException) -> None:
    """Let interrupts through; a panic of the interpreter is not an Exception, but is one for us."""
    if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
        raise error
