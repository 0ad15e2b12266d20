"""The one door to PostgreSQL: adapters of the ports Ledger, Registry, AuditLog, DeadLetters and Directory.

Promises: every transaction sees exactly the tenants that it was opened for, rows are touched in one order
everywhere, and every failure of the server arrives as a DatabaseError. Makes no table: `deploy.migrations` does.

A name is imported when it is first asked for: a worker of one stage does not pay for the adapters of the operator API.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncEngine

    from governance.audit import AuditReport
    from governance.postgres.audit import PostgresAuditLog
    from governance.postgres.deadletters import PostgresDeadLetters
    from governance.postgres.directory import (
        PostgresDirectory,
        create_api_key,
        create_first_admin,
        create_tenant,
        has_users,
        tenant_ids,
    )
    from governance.postgres.engine import (
        UnsafeDatabaseError,
        check_settings,
        create_engine,
        dispose,
        insert_and_roll_back,
        ping,
        transaction,
    )
    from governance.postgres.ledger import PostgresLedger
    from governance.postgres.letters import PostgresLetterDesk
    from governance.postgres.registry import PostgresRegistry
    from governance.postgres.reports import Counts, EventSummary, counts, event_summary

__all__ = [
    "AsyncEngine",
    "AuditReport",
    "Counts",
    "EventSummary",
    "PostgresAuditLog",
    "PostgresDeadLetters",
    "PostgresDirectory",
    "PostgresLedger",
    "PostgresLetterDesk",
    "PostgresRegistry",
    "UnsafeDatabaseError",
    "check_settings",
    "counts",
    "create_api_key",
    "create_engine",
    "create_first_admin",
    "create_tenant",
    "dispose",
    "event_summary",
    "has_users",
    "insert_and_roll_back",
    "ping",
    "tenant_ids",
    "transaction",
]

_FROM: Final = {
    "sqlalchemy.ext.asyncio": "AsyncEngine",
    "governance.audit": "AuditReport",
    "governance.postgres.audit": "PostgresAuditLog",
    "governance.postgres.deadletters": "PostgresDeadLetters",
    "governance.postgres.directory": "PostgresDirectory create_api_key create_first_admin create_tenant has_users "
    "tenant_ids",
    "governance.postgres.engine": "UnsafeDatabaseError check_settings create_engine dispose insert_and_roll_back ping "
    "transaction",
    "governance.postgres.ledger": "PostgresLedger",
    "governance.postgres.letters": "PostgresLetterDesk",
    "governance.postgres.registry": "PostgresRegistry",
    "governance.postgres.reports": "Counts EventSummary counts event_summary",
}


def __getattr__(name: str) -> Any:
    for module, its_names in _FROM.items():
        if name in its_names.split():
            return getattr(import_module(module), name)
    raise AttributeError(f"{__name__} has no {name}")
