"""A stored decision is made again from its pinned versions: the same bytes, or every place that differs."""

from __future__ import annotations

import random
from typing import Any, cast

import orjson
import pytest

from contracts.codec import state_from_bytes
from contracts.ports import Ledger, Registry
from contracts.state import EventState
from contracts.topology import Stage
from tests.unit.test_stages import CONTENT, MODEL, POLICY, OneTenant, moved, new_state, ports
from workers.pipeline import PIPELINE
from workers.redecision import Redecision, redecide
from workers.stages.decision import DecisionFacts


async def decided(one: OneTenant, kind: str = "risk", facts: DecisionFacts | None = None, **fields: Any) -> EventState:
    """A state that went through every stage, at a pace of its own."""
    state, chance = new_state(kind, **fields), random.Random(7)
    for functions in PIPELINE[kind]:
        found = (await functions.gather([state], ports(one)))[0]
        if functions.stage is Stage.DECISION and facts is not None:
            found = facts
        at = f"2026-01-31T12:00:0{state.n + 2}Z"
        state = moved(state, functions.decide(state, found, at, chance.random), functions.stage)
    return state


async def again(state: EventState, one: OneTenant, data: bytes | None = None) -> Redecision:
    stored = [(state.event_id, data if data is not None else state.to_bytes())]
    (answer,) = await redecide(stored, cast("Registry", one), cast("Ledger", one))
    return answer


@pytest.mark.parametrize("kind", ["risk", "compliance"])
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"attributes": {"x": 5}},
        {"text": "a bad text"},
        {"risk_score": 95.0},
        {"corrects": "c" * 32, "amount": {"value": "12.50", "currency": "EUR"}},
    ],
)
async def test_a_decision_comes_out_as_the_same_bytes(kind: str, fields: dict[str, Any]) -> None:
    one = OneTenant()
    state = await decided(one, kind, **fields)
    answer = await again(state, one)
    assert answer.identical
    assert answer.outcome_then == answer.outcome_now == cast("Any", state.decided).decision.outcome


async def test_what_was_known_only_at_the_end_is_taken_from_the_decision() -> None:
    one = OneTenant()
    facts = DecisionFacts(revoked=("model",), corrected_revision=3, halted=True)
    assert (await again(await decided(one, corrects="c" * 32, facts=facts), one)).identical


async def test_a_version_that_is_gone_and_one_that_says_something_else_are_seen(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    one = OneTenant()
    state = await decided(one, attributes={"x": 5})
    one.broken = MODEL.digest
    lost = await again(state, one)
    assert not lost.identical
    assert (lost.outcome_then, lost.outcome_now) == ("REJECTED", "REQUIRE_APPROVAL")
    assert "/validated/score" in {one.pointer for one in lost.differences}
    one.broken = None
    harmless = dict(CONTENT[POLICY.digest], rules=[])
    monkeypatch.setitem(CONTENT, POLICY.digest, harmless)
    from workers.judgement import policies

    for name in vars(policies).values():
        getattr(name, "cache_clear", lambda: None)()
    other = await again(state, one)
    assert {one.pointer for one in other.differences} >= {"/validated/policy/result", "/digest"}


async def test_a_stored_state_that_was_changed_is_seen() -> None:
    one = OneTenant()
    state = await decided(one, attributes={"x": 5})
    document = orjson.loads(state.to_bytes())
    document["decided"]["decision"]["outcome"] = "APPROVED"
    changed = await again(state, one, orjson.dumps(document, option=orjson.OPT_SORT_KEYS))
    assert (changed.outcome_then, changed.outcome_now) == ("APPROVED", "REJECTED")
    assert [(d.then, d.now) for d in changed.differences] == [("APPROVED", "REJECTED")]
    spaced = await again(state, one, orjson.dumps(orjson.loads(state.to_bytes()), option=orjson.OPT_INDENT_2))
    assert not spaced.identical


@pytest.mark.parametrize("data", [b"", b"{}", b"[1]", new_state().to_bytes()])
async def test_what_holds_no_decision_is_a_problem_and_no_answer(data: bytes) -> None:
    answer = await again(new_state(), OneTenant(), data)
    assert answer.problem
    assert not answer.identical


@pytest.mark.parametrize("n", range(5))
async def test_a_rewound_state_is_the_version_that_it_was(n: int) -> None:
    whole = await decided(OneTenant(), text="a bad text")
    back = whole.rewound(n)
    assert (back.n, back.digest) == (n, whole.steps[n]["digest"])
    assert state_from_bytes(back.to_bytes()) == back
    if n == 0:
        assert back.to_bytes() == new_state(text="a bad text").to_bytes()
    if n == 4:
        assert back.to_bytes() == whole.to_bytes()
    for wrong in (-1, n + 1):
        with pytest.raises(ValueError, match="did not come through"):
            back.rewound(wrong)
