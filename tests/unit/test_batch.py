"""Batch bodies: items come out as they were sent, in order, and only what has no end refuses its neighbours."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from contracts.failures import DomainValidationError, MalformedBodyError, OversizedBodyError, RiskfleetError
from deploy.submit import read_events
from gateway.batch import (
    MAX_BATCH_BYTES,
    MAX_ITEMS,
    ColumnMap,
    csv_documents,
    split_csv,
    split_json_array,
    split_ndjson,
)

# --- JSON arrays ------------------------------------------------------------------------------------

json_values: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text('",[]{}\\:ä\n '),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text('",[]{}\\:', max_size=4), inner, max_size=4),
    max_leaves=12,
)


@settings(deadline=None)
@given(
    st.lists(json_values, min_size=1, max_size=8), st.sampled_from([(",", ":"), (" , ", " : ")]), st.sampled_from("\n ")
)
def test_the_elements_of_any_array_are_found_as_they_were_written(
    values: list[object], separators: tuple[str, str], padding: str
) -> None:
    texts = [json.dumps(value, separators=separators).encode() for value in values]
    body = (
        f"{padding}[{padding}".encode() + f"{padding},{padding}".encode().join(texts) + f"{padding}]{padding}".encode()
    )
    assert split_json_array(body) == texts


BAD_ELEMENTS = [
    b"NaN",
    b'{"a":1,"a":2}',
    b'"\\ud800"',
    b"nonsense here",
    b"{]",
    b"{'a':1}",
    b'{"a":\xff}',
    b"[" * 40 + b"]" * 40,
    b'"' + b"x" * 70_000 + b'"',
    b"1 2",
    b'"\\u0000"',
    b"\xef\xbb\xbf{}",
    b"// comment",
]


def test_an_element_that_is_bad_json_comes_out_alone_and_unchanged() -> None:
    elements = [element for bad in BAD_ELEMENTS for element in (bad, b'{"id":"good, [really]"}')]
    assert split_json_array(b"[" + b",".join(elements) + b"]") == elements


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"", "not a JSON array"),
        (b"{}", "not a JSON array"),
        (b'"[1]"', "not a JSON array"),
        (b"\xef\xbb\xbf[1]", "not a JSON array"),
        ("[1]".encode("utf-16"), "not a JSON array"),
        (b"[", "never closed"),
        (b"[1", "never closed"),
        (b'["a]', "never closed"),
        (b'["a\\"]', "never closed"),
        (b'["a\\', "never closed"),
        (b'[{"a":1,{"b":2}]', "never closed"),
        (b"[1]]", "behind its end"),
        (b"[1]x", "behind its end"),
        (b"[1],", "behind its end"),
        (b"[1}", "behind its end"),
        (b"[{}},{}]", "behind its end"),
        (b"[1,,2]", "missing"),
        (b"[,1]", "missing"),
        (b"[1,]", "missing"),
        (b"[1, ]", "missing"),
        (b"[,]", "missing"),
    ],
)
def test_an_array_without_a_clear_structure_is_refused_whole(body: bytes, says: str) -> None:
    with pytest.raises(MalformedBodyError, match=says):
        split_json_array(body)


@settings(deadline=None)
@given(st.binary(max_size=60) | st.text('[]{},"\\1 ', max_size=60).map(str.encode))
def test_any_bytes_are_split_or_refused(body: bytes) -> None:
    try:
        elements = split_json_array(body)
    except DomainValidationError:
        return
    assert all(element == element.strip(b" \t\r\n") != b"" for element in elements)
    assert body.strip(b" \t\r\n")[1:-1].replace(b" ", b"") == b",".join(elements).replace(b" ", b"")


def test_a_batch_holds_at_least_one_event_and_at_most_a_thousand() -> None:
    for empty in (b"[]", b" [ \n] "):
        with pytest.raises(DomainValidationError, match="empty"):
            split_json_array(empty)
    for nothing in (b"", b"\r\n \n"):
        with pytest.raises(DomainValidationError, match="empty"):
            split_ndjson(nothing)
    with pytest.raises(DomainValidationError, match="empty"):
        split_csv(b"a,b\n", ["id=a"])
    full = [b"{}"] * MAX_ITEMS
    assert split_json_array(b"[" + b",".join(full) + b"]") == full
    assert split_ndjson(b"\n".join(full)) == full
    assert len(split_csv(b"a\n" + b"x\n" * MAX_ITEMS, ["id=a"])) == MAX_ITEMS
    more = [*full, b"{}"]
    for split in (
        lambda: split_json_array(b"[" + b",".join(more) + b"]"),
        lambda: split_ndjson(b"\n".join(more)),
        lambda: split_csv(b"a\n" + b"x\n" * len(more), ["id=a"]),
    ):
        with pytest.raises(DomainValidationError, match="more than 1,000"):
            split()


def test_five_mebibytes_are_read_and_a_byte_more_is_not() -> None:
    body = b"[" + b" " * (MAX_BATCH_BYTES - 3) + b"1]"
    assert split_json_array(body) == [b"1"]
    with pytest.raises(OversizedBodyError, match="5,242,880"):
        split_json_array(body + b" ")
    with pytest.raises(OversizedBodyError):
        split_ndjson(body + b" ")
    with pytest.raises(OversizedBodyError):
        split_csv(body + b" ", ["id=a"])


def test_brackets_by_the_hundred_thousand_are_no_batch_of_events_and_a_full_batch_is_far_from_that() -> None:
    with pytest.raises(MalformedBodyError, match="more brackets"):
        split_json_array(b"[[" + b"[[]]," * 150_000 + b"1]]")
    flags = json.dumps([{"code": "x", "level": "low"}] * 64).encode()
    event = b'{"subject":{"type":"c","id":"1"},"amount":{},"regulatory_flags":' + flags + b"}"
    assert split_json_array(b"[" + b",".join([event] * MAX_ITEMS) + b"]") == [event] * MAX_ITEMS


LARGE = MAX_BATCH_BYTES // 4


@pytest.mark.parametrize(
    "unit",
    [b"[", b"[]", b"[],", b"[[]],", b"[[]", b'"', b'\\"', b'"",', b",", b'{"":', b"1,", b'["', b'["]",{', b" "],
)
@pytest.mark.parametrize("head", [b"[", b"[[", b'["'])
def test_no_batch_costs_more_than_linear_time(unit: bytes, head: bytes) -> None:
    body = (head + unit * (LARGE // len(unit)))[:LARGE]
    started = time.process_time()
    with pytest.raises(DomainValidationError):
        split_json_array(body)
    assert time.process_time() - started < 1.0


# --- NDJSON -----------------------------------------------------------------------------------------


def test_lines_come_out_alone_with_either_line_end_and_blank_ones_are_nothing() -> None:
    assert split_ndjson(b'{"a":1}\r\n\r\n  \n{"b":\nNaN\n{"c":3} ') == [b'{"a":1}', b'{"b":', b"NaN", b'{"c":3}']


# --- CSV --------------------------------------------------------------------------------------------

HEADER = b"order,customer,total,note\r\n"
MAPPING = ["id=order", "subject.id=customer", "amount.value=total", "text=note"]


def documents(body: bytes, mapping: list[str] | None = None) -> list[object]:
    """Parsed items; an error is its detail."""
    return [
        item.detail if isinstance(item, RiskfleetError) else json.loads(item)
        for item in split_csv(body, MAPPING if mapping is None else mapping)
    ]


def test_a_record_becomes_nested_fields_of_text_and_an_empty_cell_leaves_its_field_out() -> None:
    assert documents(HEADER + b'o-1,c-1,12.50,"a ""b"", c\r\nd"\r\n\r\no-2,,7,\n') == [
        {"id": "o-1", "subject": {"id": "c-1"}, "amount": {"value": "12.50"}, "text": 'a "b", c\r\nd'},
        {"id": "o-2", "amount": {"value": "7"}},
    ]


def test_a_record_that_cannot_be_mapped_is_an_error_in_its_place() -> None:
    body = HEADER + b"\n".join(
        [
            b"o-1,c,1,",
            b"o-2,c,1",
            b"o-3,c,1,x,y",
            b'o-4,c,1,"say "hi" now"',
            b"o-5,c,1,\xff",
            b"o-6,c,1," + b"x" * 70_000,
            b'o-7,c,1,"' + b"x" * 70_000 + b'"',
            "o-8,c,1,ä".encode(),
        ]
    )
    first, *errors, last = documents(body)
    assert first == {"id": "o-1", "subject": {"id": "c"}, "amount": {"value": "1"}}
    assert last == {"id": "o-8", "subject": {"id": "c"}, "amount": {"value": "1"}, "text": "ä"}
    says = ["3 cells", "5 cells", "double a quote", "not UTF-8", "larger than 65,536", "larger than 65,536"]
    assert len(errors) == len(says)
    assert all(isinstance(error, str) and part in error for error, part in zip(errors, says, strict=True)), errors


def test_a_quote_that_is_never_closed_refuses_the_file_since_nobody_knows_where_the_next_record_begins() -> None:
    with pytest.raises(MalformedBodyError, match="never closed"):
        split_csv(HEADER + b'o-1,c,1,"x\no-2,c,1,y\n', MAPPING)


@pytest.mark.parametrize(
    "header", [b"", b"order,customer\n", b"order,order,customer,total,note\n", b'"order\n', b"\xff\n"]
)
def test_a_header_line_that_does_not_fit_the_map_refuses_the_file(header: bytes) -> None:
    with pytest.raises(DomainValidationError):
        split_csv(header + b"o-1,c,1,x\n", MAPPING)


def test_a_byte_order_mark_is_no_part_of_the_first_columns_name() -> None:
    assert documents(b"\xef\xbb\xbforder\no-1\n", ["id=order"]) == [{"id": "o-1"}]


@pytest.mark.parametrize(
    "mapping",
    [
        [],
        ["id"],
        ["=order"],
        ["id="],
        ["a..b=order"],
        [".a=order"],
        ["id=order", "id=total"],
        ["subject=order", "subject.id=customer"],
        ["subject.id=customer", "subject=order"],
        [f"attributes.a{i}=order" for i in range(513)],
    ],
)
def test_a_map_that_contradicts_itself_is_refused(mapping: list[str]) -> None:
    with pytest.raises(DomainValidationError):
        ColumnMap.parse(mapping)


def test_a_column_may_fill_two_fields_and_its_name_may_hold_an_equals_sign() -> None:
    assert documents(b"a=b\nx\n", ["id=a=b", "subject.id=a=b"]) == [{"id": "x", "subject": {"id": "x"}}]


cells = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=6)


@settings(deadline=None)
@given(st.lists(st.tuples(cells, cells), min_size=1, max_size=6), st.sampled_from(["\r\n", "\n"]))
def test_what_a_csv_writer_writes_is_read_back(rows: list[tuple[str, str]], line_end: str) -> None:
    buffer = io.StringIO(newline="")
    writer = csv.writer(buffer, quoting=csv.QUOTE_ALL, lineterminator=line_end)
    writer.writerows([("a", "b"), *rows])
    expected = [{name: cell for name, cell in (("id", a), ("text", b)) if cell} for a, b in rows]
    assert documents(buffer.getvalue().encode(), ["id=a", "text=b"]) == expected


@settings(deadline=None)
@given(st.binary(max_size=60) | st.text('",\r\nab', max_size=60).map(str.encode))
def test_any_bytes_below_a_header_are_mapped_or_refused(body: bytes) -> None:
    try:
        items = split_csv(b"a,b\n" + body, ["id=a"])
    except DomainValidationError:
        return
    assert all(isinstance(item, RiskfleetError) or isinstance(json.loads(item), dict) for item in items)


@pytest.mark.parametrize("unit", [b'"', b'""', b",", b'",', b'"\n', b"\r", b"a", b'"a', b" \n"])
def test_no_csv_file_costs_more_than_linear_time(unit: bytes) -> None:
    started = time.process_time()
    with contextlib.suppress(DomainValidationError):
        split_csv(b"a,b\n" + unit * (LARGE // len(unit)), ["id=a"])
    assert time.process_time() - started < 1.0


# --- files of the command line ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "events"),
    [
        ("one.json", b' {"a":\n1}\n', [b' {"a":\n1}\n']),
        ("many.json", b'\n[{"a":1},\nNaN]', [b'{"a":1}', b"NaN"]),
        ("lines.ndjson", b'{"a":1}\nbroken\n\n{"b":2}\n', [b'{"a":1}', b"broken", b'{"b":2}']),
    ],
)
def test_a_file_of_events_is_read_without_judging_them(
    name: str, content: bytes, events: list[bytes], tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    assert read_events(tmp_path / name) == events


def test_a_csv_file_of_any_length_is_read_with_its_map(tmp_path: Path) -> None:
    file = tmp_path / "events.csv"
    file.write_bytes(b"a,b\n" + b"x,y\n" * 1500 + b"x\n")
    *events, error = read_events(file, ["id=a"])
    assert events == [b'{"id":"x"}'] * 1500
    assert isinstance(error, DomainValidationError)
    assert len(list(csv_documents(file.read_bytes(), ["id=a"]))) == 1501


def test_a_file_that_is_no_events_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "photo"
    for content in (b"", b"\x89PNG\r\n", b'{"a":\n1'):
        file.write_bytes(content)
        with pytest.raises(DomainValidationError, match="neither JSON nor NDJSON"):
            read_events(file)
