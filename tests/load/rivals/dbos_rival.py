"""DBOS: a workflow of four steps in PostgreSQL, without a message broker.

Every step's result is checkpointed, so a workflow goes on where it was. One process with a queue of 32 workflows at a
time, polled ten times a second; its system database is the same PostgreSQL.
"""

from __future__ import annotations

import sys
import threading

from dbos import DBOS, DBOSClient
from steps import DATABASE, STEPS, command, step

_CONFIG = {"name": "rival", "system_database_url": DATABASE, "log_level": "ERROR", "run_admin_server": False}


@DBOS.step()
def run_step(name: str, event_id: str) -> None:
    step(name, event_id)


@DBOS.workflow()
def flow(event_id: str) -> None:
    for name in STEPS:
        run_step(name, event_id)


if __name__ == "__main__":
    if sys.argv[1] == "worker":
        DBOS(config=_CONFIG)
        DBOS.listen_queues(["steps"])
        DBOS.launch()
        DBOS.register_queue("steps", worker_concurrency=32, polling_interval_sec=0.1)
        threading.Event().wait()
    else:
        if sys.argv[1] == "fill":
            DBOS(config=_CONFIG)
            DBOS.launch()  # makes its tables
            DBOS.register_queue("steps", worker_concurrency=32, polling_interval_sec=0.1)
            DBOS.destroy()
        client = DBOSClient(system_database_url=DATABASE)
        command(lambda event_id: client.enqueue({"queue_name": "steps", "workflow_name": "flow"}, event_id))
