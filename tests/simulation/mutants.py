"""Planted bugs: each is one change of the product that breaks a promise, and somebody must notice.

A mutant is applied to a copy of the tree; then the simulation hunts it (seeds and failpoints in turn), or the
tests that it names run, when it lives where no simulation looks (SQL, Lua, the topology). Promises that a change
which does not fit the text any more is an error, so that no mutant dies unseen.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Final

import orjson

from tests.simulation.campaign import quiet, say
from tests.simulation.plans import Plan, random_plan, single_plans
from tests.simulation.run import run

EVIDENCE: Final = Path("docs/evidence/mutants.json")
SEEDS: Final = 10_000
_ROOMS: Final = ("contracts", "gateway", "workers", "governance", "resilience", "deploy", "tests")
_TIMEOUT_S: Final = 1_800


@dataclass(frozen=True, slots=True)
class Mutant:
    """`old` stands once in the file and becomes `new`; `tests` catch it, or the simulation when there are none."""

    name: str
    file: str
    old: str
    new: str
    tests: str = ""


_RUNNER, _OUT, _INTAKE = "workers/runner.py", "workers/outgoing.py", "gateway/intake.py"
_STORE, _LEDGER = "resilience/memory/state_store.py", "governance/memory/ledger.py"
_FAILING = "workers/failing.py"

MUTANTS: Final = (
    Mutant(
        "ack although a server failed",
        _RUNNER,
        "return [Pause(type(error).__name__)] * len(deliveries)",
        "return [Ack()] * len(deliveries)",
    ),
    Mutant(
        "a timeout taken as success at a stage",
        _OUT,
        "elif not arrived(message, confirm):",
        "elif not arrived(message, confirm) and confirm is not Confirm.UNKNOWN:",
    ),
    Mutant(
        "a timeout taken as success at the door",
        _INTAKE,
        "if confirm is not Confirm.CONFIRMED:",
        "if confirm is Confirm.REFUSED:",
    ),
    Mutant(
        "nothing re-emitted for what is already done",
        _RUNNER,
        "            await self._already_done(entry, claim, wave)\n            return None\n"
        "        if claim.verdict is ClaimVerdict.LOCKED:",
        "            return None\n        if claim.verdict is ClaimVerdict.LOCKED:",
    ),
    Mutant(
        "records not re-emitted for what is already done",
        _RUNNER,
        'wave.records += state.records(min(first, owed["first"]))',
        "wave.records += ()",
    ),
    Mutant(
        "the trail not re-emitted for what is already decided",
        _RUNNER,
        "        wave.decided(entry, state, row)\n        wave.records += state.records()\n",
        "        wave.decided(entry, state, row)\n",
    ),
    Mutant(
        "the decision is an upsert",
        _LEDGER,
        "if tx.insert(DECISIONS, replace(row, feed=tx.number, superseded_by=corrector))",
        "if tx.put(DECISIONS, replace(row, feed=tx.number, superseded_by=corrector)) is None",
    ),
    Mutant(
        "the loser of a decision publishes its own",
        _LEDGER,
        "            found = (_highest(tx, row.tenant, row.event_id) for row in rows)\n"
        "            return tuple(row for row in found if row is not None)\n\n"
        "        return await self._database.run([state.scope for state in states], work)\n\n    async def known",
        "            return tuple(row.row for row in rows)\n\n"
        "        return await self._database.run([state.scope for state in states], work)\n\n    async def known",
    ),
    Mutant(
        "the decision is inserted after the advance",
        _RUNNER,
        "rows = await self._ports.ledger.decide([new for _, new in worked])",
        "await self._ports.state_store.advance([self._move(item, new) for item, new in worked])\n"
        "        rows = await self._ports.ledger.decide([new for _, new in worked])",
    ),
    Mutant(
        "the approval is opened outside the transaction",
        _LEDGER,
        "                _open_approval(tx, state)\n",
        "                pass\n",
    ),
    Mutant(
        "advance creates absent state",
        _STORE,
        "        if cell is None:\n            return False\n        if (cell.lock, cell.version, cell.digest)",
        "        if cell is None:\n"
        "            self.server.put(key, Cell(m.version, m.digest, m.body_digest, m.stored))\n"
        "            return True\n        if (cell.lock, cell.version, cell.digest)",
        "tests/unit/test_memory_state_store.py tests/unit/test_state_machines.py tests/unit/test_runner.py",
    ),
    Mutant(
        "a numeric fence in place of the token",
        _STORE,
        "if (cell.lock, cell.version, cell.digest) == (m.token, m.expected_version, m.expected_digest):",
        "if cell.version == m.expected_version or m.version >= cell.version:",
        "tests/unit/test_memory_state_store.py tests/unit/test_state_machines.py tests/unit/test_runner.py",
    ),
    Mutant(
        "who lost the lock is settled", _RUNNER, "wave.lost.append(item.entry)", "pass", "tests/unit/test_runner.py"
    ),
    Mutant(
        "what another holds is settled",
        _RUNNER,
        "            wave.messages.append(ladder_message(entry, claim.lease_ms, self._layouts))\n",
        "",
    ),
    Mutant(
        "the trail is not owed after an install",
        _RUNNER,
        "return 0 if item.owes_trail or self._stage is Stage.RETRIEVAL else item.state.n + 1",
        "return 0 if self._stage is Stage.RETRIEVAL else item.state.n + 1",
        "tests/unit/test_runner.py",
    ),
    Mutant(
        "a suspect is dropped",
        _RUNNER,
        "                wave.messages.append(stage_message(entry.evolve(suspect=True), self._layouts))\n",
        "",
    ),
    Mutant(
        "another body is not seen at retrieval",
        _RUNNER,
        "            if row.body_digest != state.body_digest:\n"
        "                self._failures.conflict(entry, wave, state)\n"
        "            elif row.decision",
        "            if row.decision",
    ),
    Mutant(
        "a conflict is not parked",
        _FAILING,
        "        self.park(park(entry, IdempotencyConflictError(), self._now()), wave)\n",
        "",
    ),
    Mutant(
        "an undecodable carrier is dropped",
        _FAILING,
        "            self.park(park_bytes(delivery.body, self._stage, error, now), wave)\n            return []",
        "            return []",
    ),
    Mutant(
        "a repeat is not published again",
        _INTAKE,
        "if reservation.verdict is Reserved.REPEAT and (reservation.version > 0 or reservation.stored is None):",
        "if reservation.verdict is Reserved.REPEAT:",
    ),
    Mutant(
        "another body is not seen at the door",
        _STORE,
        "            return Reservation(Reserved.CONFLICT, cell.version, None)\n",
        "            return Reservation(Reserved.REPEAT, cell.version, None)\n",
    ),
    Mutant(
        "the audit sink acks before its commit",
        "workers/sinks/audit.py",
        "return [Pause(type(error).__name__)] * len(deliveries)",
        "return [Ack()] * len(deliveries)",
    ),
    Mutant(
        "the parking sink acks before its commit",
        "workers/sinks/parking.py",
        "return [Pause(type(error).__name__)] * len(deliveries)",
        "return [Ack()] * len(deliveries)",
    ),
    Mutant(
        "audit numbers from a sequence",
        "governance/memory/audit.py",
        "    seq = head.seq + 1\n",
        '    seq = tx.next_number("audit")\n',
    ),
    Mutant(
        "a record is appended twice",
        "governance/memory/audit.py",
        '    if tx.find(RECORDS, "record", chain, record_id):\n        return False\n',
        "",
    ),
    Mutant(
        "a check that raises has passed",
        "workers/judgement/checks.py",
        'code, verdict = CHECK_ERROR, "error"',
        'code, verdict = None, "pass"',
        "tests/unit/test_judgement.py tests/unit/test_stages.py",
    ),
    Mutant(
        "unroutable entries count as sent",
        "contracts/messages.py",
        "return confirm is Confirm.CONFIRMED or (confirm is Confirm.UNROUTABLE and not message.mandatory)",
        "return confirm in (Confirm.CONFIRMED, Confirm.UNROUTABLE)",
        "tests/unit/test_runner.py",
    ),
    Mutant(
        "decisions are mandatory",
        "contracts/messages.py",
        '        headers=headers | ({"traceparent": traceparent} if traceparent else {}),\n        mandatory=False,\n',
        '        headers=headers | ({"traceparent": traceparent} if traceparent else {}),\n',
        "tests/unit/test_runner.py tests/unit/test_contracts.py",
    ),
    Mutant(
        "the AMQP door makes identities",
        "gateway/ingress.py",
        '            source="amqp",\n',
        '            source="amqp",\n            allow_generated_identity=True,\n',
        "tests/unit/test_ingress.py",
    ),
    Mutant(
        "the ladder is at most once",
        "contracts/topology.py",
        '        "message-ttl": ttl_ms,\n        "dead-letter-exchange": WORK,\n'
        '        "dead-letter-strategy": "at-least-once",\n',
        '        "message-ttl": ttl_ms,\n        "dead-letter-exchange": WORK,\n',
        "tests/unit/test_topology.py tests/unit/test_memory_broker.py",
    ),
    Mutant(
        "the tenant is missing in an event's id",
        "contracts/events.py",
        'f"riskfleet.event\\0{scope.tenant_id}\\0{identity}"',
        'f"riskfleet.event\\0{identity}"',
        "tests/unit/test_contracts.py tests/unit/test_intake.py tests/unit/test_http.py",
    ),
    Mutant(
        "an older revision goes out after a newer one",
        "workers/sinks/delivery.py",
        "if row is not None and row.revision > ",
        "if row is not None and 0 > ",
        "tests/unit/test_schedules.py",
    ),
    Mutant(
        "the reconciler has no age rule",
        "resilience/reconciler.py",
        "return self.passed is not None and now >= self.passed + timedelta(seconds=settle_s)",
        "return True",
        "tests/unit/test_reconciler.py",
    ),
)


def apply(mutant: Mutant, root: Path) -> None:
    """Change the copy. Raises ValueError when the text is not there exactly once."""
    path = root / mutant.file
    text = path.read_text()
    if text.count(mutant.old) != 1:
        raise ValueError(f"{mutant.name}: the text to change stands {text.count(mutant.old)} times in {mutant.file}")
    path.write_text(text.replace(mutant.old, mutant.new))


def hunt() -> dict[str, object]:
    """The first plan that breaks a promise here: what it was, and what it broke."""
    quiet()
    for number, plan in enumerate(_plans()):
        try:
            broken = run(plan).violations
        except Exception as error:  # noqa: BLE001 - a run that cannot end is a run that noticed
            broken = [f"{type(error).__name__}: {error}"]
        if broken:
            where = " ".join(str(strike) for strike in plan.strikes) if plan.chained else f"seed {plan.seed}"
            return {"caught": True, "by": "simulation", "runs": number + 1, "where": where, "broken": broken[0]}
    return {"caught": False, "by": "simulation", "runs": SEEDS}


def _plans() -> Iterator[Plan]:
    """Seeds and failpoints in turn: a bug is found by the one or the other first."""
    singles = single_plans()
    for seed in range(SEEDS):
        yield random_plan(seed)
        yield from islice(singles, 1)


def judge(mutant: Mutant, root: Path) -> dict[str, object]:
    """Copy, change, and see who notices."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        copy = Path(name)
        for room in _ROOMS:
            shutil.copytree(root / room, copy / room, ignore=shutil.ignore_patterns("__pycache__"))
        for file in ("pyproject.toml", "README.md"):
            shutil.copy(root / file, copy / file)
        shutil.copytree(root / "docs", copy / "docs")
        apply(mutant, copy)
        environment = {**os.environ, "PYTHONPATH": name, "PYTHONDONTWRITEBYTECODE": "1"}
        command = [sys.executable, "-W", "ignore"]
        if mutant.tests:
            command += ["-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *mutant.tests.split()]
        else:
            command += ["-m", "tests.simulation.mutants", "--hunt"]
        done = subprocess.run(
            command, cwd=copy, env=environment, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False
        )
    seconds = round(time.monotonic() - began, 1)
    if mutant.tests:
        failed = [line for line in done.stdout.splitlines() if line.startswith("FAILED")]
        found: dict[str, object] = {
            "caught": done.returncode == 1 and bool(failed),
            "by": "tests",
            "where": failed[0].removeprefix("FAILED ").split(" - ")[0] if failed else done.stdout[-300:],
        }
    else:
        lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
        found = orjson.loads(lines[-1]) if lines else {"caught": False, "by": "simulation", "where": done.stderr[-300:]}
    return {"mutant": mutant.name, "file": mutant.file, "seconds": seconds, **found}


def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(description="Plant bugs, one at a time, and see who notices.")
    parser.add_argument("--hunt", action="store_true", help="look for a broken promise in this tree")
    parser.add_argument("--only", default="", help="mutants whose name holds this text")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="at once (default: cores)")
    chosen = parser.parse_args(arguments)
    if chosen.hunt:
        say(orjson.dumps(hunt()).decode())
        return 0
    root = Path.cwd()
    wanted = [mutant for mutant in MUTANTS if chosen.only in mutant.name]
    found = []
    with ThreadPoolExecutor(chosen.jobs) as pool:
        for one in pool.map(lambda mutant: judge(mutant, root), wanted):
            found.append(one)
            mark = "caught" if one["caught"] else "SURVIVED"
            say(
                f"{mark:<8} {one['mutant']:<52} {one['by']:<10} {one['seconds']:>6} s  {str(one.get('where', ''))[:90]}"
            )
    survived = sum(not one["caught"] for one in found)
    say(f"{len(found)} mutants, {len(found) - survived} caught, {survived} survived")
    if not chosen.only:
        EVIDENCE.parent.mkdir(parents=True, exist_ok=True)
        document = {"command": "make mutants", "seeds": SEEDS, "mutants": found}
        EVIDENCE.write_bytes(orjson.dumps(document, option=orjson.OPT_INDENT_2) + b"\n")
    return 1 if survived else 0


if __name__ == "__main__":
    sys.exit(main())
