"""Policies: CEL expressions over the event, its history and its score. A rule fires when it is true.

Variables: `event` {kind, type, subject {type}, amount? {value, currency}, attributes, risk_score?,
text_length, regulatory_flags [{code, level}]}, `history` {events_1d, events_30d, amount_30d,
new_subject}, `risk` {score?}. What is absent is not there: write `has(event.amount) && …` or
`'x' in event.attributes && …`. Every number is a double, so that 100 and 100.0 mean the same: write
arithmetic with double literals (`event.amount.value * 2.0`).

Promises: a rule that raises, or gives something that is not a bool, is FAIL with POLICY_ERROR. Work
is bounded: length, nesting, number of rules, and one comprehension (`all`, `exists`, …) an expression. A rule may bring
its own test cases, which `check_policy` runs before a version is submitted.

For speed rules are run in groups, as one list of their expressions; when one of a group raises, each of it is run
alone, so that the answer is that of each rule by itself. A group whose rules all begin with the same test of
`event.type`, `event.kind`, or of there being an attribute, an amount or a score is skipped when that test is false.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated, Any, Literal

import re2
from pydantic import Field

from contracts.events import Event, parse_event
from contracts.failures import DomainValidationError, InvalidModelStateError
from contracts.outcomes import POLICY_PRECEDENCE, PolicyResult, PolicyVerdict, RuleVerdict
from contracts.ports import Artifact
from contracts.state import SubjectHistory
from workers.judgement.content import CACHED_VERSIONS, Content, ContentKey, key_of, read
from workers.judgement.models import Code, Text

POLICY_ERROR = "POLICY_ERROR"
MAX_EXPRESSION = 2_000
MAX_NESTING = 24

MAX_GROUP = 50
"""Rules that are run as one: when one of them raises, so many are run again."""

_GUARD: Any = re2.compile(
    r"\s*(event\.(?:type|kind) == '[a-z0-9_.]*'|'[A-Za-z0-9_]+' in event\.attributes|has\(event\.amount\)"
    r"|has\(risk\.score\))\s*&&"
)
_COMPREHENSION: Any = re2.compile(r"\b(?:all|exists|exists_one|map|filter)\b")
_PREFIXES: Any = re2.compile(r"[!-](?:\s*[!-]){7}")


class RuleTest(Content):
    """What a rule says of one event; what `event` leaves out is a plain event's, and `expect` is this rule's alone."""

    event: dict[str, Any] = Field(default_factory=dict)
    history: SubjectHistory = SubjectHistory()
    score: Annotated[float, Field(ge=0, le=100)] | None = None
    expect: Literal["PASS", "FAIL", "DENY"]


class Rule(Content):
    """One rule: what it says (`result`) when its expression is true, and the test cases that it must keep."""

    id: Annotated[str, Field(min_length=1, max_length=64, pattern=r"^[a-z0-9][a-z0-9_.-]*$")]
    when: Annotated[str, Field(min_length=1, max_length=MAX_EXPRESSION)]
    result: Literal["FAIL", "DENY"]
    code: Code
    text: Text
    tests: Annotated[tuple[RuleTest, ...], Field(max_length=32)] = ()


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


def check_policy(artifact: Artifact) -> None:
    """Load a policy and run the test cases of its rules. Raises InvalidModelStateError that names the failing one."""
    import cel  # late, as above

    for each in load_policy(artifact):
        for number, test in enumerate(each.rule.tests, 1):
            where = f"rule {each.rule.id}, test {number}"
            try:
                event = parse_event(_PLAIN_EVENT | test.event)
            except DomainValidationError as error:
                place = error.pointers[0] if error.pointers else ("", error.detail)
                raise InvalidModelStateError(f"{where}: its event is none at {place[0]}: {place[1]}") from None
            verdict = _verdict(each, cel.Context(variables(event, test.history, test.score)))
            said = "PASS" if verdict is None else verdict.result.value
            if said != test.expect or (verdict is not None and verdict.code == POLICY_ERROR):
                why = " (it raises)" if verdict is not None and verdict.code == POLICY_ERROR else ""
                raise InvalidModelStateError(f"{where} expects {test.expect}, and the rule says {said}{why}")


_PLAIN_EVENT: dict[str, Any] = {
    "kind": "risk",
    "type": "test",
    "occurred_at": "2026-01-01T00:00:00Z",
    "subject": {"type": "person", "id": "test"},
}


@dataclass(frozen=True, slots=True)
class RuleGroup:
    """Rules (by position) that are run as one; `guard` is the text of the test that all of them begin with."""

    guard: str
    places: tuple[int, ...]
    program: Any


@lru_cache(maxsize=CACHED_VERSIONS)
def _groups(key: ContentKey) -> tuple[RuleGroup, ...]:
    import cel  # late, as above

    by_guard: dict[str, list[int]] = {}
    rules = _load(key)
    for place, each in enumerate(rules):
        by_guard.setdefault(_guard(each.rule.when), []).append(place)
    groups = []
    for guard, members in by_guard.items():
        for start in range(0, len(members), MAX_GROUP):
            places = tuple(members[start : start + MAX_GROUP])
            # A line of its own ends a comment; each was compiled alone, so its brackets are its own.
            listed = ",".join(f"({rules[place].rule.when}\n)" for place in places)
            try:
                program = cel.compile(f"[{listed}]")
            except BaseException as error:  # noqa: BLE001 - `_only_cel` lets interrupts through
                _only_cel(error)
                program = None
            groups.append(RuleGroup(guard, places, program))
    return tuple(groups)


def _guard(expression: str) -> str:
    """The test that an expression begins with, when all of it is false whenever that test is; else ""."""
    found = _GUARD.match(expression)
    if found is None or "||" in expression or "?" in expression:
        return ""
    return str(found.group(1))


def _may_fire(guard: str, seen: dict[str, Any]) -> bool:
    event = seen["event"]
    if not guard:
        return True
    if guard.startswith("has(event.amount"):
        return "amount" in event
    if guard.startswith("has(risk.score"):
        return "score" in seen["risk"]
    literal = guard[guard.index("'") + 1 : guard.rindex("'")]
    if guard.startswith("'"):
        return literal in event["attributes"]
    return bool(event["type" if guard.startswith("event.type") else "kind"] == literal)


def evaluate_policy(artifact: Artifact, event: Event, history: SubjectHistory, score: float | None) -> PolicyVerdict:
    """The most severe result and every rule that fired. Raises InvalidModelStateError for unreadable content."""
    import cel  # late, as above

    key = key_of(artifact)
    rules, seen = _load(key), variables(event, history, score)
    context = cel.Context(seen)
    verdicts: list[tuple[int, RuleVerdict]] = []
    for group in _groups(key):
        if _may_fire(group.guard, seen):
            verdicts.extend(_run(group, rules, context))
    fired = tuple(verdict for _, verdict in sorted(verdicts, key=lambda each: each[0]))
    result = max((PolicyResult.PASS, *(verdict.result for verdict in fired)), key=POLICY_PRECEDENCE.index)
    return PolicyVerdict(result=result, rules=fired)


def _run(group: RuleGroup, rules: tuple[CompiledRule, ...], context: Any) -> Iterator[tuple[int, RuleVerdict]]:
    """The verdicts of a group's rules that did not stay silent; each alone when the group as a whole raises."""
    answers: Any = None
    if group.program is not None:
        try:
            answers = group.program.execute(context)
        except BaseException as error:  # noqa: BLE001 - `_only_cel` lets interrupts through
            _only_cel(error)
    if not isinstance(answers, list) or len(answers) != len(group.places):
        for place in group.places:
            verdict = _verdict(rules[place], context)
            if verdict is not None:
                yield place, verdict
    elif any(answer is not False for answer in answers):
        for place, answer in zip(group.places, answers, strict=True):
            if answer is not False:
                yield place, _said(rules[place].rule, answer)


def _said(rule: Rule, answer: Any) -> RuleVerdict:
    if answer is True:
        return RuleVerdict(rule=rule.id, result=PolicyResult(rule.result), code=rule.code)
    return RuleVerdict(rule=rule.id, result=PolicyResult.FAIL, code=POLICY_ERROR)


def _verdict(compiled: CompiledRule, context: Any) -> RuleVerdict | None:
    rule = compiled.rule
    try:
        fires = compiled.program.execute(context)
    except BaseException as error:  # noqa: BLE001 - `_only_cel` lets interrupts through
        _only_cel(error)
        return RuleVerdict(rule=rule.id, result=PolicyResult.FAIL, code=POLICY_ERROR)
    return None if fires is False else _said(rule, fires)


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
