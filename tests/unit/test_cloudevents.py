"""CloudEvents 1.0: what the SDK encodes is read in every mode, what is not a CloudEvent is refused or left alone."""

from __future__ import annotations

import base64
import json
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import pytest
from cloudevents.core.bindings import amqp, http, rabbitmq
from cloudevents.core.v1.event import CloudEvent
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.datastructures import Headers

from contracts.codec import Entry, decode_carrier, state_from_bytes
from contracts.events import event_id_of
from contracts.failures import DomainValidationError, InvalidMetadataError, MalformedBodyError, RiskfleetError
from contracts.tenancy import TenantScope
from gateway.batch import split_json_array
from gateway.cloudevents import (
    BATCH,
    STRUCTURED,
    Envelope,
    amqp_attributes,
    from_headers,
    from_structured,
    http_attributes,
)
from gateway.intake import Admission, Refusal, Submission
from gateway.parsing import parse_json
from tests.fakes import DoorParts, event_body

ACME = TenantScope("acme")
TRACE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
AT = datetime(2026, 1, 31, 11, 59, 59, tzinfo=UTC)
DATA: dict[str, Any] = {
    name: value for name, value in json.loads(event_body(id=None)).items() if name not in ("type", "occurred_at")
}
ATTRIBUTES: dict[str, Any] = {
    "id": "A-7",
    "source": "/shop/tills",
    "type": "payment.card",
    "time": AT,
    "datacontenttype": "application/json",
    "subject": "c-1",
    "traceparent": TRACE,
    "correlationid": "flow-1",
    "color": "blue",
}


def encoded(data: dict[str, Any] | bytes | None = None, **changes: Any) -> CloudEvent:
    """A CloudEvent of the SDK; a change to None leaves the attribute out."""
    attributes = {name: value for name, value in (ATTRIBUTES | changes).items() if value is not None}
    return CloudEvent(attributes, DATA if data is None else data)


def structured(**changes: Any) -> dict[str, Any]:
    """The parsed JSON of structured mode; a change to None leaves the member out."""
    document = {"specversion": "1.0", **ATTRIBUTES, "time": "2026-01-31T11:59:59Z", "data": DATA} | changes
    return {name: value for name, value in document.items() if value is not None}


def read_http(headers: dict[str, str], body: bytes) -> Envelope:
    attributes = http_attributes(headers)
    assert attributes is not None
    return from_headers(attributes, body)


# --- what the SDK sends -----------------------------------------------------------------------------


def check_taken(envelope: Envelope) -> None:
    assert envelope.event == DATA | {"type": "payment.card", "occurred_at": "2026-01-31T11:59:59Z"}
    assert envelope.identity == "/shop/tills|A-7"
    assert (envelope.traceparent, envelope.correlation_id) == (TRACE, "flow-1")


def test_structured_mode_of_the_sdk_is_read() -> None:
    message = http.to_structured_event(encoded())
    assert message.headers["content-type"] == STRUCTURED
    check_taken(from_structured(parse_json(message.body)))
    check_taken(from_structured(parse_json(http.to_structured_event(encoded(json.dumps(DATA).encode())).body)))


def test_binary_mode_of_the_sdk_is_read_over_http() -> None:
    message = http.to_binary_event(encoded())
    attributes = http_attributes(Headers(message.headers))
    assert attributes is not None
    check_taken(from_headers(attributes, message.body))


def test_binary_mode_of_the_sdk_is_read_over_amqp_with_either_prefix() -> None:
    message = rabbitmq.to_binary_event(encoded())
    check_taken(from_headers(amqp_attributes(message.headers) or {}, message.body))
    native = amqp.to_binary_event(encoded(sampled=True, count=3))
    assert isinstance(native.application_properties["cloudEvents_time"], int)  # milliseconds, as AMQP 1.0 has them
    check_taken(from_headers(amqp_attributes(native.application_properties) or {}, native.application_data))
    colons = {name.replace("cloudEvents_", "cloudEvents:"): v for name, v in native.application_properties.items()}
    check_taken(from_headers(amqp_attributes(colons) or {}, native.application_data))


def test_a_batch_of_the_sdks_events_is_split_and_each_is_read() -> None:
    one, other = (http.to_structured_event(encoded(id=name)).body for name in ("A-1", "A-2"))
    elements = split_json_array(b"[" + one + b"," + other + b"]")
    assert BATCH == "application/cloudevents-batch+json"
    assert [from_structured(parse_json(e)).identity for e in elements] == ["/shop/tills|A-1", "/shop/tills|A-2"]


@settings(deadline=None)
@given(st.text(st.characters(exclude_categories=("Cs", "Cc"), exclude_characters="|"), min_size=1, max_size=20))
def test_any_text_survives_the_percent_encoding_of_http_headers(text: str) -> None:
    message = http.to_binary_event(encoded(id=text, source=text))
    assert read_http(message.headers, message.body).identity == f"{text}|{text}"


# --- header values ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sent", "read"),
    [
        ("Euro%20%E2%82%AC%20%F0%9F%98%80", "Euro € 😀"),
        ("%e2%82%ac", "€"),
        ("%41%2520", "A%20"),  # one round of decoding
        ('"a b\\"c\\\\"', 'a b"c\\'),
        ('"a" b', '"a" b'),
        ("100%", "100%"),
    ],
)
def test_header_values_are_unquoted_and_decoded_once(sent: str, read: str) -> None:
    assert (http_attributes({"ce-id": sent}) or {})["id"] == read


@pytest.mark.parametrize("sent", ["%C0%A0", "%ff", "ü", "€"])
def test_header_values_that_are_no_encoded_utf_8_are_refused(sent: str) -> None:
    with pytest.raises(InvalidMetadataError):
        http_attributes({"ce-id": sent})


def test_an_attribute_with_two_values_is_refused_and_one_value_twice_is_one() -> None:
    twice = [(b"ce-id", b"1"), (b"CE-ID", b"1")]
    assert http_attributes(Headers(raw=twice)) == {"id": "1"}
    with pytest.raises(InvalidMetadataError, match="two values"):
        http_attributes(Headers(raw=[*twice, (b"ce-id", b"2")]))
    with pytest.raises(InvalidMetadataError, match="two values"):
        amqp_attributes({"ce-id": "1", "cloudEvents_id": "2"})


def test_headers_without_a_required_attribute_are_no_cloudevent() -> None:
    assert http_attributes({"content-type": "application/json", "ce-color": "blue", "ce-time": "x"}) is None
    assert amqp_attributes({"x-delivery-count": 3, "ce-color": "blue", "ce": 1, "cloudEvents": 2}) is None


def test_one_required_attribute_is_enough_to_be_refused_for_the_others() -> None:
    with pytest.raises(DomainValidationError) as caught:
        read_http({"CE-Specversion": "1.0"}, event_body())
    assert [pointer for pointer, _ in caught.value.pointers] == ["/id", "/source", "/type"]


@pytest.mark.parametrize("value", [None, b"\xff", 1.5, [], {}, AT.replace(tzinfo=None)])
def test_amqp_values_without_a_text_are_left_out(value: object) -> None:
    read = amqp_attributes({"ce-specversion": "1.0", "ce-id": value}) or {}
    assert read.get("id") == ("2026-01-31T11:59:59Z" if isinstance(value, datetime) else None)


@pytest.mark.parametrize(
    ("value", "read"), [(10**30, str(10**30)), (0, "1970-01-01T00:00:00Z"), (AT, "2026-01-31T11:59:59Z")]
)
def test_a_native_time_of_amqp_is_a_moment_or_refused_as_one(value: object, read: str) -> None:
    assert (amqp_attributes({"ce-id": "1", "ce-time": value}) or {})["time"] == read


# --- what is refused --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "pointer"),
    [
        ({"specversion": None}, "/specversion"),
        ({"specversion": "0.3"}, "/specversion"),
        ({"specversion": 1.0}, "/specversion"),
        ({"id": None}, "/id"),
        ({"id": ""}, "/id"),
        ({"id": 7}, "/id"),
        ({"id": "a\nb"}, "/id"),
        ({"id": "a\x1fb"}, "/id"),
        ({"source": None}, "/source"),
        ({"source": "a|b"}, "/source"),
        ({"type": ""}, "/type"),
        ({"type": []}, "/type"),
        ({"time": 5}, "/time"),
        ({"datacontenttype": "text/xml"}, "/datacontenttype"),
        ({"datacontenttype": "application/json; charset=latin-1"}, "/datacontenttype"),
        ({"datacontenttype": ""}, "/datacontenttype"),
        ({"data": None}, "/data"),
        ({"data": []}, "/data"),
        ({"data": json.dumps(DATA)}, "/data"),
        ({"data_base64": "e30="}, "/data_base64"),
        ({"data": None, "data_base64": 7}, "/data_base64"),
        ({"data": None, "data_base64": "W10="}, "/data_base64"),
    ],
)
def test_what_is_no_cloudevent_of_ours_is_refused_with_a_pointer(changes: dict[str, Any], pointer: str) -> None:
    with pytest.raises(DomainValidationError) as caught:
        from_structured(structured(**changes))
    assert [name for name, _ in caught.value.pointers] == [pointer]


@pytest.mark.parametrize(
    "content_type", ["application/json; charset=UTF-8", "application/vnd.acme+json", "Application/JSON"]
)
def test_data_may_say_that_it_is_json_in_any_words(content_type: str) -> None:
    assert from_structured(structured(datacontenttype=content_type)).identity


@pytest.mark.parametrize("document", [None, 1, "x", [], [structured()]])
def test_a_cloudevent_is_an_object(document: object) -> None:
    with pytest.raises(DomainValidationError):
        from_structured(document)


@pytest.mark.parametrize("inner", [b'{"a":1,"a":2}', b'{"a":NaN}', b'{"a":"\\ud800"}', b"\xff", b"[" * 40, b""])
def test_data_is_as_strict_as_a_plain_body_in_binary_mode_and_in_base64(inner: bytes) -> None:
    with pytest.raises(MalformedBodyError):
        from_structured(structured(data=None, data_base64=base64.b64encode(inner).decode()))
    with pytest.raises(MalformedBodyError):
        from_headers(amqp_attributes(rabbitmq.to_binary_event(encoded()).headers) or {}, inner)


@pytest.mark.parametrize("text", ["e30", "e3 0=", "e30=\n", "é30="])
def test_broken_base64_is_refused(text: str) -> None:
    with pytest.raises(MalformedBodyError, match="Base64"):
        from_structured(structured(data=None, data_base64=text))


def test_what_data_says_itself_is_not_filled_in_and_unusable_extensions_are_ignored() -> None:
    own = DATA | {"type": "login", "occurred_at": None}
    envelope = from_structured(structured(data=own, traceparent=5, correlationid=[], dataschema=7, subject={}))
    assert envelope.event == own
    assert (envelope.traceparent, envelope.correlation_id) == (None, None)


values: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.binary(max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=4), inner, max_size=2),
    max_leaves=4,
)
names = st.sampled_from(["specversion", "id", "source", "type", "time", "datacontenttype", "data", "data_base64", "x"])


@settings(deadline=None)
@given(st.dictionaries(names, values | st.sampled_from(["1.0", "e30=", {}])), st.booleans())
def test_any_document_is_read_or_refused(document: dict[str, Any], whole: bool) -> None:
    try:
        from_structured(structured(**document) if whole else document)
    except DomainValidationError:
        return


@settings(deadline=None)
@given(
    st.dictionaries(
        st.builds("{}{}".format, st.sampled_from(["ce-", "Ce-", "cloudEvents:", "cloudEvents_"]), names),
        values | st.datetimes() | st.just("1.0"),
    ),
    st.binary(max_size=10) | st.just(event_body()),
)
def test_any_headers_and_bytes_are_read_or_refused(headers: dict[str, Any], body: bytes) -> None:
    try:
        attributes = amqp_attributes(headers)
        texts = http_attributes({name: value for name, value in headers.items() if isinstance(value, str)})
        for found in (attributes, texts):
            if found is not None:
                from_headers(found, body)
    except DomainValidationError:
        return


# --- admission --------------------------------------------------------------------------------------

POST = Submission(
    scope=ACME,
    kind=None,
    body=http.to_structured_event(encoded()).body,
    identity_header=None,
    correlation_id=None,
    traceparent=None,
    source="http",
    structured=True,
)
BINARY = http.to_binary_event(encoded())


async def admitted(submission: Submission, parts: DoorParts | None = None) -> Admission:
    verdict = await (parts or DoorParts()).intake.admit(submission)
    assert isinstance(verdict, Admission), verdict
    return verdict


async def test_one_event_in_both_modes_is_one_event_with_one_digest() -> None:
    parts = DoorParts()
    first = await admitted(POST, parts)
    again = await admitted(
        replace(POST, structured=False, attributes=http_attributes(BINARY.headers), body=BINARY.body), parts
    )
    assert again.replayed
    assert first.event_id == again.event_id == event_id_of(ACME, "/shop/tills|A-7")


@pytest.mark.parametrize(
    ("body_id", "header", "identity"),
    [
        ("own", None, "own"),
        ("own", "own", "own"),
        ("own", "key", "own"),
        (None, "key", "/shop/tills|A-7"),
        (None, None, "/shop/tills|A-7"),
    ],
)
async def test_the_events_own_id_wins_then_source_and_id_whatever_the_header_says(
    body_id: str | None, header: str | None, identity: str
) -> None:
    data = DATA | ({"id": body_id} if body_id else {})
    body = http.to_structured_event(encoded(data)).body
    assert (await admitted(replace(POST, body=body, identity_header=header))).identity == identity


async def test_a_trace_of_the_envelope_is_taken_where_no_header_names_one() -> None:
    parts = DoorParts()
    assert (await admitted(POST, parts)).correlation_id == "flow-1"
    (entry,) = decode_carrier(parts.publisher.messages[0].body)
    assert isinstance(entry, Entry)
    assert state_from_bytes(entry.body).traceparent == TRACE
    assert (await admitted(replace(POST, correlation_id="header"))).correlation_id == "header"
    unusable = http.to_structured_event(encoded(correlationid="ü", traceparent="nonsense")).body
    assert (await admitted(replace(POST, body=unusable))).correlation_id not in ("ü", "flow-1")


@pytest.mark.parametrize(
    ("changes", "pointer"),
    [
        ({"data": DATA | {"subject": None}}, "/data/subject"),
        ({"data": DATA | {"tenant_id": "globex"}}, "/data/tenant_id"),
        ({"type": "com.Example"}, "/type"),
        ({"time": "yesterday"}, "/time"),
        ({"time": None}, "/data/occurred_at"),
        ({"data": None, "data_base64": base64.b64encode(b'{"kind":"x"}').decode()}, "/kind"),
    ],
)
async def test_a_pointer_names_the_field_where_the_sender_wrote_it(changes: dict[str, Any], pointer: str) -> None:
    refusal = await DoorParts().intake.admit(replace(POST, body=json.dumps(structured(**changes)).encode()))
    assert isinstance(refusal, Refusal)
    assert pointer in [name for name, _ in refusal.error.pointers]


async def test_a_source_and_id_that_are_too_long_for_an_identity_ask_for_an_id() -> None:
    long = http.to_structured_event(encoded(source="/" + "s" * 300)).body
    refusal = await DoorParts().intake.admit(replace(POST, body=long))
    assert isinstance(refusal, Refusal)
    assert isinstance(refusal.error, RiskfleetError)
    assert "give the event an id" in refusal.error.detail
    own = http.to_structured_event(encoded(DATA | {"id": "own"}, source="/" + "s" * 300)).body
    assert (await admitted(replace(POST, body=own))).identity == "own"


async def test_a_cloudevents_batch_uses_source_and_id_before_the_batchs_key() -> None:
    elements = split_json_array(b"[" + POST.body + b',{"specversion":"1.0"},' + POST.body + b"]")
    verdicts = await DoorParts().intake.admit_batch(elements, replace(POST, identity_header="batch-1"))
    first, bad, again = verdicts
    assert isinstance(first, Admission)
    assert isinstance(bad, Refusal)
    assert isinstance(again, Admission)
    assert (first.identity, first.replayed, again.replayed) == ("/shop/tills|A-7", False, True)
