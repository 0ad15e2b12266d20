"""A candidate in the place of what decided: everything else is as it was then, and what differs is its doing."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import orjson
import pytest

from contracts.failures import MalformedBodyError
from contracts.ports import Artifact, Ledger, Registry
from contracts.state import Pin
from deploy.cli_backtest import read_candidate
from deploy.settings import SettingsError
from tests.unit.test_redecision import decided
from tests.unit.test_stages import CONTENT, MODEL, POLICY, OneTenant
from workers.backtest import Compared, Quality, backtest, summed


def candidate(kind: str, content: dict[str, Any]) -> Artifact:
    return Artifact(kind, Pin(name="new", version=0, digest=f"backtest-{kind}-{content}"), content)


STRICT = candidate(
    "policy",
    {
        "type": "cel",
        "rules": [
            {"id": "all", "when": "event.type == 'payment.card'", "result": "DENY", "code": "ALL", "text": "all"}
        ],
    },
)
HIGH = candidate("model", {**CONTENT[MODEL.digest], "base": 60})


async def compared(one: OneTenant, *candidates: Artifact) -> list[Compared]:
    states = [await decided(one), await decided(one, attributes={"x": 5}), await decided(one, text="a bad text")]
    stored = [(f"event-{n}", state.to_bytes()) for n, state in enumerate(states)]
    return await backtest(stored, candidates, cast("Registry", one), cast("Ledger", one))


async def test_what_decided_itself_flips_nothing() -> None:
    same = Artifact("policy", POLICY, CONTENT[POLICY.digest])
    found = await compared(OneTenant(), same)
    assert [one.flips for one in found] == [False] * 3
    assert [one.problem for one in found] == [""] * 3


async def test_a_rule_that_denies_all_flips_what_was_not_rejected() -> None:
    found = await compared(OneTenant(), STRICT)
    assert [(one.outcome_then, one.outcome_now) for one in found] == [
        ("APPROVED", "REJECTED"),
        ("REJECTED", "REJECTED"),
        ("REQUIRE_APPROVAL", "REJECTED"),
    ]
    assert [(sorted(one.rules_then), sorted(one.rules_now)) for one in found] == [
        ([], ["all"]),
        (["deny"], ["all"]),
        ([], ["all"]),
    ]
    assert {one.score_then for one in found} == {one.score_now for one in found}


async def test_two_candidates_decide_together_and_the_scores_are_compared() -> None:
    found = await compared(OneTenant(), STRICT, HIGH)
    assert [one.score_now for one in found] == [60.0, 100.0, 60.0]
    report = summed(found, {"event-0": True, "event-1": False})
    assert (report.events, report.flips, report.problems) == (3, 2, 0)
    assert report.mean_shift == pytest.approx(100 / 3, abs=0.01)
    assert report.largest_shift == 40.0
    assert report.rules == {"all": (0, 3), "deny": (1, 0)}
    assert report.segments == {"risk:payment.card": (3, 2)}
    assert (report.labelled, report.before, report.after) == (2, Quality(0.0, 0.0), Quality(0.5, 1.0))


async def test_what_cannot_be_decided_again_is_counted_and_says_nothing_else() -> None:
    one = OneTenant()
    found = await backtest([("e", b"{}")], [STRICT], cast("Registry", one), cast("Ledger", one))
    assert found[0].problem
    report = summed(found, {"e": True})
    assert (report.events, report.problems, report.labelled, report.outcomes) == (0, 1, 0, {})
    assert report.before == Quality(None, None)


def test_a_candidate_is_read_as_it_would_be_submitted(tmp_path: Path) -> None:
    def written(document: Any) -> Path:
        path = tmp_path / "candidate.json"
        path.write_bytes(orjson.dumps(document))
        return path

    good = {"kind": "policy", "name": "strict", "content": STRICT.content}
    artifact = read_candidate(written(good))
    assert (artifact.kind, artifact.pin.name, artifact.pin.version) == ("policy", "strict", 0)
    for wrong, error, words in (
        ([], MalformedBodyError, "no version"),
        ({"kind": "policy", "name": "x"}, MalformedBodyError, "no version"),
        (good | {"kind": "prompt"}, SettingsError, "decides nothing"),
        (good | {"content": {"type": "cel", "rules": []}}, MalformedBodyError, "could not be submitted"),
    ):
        with pytest.raises(error, match=words):
            read_candidate(written(wrong))
    bad = tmp_path / "bad.json"
    bad.write_bytes(b"{")
    with pytest.raises(MalformedBodyError, match="no version"):
        read_candidate(bad)
