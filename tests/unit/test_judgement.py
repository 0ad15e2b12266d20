"""Scorecards, policies and guardrails: bounded, strict about content, and closed when they fail."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from contracts.events import Event, parse_event
from contracts.failures import InvalidModelStateError
from contracts.outcomes import PolicyResult
from contracts.ports import Artifact
from contracts.state import Pin, SubjectHistory, Thresholds
from contracts.velocity import EntityVelocity, Velocity
from workers.judgement.checks import Subject, load_guardrail, run_checks
from workers.judgement.models import load_model, score_event
from workers.judgement.policies import (
    POLICY_ERROR,
    VELOCITY_UNAVAILABLE,
    check_policy,
    evaluate_policy,
    load_policy,
)

DEFAULTS = Path(__file__).resolve().parents[2] / "governance" / "defaults"
HISTORY = SubjectHistory()
_DIGESTS = itertools.count()


def artifact(kind: str, content: Mapping[str, Any]) -> Artifact:
    """An artifact of its own digest, so that no test meets another one's cache."""
    return Artifact(kind, Pin(name="test", version=1, digest=f"judgement-{next(_DIGESTS)}"), content)


def default(name: str) -> Artifact:
    document = json.loads((DEFAULTS / name).read_text())
    return Artifact(document["kind"], Pin(name=document["name"], version=1, digest=name), document["content"])


def event(**fields: Any) -> Event:
    body: dict[str, Any] = {
        "kind": "risk",
        "type": "payment.card",
        "occurred_at": "2026-01-31T12:00:00Z",
        "subject": {"type": "person", "id": "p-1"},
    }
    return parse_event(body | fields)


def card(*factors: dict[str, Any], base: float = 0) -> Artifact:
    return artifact("model", {"type": "scorecard", "base": base, "factors": list(factors)})


def rules(*when: str, result: str = "DENY") -> Artifact:
    listed = [
        {"id": f"r{n}", "when": each, "result": result, "code": "RULE", "text": "a rule"} for n, each in enumerate(when)
    ]
    return artifact("policy", {"type": "cel", "rules": listed})


INCOME = {
    "feature": "attributes.income",
    "bins": [
        {"below": 100, "points": 30, "code": "LOW_INCOME", "text": "Low income"},
        {"below": 200, "points": 5, "code": "MID_INCOME", "text": "Middle income"},
        {"points": -10},
    ],
    "missing": {"points": 12, "code": "NO_INCOME", "text": "No income"},
}


@pytest.mark.parametrize(
    ("income", "score"),
    [(99.9, 50), (100, 25), (199, 25), (200, 10), (1e15, 10), (None, 32), ("rich", 50), (True, 50), ("", 50)],
)
def test_a_bin_begins_at_its_limit_and_nonsense_never_buys_a_better_score(income: Any, score: float) -> None:
    assert score_event(card(INCOME, base=20), event(attributes={"income": income}), HISTORY).score == score


def test_scores_are_clipped_and_reasons_are_what_raised_them_by_weight() -> None:
    named = {
        "feature": "attributes.records",
        "values": {"yes": {"points": 90, "code": "RECORDS", "text": "Records"}, "no": {"points": -5}},
        "missing": {"points": 0},
    }
    scored = score_event(card(INCOME, named), event(attributes={"income": 1, "records": "yes"}), HISTORY)
    assert scored.score == 100
    assert [(reason.code, reason.weight) for reason in scored.reasons] == [("RECORDS", 90), ("LOW_INCOME", 30)]
    assert score_event(card(INCOME, base=-50), event(attributes={"income": 500}), HISTORY).score == 0


def test_a_ratio_that_cannot_be_divided_counts_as_nonsense_and_an_absent_one_as_missing() -> None:
    ratio = INCOME | {"feature": "amount.value", "per": "attributes.price"}
    amount = {"value": "300", "currency": "EUR"}
    given_ = [({"price": 2}, 5), ({"price": 0}, 30), ({"price": "x"}, 30), ({}, 12)]
    scores = [score_event(card(ratio), event(amount=amount, attributes=each), HISTORY).score for each, _ in given_]
    assert scores == [score for _, score in given_]


@pytest.mark.parametrize(
    "content",
    [
        {},
        {"type": "pickle", "base": 0, "factors": []},
        {"type": "scorecard", "base": 0, "factors": []},
        {"type": "scorecard", "base": float("nan"), "factors": [INCOME]},
        {"type": "scorecard", "base": 0, "factors": [INCOME], "exec": "x"},
        {"type": "scorecard", "base": 0, "factors": [INCOME | {"feature": "subject.name"}]},
        {"type": "scorecard", "base": 0, "factors": [INCOME | {"bins": [{"below": 1, "points": 0}]}]},
        {"type": "scorecard", "base": 0, "factors": [INCOME], "calibration": {"method": "platt", "a": -1, "b": 0}},
        {
            "type": "scorecard",
            "base": 0,
            "factors": [
                INCOME | {"bins": [{"below": 2, "points": 0}, {"below": 1, "points": 0}, {"points": 0}]},
            ],
        },
    ],
)
def test_content_that_is_no_scorecard_is_refused(content: dict[str, Any]) -> None:
    with pytest.raises(InvalidModelStateError):
        load_model(artifact("model", content))


def test_policies_give_the_most_severe_result_and_every_rule_that_fired() -> None:
    policy = artifact(
        "policy",
        {
            "type": "cel",
            "rules": [
                {"id": "a", "when": "event.amount.value > 10.0", "result": "FAIL", "code": "A", "text": "a"},
                {"id": "b", "when": "risk.score >= 50.0", "result": "DENY", "code": "B", "text": "b"},
                {"id": "c", "when": "history.new_subject == false", "result": "DENY", "code": "C", "text": "c"},
            ],
        },
    )
    verdict = evaluate_policy(policy, event(amount={"value": "11", "currency": "EUR"}), HISTORY, 50)
    assert verdict.result is PolicyResult.DENY
    assert [(rule.rule, rule.result, rule.code) for rule in verdict.rules] == [("a", "FAIL", "A"), ("b", "DENY", "B")]


@pytest.mark.parametrize(
    "when",
    [
        "event.attributes.absent == 1.0",
        "event.attributes.name > 3.0",
        "event.attributes.nothing > 3.0",
        "risk.score > 1.0",
        "nosuch(1)",
        "1 / 0 == 1",
        "'a'.matches('(')",
        "'yes'",
        "null",
        "9223372036854775807 + 1 > 0",
    ],
)
def test_a_rule_that_cannot_be_evaluated_fails_closed(when: str) -> None:
    verdict = evaluate_policy(rules(when), event(attributes={"name": "n", "nothing": None}), HISTORY, None)
    assert (verdict.result, verdict.rules[0].code) == (PolicyResult.FAIL, POLICY_ERROR)


@pytest.mark.parametrize("guarded", ["has(event.attributes.x) && event.attributes.x > 1.0", "'x' in event.attributes"])
def test_a_rule_can_speak_of_an_attribute_that_may_be_absent(guarded: str) -> None:
    assert evaluate_policy(rules(guarded), event(), HISTORY, None).result is PolicyResult.PASS
    assert evaluate_policy(rules(guarded), event(attributes={"x": 2}), HISTORY, None).result is PolicyResult.DENY


NOTHING_SEEN = EntityVelocity(windows=((0, 0, 0.0, None, 0, 0),) * 5, labels=((0, 0),) * 3)
BUSY = EntityVelocity(windows=((3, 2, 30.0, 20.0, 1, 1), *((9, 4, 80.0, 50.0, 2, 2),) * 4), labels=((4, 1),) * 3)
KNOWN = Velocity(epoch="e", sequence=7, complete=True, subject=BUSY)


@pytest.mark.parametrize(
    ("when", "fires"),
    [
        ("velocity.subject.count_10m >= 3.0", True),
        ("velocity.subject.count_10m > 3.0", False),
        ("event.type == 'x' && velocity.subject.count_10m >= 3.0", False),
        ("velocity.subject.mean_10m == 15.0 && velocity.subject.max_1h == 50.0", True),
        ("velocity.subject.fraud_rate_7d * 4.0 == 1.0", True),
        ("velocity.subject.distinct_attribute_1d + velocity.subject.distinct_1d == 4.0", True),
        ("has(velocity.counterparty) && velocity.counterparty.count_1d > 0.0", False),
        ("'velocity' in event.attributes || event.attributes.velocity == 1.0", True),
    ],
)
def test_rules_read_the_velocity_by_the_features_names(when: str, fires: bool) -> None:
    said = evaluate_policy(rules(when), event(attributes={"velocity": 1}), HISTORY, None, KNOWN)
    assert said.result is (PolicyResult.DENY if fires else PolicyResult.PASS)


def test_what_an_entity_does_not_have_is_not_there() -> None:
    quiet = KNOWN.model_copy(update={"subject": NOTHING_SEEN, "counterparty": BUSY})
    guarded = rules(
        "has(velocity.subject.mean_1h) && velocity.subject.mean_1h > 0.0", "velocity.counterparty.sum_1h > 1.0"
    )
    said = evaluate_policy(guarded, event(), HISTORY, None, quiet)
    assert [rule.result for rule in said.rules] == [PolicyResult.DENY]
    bare = evaluate_policy(rules("velocity.subject.mean_1h > 0.0"), event(), HISTORY, None, quiet)
    assert [rule.code for rule in bare.rules] == [POLICY_ERROR]


@pytest.mark.parametrize("lost", [None, KNOWN.model_copy(update={"complete": False})], ids=["none", "lost"])
@pytest.mark.parametrize(
    "when",
    ["velocity.subject.count_1h > 100.0", "has(velocity.subject.mean_1h) && false", "has(velocity.counterparty)"],
)
def test_no_guard_lets_an_event_pass_whose_velocity_is_not_known(when: str, lost: Velocity | None) -> None:
    said = evaluate_policy(rules(when, "event.type == 'nothing'"), event(), HISTORY, None, lost)
    assert [(rule.result, rule.code) for rule in said.rules] == [(PolicyResult.FAIL, VELOCITY_UNAVAILABLE)]
    # A rule that is false whatever the velocity is says nothing of it.
    elsewhere = rules(f"event.type == 'nothing' && {when}")
    assert evaluate_policy(elsewhere, event(), HISTORY, None, lost).result is PolicyResult.PASS


@pytest.mark.parametrize(
    "when",
    [
        "velocity.subject.count_2h > 1.0",
        "velocity.account.count_1h > 1.0",
        "velocity['subject'].count_1h > 1.0",
        "velocity == velocity",
        "[velocity].exists(v, v.subject.count_1h > 1.0)",
    ],
)
def test_a_velocity_that_is_none_is_refused_with_the_policy(when: str) -> None:
    with pytest.raises(InvalidModelStateError, match="velocity"):
        load_policy(rules(when))


def test_a_rules_own_tests_say_what_was_seen() -> None:
    when = "velocity.subject.count_1h >= 5.0 && has(velocity.counterparty) && velocity.counterparty.sum_1d > 9.0"
    busy = {"subject": {"count_1h": 5}, "counterparty": {"sum_1d": 10}}
    rule = {"id": "r", "when": when, "result": "DENY", "code": "R", "text": "r"}

    def policy(*tests: dict[str, Any]) -> Artifact:
        return artifact("policy", {"type": "cel", "rules": [rule | {"tests": list(tests)}]})

    check_policy(policy({"velocity": busy, "expect": "DENY"}, {"expect": "PASS"}))
    with pytest.raises(InvalidModelStateError, match="rule r, test 1 expects PASS"):
        check_policy(policy({"velocity": busy, "expect": "PASS"}))
    with pytest.raises(InvalidModelStateError, match=r"subject\.count_2h"):
        check_policy(policy({"velocity": {"subject": {"count_2h": 5}}, "expect": "PASS"}))


@pytest.mark.parametrize("number", [100, 100.0])
def test_whole_and_broken_numbers_mean_the_same_in_a_rule(number: float) -> None:
    policy = rules("event.attributes.x * 2.0 >= 200.0")
    assert evaluate_policy(policy, event(attributes={"x": number}), HISTORY, None).result is PolicyResult.DENY


@pytest.mark.parametrize(
    "when",
    [
        "true && " * 300 + "true",
        "(" * 25 + "true" + ")" * 25,
        "!" * 40 + "true",
        "true" + " ? true : true" * 30,
        "[1,2].all(a, [1,2].all(b, a < b))",
        "event.",
        "true; false",
    ],
)
def test_expressions_that_are_long_deep_nested_loops_or_not_cel_are_refused(when: str) -> None:
    with pytest.raises(InvalidModelStateError):
        load_policy(rules(when))


def test_ten_rules_cost_less_than_two_milliseconds_an_event() -> None:
    policy = rules(*(f"has(event.amount) && event.amount.value > {n}000000.0" for n in range(1, 11)))
    loan = event(amount={"value": "10", "currency": "EUR"}, attributes={f"a{n}": n for n in range(20)})
    evaluate_policy(policy, loan, HISTORY, 1)
    best = min(_seconds(policy, loan) for _ in range(20))
    assert best < 0.002


def _seconds(policy: Artifact, loan: Event) -> float:
    started = time.perf_counter()
    evaluate_policy(policy, loan, HISTORY, 1)
    return time.perf_counter() - started


def checks_of(content: dict[str, Any] | None, subject: Subject) -> dict[str, tuple[str, str | None]]:
    guardrail = None if content is None else load_guardrail(artifact("guardrail", {"type": "checks"} | content))
    ticks = itertools.count()
    return {
        check.check: (check.verdict, check.code)
        for check in run_checks(guardrail, subject, lambda: next(ticks) * 0.0012346)
        if check.latency_ms == 1.235
    }


def test_limits_are_the_tenants_even_without_a_guardrail() -> None:
    rich = event(risk_score=91, amount={"value": "-500.01", "currency": "EUR"})
    seen = checks_of(None, Subject(rich, 90, Thresholds(hard_limit=90, amount_limit="500")))
    assert seen == {
        "score_limit": ("fail", "SCORE_LIMIT"),
        "prior_limit": ("fail", "HIGH_RISK"),
        "amount_limit": ("fail", "AMOUNT_LIMIT"),
    }
    calm = checks_of(None, Subject(event(risk_score=90), 89.99, Thresholds(hard_limit=90, amount_limit="500")))
    assert {verdict for verdict, _ in calm.values()} == {"pass"}


def test_a_check_that_raises_is_an_error_and_never_a_pass() -> None:
    paid = event(amount={"value": "1", "currency": "EUR"})
    seen = checks_of({"score_limit": 50}, Subject(paid, None, Thresholds(amount_limit="a lot")))
    assert {seen[name] for name in ("score_limit", "amount_limit", "guardrail_score_limit")} == {
        ("error", "CHECK_ERROR")
    }


@pytest.mark.parametrize(
    ("fields", "verdict"),
    [
        ({"text": "well\nforbidden word"}, "fail"),
        ({"attributes": {"note": "FORBIDDEN  WORD"}}, "fail"),
        ({"subject": {"type": "person", "id": "x", "name": "Forbidden Word"}}, "fail"),
        ({"text": "fine", "attributes": {"forbidden": "word"}}, "pass"),
        ({"attributes": {f"a{n}": "x" * 4096 for n in range(17)}}, "error"),
    ],
)
def test_blocked_patterns_look_at_text_attributes_and_names_up_to_a_cap(fields: dict[str, Any], verdict: str) -> None:
    pattern = {"id": "word", "pattern": r"(?i)forbidden\s+word", "code": "WORD"}
    seen = checks_of({"patterns": [pattern]}, Subject(event(**fields), 1, Thresholds()))
    assert seen["pattern:word"][0] == verdict


@pytest.mark.parametrize("pattern", ["(", "(?=look)", "(a{1000}){1000}", "x" * 513])
def test_patterns_that_are_not_re2_are_refused(pattern: str) -> None:
    with pytest.raises(InvalidModelStateError):
        load_guardrail(
            artifact("guardrail", {"type": "checks", "patterns": [{"id": "p", "pattern": pattern, "code": "P"}]})
        )


def test_a_quadratic_pattern_stays_linear() -> None:
    content = {"patterns": [{"id": "slow", "pattern": "(a|aa)+$", "code": "SLOW"}]}
    started = time.perf_counter()
    checks_of(content, Subject(event(text="a" * 8000 + "b"), 1, Thresholds()))
    assert time.perf_counter() - started < 1


AWKWARD = st.text("aZ0 \n-.é漢\u202e'\"", max_size=40)
SCALARS = st.none() | st.booleans() | st.integers(-(2**53), 2**53) | AWKWARD | st.floats(width=64)


@settings(deadline=None)
@given(
    attributes=st.dictionaries(
        st.sampled_from(["income", "records", "age", "job", "home", "price", "pep", "channel"]), SCALARS
    ),
    kind=st.sampled_from(["loan.application", "payment.card"]),
)
def test_malformed_attributes_never_raise_in_the_default_artifacts(attributes: dict[str, Any], kind: str) -> None:
    malformed = event(type=kind, attributes=attributes, regulatory_flags=[])
    for name in ("model-loan.json", "model-base.json"):
        assert 0 <= score_event(default(name), malformed, HISTORY).score <= 100
    for name in ("policy-risk.json", "policy-compliance.json"):
        assert evaluate_policy(default(name), malformed, HISTORY, None).result in PolicyResult
    guardrail = load_guardrail(default("guardrail-base.json"))
    assert all(check.verdict for check in run_checks(guardrail, Subject(malformed, 1, Thresholds()), lambda: 0.0))


@pytest.mark.parametrize("path", sorted(DEFAULTS.glob("*.json")), ids=lambda path: path.stem)
def test_default_artifacts_say_what_they_are_for_and_load(path: Path) -> None:
    document = json.loads(path.read_text())
    loaders: dict[str, Any] = {"model": load_model, "policy": load_policy, "guardrail": load_guardrail}
    assert document["purpose"]
    assert document["limitations"]
    assert document["use"] in {"credit", "fraud", "aml"}
    assert all(scope.split(":")[0] in {"risk", "compliance"} for scope in document["scopes"])
    assert loaders[document["kind"]](default(path.name))
