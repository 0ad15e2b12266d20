"""Settings: a mistake is named before anything starts, and a secret is never printed."""

from __future__ import annotations

import pytest

from deploy.settings import Settings, SettingsError, environment_of, example, load, variables

SECRET = "hunter2-in-a-url"


def test_a_misspelt_variable_is_an_error_and_not_ignored() -> None:
    with pytest.raises(SettingsError, match="RISKFLEET_PARTITONS"):
        load({"RISKFLEET_PARTITONS": "8"})


def test_variables_of_other_programs_are_nobody_s_mistake() -> None:
    assert load({"PATH": "/bin", "HOME": "/root", "RISKFLEET_TEST_RACES": "4"}) == Settings.model_validate({})


def test_an_empty_variable_is_one_that_is_not_set() -> None:
    assert load({"RISKFLEET_PARTITIONS": "", "DATABASE_URL": ""}) == load({})


@pytest.mark.parametrize(
    "name", ["database_url", "redis_url", "rabbitmq_url", "migration_database_url", "rabbitmq_management_url", "pepper"]
)
def test_secrets_are_masked_in_every_print_but_given_to_who_needs_them(name: str) -> None:
    settings = load({variables()[name]: SECRET})
    for text in (repr(settings), str(settings), str(settings.model_dump()), settings.model_dump_json()):
        assert SECRET not in text
    assert settings.need(name) == SECRET


def test_production_refuses_the_development_secret_without_printing_it() -> None:
    with pytest.raises(SettingsError, match="JWT_SECRET") as refused:
        load({"RISKFLEET_ENVIRONMENT": "production", "JWT_SECRET": SECRET})
    assert SECRET not in str(refused.value)
    assert load({"RISKFLEET_ENVIRONMENT": "local", "JWT_SECRET": SECRET}).jwt_secret is not None


def test_every_bad_value_is_named_by_its_variable() -> None:
    bad = {"RISKFLEET_PARTITIONS": "0", "RISKFLEET_LEASE_MS": "soon", "RISKFLEET_LOG_LEVEL": "loud"}
    with pytest.raises(SettingsError) as refused:
        load({**bad, "DATABASE_URL": SECRET})
    assert all(variable in str(refused.value) for variable in bad)
    assert SECRET not in str(refused.value)


def test_a_missing_url_is_named_by_its_variable() -> None:
    with pytest.raises(SettingsError, match="RISKFLEET_RABBITMQ_MANAGEMENT_URL"):
        load({}).need("rabbitmq_management_url")


def test_a_child_process_reads_the_settings_of_its_parent() -> None:
    settings = load(
        {
            "DATABASE_URL": "postgresql://app:x@127.0.0.1:5432/riskfleet",
            "RISKFLEET_PEPPER": SECRET,
            "RISKFLEET_RETRY_WAITS_MS": "10,20,30",
            "RISKFLEET_DATA_DIR": "/var/lib/riskfleet",
            "RISKFLEET_PUBLISH_TIMEOUT_S": "0.5",
            "RISKFLEET_ENVIRONMENT": "test",
        }
    )
    assert settings.retry_waits_ms == (10, 20, 30)
    assert load(environment_of(settings)) == settings


def test_the_example_is_the_defaults() -> None:
    pairs = [line.partition("=")[::2] for line in example().splitlines() if line and not line.startswith("#")]
    assert [name for name, _ in pairs] == list(variables().values())
    assert load(dict(pairs)) == load({})
