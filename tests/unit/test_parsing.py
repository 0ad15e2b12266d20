"""The door's JSON: what is refused, that refusing is cheap, and that what is accepted can be stored."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from contracts.events import canonical_json
from contracts.failures import MalformedBodyError, OversizedBodyError, RiskfleetError
from gateway.batch import split_json_array
from gateway.parsing import is_json, parse_json

SHARED = Path(os.environ.get("RISKFLEET_SHARED") or Path(__file__).parents[3] / "shared")
CORPUS = SHARED / "corpora" / "json" / "test_parsing"

# Valid by RFC 8259, refused here on purpose; the reason is part of the public contract.
STRICTER = {
    "y_object_duplicated_key.json": "twice",
    "y_object_duplicated_key_and_value.json": "twice",
    "y_object_escaped_null_in_key.json": "U+0000",
    "y_string_null_escape.json": "U+0000",
}


def corpus(prefix: str) -> list[Path]:
    return sorted(CORPUS.glob(f"{prefix}_*.json"))


needs_corpus = pytest.mark.skipif(
    not corpus("n"), reason=f"JSON corpus NOT FOUND at {CORPUS}: set RISKFLEET_SHARED; parsing is only partly tested"
)


@needs_corpus
def test_every_invalid_document_of_the_corpus_is_refused() -> None:
    accepted = []
    for path in corpus("n"):
        try:
            parse_json(path.read_bytes())
        except RiskfleetError:
            continue
        accepted.append(path.name)
    assert accepted == []
    assert len(corpus("n")) == 188


@needs_corpus
def test_every_valid_document_of_the_corpus_is_accepted_or_refused_by_a_documented_rule() -> None:
    refused = {}
    for path in corpus("y"):
        try:
            parse_json(path.read_bytes())
        except MalformedBodyError as error:
            refused[path.name] = error.detail
    assert refused.keys() == STRICTER.keys(), refused
    assert all(STRICTER[name] in detail for name, detail in refused.items())


@needs_corpus
def test_what_the_standard_leaves_open_is_accepted_or_refused_but_never_crashes() -> None:
    for path in corpus("i"):
        try:
            document = parse_json(path.read_bytes())
        except RiskfleetError:
            continue
        canonical_json(document)


@needs_corpus
def test_a_document_of_the_corpus_among_others_in_a_batch_comes_out_as_it_is_or_refuses_the_batch() -> None:
    """What can be told from its neighbours is judged alone: nothing bad is taken, and no neighbour is damaged."""
    alone = 0
    for path in [*corpus("n"), *corpus("y"), *corpus("i")]:
        content = path.read_bytes()
        try:
            elements = split_json_array(b'["before",' + content + b',"after"]')
        except MalformedBodyError:
            assert path.name.startswith(("n_", "i_")), path.name  # its own brackets or quotes do not match
            continue
        if elements[1:-1] == [content.strip(b" \t\r\n")]:
            alone += 1
        else:  # commas outside brackets and quotes, closed and opened brackets: then each piece is judged
            assert path.name.startswith("n_"), path.name
        assert (elements[0], elements[-1]) == (b'"before"', b'"after"')
    assert alone > 200


@pytest.mark.parametrize(
    ("content_type", "taken"),
    [
        ("application/json", True),
        ("Application/JSON; charset=UTF-8", True),
        ('application/json;charset="utf-8"', True),
        ("application/cloudevents+json", True),
        ("application/vnd.acme.v1+json ; q=1", True),
        ("application/json; charset=latin-1", False),
        ("text/json", False),
        ("application/jsonx", False),
        ("application/cloudevents+avro", False),
        ("application/+json", False),
        ("", False),
    ],
)
def test_a_content_type_is_json_by_its_name_or_suffix_and_in_utf_8(content_type: str, taken: bool) -> None:
    assert is_json(content_type) == taken


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"", "not JSON"),
        (b"\xef\xbb\xbf{}", "byte order mark"),
        (b"{}".decode().encode("utf-16"), "not UTF-8"),
        (b'{"a":"\xff"}', "not UTF-8 (byte 6)"),
        (b'{"a":1,"a":1}', "twice"),
        (b'{"a":1,"\\u0061":2}', "twice"),
        (b'{"a":NaN}', "NaN"),
        (b"[-Infinity]", "-Infinity"),
        (b"1e999", "too large"),
        (b"-1e999", "too large"),
        (b"9007199254740993", "2^53"),
        (b"-9007199254740993", "2^53"),
        (b"1" * 5000, "2^53"),
        (b'"\\ud800"', "surrogate"),
        (b'{"\\udc00":1}', "surrogate"),
        (b'["\\udc00\\ud800"]', "surrogate"),
        (b'"\\u0000"', "U+0000"),
        (b'{"a":"\x00"}', "not JSON"),
        (b"[" * 33 + b"]" * 33, "deeper than 32"),
        (b"[" * 60_000, "deeper than 32"),
        (b'{"":' * 15_000, "deeper than 32"),
    ],
)
def test_a_refusal_says_what_is_wrong(body: bytes, says: str) -> None:
    with pytest.raises(MalformedBodyError) as caught:
        parse_json(body)
    assert says in caught.value.detail


@pytest.mark.parametrize(
    ("body", "document"),
    [
        (b"[" * 32 + b"]" * 32, None),
        (b'{"a":"[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[["}', {"a": "[" * 38}),
        (b'"\\"' + b"[" * 40 + b'"', '"' + "[" * 40),
        (b"9007199254740992", 2**53),
        (b"-9007199254740992", -(2**53)),
        (b'"\\ud83d\\ude00"', "😀"),
        (b'"\\\\u0000"', "\\u0000"),
        (b" \t\r\n{}\n", {}),
    ],
)
def test_what_only_looks_wrong_is_accepted(body: bytes, document: object) -> None:
    parsed = parse_json(body)
    assert document is None or parsed == document


def test_the_size_limit_is_on_bytes_and_exact() -> None:
    assert parse_json(b'"' + b"a" * 65_534 + b'"')
    with pytest.raises(OversizedBodyError):
        parse_json(b'"' + b"a" * 65_535 + b'"')


@pytest.mark.parametrize(
    "body",
    [
        b'"' + b'\\"' * 32_000,
        b"[" * 40 + b'"' + b'\\"' * 32_000,
        b"[" * 33 + b'"' * 65_000,
        b"[]" * 32_000,
        b"[" + b"[]," * 21_000 + b"[]]",
        b"1" * 65_000,
        b"[" * 33 + b"\\" * 65_000,
    ],
)
def test_no_body_of_64_kib_costs_more_than_linear_time(body: bytes) -> None:
    gc.disable()  # a collection would walk over everything that other tests hold, and count as ours
    try:
        started = time.process_time()
        with contextlib.suppress(RiskfleetError):
            parse_json(body)
        assert time.process_time() - started < 0.25
    finally:
        gc.enable()


NAUGHTY = SHARED / "corpora" / "naughty-strings" / "blns.json"


@pytest.mark.skipif(
    not NAUGHTY.exists(),
    reason=f"naughty strings NOT FOUND at {NAUGHTY}: set RISKFLEET_SHARED; fewer strings are tried",
)
def test_naughty_strings_are_read_back_as_they_were_sent() -> None:
    strings = json.loads(NAUGHTY.read_bytes())
    assert len(strings) > 500
    for text in strings:
        for body in (json.dumps({text: [text]}), json.dumps({text: [text]}, ensure_ascii=False)):
            assert parse_json(body.encode()) == {text: [text]}
            assert json.loads(canonical_json(parse_json(body.encode()))) == {text: [text]}


characters = st.characters(codec="utf-8", exclude_characters="\0")
json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(characters),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(characters), inner, max_size=4),
    max_leaves=12,
)


@given(json_values, st.booleans())
def test_storable_json_is_read_back_as_it_was(value: object, ascii_only: bool) -> None:
    assert parse_json(json.dumps(value, ensure_ascii=ascii_only).encode()) == value


@given(st.binary(max_size=200) | st.text(alphabet='{}[]",:\\u0d8Ne1-+. tf', max_size=80).map(str.encode))
def test_any_bytes_are_read_or_refused_and_what_is_read_can_be_stored(body: bytes) -> None:
    try:
        document = parse_json(body)
    except MalformedBodyError:
        return
    assert parse_json(canonical_json(document)) == document
