"""The parts of starting servers that need no server."""

from __future__ import annotations

import os
import socket
import stat
import subprocess
import sys
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import yaml

from deploy import containers, servers
from deploy.native import find_binaries, find_postgresql
from deploy.processes import Identity, Record, ServersError, free_port, identify, port_is_free, tail
from deploy.servers import NativeServers, ServerUrls, ensure_servers, running_urls

GIVEN = ServerUrls("postgresql://u:secret@h/d", "postgresql://o:secret@h/d", "redis://h", "amqp://h", "http://h")
ROOT = Path(__file__).parents[2]


def programs(directory: Path, *names: str) -> Path:
    directory.mkdir(parents=True)
    for name in names:
        (directory / name).write_text("#!/bin/sh\n")
        (directory / name).chmod(0o755)
    return directory


def test_given_servers_are_used_as_they_are_and_nothing_is_written(tmp_path: Path) -> None:
    assert ensure_servers(GIVEN, tmp_path / "data") == (GIVEN, None)
    assert not (tmp_path / "data").exists()


def test_no_print_of_the_urls_shows_a_password() -> None:
    assert "secret" not in f"{GIVEN} {GIVEN!r}"


def test_the_newest_complete_postgresql_is_chosen_and_a_lone_program_on_path_is_not(tmp_path: Path) -> None:
    complete = ("initdb", "postgres", "psql", "pg_isready")
    programs(tmp_path / "pg" / "9.6" / "bin", *complete)
    newest = programs(tmp_path / "pg" / "15" / "bin", *complete)
    programs(tmp_path / "pg" / "17" / "bin", "psql")
    decoy = programs(tmp_path / "decoy", "postgres")
    assert find_postgresql(str(decoy), tmp_path / "pg") == newest
    assert find_postgresql(str(decoy), tmp_path / "none") is None


def test_missing_programs_are_named_by_the_packages_that_bring_them(tmp_path: Path) -> None:
    binaries, missing = find_binaries(str(tmp_path), (tmp_path,), tmp_path)
    assert binaries is None
    assert missing == ["rabbitmq-server", "redis-server", "postgresql"]


def test_nothing_is_installed_without_consent(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("YES", raising=False)
    monkeypatch.setattr(servers, "find_binaries", lambda: (None, ["redis-server"]))
    monkeypatch.setattr(sys, "stdin", (tmp_path / "empty").open("w+"))
    with pytest.raises(ServersError, match=r"missing on this machine: redis-server.*DATABASE_URL.*YES=1"):
        ensure_servers(None, tmp_path / "data")


def test_ports_and_passwords_come_back_and_only_the_owner_reads_them(tmp_path: Path) -> None:
    path = tmp_path / "servers.json"
    first = Record(path)
    port, secret = first.port("redis"), first.secret("redis")
    again = Record(path)
    assert (again.port("redis"), again.secret("redis")) == (port, secret)
    assert again.port("rabbitmq") != port
    assert len(secret) == 48
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_damaged_record_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "servers.json").write_text("{")
    with pytest.raises(ServersError, match="remove its directory"):
        Record(tmp_path / "servers.json")


def test_a_later_process_of_the_same_number_is_not_ours(tmp_path: Path) -> None:
    record = Record(tmp_path / "servers.json")
    me = identify(os.getpid())
    assert me is not None
    record.remember_process("redis", me)
    assert Record(tmp_path / "servers.json").process("redis") == me
    record.remember_process("redis", Identity(me.pid, me.started + "0"))
    assert record.process("redis") is None


def test_a_zombie_counts_as_dead() -> None:
    child = subprocess.Popen(["true"])
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert identify(child.pid) is None
    child.wait()


def test_ports_lie_below_those_of_outgoing_connections() -> None:
    low = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    assert all(1024 < free_port(set()) < low for _ in range(20))


def test_a_listening_port_is_not_free() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert not port_is_free(taken.getsockname()[1])


def test_the_tail_of_a_log_is_short(tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert tail(log) == "(no log)"
    log.write_text("\n".join(str(n) for n in range(10_000)))
    assert tail(log, 2) == "9998\n9999"


def test_urls_before_the_start_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(ServersError, match="not started"):
        NativeServers(tmp_path).urls()
    assert running_urls(tmp_path) is None


def test_the_compose_file_runs_every_role_with_a_health_check() -> None:
    yaml = pytest.importorskip("yaml")
    compose = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
    services = compose["services"]
    commands = {" ".join(s.get("command", [])) for s in services.values() if "riskfleet" in s["image"]}
    stages = {f"worker {stage}" for stage in ("retrieval", "scoring", "guardrail", "decision")}
    assert commands >= {"gateway", "ingress", "sink audit", "sink metrics", "sink parking"} | stages
    for name, service in services.items():
        assert "healthcheck" in service, name
        for source in (str(v).split(":")[0] for v in service.get("volumes", [])):
            assert not source.startswith("./") or (ROOT / source).exists(), source
        assert all(str(port).startswith("127.0.0.1:") for port in service.get("ports", [])), name
        assert set(service.get("depends_on", {})) <= set(services)
    assert "RISKFLEET_MIGRATION_DATABASE_URL" in services["migrate"]["environment"]
    assert "RISKFLEET_MIGRATION_DATABASE_URL" not in services["gateway"]["environment"]


def test_containers_publish_the_ports_of_their_urls_on_loopback_only() -> None:
    overlay = yaml.safe_load((ROOT / "deploy" / "docker" / "servers.yml").read_text())["services"]
    whole = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
    assert set(overlay) <= set(whole)
    published = {str(port) for service in (*overlay.values(), whole["rabbitmq"]) for port in service.get("ports", ())}
    assert all(port.startswith("127.0.0.1:") for port in published)
    made = containers.urls({})
    for url in (made.database, made.migration_database, made.redis, made.rabbitmq, made.rabbitmq_management):
        assert any(port.startswith(f"127.0.0.1:{urlsplit(url).port}:") for port in published), url


def test_the_passwords_of_containers_are_those_of_the_compose_file() -> None:
    text = (ROOT / "docker-compose.yml").read_text()
    made = containers.urls({})
    for url in (made.database, made.migration_database, made.redis, made.rabbitmq):
        assert f":-{urlsplit(url).password}}}" in text
    assert urlsplit(containers.urls({"RISKFLEET_APP_PASSWORD": "own"}).database).password == "own"
