"""Batch bodies, split into items that are parsed alone: a bad item never harms its neighbours.

Promises: splitting is pure and costs time linear in the body; an item is the sender's own bytes, still to be
parsed strictly, or the error that stands in its place. What is refused whole is only what leaves open where an item
ends. Nothing here knows what an event is, except that a CSV row becomes a JSON object of strings.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Final, TypeVar

from contracts.events import MAX_BODY_BYTES, canonical_json
from contracts.failures import DomainValidationError, MalformedBodyError, OversizedBodyError, RiskfleetError

MAX_BATCH_BYTES: Final = 5 * 1024 * 1024
MAX_ITEMS: Final = 1000

_Item = TypeVar("_Item")

_SPACE: Final = b" \t\r\n"
# Strings and innermost brackets are skipped at the speed of the pattern; a step of the loop is a bracket round
# others, or a comma between elements. A thousand events of the public contract need a few thousand steps.
_MAX_STEPS: Final = 200_000
# Possessive and atomic throughout, and unrolled: three times as fast as one alternation, and never backtracking.
_STRING: Final = rb'(?>"[^"\\]*+(?:\\.[^"\\]*+)*+(?:"|\\?\Z))'
_PLAIN: Final = rb'[^"\[\]{}]*+'
_INNERMOST: Final = rb"(?>[\[{]" + _PLAIN + rb"(?:" + _STRING + _PLAIN + rb")*+[\]}])"
_WHOLE: Final = rb"(?>" + _STRING + rb"|" + _INNERMOST + rb")"
_INSIDE: Final = re.compile(_PLAIN + rb"(?:" + _WHOLE + _PLAIN + rb")*+", re.DOTALL)
_BETWEEN: Final = re.compile(rb'[^"\[\]{},]*+(?:' + _WHOLE + rb'[^"\[\]{},]*+)*+', re.DOTALL)
_BRACKETS: Final = re.compile(rb"[\[{]++|[\]}]++")
_OPENING: Final = frozenset(b"[{")
_COMMA: Final = ord(",")

_MAX_COLUMNS: Final = 512
# A CSV record, by RFC 4180: line breaks inside quotes belong to it. Only a quote that is never closed does not match.
_RECORD: Final = re.compile(rb'[\r\n]*+([^"\r\n]*+(?:"(?:[^"]++|"")*+"[^"\r\n]*+)*+)(?:[\r\n]|\Z)')


def split_json_array(body: bytes) -> list[bytes]:
    """The elements of a JSON array, as the bytes between its commas; whether they are JSON is not looked at.

    Raises MalformedBodyError when the array itself is broken (not an array, not closed, an empty element, something
    behind it, hundreds of thousands of brackets), OversizedBodyError above 5 MiB, DomainValidationError when there
    is no element or more than 1,000.
    """
    _check_size(body)
    return _limited(json_elements(body))


def split_ndjson(body: bytes) -> list[bytes]:
    """The lines of newline-delimited JSON; blank ones are left out, and a carriage return before the newline.

    Raises OversizedBodyError above 5 MiB, DomainValidationError when there is no line or more than 1,000.
    """
    _check_size(body)
    return _limited(ndjson_lines(body))


def split_csv(body: bytes, mapping: Sequence[str]) -> list[bytes | RiskfleetError]:
    """The records of a CSV file with a header line (RFC 4180, UTF-8), each as JSON bytes; see `csv_documents`.

    Raises OversizedBodyError above 5 MiB, DomainValidationError when there is no record or more than 1,000.
    """
    _check_size(body)
    return _limited(csv_documents(body, mapping))


def _check_size(body: bytes) -> None:
    if len(body) > MAX_BATCH_BYTES:
        raise OversizedBodyError(f"the batch is larger than {MAX_BATCH_BYTES:,} bytes; send several")


def _limited(items: Iterator[_Item]) -> list[_Item]:
    found = list(islice(items, MAX_ITEMS + 1))
    if not found:
        raise DomainValidationError("the batch is empty: send at least one event")
    if len(found) > MAX_ITEMS:
        raise DomainValidationError(f"the batch holds more than {MAX_ITEMS:,} events; send several")
    return found


def json_elements(body: bytes) -> Iterator[bytes]:
    """The elements of a JSON array of any length, in order. Raises MalformedBodyError; see `split_json_array`."""
    position = len(body) - len(body.lstrip(_SPACE))
    if body[position : position + 1] != b"[":
        raise MalformedBodyError("the batch is not a JSON array")
    depth, elements = 1, 0
    start = position = position + 1
    for _ in range(_MAX_STEPS):
        skipped = (_BETWEEN if depth == 1 else _INSIDE).match(body, position)
        position = skipped.end() if skipped else position
        if position == len(body):
            raise MalformedBodyError("the batch is not a JSON array: it is never closed")
        if body[position] == _COMMA:
            yield _element(body[start:position])
            elements += 1
            start = position = position + 1
            continue
        run = _BRACKETS.match(body, position)
        length = len(run[0]) if run else 1
        if body[position] in _OPENING:
            depth += length
        elif length < depth:  # which of the two brackets closes is the element's own affair
            depth -= length
        else:
            position += depth - 1
            if body[position : position + 1] != b"]" or body[position + 1 :].strip(_SPACE):
                raise MalformedBodyError("the batch is not one JSON array: something stands behind its end")
            if elements or body[start:position].strip(_SPACE):
                yield _element(body[start:position])
            return
        position += length
    raise MalformedBodyError("the batch holds more brackets than any batch of events; send several")


def _element(found: bytes) -> bytes:
    element = found.strip(_SPACE)
    if not element:
        raise MalformedBodyError("the batch is not a JSON array: an element is missing before or behind a comma")
    return element


def ndjson_lines(body: bytes) -> Iterator[bytes]:
    """The lines that are not blank, in order."""
    return (stripped for line in io.BytesIO(body) if (stripped := line.strip(_SPACE)))


@dataclass(frozen=True, slots=True)
class ColumnMap:
    """Which column of a CSV file fills which field of an event; a field is a path of names such as `subject.id`."""

    columns: tuple[tuple[tuple[str, ...], str], ...]

    @staticmethod
    def parse(pairs: Sequence[str]) -> ColumnMap:
        """From `FIELD=COLUMN` pairs. Raises DomainValidationError when they contradict each other or name nothing."""
        if len(pairs) > _MAX_COLUMNS:
            raise DomainValidationError(f"a column map has at most {_MAX_COLUMNS} columns")
        columns: dict[tuple[str, ...], str] = {}
        for pair in pairs:
            field, _, column = pair.partition("=")
            path = tuple(field.split("."))
            if not column or not all(path):
                raise DomainValidationError(
                    "a column is mapped as FIELD=COLUMN, for example subject.id=customer or amount.value=total"
                )
            if any(path[: len(other)] == other or other[: len(path)] == path for other in columns):
                raise DomainValidationError("the column map fills a field twice, or both a field and a part of it")
            columns[path] = column
        if not columns:
            raise DomainValidationError("a CSV file needs a column map, for example subject.id=customer")
        return ColumnMap(tuple(columns.items()))

    def document(self, row: Sequence[str], header: Sequence[str]) -> dict[str, Any]:
        """The event of one record: mapped cells as strings; an empty cell leaves its field out."""
        cells = dict(zip(header, row, strict=True))
        document: dict[str, Any] = {}
        for (*parents, leaf), column in self.columns:
            if not cells[column]:
                continue
            target = document
            for parent in parents:
                target = target.setdefault(parent, {})
            target[leaf] = cells[column]
        return document


def csv_documents(body: bytes, mapping: Sequence[str]) -> Iterator[bytes | RiskfleetError]:
    """The records below the header line, each as JSON bytes, or as the error that keeps it from being mapped.

    `mapping` holds `FIELD=COLUMN` pairs. Blank lines are left out, and a byte order mark, which spreadsheets write.
    Raises MalformedBodyError when the header cannot be read or a quote is never closed (nobody can say where the next
    record begins), DomainValidationError for a map that does not fit the header.
    """
    columns = ColumnMap.parse(mapping)
    records = _records(body.removeprefix(b"\xef\xbb\xbf"))
    header = _cells(next(records, b""))
    for _, column in columns.columns:
        if header.count(column) != 1:
            raise DomainValidationError(f"the file needs exactly one column named {column[:128]!r}")
    return (_mapped(record, header, columns) for record in records)


def _mapped(record: bytes, header: Sequence[str], columns: ColumnMap) -> bytes | RiskfleetError:
    try:
        row = _cells(record)
        if len(row) != len(header):
            raise DomainValidationError(f"the record has {len(row)} cells, and the header line has {len(header)}")
        return canonical_json(columns.document(row, header))
    except RiskfleetError as error:
        return error


def _records(body: bytes) -> Iterator[bytes]:
    position = 0
    while position < len(body):
        found = _RECORD.match(body, position)
        if found is None:
            raise MalformedBodyError("the CSV file has a quote that is never closed")
        position = found.end()
        if found[1]:
            yield found[1]


def _cells(record: bytes) -> list[str]:
    if len(record) > MAX_BODY_BYTES:
        raise OversizedBodyError(f"the record is larger than {MAX_BODY_BYTES:,} bytes")
    try:
        text = record.decode("utf-8", "strict")
    except UnicodeDecodeError:
        raise MalformedBodyError("the record is not UTF-8") from None
    try:
        return next(csv.reader(io.StringIO(text, newline=""), strict=True), [])
    except csv.Error:  # its text may quote the record
        raise MalformedBodyError("the record is not CSV: double a quote inside a quoted cell") from None
