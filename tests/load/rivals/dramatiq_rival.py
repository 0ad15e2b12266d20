"""Dramatiq over RabbitMQ: one actor, each step sends the next.

Acks after the step: at least once. Persistent messages, publisher confirms; its queues are classic durable ones (it has
no quorum queues by default: cheaper than ours, and said in the table). One process per core with four threads each.
"""

from __future__ import annotations

import dramatiq
from dramatiq.brokers.rabbitmq import RabbitmqBroker
from steps import RABBITMQ, STEPS, command, step

dramatiq.set_broker(RabbitmqBroker(url=RABBITMQ, confirm_delivery=True))


@dramatiq.actor(queue_name="steps", max_retries=3)
def run(number: int, event_id: str) -> None:
    step(STEPS[number], event_id)
    if number + 1 < len(STEPS):
        run.send(number + 1, event_id)


if __name__ == "__main__":
    command(lambda event_id: run.send(0, event_id))
