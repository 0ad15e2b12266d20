"""In-memory twins of the servers: the embedded mode, and the ground of simulation and tests.

Each twin passes the conformance suite that the real adapter passes (`tests/conformance`). Promises: no
thread, no wall clock and no chance of its own; time and the way to wait are injected. Does not promise
durability: everything is gone with the process.
"""

from resilience.memory.broker import Faults, MemoryBroker, MemoryPublisher, QueueDepth
from resilience.memory.consumer import MemoryConsumer
from resilience.memory.features import MemoryFeatureStore
from resilience.memory.replies import MemoryReplies
from resilience.memory.state_store import Cell, MemoryRedis, MemoryStateStore
from resilience.memory.time import CountingIds, SteppingClock

__all__ = [
    "Cell",
    "CountingIds",
    "Faults",
    "MemoryBroker",
    "MemoryConsumer",
    "MemoryFeatureStore",
    "MemoryPublisher",
    "MemoryRedis",
    "MemoryReplies",
    "MemoryStateStore",
    "QueueDepth",
    "SteppingClock",
]
