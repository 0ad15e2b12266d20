"""The database in memory: every port that `governance.postgres` serves, with the same answers and no server.

For the embedded mode, the simulation and tests; one conformance suite per port runs against both. Promises nothing
across the end of the process.
"""

from governance.memory.audit import MemoryAuditLog
from governance.memory.database import MemoryDatabase, Table, Transaction
from governance.memory.directory import MemoryDirectory
from governance.memory.ledger import MemoryDecisionFeed, MemoryLedger
from governance.memory.letters import MemoryDeadLetters, MemoryLetterDesk
from governance.memory.records import MemoryLabelBook, MemoryOutbox, enqueue
from governance.memory.registry import MemoryRegistry

__all__ = [
    "MemoryAuditLog",
    "MemoryDatabase",
    "MemoryDeadLetters",
    "MemoryDecisionFeed",
    "MemoryDirectory",
    "MemoryLabelBook",
    "MemoryLedger",
    "MemoryLetterDesk",
    "MemoryOutbox",
    "MemoryRegistry",
    "Table",
    "Transaction",
    "enqueue",
]
