"""Challengers: stable, even, recorded, and never raising."""

from __future__ import annotations

import pytest

from contracts.events import parse_event
from contracts.ports import Artifact
from contracts.state import Pin, SubjectHistory
from workers.judgement.rollout import Challenger, Shadow, is_in, report, shadows

EVENT = parse_event(
    {
        "kind": "risk",
        "type": "payment.card",
        "occurred_at": "2026-01-31T12:00:00Z",
        "subject": {"type": "person", "id": "p-1"},
    }
)
CARD = {
    "type": "scorecard",
    "base": 50,
    "factors": [{"feature": "risk_score", "bins": [{"points": 0}], "missing": {"points": 0}}],
}

RECORDED = [0, 3, 4, 18, 20]


def model(content: dict[str, object], name: str) -> Artifact:
    return Artifact("model", Pin(name=name, version=3, digest=f"rollout-{name}"), content)


def test_a_percentage_is_met_and_a_larger_one_keeps_everybody_of_a_smaller_one() -> None:
    people = [f"p-{n}" for n in range(20_000)]
    inside = {percent: {one for one in people if is_in(percent, "try", "acme", one)} for percent in (0, 5, 20, 100)}
    assert [len(inside[0]), len(inside[100])] == [0, 20_000]
    assert len(inside[5]) == pytest.approx(1_000, rel=0.1)
    assert inside[5] < inside[20]


def test_the_side_of_a_subject_never_changes_between_releases() -> None:
    assert [n for n in range(30) if is_in(20, "try", "acme", f"p-{n}")] == RECORDED


def test_another_rollout_takes_other_people() -> None:
    one, two = ({n for n in range(5_000) if is_in(10, name, "acme", f"p-{n}")} for name in ("a", "b"))
    assert len(one & two) == pytest.approx(50, abs=35)


def test_shadows_are_recorded_and_a_broken_challenger_is_one_without_a_score() -> None:
    tried = [Challenger(model(CARD, "calm"), "r1", 100), Challenger(model({"type": "x"}, "broken"), "r2", 100)]
    tried.append(Challenger(model(CARD, "nobody"), "r3", 0))
    seen = shadows(tried, "acme", EVENT, SubjectHistory(), 30.0, (40.0, 75.0))
    assert seen == (Shadow("r1", "calm@3", 50.0, flips=True), Shadow("r2", "broken@3", None, flips=True))
    told = report([(30.0, each) for each in seen])
    assert (told["calm@3"].mean_shift, told["calm@3"].flips, told["broken@3"].unscored) == (20.0, 1, 1)


@pytest.mark.parametrize("percent", [-1, 101, float("nan")])
def test_a_rollout_is_a_percentage(percent: float) -> None:
    with pytest.raises(ValueError, match="percentage"):
        Challenger(model(CARD, "calm"), "r", percent)
