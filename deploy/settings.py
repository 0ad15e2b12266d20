"""Settings: read once from the environment (12-factor), masked in every print.

This is the only module that reads the environment. An unknown `RISKFLEET_` variable is an error, so
that a misspelt one cannot be ignored silently.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError

from contracts.failures import RiskfleetError


class SettingsError(RiskfleetError):
    """The configuration cannot be used."""


class Settings(BaseModel):
    """Every setting. A field is read from `RISKFLEET_<NAME>` unless `variables()` names another variable."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    database_url: SecretStr | None = Field(None, description="PostgreSQL for the application role, postgresql://…")
    redis_url: SecretStr | None = Field(None, description="Redis or Valkey, redis://…")
    rabbitmq_url: SecretStr | None = Field(None, description="RabbitMQ, amqp://…?heartbeat=10")
    jwt_secret: SecretStr | None = Field(None, description="Local development only; refused in production")
    environment: Literal["local", "test", "production"] = Field("local", description="Where this fleet runs")
    migration_database_url: SecretStr | None = Field(None, description="PostgreSQL for the owner role: migrations only")
    rabbitmq_management_url: SecretStr | None = Field(
        None, description="Management API, http://user:password@host:port"
    )
    data_dir: Path = Field(Path(".riskfleet"), description="Private servers, keys and logs of a local fleet")
    pepper: SecretStr | None = Field(None, description="Pepper of API keys; default: the file that 'keys init' made")
    partitions: int = Field(4, ge=1, le=99, description="Queues per stage; a tenant's partition is stable")
    http_host: str = Field("127.0.0.1", description="Address of the ingest gateway")
    http_port: int = Field(8080, ge=0, le=65535, description="Port of the ingest gateway")
    health_host: str = Field("127.0.0.1", description="Address of a role's health port")
    health_port: int = Field(0, ge=0, le=65535, description="Health port of a role; 0: a free one")
    control_host: str = Field("127.0.0.1", description="Address of the operator API")
    control_port: int = Field(8081, ge=0, le=65535, description="Port of the operator API")
    token_ttl: int = Field(28_800, ge=60, le=86_400, description="Seconds that a login lasts")
    oidc_issuer: str | None = Field(None, description="OpenID Connect issuer whose tokens users may present, https://…")
    oidc_audience: str | None = Field(None, description="Audience that such a token must name")
    artifact_keys: str | None = Field(
        None, description="Public keys (hex, comma separated) that sign artifacts; default: the file of 'keys init'"
    )
    token_keys: str | None = Field(
        None, description="Public keys (hex, comma separated) of logins; default: the file of 'keys init'"
    )
    simulations: int = Field(4, ge=0, le=64, description="Simulations that a gateway runs at once; 0 turns them off")
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="Least level that is logged")
    state_ttl: int = Field(604_800, ge=60, description="Seconds that an event's state lives in Redis at most")
    tombstone_ttl: int = Field(86_400, ge=1, description="Seconds that a decided event is remembered in Redis")
    lease_ms: int = Field(10_000, ge=100, le=10_000, description="Milliseconds that a claim lasts")
    prefetch: int = Field(128, ge=1, le=2_000, description="Unacked messages per consumer")
    group: int = Field(64, ge=1, le=256, description="Events that a worker gathers before it settles them together")
    workers_min: int = Field(1, ge=1, le=64, description="Fewest workers that the autoscaler wants of a stage")
    workers_max: int = Field(1, ge=1, le=64, description="Most workers per stage; 1 turns scaling on this machine off")
    scaling_port: int = Field(8082, ge=0, le=65535, description="Private port of the autoscaler")
    scaling_slo_s: float = Field(10.0, gt=0, le=3_600, description="Seconds that no event should wait at a stage")
    scaling_period_s: float = Field(5.0, ge=0.1, le=60, description="Seconds between two looks of the autoscaler")
    retry_waits_ms: tuple[int, ...] = Field((1_000, 5_000, 15_000, 30_000), description="Waits between attempts")
    publish_timeout_s: float = Field(5.0, gt=0, description="Seconds until a missing confirm counts as unknown")

    @property
    def version(self) -> str:
        """The version of this release."""
        from importlib.metadata import PackageNotFoundError, version

        try:
            return version("riskfleet")
        except PackageNotFoundError:
            return "0+source"

    def need(self, name: str) -> str:
        """The value of a URL or secret that a command cannot do without. Raises SettingsError."""
        value = getattr(self, name)
        if value is None:
            raise SettingsError(
                f"{variables()[name]} is not set; set it, or use 'riskfleet up', which finds the servers"
            )
        return str(value.get_secret_value())


_PLAIN = {
    "database_url": "DATABASE_URL",
    "redis_url": "REDIS_URL",
    "rabbitmq_url": "RABBITMQ_URL",
    "jwt_secret": "JWT_SECRET",
}


def variables() -> dict[str, str]:
    """Field name → environment variable."""
    return {name: _PLAIN.get(name, f"RISKFLEET_{name.upper()}") for name in Settings.model_fields}


@dataclass(frozen=True, slots=True)
class ClientSettings:
    """What the client commands read; a role ignores these variables."""

    url: str = "http://127.0.0.1:8080"
    control_url: str | None = None
    api_key: str | None = None
    token: str | None = None


CLIENT_VARIABLES: Final = {
    "RISKFLEET_URL": "url",
    "RISKFLEET_CONTROL_URL": "control_url",
    "RISKFLEET_API_KEY": "api_key",
    "RISKFLEET_TOKEN": "token",
}


def client(environment: Mapping[str, str] | None = None) -> ClientSettings:
    """The client's settings from the environment."""
    env = os.environ if environment is None else environment
    return ClientSettings(**{name: env[v] for v, name in CLIENT_VARIABLES.items() if env.get(v)})


def load(environment: Mapping[str, str] | None = None) -> Settings:
    """Read settings from the environment. Raises SettingsError naming every variable that is wrong."""
    env = os.environ if environment is None else environment
    names = variables()
    known = {*names.values(), *CLIENT_VARIABLES}
    # Variables of the test suite may stand beside ours, and mean nothing here.
    unknown = sorted(
        v for v in env if v.startswith("RISKFLEET_") and v not in known and not v.startswith("RISKFLEET_TEST_")
    )
    if unknown:
        raise SettingsError(f"unknown variable {', '.join(unknown)}; known ones stand in .env.example")
    values: dict[str, Any] = {name: env[variable] for name, variable in names.items() if env.get(variable)}
    if "retry_waits_ms" in values:
        values["retry_waits_ms"] = values["retry_waits_ms"].split(",")
    try:
        settings = Settings.model_validate(values)
    except ValidationError as error:
        wrong = "; ".join(f"{names.get(str(e['loc'][0]), e['loc'][0])}: {e['msg']}" for e in error.errors())
        raise SettingsError(wrong) from None
    if settings.workers_min > settings.workers_max:
        raise SettingsError("RISKFLEET_WORKERS_MIN is above RISKFLEET_WORKERS_MAX")
    if settings.environment == "production" and settings.jwt_secret is not None:
        raise SettingsError("JWT_SECRET is for local development only; RISKFLEET_ENVIRONMENT=production refuses it")
    return settings


def example() -> str:
    """The text of `.env.example`: every variable with its default."""
    lines = ["# Every variable that riskfleet reads, with its default. Empty: not set."]
    for name, variable in variables().items():
        field = Settings.model_fields[name]
        default = field.default
        if isinstance(default, tuple):
            default = ",".join(str(item) for item in default)
        lines += ["", f"# {field.description}", f"{variable}={'' if default is None else default}"]
    return "\n".join(lines) + "\n"


def environment_of(settings: Settings) -> dict[str, str]:
    """The variables that give another process these settings. Holds secrets: for a child's environment only."""
    out = {}
    for name, variable in variables().items():
        value = getattr(settings, name)
        if value is None:
            continue
        if isinstance(value, SecretStr):
            value = value.get_secret_value()
        out[variable] = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
    return out
