"""What the database in memory promises by itself: all or nothing, one tenant at a time, and faults on request."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from contracts.failures import DatabaseError, UnexpectedError
from contracts.tenancy import TenantScope
from governance.memory import MemoryDatabase, Table, Transaction
from resilience.memory.time import SteppingClock

ACME, GLOBEX = TenantScope("acme"), TenantScope("globex")


@dataclass(frozen=True, slots=True)
class Row:
    tenant: str
    name: str
    mail: str | None = None
    colour: str = "red"


ROWS: Table[Row] = Table(
    "rows",
    key=lambda row: (row.tenant, row.name),
    tenant=lambda row: row.tenant,
    shared=True,
    unique={"mail": lambda row: None if row.mail is None else (row.mail,)},
    indexes={"colour": lambda row: (row.colour,)},
)


@pytest.fixture
def database() -> MemoryDatabase:
    return MemoryDatabase(SteppingClock())


def put(*rows: Row) -> Callable[[Transaction], None]:
    def work(tx: Transaction) -> None:
        for row in rows:
            tx.put(ROWS, row)

    return work


def test_a_row_is_found_by_key_and_index_and_gone_when_deleted(database: MemoryDatabase) -> None:
    one, two = Row("acme", "one"), Row("acme", "two", colour="blue")

    def work(tx: Transaction) -> None:
        put(one, two)(tx)
        assert (tx.get(ROWS, "acme", "one"), tx.get(ROWS, "acme", "three")) == (one, None)
        assert (tx.find(ROWS, "colour", "blue"), tx.find(ROWS, "colour", "green")) == ((two,), ())
        tx.put(ROWS, replace(two, colour="red"))
        assert tx.find(ROWS, "colour", "red") == (one, replace(two, colour="red"))
        assert tx.delete(ROWS, "acme", "one")
        assert not tx.delete(ROWS, "acme", "one")
        assert tx.find(ROWS, "colour", "red") == tx.rows(ROWS) == (replace(two, colour="red"),)

    database.apply([ACME], work)


def test_the_first_of_a_key_or_a_unique_value_stays(database: MemoryDatabase) -> None:
    def work(tx: Transaction) -> list[bool]:
        first = Row("acme", "one", "m@x")
        return [
            tx.insert(ROWS, first),
            tx.insert(ROWS, replace(first, colour="blue")),
            tx.insert(ROWS, replace(first, name="two")),
            tx.insert(ROWS, replace(first, name="two", mail=None)),
            tx.insert(ROWS, replace(first, name="three", mail=None)),
        ]

    assert database.apply([ACME], work) == [True, False, False, True, True]
    with pytest.raises(UnexpectedError, match="holds this mail already"):
        database.apply([ACME], put(Row("acme", "two", "m@x")))
    database.apply([ACME], put(Row("acme", "one", "n@x"), Row("acme", "two", "m@x")))  # freed, then taken
    assert [row.mail for row in database.contents(ROWS)] == ["n@x", "m@x", None]


def test_a_tenant_s_rows_are_seen_and_written_in_its_transactions_only(database: MemoryDatabase) -> None:
    database.apply([ACME, GLOBEX], put(Row("acme", "mine"), Row("globex", "theirs")))
    database.apply((), put(Row("*", "everybody's")), shared=True)

    def look(tx: Transaction) -> None:
        assert [row.name for row in tx.rows(ROWS)] == ["mine", "everybody's"]
        assert [row.name for row in tx.find(ROWS, "colour", "red")] == ["mine", "everybody's"]
        assert tx.get(ROWS, "globex", "theirs") is None
        assert not tx.delete(ROWS, "globex", "theirs")

    database.apply([ACME], look)
    for foreign in ("globex", "*", "_system"):
        with pytest.raises(UnexpectedError, match="its transaction was not for"):
            database.apply([ACME], put(Row(foreign, "new")))
    database.apply([None], put(Row("_system", "nobody's")))


@given(st.lists(st.tuples(st.sampled_from("pd"), st.sampled_from("abc"), st.sampled_from(["x", "y", None]))))
def test_what_fails_leaves_no_trace(steps: list[tuple[str, str, str | None]]) -> None:
    database = MemoryDatabase(SteppingClock())
    before = (Row("acme", "a", "x"), Row("acme", "b", "y", "blue"))
    database.apply([ACME], put(*before))

    def work(tx: Transaction) -> None:
        for kind, name, mail in steps:
            if kind == "d":
                tx.delete(ROWS, "acme", name)
            elif not tx.insert(ROWS, Row("acme", name, mail, "green")):
                old = tx.get(ROWS, "acme", name)
                if old is not None:
                    tx.put(ROWS, replace(old, colour="white", mail=None))
        raise KeyError

    with pytest.raises(KeyError):
        database.apply([ACME], work)

    def look(tx: Transaction) -> None:
        assert set(tx.rows(ROWS)) == set(before)
        assert tx.find(ROWS, "colour", "blue") == before[1:]
        assert [tx.find(ROWS, "colour", colour) for colour in ("green", "white")] == [(), ()]
        # Unique values are the old ones again: both are taken, and nothing else is.
        assert not tx.insert(ROWS, Row("acme", "d", "x"))
        assert not tx.insert(ROWS, Row("acme", "d", "y"))
        assert tx.insert(ROWS, Row("acme", "d", "z"))

    database.apply([ACME], look)


async def test_a_failure_applies_nothing_and_the_next_call_works(database: MemoryDatabase) -> None:
    database.fail_next(2)
    for _ in range(2):
        with pytest.raises(DatabaseError):
            await database.run([ACME], put(Row("acme", "one")))
        assert database.contents(ROWS) == ()
    await database.run([ACME], put(Row("acme", "one")))
    assert len(database.contents(ROWS)) == 1


async def test_a_lost_reply_has_been_applied(database: MemoryDatabase) -> None:
    database.fail_next(1)
    database.lose_replies(1)
    for applied in (0, 1):
        with pytest.raises(DatabaseError):
            await database.run([ACME], put(Row("acme", "one")))
        assert len(database.contents(ROWS)) == applied
    await database.run([ACME], put(Row("acme", "two")))


async def test_a_database_that_is_down_answers_nobody_until_it_is_up(database: MemoryDatabase) -> None:
    database.down = True
    database.lose_replies(1)
    for _ in range(3):
        with pytest.raises(DatabaseError):
            await database.run([ACME], put(Row("acme", "one")))
    database.apply([ACME], put(Row("acme", "prepared")))  # whoever sets the scene is not on the wire
    database.down = False
    with pytest.raises(DatabaseError):
        await database.run([ACME], put(Row("acme", "one")))
    assert len(database.contents(ROWS)) == 2


class DeadError(BaseException):
    """The process dies."""


@pytest.mark.parametrize(("after", "applied"), [(False, 0), (True, 1)])
async def test_a_process_may_die_on_either_side_of_the_commit(
    database: MemoryDatabase, after: bool, applied: int
) -> None:
    def die(transaction: Transaction) -> None:
        if "rows" in transaction.touched:
            raise DeadError

    if after:
        database.after_commit = die
    else:
        database.before_commit = die
    with pytest.raises(DeadError):
        await database.run([ACME], put(Row("acme", "one")))
    assert len(database.contents(ROWS)) == applied
    await database.run([ACME], lambda tx: tx.rows(ROWS))


async def test_others_run_on_the_way_there_and_back_and_never_in_between() -> None:
    log: list[str] = []

    async def wire() -> None:
        log.append("way")
        await asyncio.sleep(0)

    database = MemoryDatabase(SteppingClock(), wire)

    def work(name: str) -> Callable[[Transaction], None]:
        return lambda tx: log.append(name)

    await asyncio.gather(database.run([ACME], work("one")), database.run([ACME], work("two")))
    assert log == ["way", "way", "one", "way", "two", "way"]


async def test_a_call_cancelled_on_its_way_back_has_been_applied() -> None:
    database: MemoryDatabase
    turn = asyncio.Event()
    back = asyncio.Event()

    async def wire() -> None:
        if database.contents(ROWS):
            back.set()
            await turn.wait()

    database = MemoryDatabase(SteppingClock(), wire)
    call = asyncio.create_task(database.run([ACME], put(Row("acme", "one"))))
    await back.wait()
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    assert len(database.contents(ROWS)) == 1


def test_a_transaction_inside_another_is_a_defect(database: MemoryDatabase) -> None:
    with pytest.raises(UnexpectedError, match="inside another"):
        database.apply([ACME], lambda _: database.apply([ACME], put(Row("acme", "one"))))
    assert database.contents(ROWS) == ()
    database.apply([ACME], put(Row("acme", "one")))


def test_numbers_grow_and_are_not_given_again(database: MemoryDatabase) -> None:
    def take(tx: Transaction) -> tuple[int, int]:
        return tx.number, tx.next_number("s")

    def fail(tx: Transaction) -> None:
        take(tx)
        raise KeyError

    first = database.apply([ACME], take)
    with pytest.raises(KeyError):
        database.apply([ACME], fail)
    assert database.apply([ACME], take) == (first[0] + 2, first[1] + 2)
