"""Policies: CEL expressions over the event, its history, its velocity and its score. A rule fires when it is true.

Variables: `event` {kind, type, subject {type}, amount? {value, currency}, attributes, risk_score?,
text_length, regulatory_flags [{code, level}]}, `history` {events_1d, events_30d, amount_30d,
new_subject}, `risk` {score?}, and `velocity` {subject, counterparty?} with the features of
`workers.judgement.features`, a low line for each dot: `velocity.subject.count_1h`. What is absent is not there: write
`has(event.amount) && …`, `'x' in event.attributes && …` or `has(velocity.counterparty) && …`. Every number is a double,
so that 100 and 100.0 mean the same: write arithmetic with double literals (`event.amount.value * 2.0`).

Promises: a rule that raises, or gives something that is not a bool, is FAIL with POLICY_ERROR; a rule about a velocity
that is not known as a whole is FAIL with VELOCITY_UNAVAILABLE, however it is guarded. Work
is bounded: length, nesting, number of rules, and one comprehension (`all`, `exists`, …) an expression. A rule may bring
its own test cases, which `check_policy` runs before a version is submitted.

For speed a rule is not run when a plain test at its beginning (`event.type == 'x'`, `has(event.amount)`,
`'x' in event.attributes`, `event.amount.value > 10.0`, …) is false for this event, and nothing before that test could
raise: then the rule is false by CEL's own rules. Tests that cannot be told here are left to CEL.
"""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Mapping, Sequence
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
from contracts.velocity import SIDES, Velocity
from workers.judgement.content import CACHED_VERSIONS, Content, ContentKey, key_of, read
from workers.judgement.features import VELOCITY_FEATURES, velocity_value
from workers.judgement.models import Code, Text

POLICY_ERROR = "POLICY_ERROR"
VELOCITY_UNAVAILABLE = "VELOCITY_UNAVAILABLE"
MAX_EXPRESSION = 2_000
MAX_NESTING = 24

_PATH = r"(?:event|history|risk|velocity)(?:\.[A-Za-z_][A-Za-z0-9_]*){1,3}"
_ATOMS: Any = re2.compile(
    r"(?:has\(((?:event|history|risk|event\.attributes)\.[A-Za-z_][A-Za-z0-9_]*)\)"
    r"|'([A-Za-z0-9_]+)' in event\.attributes"
    rf"|({_PATH}) (==|!=|<|<=|>|>=) (?:'([^'\\]*)'|(-?[0-9]+\.[0-9]+)))"
)
_COMPREHENSION: Any = re2.compile(r"\b(?:all|exists|exists_one|map|filter)\b")
_VELOCITY = {name.replace(".", "_").replace("_", ".", 1): name for name in VELOCITY_FEATURES}
"""What a rule writes after `velocity.`, and the feature that it is."""
_MAY_BE_ABSENT = ("", "mean", "max", "fraud_rate")
_SPOKEN_OF = re.compile(r"(?<![\w.'])velocity\b((?:\.\w+)*)")
_PREFIXES: Any = re2.compile(r"[!-](?:\s*[!-]){7}")


class RuleTest(Content):
    """What a rule says of one event; what `event` leaves out is a plain event's, and `expect` is this rule's alone.

    `velocity`: numbers by entity and name (`{"subject": {"count_1h": 7}}`). A subject's count, sum or distinct that is
    left out is 0, a mean, maximum or rate is not there, and neither is a counterparty.
    """

    event: dict[str, Any] = Field(default_factory=dict)
    history: SubjectHistory = SubjectHistory()
    velocity: dict[Literal["subject", "counterparty"], dict[str, float]] = Field(default_factory=dict)
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
    """A rule, its CEL program, the plain tests it begins with, and the velocities (`subject.count_1h`) it names."""

    rule: Rule
    program: Any
    atoms: tuple[Atom, ...] = ()
    velocities: tuple[str, ...] = ()


def load_policy(artifact: Artifact) -> tuple[CompiledRule, ...]:
    """The rules of an artifact, compiled once per digest. Raises InvalidModelStateError when one is not CEL."""
    return _load(key_of(artifact))


@lru_cache(maxsize=CACHED_VERSIONS)
def _load(key: ContentKey) -> tuple[CompiledRule, ...]:
    rules = read(PolicySet, key).rules
    if len({rule.id for rule in rules}) != len(rules):
        raise InvalidModelStateError(f"{key.name} has two rules of one id")
    return tuple(
        CompiledRule(rule, _compile(rule, key.name), atoms_of(rule.when), _velocities(rule, key.name)) for rule in rules
    )


@lru_cache(maxsize=CACHED_VERSIONS)
def _named(key: ContentKey) -> tuple[str, ...]:
    """Every velocity that some rule names."""
    return tuple(dict.fromkeys(name for each in _load(key) for name in each.velocities))


def _velocities(rule: Rule, name: str) -> tuple[str, ...]:
    """The velocities that a rule names. Raises InvalidModelStateError for one that is none, or a way around names."""
    found = []
    for path in _SPOKEN_OF.findall(rule.when):
        if path[1:] not in _VELOCITY and path[1:] not in SIDES:
            raise InvalidModelStateError(
                f"{name}: rule {rule.id} speaks of velocity{path[:64]}; write velocity.subject.count_1h and the like"
            )
        found.append(path[1:])
    return tuple(found)


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
            seen = variables(event, test.history, test.score) | {"velocity": _tested(test, each.velocities, where)}
            verdict = _verdict(each, cel.Context(seen))
            said = "PASS" if verdict is None else verdict.result.value
            if said != test.expect or (verdict is not None and verdict.code == POLICY_ERROR):
                why = " (it raises)" if verdict is not None and verdict.code == POLICY_ERROR else ""
                raise InvalidModelStateError(f"{where} expects {test.expect}, and the rule says {said}{why}")


def _tested(test: RuleTest, named: Sequence[str], where: str) -> dict[str, dict[str, float]]:
    """The velocity of a test case."""
    given = {f"{side}.{name}": float(value) for side, part in test.velocity.items() for name, value in part.items()}
    unknown = [name for name in given if name not in _VELOCITY]
    if unknown:
        raise InvalidModelStateError(f"{where}: its velocity {unknown[0][:64]} is none")
    nothing = {name: 0.0 for name in named if name.startswith("subject.") and _kind(name) not in _MAY_BE_ABSENT}
    seen: dict[str, dict[str, float]] = {side: {} for side in ("subject", *test.velocity)}
    for path, value in (nothing | given).items():
        side, _, name = path.partition(".")
        seen[side][name] = value
    return seen


def _kind(name: str) -> str:
    return _VELOCITY[name].split(".")[1] if name in _VELOCITY else ""


_PLAIN_EVENT: dict[str, Any] = {
    "kind": "risk",
    "type": "test",
    "occurred_at": "2026-01-01T00:00:00Z",
    "subject": {"type": "person", "id": "test"},
}


@dataclass(frozen=True, slots=True)
class Atom:
    """A plain test: `path` is there (compare "has"), or compares with `literal`."""

    path: str
    compare: str
    literal: str | float = ""


@dataclass(frozen=True, slots=True)
class Family:
    """Tests of one path that differ in their literal only, sorted by it; `places` are all rules behind them."""

    path: str
    compare: str
    kind: type
    literals: tuple[Any, ...]
    nodes: tuple[Node, ...]
    places: tuple[int, ...]

    def true_for(self, value: Any) -> tuple[Node, ...]:
        """The nodes whose test is true for a value of the family's own type."""
        low, high = bisect_left(self.literals, value), bisect_right(self.literals, value)
        match self.compare:
            case "==":
                return self.nodes[low:high]
            case "!=":
                return self.nodes[:low] + self.nodes[high:]
            case "<":
                return self.nodes[high:]
            case "<=":
                return self.nodes[low:]
            case ">":
                return self.nodes[:low]
            case _:
                return self.nodes[:high]


@dataclass(frozen=True, slots=True)
class Node:
    """Rules (by position) whose plain tests are all true here, and the tests that other rules make next."""

    places: tuple[int, ...]
    families: tuple[Family, ...]


def _node(rules: Sequence[tuple[int, tuple[Atom, ...]]]) -> Node:
    by_family: dict[tuple[str, str, type], dict[str | float, list[tuple[int, tuple[Atom, ...]]]]] = {}
    for place, atoms in rules:
        if atoms:
            key = (atoms[0].path, atoms[0].compare, type(atoms[0].literal))
            by_family.setdefault(key, {}).setdefault(atoms[0].literal, []).append((place, atoms[1:]))
    families = []
    for (path, compare, kind), members in by_family.items():
        literals = tuple(sorted(members, key=lambda literal: (str(literal), 0.0) if kind is str else ("", literal)))
        nodes = tuple(_node(members[literal]) for literal in literals)
        places = tuple(place for listed in members.values() for place, _ in listed)
        families.append(Family(path, compare, kind, literals, nodes, places))
    return Node(tuple(place for place, atoms in rules if not atoms), tuple(families))


def _to_run(node: Node, values: Mapping[str, Any]) -> Iterator[int]:
    """The rules that are not known to be false, in no order."""
    yield from node.places
    for family in node.families:
        value = values.get(family.path, _ABSENT)
        if family.compare == "has":
            if value is not _ABSENT:
                yield from _to_run(family.nodes[0], values)
        elif type(value) is not family.kind:
            yield from family.places  # absent or of another type: CEL says what that means
        else:
            for each in family.true_for(value):
                yield from _to_run(each, values)


@lru_cache(maxsize=CACHED_VERSIONS)
def _index(key: ContentKey) -> Node:
    return _node([(place, each.atoms) for place, each in enumerate(_load(key))])


def atoms_of(expression: str) -> tuple[Atom, ...]:
    """The plain tests that an expression begins with, when it is nothing but tests joined by &&; else none."""
    if any(mark in expression for mark in ("||", "?", "//", '"', "[", "{", "\\")):
        return ()
    found = []
    for part in expression.split("&&"):
        matched = _ATOMS.fullmatch(part.strip())
        if matched is None:
            break
        there, attribute, path, compare, text, number = matched.groups()
        if there is not None or attribute is not None:
            found.append(Atom(there or f"event.attributes.{attribute}", "has"))
        else:
            if text is not None and compare not in ("==", "!="):
                break
            found.append(Atom(path, compare, float(number) if text is None else text))
    # What is split inside a bracket or a string is no test of its own: then this is not the simple form.
    rest = expression.replace("has(", "").count("(")
    return () if rest or any(part.count("'") % 2 for part in expression.split("&&")) else tuple(found)


_ABSENT = object()


def _flat(seen: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in seen.items():
        if "." in name:
            continue  # an attribute of such a name is no path
        yield prefix + name, value
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")


def evaluate_policy(
    artifact: Artifact, event: Event, history: SubjectHistory, score: float | None, velocity: Velocity | None = None
) -> PolicyVerdict:
    """The most severe result and every rule that fired. Raises InvalidModelStateError for unreadable content."""
    import cel  # late, as above

    key = key_of(artifact)
    rules, seen = _load(key), variables(event, history, score)
    if (named := _named(key)) and velocity is not None and velocity.complete:
        seen["velocity"] = _velocity(velocity, named)
    places = sorted(_to_run(_index(key), dict(_flat(seen))))
    context = cel.Context(seen) if places else None  # making one is most of what a quiet policy would cost
    whole = "velocity" in seen
    fired = tuple(verdict for place in places if (verdict := _verdict(rules[place], context, whole=whole)) is not None)
    result = max((PolicyResult.PASS, *(verdict.result for verdict in fired)), key=POLICY_PRECEDENCE.index)
    return PolicyVerdict(result=result, rules=fired)


def _said(rule: Rule, answer: Any) -> RuleVerdict:
    if answer is True:
        return RuleVerdict(rule=rule.id, result=PolicyResult(rule.result), code=rule.code)
    return RuleVerdict(rule=rule.id, result=PolicyResult.FAIL, code=POLICY_ERROR)


def _verdict(compiled: CompiledRule, context: Any, *, whole: bool = True) -> RuleVerdict | None:
    """What a rule says, None when it does not fire. `whole`: the velocity is known."""
    rule = compiled.rule
    if compiled.velocities and not whole:
        return RuleVerdict(rule=rule.id, result=PolicyResult.FAIL, code=VELOCITY_UNAVAILABLE)
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


def _velocity(velocity: Velocity, named: Sequence[str]) -> dict[str, dict[str, float]]:
    """The velocities that are named, by entity; what an event does not have is left out."""
    seen: dict[str, dict[str, float]] = {"subject": {}}
    if velocity.counterparty is not None:
        seen["counterparty"] = {}
    for path in named:
        side, _, name = path.partition(".")
        value = velocity_value(_VELOCITY[path], velocity) if name else None
        if value is not None:
            seen[side][name] = float(value)
    return seen


def _plain(value: str | bool | float | None) -> str | bool | float | None:
    if value is None or isinstance(value, str | bool):
        return value
    return float(value)


def _only_cel(error: BaseException) -> None:
    """Let interrupts through; a panic of the interpreter is not an Exception, but is one for us."""
    if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
        raise error
