"""Challengers: stable, even, recorded, and never raising."""

from __future__ import annotations

import pytest

from contracts.events import parse_event
from contracts.failures import InvalidModelStateError
from contracts.ports import Artifact
from contracts.state import Pin, Shadow, SubjectHistory
from governance.trials import Seen, summed
from workers.judgement.rollout import Challenger, is_in, load_trial, shadow_of

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


def challenger(percent: float = 100, content: dict[str, object] | None = None, *, there: bool = True) -> Challenger:
    tried = model(CARD if content is None else content, f"tried-{content}")
    trial = {"type": "challenger", "rollout": "r", "percent": percent, "model": tried.pin.model_dump()}
    name = f"trial-{percent}-{tried.pin.digest}"
    return Challenger(
        load_trial(Artifact("trial", Pin(name="t", version=1, digest=name), trial)), tried if there else None
    )


def said(one: Challenger) -> Shadow | None:
    return shadow_of(one, "acme", EVENT, SubjectHistory(), None, champion=30.0, bands=(40.0, 75.0))


def test_a_shadow_says_what_the_challenger_would_have_scored_and_whether_the_band_differs() -> None:
    assert said(challenger()) == Shadow(rollout="r", version="tried-None@3", score=50.0, flips=True)
    low = challenger(content=CARD | {"base": 39})
    assert (said(low) or Shadow(rollout="", version="", score=0, flips=True)).flips is False
    assert said(challenger(0)) is None


@pytest.mark.parametrize("one", [challenger(content={"type": "x"}), challenger(there=False)], ids=["broken", "gone"])
def test_a_challenger_that_cannot_score_is_recorded_without_a_score(one: Challenger) -> None:
    shadow = said(one)
    assert shadow is not None
    assert (shadow.score, shadow.flips) == (None, True)


def test_trials_are_summed_by_rollout_and_version() -> None:
    told = summed(
        [
            Seen("b", "m@2", 10.0, 30.0, flips=True),
            Seen("b", "m@2", 20.0, 10.0, flips=False),
            Seen("b", "m@2", None, 5.0, flips=True),
            Seen("b", "m@2", 5.0, None, flips=True),
            Seen("a", "m@2", 1.0, 1.0, flips=False),
        ]
    )
    assert [(one.rollout, one.events, one.unscored, one.flips) for one in told] == [("a", 1, 0, 0), ("b", 4, 1, 3)]
    assert (told[1].mean_shift, told[1].largest_shift) == (5.0, 20.0)
    assert summed([]) == ()


@pytest.mark.parametrize("percent", [-1, 101, float("nan")])
def test_a_rollout_is_a_percentage(percent: float) -> None:
    with pytest.raises(InvalidModelStateError):
        challenger(percent)
