"""The container files agree with the code: no engine is at hand to try them, so what can be compared is compared."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import yaml

from deploy import containers, keys, local
from deploy.cli import app
from deploy.settings import load
from tests.unit.test_docs import commands_of

ROOT = Path(__file__).resolve().parents[2]
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
ON_THE_MACHINE: dict[str, Any] = yaml.safe_load((ROOT / "deploy/docker/servers.yml").read_text())
SERVICES: dict[str, Any] = COMPOSE["services"]
SERVERS = ("postgresql", "redis", "rabbitmq")
ROLES = {name: service for name, service in SERVICES.items() if name not in (*SERVERS, "migrate")}


def resolved(value: str) -> str:
    """A value with the defaults of its variables, as Compose takes it without a .env file."""
    return re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", value)


def environment(name: str) -> dict[str, str]:
    return {key: resolved(value) for key, value in SERVICES[name]["environment"].items()}


def target(volume: str) -> tuple[str, str, str]:
    source, path, *mode = volume.split(":")
    return source, path, mode[0] if mode else "rw"


def test_every_role_of_a_local_fleet_has_a_service_and_no_other() -> None:
    wanted = {
        spec.argv[spec.argv.index("deploy.role") + 1 : spec.argv.index("--health-port")] for spec in local.roles(0)
    }
    assert {tuple(service["command"]) for service in ROLES.values()} == wanted


@pytest.mark.parametrize("name", [*ROLES, "migrate"])
def test_the_settings_know_every_variable_of_a_service(name: str) -> None:
    settings = load(environment(name))
    for needed in ("database_url", "redis_url", "rabbitmq_url", "rabbitmq_management_url", "pepper"):
        assert settings.need(needed)
    assert (settings.migration_database_url is not None) == (name == "migrate")


@pytest.mark.parametrize("name", ROLES)
def test_a_service_is_asked_for_health_where_it_answers(name: str) -> None:
    settings = load(environment(name))
    port = {"gateway": settings.http_port, "control": settings.control_port}.get(name, settings.health_port)
    (url,) = re.findall(r"'(http://[^']+)'", SERVICES[name]["healthcheck"]["test"][-1])
    assert (urlsplit(url).port, urlsplit(url).path) == (port, "/health/ready")
    for published in SERVICES[name].get("ports", []):
        host, outside, inside = published.split(":")
        assert (host, outside, inside) == ("127.0.0.1", str(port), str(port))
        # What is published must listen on more than the container's own loopback.
        assert (settings.http_host if name == "gateway" else settings.control_host) == "0.0.0.0"


def test_public_keys_go_to_every_role_and_private_ones_to_control_alone() -> None:
    mounted = {name: [target(volume) for volume in service["volumes"]] for name, service in ROLES.items()}
    private = {name for name, volumes in mounted.items() if any(source == "keys" for source, _, _ in volumes)}
    assert private == {"control"}
    for name, volumes in mounted.items():
        data_dir = environment(name)["RISKFLEET_DATA_DIR"]
        assert [(path, mode) for _, path, mode in volumes] == [(data_dir, "ro")], name
    made = environment("migrate")["RISKFLEET_DATA_DIR"]
    assert made == environment("control")["RISKFLEET_DATA_DIR"]
    (script,) = SERVICES["migrate"]["command"]
    copied = f"cp {keys.public_file(Path(made), 'artifact').with_name('*.pub')} "
    assert copied + f"{environment('ingress')['RISKFLEET_DATA_DIR']}/keys/" in script
    assert {source for volumes in mounted.values() for source, _, _ in volumes} <= set(COMPOSE["volumes"])


def test_the_directories_of_keys_belong_to_the_user_of_the_image() -> None:
    dockerfile = (ROOT / "deploy/docker/Dockerfile").read_text()
    (made,) = re.findall(r"install -d -o riskfleet -m 700 (.+)", dockerfile)
    mounted = {target(volume)[1] for name in (*ROLES, "migrate") for volume in SERVICES[name]["volumes"]}
    assert set(made.split()) == mounted
    (exposed,) = re.findall(r"^EXPOSE (.+)$", dockerfile, re.MULTILINE)
    assert exposed.split() == ["8080", "8081", "9000"]


def test_what_a_role_needs_is_made_before_it_starts() -> None:
    (script,) = SERVICES["migrate"]["command"]
    said = [tuple(words.split()) for words in re.findall(r"riskfleet ((?:[a-z]+ ?)+)", script)]
    known = commands_of(app)
    assert [words[:2] for words in said] == [
        ("keys", "init"),
        ("db", "upgrade"),
        ("topology", "apply"),
        ("db", "upgrade"),
    ]
    assert all(words[1] in known[words[0]] for words in said)
    assert all("migrate" in service["depends_on"] for service in ROLES.values())


def test_the_servers_alone_answer_where_a_local_fleet_looks_for_them() -> None:
    urls = containers.urls({})
    published = {
        name: [int(port.split(":")[1]) for port in [*SERVICES[name].get("ports", []), *service["ports"]]]
        for name, service in ON_THE_MACHINE["services"].items()
    }
    assert set(published) == set(SERVERS)
    assert published["postgresql"] == [urlsplit(urls.database).port]
    assert published["redis"] == [urlsplit(urls.redis).port]
    assert sorted(published["rabbitmq"]) == sorted(
        [urlsplit(urls.rabbitmq).port or 0, urlsplit(urls.rabbitmq_management).port or 0]
    )
    # The same users, passwords and database as inside the network of containers.
    inside = environment("migrate")
    for given, there in (
        (urls.database, inside["DATABASE_URL"]),
        (urls.migration_database, inside["RISKFLEET_MIGRATION_DATABASE_URL"]),
        (urls.redis, inside["REDIS_URL"]),
        (urls.rabbitmq, inside["RABBITMQ_URL"]),
        (urls.rabbitmq_management, inside["RISKFLEET_RABBITMQ_MANAGEMENT_URL"]),
    ):
        one, other = urlsplit(given), urlsplit(there)
        assert (one.scheme, one.username, one.password, one.path, one.query) == (
            *(other.scheme, other.username, other.password, other.path, other.query),
        )


@pytest.mark.parametrize("name", [*SERVERS, *ROLES])
def test_every_port_of_the_compose_file_is_published_on_loopback_only(name: str) -> None:
    ports = [*SERVICES[name].get("ports", []), *ON_THE_MACHINE["services"].get(name, {}).get("ports", [])]
    assert all(port.startswith("127.0.0.1:") for port in ports)
