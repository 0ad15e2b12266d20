"""Tables in memory with transactions: the ground of the embedded mode, of the simulation and of tests.

Promises: a transaction is applied as a whole or not at all, and runs alone, because it is one synchronous function:
nobody sees it half done. It sees the rows of the tenants that it was opened for, as on the server. The same calls give
the same rows: no clock, chance or id of its own. What a server does to its callers (not answering, failing a
transaction, applying one whose reply is lost) happens on request. One event loop uses it; nothing outlives the process.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Generic, TypeVar

from contracts.failures import DatabaseError, UnexpectedError
from contracts.identity import EVERYWHERE
from contracts.ports import Clock
from contracts.tenancy import TenantScope
from governance.audit import chain_of

R = TypeVar("R")
T = TypeVar("T")
Key = tuple[Hashable, ...]

_NOBODY: Final = frozenset[str]()


@dataclass(frozen=True, slots=True, eq=False)
class Table(Generic[R]):
    """The shape of a table; rows are frozen values. Two tables of one name are two tables.

    `tenant` names the owner of a row, who alone sees it; without it everybody does. `shared`: everybody also reads
    rows of tenant "*". `unique` holds what else must differ between rows (None: nothing to compare), `indexes` what
    rows are found by.
    """

    name: str
    key: Callable[[R], Key]
    tenant: Callable[[R], str] | None = None
    shared: bool = False
    unique: Mapping[str, Callable[[R], Key | None]] = field(default_factory=dict)
    indexes: Mapping[str, Callable[[R], Key | None]] = field(default_factory=dict)


class _Store(Generic[R]):
    """The rows of one table, in order of insertion, with what they are found by."""

    __slots__ = ("groups", "rows", "table", "taken")

    def __init__(self, table: Table[R]) -> None:
        self.table = table
        self.rows: dict[Key, R] = {}
        self.taken: dict[str, dict[Key, Key]] = {name: {} for name in table.unique}
        self.groups: dict[str, dict[Key, dict[Key, None]]] = {name: {} for name in table.indexes}

    def conflict(self, row: R) -> str | None:
        """The name of a unique constraint that another row than the one of this key already fills."""
        key = self.table.key(row)
        for name, value_of in self.table.unique.items():
            value = value_of(row)
            if value is not None and self.taken[name].get(value, key) != key:
                return name
        return None

    def place(self, key: Key, row: R | None) -> R | None:
        """Put a row (None: nothing) under a key; returns what was there."""
        old = self.rows.get(key)
        if old is not None:
            for name, value_of in self.table.unique.items():
                if (value := value_of(old)) is not None:
                    del self.taken[name][value]
            for name, value_of in self.table.indexes.items():
                if (value := value_of(old)) is not None:
                    del self.groups[name][value][key]
        if row is None:
            self.rows.pop(key, None)
            return old
        self.rows[key] = row
        for name, value_of in self.table.unique.items():
            if (value := value_of(row)) is not None:
                self.taken[name][value] = key
        for name, value_of in self.table.indexes.items():
            if (value := value_of(row)) is not None:
                self.groups[name].setdefault(value, {})[key] = None
        return old


class Transaction:
    """What one piece of work sees and changes. `number` grows from transaction to transaction."""

    __slots__ = ("_changes", "_database", "_tenants", "number")

    def __init__(self, database: MemoryDatabase, tenants: frozenset[str], number: int) -> None:
        self._database = database
        self._tenants = tenants
        self._changes: list[tuple[_Store[Any], Key, Any]] = []
        self.number = number

    @property
    def touched(self) -> frozenset[str]:
        """The names of the tables that were written."""
        return frozenset(store.table.name for store, _, _ in self._changes)

    def get(self, table: Table[R], *key: Hashable) -> R | None:
        """The row with this primary key, if there is one and it may be seen."""
        row = self._database.store(table).rows.get(key)
        return row if row is not None and self._sees(table, row) else None

    def rows(self, table: Table[R]) -> tuple[R, ...]:
        """Every row that may be seen, in order of insertion."""
        return tuple(row for row in self._database.store(table).rows.values() if self._sees(table, row))

    def find(self, table: Table[R], index: str, *value: Hashable) -> tuple[R, ...]:
        """The rows with this value of an index that may be seen."""
        store = self._database.store(table)
        rows = (store.rows[key] for key in store.groups[index].get(value, ()))
        return tuple(row for row in rows if self._sees(table, row))

    def insert(self, table: Table[R], row: R) -> bool:
        """Add a row; False, and no change, when its primary key or a unique value is taken."""
        store, key = self._database.store(table), table.key(row)
        self._check_owner(table, row)
        if key in store.rows or store.conflict(row) is not None:
            return False
        self._place(store, key, row)
        return True

    def put(self, table: Table[R], row: R) -> None:
        """Add a row, or replace the one of its primary key.

        Raises UnexpectedError when a unique value is taken: ask before, nothing can come between.
        """
        store, key = self._database.store(table), table.key(row)
        self._check_owner(table, row)
        if (name := store.conflict(row)) is not None:
            raise UnexpectedError(f"table {table.name} holds this {name} already")
        self._place(store, key, row)

    def delete(self, table: Table[R], *key: Hashable) -> bool:
        """Remove a row; False when there is none that may be seen."""
        if self.get(table, *key) is None:
            return False
        self._place(self._database.store(table), key, None)
        return True

    def next_number(self, sequence: str) -> int:
        """The next number of a sequence, from 1; one that a failed transaction took is not given again."""
        return self._database.next_number(sequence)

    def undo(self) -> None:
        """Take every change back, the last one first."""
        while self._changes:
            store, key, old = self._changes.pop()
            store.place(key, old)

    def _place(self, store: _Store[R], key: Key, row: R | None) -> None:
        self._changes.append((store, key, store.place(key, row)))

    def _sees(self, table: Table[R], row: R) -> bool:
        owner = None if table.tenant is None else table.tenant(row)
        return owner is None or owner in self._tenants or (table.shared and owner == EVERYWHERE)

    def _check_owner(self, table: Table[R], row: R) -> None:
        if table.tenant is not None and table.tenant(row) not in self._tenants:
            raise UnexpectedError(f"a row of table {table.name} belongs to a tenant that its transaction was not for")


class MemoryDatabase:
    """Tables and their transactions. `clock` is the time of the adapters that stand on it.

    `wire` is awaited on the way to every transaction and on the way back: where a simulation lets others run or the
    time pass; a task that is cancelled there does not know whether its transaction was applied. `before_commit` sees
    a transaction whose work is done: raising takes everything back. `after_commit` raising loses the reply only.
    """

    def __init__(self, clock: Clock, wire: Callable[[], Awaitable[None]] | None = None) -> None:
        self.clock = clock
        self.wire = wire
        self.down = False
        self.before_commit: Callable[[Transaction], None] | None = None
        self.after_commit: Callable[[Transaction], None] | None = None
        self._stores: dict[Table[Any], _Store[Any]] = {}
        self._numbers: dict[str, int] = {}
        self._failing = 0
        self._losing = 0
        self._open = False

    def fail_next(self, calls: int) -> None:
        """The next calls apply nothing and raise DatabaseError."""
        self._failing = calls

    def lose_replies(self, calls: int) -> None:
        """The next calls (after those that fail) are applied and raise DatabaseError all the same."""
        self._losing = calls

    async def run(
        self, scopes: Iterable[TenantScope | None], work: Callable[[Transaction], T], *, shared: bool = False
    ) -> T:
        """The result of `work` in one transaction that sees exactly these tenants (None: the system chain).

        `shared`: it may also write what every tenant uses (tenant "*"). Raises DatabaseError for every fault.
        """
        await self._pass()
        if self.down:
            raise DatabaseError("the database in memory is down: its owner set `down`")
        failing, self._failing = self._failing > 0, max(self._failing - 1, 0)
        losing = not failing and self._losing > 0
        self._losing -= losing

        def commit(transaction: Transaction) -> None:
            if failing:
                raise DatabaseError("the transaction was not applied: its owner asked for a failure")
            if self.before_commit is not None:
                self.before_commit(transaction)

        transaction, result = self._transact(scopes, work, shared, commit)
        if self.after_commit is not None:
            self.after_commit(transaction)
        if losing:
            raise DatabaseError("the transaction was applied and its reply lost: its owner asked for it")
        await self._pass()
        return result

    def apply(
        self, scopes: Iterable[TenantScope | None], work: Callable[[Transaction], T], *, shared: bool = False
    ) -> T:
        """`run` without a way to the server: at once, and no fault meets it."""
        return self._transact(scopes, work, shared, lambda _: None)[1]

    def contents(self, table: Table[R]) -> tuple[R, ...]:
        """Every row of a table, whoever owns it, in order of insertion: for checkers."""
        return tuple(self.store(table).rows.values())

    def store(self, table: Table[R]) -> _Store[R]:
        """Where a table's rows are kept."""
        found = self._stores.get(table)
        if found is None:
            found = self._stores[table] = _Store(table)
        return found

    def next_number(self, sequence: str) -> int:
        """The next number of a sequence, from 1; one that a failed transaction took is not given again."""
        self._numbers[sequence] = self._numbers.get(sequence, 0) + 1
        return self._numbers[sequence]

    async def _pass(self) -> None:
        if self.wire is not None:
            await self.wire()

    def _transact(
        self,
        scopes: Iterable[TenantScope | None],
        work: Callable[[Transaction], T],
        shared: bool,
        commit: Callable[[Transaction], None],
    ) -> tuple[Transaction, T]:
        if self._open:
            raise UnexpectedError("a transaction began inside another one: its work must use the one it was given")
        tenants = frozenset(chain_of(scope) for scope in scopes) | (frozenset({EVERYWHERE}) if shared else _NOBODY)
        transaction = Transaction(self, tenants, self.next_number("transaction"))
        self._open = True
        try:
            result = work(transaction)
            commit(transaction)
        except BaseException:
            transaction.undo()
            raise
        finally:
            self._open = False
        return transaction, result
