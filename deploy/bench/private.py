"""A fleet of a benchmark's own: private servers, private ports, a directory that goes away with it.

Promises that stage workers start only when asked, so that a backlog can be laid down before. Everything is supervised
from the thread that calls `supervise`, since children die with the thread that started them.
"""

from __future__ import annotations

import os
import secrets
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import uvloop

from contracts.tenancy import TenantScope
from contracts.topology import STAGES
from deploy import keys, local, provision
from deploy.bench.plan import BenchPlan
from deploy.fleet import Fleet, RoleSpec
from deploy.processes import free_port
from deploy.provision import DemoCredentials
from deploy.servers import NativeServers
from deploy.settings import Settings, environment_of
from governance.access import KEY_BYTES, new_api_key
from governance.postgres import create_api_key, create_engine, create_tenant

Say = Callable[[str], None]
T = TypeVar("T")
_ROOT = Path(__file__).resolve().parents[2]


class PrivateFleet:
    """The running parts: `settings`, `tenants`, and the processes by kind. Made by `private_fleet`."""

    def __init__(
        self, settings: Settings, tenants: Sequence[DemoCredentials], native: NativeServers, plan: BenchPlan, say: Say
    ) -> None:
        self.settings, self.tenants = settings, tenants
        self._native, self._say = native, say
        self._wanted = threading.Event()
        self._pids: dict[str, list[int]] = {}
        kept = {name: value for name, value in os.environ.items() if not name.startswith("RISKFLEET_")}
        environment = kept | environment_of(settings) | {"PYTHONPATH": str(_ROOT)}
        stages, others = _parts(plan)
        self._logs = settings.data_dir / "logs"
        self._stage_logs = [self._logs / "stages" / f"{spec.name}.log" for spec in stages]
        # Two supervisors, because the stages of a drain start after everything else.
        self._stages = Fleet(stages, environment, self._logs / "stages", say)
        self._others = Fleet(others, environment, self._logs, say, native.ensure_alive)

    def start_stages(self) -> None:
        """Have the supervising thread start the stage workers."""
        self._wanted.set()

    def stages_ready(self) -> bool:
        """Whether every stage worker said in its log that it consumes."""
        return all(log.exists() and b"role.ready" in log.read_bytes() for log in self._stage_logs)

    def pids(self) -> dict[str, list[int]]:
        """Process numbers by kind: each role, and rabbitmq, redis, postgresql. Workers of a stage are one kind."""
        kinds: dict[str, list[int]] = {}
        for name, numbers in list(self._pids.items()):
            kinds.setdefault(name.partition("#")[0], []).extend(numbers)
        return kinds

    def supervise(self, work: Callable[[], T]) -> T:
        """Run `work` in a thread of its own and supervise until it ends; its error is raised here."""
        result: list[T] = []
        error: list[BaseException] = []

        def run() -> None:
            try:
                result.append(work())
            except BaseException as caught:  # noqa: BLE001 - raised in the calling thread
                error.append(caught)

        thread, running = threading.Thread(target=run, name="bench", daemon=True), [self._others]
        try:
            self._others.start()
            thread.start()
            while thread.is_alive():
                if self._wanted.is_set() and self._stages not in running:
                    self._stages.start()
                    running.append(self._stages)
                for fleet in running:
                    fleet.tick()
                named = {name: [pid] for fleet in running for name, pid in fleet.pids().items()}
                self._pids = named | {name: [pid] for name, pid in self._native.pids().items()}
                time.sleep(0.05)
        finally:
            self._others.stop() if self._stages not in running else self._stop_all()
        if error:
            raise error[0]
        return result[0]

    def _stop_all(self) -> None:
        self._stages.stop()
        self._others.stop()


def _parts(plan: BenchPlan) -> tuple[list[RoleSpec], list[RoleSpec]]:
    """Stage workers (`scoring#1` is the second of its stage), and all the others."""
    stages, others = [], []
    for spec in local.roles(0):
        found = [stage for stage in STAGES if stage == spec.name]
        if found:
            number = plan.stages[found[0]]
            stages += [replace(spec, name=f"{spec.name}#{i}" if i else spec.name) for i in range(number)]
        elif spec.name != "control":
            others.append(spec)
    return stages, others


@contextmanager
def private_fleet(plan: BenchPlan, say: Say) -> Iterator[PrivateFleet]:
    """Servers, schema, topology and tenants; the roles start in `supervise`. Raises ServersError."""
    directory = Path(tempfile.mkdtemp(prefix="riskfleet-bench-"))
    directory.chmod(0o711)  # PostgreSQL's account must be able to pass through
    native = NativeServers(directory, say)
    try:
        urls, port = native.start(), free_port(set())
        own = Settings(
            environment="test",
            http_port=port,
            control_port=free_port({port}),
            data_dir=directory,
            partitions=plan.partitions,
            log_level="info",
        )
        settings = local.with_servers(own, urls)
        tenants = uvloop.run(_prepare(settings, plan))
        say(f"schema, topology and {len(tenants)} tenants ready")
        yield PrivateFleet(settings, tenants, native, plan, say)
    finally:
        native.stop()
        shutil.rmtree(directory, ignore_errors=True)


async def _prepare(settings: Settings, plan: BenchPlan) -> list[DemoCredentials]:
    await provision.migrate(settings)
    await provision.apply_topology(settings)
    keys.init(settings.data_dir)
    pepper = keys.pepper(settings)
    scopes = [TenantScope(f"bench-{number:04d}") for number in range(plan.tenants)]
    if plan.door == "amqp":
        return [await provision.create_upstream(settings, scope, scope.tenant_id, pepper) for scope in scopes]
    engine, made = create_engine(settings.need("database_url")), []
    try:
        for scope in scopes:
            # Without a broker user, which takes several calls of the management API each.
            api_key, key_id, mac = new_api_key(secrets.token_bytes(KEY_BYTES), pepper)
            await create_tenant(engine, scope, scope.tenant_id, None)
            await create_api_key(engine, scope, key_id, mac)
            made.append(DemoCredentials(scope.tenant_id, api_key, "", ""))
        return made
    finally:
        await engine.dispose()
