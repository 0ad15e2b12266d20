"""Publishes one event over AMQP and consumes its decision from a queue of the tenant's own.

Needs `pip install pika`, and the variables AMQP_URL (the tenant's own broker user) and TENANT.
"""

import json
import os
import sys
import time
from datetime import UTC, datetime

import pika


def main() -> None:
    """Bind first, publish with confirms, then read until the decision of this event comes."""
    tenant, parameters = os.environ["TENANT"], pika.URLParameters(os.environ["AMQP_URL"])
    message_id = sys.argv[1] if len(sys.argv) > 1 else f"python-{time.time_ns()}"
    event = {
        "type": "payment.card",
        "occurred_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "subject": {"type": "customer", "id": "c-1001"},
        "amount": {"value": "129.90", "currency": "EUR"},
    }
    with pika.BlockingConnection(parameters) as connection:
        channel = connection.channel()
        queue = f"up.{tenant}.decisions"
        channel.queue_declare(queue, durable=True)
        for exchange in ("risk.decisions", "risk.rejected"):
            channel.queue_bind(queue, exchange, f"{tenant}.#")
        channel.confirm_delivery()
        properties = pika.BasicProperties(
            message_id=message_id,
            correlation_id=message_id,
            user_id=parameters.credentials.username,  # the broker checks it: nobody can speak for another tenant
            content_type="application/json",
            delivery_mode=2,
        )
        channel.basic_publish("risk.ingest", f"{tenant}.risk", json.dumps(event), properties, mandatory=True)
        for method, answer, body in channel.consume(queue, inactivity_timeout=30):
            if method is None:
                raise SystemExit("no decision within 30 s")
            channel.basic_ack(method.delivery_tag)
            if answer.correlation_id == message_id:
                found = json.loads(body)
                sys.stdout.write(f"{found['event_id']} {found.get('outcome', found.get('type'))}\n")
                return


if __name__ == "__main__":
    main()
