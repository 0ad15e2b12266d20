"""The Compose file and the code speak of the same fleet; nobody has to start a container to see it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from deploy.containers import urls
from deploy.local import roles
from deploy.settings import Settings, variables

ROOT = Path(__file__).resolve().parents[2]
SERVERS = {"postgresql", "redis", "rabbitmq"}


def compose(name: str = "docker-compose.yml") -> dict[str, Any]:
    found = yaml.safe_load((ROOT / name).read_text(encoding="utf-8"))
    assert isinstance(found, dict)
    return found


def fleet_services() -> dict[str, dict[str, Any]]:
    return {name: s for name, s in compose()["services"].items() if name not in SERVERS | {"migrate"}}


def test_every_role_of_a_fleet_has_its_container() -> None:
    wanted = {" ".join(spec.argv[3 : spec.argv.index("--health-port")]) for spec in roles(0)}
    assert {" ".join(service["command"]) for service in fleet_services().values()} == wanted


def test_every_variable_of_a_container_is_a_setting() -> None:
    known = set(variables().values())
    for name, service in (fleet_services() | {"migrate": compose()["services"]["migrate"]}).items():
        assert set(service["environment"]) <= known, name


def test_ports_are_published_on_this_machine_only_and_are_those_of_the_settings() -> None:
    for document in (compose(), compose("deploy/docker/servers.yml")):
        published = [port for service in document["services"].values() for port in service.get("ports", ())]
        assert published
        assert all(port.startswith("127.0.0.1:") for port in published)
    services, defaults = compose()["services"], Settings()
    assert services["gateway"]["ports"] == [f"127.0.0.1:{defaults.http_port}:{defaults.http_port}"]
    assert services["control"]["ports"] == [f"127.0.0.1:{defaults.control_port}:{defaults.control_port}"]


def test_health_is_asked_where_the_role_answers() -> None:
    own = {"gateway": Settings().http_port, "control": Settings().control_port}
    for name, service in fleet_services().items():
        port = own.get(name, int(service["environment"]["RISKFLEET_HEALTH_PORT"]))
        assert f"http://127.0.0.1:{port}/health/ready" in service["healthcheck"]["test"][-1], name


def test_only_control_and_the_migration_see_private_keys() -> None:
    services = fleet_services() | {"migrate": compose()["services"]["migrate"]}
    seeing = {name for name, s in services.items() if any(v.startswith("private:") for v in s["volumes"])}
    assert seeing == {"control", "migrate"}
    for name, service in services.items():
        directory = service["environment"]["RISKFLEET_DATA_DIR"]
        assert any(volume.split(":")[1] == directory for volume in service["volumes"]), name


def test_the_passwords_that_up_uses_are_the_defaults_of_the_file() -> None:
    text = (ROOT / "docker-compose.yml").read_text(encoding="utf-8")
    defaults = dict(re.findall(r"\$\{RISKFLEET_(\w+)_PASSWORD:-([^}]+)\}", text))
    made = urls({})
    assert f":{defaults['APP']}@" in made.database
    assert f":{defaults['OWNER']}@" in made.migration_database
    assert f":{defaults['REDIS']}@" in made.redis
    assert f":{defaults['RABBITMQ']}@" in made.rabbitmq
