"""What every LetterDesk promises: each letter is sent again once, by whoever may, and everything is recorded."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import Counter
from dataclasses import replace
from typing import Any

import orjson
import pytest

from contracts.codec import Entry, decode_carrier, encode_carrier, entry_of, entry_of_record
from contracts.failures import (
    AuthorizationError,
    ConflictError,
    InvalidMetadataError,
    InvalidRequestError,
    NotKnownError,
    UnexpectedError,
)
from contracts.identity import EVERYWHERE, Grant, Permission, Principal, Role
from contracts.labels import Label
from contracts.messages import label_message
from contracts.ports import DeadLetter
from contracts.settlement import REPLAYS_HEADER
from contracts.state import EventState
from contracts.tenancy import TenantScope
from contracts.topology import LABELS_QUEUE, audit_queue, stage_queue
from governance.deadletters import Action, Command, LetterFilter, LetterGroup, Reach, Resolved, reach_of
from tests.conformance import databases
from tests.conformance.databases import AT, PARTITIONS, Bench, decided, fresh_scope, letter, received
from workers.settling import park, park_bytes

bench_name, urls, database = databases.bench_name, databases.urls, databases.database

FAST = 1_000.0


@pytest.fixture
async def scope(database: Bench) -> TenantScope:
    """A tenant of this test alone, which callers with grants everywhere must find."""
    made = fresh_scope()
    await database.create_tenant(made)
    return made


def person(name: str, place: str = EVERYWHERE) -> Principal:
    return Principal(f"user:{name}", name, frozenset({Grant(place, Role.APPROVER)}))


ANN, BOB = person("ann"), person("bob")


def only(*scopes: TenantScope | None) -> Reach:
    return Reach(scopes)


def parked(state: EventState, stage: str = "retrieval", **changes: Any) -> DeadLetter:
    """The letter of an entry that failed for good."""
    header = {name: changes.pop(name) for name in ("suspect", "attempts", "replays", "reply_to") if name in changes}
    entry = entry_of(state, stage).evolve(**header)
    return replace(park(entry, UnexpectedError("x"), AT).letter, **changes)


def replay(*letters: DeadLetter, **changes: Any) -> Command:
    named = tuple(one.letter_id for one in letters)
    return replace(Command(Action.REPLAY, named, "the model is back", rate_per_s=FAST), **changes)


def discard(*letters: DeadLetter, **changes: Any) -> Command:
    return replace(Command(Action.DISCARD, tuple(one.letter_id for one in letters), "a test of theirs"), **changes)


async def sent(database: Bench, scope: TenantScope | None) -> list[tuple[str, str, bytes, dict[str, Any]]]:
    """What replays wrote to the outbox."""
    return [row for row in await database.written(scope) if row[0].startswith("replay:")]


async def records(database: Bench, scope: TenantScope | None, action: str) -> list[dict[str, Any]]:
    """The audit records of one action, in the outbox."""
    found = []
    for name, _, body, _ in await database.written(scope):
        if not name.startswith("replay:"):
            found += [orjson.loads(entry.body) for entry in decode_carrier(body) if isinstance(entry, Entry)]
    return [record for record in found if record.get("action") == f"deadletter.{action}"]


async def status(database: Bench, scope: TenantScope) -> Counter[str]:
    return Counter(row[2] for row in await database.letters_of(scope))


def results(answer: Resolved) -> list[str]:
    return [each.result for each in answer.results]


# --- one replay ---------------------------------------------------------------------------------------


async def test_a_replay_writes_row_message_history_and_record_together(database: Bench, scope: TenantScope) -> None:
    state = received(scope)
    one = parked(state, attempts=4, reply_to="somebody who waited")
    await database.ledger.record_events([state])
    await database.letters.park([one])
    answer = await database.desk.resolve(ANN, only(scope), replay(one))
    assert (results(answer), answer.results[0].replays) == (["replayed"], 1)
    ((name, queue, body, headers),) = await sent(database, scope)
    assert name == f"replay:{one.letter_id}:1"
    assert queue == stage_queue("retrieval", scope.partition(PARTITIONS))
    assert headers == {"x-riskfleet-events": 1}
    (entry,) = decode_carrier(body)
    assert isinstance(entry, Entry)
    h = entry.header
    assert (h.attempts, h.first_failed_at, h.replays, h.suspect, h.reply_to) == (0, None, 1, False, None)
    assert entry.body == state.to_bytes()
    view = await database.desk.show(only(scope), one.letter_id)
    assert (view.letter.status, view.letter.replays, view.letter.tenant) == ("replayed", 1, scope.tenant_id)
    assert [(act.action, act.result, act.person, act.reason) for act in view.history] == [
        ("replay", "replayed", "ann", "the model is back")
    ]
    (record,) = await records(database, scope, "replayed")
    assert (record["person"], record["event_id"], record["subject"]["letter_id"]) == (
        *("ann", state.event_id),
        one.letter_id,
    )
    assert "the model" not in orjson.dumps(record).decode()
    again = park(entry, UnexpectedError("x"), AT).letter
    assert (again.letter_id != one.letter_id, again.replays) == (True, 1)
    await database.letters.park([again])
    shown = await database.desk.show(only(scope), again.letter_id)
    assert (shown.letter.replays, [each.letter_id for each in shown.related]) == (1, [one.letter_id])


async def test_a_second_replay_is_a_recorded_no_op(database: Bench, scope: TenantScope) -> None:
    one = parked(received(scope))
    await database.letters.park([one])
    await database.desk.resolve(ANN, only(scope), replay(one))
    assert results(await database.desk.resolve(BOB, only(scope), replay(one))) == ["noop"]
    assert results(await database.desk.resolve(BOB, only(scope), discard(one))) == ["noop"]
    assert len(await sent(database, scope)) == 1
    view = await database.desk.show(only(scope), one.letter_id)
    assert [(act.person, act.action, act.result) for act in view.history] == [
        ("ann", "replay", "replayed"),
        ("bob", "replay", "noop"),
        ("bob", "discard", "noop"),
    ]
    assert len(await records(database, scope, "left")) == 2


async def test_a_replay_of_a_decided_event_sends_nothing_and_is_recorded(database: Bench, scope: TenantScope) -> None:
    state = decided(received(scope))
    one = parked(received(scope))
    await database.letters.park([one])
    await database.ledger.decide([state])
    answer = await database.desk.resolve(ANN, only(scope), replay(one))
    assert (results(answer), await sent(database, scope)) == (["noop"], [])
    assert answer.results[0].why == "its event is decided: APPROVED, revision 1"
    assert len(await records(database, scope, "left")) == 1


async def test_two_operators_at_once_send_each_letter_once(database: Bench, scope: TenantScope) -> None:
    letters = [parked(received(scope, f"e{i}")) for i in range(60)]
    await database.letters.park(letters)
    commands = [replay(*letters[:40]), replay(*letters[20:]), replay(*letters[:30]), discard(*letters[50:])]
    answers = await asyncio.gather(
        *(database.desk.resolve(person(f"p{i}"), only(scope), one) for i, one in enumerate(commands))
    )
    done = Counter(each.letter_id for answer in answers for each in answer.results if each.result != "noop")
    assert done == {one.letter_id: 1 for one in letters}
    names = [row[0] for row in await sent(database, scope)]
    replayed = {f"replay:{each.letter_id}:1" for a in answers for each in a.results if each.result == "replayed"}
    assert sorted(names) == sorted(replayed)
    assert (await status(database, scope))["replayed"] == len(names)


async def test_a_lost_reply_sends_once_however_often_it_is_repeated(database: Bench, scope: TenantScope) -> None:
    one = parked(received(scope))
    await database.letters.park([one])
    await databases.lost(database, lambda: database.desk.resolve(ANN, only(scope), replay(one)))
    assert results(await database.desk.resolve(ANN, only(scope), replay(one))) == ["noop"]
    assert len(await sent(database, scope)) == 1


async def test_replays_go_out_no_faster_than_the_pace(database: Bench, scope: TenantScope) -> None:
    letters = [parked(received(scope, f"e{i}")) for i in range(6)]
    await database.letters.park(letters)
    first = await database.desk.resolve(ANN, only(scope), replay(*letters[:3], rate_per_s=4.0))
    second = await database.desk.resolve(BOB, only(scope), replay(*letters[3:], rate_per_s=4.0))
    due = [each.due_at for each in (*first.results, *second.results) if each.due_at is not None]
    gaps = [(later - earlier).total_seconds() for earlier, later in itertools.pairwise(due)]
    assert gaps == pytest.approx([0.25] * 5, abs=0.01)
    assert len([row for row in await database.outbox.waiting(100_000) if row.scope == scope]) < 6 + 2
    deadline, mine = time.monotonic() + 30, set[str]()
    while len(mine) < 6 and time.monotonic() < deadline:
        database.clock.step(0.25)
        await asyncio.sleep(0.05)
        waiting = [row for row in await database.outbox.waiting(100_000) if row.scope == scope]
        mine = {row.message.message_id for row in waiting if row.message.message_id.startswith("replay:")}
    assert mine == {f"replay:{one.letter_id}:1" for one in letters}


# --- what may not be sent again -----------------------------------------------------------------------


async def test_suspects_stay_suspects_and_what_was_delivered_too_often_becomes_one(
    database: Bench, scope: TenantScope
) -> None:
    letters = [
        parked(received(scope, "plain")),
        parked(received(scope, "suspect"), suspect=True),
        parked(received(scope, "often"), problem="delivery-limit"),
    ]
    await database.letters.park(letters)
    await database.desk.resolve(ANN, only(scope), replay(*letters))
    found = {}
    for name, _, body, _ in await sent(database, scope):
        (entry,) = decode_carrier(body)
        assert isinstance(entry, Entry)
        found[name.split(":")[1]] = entry.header.suspect
    assert found == {letters[0].letter_id: False, letters[1].letter_id: True, letters[2].letter_id: True}


async def test_a_letter_that_went_round_too_often_needs_force(database: Bench, scope: TenantScope) -> None:
    one = parked(received(scope), replays=3)
    await database.letters.park([one])
    answer = await database.desk.resolve(ANN, only(scope), replay(one))
    assert results(answer) == ["refused"]
    assert "3 times already" in answer.results[0].why
    assert (await status(database, scope)) == {"open": 1}
    assert results(await database.desk.resolve(ANN, only(scope), replay(one, force=True))) == ["replayed"]
    (record,) = await records(database, scope, "replayed")
    assert record["detail"]["force"] == 1


async def test_what_cannot_be_sent_again_says_why_and_stays_open(database: Bench, scope: TenantScope) -> None:
    good = received(scope, "good")
    entry = entry_of(good, "retrieval")
    letters = {
        "cannot be decoded": replace(letter(scope, "e1", stage="scoring"), body=b"\xff garbage"),
        "another event": parked(good, event_id="0" * 32, letter_id="l" + "1" * 20 + scope.tenant_id),
        "no stage takes": replace(parked(received(scope, "x")), body=encode_carrier((entry.evolve(stage="scoring"),))),
        "the sender repeats it": letter(scope, "", stage="ingress"),
        "no stage of this release": letter(scope, "", stage="parking"),
        "to one entry": replace(letter(scope, "two", stage="retrieval"), body=encode_carrier((entry, entry))),
    }
    letters["no stage takes"] = replace(letters["no stage takes"], event_id=good.event_id)
    changed = parked(received(scope, "good", text="another body"))
    letters["another body owns"] = changed
    await database.ledger.record_events([good])
    await database.letters.park(list(letters.values()))
    for words, one in letters.items():
        answer = await database.desk.resolve(ANN, only(scope), replay(one))
        assert (results(answer), words in answer.results[0].why) == (["refused"], True), (words, answer)
    assert await sent(database, scope) == []
    assert await status(database, scope) == {"open": len(letters)}


async def test_letters_of_the_audit_and_of_labels_go_back_there_even_when_their_event_is_decided(
    database: Bench, scope: TenantScope
) -> None:
    state = decided(received(scope))
    record = state.records()[0]
    label = Label(scope, "label-1", state.event_id, "chargeback", "bank", AT, AT, b"{}")
    lost = park(entry_of_record(record), UnexpectedError("x"), AT).letter
    late = park_bytes(label_message(label).body, "labels", UnexpectedError("x"), AT, (scope, state.event_id)).letter
    await database.ledger.decide([state])
    await database.letters.park([lost, late])
    answer = await database.desk.resolve(ANN, only(scope), replay(lost, late))
    assert results(answer) == ["replayed", "replayed"]
    by_queue = {queue: (body, headers) for _, queue, body, headers in await sent(database, scope)}
    assert by_queue[LABELS_QUEUE] == (label_message(label).body, {REPLAYS_HEADER: 1})
    (entry,) = decode_carrier(by_queue[audit_queue(scope.partition(PARTITIONS))][0])
    assert isinstance(entry, Entry)
    assert (entry.body, entry.header.replays) == (record.body, 1)


# --- discarding ---------------------------------------------------------------------------------------


async def test_a_discard_fails_the_event_and_closes_its_other_letters(database: Bench, scope: TenantScope) -> None:
    state, key = received(scope), [(scope, received(scope).event_id)]
    one, other = parked(state), parked(state, attempts=2)
    bystander = parked(received(scope, "e2"))
    await database.ledger.record_events([state])
    await database.letters.park([one, other, bystander])
    assert list(await database.ledger.failed(key)) == [False]
    answer = await database.desk.resolve(ANN, only(scope), discard(one))
    assert (results(answer), answer.results[0].failed) == (["discarded"], True)
    assert list(await database.ledger.failed(key)) == [True]
    by_id = {row[0]: row[2] for row in await database.letters_of(scope)}
    assert by_id == {one.letter_id: "discarded", other.letter_id: "closed", bystander.letter_id: "open"}
    (record,) = await records(database, scope, "discarded")
    assert record["detail"]["status"] == "failed"
    assert await sent(database, scope) == []


async def test_discarding_another_body_fails_nobody_s_event(database: Bench, scope: TenantScope) -> None:
    owner, newcomer = received(scope), parked(received(scope, text="another body"))
    waiting = parked(owner)
    await database.ledger.record_events([owner])
    await database.letters.park([newcomer, waiting])
    answer = await database.desk.resolve(ANN, only(scope), discard(newcomer))
    assert (results(answer), answer.results[0].failed) == (["discarded"], False)
    assert list(await database.ledger.failed([(scope, owner.event_id)])) == [False]
    assert await status(database, scope) == {"discarded": 1, "open": 1}


# --- two people ---------------------------------------------------------------------------------------


async def test_one_person_alone_goes_no_further_than_the_policy_in_whatever_slices(
    database: Bench, scope: TenantScope
) -> None:
    letters = [parked(received(scope, f"e{i}")) for i in range(130)]
    await database.letters.park(letters)
    ann = person("ann-" + scope.tenant_id)
    with pytest.raises(ConflictError, match="another person confirms"):
        await database.desk.resolve(ann, only(scope), replay(*letters[:101]))
    await database.desk.resolve(ann, only(scope), replay(*letters[:60]))
    assert (await database.desk.allowance(ann, only(scope))).left == 40
    with pytest.raises(ConflictError, match="40 of 100"):
        await database.desk.resolve(ann, only(scope), discard(*letters[60:110]))
    assert await status(database, scope) == {"open": 70, "replayed": 60}
    database.clock.step(3_600)
    assert (await database.desk.allowance(ann, only(scope))).left == 100


async def test_many_letters_go_when_another_person_has_confirmed_them(database: Bench, scope: TenantScope) -> None:
    letters = [parked(received(scope, f"e{i}"), replays=3) for i in range(150)]
    await database.letters.park(letters)
    desk, reach = database.desk, only(scope)
    asked = await desk.request(ANN, reach, replay(*letters, force=True))
    assert (asked.status, asked.count, asked.done, asked.tenant) == ("open", 150, 0, scope.tenant_id)
    part = replay(*letters[:100], reason="", request_id=asked.request_id)
    with pytest.raises(ConflictError, match="open, not confirmed"):
        await desk.resolve(ANN, reach, part)
    with pytest.raises(ConflictError, match="another person confirms it"):
        await desk.answer(ANN, reach, asked.request_id, confirm=True)
    with pytest.raises(ConflictError, match="another person confirms it"):
        await desk.answer(replace(ANN, actor="key:rfk_1"), reach, asked.request_id, confirm=True)
    assert (await desk.answer(BOB, reach, asked.request_id, confirm=True)).answered_by == "bob"
    with pytest.raises(ConflictError, match="confirmed by bob"):
        await desk.answer(BOB, reach, asked.request_id, confirm=True)
    with pytest.raises(ConflictError, match="something else"):
        await desk.resolve(ANN, reach, replace(part, action=Action.DISCARD))
    assert Counter(results(await desk.resolve(ANN, reach, part))) == {"replayed": 100}
    left = await desk.request_of(reach, asked.request_id)
    assert (left.done, len(left.remaining)) == (100, 50)
    rest = replace(part, letter_ids=left.remaining)
    assert Counter(results(await desk.resolve(BOB, reach, rest))) == {"replayed": 50}
    assert (await desk.request_of(reach, asked.request_id)).remaining == ()
    assert len(await sent(database, scope)) == 150
    for what in ("request_requested", "request_confirmed"):
        (record,) = await records(database, scope, what)
        assert record["subject"]["request_id"] == asked.request_id
    (line,) = (await desk.requests(reach)).requests
    assert (line.request_id, line.done, line.remaining) == (asked.request_id, 150, ())


async def test_a_request_expires_and_can_be_withdrawn(database: Bench, scope: TenantScope) -> None:
    letters = [parked(received(scope, f"e{i}")) for i in range(2)]
    await database.letters.park(letters)
    desk, reach = database.desk, only(scope)
    late = await desk.request(ANN, reach, discard(*letters))
    gone = await desk.request(ANN, reach, discard(*letters))
    assert (await desk.answer(ANN, reach, gone.request_id, confirm=False)).status == "withdrawn"
    confirmed = await desk.request(ANN, reach, discard(*letters))
    await desk.answer(BOB, reach, confirmed.request_id, confirm=True)
    database.clock.step(3_600)
    for asked in (late, gone):
        with pytest.raises(ConflictError, match=r"expired|withdrawn"):
            await desk.answer(BOB, reach, asked.request_id, confirm=True)
    with pytest.raises(ConflictError, match="expired"):
        await desk.resolve(ANN, reach, discard(*letters, request_id=confirmed.request_id))
    assert await status(database, scope) == {"open": 2}


# --- who sees what ------------------------------------------------------------------------------------


async def test_letters_of_others_are_not_known(database: Bench, scope: TenantScope) -> None:
    other = fresh_scope()
    await database.create_tenant(other)
    mine, theirs, nobody = parked(received(scope)), parked(received(other)), letter(None, "", stage="scoring")
    await database.letters.park([mine, theirs, nobody])
    desk = database.desk
    for foreign in (theirs, nobody):
        with pytest.raises(NotKnownError):
            await desk.show(only(scope), foreign.letter_id)
        with pytest.raises(NotKnownError):
            await desk.reveal(ANN, only(scope), foreign.letter_id, "curious")
        with pytest.raises(NotKnownError):
            await desk.standings(only(scope), [mine.letter_id, foreign.letter_id])
        with pytest.raises(NotKnownError):
            await desk.resolve(ANN, only(scope), replay(mine, foreign))
        with pytest.raises(NotKnownError):
            await desk.request(ANN, only(scope), replay(foreign))
    assert await status(database, scope) == await status(database, other) == {"open": 1}
    assert [one.letter_id for one in (await desk.page(only(scope), LetterFilter())).letters] == [mine.letter_id]
    with pytest.raises(InvalidRequestError, match="several tenants"):
        await desk.request(ANN, only(scope, other), replay(mine, theirs))
    every = reach_of(ANN, Permission.DEADLETTERS_RESOLVE)
    asked = await desk.request(ANN, every, replay(mine, theirs, nobody))
    assert asked.tenant is None
    with pytest.raises(NotKnownError):
        await desk.request_of(only(scope), asked.request_id)
    assert (await desk.show(every, nobody.letter_id)).letter.tenant is None
    assert nobody.letter_id in {one.letter_id for one in (await desk.page(only(None), LetterFilter())).letters}


async def test_a_payload_is_read_with_a_reason_that_is_kept(database: Bench, scope: TenantScope) -> None:
    state = received(scope, text="their secret")
    one = parked(state)
    await database.letters.park([one])
    view = await database.desk.show(only(scope), one.letter_id)
    assert "their secret" not in view.model_dump_json()
    assert (view.resend, [entry.event_id for entry in view.entries]) == (None, [state.event_id])
    with pytest.raises(InvalidRequestError):
        await database.desk.reveal(ANN, only(scope), one.letter_id, " ")
    shown = await database.desk.reveal(ANN, only(scope), one.letter_id, "the sender asks")
    assert shown.event is not None
    assert shown.event["text"] == "their secret"
    (act,) = (await database.desk.show(only(scope), one.letter_id)).history
    assert (act.action, act.person, act.reason) == ("reveal", "ann", "the sender asks")
    assert len(await records(database, scope, "revealed")) == 1


async def test_a_program_without_a_person_commands_nothing(database: Bench, scope: TenantScope) -> None:
    one = parked(received(scope))
    await database.letters.park([one])
    program = Principal("key:rfk_1", "", frozenset({Grant(EVERYWHERE, Role.APPROVER)}))
    for call in (
        database.desk.resolve(program, only(scope), replay(one)),
        database.desk.request(program, only(scope), replay(one)),
        database.desk.reveal(program, only(scope), one.letter_id, "x"),
    ):
        with pytest.raises(AuthorizationError):
            await call
    for words in ("", " ", "x" * 2_001):
        with pytest.raises(InvalidRequestError):
            await database.desk.resolve(ANN, only(scope), replay(one, reason=words))


# --- lists --------------------------------------------------------------------------------------------


async def test_groups_and_lists_are_filtered_and_turned_page_by_page(database: Bench, scope: TenantScope) -> None:
    other = fresh_scope()
    await database.create_tenant(other)
    letters = []
    for i in range(12):
        database.clock.step(60)
        owner, stage = (scope, "scoring") if i % 3 else (other, "decision")
        letters.append(letter(owner, f"e{i}", stage=stage, fingerprint=f"f{i % 4}", category="C", problem="p"))
        await database.letters.park(letters[-1:])
    desk, reach = database.desk, only(scope, other)
    found, after = [], None
    while True:
        page = await desk.page(reach, LetterFilter(), after=after, limit=5)
        found += [one.letter_id for one in page.letters]
        if (after := page.next) is None:
            break
    assert found == [one.letter_id for one in letters[::-1]]
    await desk.resolve(person("carol"), reach, discard(letters[0], letters[4]))
    groups: list[LetterGroup] = []
    after = None
    while True:
        some = await desk.groups(reach, LetterFilter(), after=after, limit=3)
        groups += some.groups
        if (after := some.next) is None:
            break
    assert [group.fingerprint for group in groups] == ["f3", "f2", "f1", "f0"]
    last = groups[-1]
    assert (last.count, last.open, last.discarded, last.stages) == (3, 1, 2, ("decision", "scoring"))
    assert set(last.tenants) == {scope.tenant_id, other.tenant_id}
    assert (last.last_parked_at - last.first_parked_at).total_seconds() == 8 * 60

    async def listed(**wanted: Any) -> int:
        return len((await desk.page(reach, LetterFilter(**wanted))).letters)

    assert [await listed(stage="scoring"), await listed(fingerprint="f0"), await listed(problem="q")] == [7, 1, 0]
    assert [await listed(status="discarded"), await listed(status=None), await listed(stage="\0")] == [2, 12, 0]
    now = database.clock.now()
    recent = now.replace(microsecond=0)
    assert await listed(parked_from=recent) == 1
    assert await listed(parked_before=recent) == 9
    assert (await desk.groups(reach, LetterFilter(status="closed"))).groups == ()
    assert (await desk.groups(only(scope), LetterFilter(status="discarded"))).groups[0].count == 2
    with pytest.raises(InvalidMetadataError):
        await desk.page(reach, LetterFilter(), after="nonsense")
