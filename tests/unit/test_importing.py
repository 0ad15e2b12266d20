"""Past events come in once, whatever is repeated, and stay when the feature state is lost."""

from __future__ import annotations

from pathlib import Path

import orjson
import pytest

from contracts.events import event_id_of, parse_event
from contracts.failures import DomainValidationError
from contracts.tenancy import TenantScope
from contracts.velocity import DAY_MS, FRAUD, Sighting, pack, party_digest, sighting_of
from contracts.velocity import ImportedPart as Part
from deploy import importing
from deploy.importing import import_file
from governance.memory import MemoryDatabase
from governance.memory.past import MemoryPast
from resilience.memory import CountingIds, MemoryFeatureStore, MemoryRedis, SteppingClock
from workers.velocity import HealingFeatures

ACME = TenantScope("acme")
COLUMNS = {
    "id": "TX",
    "occurred_at": "AT",
    "subject.type": ":customer",
    "subject.id": "WHO",
    "counterparty.type": ":terminal",
    "counterparty.id": "WHERE",
    "amount.value": "SUM",
    "amount.currency": ":EUR",
    "label": "FRAUD",
}


class Parts:
    def __init__(self) -> None:
        clock = SteppingClock()
        self.server = MemoryRedis(clock)
        self.store, self.past = MemoryFeatureStore(self.server, CountingIds()), MemoryPast(MemoryDatabase(clock))

    async def load(self, file: Path, columns: dict[str, str] | None = None) -> int:
        return await import_file(ACME, file, columns or {}, self.store, self.past)

    def samples(self, customer: str) -> list[tuple[bytes, float, int, int]]:
        key = ACME.velocity_key("subject", party_digest("customer", customer))
        return [(s[1], s[3], s[5], s[6] - s[0] if s[5] else 0) for s in self.server.samples.get(key, ())]


def table(tmp_path: Path, rows: int, wrong: str | None = None) -> Path:
    file = tmp_path / "past.csv"
    lines = [f"{n},2018-07-01 00:00:{n:02},7,{n % 3},{n}.50,{int(n == 2)}" for n in range(rows)]
    file.write_text("\n".join(["TX,AT,WHO,WHERE,SUM,FRAUD", *lines, *([wrong] if wrong else [])]) + "\n")
    return file


async def test_a_table_is_loaded_by_a_map_of_its_columns(tmp_path: Path) -> None:
    parts = Parts()
    assert await parts.load(table(tmp_path, 3), COLUMNS) == 3
    ids = [bytes.fromhex(event_id_of(ACME, str(n))) for n in range(3)]
    assert parts.samples("7") == [(ids[0], 0.5, 0, 0), (ids[1], 1.5, 0, 0), (ids[2], 2.5, FRAUD, 7 * DAY_MS)]


async def test_lines_of_json_are_events_with_their_labels(tmp_path: Path) -> None:
    parts, file = Parts(), tmp_path / "past.ndjson"
    event: dict[str, object] = {"id": "a", "kind": "risk", "type": "login", "occurred_at": "2018-07-01T00:00:00Z"}
    event |= {"subject": {"type": "customer", "id": "7"}}
    label = {"label": "cleared", "effective_at": "2018-07-01T00:00:05Z"}
    file.write_bytes(orjson.dumps(event | {"label": label}) + b"\n\n" + orjson.dumps(event | {"id": "b"}))
    assert await parts.load(file) == 2
    assert [(verdict, known) for _, _, verdict, known in sorted(parts.samples("7"), key=lambda s: -s[2])] == [
        (1, 5_000),
        (0, 0),
    ]


async def test_an_import_goes_on_where_it_ended_and_a_repeat_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importing, "PART", 4)
    whole, cut = Parts(), Parts()
    file = table(tmp_path, 15)
    await whole.load(file, COLUMNS)
    merged = cut.store.merge

    async def dies(sightings: list[Sighting]) -> None:
        if len(await cut.past.imported(ACME, None, 9)) == 3:
            raise ConnectionAbortedError
        await merged(sightings)

    monkeypatch.setattr(cut.store, "merge", dies)
    with pytest.raises(ConnectionAbortedError):
        await cut.load(file, COLUMNS)
    assert len(cut.samples("7")) == 8
    monkeypatch.setattr(cut.store, "merge", merged)
    for _ in range(2):
        assert await cut.load(file, COLUMNS) == 15
        assert cut.server.samples == whole.server.samples
        assert len(await cut.past.imported(ACME, None, 9)) == 4


async def test_what_was_imported_is_rebuilt_after_a_flush_and_never_silently_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importing, "PART", 4)
    parts = Parts()
    await parts.load(table(tmp_path, 15), COLUMNS)
    before = dict(parts.server.samples)
    parts.server.flush()
    assert await HealingFeatures(parts.store, parts.past).rebuild(ACME)
    assert parts.server.samples == before


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ("x,yesterday,7,1,1.00,0", "event 4: .*occurred_at"),
        ("x,2018-07-01 00:00:00,7,1,NaN,0", "event 4: .*amount/value"),
        ("x,2018-07-01 00:00:00,7,1,1.00,maybe", "event 4: a label is 0, 1, or one of"),
        (",2018-07-01 00:00:00,7,1,1.00,0", "event 4: a past event needs its id"),
        ("x,2018-07-01 00:00:00,,1,1.00,0", "event 4: .*subject/id"),
    ],
)
async def test_a_line_that_is_no_event_ends_the_import_with_its_number(tmp_path: Path, wrong: str, said: str) -> None:
    with pytest.raises(DomainValidationError, match=said):
        await Parts().load(table(tmp_path, 3, wrong), COLUMNS)


async def test_a_column_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(DomainValidationError, match="no column NOWHERE"):
        await Parts().load(table(tmp_path, 1), COLUMNS | {"text": "NOWHERE"})
    with pytest.raises(DomainValidationError, match="--map"):
        await Parts().load(table(tmp_path, 1))


@pytest.mark.parametrize(
    "fields", [{}, {"counterparty": None}, {"amount": None}, {"occurred_at": "1999-02-03 04:05:06.5Z"}]
)
def test_the_fast_way_comes_to_what_the_events_model_comes_to(fields: dict[str, object]) -> None:
    document: dict[str, object] = {
        "id": "ü-1",
        "occurred_at": "2018-07-01T00:00:00Z",
        "subject": {"type": "customer", "id": "7"},
        "counterparty": {"type": "terminal", "id": "9"},
        "amount": {"value": "-12.345", "currency": "EUR"},
    }
    document = {name: value for name, value in (document | fields).items() if value is not None}
    fast = importing._plain(ACME, document)
    event = parse_event(document | {"kind": "risk", "type": "imported"})
    slow = sighting_of(ACME, event_id_of(ACME, "ü-1"), event, event.occurred, "device_id")
    assert fast is not None
    assert pack([fast[1]]) == pack([slow])


def test_packed_sightings_read_back() -> None:
    some = [
        Sighting(ACME, f"{n:032x}", 10 + n, f"{1:032x}", f"{2:032x}" if n else None, 1.5, b"EUR", b"attribut")
        for n in range(2)
    ]
    packed = pack(some)
    assert len(packed) == 170
    assert list(Part(ACME, "s", 0, packed).sightings()) == some
