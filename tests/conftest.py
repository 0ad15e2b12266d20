"""Real servers for integration and conformance tests: given ones, else private ones that live as long as the session.

Set all of RISKFLEET_TEST_DATABASE_URL, RISKFLEET_TEST_MIGRATION_DATABASE_URL, RISKFLEET_TEST_REDIS_URL,
RISKFLEET_TEST_RABBITMQ_URL and RISKFLEET_TEST_RABBITMQ_MANAGEMENT_URL to run against other servers (containers, say).
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog

from deploy.native import find_binaries
from deploy.servers import NativeServers, ServerUrls


@pytest.fixture(autouse=True)
def _own_logging() -> Iterator[None]:
    """A test that configures logging, as a process does at its start, leaves the others their own."""
    before = structlog.get_config()
    yield
    structlog.configure(**before)


_SEAM = ("DATABASE_URL", "MIGRATION_DATABASE_URL", "REDIS_URL", "RABBITMQ_URL", "RABBITMQ_MANAGEMENT_URL")


@pytest.fixture(scope="session")
def given_servers() -> ServerUrls | None:
    """The servers that the environment names, if it names all of them."""
    found = [os.environ.get(f"RISKFLEET_TEST_{name}") for name in _SEAM]
    urls = [url for url in found if url]
    if urls and len(urls) < len(_SEAM):
        pytest.fail("set all or none of " + ", ".join(f"RISKFLEET_TEST_{name}" for name in _SEAM))
    return ServerUrls(*urls) if urls else None


def need_binaries() -> None:
    """Skip, or in CI fail, where the servers are not installed: a skipped test must not pass for a green one there."""
    if missing := find_binaries()[1]:
        message = f"not installed: {', '.join(missing)} (make test installs them with YES=1)"
        if os.environ.get("CI") == "true":
            pytest.fail(message)
        pytest.skip(message)


@pytest.fixture(scope="session")
def native_servers(given_servers: ServerUrls | None) -> Iterator[NativeServers | None]:
    """The private servers behind `servers`, for tests that kill one; None when servers were given."""
    if given_servers is not None:
        yield None
        return
    need_binaries()
    # PostgreSQL's account must be able to pass through the directory, which pytest's own (0700) forbids.
    directory = Path(tempfile.mkdtemp(prefix="riskfleet-test-"))
    directory.chmod(0o711)
    native = NativeServers(directory)
    try:
        native.start()
        yield native
    finally:
        native.stop()
        shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture(scope="session")
def servers(given_servers: ServerUrls | None, native_servers: NativeServers | None) -> ServerUrls:
    """URLs of the three servers."""
    if given_servers is not None:
        return given_servers
    assert native_servers is not None
    return native_servers.urls()
