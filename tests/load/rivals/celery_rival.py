"""Celery over RabbitMQ: one task per step, each sends the next.

acks_late and reject_on_worker_lost: at least once. Quorum queues, persistent messages, publisher confirms. No result
backend. Prefork with two processes per core, because a step waits for PostgreSQL; prefetch 16 per process.
"""

from __future__ import annotations

import os

from celery import Celery
from kombu import Queue
from steps import RABBITMQ, STEPS, command, step

app = Celery("rival", broker=RABBITMQ)
app.conf.update(
    task_acks_late=True,
    task_reject_on_worker_lost=True,
    task_ignore_result=True,
    task_store_errors_even_if_ignored=False,
    worker_prefetch_multiplier=16,
    worker_concurrency=2 * (os.cpu_count() or 2),
    worker_send_task_events=False,
    worker_enable_remote_control=False,
    worker_detect_quorum_queues=True,
    broker_transport_options={"confirm_publish": True},
    broker_connection_retry_on_startup=True,
    broker_pool_limit=2,
    task_default_queue="steps",
    task_queues=[Queue("steps", queue_arguments={"x-queue-type": "quorum"})],
    task_default_delivery_mode="persistent",
)


@app.task(name="step")
def run(number: int, event_id: str) -> None:
    step(STEPS[number], event_id)
    if number + 1 < len(STEPS):
        run.delay(number + 1, event_id)


if __name__ == "__main__":
    command(lambda event_id: run.delay(0, event_id))
