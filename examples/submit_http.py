"""Submits one event over HTTP and waits for its decision.

Needs `pip install httpx`, and the variables GATEWAY (http://127.0.0.1:8080) and API_KEY.
"""

import os
import sys
import time
from datetime import UTC, datetime

import httpx


def main() -> None:
    """Send, wait up to 10 s, else ask until the decision is there."""
    event = {
        "id": sys.argv[1] if len(sys.argv) > 1 else f"python-{time.time_ns()}",
        "type": "payment.card",
        "occurred_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "subject": {"type": "customer", "id": "c-1001"},
        "amount": {"value": "129.90", "currency": "EUR"},
    }
    headers = {"Authorization": f"Bearer {os.environ['API_KEY']}", "Prefer": "wait=10"}
    base = os.environ.get("GATEWAY", "http://127.0.0.1:8080")
    with httpx.Client(base_url=base, headers=headers, timeout=20) as client:
        answer = client.post("/v1/risk", json=event)
        # 503 means "not known to be accepted": repeating the same id is always safe.
        while answer.status_code == 503:
            time.sleep(1)
            answer = client.post("/v1/risk", json=event)
        answer.raise_for_status()
        found = answer.json()
        while "decision" not in found:
            time.sleep(0.5)
            found = client.get(f"/v1/events/{found['event_id']}").raise_for_status().json()
    decision = found["decision"]
    sys.stdout.write(f"{decision['event_id']} {decision['outcome']} {decision['score']}\n")


if __name__ == "__main__":
    main()
