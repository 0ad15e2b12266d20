"""The three servers in containers: what `riskfleet up` uses where a Docker engine answers and the programs are missing.

Promises: only the three servers run in containers, on 127.0.0.1; `stop` stops them and keeps their volumes. Untried so
far: it was written and checked against the Compose file's schema on machines without a Docker engine.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Final

from deploy.processes import ServersError

if TYPE_CHECKING:
    from deploy.servers import ServerUrls

_ROOT: Final = Path(__file__).resolve().parents[1]
_FILES: Final = (_ROOT / "docker-compose.yml", _ROOT / "deploy" / "docker" / "servers.yml")
_SERVICES: Final = ("postgresql", "redis", "rabbitmq")
_START_S: Final = 300


def engine_answers() -> bool:
    """Whether a Docker engine with Compose answers within 3 seconds."""
    docker = shutil.which("docker")
    if docker is None or not all(file.exists() for file in _FILES):
        return False
    try:
        for command in (["info"], ["compose", "version"]):
            subprocess.run([docker, *command], capture_output=True, timeout=3, check=True)
    except (subprocess.SubprocessError, OSError):
        return False
    return True


class ContainerServers:
    """RabbitMQ, Redis and PostgreSQL by Docker Compose; the same interface as the private native ones."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say

    def start(self) -> ServerUrls:
        """Start all three and wait until they are healthy. Raises ServersError with the end of Compose's output."""
        self._say("starting RabbitMQ, Redis and PostgreSQL in containers")
        self._compose("up", "--detach", "--wait", *_SERVICES)
        return urls(os.environ)

    def stop(self) -> None:
        """Stop them; their volumes stay for the next start."""
        self._compose("stop", *_SERVICES)

    def ensure_alive(self) -> list[str]:
        """Nothing: the engine restarts what ends by itself."""
        return []

    def _compose(self, *arguments: str) -> None:
        files = [part for file in _FILES for part in ("--file", str(file))]
        done = subprocess.run(
            ["docker", "compose", *files, *arguments], capture_output=True, text=True, timeout=_START_S, check=False
        )
        if done.returncode != 0:
            raise ServersError("docker compose failed:\n" + "\n".join(done.stderr.splitlines()[-15:]))


def urls(environment: Mapping[str, str]) -> ServerUrls:
    """Where the containers answer, with the passwords that the Compose file takes from the same variables."""
    from deploy.servers import ServerUrls

    def password(name: str, default: str) -> str:
        return environment.get(f"RISKFLEET_{name}_PASSWORD") or default

    rabbit = f"riskfleet:{password('RABBITMQ', 'local-rabbit')}@127.0.0.1"
    database = "127.0.0.1:25432/riskfleet"
    return ServerUrls(
        database=f"postgresql://riskfleet_app:{password('APP', 'local-app')}@{database}",
        migration_database=f"postgresql://riskfleet_owner:{password('OWNER', 'local-owner')}@{database}",
        redis=f"redis://:{password('REDIS', 'local-redis')}@127.0.0.1:26379/0",
        rabbitmq=f"amqp://{rabbit}:25672/?heartbeat=10",
        rabbitmq_management=f"http://{rabbit}:15672",
    )
