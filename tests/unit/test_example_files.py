"""The files of `examples/` that need no server do what their pages say."""

from __future__ import annotations

from pathlib import Path

import orjson
import pytest

from contracts.events import Event, canonical_json
from contracts.outcomes import PolicyResult
from contracts.ports import Artifact
from contracts.state import Pin, SubjectHistory
from governance.registry import Draft, digest_of
from workers.judgement.policies import evaluate_policy

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "policy-large-payments.json"


@pytest.mark.parametrize(("amount", "result"), [("10000.00", PolicyResult.PASS), ("10000.01", PolicyResult.FAIL)])
def test_the_example_policy_asks_a_person_above_ten_thousand(amount: str, result: PolicyResult) -> None:
    draft = Draft.model_validate(orjson.loads(EXAMPLE.read_bytes()))
    content = canonical_json(draft.content)
    artifact = Artifact(draft.kind, Pin(name=draft.name, version=1, digest=digest_of(content)), draft.content)
    event = Event.model_validate(
        {
            "id": "e-1",
            "kind": "risk",
            "type": "payment.card",
            "occurred_at": "2026-01-31T12:00:00Z",
            "subject": {"type": "customer", "id": "c-1"},
            "amount": {"value": amount, "currency": "EUR"},
        }
    )
    history = SubjectHistory()
    assert evaluate_policy(artifact, event, history, None).result is result
